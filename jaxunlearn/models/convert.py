"""Parameters between torch (dotted names, torch layouts) and the trees of :mod:`jaxunlearn.models`.

This holds for the models of diffusers (UNets, autoencoder) and for the CLIP text model of transformers. A path of the
tree is the torch name with list indices as suffixes: ``down_blocks.0.resnets.1.conv1.weight`` is ``down_blocks_0 /
resnets_1 / conv1 / kernel``. Only the containers in :data:`LISTS` have indices, so that ``linear_1`` stays what it is.
One table, :func:`name_table`, serves both directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from jaxunlearn.types import PyTree

LISTS = (
    *("down_blocks", "up_blocks", "resnets", "attentions", "downsamplers", "upsamplers", "to_out"),
    *("transformer_blocks", "net", "layers"),
)
"""The names that are lists in torch."""

TEXT_PREFIX = "text_model."
"""What the names of a CLIP text model begin with in files of transformers before 5."""

_INDEXED = re.compile(rf"({'|'.join(LISTS)})_(\d+)")
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"((?:.*\.)?attentions\.\d+)\.({'|'.join(_OLD_ATTENTION)})\.(weight|bias)")
_ATTENTION_WEIGHT = re.compile(r"(?:.*\.)?attentions\.\d+\.(?:to_q|to_k|to_v|to_out\.0)\.weight")


def _flatten(params: PyTree, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    flat = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, (*prefix, name))
        else:
            flat[(*prefix, name)] = value
    return flat


def diffusers_name(path: tuple[str, ...]) -> str:
    """Path in the tree -> dotted name.

    >>> diffusers_name(("up_blocks_0", "attentions_2", "to_out_0", "kernel"))
    'up_blocks.0.attentions.2.to_out.0.weight'
    >>> diffusers_name(("time_embedding", "linear_1", "bias"))
    'time_embedding.linear_1.bias'

    Raises:
      ValueError: the last part is not the name of a parameter.
    """
    *modules, leaf = path
    if leaf not in _LEAVES:
        raise ValueError(f"unknown parameter {'/'.join(path)!r}; the last part must be one of {', '.join(_LEAVES)}")
    return ".".join([*(_INDEXED.sub(r"\1.\2", m) if _INDEXED.fullmatch(m) else m for m in modules), _LEAVES[leaf]])


def name_table(params: PyTree) -> dict[str, tuple[str, ...]]:
    """Dotted name -> path, for every leaf of a tree of arrays or shapes.

    Raises:
      ValueError: two leaves have one dotted name, or a leaf is unknown.
    """
    table: dict[str, tuple[str, ...]] = {}
    for path in _flatten(params):
        name = diffusers_name(path)
        if name in table:
            raise ValueError(f"{'/'.join(path)} and {'/'.join(table[name])} are both {name!r}")
        table[name] = path
    return table


def _torch_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if leaf == "kernel":
        return tuple(shape[i] for i in _TO_TORCH[len(shape)])
    return tuple(shape)


_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}


def to_flax(tensors: Mapping[str, np.ndarray], abstract_params: PyTree) -> PyTree:
    """Tensors of a weight file -> parameter tree.

    The attention names of diffusers before 0.12 (``query``, ``key``, ``value``, ``proj_attn``) and their weights in the
    form of 1x1 convolutions are understood. :data:`TEXT_PREFIX` is dropped where the tree does not have it, and
    ``position_ids``, which are no parameters, are passed over. Dtypes stay as they are. Beside source and result one
    tensor at a time is held.

    Args:
      tensors: dotted name -> array in torch layout.
      abstract_params: the tree that the model needs, of anything with a ``shape``.

    Returns:
      Nested dicts of C-contiguous numpy arrays.

    Raises:
      ValueError: lists all missing, unexpected and wrongly shaped tensors, and names that are given twice.
    """
    shapes = _flatten(abstract_params)
    table = name_table(abstract_params)
    drop = "" if "text_model" in abstract_params else TEXT_PREFIX
    found: dict[str, np.ndarray] = {}
    given: dict[str, str] = {}
    problems = []
    for name, tensor in tensors.items():
        if name.endswith(".position_ids"):
            continue
        new = name.removeprefix(drop)
        match = _OLD_NAME.fullmatch(new)
        new = f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}" if match else new
        tensor = np.asarray(tensor)
        if _ATTENTION_WEIGHT.fullmatch(new) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        if new in found:
            problems.append(f"given twice: {name} and {given[new]}")
        elif new not in table:
            problems.append(f"unexpected: {name} {tensor.shape}")
        else:
            found[new], given[new] = tensor, name
    for name, path in table.items():
        expected = _torch_shape(path[-1], shapes[path].shape)
        if name not in found:
            problems.append(f"missing: {name} {expected}")
        elif found[name].shape != expected:
            problems.append(f"wrong shape: {name} is {found[name].shape}, the model has {expected}")
    if problems:
        lines = "\n".join(sorted(problems))
        raise ValueError(
            f"the weights do not fit the model ({len(problems)} problems); is it the right config?\n{lines}"
        )
    params: dict = {}
    for name, path in table.items():
        tensor = found[name]
        if path[-1] == "kernel":
            tensor = tensor.transpose(_TO_FLAX[tensor.ndim])
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = np.ascontiguousarray(tensor)
    return params


def prefix_of(names: Iterable[str]) -> str:
    """The argument ``prefix`` with which :func:`to_diffusers` writes the form of names that was read.

    >>> prefix_of(["text_model.final_layer_norm.weight"])
    'text_model.'
    """
    names = list(names)
    return TEXT_PREFIX if names and all(name.startswith(TEXT_PREFIX) for name in names) else ""


def to_diffusers(params: PyTree, prefix: str = "") -> dict[str, np.ndarray]:
    """Parameter tree -> dotted name -> array in torch layout.

    Every array is C-contiguous: ``safetensors.numpy.save_file`` silently writes transposed views wrong. Dtypes stay as
    they are.

    Args:
      params: a tree of arrays.
      prefix: put before every name, see :func:`prefix_of`.

    Raises:
      ValueError: a leaf has no name in torch.
    """
    leaves = _flatten(params)
    tensors = {}
    for name, path in name_table(params).items():
        tensor = np.asarray(jax.device_get(leaves[path]))
        if path[-1] == "kernel":
            tensor = tensor.transpose(_TO_TORCH[tensor.ndim])
        tensors[prefix + name] = np.ascontiguousarray(tensor)
    return tensors
