"""The two other layouts of torch files, TorchScript archives and those before torch 1.6: right numbers, nothing run."""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np
import pytest

from jaxunlearn.io.pickle_machine import RefusedPickle
from jaxunlearn.io.torch_pickle import read_any_torch_file, read_old_torch_file, read_script_file
from tests.torch_files import ORDERED_DICT, archive, calls, integer, integers, tensor, text, torch_file, value_of

SIX = np.arange(6, dtype=np.float32)
HALF = np.array([0.5, 2.0], np.float16)


def module(name, **attributes):
    """The instructions that make a TorchScript module."""
    items = b"".join(text(key) + value for key, value in attributes.items())
    return f"c__torch__.{name}\nModule\n".encode() + b")\x81}(" + items + b"ub"


def integer_list(*values):
    return b"ctorch.jit._pickle\nbuild_intlist\n(](" + b"".join(map(integer, values)) + b"etR"


def script_file(program, storages):
    """A TorchScript archive: its code is compressed, as torch writes it."""
    file = io.BytesIO(archive(b"\x80\x02" + program + b".", storages, more={"archive/constants.pkl": b"\x80\x02)."}))
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/code/__torch__.py", "x = 1\n" * 1000)
    return file.getvalue()


W = tensor("FloatStorage", "0", 6, (2, 3))
PROGRAM = module(
    "tower",
    weight=W,
    training=b"\x89",
    sizes=integer_list(1, 2),
    first=module("block", scale=tensor("HalfStorage", "1", 2, (2,)), hook=b"N"),
    second=module("block", weight=tensor("FloatStorage", "0", 6, (3,), (2,))),
    after=tensor("FloatStorage", "0", 6, (6,)),
)
STORAGES = {"0": SIX.tobytes(), "1": HALF.tobytes()}


def old_file(tensors, magic=0x1950A86A20F9469CFC6C, little=b"\x88", keys=None, rest=b""):
    """What torch before 1.6 wrote for a state dict of float32 tensors."""

    def pickled(value):
        return b"\x80\x02" + value + b"."

    items, storages = b"", b""
    for i, (name, values) in enumerate(tensors.items()):
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(i)) + text("cpu")
        storage += integer(values.size) + b"NtQ"  # The None is the bounds of a view.
        strides = [int(np.prod(values.shape[k + 1 :])) for k in range(values.ndim)]
        args = storage + integer(0) + integers(values.shape) + integers(strides) + b"\x89" + ORDERED_DICT
        items += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + args + b"tR"
        storages += values.size.to_bytes(8, "little") + values.tobytes()
    keys = [str(i) for i in range(len(tensors))] if keys is None else keys
    parts = (
        integer(magic),
        integer(1001),
        b"}" + text("little_endian") + little + b"s",
        ORDERED_DICT + b"(" + items + b"u",
        b"](" + b"".join(map(text, keys)) + b"e",
    )
    return b"".join(map(pickled, parts)) + storages + rest


def write(path, content):
    path.write_bytes(content)
    return path


def test_script_modules_give_their_tensors_in_the_order_of_a_state_dict(tmp_path):
    path = write(tmp_path / "m.pt", script_file(PROGRAM, STORAGES))
    for read in (read_script_file, read_any_torch_file):
        found = read(path)
        assert list(found) == ["weight", "after", "first.scale", "second.weight"]
        np.testing.assert_array_equal(found["weight"], SIX.reshape(2, 3))
        np.testing.assert_array_equal(found["first.scale"], HALF)
        assert found["first.scale"].dtype == np.float16
        np.testing.assert_array_equal(found["second.weight"], SIX[::2])


def test_old_files(tmp_path):
    tensors = {"a.weight": SIX.reshape(2, 3), "a.bias": SIX[:2] + 7, "none": np.zeros((0, 3), np.float32)}
    path = write(tmp_path / "m.pth", old_file(tensors))
    for read in (read_old_torch_file, read_any_torch_file):
        found = read(path)
        assert list(found) == list(tensors)
        for name, values in tensors.items():
            np.testing.assert_array_equal(found[name], values)


def test_any_layout_includes_the_new_one(tmp_path):
    path = write(tmp_path / "m.pth", torch_file({"w": SIX}))
    np.testing.assert_array_equal(read_any_torch_file(path)["w"], SIX)


