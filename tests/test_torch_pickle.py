"""The reader of pickled weights: tensors come out right, and nothing that a file asks for is ever run."""

from __future__ import annotations

import copyreg
import os
import pickle
import shutil
import subprocess
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxunlearn.io.pickle_machine import RefusedPickle
from jaxunlearn.io.torch_pickle import MAX_PICKLE, inspect_torch_file, read_torch_file
from tests.torch_files import (
    ORDERED_DICT,
    archive,
    calls,
    integer,
    integers,
    storage,
    table,
    tensor,
    text,
    torch_file,
    value_of,
)

SIX = np.arange(6, dtype=np.float32)


def write(path, content):
    path.write_bytes(content)
    return path


def test_tensors_come_out_as_they_went_in(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "half": rng.standard_normal(5).astype(np.float16),
        "brain": rng.standard_normal((2, 2)).astype(ml_dtypes.bfloat16),
        "double": rng.standard_normal(3),
        "long": np.arange(-2, 3),
        "truth": np.array([True, False, True]),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 3), np.float32),
        "big": np.arange(70_000, dtype=np.float32),
    }
    path = write(tmp_path / "m.bin", torch_file(tensors))
    read = read_torch_file(path)
    assert list(read) == list(tensors)
    for name, values in tensors.items():
        assert read[name].dtype == values.dtype
        np.testing.assert_array_equal(read[name], values)
        assert read[name].flags.c_contiguous
        assert read[name].flags.writeable
    described = inspect_torch_file(path)
    assert described["brain"] == ("BF16", (2, 2))
    assert [entry.dtype for entry in described.values()][:5] == ["F32", "F16", "BF16", "F64", "I64"]


def test_views_of_a_storage(tmp_path):
    views = {
        "rows": tensor("FloatStorage", "0", 6, (2, 3)),
        "columns": tensor("FloatStorage", "0", 6, (3, 2), (1, 3)),
        "second row": tensor("FloatStorage", "0", 6, (3,), (1,), 3),
        "every other": tensor("FloatStorage", "0", 6, (3,), (2,)),
        "one, with any stride": tensor("FloatStorage", "0", 6, (1, 6), (10**17, 1)),
    }
    read = read_torch_file(write(tmp_path / "m.bin", archive(table(views), {"0": SIX.tobytes()})))
    rows = SIX.reshape(2, 3)
    for name, values in zip(views, (rows, rows.T, rows[1], SIX[::2], SIX[None])):
        np.testing.assert_array_equal(read[name], values)


def test_attributes_of_a_state_dict_and_later_protocols(tmp_path):
    inner = table({"w": tensor("FloatStorage", "0", 6, (6,))})[:-1]
    metadata = b"}" + text("_metadata") + ORDERED_DICT + b"sb."
    content = archive(inner + metadata, {"0": SIX.tobytes()})
    assert list(read_torch_file(write(tmp_path / "m.bin", content))) == ["w"]
    storage_4 = b"(" + text("storage") + b"\x8c\x05torch\x8c\x0cFloatStorage\x93" + text("0") + text("cpu") + b"K\x06tQ"
    name_4 = b"\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93\x94"
    value = name_4 + b"(" + storage_4 + b"K\x00K\x06\x85K\x01\x85\x89}tR"
    content = archive(b"\x80\x04\x95" + b"\0" * 8 + b"}\x94\x8c\x01w" + value + b"s.", {"0": SIX.tobytes()})
    np.testing.assert_array_equal(read_torch_file(write(tmp_path / "m.bin", content))["w"], SIX)


