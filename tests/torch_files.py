"""Files as ``torch.save`` writes them, made without torch; and pickles that would do harm."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.bool_): "BoolStorage",
}
ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def integer(value: int) -> bytes:
    """The instruction that pushes it."""
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def text(value: str) -> bytes:
    """The instruction that pushes it."""
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def integers(values) -> bytes:
    """The instructions that push a tuple."""
    return b"(" + b"".join(map(integer, values)) + b"t"


def storage(kind: str, key: str, count: int, tag: str = "storage") -> bytes:
    """The instructions that ask for a storage."""
    return b"(" + text(tag) + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + integer(count) + b"tQ"


def tensor(kind: str, key: str, count: int, shape, strides=None, offset: int = 0, hooks: bytes = ORDERED_DICT) -> bytes:
    """The instructions that make a tensor."""
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    args = storage(kind, key, count) + integer(offset) + integers(shape) + integers(strides) + b"\x89" + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + args + b"tR"


def table(items: Mapping[str, bytes]) -> bytes:
    """A whole pickle: a dictionary of instructions."""
    return b"\x80\x02" + ORDERED_DICT + b"(" + b"".join(text(k) + v for k, v in items.items()) + b"u."


def archive(pickled: bytes, storages: Mapping[str, bytes] | None = None, **options) -> bytes:
    """The zip around it. Options: ``compression``, ``byteorder`` and ``more`` records."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", options.get("compression", zipfile.ZIP_STORED)) as made:
        made.writestr("archive/data.pkl", pickled)
        made.writestr("archive/byteorder", options.get("byteorder", "little"))
        for key, content in (storages or {}).items():
            made.writestr(f"archive/data/{key}", content)
        for name, content in options.get("more", {}).items():
            made.writestr(name, content)
        made.writestr("archive/version", "3\n")
    return file.getvalue()


def torch_file(tensors: Mapping[str, np.ndarray]) -> bytes:
    """What ``torch.save`` writes for a state dict."""
    items, storages = {}, {}
    for i, (name, values) in enumerate(tensors.items()):
        items[name] = tensor(STORAGES[values.dtype], str(i), values.size, values.shape)
        storages[str(i)] = np.ascontiguousarray(values).tobytes()
    return archive(table(items), storages)


class _Calls:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def calls(function, *args, protocol: int = 2) -> bytes:
    """A pickle that calls a function when Python's own machine reads it."""
    return pickle.dumps(_Calls(function, *args), protocol=protocol)


def value_of(pickled: bytes) -> bytes:
    """The instructions of a pickle of protocol 2, to be put inside another one."""
    assert pickled[:2] == b"\x80\x02"
    return pickled[2:-1]