def holds_itself():
    return b"c__torch__\nModule\n)\x81q\x00}" + text("inner") + b"h\x00sb"


BAD_SCRIPTS = {
    "another class": (b"csubprocess\nPopen\n)\x81}b", "'subprocess.Popen', which no tensor needs"),
    "a class with arguments": (b"c__torch__\nModule\nK\x01\x85\x81}b", "makes an object of '__torch__ Module'"),
    "a class that is called": (b"c__torch__\nModule\n)R", "it calls '__torch__ Module'"),
    "a name that looks like one": (b"c__torch__evil\nModule\n)\x81}b", "which no tensor needs"),
    "a list without its items": (b"ctorch.jit._pickle\nbuild_intlist\nK\x01\x85R", "it calls"),
    "a state dict": (b"}" + text("w") + W + b"s", "of type dict, not a TorchScript module"),
    "a module that holds itself": (holds_itself(), "one that holds itself"),
    "an overlapping tensor": (module("m", w=tensor("FloatStorage", "0", 6, (6, 6), (1, 1))), "overlapping"),
}


@pytest.mark.parametrize(("program", "message"), BAD_SCRIPTS.values(), ids=BAD_SCRIPTS)
def test_refused_scripts(program, message, tmp_path):
    with pytest.raises(RefusedPickle, match="nothing of it was run") as caught:
        read_script_file(write(tmp_path / "m.pt", script_file(program, {"0": SIX.tobytes()})))
    assert message in str(caught.value)


def test_nothing_is_run(tmp_path):
    marker = tmp_path / "marker"
    evil = value_of(calls(os.system, f"touch {marker}"))
    for content in (
        script_file(evil, STORAGES),
        script_file(module("m", w=evil), STORAGES),
        script_file(module("m", w=W, more=b"ctorch.jit._pickle\nbuild_intlist\n(](" + evil + b"etR"), STORAGES),
        b"\x80\x02" + evil + b"." + old_file({"w": SIX}),
        old_file({"w": SIX}, little=evil),
    ):
        with pytest.raises(RefusedPickle, match="system"):
            read_any_torch_file(write(tmp_path / "m.pt", content))
    assert not marker.exists()


GOOD = old_file({"w": SIX})
BAD_OLD = {
    "another magic number": (old_file({"w": SIX}, magic=7), "magic number"),
    "big-endian": (old_file({"w": SIX}, little=b"\x89"), "little-endian"),
    "another storage": (old_file({"w": SIX}, keys=["1"]), "list of its storages"),
    "a storage twice": (old_file({"w": SIX}, keys=["0", "0"]), "list of its storages"),
    "cut short": (GOOD[:-1], "cut short"),
    "more bytes": (GOOD + b"\0", "behind its last storage"),
    "empty": (b"", "not a whole pickle"),
    "a text": (b"hello there", "not a whole pickle"),
}


@pytest.mark.parametrize(("content", "message"), BAD_OLD.values(), ids=BAD_OLD)
def test_refused_old_files(content, message, tmp_path):
    with pytest.raises(RefusedPickle, match=message):
        read_old_torch_file(write(tmp_path / "m.pth", content))


def test_every_cut_of_an_old_file_is_refused(tmp_path):
    path = tmp_path / "m.pth"
    for end in range(len(GOOD)):
        with pytest.raises(ValueError, match="m.pth"):
            read_any_torch_file(write(path, GOOD[:end]))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_that_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.LazyLinear(5)
    )
    example = torch.randn(1, 3, 9, 9)
    model(example)
    model = model.half().float().eval()
    wanted = {name: value.numpy() for name, value in model.state_dict().items()}
    torch.jit.save(torch.jit.script(model), str(tmp_path / "script.pt"))
    torch.jit.save(torch.jit.trace(model, example), str(tmp_path / "trace.pt"))
    torch.save(model.state_dict(), tmp_path / "new.pt")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("script", "trace", "new", "old"):
        found = read_any_torch_file(tmp_path / f"{name}.pt")
        assert list(found) == list(wanted), name
        for tensor_name, values in wanted.items():
            np.testing.assert_array_equal(found[tensor_name], values)
