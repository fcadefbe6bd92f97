"""The configuration of a transformers ``CLIPTextModel``: its fields, their defaults, and every value that is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxunlearn.models.config_base import Checks, ModelConfig, is_int, is_number

ACTIVATIONS = ("quick_gelu", "gelu")
_WORDS = """
    architectures dropout dtype initializer_factor initializer_range logit_scale_init_value model_type projection_dim
    text_config torch_dtype transformers_version vision_config

    add_cross_attention attn_implementation bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torchscript typical_p use_bfloat16 use_cache
"""
_WITHOUT_EFFECT = frozenset(_WORDS.split())
"""Keys that no computation here depends on: of CLIP, and those that transformers 4 wrote for every kind of model."""


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(ModelConfig):
    """What a ``CLIPTextModel`` is made of. Immutable and hashable; files of transformers 4 and 5 are understood.

    Attributes:
      vocab_size: token ids are below it.
      hidden_size: width of the embeddings, D.
      intermediate_size: width inside the feed-forward parts.
      num_hidden_layers: number of transformer layers.
      num_attention_heads: divides ``hidden_size``.
      max_position_embeddings: most tokens of one prompt.
      hidden_act: "quick_gelu" (``x sigmoid(1.702 x)``) or "gelu" (the exact one).
      layer_norm_eps: of every layer normalisation.
      attention_dropout: kept for the round trip, without effect: the text encoder is not trained here.
      pad_token_id, bos_token_id, eos_token_id: kept for the round trip, without effect; the tokenizer's files decide.

    Raises:
      ValueError: one line for every field that is not implemented or not consistent.
    """

    class_name = "CLIPTextModel"
    ignored = _WITHOUT_EFFECT

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int | tuple[int, ...] | None = 49407

    @classmethod
    def _corrected(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The file of a whole CLIP model has the text encoder's fields in ``text_config``."""
        nested = values.get("text_config")
        return dict(nested) if isinstance(nested, Mapping) else values

    @classmethod
    def _of_another_class(cls, values: Mapping[str, Any]) -> list[str]:
        remedy = (
            "text encoders with a projection (SDXL) or of another kind are not implemented; use Stable Diffusion 1 or 2"
        )
        allowed = ("CLIPTextModel", "CLIPModel") if values.get("model_type") == "clip" else ("CLIPTextModel",)
        names = values.get("architectures") or []
        lines = [
            f"architectures: {name!r} is not supported; allowed: {', '.join(allowed)}; {remedy}"
            for name in (names if isinstance(names, list | tuple) else [names])
            if name not in allowed
        ]
        if values.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
            kind = values["model_type"]
            lines.append(f"model_type: {kind!r} is not supported; allowed: clip_text_model, clip; {remedy}")
        nested = values.get("text_config")
        if values.get("model_type") == "clip" and not isinstance(nested, Mapping):
            lines.append(f"text_config: {nested!r} is not supported; allowed: a mapping; a file of a CLIP model has it")
        return lines

    def _problems(self) -> list[str]:
        checks = Checks(self)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for key in (*sizes, "max_position_embeddings"):
            checks.check(is_int(getattr(self, key)), key, "an integer >= 1")
        checks.one_of("hidden_act", ACTIVATIONS)
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            ids = getattr(self, key)
            good = ids is None or all(is_int(i, 0) for i in (ids if isinstance(ids, tuple) else (ids,)))
            checks.check(good, key, "None or an integer >= 0")
        good = is_number(self.attention_dropout) and 0 <= self.attention_dropout < 1
        checks.check(good, "attention_dropout", "a number in [0, 1)")
        good = is_number(self.layer_norm_eps) and 0 < self.layer_norm_eps < 1
        checks.check(good, "layer_norm_eps", "a number in (0, 1)")
        if is_int(self.hidden_size) and is_int(self.num_attention_heads):
            good = self.hidden_size % self.num_attention_heads == 0
            checks.check(good, "num_attention_heads", f"a divisor of hidden_size {self.hidden_size}")
        return checks.lines
