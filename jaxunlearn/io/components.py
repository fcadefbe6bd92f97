"""One component of a pipeline folder: what it is, its parameters, and the files they came from."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxunlearn.io.hashing import tree_sha256
from jaxunlearn.io.weights import DIFFUSERS, TRANSFORMERS, Stem, WeightFiles, read_weights
from jaxunlearn.models.convert import prefix_of, to_diffusers, to_flax
from jaxunlearn.types import PyTree

UNETS = ("UNet2DModel", "UNet2DConditionModel")
COMPANIONS = {"vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
"""Component of a pipeline beside the UNet -> the class that it must be of."""

_WIDE, _DEEP = 2**16, 16


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
    """An autoencoder or a text encoder.

    Attributes:
      name: of its folder, for example "vae".
      config: its architecture.
      params: its float32 parameter tree.
      files: its weight files.
      changed: whether ``params`` are not those of the files, so that an export writes them.
    """

    name: str
    config: Any
    params: PyTree
    files: WeightFiles
    changed: bool = False

    @functools.cached_property
    def sha256(self) -> str:
        """Fingerprint of the parameters, see :func:`jaxunlearn.io.hashing.tree_sha256`."""
        return tree_sha256(self.params)

    def with_params(self, params: PyTree) -> Component:
        """The same component with other parameters, which an export writes.

        Raises:
          ValueError: names or shapes differ from those of the config.
        """
        check_params(self.config, params)
        return dataclasses.replace(self, params=params, changed=True)

    def tensors(self) -> dict[str, np.ndarray]:
        """The parameters in torch layout, under the names that the files have."""
        return to_diffusers(self.params, prefix_of(self.files.weight_map))


def stem_of(name: str) -> Stem:
    """How the weight files in the folder of a component are called."""
    return TRANSFORMERS if name == "text_encoder" else DIFFUSERS


def config_of(content: Mapping[str, Any], allowed: tuple[str, ...], default: str | None = None) -> Any:
    """The configuration in the content of a ``config.json``.

    Args:
      content: its keys; ``_class_name`` says which class it is of.
      allowed: names of classes.
      default: the class where the content does not say it; None is the first of ``allowed``.

    Raises:
      ValueError: another class, or one line for every refused value.
    """
    from jaxunlearn.models.architectures import ARCHITECTURES

    name = content.get("_class_name", default or allowed[0])
    if name not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ValueError(f"_class_name: {name!r} is not supported; allowed: {names}; use such a model")
    kind, lines = ARCHITECTURES[name].config, []
    try:
        config = kind.from_dict(content)
    except ValueError as error:
        lines = str(error).splitlines()
    for field in dataclasses.fields(kind):
        value = content.get(field.name)
        if _is_odd(value) and not any(line.startswith(field.name) for line in lines):
            allowed = "a text, a number or a list of them, with integers below 2147483648"
            lines.append(f"{field.name}: {str(value)[:60]} is not supported; allowed: {allowed}; correct it")
    if lines:
        raise ValueError("\n".join(lines))
    return config


def _is_odd(value: Any) -> bool:
    """Whether no field can hold it: JAX takes no larger integers, and a configuration must have a hash."""
    entries = value if isinstance(value, list) else [value]
    return any(isinstance(entry, dict | list) or (isinstance(entry, int) and abs(entry) >= 2**31) for entry in entries)


def read_params(folder: pathlib.Path, files: WeightFiles, config: Any) -> PyTree:
    """The float32 parameter tree of a component.

    Raises:
      ValueError: a config that cannot belong to the files; all missing, unexpected and wrongly shaped tensors; values
        that are not finite.
    """
    from jaxunlearn.models.parameters import abstract_params

    _check_size(files, config)
    params = to_flax(read_weights(folder, files), abstract_params(config))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)


def check_params(config: Any, params: PyTree) -> None:
    """Compares a tree with what the config needs.

    Raises:
      ValueError: one line for every missing, unexpected or wrongly shaped leaf.
    """
    from jaxunlearn.models.parameters import abstract_params

    def shapes(tree):
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {"/".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}

    needed, given = shapes(abstract_params(config)), shapes(params)
    lines = [f"missing parameter: {name} {needed[name]}" for name in needed if name not in given]
    lines += [f"unexpected parameter: {name} {given[name]}" for name in given if name not in needed]
    for name in needed.keys() & given.keys():
        if needed[name] != given[name]:
            lines.append(f"wrong shape: {name} is {given[name]}, the model has {needed[name]}")
    if lines:
        raise ValueError("\n".join(sorted(lines)))


def _check_size(files: WeightFiles, config: Any) -> None:
    """Refuses a config that describes a far larger model than the files hold, before anything of that size is built."""
    widest = max((size for shape in files.shapes.values() for size in shape), default=0)
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        numbers = [n for n in (value if isinstance(value, tuple) else (value,)) if type(n) is int]
        largest = max(numbers, default=0)
        if "layers" in field.name and largest > max(_DEEP, len(files.shapes) // 8):
            lines.append(
                f"{field.name}: {largest} layers need more than the {len(files.shapes)} tensors of the weights"
            )
        elif field.name in _WIDTHS and largest > max(_WIDE, widest):
            lines.append(f"{field.name}: {largest} is wider than the widest tensor of the weights, {widest}")
    if lines:
        raise ValueError("\n".join(f"{line}; is it the right config?" for line in lines))


_WIDTHS = {"block_out_channels", "in_channels", "out_channels", "latent_channels", "cross_attention_dim", "hidden_size"}
_WIDTHS |= {"time_embedding_dim", "num_class_embeds", "vocab_size", "intermediate_size", "max_position_embeddings"}
