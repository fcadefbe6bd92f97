"""What the files of a folder ``tokenizer/`` say, with the precedence that transformers gives them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxunlearn.io.json_files import read_bytes, read_object

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULTS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MOST_IDS = 2**24
_LONGEST = 100_000  # files without a limit state 1e30


class Token(NamedTuple):
    """A token that is found in a text before everything else.

    Attributes:
      content: its text.
      flags: those of ``tokenizers.AddedToken`` that the files state.
    """

    content: str
    flags: Mapping[str, bool]


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The content of the files.

    Attributes:
      vocab: token -> id.
      merges: pairs of tokens, the first applies first.
      named: name (``bos_token``, ...) -> token; begin, end, unknown and padding are there.
      added: id -> token, for tokens whose id is stated.
      extra: further special tokens.
      length: ids per prompt.
      padding_side, truncation_side: "left" or "right".
      split_special_tokens: whether special tokens inside a text are ordinary text.
    """

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    named: dict[str, Token]
    added: dict[int, Token]
    extra: list[Token]
    length: int
    padding_side: str
    truncation_side: str
    split_special_tokens: bool


def read_tokenizer_files(folder: pathlib.Path, length: int | None) -> TokenizerFiles:
    """Reads and checks them; see :func:`jaxunlearn.io.tokenizer.load_tokenizer`.

    Raises:
      ValueError: one line for every problem.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder; give the folder tokenizer/ of a Stable Diffusion model")
    vocab, merges, written = _vocabulary(folder)
    config = _optional(folder, "tokenizer_config.json")
    named, added, extra = _special_tokens(folder, config, written)
    problems = _vocabulary_problems(vocab, merges)

    def check(good: bool, key: str, value: Any, allowed: str, remedy: str = "change the value"):
        if not good:
            problems.append(f"tokenizer_config.json: {key}: {value!r} is not supported; allowed: {allowed}; {remedy}")

    kind = config.get("tokenizer_class") or "CLIPTokenizer"
    remedy = "other tokenizers are not implemented"
    check(kind in ("CLIPTokenizer", "CLIPTokenizerFast"), "tokenizer_class", kind, "CLIPTokenizer", remedy)
    length = config.get("model_max_length", config.get("max_len")) if length is None else length
    good = isinstance(length, int) and not isinstance(length, bool) and 3 <= length <= _LONGEST
    check(good, "model_max_length", length, f"3 to {_LONGEST}", "write it into the file (77 for Stable Diffusion)")
    sides = {}
    for key in ("padding_side", "truncation_side"):
        sides[key] = config.get(key, "right")
        check(sides[key] in ("left", "right"), key, sides[key], "left, right")
    split = config.get("split_special_tokens", False)
    check(isinstance(split, bool), "split_special_tokens", split, "true, false")
    for name in _DEFAULTS:
        if name not in named:
            check(False, name, None, "a token", "remove the line or name a token")
        elif name != "pad_token" and named[name].content not in vocab:
            problems.append(f"{name}: {named[name].content!r} is not in the vocabulary; copy all files of one model")
    if problems:
        raise ValueError("\n".join(problems))
    return TokenizerFiles(vocab, merges, named, added, extra, length, split_special_tokens=split, **sides)


def _vocabulary(folder: pathlib.Path) -> tuple[dict[str, int], list[tuple[str, str]], list[Any]]:
    """Vocabulary, merges, and the added tokens that tokenizer.json holds."""
    if (folder / "tokenizer.json").is_file():
        values = read_object(folder, "tokenizer.json")
        model, added = values.get("model"), values.get("added_tokens") or []
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise ValueError(
                "tokenizer.json: model must be a byte-pair model (type BPE); copy the file of a CLIP model"
            )
        vocab, merges = model.get("vocab"), model.get("merges")
        if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
            raise ValueError("tokenizer.json: must have model.vocab, model.merges and added_tokens; copy it again")
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in merges]
        return vocab, [tuple(merge) if isinstance(merge, list) else merge for merge in merges], added
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)}: not found; a tokenizer needs vocab.json and merges.txt, or tokenizer.json; copy the "
            "folder of the original model"
        )
    try:
        text = read_bytes(folder / "merges.txt").decode()
    except ValueError as error:
        raise ValueError(f"merges.txt: is not a text ({error}); copy it again") from None
    lines = [line.rstrip("\r") for line in text.split("\n")]
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return read_object(folder, "vocab.json"), pairs, []


def _vocabulary_problems(vocab: dict, merges: list) -> list[str]:
    problems = []
    bad = [(t, i) for t, i in vocab.items() if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < _MOST_IDS]
    if bad:
        problems.append(f"vocab.json: {bad[0][0]!r} has id {bad[0][1]!r}; ids must be integers in 0..{_MOST_IDS - 1}")
    for merge in merges:
        if not isinstance(merge, tuple) or len(merge) != 2 or not all(isinstance(part, str) for part in merge):
            problems.append(f"merges.txt: a merge must be two tokens, got {merge!r}; copy the file again")
            break
        unknown = [token for token in (*merge, "".join(merge)) if token not in vocab]
        if unknown:
            problems.append(
                f"merges.txt: {unknown[0]!r} of the merge {merge!r} is not in the vocabulary; copy all files of one model"
            )
            break
    return problems


def _special_tokens(
    folder: pathlib.Path, config: Mapping[str, Any], written: list[Any]
) -> tuple[dict[str, Token], dict[int, Token], list[Token]]:
    """Named, added and extra tokens.

    ``added_tokens_decoder`` of the config, which newer versions write, settles all. Otherwise special_tokens_map.json
    wins over the config, then come added_tokens.json and the tokens inside tokenizer.json.
    """
    values = {name: config[name] for name in NAMES if name in config}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    decoder = config.get("added_tokens_decoder")
    special: Mapping[str, Any] = {} if decoder is not None else _optional(folder, "special_tokens_map.json")
    values |= {name: special[name] for name in NAMES if name in special}
    extra = special.get("extra_special_tokens") or special.get("additional_special_tokens") or extra
    values = _DEFAULTS | values
    named = {name: _token(name, values[name]) for name in NAMES if values.get(name) is not None}
    further = [_token("extra_special_tokens", value) for value in _values(extra)]

    added: dict[int, Token] = {}
    if decoder is not None:
        if not isinstance(decoder, dict):
            raise ValueError("tokenizer_config.json: added_tokens_decoder must be an object; copy the file again")
        added = {_index(index): _token(f"added token {index}", value, {}) for index, value in decoder.items()}
    else:
        contents = {token.content for token in (*named.values(), *further)}
        for content, index in _optional(folder, "added_tokens.json").items():
            known = content in contents
            added[_index(index)] = Token(content, {"special": known, "normalized": not known})
        for entry in written:
            if not isinstance(entry, dict) or "id" not in entry:
                raise ValueError(
                    f"tokenizer.json: added_tokens must be objects with id and content, got {entry!r}; copy it again"
                )
            added[_index(entry["id"])] = _token(f"added token {entry['id']}", entry, {})
    by_content = {token.content: token for token in added.values()}
    return {name: by_content.get(token.content, token) for name, token in named.items()}, added, further


def _values(extra: Any) -> list[Any]:
    if isinstance(extra, dict):
        return list(extra.values())
    if not isinstance(extra, list):
        raise ValueError(f"extra_special_tokens: must be a list, got {extra!r}; remove the line")
    return extra


def _token(name: str, value: Any, more: Mapping[str, bool] | None = None) -> Token:
    """A text, or an object with ``content`` and flags; special unless ``more`` says otherwise."""
    more = {"special": True} if more is None else more
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        allowed = "a text that is not empty, or an object with such a content"
        raise ValueError(f"{name}: {value!r} is not supported; allowed: {allowed}; correct it")
    if isinstance(value, str):
        return Token(content, more)
    flags = {flag: value[flag] for flag in _FLAGS if flag in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(
            f"{name}: {value!r} is not supported; allowed: true or false for {', '.join(_FLAGS)}; correct it"
        )
    return Token(content, {**flags, **more})


def _index(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MOST_IDS:
        raise ValueError(
            f"added token: its id must be an integer in 0..{_MOST_IDS - 1}, got {value!r}; copy the file again"
        )
    return value


def _optional(folder: pathlib.Path, name: str) -> dict[str, Any]:
    return read_object(folder, name) if (folder / name).is_file() else {}
