"""Weights of the feature networks of metrics: files that the user converts once, checked byte for byte before each use.

A folder of weights holds, for each network, ``<name>.safetensors`` with the arrays under the dotted names of our own
trees, and ``<name>.json`` with the SHA-256 of that file. The safetensors file itself says from which file it was made. So
a changed byte is refused, and so are weights that do not come from the public file that the metric is defined with.
Nothing is downloaded, and nothing is unpickled: ``scripts/convert_weights.py`` makes both files.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn.io.json_files import parse_json, read_object
from jaxunlearn.io.safetensors_header import read_header
from jaxunlearn.io.weights import DTYPES, save_tensors
from jaxunlearn.registry import look_up

FOLDER_VARIABLE = "JAXUNLEARN_WEIGHTS"
"""Environment variable with the folder of weights."""

_KEY = "jaxunlearn"  # One key of metadata: the order of several is not fixed in the file.


class SourceFile(NamedTuple):
    """A public file that holds the weights.

    Attributes:
      name: its name.
      bytes: its size, None where it is not known.
      sha256: its fingerprint, None where nobody published one.
      converted_sha256: fingerprint of the file that the conversion makes of it, None where it is not known yet.
    """

    name: str
    bytes: int | None
    sha256: str | None
    converted_sha256: str | None = None


class WeightsSource(NamedTuple):
    """Where the weights of one network come from.

    Attributes:
      network: what it is.
      files: the public files; the first one is pinned.
      home: where they are published.
      licence: of the weights.
      metrics: the metrics that need them.
      substitute: what can be measured without them, under its own name.
    """

    network: str
    files: tuple[SourceFile, ...]
    home: str
    licence: str
    metrics: tuple[str, ...]
    substitute: str


FEATURE_WEIGHTS: dict[str, WeightsSource] = {
    "sscd": WeightsSource(
        "SSCD copy detector (ResNet-50)",
        (
            SourceFile(
                "sscd_disc_mixup.torchscript.pt",
                98_791_638,
                "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56",
            ),
            SourceFile("sscd_disc_mixup.torchvision.pt", None, None),
        ),
        "github.com/facebookresearch/sscd-copy-detection (README)",
        "MIT",
        (
            "sscd",
            "sscd_calibrated",
            "copy_sscd",
            "sscd_projected",
            "sscd_dissimilarity_rate",
            "sscd_direction",
        ),
        "copy_rate on pixels",
    ),
    "inception": WeightsSource(
        "Inception-V3 of the FID",
        (
            SourceFile(
                "pt_inception-2015-12-05-6726825d.pth",
                95_628_359,
                "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            ),
        ),
        "github.com/mseitzer/pytorch-fid (release fid_weights)",
        "Apache-2.0",
        ("fid", "kid", "precision", "recall", "density", "coverage", "inception_score_imagenet"),
        "fd_classifier, fd_pixel",
    ),
    "clip_rn50": WeightsSource(
        "CLIP RN50",
        (SourceFile("RN50.pt", 255_827_503, "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),),
        "github.com/openai/CLIP (clip/clip.py)",
        "MIT (of the repository)",
        ("clip_iqa",),
        "sharpness, total_variation, high_band_energy",
    ),
    "clip_vit_l14": WeightsSource(
        "CLIP ViT-L/14",
        (SourceFile("ViT-L-14.pt", 932_768_134, "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),),
        "github.com/openai/CLIP (clip/clip.py)",
        "MIT (of the repository)",
        ("aesthetic",),
        "none",
    ),
    "aesthetic": WeightsSource(
        "LAION aesthetic predictor on CLIP ViT-L/14",
        (
            SourceFile(
                "sac+logos+ava1-l14-linearMSE.pth",
                3_714_759,
                "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
            ),
        ),
        "github.com/christophschuhmann/improved-aesthetic-predictor",
        "Apache-2.0",
        ("aesthetic",),
        "none",
    ),
}
"""Name -> where the weights come from."""


class MissingWeights(ValueError):
    """A file of weights is not there. The message is one line: which file, where it goes, how it is made."""


class Weights(NamedTuple):
    """The weights of one network.

    Attributes:
      name: key of :data:`FEATURE_WEIGHTS`.
      tensors: dotted name -> float32 array.
      sha256: of the safetensors file.
      source_sha256: of the file that it was converted from.
      pinned: whether that is a public file whose fingerprint stands in :data:`FEATURE_WEIGHTS`.
      licence: of the weights.
    """

    name: str
    tensors: dict[str, np.ndarray]
    sha256: str
    source_sha256: str
    pinned: bool
    licence: str

    @property
    def record(self) -> dict[str, Any]:
        """What a report says about them."""
        return {
            "weights": self.name,
            "weights_sha256": self.sha256,
            "weights_source_sha256": self.source_sha256,
            "weights_pinned": self.pinned,
            "weights_licence": self.licence,
        }


def load_weights(name: str, folder: str | os.PathLike | None = None, allow_unpinned: bool = False) -> Weights:
    """Reads ``<name>.safetensors`` after its bytes were checked against ``<name>.json``.

    Args:
      name: key of :data:`FEATURE_WEIGHTS`.
      folder: of the two files; None is the environment variable :data:`FOLDER_VARIABLE`.
      allow_unpinned: also take weights that were converted from another file than the public one.

    Raises:
      MissingWeights: the file is not there, or no folder is given.
      ValueError: an unknown name, a file whose bytes are not those of the conversion, weights from another source.
    """
    source = look_up("weights", name, FEATURE_WEIGHTS)
    if folder is None:
        folder = os.environ.get(FOLDER_VARIABLE) or None
    if folder is None:
        raise MissingWeights(_how_to(name, f"no folder of weights is given ({FOLDER_VARIABLE})", "FOLDER"))
    folder = pathlib.Path(folder).expanduser()
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise MissingWeights(_how_to(name, f"{path.name} is not in {folder}", str(folder)))
    again = f"convert again: python scripts/convert_weights.py {name} {source.files[0].name} --out {folder}"
    try:
        stated = read_object(folder, f"{name}.json")
    except ValueError as error:
        raise ValueError(f"{name}: {error}; it holds the fingerprint of {path.name}; {again}") from None
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if stated.get("sha256") != found:
        raise ValueError(
            f"{path.name}: its sha256 is {found} but {name}.json says {stated.get('sha256')}: damaged or changed; {again}"
        )
    made_from = _made_from(path, name, again)
    digest = str(made_from["source_sha256"])
    pins = {file.sha256: file.converted_sha256 for file in source.files if file.sha256 is not None}
    if digest not in pins and not allow_unpinned:
        raise ValueError(
            f"{path.name}: was converted from a file with sha256 {digest}, which is none of the known ones "
            f"({', '.join(sorted(pins))}); convert {source.files[0].name}, or name {name!r} in eval.weights.allow_unpinned"
        )
    wanted = pins.get(digest)
    if wanted is not None and wanted != found:
        raise ValueError(f"{path.name}: its sha256 is {found}, not {wanted} as every conversion gives; {again}")
    return Weights(name, _tensors(content, path.name, again), found, digest, digest in pins, source.licence)


def save_weights(
    folder: str | os.PathLike, name: str, tensors: Mapping[str, np.ndarray], source_file: str, source_sha256: str
) -> tuple[pathlib.Path, str]:
    """Writes ``<name>.safetensors`` and ``<name>.json``; the same input gives the same bytes.

    Args:
      folder: made if it is not there.
      name: key of :data:`FEATURE_WEIGHTS`.
      tensors: dotted name -> float32 or float16 array; the dtype is kept.
      source_file: name of the file that they were converted from.
      source_sha256: its fingerprint.

    Returns:
      The safetensors file and its SHA-256.

    Raises:
      ValueError: an unknown name, or a value that is not finite.
      FileExistsError: one of the files is there already with other content.
    """
    source = look_up("weights", name, FEATURE_WEIGHTS)
    broken = [tensor for tensor, values in tensors.items() if not np.all(np.isfinite(values))]
    if broken:
        raise ValueError("\n".join(f"{name}: {tensor} holds NaN or infinity; take another file" for tensor in broken))
    folder = pathlib.Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    path, sidecar = folder / f"{name}.safetensors", folder / f"{name}.json"
    facts = {"name": name, "source_file": source_file, "source_sha256": source_sha256, "licence": source.licence}
    partial = folder / f".{path.name}.{os.getpid()}"
    try:
        save_tensors(partial, dict(sorted(tensors.items())), {_KEY: json.dumps(facts, sort_keys=True)})
        digest = hashlib.sha256(partial.read_bytes()).hexdigest()
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise FileExistsError(f"{path} exists already with other content; move it away")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    stated = {"file": path.name, "sha256": digest, **facts}
    sidecar.write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path, digest


def _how_to(name: str, problem: str, folder: str) -> str:
    source = FEATURE_WEIGHTS[name]
    instead = "there is no substitute" if source.substitute == "none" else f"without it: {source.substitute}"
    return (
        f"{name}: {problem}; make {name}.safetensors with: python scripts/convert_weights.py {name} "
        f"{source.files[0].name} --out {folder} (the file: {source.home}, licence {source.licence}); {instead}"
    )


def _made_from(path: pathlib.Path, name: str, again: str) -> dict[str, Any]:
    """What the header says about the conversion."""
    _, metadata = read_header(path)
    try:
        facts = parse_json((metadata or {})[_KEY].encode())
        if facts["name"] != name:
            raise ValueError(f"it holds the weights of {facts['name']!r}")
        if not isinstance(facts["source_sha256"], str):
            raise TypeError("source_sha256 is not a text")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path.name}: is not a file of scripts/convert_weights.py for {name!r} ({error}); {again}"
        ) from None
    return facts


def _tensors(content: bytes, file: str, again: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(content)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); {again}") from None
    wrong = [tensor for tensor, values in tensors.items() if values.dtype not in DTYPES.values()]
    if wrong:
        raise ValueError(f"{file}: {', '.join(sorted(wrong)[:5])} are not of {', '.join(DTYPES)}; {again}")
    return {tensor: np.asarray(values, np.float32) for tensor, values in tensors.items()}
