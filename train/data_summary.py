"""What the data are, in a few lines, and what about them a run cannot use."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.forget import Split
from jaxunlearn.models.unet2d_config import UNet2DConfig


def split_problems(config: ConfigDict, split: Split, source: DiffusersModel | None) -> list[str]:
    """Problems that show only once the images are read: an empty forget set, shapes that the model cannot take."""
    problems = []
    if not len(split.forget):
        problems.append(
            "config.data.forget: names no image, so there is nothing to unlearn; give indices, files, folder, or planted"
        )
    if source is not None:
        problems += shape_problems(source.config, split, "the model's config")
    if source is None or config.retrain.enabled:
        problems += shape_problems(UNet2DConfig.from_dict(config.model.to_dict()), split, "config.model")
    return problems


def shape_problems(unet: UNet2DConfig, split: Split, where: str) -> list[str]:
    """How the images differ from what a UNet of this config takes."""
    height, width, channels = split.images.shape[1:]
    problems = []
    for name in ("in_channels", "out_channels"):
        if getattr(unet, name) != channels:
            problems.append(
                f"{where}.{name} = {getattr(unet, name)}: the images have {channels} channels; "
                "change it, or config.data.channels"
            )
    if height % unet.size_divisor or width % unet.size_divisor:
        problems.append(
            f"{where}: images of {height}x{width} do not fit; both must be multiples of {unet.size_divisor}; "
            "set config.data.size"
        )
    if unet.num_class_embeds is not None or unet.class_embed_type is not None:
        problems.append(
            f"{where}.num_class_embeds: the launcher trains unconditional models; "
            "use the library's functions for class-conditional ones"
        )
    return problems


def summary(split: Split) -> str:
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
    return "\n".join(lines)