def hostile(marker):
    """Name -> (pickle that makes the marker when Python's machine reads it, what the refusal names)."""
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    system = os.system.__module__
    reduce = {f"os.system, protocol {p}": (calls(os.system, touch, protocol=p), system) for p in range(6)}
    return reduce | {
        "eval": (calls(eval, code), "eval"),
        "exec": (calls(exec, code), "exec"),
        "subprocess": (calls(subprocess.check_call, ["touch", str(marker)]), "check_call"),
        "Popen": (calls(subprocess.run, ["touch", str(marker)]), ".run"),
        "shutil": (calls(shutil.copyfile, __file__, str(marker)), "copyfile"),
        "file": (calls(open, str(marker), "w"), ".open"),
        "GLOBAL": (b"cos\nsystem\n(" + text(touch) + b"tR.", "os.system"),
        "INST": (b"(" + text(touch) + b"ios\nsystem\n.", "os.system"),
        "OBJ": (b"(cos\nsystem\n" + text(touch) + b"o.", "os.system"),
        "STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text(touch) + b"\x85R.", "os.system"),
        "EXT": (b"\x80\x02\x82\xf0" + text(touch) + b"\x85R.", "EXT1"),
        "attribute of a name": (
            b"\x80\x04\x8c\x0bcollections\x8c\x27OrderedDict.__init__.__class__.__call__\x93.",
            "OrderedDict.__init__",
        ),
        "in the middle of tensors": (
            table({"a": tensor("FloatStorage", "0", 6, (6,)), "b": value_of(calls(os.system, touch))}),
            system,
        ),
        "as a hook": (
            table({"a": tensor("FloatStorage", "0", 6, (6,), hooks=value_of(calls(os.system, touch)))}),
            system,
        ),
        "as a persistent id": (b"\x80\x02" + value_of(calls(os.system, touch)) + b"Q.", system),
        "as the state of a dictionary": (
            b"\x80\x02" + ORDERED_DICT + value_of(calls(os.system, touch)) + b"b.",
            system,
        ),
        "torch.load": (b"ctorch\nload\n" + text(str(marker)) + b"\x85R.", "torch.load"),
        "torch.hub": (b"ctorch.hub\nload\n" + text("a/b") + text("c") + b"\x86R.", "torch.hub.load"),
        "bytes with a pickle": (
            b"ctorch.storage\n_load_from_bytes\n" + text("x") + b"\x85R.",
            "torch.storage._load_from_bytes",
        ),
        "parameter": (b"ctorch._utils\n_rebuild_parameter\n)R.", "torch._utils._rebuild_parameter"),
        "later tensors": (b"ctorch._utils\n_rebuild_tensor_v3\n)R.", "_rebuild_tensor_v3"),
        "storage without a kind": (b"ctorch.storage\nUntypedStorage\n.", "torch.storage.UntypedStorage"),
        "new object": (b"\x80\x02csubprocess\nPopen\n" + text(touch) + b"\x85\x81.", "subprocess.Popen"),
        "byte array": (b"\x80\x05\x96" + b"\0" * 8 + b".", "BYTEARRAY8"),
    }


