"""Models of the Hugging Face hub: ``hf://owner/name[@revision]`` becomes a folder of the download cache.

The package huggingface_hub does the work; it is asked for the files that :func:`jaxunlearn.io.diffusers.load` needs and
for no others: JSON and text files, and of each component the weights of one kind, pickled ones only where there are no
safetensors.
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Iterable

from jaxunlearn.io.components import stem_of
from jaxunlearn.io.json_files import read_object
from jaxunlearn.io.pipeline_index import read_index
from jaxunlearn.io.weights import DIFFUSERS, TRANSFORMERS, Stem, is_weight_file, no_weights

PREFIX = "hf://"
_NAME = re.compile(rf"{PREFIX}([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_UNETS = ("", "unet", "unet_ema")
_FIRST = ("model_index.json", "config.json", "unet/config.json")
"""A model has one of these."""


def fetch(address: str, variant: str | None = None) -> pathlib.Path:
    """Downloads a model, or finds it in the cache of earlier downloads; without a network the cache alone is asked.

    Args:
      address: "hf://owner/name" or "hf://owner/name@revision"; a revision is a branch, a tag or a commit.
      variant: of the weights, see :func:`jaxunlearn.io.diffusers.load`.

    Returns:
      The folder of that commit in the cache. Do not write into it.

    Raises:
      ValueError: one line: a malformed address, the package is missing, no such model or revision or variant, no access,
        no network.
    """
    match = _NAME.fullmatch(address)
    if match is None or ".." in address:
        raise ValueError(f"{address!r} must be {PREFIX}owner/name or {PREFIX}owner/name@revision; correct it")
    repo, revision = match[1], match[2]
    instead = f"fetch it elsewhere with `hf download {repo} --local-dir {repo.split('/')[1]}`, and give that folder"
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise ValueError(
            f"{address}: downloading needs the package huggingface_hub; pip install 'jaxunlearn[hub]', or {instead}"
        ) from None
    try:
        return _download(repo, revision, variant)
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{repo}"
        problem = f"the model is gated; accept its conditions on {page} and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = (
            f"no such model on {constants.ENDPOINT}, or a private one; check the name, or log in with `hf auth login`"
        )
    except errors.RevisionNotFoundError:
        problem = f"the model has no revision {revision!r}; give a branch, a tag or a commit that it has"
    except errors.EntryNotFoundError as error:
        problem = f"a file is not there ({_first_line(error)}); try again, or {instead}"
    except ValueError as error:
        problem = str(error).strip()
    except _network_errors() as error:
        for name in _FIRST:
            cached = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
            if isinstance(cached, str):
                return pathlib.Path(cached).parents[name.count("/")]
        reason = f"{type(error).__name__}: {_first_line(error)}"
        problem = f"{constants.ENDPOINT} cannot be reached ({reason}), and the model is not in the cache; {instead}"
    raise ValueError(f"{address}: {problem}") from None


def needed_files(names: Iterable[str], parts: Iterable[str], variant: str | None) -> list[str]:
    """Which files of a repository to download.

    Args:
      names: all files of the repository.
      parts: folders of the pipeline's components beside UNet and scheduler.
      variant: of the weights; components other than the UNet may lack it.

    Raises:
      ValueError: the UNet has no such weights.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file)
    needed = []
    for folder in ("", "unet", "unet_ema", "scheduler", *sorted(parts)):
        files = folders.get(folder, [])
        described = [file for file in files if file.endswith((".json", ".txt")) and not is_weight_file(file)]
        weights: list[str] = []
        for stem in (DIFFUSERS,) if folder in _UNETS else dict.fromkeys((stem_of(folder), TRANSFORMERS, DIFFUSERS)):
            weights = weights or _weights(files, variant, stem, strict=folder in _UNETS)
        if folder in _UNETS and "config.json" in files and not weights:
            raise ValueError(f"{folder}: {no_weights(files, variant)}".removeprefix(": "))
        needed += [f"{folder}/{file}".lstrip("/") for file in sorted([*described, *weights])]
    return needed


def _weights(files: list[str], variant: str | None, stem: Stem, strict: bool) -> list[str]:
    """The weight files of one component: of the variant or, unless ``strict``, the plain ones."""
    endings = [f".{variant}"] if variant else [""]
    endings += [] if strict or not variant else [""]
    for base, kind in ((stem.safetensors, "safetensors"), (stem.pickled, "bin")):
        for ending in endings:
            single, index = f"{base}{ending}.{kind}", f"{base}.{kind}.index{ending}.json"
            if single in files:
                return [single]
            if index in files:
                shard = re.compile(rf"{re.escape(base + ending)}-\d+-of-\d+\.{kind}")
                return [index, *filter(shard.fullmatch, files)]
    return []


def _download(repo: str, revision: str | None, variant: str | None) -> pathlib.Path:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi(library_name="jaxunlearn").model_info(repo, revision=revision)
    names = [file.rfilename for file in info.siblings or ()]

    def get(name: str, revision: str | None = info.sha) -> pathlib.Path:
        return pathlib.Path(hf_hub_download(repo, name, revision=revision, library_name="jaxunlearn"))

    first = next((name for name in _FIRST if name in names), None)
    if first is None:
        raise ValueError(f"has none of {', '.join(_FIRST)}; it is not a model that diffusers saved")
    # Under the name that was asked for: the cache remembers its commit, for the day without a network.
    index, parts = get(first, revision), ()
    if first == _FIRST[0]:
        parts = read_index(index.parent, read_object(index.parent, index.name)).parts
    needed = needed_files(names, parts, variant)
    files = [get(name) for name in needed]
    return files[0].parents[needed[0].count("/")]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _network_errors() -> tuple[type[Exception], ...]:
    """What the network raises; the library below huggingface_hub was another one in each of its major versions."""
    modules = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    return (OSError, *(module.HTTPError for module in modules if module is not None))
