"""A tiny CLIP tokenizer folder, built like the real one: 256 bytes, 256 bytes at the end of a word, merges, two specials."""

from __future__ import annotations

import json
import pathlib

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORDS = "the cat sat photo of a house t-shirt running don't we're it's hello world caf\u00e9 na\u00efve 12 2024 ... !!"

PROMPTS = [
    "",
    " ",
    "the cat sat",
    "THE Cat  SAT\t on\n\n",
    "a photo of a T-shirt!",
    "hello!!",
    "!",
    "!!! wow ! !x",
    "don't we're it's 'S 'tis I'll he'd I've I'm",
    "caf\u00e9 cafe\u0301 na\u00efve e\u0301\u0327 \u00c5 A\u030a",
    "\u65e5\u672c\u8a9e emoji \U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea ok",
    "2024 12,345.67 \u00bd \u00b2 \u0663 \u2167",
    "... ?! __under_score__ # $5 100% '' ' (a)[b]{c} <d>",
    EOS,
    f"a {BOS} b",
    f"{EOS.upper()}x",
    f"x{EOS}y {EOS} z",
    "<| endoftext |> </w> the</w> cat",
    "\u0130stanbul i\u0307 \u03a3\u0391\u03a3 \u00df \u1e9e \ufb01 ligature",
    "\u00a0nb sp\u2003em\u200bzw a\u2028b \ufeffbom",
    "\x00\x01ctl\r\n\ttab",
    "a" * 500,
    "cat " * 200,
    "the cat sat " * 24 + "the",
]
"""Texts that a tokenizer can get wrong."""


def byte_letters() -> dict[int, str]:
    """Byte -> the letter that stands for it, in the order of CLIP's vocabulary: printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def merges() -> list[tuple[str, str]]:
    """A few dozen merges that build the words of :data:`WORDS` from left to right."""
    letters = byte_letters()
    found: dict[tuple[str, str], None] = {}
    for word in WORDS.replace("-", " ").replace("'", " '").split():
        parts = [letters[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            found[(parts[0], parts[1])] = None
            parts = [parts[0] + parts[1], *parts[2:]]
    return list(found)


def vocabulary() -> dict[str, int]:
    """Token -> id; "!" is 0, the two special tokens are the last."""
    letters = byte_letters().values()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges())]
    return {token: index for index, token in enumerate([*dict.fromkeys(tokens), BOS, EOS])}


def write_tokenizer(folder: pathlib.Path, pad: str = EOS, length: int = 77) -> pathlib.Path:
    """Writes the four files as Stable Diffusion 1 has them (2 with ``pad="!"``) and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)

    def special(content, normalized=True):
        return dict(content=content, lstrip=False, normalized=normalized, rstrip=False, single_word=False)

    config = {
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken", **special(BOS)},
        "eos_token": {"__type": "AddedToken", **special(EOS)},
        "unk_token": {"__type": "AddedToken", **special(EOS)},
        "pad_token": pad,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": length,
        "name_or_path": "openai/clip-vit-large-patch14",
        "tokenizer_class": "CLIPTokenizer",
    }
    tokens = {"bos_token": special(BOS), "eos_token": special(EOS), "unk_token": special(EOS), "pad_token": pad}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges()), ""]
    (folder / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens), encoding="utf-8")
    return folder
