"""Weight files of one component: safetensors or pickled ``.bin``, one file or several with an index, in any variant.

What was read is remembered in :class:`WeightFiles`, so that new weights go back into the same files, dtypes and header
metadata: writing unchanged weights gives the same bytes. Pickled files are only read (:mod:`jaxunlearn.io.torch_pickle`);
what was in them is written as safetensors.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxunlearn.io.json_files import parse_json, read_bytes
from jaxunlearn.io.safetensors_header import TensorEntry, read_header
from jaxunlearn.io.torch_pickle import inspect_torch_file, read_torch_file

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Names of dtypes in safetensors headers -> dtypes that are read and written."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".msgpack", ".ckpt", ".pt", ".pth", ".pkl", ".onnx", ".h5", ".gguf")
_INDEX = re.compile(r".*\.index(\.[^.]+)?\.json")
_BUFFER = re.compile(r"(?:.*\.)?position_ids")  # Integers in old files of text encoders; no model here needs them.


class Stem(NamedTuple):
    """How the weight files of a component are called, without ``.safetensors`` and ``.bin``."""

    safetensors: str
    pickled: str


DIFFUSERS = Stem("diffusion_pytorch_model", "diffusion_pytorch_model")
TRANSFORMERS = Stem("model", "pytorch_model")


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """Which files held which tensors.

    Attributes:
      weight_map: tensor name -> file name.
      dtypes: tensor name -> dtype name of safetensors ("F32", "F16", "BF16"; others for buffers only).
      metadata: file name -> the metadata of its header, or None.
      index_name: name of the index file, or None for a single file.
      index_bytes: its content.
      shapes: tensor name -> shape in the file.
    """

    weight_map: Mapping[str, str]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, Mapping[str, str] | None]
    index_name: str | None = None
    index_bytes: bytes = b""
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def main_dtype(self) -> str:
        """The dtype of most tensors; of those whose name is not in the files."""
        return collections.Counter(self.dtypes.values()).most_common(1)[0][0]

    @property
    def pickled(self) -> bool:
        """Whether the files are pickled ``.bin`` files."""
        return any(name.endswith(".bin") for name in self.metadata)

    def as_safetensors(self) -> WeightFiles:
        """Where the same tensors are written: the files themselves, or their counterparts if they are pickled."""
        if not self.pickled:
            return self
        weight_map = {tensor: _counterpart(name) for tensor, name in self.weight_map.items()}
        metadata = {_counterpart(name): {"format": "pt"} for name in self.metadata}
        if self.index_name is None:
            return dataclasses.replace(self, weight_map=weight_map, metadata=metadata)
        index = json.loads(self.index_bytes) | {"weight_map": weight_map}
        index_name = _counterpart(self.index_name.replace(".bin.index.", ".safetensors.index."))
        return dataclasses.replace(
            self, weight_map=weight_map, metadata=metadata, index_name=index_name, index_bytes=json_bytes(index)
        )


def is_weight_file(name: str) -> bool:
    """Whether a file of this name holds weights, or an index of weights, in any format."""
    return name.endswith(WEIGHT_SUFFIXES) or _INDEX.fullmatch(name) is not None


def single_file(dtype: str = "F32") -> WeightFiles:
    """Where new weights go: one file without a variant."""
    name = f"{DIFFUSERS.safetensors}.safetensors"
    return WeightFiles({"": name}, {"": dtype}, {name: {"format": "pt"}})


def inspect_weights(folder: pathlib.Path, variant: str | None, stem: Stem = DIFFUSERS) -> WeightFiles:
    """Reads the headers, not the tensors, of a component's weights.

    Order: the single safetensors file, then the index with its shards, then the same two of pickled files; of
    ``variant`` if one is given.

    Raises:
      ValueError: no such files, files in another format or broken ones, dtypes other than float32, float16 and
        bfloat16; one line for every problem.
    """
    ending = f".{variant}" if variant else ""
    for base, kind in ((stem.safetensors, "safetensors"), (stem.pickled, "bin")):
        single, index_name = f"{base}{ending}.{kind}", f"{base}.{kind}.index{ending}.json"
        if (folder / single).is_file():
            return _inspect(folder, [single], None, b"")
        if (folder / index_name).is_file():
            try:
                index_bytes = read_bytes(folder / index_name)
            except ValueError as error:
                raise ValueError(f"{index_name}: {error}") from None
            return _inspect(folder, None, index_name, index_bytes)
    if not folder.is_dir():
        raise ValueError("weights: the folder is not there; copy it as well")
    raise ValueError(no_weights((path.name for path in folder.iterdir()), variant, stem))


def _inspect(folder: pathlib.Path, names: list[str] | None, index_name: str | None, index_bytes: bytes) -> WeightFiles:
    index, problems = None, []
    if names is None:
        index = _weight_map(index_name, index_bytes)
        names = sorted(set(index.values()))
        problems = [
            f"{n}: named by {index_name} but not there; copy it as well" for n in names if not _there(folder, n)
        ]
    entries: dict[str, TensorEntry] = {}
    weight_map, metadata = {}, {}
    for name in names if not problems else ():
        try:
            found, metadata[name] = _header(folder / name)
        except ValueError as error:
            problems.append(str(error))
            continue
        entries |= found
        weight_map |= dict.fromkeys(found, name)
        for tensor, entry in found.items():
            if entry.dtype not in DTYPES and not _BUFFER.fullmatch(tensor):
                problems.append(f"{name}: {tensor} is {entry.dtype}; allowed: {', '.join(DTYPES)}; re-save it as F32")
    if problems:
        raise ValueError("\n".join(problems))
    first = index_name or names[0]
    if index is not None and dict(index) != weight_map:
        wrong = sorted(t for t in index.keys() | weight_map.keys() if index.get(t) != weight_map.get(t))
        raise ValueError(f"{index_name}: does not say what the files hold: {', '.join(wrong[:5])}; re-save the model")
    if any(tensor.startswith("model.diffusion_model.") for tensor in weight_map):
        raise ValueError(f"{first}: is a single-file LDM checkpoint; convert it to a diffusers folder first")
    if not weight_map:
        raise ValueError(f"{first}: holds no tensors; re-save the model")
    dtypes = {tensor: entry.dtype for tensor, entry in entries.items()}
    shapes = {tensor: entry.shape for tensor, entry in entries.items()}
    return WeightFiles(weight_map, dtypes, metadata, index_name, index_bytes, shapes)


def read_weights(folder: pathlib.Path, files: WeightFiles) -> dict[str, np.ndarray]:
    """All tensors, in the dtypes of the files; buffers that no model needs are left out.

    Raises:
      ValueError: a file changed or is damaged; one line for every tensor with values that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    tensors: dict[str, np.ndarray] = {}
    problems = []
    for name in files.metadata:
        try:
            found = read_torch_file(folder / name) if name.endswith(".bin") else load_file(folder / name)
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"{name}: cannot be read ({error}); copy it again") from None
        for tensor, values in found.items():
            if _BUFFER.fullmatch(tensor):
                continue
            tensors[tensor] = values
            if not np.all(np.isfinite(values)):
                problems.append(
                    f"{name}: {tensor} holds values that are not finite (NaN or infinity); the model is broken: copy it"
                    " again, or take an earlier checkpoint"
                )
    if problems:
        raise ValueError("\n".join(problems))
    return tensors


