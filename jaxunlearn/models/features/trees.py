"""Parameters of feature networks: from torch tensors to a tree, and between a tree and the flat dict of a file.

Both ways are strict: every tensor is used exactly once, and all problems are listed together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxunlearn.types import PyTree

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
"""Name of a leaf -> what torch calls it."""

COUNTER = "num_batches_tracked"
"""A tensor of torch's BatchNorm that inference does not need."""

_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}


def paths(tree: PyTree, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Path -> leaf of nested mappings, in their order."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= paths(value, (*prefix, name))
        else:
            flat[(*prefix, name)] = value
    return flat


def nested(flat: Mapping[tuple[str, ...], object]) -> dict:
    """The inverse of :func:`paths`."""
    tree: dict = {}
    for path, value in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


def to_tree(
    state: Mapping[str, np.ndarray], abstract: PyTree, torch_name: Callable[[tuple[str, ...]], str], what: str
) -> PyTree:
    """Tensors of a torch state dict -> parameter tree.

    Kernels change from OIHW to HWIO and from [out, in] to [in, out]; :data:`COUNTER` tensors are dropped.

    Args:
      state: dotted name -> array in torch layout.
      abstract: the tree that the network needs, of anything with a ``shape``.
      torch_name: path of a leaf -> its name in ``state``.
      what: name of the network, for the message.

    Returns:
      Nested dicts of C-contiguous float32 arrays.

    Raises:
      ValueError: lists all missing, unexpected and wrongly shaped tensors, and those that are not finite.
    """
    state = {name: np.asarray(value) for name, value in state.items() if not name.endswith("." + COUNTER)}
    wanted = {}
    for path, leaf in paths(abstract).items():
        order = _TO_TORCH.get(len(leaf.shape)) if path[-1] == "kernel" else None
        shape = tuple(leaf.shape) if order is None else tuple(leaf.shape[i] for i in order)
        wanted[torch_name(path)] = (path, shape)
    _check(state, {name: shape for name, (_, shape) in wanted.items()}, what)
    out = {}
    for name, (path, _) in wanted.items():
        tensor = state[name]
        if path[-1] == "kernel":
            tensor = tensor.transpose(_TO_FLAX[tensor.ndim])
        out[path] = np.ascontiguousarray(tensor, np.float32)
    return nested(out)


def to_flat(params: PyTree) -> dict[str, np.ndarray]:
    """Parameter tree -> dotted path -> C-contiguous float32 array: the content of a converted weights file."""
    return {
        ".".join(path): np.ascontiguousarray(jax.device_get(leaf), np.float32) for path, leaf in paths(params).items()
    }


def from_flat(flat: Mapping[str, np.ndarray], abstract: PyTree, what: str) -> PyTree:
    """The inverse of :func:`to_flat`.

    Args:
      flat: dotted path -> array.
      abstract: the tree that the network needs, of anything with a ``shape``.
      what: name of the network, for the message.

    Raises:
      ValueError: lists all missing, unexpected and wrongly shaped arrays, and those that are not finite.
    """
    wanted = {".".join(path): tuple(leaf.shape) for path, leaf in paths(abstract).items()}
    flat = {name: np.asarray(value) for name, value in flat.items()}
    _check(flat, wanted, what)
    return nested({tuple(name.split(".")): np.ascontiguousarray(flat[name], np.float32) for name in wanted})


@functools.lru_cache(maxsize=16)
def abstract_params(module, height: int, width: int) -> PyTree:
    """The parameter tree of a module of images [B,H,W,3] as shapes: nothing is computed."""
    image = jax.ShapeDtypeStruct((1, height, width, 3), np.float32)
    return jax.eval_shape(module.init, jax.eval_shape(lambda: jax.random.key(0)), image)["params"]


def _check(found: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
    problems = [f"missing: {name} {wanted[name]}" for name in wanted.keys() - found.keys()]
    problems += [f"unexpected: {name} {found[name].shape}" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        if found[name].shape != wanted[name]:
            problems.append(f"wrong shape: {name} is {found[name].shape}, the network has {wanted[name]}")
        elif not np.all(np.isfinite(found[name])):
            problems.append(f"not finite: {name} holds NaN or infinity")
    if problems:
        lines = "\n".join(sorted(problems))
        raise ValueError(
            f"the weights are not those of {what} ({len(problems)} problems); is it the right file?\n{lines}"
        )
