"""A machine for the pickles of ``torch.save`` that runs nothing: tables of tensors come out, or a refusal.

A pickle is a program, and Python's own machine for it can be made to call any function. The one here (:func:`run`) knows
the few instructions that a dictionary of tensors needs; the only names that it accepts are those of :data:`STORAGES`,
``collections.OrderedDict`` and ``torch._utils._rebuild_tensor_v2``, and none of them is looked up or called: they stand
for what this module does with their arguments. TorchScript archives also name the classes of their modules and the
builders of lists; a module becomes the dictionary of its attributes, and nothing of its code is read.
"""

from __future__ import annotations

import dataclasses
import pickle
import pickletools
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np


class Dtype(NamedTuple):
    """How a storage is read: the name of the dtype in safetensors, and the dtype here."""

    name: str
    dtype: np.dtype


STORAGES = {
    "torch FloatStorage": Dtype("F32", np.dtype("<f4")),
    "torch HalfStorage": Dtype("F16", np.dtype("<f2")),
    "torch DoubleStorage": Dtype("F64", np.dtype("<f8")),
    "torch LongStorage": Dtype("I64", np.dtype("<i8")),
    "torch IntStorage": Dtype("I32", np.dtype("<i4")),
    "torch BFloat16Storage": Dtype("BF16", np.dtype(ml_dtypes.bfloat16)),
    "torch BoolStorage": Dtype("BOOL", np.dtype(np.bool_)),
    "torch ByteStorage": Dtype("U8", np.dtype(np.uint8)),
}
_ORDERED_DICT = "collections OrderedDict"
_REBUILD = "torch._utils _rebuild_tensor_v2"
_SCRIPT_CLASS = "__torch__"
_SCRIPT_LISTS = tuple(f"torch.jit._pickle build_{kind}list" for kind in ("int", "double", "bool", "tensor"))


class RefusedPickle(pickle.UnpicklingError, ValueError):
    """The file holds something other than tensors. Nothing of it was run."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A name that the pickle asked for, and that is allowed."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A record of the zip and how many elements of which dtype it holds."""

    key: str
    kind: Dtype
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Module(dict):
    """The attributes of a module of a TorchScript archive."""


def is_count(value: Any) -> bool:
    """Whether it is an integer >= 0; True and False are none."""
    return type(value) is int and value >= 0


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    return value.name if isinstance(value, Name) else type(value).__name__.lower()


def _storage(pid: Any) -> Storage:
    """The meaning of a persistent id ``('storage', type, key, location, number of elements)``.

    Files of torch before 1.6 have a sixth element, the bounds of a view, which was never anything but None.
    """
    if isinstance(pid, tuple) and len(pid) == 6 and pid[5] is None:
        pid = pid[:5]
    good = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], Name)
    if not good or not isinstance(pid[2], str) or not isinstance(pid[3], str) or not is_count(pid[4]):
        raise RefusedPickle("a persistent id is not ('storage', type, key, location, number of elements)")
    if pid[1].name not in STORAGES:
        raise RefusedPickle(f"{pid[1].name!r} is not the type of a storage")
    return Storage(pid[2], STORAGES[pid[1].name], pid[4])


def _call(function: Any, args: Any) -> Any:
    """What a call of one of the allowed functions gives."""
    if function == Name(_ORDERED_DICT) and args == ():
        return {}
    builds_list = isinstance(function, Name) and function.name in _SCRIPT_LISTS
    if builds_list and isinstance(args, tuple) and len(args) == 1 and isinstance(args[0], list):
        return args[0]
    if function != Name(_REBUILD) or not isinstance(args, tuple):
        raise RefusedPickle(f"it calls {kind_of(function)!r}")
    good = len(args) in (6, 7) and isinstance(args[0], Storage) and is_count(args[1])
    good = good and all(isinstance(a, tuple) and len(a) <= 32 and all(map(is_count, a)) for a in args[2:4])
    if not good or len(args[2]) != len(args[3]):
        raise RefusedPickle(f"the arguments of {_REBUILD!r} are not a storage, an offset, a size and strides >= 0")
    if any(args[5:]):
        raise RefusedPickle("a tensor has hooks or marks (conjugate, negative)")
    return Tensor(args[0], args[1], args[2], args[3])