def write_weights(
    folder: pathlib.Path, tensors: Mapping[str, np.ndarray], files: WeightFiles, dtype: str | None = None
) -> None:
    """Writes float tensors into the files they came from, in the dtypes they had, or all in ``dtype``.

    A tensor that was not in the files goes into the first of them, in their main dtype. Instead of pickled files their
    safetensors counterparts are written.

    Raises:
      ValueError: a value that is not finite, or not in the narrower dtype.
    """
    files = files.as_safetensors()
    groups: dict[str, dict[str, np.ndarray]] = {name: {} for name in files.metadata}
    names = set(files.weight_map)
    chosen = {tensor: dtype or files.dtypes.get(tensor, files.main_dtype) for tensor in tensors}
    for tensor, values in tensors.items():
        with np.errstate(over="ignore"):
            cast = np.asarray(values).astype(DTYPES[chosen[tensor]])
        if not np.all(np.isfinite(cast)):
            reason = f"not finite as {chosen[tensor]}; " + (
                "the weights themselves are broken" if not np.all(np.isfinite(values)) else "export it as dtype 'F32'"
            )
            raise ValueError(f"{tensor}: {reason}")
        groups[files.weight_map.get(tensor, next(iter(groups)))][tensor] = cast
    for name, group in groups.items():
        save_tensors(folder / name, group, files.metadata[name])
    if files.index_name is None:
        return
    if names == set(tensors) and all(chosen[t] == files.dtypes[t] for t in tensors):
        (folder / files.index_name).write_bytes(files.index_bytes)
        return
    index = json.loads(files.index_bytes)
    total = sum(values.nbytes for group in groups.values() for values in group.values())
    index["metadata"] = dict(index.get("metadata") or {}) | {"total_size": total}
    index["weight_map"] = {tensor: name for name, group in groups.items() for tensor in group}
    (folder / files.index_name).write_bytes(json_bytes(index))


