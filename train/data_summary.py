"""What the data are, in a few lines, and what about them a run or its model cannot use."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.forget import Split
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.models.unet2d_config import UNet2DConfig
from jaxunlearn.schedule import Schedule
from train.examples import cache_folder
from train.problems import Problems
from train.validate_eval import check_steps
from train.validate_unlearn import check_unlearn
from train.validate_watch import split_watch_problems

MODEL = "the model's config"


MIXTURES = ("siss", "bernoulli", "retrack", "surrogate", "dpo")
"""Methods that mix keep and forget images in a row, which must therefore have one condition."""


def split_problems(config: ConfigDict, split: Split, source: DiffusersModel | None) -> list[str]:
    """Problems that show only once images and model are read: an empty forget set, shapes and texts that do not fit."""
    problems = []
    if not len(split.forget):
        problems.append(
            "config.data.forget: names no image, so there is nothing to unlearn; give indices, files, folder, or planted"
        )
    if source is not None:
        problems += latent_problems(source, split) if source.is_latent else shape_problems(source.config, split, MODEL)
        problems += class_problems(source.config, MODEL)
    problems += text_problems(config, split, source) + neighbour_problems(config, split, source)
    problems += split_watch_problems(config, split, source)
    if source is not None:
        problems += schedule_problems(config, source.schedule)
    else:
        unet = UNet2DConfig.from_dict(config.model.to_dict())
        problems += shape_problems(unet, split, "config.model") + class_problems(unet, "config.model")
    return problems


def schedule_problems(config: ConfigDict, schedule: Schedule) -> list[str]:
    """What does not go with the noise schedule of the user's model, whatever ``config.scheduler`` says."""
    found = Problems(config)
    check_unlearn(found, schedule)
    check_steps(found, schedule)
    return found.lines


def shape_problems(unet: Any, split: Split, where: str) -> list[str]:
    """How the images differ from what a UNet of this config takes."""
    height, width, channels = split.images.shape[1:]
    problems = []
    for name in ("in_channels", "out_channels"):
        if getattr(unet, name) != channels:
            problems.append(
                f"{where}.{name} = {getattr(unet, name)}: the images have {channels} channels; "
                "change it, or config.data.channels"
            )
    return problems + _size_problems(height, width, unet.size_divisor, where)


def latent_problems(source: DiffusersModel, split: Split) -> list[str]:
    """How the images differ from what the autoencoder takes and, encoded, the UNet."""
    height, width, channels = split.images.shape[1:]
    vae, problems = source.vae.config, []
    if vae.in_channels != channels:
        problems.append(
            f"the autoencoder's in_channels = {vae.in_channels}: the images have {channels} channels; "
            f"set config.data.channels={vae.in_channels}"
        )
    return problems + _size_problems(height, width, vae.size_divisor * source.config.size_divisor, "the model")


def _size_problems(height: int, width: int, divisor: int, where: str) -> list[str]:
    if height % divisor == 0 and width % divisor == 0:
        return []
    return [
        f"{where}: images of {height}x{width} do not fit; both must be multiples of {divisor}; set config.data.size"
    ]


def class_problems(unet: Any, where: str) -> list[str]:
    """One line for a class-conditional UNet."""
    if not unet.has_classes:
        return []
    return [
        f"{where}.num_class_embeds: the launcher does not train class-conditional models; "
        "use the library's functions for them"
    ]


def text_problems(config: ConfigDict, split: Split, source: DiffusersModel | None) -> list[str]:
    """What stands between a model of text and the texts of the images."""
    prompt, method = config.unlearn.prompt, config.unlearn.method
    if source is None or not source.takes_text:
        if prompt is None:
            return []
        return [f"config.unlearn.prompt = {prompt!r}: the model takes no text; set it to None"]
    absent = [f"{name}/" for name in ("text_encoder", "tokenizer") if getattr(source, name) is None]
    if absent:
        return [
            f"config.base.path: the model takes text, but its folder has no {' and no '.join(absent)}; "
            "give the whole pipeline"
        ]
    captions = _trained_captions(split)
    problems = []
    if not any(captions):
        missing = (
            "the model takes text, and no image has a caption; give metadata.jsonl beside the pictures (file_name and "
            "text), config.data.captions or config.data.caption"
        )
        if prompt is None:
            problems.append(f"config.unlearn.prompt = None: {missing}, or a prompt")
        if config.retrain.enabled:
            problems.append(f"config.retrain.enabled = True: {missing}")
    elif prompt is None and method in MIXTURES and len(set(captions)) > 1:
        shown = ", ".join(map(repr, list(dict.fromkeys(captions))[:2]))
        problems.append(
            f"config.unlearn.method = {method!r}: mixes a keep and a forget image under one text, but the captions differ "
            f"({shown}, {len(set(captions))} in all); give config.unlearn.prompt, one text for all of them, or choose a "
            "method that takes each image's own caption: siss_no_is, erasediff"
        )
    return problems


