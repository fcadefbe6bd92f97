"""``hf://``: the real download code against a small server that answers as the hub does; and everything that goes wrong."""

from __future__ import annotations

import builtins
import hashlib
import http.server
import json
import pathlib
import re
import shutil
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from jaxunlearn.io import diffusers as folders
from jaxunlearn.io import hub
from jaxunlearn.io.hashing import tree_sha256
from tests.tiny_pipeline import make_tiny_pipeline
from tests.torch_files import torch_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers ``/api/models/...`` and ``/.../resolve/...`` for the folders of ``server.models``."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.partition("?")[0]
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = info or file
        if match is None:
            return self.refuse(404, "EntryNotFound")
        folder = self.server.models.get(match[1])
        if folder is None:
            return self.refuse(401, "RepoNotFound")
        if folder == "gated":
            return self.refuse(403, "GatedRepo")
        if folder == "down":
            return self.refuse(503, "")
        if match[2] not in (None, "main", "v1", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if info:
            files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
            content = json.dumps({"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
            return self.send(content.encode(), body, {"Content-Type": "application/json"})
        if not (folder / file[3]).is_file():
            return self.refuse(404, "EntryNotFound")
        content = (folder / file[3]).read_bytes()
        if body:
            self.server.served.append(file[3])
        etag = hashlib.sha256(content).hexdigest()
        return self.send(content, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def send(self, content, body, headers, status=200):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def refuse(self, status, code):
        self.send(b"", False, {"X-Error-Code": code, "X-Error-Message": "no"}, status)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub on this machine, with an empty cache; huggingface_hub takes its address from ``constants``."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.models, server.served = {}, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A repository with everything that nobody needs beside the model."""
    root = make_tiny_pipeline(tmp_path_factory.mktemp("made") / "m")
    index = json.loads((root / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (root / "model_index.json").write_text(json.dumps(index))
    (root / "safety_checker").mkdir()
    (root / "safety_checker" / "config.json").write_text("{}")
    for name in ("safety_checker/model.safetensors", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "README.md"):
        (root / name).write_bytes(b"large")
    for name in ("unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", "text_encoder/model.onnx"):
        (root / name).write_bytes(b"large")
    half = {k: v.astype(np.float16) for k, v in load_file(root / "unet/diffusion_pytorch_model.safetensors").items()}
    (root / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(save(half))
    (root / "other").mkdir()
    (root / "other" / "config.json").write_text("{}")
    return root


NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


def test_a_model_is_downloaded_once(server, made, tmp_path):
    server.models["owner/name"] = made
    model = folders.load("hf://owner/name")
    assert tree_sha256(model.params) == tree_sha256(folders.load(made).params)
    assert model.source.path.name == COMMIT
    assert model.notes[0].startswith("hf://owner/name is the folder ")
    assert set(server.served) == NEEDED
    assert len(server.served) == len(NEEDED)
    again = folders.load("hf://owner/name@v1")
    assert again.source.path == model.source.path
    assert len(server.served) == len(NEEDED)
    before = {f: f.read_bytes() for f in model.source.path.rglob("*") if f.is_file()}
    assert folders.save(tmp_path / "out", again) == []
    assert {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()} == NEEDED
    assert before == {f: f.read_bytes() for f in model.source.path.rglob("*") if f.is_file()}
    with pytest.raises(ValueError, match="never written to"):
        folders.save(model.source.path / "out", model)


def test_a_variant_is_downloaded_where_it_exists(server, made):
    server.models["owner/name"] = made
    model = folders.load("hf://owner/name", "fp16")
    unet = {"unet/diffusion_pytorch_model.safetensors": "unet/diffusion_pytorch_model.fp16.safetensors"}
    assert set(server.served) == {unet.get(name, name) for name in NEEDED}
    assert model.notes[1:] == tuple(
        f"{name}: has no variant 'fp16'; its plain weights were read" for name in ("vae", "text_encoder")
    )


def test_without_a_network_the_cache_is_used(server, made, monkeypatch):
    from huggingface_hub import constants

    server.models["owner/name"] = made
    model = folders.load("hf://owner/name")
    server.models["owner/name"] = "down"
    assert folders.load("hf://owner/name").source.path == model.source.path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert folders.load("hf://owner/name").source.path == model.source.path
    with pytest.raises(
        ValueError, match="^hf://owner/other: http.* cannot be reached .*Offline.*not in the cache; fetch"
    ):
        folders.load("hf://owner/other")


def test_a_flat_pickled_model(server, made, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(made / "unet", flat)
    tensors = load_file(flat / "diffusion_pytorch_model.safetensors")
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"):
        (flat / name).unlink()
    (flat / "diffusion_pytorch_model.bin").write_bytes(torch_file(tensors))
    shutil.copy(made / "scheduler" / "scheduler_config.json", flat)
    server.models["owner/flat"] = flat
    model = folders.load("hf://owner/flat")
    assert sorted(server.served) == ["config.json", "diffusion_pytorch_model.bin", "scheduler_config.json"]
    assert tree_sha256(model.params) == tree_sha256(folders.load(flat).params)


PROBLEMS = {
    "hf://owner/none": "no such model on http://127.0.0.1:.*, or a private one; check the name, or log in",
    "hf://owner/gated": "the model is gated; accept its conditions on http://127.0.0.1:.*/owner/gated and log in",
    "hf://owner/name@v9": "the model has no revision 'v9'",
    "hf://owner/down": "cannot be reached .*503.*, and the model is not in the cache; fetch it elsewhere with `hf download",
    "hf://owner/texts": "has none of model_index.json, config.json, unet/config.json; it is not a model",
    "hf://owner/sdxl": "text_encoder_2: 'CLIPTextModelWithProjection' is not supported; allowed",
    "hf://owner--x/na--me": ".*",
}


@pytest.mark.parametrize("address", PROBLEMS)
def test_problems_are_one_line(address, server, made, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "sdxl").mkdir()
    entry = {"unet": ["diffusers", "UNet2DConditionModel"]}
    entry |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    (tmp_path / "sdxl" / "model_index.json").write_text(json.dumps(entry))
    server.models |= {"owner/name": made, "owner/gated": "gated", "owner/down": "down"}
    server.models |= {"owner/texts": tmp_path / "texts", "owner/sdxl": tmp_path / "sdxl"}
    with pytest.raises(ValueError, match=PROBLEMS[address]) as error:
        folders.load(address)
    assert str(error.value).startswith(f"{address}: ")
    assert len(str(error.value).splitlines()) == 1


def test_variants_that_do_not_exist_are_refused_before_the_download(server, made):
    server.models["owner/name"] = made
    with pytest.raises(
        ValueError, match=r"unet: weights: no variant 'fp8'; there are: none \(the plain files\), fp16;"
    ):
        folders.load("hf://owner/name", "fp8")
    assert server.served == ["model_index.json"]


def test_a_server_that_nobody_runs(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="^hf://owner/name: http://127.0.0.1:9 cannot be reached .*Connect") as error:
        folders.load("hf://owner/name")
    assert len(str(error.value).splitlines()) == 1


def test_without_the_package(monkeypatch):
    true_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return true_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ValueError, match=r"pip install 'jaxunlearn\[hub\]', or fetch it elsewhere with `hf download o/n"
    ):
        folders.load("hf://o/n")


@pytest.mark.parametrize("address", ["hf://name", "hf://a/b/c", "hf://a/b@", "hf://a/b@../x", "hf:// a/b", "hf://"])
def test_malformed_addresses(address):
    with pytest.raises(ValueError, match="must be hf://owner/name or hf://owner/name@revision; correct it"):
        folders.load(address)


def test_a_path_object_is_a_folder():
    with pytest.raises(ValueError, match="is not a folder on this machine"):
        folders.load(pathlib.Path("hf:/owner/name"))


def test_shards_of_a_variant():
    stem = "unet/diffusion_pytorch_model"
    shards = [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    plain = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    indices = [f"{stem}.safetensors.index.fp16.json", f"{stem}.safetensors.index.json"]
    names = [*shards, *plain, *indices, f"{stem}.bin", "unet/config.json"]
    assert hub.needed_files(names, (), "fp16") == sorted([*shards, indices[0], "unet/config.json"])
    assert hub.needed_files(names, (), None) == sorted([*plain, indices[1], "unet/config.json"])
    with pytest.raises(ValueError, match="unet: weights: there are only variants: fp16; ask for one"):
        hub.needed_files([*shards, indices[0], "unet/config.json"], (), None)
