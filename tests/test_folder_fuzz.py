"""Folders that are damaged or hostile in hundreds of ways: each is refused with words, or loads because it is harmless.

All mutations are drawn from fixed seeds. What may load says so: in the name of its group, or in :data:`HARMLESS`.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load, save

from jaxunlearn.io import diffusers as folders
from jaxunlearn.models.convert import to_diffusers
from jaxunlearn.models.parameters import init_params
from tests.test_diffusers_io import CONFIG
from tests.test_torch_pickle import BAD as BAD_PICKLES
from tests.test_torch_pickle import hostile
from tests.tiny_pipeline import make_tiny_pipeline
from tests.torch_files import archive, torch_file

SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100}
INDEX = {
    "_class_name": "DDPMPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}
STEM = "diffusion_pytorch_model"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def as_json(value) -> bytes:
    return json.dumps(value).encode()


def unet_folders() -> dict[str, dict[str, bytes]]:
    """Unconditional models in three layouts."""
    tensors = to_diffusers(init_params(CONFIG, 0))
    config = as_json({"_class_name": "UNet2DModel", **CONFIG.to_dict()})
    flat = {"config.json": config, "scheduler_config.json": as_json(SCHEDULER), "model_index.json": as_json(INDEX)}
    names = sorted(tensors)
    shards = {f"{STEM}-0000{i + 1}-of-00002.safetensors": {n: tensors[n] for n in names[i::2]} for i in range(2)}
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    nested = {
        "unet/config.json": config,
        "scheduler/scheduler_config.json": as_json(SCHEDULER),
        "model_index.json": as_json(INDEX),
    }
    return {
        "flat": flat | {f"{STEM}.safetensors": save(tensors)},
        "nested": nested | {f"unet/{STEM}.safetensors": save(tensors)},
        "pickled": nested | {f"unet/{STEM}.bin": torch_file(tensors)},
        "sharded": flat
        | {name: save(part) for name, part in shards.items()}
        | {f"{STEM}.safetensors.index.json": as_json(index)},
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Name -> content of a valid folder."""
    path = make_tiny_pipeline(tmp_path_factory.mktemp("made") / "m")
    files = {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
    return unet_folders() | {"pipeline": files}


@pytest.fixture
def check(bases, tmp_path):
    """Writes a folder, loads it, and says what happened: the lines of the refusal, or None. Nothing else may happen."""
    root = tmp_path / "m"
    marker = tmp_path / "marker"
    counts = {"loaded": 0, "refused": 0}
    names = {name for files in bases.values() for name in files}
    places = {part for name in names for part in (name, name.split("/")[-1], name.split("/")[0])}

    def run(files, after=lambda root: None, what=""):
        shutil.rmtree(root, ignore_errors=True)
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        after(root)
        message = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = folders.load(root)
            except ValueError as error:
                message = str(error)
        assert not marker.exists(), f"{what}: something was run"
        if message is not None:
            head, *lines = message.splitlines()
            assert f"{root} cannot be loaded ({len(lines)} problem" in head, f"{what}: {message}"
            for line in lines:
                assert named(line, places), f"{what}: the line names neither file nor key: {line!r}"
            counts["refused"] += 1
            return lines
        for part in (model, model.vae, model.text_encoder):
            if part is not None:
                assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(part.params)), what
        counts["loaded"] += 1
        return None

    run.marker, run.counts = marker, counts
    return run


def named(line: str, places: set[str]) -> bool:
    """Whether a line says which file or which folder it is about, or names a tensor."""
    start = line.split(": ")[0]
    return (
        any(place in line for place in places) or start in ("missing", "unexpected", "wrong shape") or "weights" in line
    )


def rest(files, *names):
    return {name: content for name, content in files.items() if name not in names}


def test_the_bases_are_valid(bases, check):
    for name, files in bases.items():
        assert check(files, what=name) is None