def neighbour_problems(config: ConfigDict, split: Split, source: DiffusersModel | None) -> list[str]:
    """What stands between forget images and the nearest neighbours that the method asks for: too few, or copies."""
    chosen, problems = config.unlearn.neighbours, []
    if config.unlearn.method != "retrack":
        return []
    if chosen.k > len(split.keep):
        problems.append(
            f"config.unlearn.neighbours.k = {chosen.k}: there are only {len(split.keep)} keep images; lower it"
        )
    near = split.near_duplicates
    # Those of a latent model are compared as latents, when they are encoded.
    copies = 0
    if source is None or not source.is_latent:
        copies = int(np.sum(np.isin(near.index, split.keep) & (near.rms <= chosen.copy_rms)))
    if copies and chosen.copy_rms > 0:
        problems.append(
            f"config.unlearn.neighbours.copy_rms = {chosen.copy_rms}: {copies} keep images are that close to forget images, "
            "which would be answered as themselves; set --config.data.near_duplicates=forget to unlearn them too"
        )
    return problems


def _trained_captions(split: Split) -> list[str]:
    """The texts of the keep and forget images, "" where there is none."""
    if split.captions is None:
        return []
    return [split.captions[i] for i in (*split.keep, *split.forget)]


def model_lines(config: ConfigDict, workdir: Workdir, split: Split, source: DiffusersModel | None) -> list[str]:
    """What the model makes of the data: its latents, its texts, where they are kept."""
    lines = [] if source is None else [f"model: {note}" for note in source.notes]
    if source is not None and source.is_latent:
        height, width, channels = source.vae.config.latent_shape(split.images.shape[1:])
        drawn = "drawn anew each time" if config.latents.sample else "their means"
        lines.append(f"latents: {height}x{width}x{channels}, {drawn}, kept in {cache_folder(config, workdir)}")
    captions = _trained_captions(split)
    if source is None or not source.takes_text:
        if any(captions):
            lines.append("captions: the model takes no text, so they are not used")
        return lines
    different, without = len(set(captions) - {""}), sum(not text for text in captions)
    if captions:
        lines.append(f"captions: {different} different" + (f"; {without} images have none" if without else ""))
    if config.unlearn.prompt is not None:
        lines.append(f"unlearning under one prompt: {config.unlearn.prompt!r}")
    texts = sorted({*captions, config.unlearn.prompt or ""})
    cut = [text for text, is_cut in zip(texts, source.tokenizer.truncated(texts)) if is_cut]
    if cut:
        lines.append(
            f"warning: {len(cut)} of {len(texts)} texts have more than {source.tokenizer.model_max_length} tokens and are "
            f"cut, for example {cut[0]!r}"
        )
    return lines


def summary(split: Split) -> list[str]:
    """n, k, what was found by content: the lines that a user checks first."""
    n, k = len(split.train), len(split.forget)
    lines = [
        f"data: {split.source}, {split.images.shape[1]}x{split.images.shape[2]}x{split.images.shape[3]}",
        f"training set n = {n}, forget k = {k} ({100 * k / n:.2f} %), keep n - k = {len(split.keep)}, "
        f"held out {len(split.held_out)}",
    ]
    if len(split.exact_copies):
        lines.append(f"{len(split.exact_copies)} exact copies of forget images were found and moved to the forget set")
    if split.unmatched:
        lines.append(f"{len(split.unmatched)} forget images are not in the data: {', '.join(split.unmatched[:5])}")
    if len(split.near_duplicates.index):
        lines.append(
            f"warning: {len(split.near_duplicates.index)} near-duplicates of forget images among the rest "
            f"(policy: {split.near_duplicate_policy}); see near_duplicates in forget_manifest.json"
        )
    return lines
