"""Trains the run's small classifier on the keep images, so that quality metrics need no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn.images import to_model
from jaxunlearn.models.classifier import Classifier, init_params


class TrainedClassifier(NamedTuple):
    """A trained classifier.

    Attributes:
      apply: ``images uint8 [N,H,W,C] -> (logits [N, classes], features [N, d])``, on the host, in batches.
      classes: the labels, in the order of the logits.
      train_images: number of keep images with a label.
      held_out_images: number of held-out images with a known label.
      held_out_accuracy: share of them that it names correctly; NaN if there are none.
    """

    apply: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    classes: np.ndarray
    train_images: int
    held_out_images: int
    held_out_accuracy: float


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray | None,
    held_out: tuple[np.ndarray, np.ndarray] | None,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float = 2e-3,
) -> TrainedClassifier:
    """Adam with a cosine rate on cross-entropy; images are shifted by up to one pixel. Deterministic in the seed.

    Args:
      images: uint8 [N,H,W,C], keep images.
      labels: int [N]; negative labels (images without a class) are left out.
      held_out: images and labels for the accuracy, or None.
      steps: number of steps.
      batch_size: images per step.
      seed: of parameters, batches and shifts.
      learning_rate: the highest rate.

    Raises:
      ValueError: no labels, or fewer than two classes.
    """
    if labels is None or np.sum(np.asarray(labels) >= 0) == 0:
        raise ValueError("the data has no labels, so no classifier can be trained")
    labels = np.asarray(labels)
    images, labels = images[labels >= 0], labels[labels >= 0]
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"a classifier needs at least two classes, the keep images have only {classes.tolist()}")

    module = Classifier(len(classes))
    params = init_params(module, images.shape[1:], seed)
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))

    @jax.jit
    def train_step(params, opt_state, batch, target):
        def loss(params):
            logits, _ = module.apply({"params": params}, to_model(batch))
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, target))

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng([seed, 1])
    opt_state = tx.init(params)
    for rows in _epochs(rng, len(images), batch_size, steps):
        params, opt_state = train_step(params, opt_state, _shift(rng, images[rows]), targets[rows].astype(np.int32))

    forward = jax.jit(lambda params, batch: module.apply({"params": params}, to_model(batch)))

    def apply(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        outputs = [forward(params, _padded(batch[i : i + 500], 500)) for i in range(0, len(batch), 500)]
        return tuple(np.concatenate([np.asarray(out[k]) for out in outputs])[: len(batch)] for k in (0, 1))

    known = np.zeros(0, int) if held_out is None else np.flatnonzero(np.isin(held_out[1], classes))
    accuracy = float("nan")
    if len(known):
        accuracy = float(np.mean(classes[apply(held_out[0][known])[0].argmax(axis=1)] == held_out[1][known]))
    return TrainedClassifier(apply, classes, len(images), len(known), accuracy)


def _epochs(rng: np.random.Generator, population: int, batch_size: int, steps: int):
    batch_size = min(batch_size, population)
    order = np.zeros(0, np.int64)
    for _ in range(steps):
        if len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(population)])
        yield order[:batch_size]
        order = order[batch_size:]


def _shift(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Each batch moves by -1, 0 or 1 pixel in both directions, borders repeated: cheap, and it generalises better."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    y, x = rng.integers(0, 3, 2)
    return padded[:, y : y + images.shape[1], x : x + images.shape[2]]


def _padded(batch: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)]) if len(batch) < size else batch