def test_files_cut_short(bases, check):
    """Every file of every folder, at its critical offsets and at random ones."""
    rng = np.random.default_rng(0)
    for base, files in bases.items():
        for name, content in files.items():
            offsets = {0, 1, 7, 8, 9, len(content) - 1, *rng.integers(0, len(content), 2).tolist()}
            for offset in sorted(o for o in offsets if o < len(content)):
                lines = check(files | {name: content[:offset]}, what=f"{base}/{name} cut at {offset}")
                if not (name == "tokenizer/merges.txt" or (name.endswith(".json") and content[offset:].isspace())):
                    assert lines, f"{base}/{name} cut at {offset} loads"
    assert check.counts["refused"] > 100


def test_bytes_changed_in_headers(bases, check):
    """Lengths, names, dtypes, shapes and offsets of weight files; a changed letter of ``__metadata__`` would be harmless."""
    rng = np.random.default_rng(1)
    for base, name in (("flat", f"{STEM}.safetensors"), ("pipeline", "text_encoder/model.safetensors")):
        content = bases[base][name]
        end = 8 + int.from_bytes(content[:8], "little")
        for place in [*range(8), *rng.integers(8, end, 30).tolist()]:
            changed = bytearray(content)
            changed[place] ^= 1 << int(rng.integers(8))
            lines = check(bases[base] | {name: bytes(changed)}, what=f"{name} byte {place}")
            spaces = bytes(changed[8:end]).strip() == content[8:end].strip()
            assert lines or spaces or b"__metadata__" in content[8:200], place


def test_bytes_changed_in_pickled_files(bases, check):
    """Every byte of a zip has a checksum or a meaning; some of its fields (times, attributes) mean nothing here."""
    rng = np.random.default_rng(2)
    name = f"unet/{STEM}.bin"
    content = bases["pickled"][name]
    pickled = content.index(b"\x80\x02ccollections")
    directory = content.index(b"PK\x01\x02")
    places = [*rng.integers(pickled, pickled + 2000, 30).tolist(), *rng.integers(directory, len(content), 30).tolist()]
    for place in [*range(40), *places, *rng.integers(0, len(content), 20).tolist()]:
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        check(bases["pickled"] | {name: bytes(changed)}, what=f"{name} byte {place}")
    assert check.counts["refused"] > 60


