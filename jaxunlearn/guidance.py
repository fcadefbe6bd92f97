"""Classifier-free guidance (Ho and Salimans 2022): how strongly a sample follows its condition."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxunlearn.types import Array, Predict, PyTree


def classifier_free(predict: Predict, scale: float | Array, uncond: PyTree) -> Predict:
    """The guided model ``eps_u + scale (eps_c - eps_u)``, with and without the condition in one call of twice the batch.

    This is Eq. 6 of the paper with ``scale = 1 + w``: 1 is the model as it is, 0 the unconditional model, above 1 the
    samples follow the condition more closely than the training data does. Since the two weights add up to 1, guiding
    predictions of v or of the clean image and converting the result equals converting first (so ``predict`` may return
    what :func:`jaxunlearn.sampling.sample` is told with ``prediction_type``).

    Args:
      predict: a model that takes a condition.
      scale: one number; it may be traced. With the number 1 itself ``predict`` is called once, without doubling.
      uncond: what stands for "no condition", a tree like the condition: [1,N,D] for every example alike, or [B,N,D]
        (the embedding of the empty text, for text models).

    Returns:
      ``(params, x_t [B,H,W,C], t [B] or scalar, cond) -> [B,H,W,C]``. The two rows of an example stand next to each
      other in the doubled batch, so that a batch that is divided over devices stays where it is.

    Raises:
      ValueError: a scale that is not one finite number; when called: no condition, or one that ``uncond`` does not fit.

    >>> def predict(params, x_t, t, cond):
    ...     return cond
    >>> guided = classifier_free(predict, 3.0, jnp.array([[1.0]]))
    >>> guided(None, jnp.zeros((2, 1)), jnp.array([5, 5]), jnp.array([[1.0], [2.0]])).tolist()
    [[1.0], [4.0]]
    """
    if jnp.shape(scale) != ():
        raise ValueError(f"guidance scale of shape {jnp.shape(scale)}: must be one number; 1 is no guidance")
    traced = isinstance(scale, jax.core.Tracer)
    if not traced and not math.isfinite(scale):
        raise ValueError(f"guidance scale {float(scale)}: must be finite; 1 is no guidance")
    if not traced and scale == 1:
        return predict

    def guided(params: PyTree, x_t: Array, t: Array, cond: PyTree = None) -> Array:
        batch = x_t.shape[0]
        both = _pairs(uncond, cond, batch)
        t = jnp.broadcast_to(jnp.asarray(t), (batch,))
        out = predict(params, jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2), both)
        out = out.reshape(batch, 2, *out.shape[1:])
        without, following = out[:, 0], out[:, 1]
        return without + jnp.asarray(scale, out.dtype) * (following - without)

    return guided


def _pairs(uncond: PyTree, cond: PyTree, batch: int) -> PyTree:
    """Leaves [2B,...]: row 2i is example i without its condition, row 2i + 1 with it."""
    if cond is None:
        raise ValueError("guidance needs a condition: give cond, or use the model without classifier_free")
    trees = jax.tree.structure(uncond), jax.tree.structure(cond)
    if trees[0] != trees[1]:
        raise ValueError(f"uncond is a tree {trees[0]}: must be like the condition's, {trees[1]}")

    def pair(path, without, following):
        without, following = jnp.asarray(without), jnp.asarray(following)
        name = jax.tree_util.keystr(path)
        if following.ndim == 0 or following.shape[0] != batch:
            raise ValueError(f"cond{name} of shape {following.shape}: must have {batch} rows, as many as images")
        if without.shape[1:] != following.shape[1:] or without.ndim == 0 or without.shape[0] not in (1, batch):
            raise ValueError(
                f"uncond{name} of shape {without.shape}: must be {(1, *following.shape[1:])} or {following.shape}"
            )
        without = jnp.broadcast_to(without, following.shape).astype(following.dtype)
        return jnp.stack([without, following], axis=1).reshape(2 * batch, *following.shape[1:])

    return jax.tree_util.tree_map_with_path(pair, uncond, cond)
