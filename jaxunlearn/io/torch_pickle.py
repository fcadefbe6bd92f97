"""Tensors out of files that ``torch.save`` wrote (``.bin``), without torch and without running anything in them.

Such a file is a zip: ``<prefix>/data.pkl`` is a pickle that says which tensors there are, ``<prefix>/data/<key>`` are
their storages, raw and uncompressed. The pickle is read by :mod:`jaxunlearn.io.pickle_machine`. The two other layouts
that torch has written, TorchScript archives and the files of torch before 1.6, are read by :func:`read_script_file` and
:func:`read_old_torch_file`.
"""

from __future__ import annotations

import io
import math
import pathlib
import struct
import zipfile
from typing import Any

import numpy as np

from jaxunlearn.io.pickle_machine import Module, RefusedPickle, Storage, Tensor, kind_of, run
from jaxunlearn.io.safetensors_header import TensorEntry

MAX_PICKLE = 8 * 2**20
"""Bytes of ``data.pkl``; a tensor takes about 200 of them."""
_MAX_EMPTY = 2**31
_MAX_MODULES, _MAX_NAME = 100_000, 2000

_REMEDY = "re-save as safetensors, on a machine where you trust the file"


def read_torch_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a ``.bin`` file, as C-contiguous arrays that own their memory.

    float16, bfloat16 (as ``ml_dtypes.bfloat16``), float32, float64, int32, int64, bool and uint8 are understood.

    Raises:
      ValueError: one line: not a zip of torch 1.6 or later, damaged, or holding anything but a flat dictionary of
        tensors; a name that is not allowed is told (:class:`RefusedPickle`).
    """
    with _Archive(pathlib.Path(path)) as archive:
        return archive.arrays()


def read_script_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a TorchScript archive (``torch.jit.save``), under the dotted names of their attributes.

    These are the names of the module's state dict, and those of tensors that are plain attributes. Neither the code in
    the archive nor its constants are read.

    Raises:
      ValueError: as :func:`read_torch_file`.
    """
    with _Archive(pathlib.Path(path), script=True) as archive:
        return archive.arrays()


def read_any_torch_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a file of torch in any of the three layouts.

    Raises:
      ValueError: as :func:`read_torch_file`.
    """
    path = pathlib.Path(path)
    if not zipfile.is_zipfile(path):
        return read_old_torch_file(path)
    with zipfile.ZipFile(path) as opened:
        script = any(name.endswith("/constants.pkl") for name in opened.namelist())
    return read_script_file(path) if script else read_torch_file(path)


_OLD_MAGIC, _OLD_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def read_old_torch_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a state dict that torch before 1.6 wrote: five pickles, then the storages.

    The pickles hold a magic number, the number of the protocol, facts about the machine, the table of tensors and the
    keys of the storages in their order. A storage is its number of elements (int64) and its bytes.

    Raises:
      ValueError: as :func:`read_torch_file`.
    """
    path = pathlib.Path(path)
    try:
        file = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read: {error.strerror}") from None
    try:
        if run(file) != _OLD_MAGIC or run(file) != _OLD_PROTOCOL:
            raise RefusedPickle("it does not begin with torch's magic number")
        machine, tensors, keys = run(file), run(file), run(file)
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise RefusedPickle("its byte order is not little-endian")
        _check_table(tensors)
        storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
            raise RefusedPickle("the list of its storages does not fit its tensors")
        contents = {}
        for key in keys:
            size = storages[key].count * storages[key].kind.dtype.itemsize
            count = file.read(8)
            contents[key] = file.read(size)
            if int.from_bytes(count, "little") != storages[key].count or len(contents[key]) != size:
                raise RefusedPickle(f"storage {key[:40]!r} is cut short or has another size than its tensors say")
        if file.read(1):
            raise RefusedPickle("there are bytes behind its last storage")
        for tensor in tensors.values():
            _check_tensor(tensor)
    except RefusedPickle as error:
        raise RefusedPickle(f"{path.name}: {error}; nothing of it was run; {_REMEDY}") from None
    return {name: _array(contents[tensor.storage.key], tensor) for name, tensor in tensors.items()}


def inspect_torch_file(path: pathlib.Path) -> dict[str, TensorEntry]:
    """Dtype and shape of every tensor of a ``.bin`` file; no tensor is read.

    Raises:
      ValueError: as :func:`read_torch_file`.
    """
    with _Archive(pathlib.Path(path)) as archive:
        return {name: TensorEntry(t.storage.kind.name, t.shape) for name, t in archive.tensors().items()}