def test_bytes_changed_in_tensors_are_harmless(bases, check):
    """One bit of a mantissa is another number: a format without checksums cannot tell."""
    rng = np.random.default_rng(3)
    name = f"{STEM}.safetensors"
    content = bases["flat"][name]
    start = 8 + int.from_bytes(content[:8], "little")
    for place in rng.integers(0, (len(content) - start) // 4, 8):
        changed = bytearray(content)
        changed[start + 4 * int(place)] ^= 1
        assert check(bases["flat"] | {name: bytes(changed)}) is None


WRONG = [
    None,
    True,
    -1,
    0,
    10**12,
    1e308,
    1.5,
    "x",
    "",
    [],
    [1],
    [[]],
    ["x", None],
    {},
    {"a": 1},
    "\ud800\n",
    "0" * 300,
]
# Keys that nothing here depends on, that another file overrules, or that can have one of the values above.
HARMLESS = {
    "model_index.json": "_class_name _diffusers_version requires_safety_checker safety_checker feature_extractor",
    "scheduler/scheduler_config.json": "_class_name steps_offset set_alpha_to_one skip_prk_steps",
    "unet/config.json": "add_attention attention_head_dim attn_norm_num_groups center_input_sample class_embed_type "
    "downsample_padding dropout flip_sin_to_cos freq_shift mid_block_scale_factor norm_eps num_class_embeds "
    "num_train_timesteps sample_size time_embedding_dim",
    "vae/config.json": "sample_size scaling_factor",
    "text_encoder/config.json": "architectures bos_token_id eos_token_id pad_token_id",
    "tokenizer/tokenizer_config.json": "add_prefix_space do_lower_case errors tokenizer_class bos_token eos_token "
    "pad_token unk_token",  # special_tokens_map.json wins
    "tokenizer/special_tokens_map.json": "bos_token eos_token pad_token unk_token",
}


def test_json_values_of_the_wrong_type(bases, check):
    """Every key of every JSON file that describes a model, with values that it cannot have."""
    rng = np.random.default_rng(4)
    for base in ("nested", "pipeline"):
        for name, content in bases[base].items():
            if not name.endswith(".json") or name.endswith("vocab.json"):
                continue
            values = json.loads(content)
            for key in values:
                for i in rng.choice(len(WRONG), 2, replace=False):
                    what = f"{base}/{name}: {key} = {WRONG[i]!r}"
                    lines = check(bases[base] | {name: as_json(values | {key: WRONG[i]})}, what=what)
                    assert lines or key in HARMLESS[name].split(), what
    assert check.counts["refused"] > 90


def test_json_files_that_are_none(bases, check):
    """Encodings, depths and kinds; and bytes changed at random, which may hit a letter that means nothing."""
    contents = {
        "empty": b"",
        "spaces": b"  ",
        "not UTF-8": b'{"a": "\xff\xfe"}',
        "zeros": b"\0" * 100,
        "deep list": b"[" * 100_000,
        "deep object": b'{"a":' * 100_000,
        "list": b"[]",
        "text": b'"x"',
        "number": b"1e999",
        "many digits": b"1" * 10_000,
        "twice": b'{"a": 1, "a": 2}',
        "not a number": b'{"a": NaN}',
        "pointer": POINTER,
        "pickle": b"\x80\x02}.",
        "half": b'{"_class_name": "UNet2DMo',
    }
    rng = np.random.default_rng(5)
    for base in ("sharded", "pipeline"):
        for name, content in bases[base].items():
            if not name.endswith((".json", ".txt")):
                continue
            for kind in contents if base == "sharded" else rng.choice(list(contents), 4, replace=False):
                lines = check(bases[base] | {name: contents[kind]}, what=f"{base}/{name}: {kind}")
                # merges.txt is a text: without lines it is a vocabulary of letters, as it was.
                assert lines or (name.endswith("merges.txt") and kind in ("empty", "spaces")), f"{base}/{name}: {kind}"
            for place in rng.integers(0, len(content), 4):
                changed = bytearray(content)
                changed[place] ^= 1 << int(rng.integers(8))
                check(bases[base] | {name: bytes(changed)}, what=f"{base}/{name} byte {place}")


def test_files_that_are_gone_or_elsewhere(bases, check):
    """Each file deleted, renamed, put one folder up, and copied under a name that it should not have."""
    optional = {"model_index.json", "tokenizer/special_tokens_map.json"}
    for base, files in bases.items():
        for name, content in files.items():
            without = rest(files, name)
            assert check(without, what=f"{base} without {name}") or name in optional, name
            folder, _, file = name.rpartition("/")
            assert check(without | {f"{folder}/old_{file}".lstrip("/"): content}, what=name) or name in optional, name
            assert check(files | {f"{folder}/copy of {file}".lstrip("/"): content}, what=name) is None
            other = next(n for n in files if n != name)
            lines = check(files | {other: content}, what=f"{base}: {name} as {other}")
            same = name.endswith("config.json") and other.endswith("config.json") and files[other] == content
            assert lines or same, f"{base}: {name} as {other}"


def test_weights_of_other_shapes_dtypes_and_values(bases, check):
    rng = np.random.default_rng(6)
    for base, name in (
        ("flat", f"{STEM}.safetensors"),
        ("sharded", f"{STEM}-00001-of-00002.safetensors"),
        ("pipeline", f"unet/{STEM}.safetensors"),
        ("pipeline", f"vae/{STEM}.safetensors"),
        ("pipeline", "text_encoder/model.safetensors"),
    ):
        tensors = load(bases[base][name])
        for tensor in rng.choice(sorted(tensors), 4, replace=False):
            old = tensors[tensor]
            changes = {
                "NaN": np.full_like(old, np.nan),
                "one infinity": np.concatenate([np.full(1, -np.inf, np.float32), old.ravel()[1:]]).reshape(old.shape),
                "larger": np.zeros((*old.shape[:-1], old.shape[-1] + 1), np.float32),
                "one axis more": old[None],
                "flat": old.reshape(-1, 1),
                "none": old[:0],
                "integers": old.astype(np.int32),
                "double": old.astype(np.float64),
                "truth": old > 0,
            }
            for kind, values in changes.items():
                lines = check(bases[base] | {name: save(tensors | {tensor: values})}, what=f"{tensor}: {kind}")
                assert any(tensor in line for line in lines), f"{tensor}: {kind}"
            renamed = {("x" + n if n == tensor else n): values for n, values in tensors.items()}
            assert check(bases[base] | {name: save(renamed)})
            half = tensors | {tensor: old.astype(np.float16)}
            assert check(bases[base] | {name: save(half)}, what="float16 is harmless") is None
        assert check(bases[base] | {name: save({})})
        assert check(bases[base] | {name: save({"model.diffusion_model.x": np.zeros(1, np.float32)})})


def test_pickled_weights_that_do_harm(bases, check):
    """Nothing is run, whichever component the file pretends to be."""
    places = {
        f"unet/{STEM}.bin": f"unet/{STEM}.safetensors",
        f"vae/{STEM}.bin": f"vae/{STEM}.safetensors",
        "text_encoder/pytorch_model.bin": "text_encoder/model.safetensors",
    }
    programs = {name: archive(program, {"0": bytes(24)}) for name, (program, _) in hostile(check.marker).items()}
    for kind, content in (programs | {name: content for name, (content, _) in BAD_PICKLES.items()}).items():
        name = f"unet/{STEM}.bin"
        assert check(rest(bases["pickled"], name) | {name: content}, what=kind)
    for kind, content in programs.items():
        for target, name in places.items():
            if hash_of(kind) % 3 == list(places).index(target):
                assert check(rest(bases["pipeline"], name) | {target: content}, what=kind)


def hash_of(text: str) -> int:
    return sum(text.encode())


def test_folders_links_and_pipes_in_place_of_files(bases, check):
    def replaced(name, how):
        def change(root):
            (root / name).unlink()
            how(root / name)

        return change

    kinds = {
        "folder": lambda file: file.mkdir(),
        "folder with something": lambda file: (file / "x").mkdir(parents=True),
        "link to itself": lambda file: file.symlink_to(file),
        "link to nothing": lambda file: file.symlink_to("nothing"),
        "link to its folder": lambda file: file.symlink_to(file.parent),
        "pipe": os.mkfifo,
        "device": lambda file: file.symlink_to("/dev/zero"),
    }
    optional = "special_tokens_map.json"
    for base in ("sharded", "pipeline"):
        for name in bases[base]:
            for kind, how in kinds.items():
                lines = check(bases[base], replaced(name, how), f"{base}/{name}: {kind}")
                assert lines or name.endswith(optional), f"{base}/{name}: {kind}"

    def cleared(name, how):
        def change(root):
            shutil.rmtree(root / name)
            how(root / name)

        return change

    for folder in ("unet", "vae", "text_encoder", "tokenizer"):
        for kind in ("link to itself", "link to nothing", "link to its folder", "pipe"):
            assert check(bases["pipeline"], cleared(folder, kinds[kind]), f"{folder}: {kind}")


@pytest.mark.parametrize("length", [0, 1, 2**20, 100_000_001, 2**31, 2**62, 2**63, 2**64 - 1])
def test_lengths_of_headers(length, bases, check):
    for base, name in (("flat", f"{STEM}.safetensors"), ("pipeline", f"vae/{STEM}.safetensors")):
        content = bases[base][name]
        assert check(bases[base] | {name: length.to_bytes(8, "little") + content[8:]})
        assert check(bases[base] | {name: length.to_bytes(8, "little")})


def header(entries, data=b"") -> bytes:
    content = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(content).to_bytes(8, "little") + content + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "a list": header([]),
    "nothing": header(b""),
    "deep": header(b"[" * 100_000),
    "entry of a wrong kind": header({"conv_in.bias": 3}),
    "no dtype": header({"conv_in.bias": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "dtype of a wrong kind": header({"conv_in.bias": entry(dtype=["F32"])}, bytes(4)),
    "unknown dtype": header({"conv_in.bias": entry(dtype="F5")}, bytes(4)),
    "negative shape": header({"conv_in.bias": entry(shape=[-1])}, bytes(4)),
    "shape of truths": header({"conv_in.bias": entry(shape=[True])}, bytes(4)),
    "huge shape": header({"conv_in.bias": entry(shape=[2**62, 2**62])}, bytes(4)),
    "backwards": header({"conv_in.bias": entry(offsets=[4, 0])}, bytes(4)),
    "offsets beyond the end": header({"conv_in.bias": entry(shape=[2**40], offsets=[0, 2**42])}, bytes(4)),
    "offsets of a wrong kind": header({"conv_in.bias": entry(offsets="04")}, bytes(4)),
    "three offsets": header({"conv_in.bias": entry(offsets=[0, 2, 4])}, bytes(4)),
    "a hole": header({"conv_in.bias": entry(offsets=[4, 8])}, bytes(8)),
    "an overlap": header({"a": entry(), "b": entry(shape=[2], offsets=[0, 8])}, bytes(8)),
    "a name twice": header(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
    "metadata of a wrong kind": header({"__metadata__": {"a": 1}, "conv_in.bias": entry()}, bytes(4)),
    "metadata as a list": header({"__metadata__": [], "conv_in.bias": entry()}, bytes(4)),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_lie(kind, bases, check):
    for base, name in (("flat", f"{STEM}.safetensors"), ("pipeline", f"vae/{STEM}.safetensors")):
        lines = check(bases[base] | {name: HEADERS[kind]})
        assert any(f"{STEM}.safetensors" in line for line in lines)


def test_indices_that_lie(bases, check):
    files = bases["sharded"]
    name = f"{STEM}.safetensors.index.json"
    index = json.loads(files[name])
    tensors = list(index["weight_map"])
    first, second = (f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2))

    def changed(**changes):
        return index | {"weight_map": index["weight_map"] | changes}

    lies = [
        {},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": None},
        index | {"metadata": [1]},
        index | {"weight_map": dict.fromkeys(tensors, first)},
        index | {"weight_map": {tensor: second for tensor in tensors[1:]}},
        changed(other=first),
        *(changed(**{tensors[0]: value}) for value in (3, None, [first], {"a": 1}, "", ".", "..", "/etc/passwd")),
        *(changed(**{tensors[0]: value}) for value in ("../x.safetensors", "a/b.safetensors", "gone.safetensors")),
        *(
            changed(**{tensors[0]: value})
            for value in (f"{STEM}.bin", name, "config.json", "x\0.safetensors", "\ud800")
        ),
    ]
    for lie in lies:
        assert check(files | {name: as_json(lie)}, what=str(lie)[:100])
    swapped = files | {first: files[second], second: files[first]}
    assert check(swapped)
    assert check(files | {first: files[second]})
    assert check(rest(files, first))
    assert check(files | {f"{STEM}-00003-of-00002.safetensors": files[first]}) is None


def test_what_loads_can_be_saved_or_is_refused(bases, tmp_path):
    """Harmless additions to a folder do not get in the way of an export either."""
    root = tmp_path / "m"
    for name, content in bases["pipeline"].items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "notes").symlink_to("notes")
    (root / "vae" / "deep" / "er").mkdir(parents=True)
    (root / "unet" / "old.bin").write_bytes(b"old")
    model = folders.load(root)
    folders.save(tmp_path / "out", model)
    assert not any("old.bin" in str(path) for path in pathlib.Path(tmp_path / "out").rglob("*"))
    os.mkfifo(root / "vae" / "deep" / "pipe")
    with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
        folders.save(tmp_path / "again", model)
