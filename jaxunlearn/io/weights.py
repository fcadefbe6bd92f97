"""Weight files of one diffusers component: one safetensors file, or several with an index, in any variant.

What was read is remembered in :class:`WeightFiles`, so that new weights go back into the same files, dtypes and header
metadata: writing unchanged weights gives the same bytes.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

STEM = "diffusion_pytorch_model"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Names of dtypes in safetensors headers -> dtypes that are read and written."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".msgpack", ".ckpt", ".pt", ".pth", ".pkl", ".onnx", ".h5", ".gguf")
_INDEX = re.compile(r".*\.index(\.[^.]+)?\.json")
_VARIANT_FILE = re.compile(rf"{STEM}\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors")
_VARIANT_INDEX = re.compile(rf"{STEM}\.safetensors\.index\.([^.]+)\.json")


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """Which files held which tensors.

    Attributes:
      weight_map: tensor name -> file name.
      dtypes: tensor name -> dtype name of safetensors ("F32", "F16", "BF16").
      metadata: file name -> the metadata of its header, or None.
      index_name: name of the index file, or None for a single file.
      index_bytes: its content.
    """

    weight_map: Mapping[str, str]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, Mapping[str, str] | None]
    index_name: str | None = None
    index_bytes: bytes = b""

    @property
    def main_dtype(self) -> str:
        """The dtype of most tensors; of those whose name is not in the files."""
        return collections.Counter(self.dtypes.values()).most_common(1)[0][0]


def is_weight_file(name: str) -> bool:
    """Whether a file of this name holds weights, or an index of weights, in any format."""
    return name.endswith(WEIGHT_SUFFIXES) or _INDEX.fullmatch(name) is not None


def single_file(dtype: str = "F32") -> WeightFiles:
    """Where new weights go: one file without a variant."""
    name = f"{STEM}.safetensors"
    return WeightFiles({"": name}, {"": dtype}, {name: {"format": "pt"}})


def inspect_weights(folder: pathlib.Path, variant: str | None) -> WeightFiles:
    """Reads the headers, not the tensors, of a component's weights.

    Order: the single file, then the index with its shards; of ``variant`` if one is given.

    Raises:
      ValueError: no such files, files in another format or broken ones, dtypes other than float32, float16 and
        bfloat16; one line for every problem.
    """
    ending = f".{variant}" if variant else ""
    single, index_name = f"{STEM}{ending}.safetensors", f"{STEM}.safetensors.index{ending}.json"
    if (folder / single).is_file():
        headers, problems = {single: _header(folder / single)}, []
        index, index_name, index_bytes = None, None, b""
    elif (folder / index_name).is_file():
        index_bytes = (folder / index_name).read_bytes()
        index = _weight_map(folder, index_name, index_bytes)
        absent = [name for name in sorted(set(index.values())) if not (folder / name).is_file()]
        if absent:
            raise ValueError(
                "\n".join(f"{name}: named by {index_name} but not there; copy it as well" for name in absent)
            )
        headers, problems = {name: _header(folder / name) for name in sorted(set(index.values()))}, []
    else:
        raise ValueError(_not_found(folder, variant))

    weight_map, dtypes, metadata = {}, {}, {}
    for name, header in headers.items():
        metadata[name] = header.pop("__metadata__", None)
        for tensor, entry in header.items():
            weight_map[tensor], dtypes[tensor] = name, entry["dtype"]
            if entry["dtype"] not in DTYPES:
                problems.append(
                    f"{name}: {tensor} is {entry['dtype']}; allowed: {', '.join(DTYPES)}; re-save it as F32"
                )
    if index is not None and dict(index) != weight_map:
        wrong = sorted(t for t in index.keys() | weight_map.keys() if index.get(t) != weight_map.get(t))
        problems.append(f"{index_name}: does not say what the files hold: {', '.join(wrong[:5])}; re-save the model")
    if any(tensor.startswith("model.diffusion_model.") for tensor in weight_map):
        problems.append(f"{single}: is a single-file LDM checkpoint; convert it to a diffusers folder first")
    elif not weight_map:
        problems.append(f"{single}: holds no tensors; re-save the model")
    if problems:
        raise ValueError("\n".join(problems))
    return WeightFiles(weight_map, dtypes, metadata, index_name, index_bytes)


def read_weights(folder: pathlib.Path, files: WeightFiles) -> dict[str, np.ndarray]:
    """All tensors, in the dtypes of the files."""
    from safetensors.numpy import load_file

    tensors: dict[str, np.ndarray] = {}
    for name in files.metadata:
        tensors |= load_file(folder / name)
    return tensors


def write_weights(
    folder: pathlib.Path, tensors: Mapping[str, np.ndarray], files: WeightFiles, dtype: str | None = None
) -> None:
    """Writes float tensors into the files they came from, in the dtypes they had, or all in ``dtype``.

    A tensor that was not in the files goes into the first of them, in their main dtype.

    Raises:
      ValueError: a value that is not finite, or not in the narrower dtype.
    """
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


def _header(path: pathlib.Path) -> dict[str, Any]:
    """The header of a safetensors file, after a check of its size against the file's.

    Raises:
      ValueError: the file is not safetensors, or cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ValueError(f"{path.name}: is a git-lfs pointer, not the weights; run `git lfs pull` in the folder")
        length = int.from_bytes(start, "little")
        try:
            header = json.loads(file.read(min(length, size)))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path.name}: is not a safetensors file, or is damaged; copy it again") from None
    if 8 + length + end != size:
        raise ValueError(f"{path.name}: has {size} bytes but should have {8 + length + end}; copy it again")
    return header


def _weight_map(folder: pathlib.Path, index_name: str, content: bytes) -> dict[str, str]:
    try:
        weight_map = json.loads(content)["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index_name}: is not an index with a weight_map ({error}); copy it again") from None
    outside = sorted(str(n) for n in names if not isinstance(n, str) or pathlib.PurePath(n).name != n)
    if outside:
        raise ValueError(f"{index_name}: names files outside of its folder: {', '.join(outside)}; re-save the model")
    return weight_map


def _not_found(folder: pathlib.Path, variant: str | None) -> str:
    names = sorted(path.name for path in folder.iterdir())
    matches = [_VARIANT_FILE.fullmatch(name) or _VARIANT_INDEX.fullmatch(name) for name in names]
    variants = sorted({match[1] for match in matches if match})
    plain = f"{STEM}.safetensors" in names or f"{STEM}.safetensors.index.json" in names
    if variant is not None:
        known = [*(["none (the plain files)"] if plain else []), *variants] or ["none"]
        return f"weights: no variant {variant!r}; there are: {', '.join(known)}; ask for one of these"
    if variants:
        return (
            f"weights: there are only variants: {', '.join(variants)}; ask for one, for example variant={variants[0]!r}"
        )
    pickled = [name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]
    if pickled:
        return (
            f"{pickled[0]}: pickled weights are not read; re-save them as safetensors, in an environment with diffusers:"
            " UNet2DModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    flax = [name for name in names if name.endswith(".msgpack")]
    if flax:
        return f"{flax[0]}: old Flax weights are not read; give the folder with {STEM}.safetensors"
    return f"weights: neither {STEM}.safetensors nor {STEM}.safetensors.index.json is there; copy it as well"
