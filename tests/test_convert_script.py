"""The conversion script: there and back, its refusals, and its comparison with torch."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from jaxunlearn.io import diffusers as folders
from jaxunlearn.io.hashing import tree_sha256
from tests.tiny_pipeline import make_tiny_pipeline

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "scripts" / "convert_diffusers.py"
NAMES = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_diffusers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("made") / "m")


def contents(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def test_there_and_back(script, source, tmp_path, capsys):
    jax_folder, out = tmp_path / "jax", tmp_path / "out"
    assert script.main(["to-jax", str(source), str(jax_folder)]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in NAMES)
    assert contents(jax_folder).keys() == {
        f"{name}/{file}" for name in NAMES for file in ("config.json", script.PARAMS)
    }
    model = folders.load(source)
    for name, params in zip(NAMES, (model.params, model.vae.params, model.text_encoder.params)):
        tree = unflatten_dict(load_file(jax_folder / name / script.PARAMS), sep="/")
        assert tree_sha256(tree) == tree_sha256(params)
        assert (jax_folder / name / "config.json").read_bytes() == (source / name / "config.json").read_bytes()
    assert script.main(["to-diffusers", str(jax_folder), str(source), str(out)]) == 0
    assert contents(out) == contents(source)


def test_changed_trees_come_back(script, source, tmp_path, capsys):
    jax_folder, out = tmp_path / "jax", tmp_path / "out"
    script.main(["to-jax", str(source), str(jax_folder)])
    for name in ("unet", "vae"):
        file = jax_folder / name / script.PARAMS
        save_file({path: values + np.float32(0.01) for path, values in load_file(file).items()}, file)
    shutil.rmtree(jax_folder / "text_encoder")
    assert script.main(["to-diffusers", str(jax_folder), str(source), str(out)]) == 0
    assert "note: vae: other weights than those of the source were written" in capsys.readouterr().out
    before, after = contents(source), contents(out)
    stem = "diffusion_pytorch_model.safetensors"
    assert {name for name in after if after[name] != before[name]} == {f"unet/{stem}", f"vae/{stem}"}
    new, old = (folders.load(folder).vae.params["quant_conv"]["bias"] for folder in (out, source))
    np.testing.assert_array_equal(new, old + np.float32(0.01))


def test_a_flat_pixel_model(script, tmp_path, capsys):
    source = make_tiny_pipeline(tmp_path / "m", text=False) / "unet"
    assert script.main(["to-jax", str(source), str(tmp_path / "jax")]) == 0
    assert script.main(["to-diffusers", str(tmp_path / "jax"), str(source), str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == contents(source)
    assert "note: no scheduler_config.json was written" in capsys.readouterr().out


def test_refusals(script, source, tmp_path, capsys):
    jax_folder = tmp_path / "jax"
    script.main(["to-jax", str(source), str(jax_folder)])

    def refused(*args):
        capsys.readouterr()
        assert script.main([str(arg) for arg in args]) == 2
        return capsys.readouterr().err

    assert "exists already; nothing is overwritten" in refused("to-jax", source, jax_folder)
    assert "exists already; nothing is overwritten" in refused("to-diffusers", jax_folder, source, jax_folder)
    assert "lies inside" in refused("to-jax", source, source / "jax")
    assert "is not a folder on this machine" in refused("to-jax", tmp_path / "none", tmp_path / "x")
    assert "holds no unet/params.safetensors or vae/" in refused("to-diffusers", tmp_path, source, tmp_path / "x")
    tree = load_file(jax_folder / "unet" / script.PARAMS)
    bias = tree.pop("conv_in/bias")
    save_file(tree | {"conv_in": bias, "t": bias.astype(np.int32)}, jax_folder / "unet" / script.PARAMS)
    assert refused("to-diffusers", jax_folder, source, tmp_path / "x").startswith("unet/params.safetensors: t is I32")
    save_file(tree | {"conv_in": bias}, jax_folder / "unet" / script.PARAMS)
    assert "conv_in" in refused("to-diffusers", jax_folder, source, tmp_path / "x")
    save_file(tree | {"x/bias": bias}, jax_folder / "unet" / script.PARAMS)
    (jax_folder / "vae" / script.PARAMS).write_bytes(b"broken")
    lines = refused("to-diffusers", jax_folder, source, tmp_path / "x").splitlines()
    assert [line.split(" ")[:2] for line in lines] == [
        ["unet/params.safetensors:", "missing"],
        ["unet/params.safetensors:", "unexpected"],
        ["vae/params.safetensors:", "params.safetensors:"],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jax"]
    for args in ([], ["--check", "x", "to-jax", "a", "b"], ["to-jax", "a"]):
        with pytest.raises(SystemExit) as error:
            script.main(args)
        assert error.value.code == 2


def test_the_check_says_what_is_missing(script, source, monkeypatch, capsys):
    true_find, absent = importlib.util.find_spec, ("torch", "diffusers", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else true_find(name))
    assert script.main(["--check", str(source)]) == 2
    error = capsys.readouterr().err
    assert error == "--check needs torch, diffusers, transformers; install them: pip install 'jaxunlearn[parity]'\n"


def test_the_help_reads_the_trees_back(script):
    """As a command, and without the packages of the comparison."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "unflatten_dict(safetensors.numpy.load_file(" in done.stdout
    assert "Exit codes: 0" in done.stdout


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_table_of_parity(script, source, tmp_path, capsys, monkeypatch):
    for package in ("torch", "diffusers", "transformers"):
        pytest.importorskip(package)
    assert script.main(["--check", str(source)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["component", *NAMES]
    assert all(line.endswith("pass") for line in lines[1:])
    model = folders.load(source)
    assert lines[1].split()[1:3] == [str(len(jax.tree.leaves(model.params))), str(model.num_params)]
    # Another number in one of the two programs is found.
    true_load = folders.load
    monkeypatch.setattr(folders, "load", lambda *args, **kwargs: _disturbed(true_load(*args, **kwargs)))
    assert script.main(["--check", str(source)]) == 1
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]] == ["FAIL", "pass", "pass"]
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    (broken / "vae" / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    assert script.main(["--check", str(broken)]) == 2


def _disturbed(model):
    params = model.params | {"conv_out": jax.tree.map(lambda leaf: leaf + np.float32(1e-3), model.params["conv_out"])}
    return model.with_params(params)
