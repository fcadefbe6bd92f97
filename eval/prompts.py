"""What a text model is asked for: the prompts of the samples, and the text that belongs to each image.

Copies are looked for in samples of the forget prompts: ``unlearn.prompt`` of the run, if there is one, and the different
captions of the forget images, in turn. Quality is measured on samples of captions of keep images, drawn as often as the
keep images have them. ``eval.prompts`` replaces both. Where both sets hold the same texts, one set of samples serves both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn.io.forget import Split

REMEDY = "fix: --eval.prompts='a text', or data.captions, data.caption or unlearn.prompt of the run"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The text of every sample.

    Attributes:
      forget: N texts, of the samples in which copies are counted.
      keep: N texts, of the samples whose quality is measured; None where the samples of ``forget`` serve for it too.
      forget_source, keep_source: where the texts come from, in words.
      forget_available: number of different forget prompts; more than samples leave some out.
    """

    forget: tuple[str, ...]
    keep: tuple[str, ...] | None
    forget_source: str
    keep_source: str
    forget_available: int

    @property
    def texts(self) -> tuple[str, ...]:
        """The different texts of both sets."""
        return tuple(dict.fromkeys(self.forget + (self.keep or ())))


def choose_prompts(
    config: Mapping[str, Any], settings: Mapping[str, Any], split: Split
) -> tuple[Prompts | None, list[str]]:
    """The prompts of the samples, a pure function of the run's configuration, settings and data.

    Returns:
      The prompts, and one line per problem (then the prompts are None).
    """
    count = settings["num_samples"]
    if settings["prompts"]:
        given = settings["prompts"]
        return Prompts(_in_turn(given, count), None, "eval.prompts", "eval.prompts", len(given)), []
    common = prompt_of_run(config)
    forget, keep = _captions(split, split.forget), _captions(split, split.keep)
    own = [] if common is None else [common]
    forget_prompts = tuple(dict.fromkeys(own + forget))
    without = [name for name, texts in (("forget", own + forget), ("keep", own + keep)) if not texts]
    if without:
        return None, [
            f"eval.prompts: None, but the model takes text, the {' and '.join(without)} images have no caption and the run "
            f"has no prompt; {REMEDY}"
        ]
    sources = ["unlearn.prompt"] * len(own) + ["captions of the forget images"] * bool(forget)
    forget_source = " and ".join(sources)
    keep_source = "captions of the keep images, as often as they have them" if keep else "unlearn.prompt"
    keep = keep or own
    drawn = None
    if set(keep) != set(forget_prompts):
        order = np.random.default_rng([settings["seed"], 3]).permutation(len(keep))
        drawn = _in_turn([keep[i] for i in order], count)
    return Prompts(_in_turn(forget_prompts, count), drawn, forget_source, keep_source, len(forget_prompts)), []


def prompt_of_run(config: Mapping[str, Any]) -> str | None:
    """``unlearn.prompt``, or None where the run has none."""
    return (config.get("unlearn") or {}).get("prompt")


def image_texts(config: Mapping[str, Any], split: Split, rows: Sequence[int]) -> tuple[str, ...]:
    """The text that conditions each image: its caption, else ``unlearn.prompt``, else the empty text."""
    common = prompt_of_run(config) or ""
    return tuple((split.captions[i] if split.captions is not None else "") or common for i in rows)


def _captions(split: Split, rows: Sequence[int]) -> list[str]:
    return [] if split.captions is None else [split.captions[i] for i in rows if split.captions[i]]


def _in_turn(texts: Sequence[str], count: int) -> tuple[str, ...]:
    """``count`` texts, all of them in turn."""
    return tuple(texts[i % len(texts)] for i in range(count))


class Conditions:
    """What a model is conditioned on, as rows of a table: text embeddings, or nothing.

    Attributes:
      table: float32 [U, tokens, width] of U different texts, or None for a model without conditions.
    """

    def __init__(self, texts: Sequence[str] = (), table: np.ndarray | None = None):
        """Args:
        texts: the different texts.
        table: their embeddings.
        """
        self.table = table
        self._row = {text: row for row, text in enumerate(texts)}

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [n]: the row of each text; zeros, which mean nothing, for a model without conditions."""
        if self.table is None:
            return np.zeros(len(texts), np.int32)
        return np.array([self._row[text] for text in texts], np.int32)

    def at(self, rows: np.ndarray) -> np.ndarray | None:
        """The condition of some rows, float32 [n, tokens, width], or None."""
        return None if self.table is None else self.table[rows]


def text_block(
    prompts: Prompts, settings: Mapping[str, Any], key: bytes, truncated: int, encoder_sha256: str
) -> dict[str, Any]:
    """The ``text`` block of the report. Prompts may be personal data: only keyed hashes, unless pictures are shown too.

    Args:
      prompts: the prompts.
      settings: the evaluation's settings.
      key: the key of the work directory.
      truncated: number of texts that the tokenizer cuts.
      encoder_sha256: of the text encoder's parameters.
    """
    forget = tuple(dict.fromkeys(prompts.forget))
    block = {
        "guidance": settings["guidance"],
        "unconditional_text": "",
        "text_encoder_sha256": encoder_sha256,
        "truncated_texts": truncated,
        "forget_prompts": {
            "source": prompts.forget_source,
            "n": len(forget),
            "available": prompts.forget_available,
            "hmac": [hmac_text(key, text) for text in forget],
            "texts": list(forget) if settings["include_images"] else None,
        },
        "keep_prompts": None,
    }
    if prompts.keep is not None:
        block["keep_prompts"] = {"source": prompts.keep_source, "n": len(set(prompts.keep))}
    return block


def hmac_text(key: bytes, text: str) -> str:
    """Hex HMAC-SHA256 of ``"text"``, NUL, the text in UTF-8."""
    return hmac.new(key, b"text\0" + text.encode(), hashlib.sha256).hexdigest()


def without_texts(section: Mapping[str, Any], keys: Sequence[str], key: bytes) -> dict[str, Any]:
    """A section of the configuration in which the texts of some keys are replaced by their keyed hashes."""

    def hidden(value: Any) -> Any:
        if isinstance(value, str):
            return f"hmac-sha256 {hmac_text(key, value)}"
        return [hidden(text) for text in value]

    return {name: hidden(v) if name in keys and v else v for name, v in section.items()}