class _Archive:
    """The zip of a ``.bin`` file or of a TorchScript archive. Every ValueError of its methods names the file."""

    def __init__(self, path: pathlib.Path, script: bool = False):
        self.path, self.script = path, script

    def __enter__(self) -> _Archive:
        try:
            with self.path.open("rb") as file:
                start = file.read(8)
        except OSError as error:
            raise self._damaged(error) from None
        if start == b"version ":
            raise ValueError(f"{self.path.name}: is a git-lfs pointer, not the weights; run `git lfs pull`")
        if not start.startswith(b"PK\x03\x04"):
            raise self._error("is not a zip: a file of torch before 1.6, or none of torch")
        try:
            self.zip = zipfile.ZipFile(self.path)
        except _ZIP_ERRORS as error:
            raise self._damaged(error) from None
        try:
            self._index()
        except BaseException:
            self.zip.close()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self.zip.close()

    def _index(self) -> None:
        """Finds the records, and refuses a zip that torch would not write."""
        entries = self.zip.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) < len(names):
            raise self._error("two records of the zip have one name")
        roots = [name[: -len("data.pkl")] for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise self._error("the zip holds no <name>/data.pkl, so torch did not write it")
        if self.script:  # Its code is compressed, and never read.
            entries = [entry for entry in entries if not entry.filename.startswith(f"{roots[0]}code/")]
        for entry in entries:
            stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
            if not stored or entry.flag_bits & 1:
                raise self._error(f"record {entry.filename[-60:]!r} is compressed or encrypted, which torch never does")
        # Records of a zip bomb overlap each other.
        if sum(entry.file_size for entry in entries) > self.path.stat().st_size:
            raise self._error("the records of the zip are larger than the file")
        self.records = {e.filename[len(roots[0]) :]: e for e in entries if e.filename.startswith(roots[0])}

    def read(self, record: str) -> bytes:
        """The content of a record of the zip."""
        try:
            return self.zip.read(self.records[record])
        except _ZIP_ERRORS as error:
            raise self._damaged(error) from None

    def tensors(self) -> dict[str, Tensor]:
        """What the pickle describes, checked against the storages that are there."""
        if "byteorder" in self.records and self.read("byteorder").strip() != b"little":
            raise self._error("its byte order is not little-endian")
        if self.records["data.pkl"].file_size > MAX_PICKLE:
            raise self._error(f"data.pkl has more than {MAX_PICKLE} bytes, too many for a table of tensors")
        try:
            found = run(self.read("data.pkl"), self.script)
            if self.script:
                found = _attributes(found)
            _check_table(found)
            for tensor in found.values():
                _check_tensor(tensor)
                self._check_storage(tensor.storage)
        except RefusedPickle as error:
            raise RefusedPickle(f"{self.path.name}: {error}; nothing of it was run; {_REMEDY}") from None
        needed = sum(math.prod(t.shape) * t.storage.kind.dtype.itemsize for t in found.values())
        if needed > 8 * self.path.stat().st_size:
            raise self._error(f"its tensors need {needed} bytes, more than eight times the file")
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """All tensors with their values; every storage is read once."""
        tensors = self.tensors()
        by_storage: dict[str, list[str]] = {}
        for name, tensor in tensors.items():
            by_storage.setdefault(tensor.storage.key, []).append(name)
        arrays = {}
        for key, names in by_storage.items():
            content = self.read(f"data/{key}")
            for name in names:
                arrays[name] = _array(content, tensors[name])
        return {name: arrays[name] for name in tensors}

    def _check_storage(self, storage: Storage) -> None:
        record = self.records.get(f"data/{storage.key}")
        if record is None:
            raise RefusedPickle(f"storage {storage.key[:40]!r} is not in the file")
        if record.file_size != storage.count * storage.kind.dtype.itemsize:
            wanted = storage.count * storage.kind.dtype.itemsize
            raise RefusedPickle(f"storage {storage.key[:40]!r} has {record.file_size} bytes but should have {wanted}")

    def _error(self, reason: str) -> ValueError:
        return ValueError(f"{self.path.name}: {reason}; {_REMEDY}")

    def _damaged(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())[:120]
        return ValueError(f"{self.path.name}: is damaged ({reason or type(error).__name__}); copy it again")


# What zipfile raises for files that were changed: bad offsets, unknown versions and methods, wrong checksums, names that
# do not decode, sizes that do not fit.
_ZIP_ERRORS = (zipfile.BadZipFile, OSError, RuntimeError, EOFError, ValueError, OverflowError, struct.error)


def _array(content: bytes, tensor: Tensor) -> np.ndarray:
    dtype = tensor.storage.kind.dtype
    if 0 in tensor.shape:
        return np.empty(tensor.shape, dtype)
    flat = np.frombuffer(content, np.uint8 if dtype == np.bool_ else dtype)[tensor.offset :]
    strides = [stride * dtype.itemsize if size > 1 else 0 for stride, size in zip(tensor.strides, tensor.shape)]
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
    return view != 0 if dtype == np.bool_ else view.copy()


def _attributes(module: Any) -> dict[str, Tensor]:
    """The tensors of a TorchScript module and of the modules in it, by dotted name."""
    if not isinstance(module, Module):
        raise RefusedPickle(f"it holds something of type {kind_of(module)}, not a TorchScript module")
    found, waiting, seen = {}, [("", module)], 0
    while waiting:
        prefix, module = waiting.pop()
        seen += 1
        if seen > _MAX_MODULES or len(prefix) > _MAX_NAME:  # A module may hold itself.
            raise RefusedPickle(f"it has more than {_MAX_MODULES} modules, or one that holds itself")
        found |= {prefix + name: value for name, value in module.items() if isinstance(value, Tensor)}
        inner = [(f"{prefix}{name}.", value) for name, value in module.items() if isinstance(value, Module)]
        waiting += reversed(inner)  # So that the order is that of a state dict.
    return found


def _check_table(found: Any) -> None:
    if not isinstance(found, dict):
        raise RefusedPickle(f"it holds something of type {kind_of(found)}, not a dictionary of tensors")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise RefusedPickle(f"{name[:80]!r} is of type {kind_of(value)}, not a tensor")


def _check_tensor(tensor: Tensor) -> None:
    """Every element must lie in the storage, and no two at one place."""
    if 0 in tensor.shape:
        if math.prod(size for size in tensor.shape if size) > _MAX_EMPTY:
            raise RefusedPickle(f"a tensor without elements has the shape {tensor.shape}")
        return
    extent = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.strides, tensor.shape) if size > 1):
        if stride < extent:
            raise RefusedPickle(f"a tensor of shape {tensor.shape} has overlapping strides {tensor.strides}")
        extent += (size - 1) * stride
    if tensor.offset + extent > tensor.storage.count:
        raise RefusedPickle(f"a tensor of shape {tensor.shape} reaches beyond its storage of {tensor.storage.count}")