def save_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None) -> None:
    """Writes one safetensors file. Arrays may be views of any strides."""
    from safetensors.numpy import save_file

    # save_file writes the memory of a transposed view as it lies, under the transposed shape, without an error.
    contiguous = {name: np.ascontiguousarray(values).reshape(values.shape) for name, values in tensors.items()}
    save_file(contiguous, path, metadata=None if metadata is None else dict(metadata))


def json_bytes(value: Any) -> bytes:
    """JSON as diffusers writes it: sorted keys, two spaces, a newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _counterpart(name: str) -> str:
    """Name of the safetensors file for the tensors of a pickled one; names of index files change their stem only."""
    if name.startswith(f"{TRANSFORMERS.pickled}.") or name.startswith(f"{TRANSFORMERS.pickled}-"):
        name = TRANSFORMERS.safetensors + name.removeprefix(TRANSFORMERS.pickled)
    return name.removesuffix(".bin") + ".safetensors" if name.endswith(".bin") else name


def _there(folder: pathlib.Path, name: str) -> bool:
    return (folder / name).is_file()


def _header(path: pathlib.Path) -> tuple[dict[str, TensorEntry], Mapping[str, str] | None]:
    if path.name.endswith(".bin"):
        return inspect_torch_file(path), None
    return read_header(path)


def _weight_map(index_name: str, content: bytes) -> dict[str, str]:
    try:
        index = parse_json(content)
        weight_map = index["weight_map"]
        names = set(weight_map.values())
        if not isinstance(index.get("metadata") or {}, dict):
            raise TypeError("its metadata is not an object")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index_name}: is not an index with a weight_map ({error}); copy it again") from None
    outside = sorted(str(n)[:80] for n in names if not isinstance(n, str) or pathlib.PurePath(n).name != n or "\0" in n)
    if outside:
        raise ValueError(f"{index_name}: names files outside of its folder: {', '.join(outside)}; re-save the model")
    kinds = {pathlib.PurePath(name).suffix for name in names}
    wanted = ".bin" if ".bin.index." in index_name else ".safetensors"
    if kinds != {wanted}:
        raise ValueError(f"{index_name}: names files that do not end in {wanted}; re-save the model")
    return weight_map


def variants_in(names: Iterable[str], stem: Stem = DIFFUSERS) -> list[str]:
    """The variants of a component's weights among file names, sorted; the plain files are the variant ""."""
    safetensors, pickled = re.escape(stem.safetensors), re.escape(stem.pickled)
    part, index = r"(?:\.([^.]+?))?(?:-\d+-of-\d+)?", r"\.index(?:\.([^.]+))?\.json"
    files = re.compile(rf"{safetensors}{part}\.safetensors|{pickled}{part}\.bin")
    indices = re.compile(rf"{safetensors}\.safetensors{index}|{pickled}\.bin{index}")
    matches = [files.fullmatch(name) or indices.fullmatch(name) for name in names]
    return sorted({match[1] or match[2] or "" for match in matches if match})


def no_weights(names: Iterable[str], variant: str | None, stem: Stem = DIFFUSERS) -> str:
    """One line that says why there are no weights of ``variant`` among the names of files, and what to do."""
    names = sorted(names)
    variants = variants_in(names, stem)
    if variant is not None:
        known = ["none (the plain files)" if name == "" else name for name in variants] or ["none"]
        return f"weights: no variant {variant!r}; there are: {', '.join(known)}; ask for one of these"
    variants = [name for name in variants if name]
    if variants:
        return (
            f"weights: there are only variants: {', '.join(variants)}; ask for one, for example variant={variants[0]!r}"
        )
    pickled = [name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]
    if pickled:
        return (
            f"{pickled[0]}: is not {stem.safetensors}.safetensors or {stem.pickled}.bin, the only names of weights that"
            " are read; re-save the model with diffusers: from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    flax = [name for name in names if name.endswith(".msgpack")]
    if flax:
        return f"{flax[0]}: old Flax weights are not read; give the folder with {stem.safetensors}.safetensors"
    plain = stem.safetensors
    return f"weights: neither {plain}.safetensors nor {plain}.safetensors.index.json is there; copy it as well"