def test_nothing_in_a_file_is_run(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "m.bin"
    files = hostile(marker)
    copyreg.add_extension(os.system.__module__, "system", 0xF0)
    try:
        pickle.loads(b"\x80\x02\x82\xf0.")  # Python keeps what it has found under a number: this one is now warm.
        for name, (program, named) in files.items():
            for content in (archive(program, {"0": SIX.tobytes()}), archive(program, more={"archive/data/0": b"x"})):
                for read in (read_torch_file, inspect_torch_file):
                    with pytest.raises(RefusedPickle) as error:
                        read(write(path, content))
                    assert not marker.exists(), name
                    message = str(error.value)
                    assert named in message, name
                    assert message.startswith("m.bin: "), name
                    assert len(message.splitlines()) == 1, name
                    assert "re-save as safetensors" in message
                    assert isinstance(error.value, (ValueError, pickle.UnpicklingError))
    finally:
        copyreg.remove_extension(os.system.__module__, "system", 0xF0)


def test_the_hostile_files_are_hostile(tmp_path):
    """Python's own machine runs them: the test above tests something."""
    marker = tmp_path / "marker"
    for name in ("os.system, protocol 0", "os.system, protocol 4", "eval", "GLOBAL", "INST", "OBJ", "STACK_GLOBAL"):
        pickle.loads(hostile(marker)[name][0])
        assert marker.exists(), name
        marker.unlink()


W = tensor("FloatStorage", "0", 6, (2, 3))
GOOD = {"0": SIX.tobytes()}
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
BAD = {
    "not a zip": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "is not a zip: a file of torch before 1.6"),
    "empty": (b"", "is not a zip"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
    "cut short": (archive(table({"w": W}), GOOD)[:-200], "is damaged"),
    "no pickle": (archive(b"", GOOD).replace(b"data.pkl", b"date.pkl"), "holds no <name>/data.pkl"),
    "two pickles": (archive(table({"w": W}), GOOD, more={"other/data.pkl": b"."}), "holds no <name>/data.pkl"),
    "empty pickle": (archive(b""), "is not a whole pickle"),
    "half a pickle": (archive(table({"w": W})[:-9], GOOD), "is not a whole pickle"),
    "rubbish": (archive(b"\xff\xfe"), "is not a whole pickle"),
    "nothing on the stack": (archive(b"0R."), "POP"),
    "too few values": (archive(b"R."), "is not a whole pickle"),
    "too many values": (archive(b"}}."), "is not a whole pickle"),
    "a mark too many": (archive(b"(}(u."), "is not a whole pickle"),
    "compressed": (archive(table({"w": W}), GOOD, compression=zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
    "big-endian": (archive(table({"w": W}), GOOD, byteorder="big"), "byte order is not little-endian"),
    "storage too small": (archive(table({"w": W}), {"0": b"1234"}), "storage '0' has 4 bytes but should have 24"),
    "storage too large": (archive(table({"w": W}), {"0": b"1" * 25}), "has 25 bytes but should have 24"),
    "no storage": (archive(table({"w": W})), "storage '0' is not in the file"),
    "storage outside": (
        archive(table({"w": tensor("FloatStorage", "../../x", 1, (1,))}), GOOD),
        "storage '../../x' is not in the file",
    ),
    "beyond the end": (
        archive(table({"w": tensor("FloatStorage", "0", 6, (2, 3), offset=1)}), GOOD),
        "reaches beyond its storage of 6",
    ),
    "wide strides": (archive(table({"w": tensor("FloatStorage", "0", 6, (2, 3), (4, 1))}), GOOD), "reaches beyond"),
    "overlap": (archive(table({"w": tensor("FloatStorage", "0", 6, (3, 3), (1, 1))}), GOOD), "has overlapping strides"),
    "one value a billion times": (
        archive(table({"w": tensor("FloatStorage", "0", 6, (10**9,), (0,))}), GOOD),
        "has overlapping strides (0,)",
    ),
    "negative stride": (archive(table({"w": tensor("FloatStorage", "0", 6, (6,), (-1,))}), GOOD), "strides >= 0"),
    "negative offset": (archive(table({"w": tensor("FloatStorage", "0", 6, (6,), offset=-1)}), GOOD), "strides >= 0"),
    "negative size": (archive(table({"w": tensor("FloatStorage", "0", 6, (-6,), (1,))}), GOOD), "strides >= 0"),
    "nothing, but wide": (
        archive(table({"w": tensor("FloatStorage", "0", 6, (0, 2**20, 2**20), (1, 1, 1))}), GOOD),
        "without elements has the shape",
    ),
    "more strides than sizes": (
        archive(table({"w": tensor("FloatStorage", "0", 6, (6,), (1, 1))}), GOOD),
        "are not a storage, an offset, a size",
    ),
    "sizes that are no numbers": (
        archive(table({"w": REBUILD + b"(" + storage("FloatStorage", "0", 6) + b"K\0X\1\0\0\0a\x85)\x89}tR"}), GOOD),
        "are not a storage, an offset, a size",
    ),
    "too few arguments": (archive(table({"w": REBUILD + b")R"}), GOOD), "are not a storage, an offset, a size"),
    "hooks": (
        archive(table({"w": tensor("FloatStorage", "0", 6, (6,), hooks=b"}" + text("a") + b"K\1s")}), GOOD),
        "a tensor has hooks or marks",
    ),
    "another persistent id": (
        archive(table({"w": storage("FloatStorage", "0", 6, tag="module")}), GOOD),
        "a persistent id is not ('storage', type, key",
    ),
    "persistent id of another form": (archive(b"\x80\x02" + integer(3) + b"Q."), "a persistent id is not"),
    "persistent id as a line": (archive(b"P0\n."), "PERSID '0'"),
    "another storage": (
        archive(table({"w": tensor("ComplexFloatStorage", "0", 3, (3,))}), GOOD),
        "asks for 'torch.ComplexFloatStorage'",
    ),
    "a function as a storage": (
        archive(b"\x80\x02(" + text("storage") + REBUILD + text("0") + text("cpu") + b"K\6tQ."),
        "'torch._utils _rebuild_tensor_v2' is not the type of a storage",
    ),
    "a storage that is called": (archive(b"ctorch\nFloatStorage\n)R."), "it calls 'torch FloatStorage'"),
    "a text in place of a name": (
        archive(b"\x80\x02" + text("collections OrderedDict") + b"\x85)R."),
        "it calls 'tuple'",
    ),
    "a call of a number": (archive(b"K\1)R."), "it calls 'int'"),
    "a number": (archive(table({"w": W, "step": integer(3)}), GOOD), "'step' is of type int, not a tensor"),
    "nested": (archive(table({"model": b"}" + text("w") + W + b"s"}), GOOD), "'model' is of type dict, not a tensor"),
    "a bare storage": (archive(table({"w": storage("FloatStorage", "0", 6)}), GOOD), "'w' is of type storage"),
    "a list": (archive(b"]."), "type list"),
    "a tuple": (archive(b"\x80\x02" + integers((1, 2)) + b"."), "it holds something of type tuple"),
    "names that are no texts": (archive(b"\x80\x02}K\1" + W + b"s.", GOOD), "a name in it is of type int"),
    "state of a number": (archive(b"K\1}b."), "sets attributes of something that is not a dictionary"),
    "items of a number": (archive(b"K\1" + text("a") + b"K\1s."), "puts items into something"),
    "a long pickle": (archive(b"N" * (MAX_PICKLE + 1)), f"data.pkl has more than {MAX_PICKLE} bytes"),
    "one storage, many tensors": (
        archive(
            table({f"w{i}": tensor("FloatStorage", "0", 10**5, (10**5,)) for i in range(20)}),
            {"0": b"\0" * (4 * 10**5)},
        ),
        "more than eight times the file",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name, tmp_path):
    content, expected = BAD[name]
    with pytest.raises(ValueError) as error:
        read_torch_file(write(tmp_path / "m.bin", content))
    message = str(error.value)
    assert expected in message
    assert message.startswith("m.bin: ")
    assert len(message.splitlines()) == 1


def test_a_zip_whose_records_overlap(tmp_path):
    """Two entries of the directory that point at the same bytes: how a small zip bomb becomes large."""
    content = bytearray(archive(table({"w": W}), {"0": b"\0" * 10**4, "1": b"\0" * 10**4}))
    path = write(tmp_path / "m.bin", content)
    with zipfile.ZipFile(path) as made:
        first, second = (made.getinfo(f"archive/data/{key}").header_offset for key in "01")
    place = content.rindex(b"archive/data/1") - 4  # the offset stands before the name in the directory
    assert int.from_bytes(content[place : place + 4], "little") == second
    content[place : place + 4] = first.to_bytes(4, "little")
    del content[second : second + 10**4]
    with pytest.raises(ValueError, match="m.bin: "):
        read_torch_file(write(path, bytes(content)))


def test_small_files_that_would_take_forever(tmp_path):
    """A tuple in a tuple in a tuple, each twice: 2 ** 60 leaves that must not be visited. And marks without an end."""
    nested = b"\x80\x02)q\0" + b"".join(b"h\0h\0\x86q\0" for _ in range(60))
    programs = {
        "as the value": nested[:-2] + b".",
        "as a name": b"\x80\x02}" + nested[2:] + b"K\1s.",
        "as a function": nested + b")R.",
        "as arguments": b"\x80\x02" + REBUILD + nested[2:] + b"R.",
        "as a persistent id": nested + b"Q.",
        "marks": b"N" * 10**5 + b"(" * 10**5 + b"t" * 10**5 + b".",
    }
    for program in programs.values():
        start = time.monotonic()
        with pytest.raises(ValueError, match="m.bin"):
            read_torch_file(write(tmp_path / "m.bin", archive(program)))
        assert time.monotonic() - start < 15


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is damaged"):
        read_torch_file(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        read_torch_file(tmp_path / "nothing.bin")
