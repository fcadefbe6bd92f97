"""What a pipeline folder is made of: ``model_index.json``, or the folders that are there."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxunlearn.io.components import COMPANIONS, UNETS

TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
UNTOUCHED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that have no part in training or sampling here; they are copied."""

_OURS = ("unet", "unet_ema", "scheduler")
_ALLOWED = (
    f"unet ({', '.join(UNETS)}), vae (AutoencoderKL), text_encoder (CLIPTextModel), tokenizer (CLIPTokenizer),"
    f" scheduler, {', '.join(UNTOUCHED)}"
)


@dataclasses.dataclass(frozen=True)
class PipelineIndex:
    """The components of a pipeline.

    Attributes:
      pipeline: class of the pipeline, None where nothing says it.
      unet: class of the UNet, None where nothing says it.
      scheduler: class of the scheduler, None where nothing says it.
      parts: folders of the other components, sorted.
    """

    pipeline: str | None = None
    unet: str | None = None
    scheduler: str | None = None
    parts: tuple[str, ...] = ()


def read_index(root: pathlib.Path, content: Mapping[str, Any] | None) -> PipelineIndex:
    """Reads the content of ``model_index.json``; without one, the folders below ``root`` say what there is.

    Raises:
      ValueError: one line for every component that is not supported or malformed.
    """
    if content is None:
        names = (*COMPANIONS, "tokenizer", *UNTOUCHED)
        return PipelineIndex(parts=tuple(sorted(name for name in names if (root / name).is_dir())))
    problems, classes = [], {}
    for name, value in content.items():
        entry = isinstance(value, list) and len(value) == 2
        if name.startswith("_") or not (entry or name in (*COMPANIONS, *_OURS, "tokenizer")) or value == [None, None]:
            continue
        if not entry or not isinstance(value[1], str) or pathlib.PurePath(name).name != name or name in (".", ".."):
            problems.append(f"{name[:80]!r}: must be a name with [library, class], not {str(value)[:80]}; correct it")
            continue
        classes[name] = value[1]
        if not _supported(name, *value):
            problems.append(f"{name}: {value[1]!r} is not supported; allowed: {_ALLOWED}; use a model of these alone")
    if "unet" not in content or content["unet"] == [None, None]:
        problems.append("unet: is not named; give the model_index.json of a pipeline that has a UNet")
    pipeline = content.get("_class_name")
    if pipeline is not None and not isinstance(pipeline, str):
        problems.append(f"_class_name: must be the name of a pipeline, not {str(pipeline)[:80]}; correct it")
    if problems:
        raise ValueError("\n".join(problems))
    parts = tuple(sorted(name for name in classes if name not in _OURS))
    return PipelineIndex(pipeline, classes.get("unet"), classes.get("scheduler"), parts)


def _supported(name: str, library: Any, class_name: str) -> bool:
    if name in ("unet", "unet_ema"):
        return class_name in UNETS
    if name in COMPANIONS:
        return class_name == COMPANIONS[name]
    if name == "tokenizer":
        return class_name in TOKENIZERS
    # A scheduler is judged by its own file. A component that the pipeline brought along changes nothing that is known
    # here; one of diffusers or transformers under another name does, as a second text encoder or a VQ-VAE.
    return name in ("scheduler", *UNTOUCHED) or library not in ("diffusers", "transformers")