def _global(name: str, script: bool) -> Name:
    known = name in STORAGES or name in (_ORDERED_DICT, _REBUILD)
    if script:
        known = known or name in _SCRIPT_LISTS or _is_script_class(name)
    if not known:
        shown = name.replace(" ", ".", 1)[:80]
        raise RefusedPickle(f"it asks for {shown!r}, which no tensor needs")
    return Name(name)


def _is_script_class(name: str) -> bool:
    return name.startswith((f"{_SCRIPT_CLASS} ", f"{_SCRIPT_CLASS}."))


_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def run(program: bytes | BinaryIO, script: bool = False) -> Any:
    """The value of a pickle of plain values, dictionaries, lists of plain values and tensors.

    Args:
      program: the pickle, or a file at its start, which stands behind it afterwards.
      script: of a TorchScript archive; its modules come out as :class:`Module`.

    Raises:
      RefusedPickle: any other instruction, a name that is not allowed, or a program that ends in the middle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take(start: int) -> list[Any]:
        """Everything from the given place of the stack on."""
        if not (marks[-1] if marks else 0) <= start <= len(stack):
            raise IndexError
        items = stack[start:]
        del stack[start:]
        return items

    def store(items: list[Any]) -> None:
        if not isinstance(stack[-1], dict) or len(items) % 2:
            raise RefusedPickle("it puts items into something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, str):
                raise RefusedPickle(f"a name in it is of type {kind_of(key)}, not a text")
            stack[-1][key] = value

    try:
        for instruction, arg, _ in pickletools.genops(program):
            code = instruction.name
            if code in _VALUES:
                stack.append(arg)
            elif code in _CONSTANTS:
                stack.append(_CONSTANTS[code])
            elif code in ("BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]
            elif code == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif code in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif code in _TUPLES:
                stack.append(tuple(take(len(stack) - _TUPLES[code])))
            elif code == "TUPLE":
                stack.append(tuple(take(marks.pop())))
            elif code == "MARK":
                marks.append(len(stack))
            elif code == "EMPTY_DICT":
                stack.append({})
            elif code == "EMPTY_LIST":
                stack.append([])
            elif code in ("APPEND", "APPENDS"):
                items = take(marks.pop() if code == "APPENDS" else len(stack) - 1)
                if not isinstance(stack[-1], list):
                    raise RefusedPickle("it appends to something that is not a list")
                stack[-1].extend(items)
            elif code == "NEWOBJ" and script:
                kind, args = take(len(stack) - 2)
                if not isinstance(kind, Name) or not _is_script_class(kind.name) or args != ():
                    raise RefusedPickle(f"it makes an object of {kind_of(kind)!r}")
                stack.append(Module())
            elif code == "SETITEM":
                store(take(len(stack) - 2))
            elif code == "SETITEMS":
                store(take(marks.pop()))
            elif code == "GLOBAL":
                stack.append(_global(arg, script))
            elif code == "STACK_GLOBAL":
                module, name = take(len(stack) - 2)
                texts = isinstance(module, str) and isinstance(name, str)
                stack.append(_global(f"{module} {name}" if texts else "?", script))
            elif code == "BINPERSID":
                stack.append(_storage(*take(len(stack) - 1)))
            elif code == "REDUCE":
                stack.append(_call(*take(len(stack) - 2)))
            elif code == "BUILD":
                state = take(len(stack) - 1)[0]
                if not isinstance(state, dict) or not isinstance(stack[-1], dict):
                    raise RefusedPickle("it sets attributes of something that is not a dictionary")
                if isinstance(stack[-1], Module):
                    stack[-1].update(state)
                # The attributes of a state dict (versions of modules) mean nothing here.
            elif code == "STOP":
                if len(stack) == 1 and not marks:
                    return stack[0]
                break
            elif code not in ("PROTO", "FRAME"):
                shown = f" {arg.replace(' ', '.', 1)[:80]!r}" if isinstance(arg, str) else ""
                raise RefusedPickle(f"it has the instruction {code}{shown}, which no tensor needs")
    except RefusedPickle:
        raise
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        raise RefusedPickle(f"its data.pkl is not a whole pickle ({type(error).__name__})") from None
    raise RefusedPickle("its data.pkl is not a whole pickle")
