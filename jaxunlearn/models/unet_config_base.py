"""What the configurations of all UNets share: their levels, derived sizes, and the checks of common fields."""

from __future__ import annotations

from typing import NamedTuple

from jaxunlearn.models.config_base import Checks, ModelConfig, is_int, is_ints, is_number

_EMA_KEYS = frozenset(
    ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
)


class Level(NamedTuple):
    """One level of a UNet.

    Attributes:
      features: output channels.
      layers: number of residual blocks.
      attention: after each of them None, "self" (over the pixels) or "cross" (a transformer that also sees the condition).
      heads: of a transformer.
      depth: blocks of a transformer.
    """

    features: int
    layers: int
    attention: str | None = None
    heads: int = 1
    depth: int = 1


class UNetConfig(ModelConfig):
    """Base of :class:`UNet2DConfig` and :class:`UNet2DConditionConfig`; keys of diffusers' EMA folders are ignored."""

    ignored = _EMA_KEYS

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def has_classes(self) -> bool:
        """Whether the model takes ``class_labels``."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def size_divisor(self) -> int:
        """H and W must be multiples of it: ``2 ** (levels - 1)``."""
        return 2 ** (len(self.block_out_channels) - 1)


class UNetChecks(Checks):
    """The checks of the fields that all UNets have."""

    def common(self) -> None:
        """The fields that all UNets have, except for the lists per level."""
        c, check = self.config, self.check
        self.image_size()
        for key in ("in_channels", "out_channels", "norm_num_groups"):
            check(is_int(getattr(c, key)), key, "an integer >= 1")
        check(c.num_class_embeds is None or is_int(c.num_class_embeds), "num_class_embeds", "None or an integer >= 1")
        good = c.time_embedding_dim is None or is_int(c.time_embedding_dim, 0)
        check(good, "time_embedding_dim", "None or an integer")
        for key in ("center_input_sample", "flip_sin_to_cos"):
            check(isinstance(getattr(c, key), bool), key, "true, false")
        self.one_of("time_embedding_type", ("positional",), "fourier and learned time embeddings are not implemented")
        self.one_of("resnet_time_scale_shift", ("default", "scale_shift"))
        self.one_of("class_embed_type", (None, "timestep", "identity"))
        self.one_of("downsample_padding", (0, 1))
        self.activation()
        check(is_number(c.dropout) and 0 <= c.dropout < 1, "dropout", "a number in [0, 1)")
        check(is_number(c.norm_eps) and c.norm_eps > 0, "norm_eps", "a number > 0")
        good = is_number(c.mid_block_scale_factor) and c.mid_block_scale_factor != 0
        check(good, "mid_block_scale_factor", "not 0")
        self.channels()
        if is_ints(c.block_out_channels):
            half = c.block_out_channels[0] // 2
            good = is_number(c.freq_shift) and half > 0 and c.freq_shift != half
            check(good, "freq_shift", f"a number other than {half}")
