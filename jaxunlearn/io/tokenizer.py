"""The byte-pair tokenizer of CLIP: texts to token ids, the same ids as transformers' ``CLIPTokenizer``.

A text is brought to Unicode form NFC, runs of white space become one space, letters become small ones. It is cut into
English contractions, runs of letters, single digits and runs of other signs. Each piece is spelled in bytes, the last of
which carries ``</w>``; then the merges apply in the order of their file (Sennrich et al. 2016, "Neural Machine
Translation of Rare Words with Subword Units"). Special tokens are found in the text before all that: with the padding
token ``!`` of Stable Diffusion 2, an exclamation mark in a prompt has its id.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxunlearn.io.tokenizer_files import NAMES, TokenizerFiles, read_tokenizer_files

_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """``prompts -> int32 [B, model_max_length]``: begin, the text's tokens, end, padding; longer texts are cut.

    Made by :func:`load_tokenizer`.

    Attributes:
      model_max_length: length of every row.
      bos_token_id, eos_token_id, pad_token_id: ids of begin, end and padding.
      vocab_size: all ids are below it.
    """

    def __init__(self, files: TokenizerFiles):
        """Builds the tokenizer from the content of its files.

        Raises:
          ValueError: one line for every added token that would get another id than the files say.
          ImportError: the package ``tokenizers`` is missing.
        """
        self._backend = _backend(files)
        self.model_max_length = files.length
        ids = (self._backend.token_to_id(files.named[name].content) for name in ("bos_token", "eos_token", "pad_token"))
        self.bos_token_id, self.eos_token_id, self.pad_token_id = ids
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids of the prompts.

        Raises:
          ValueError: the prompts are one text instead of a sequence, or some of them are no texts.
        """
        rows = [encoding.ids for encoding in self._encode(prompts)]
        return np.array(rows, np.int32).reshape(len(rows), self.model_max_length)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Whether a prompt is longer than ``model_max_length`` allows, so that the model does not see all of it.

        Raises:
          ValueError: as when called.
        """
        return [len(encoding.overflowing) > 0 for encoding in self._encode(prompts)]

    def _encode(self, prompts: Sequence[str]) -> list:
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a sequence of texts, got the text {prompts!r}; put it into a list")
        prompts = list(prompts)
        problems = [f"prompt {i} must be a text, got {p!r}" for i, p in enumerate(prompts) if not isinstance(p, str)]
        problems += [
            f"prompt {i} is not valid Unicode (half of a surrogate pair): {p!r}; repair or remove that character"
            for i, p in enumerate(prompts)
            if isinstance(p, str) and any("\ud800" <= c <= "\udfff" for c in p)
        ]
        if problems:
            raise ValueError("\n".join(problems))
        # One at a time: the batch form starts threads, which do not go together with processes that fork later.
        return [self._backend.encode(prompt) for prompt in prompts]


def load_tokenizer(folder: str | os.PathLike, model_max_length: int | None = None) -> ClipTokenizer:
    """Reads the folder ``tokenizer/`` of a Stable Diffusion model.

    The vocabulary is that of ``tokenizer.json`` or, without such a file, of ``vocab.json`` and ``merges.txt``. Special
    tokens and the length come from ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json``,
    where they exist, with the precedence of transformers. Stable Diffusion 1 pads with ``<|endoftext|>``, 2 with ``!``.

    Args:
      folder: with these files.
      model_max_length: length of the rows; None is what the files say.

    Raises:
      ValueError: missing files or such that cannot be understood, another kind of tokenizer, special tokens outside of the
        vocabulary; one line for each problem, beginning with the file or the key.
      ImportError: the package ``tokenizers`` is missing.
    """
    return ClipTokenizer(read_tokenizer_files(pathlib.Path(folder), model_max_length))


def _backend(files: TokenizerFiles) -> Any:
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    content = {name: token.content for name, token in files.named.items()}
    model = models.BPE(
        vocab=files.vocab,
        merges=files.merges,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        unk_token=content["unk_token"],
        fuse_unk=False,
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.encode_special_tokens = files.split_special_tokens
    stated = [token for _, token in sorted(files.added.items())]
    known = {token.content for token in stated}
    others = [files.named[name] for name in NAMES if name in files.named] + files.extra
    tokens = stated + [token for token in others if token.content not in known]
    backend.add_tokens([tokenizers.AddedToken(token.content, **token.flags) for token in tokens])
    problems = [
        f"added token {token.content!r}: the files give it the id {index}, the vocabulary "
        f"{backend.token_to_id(token.content)}; copy all files of one model"
        for index, token in sorted(files.added.items())
        if backend.token_to_id(token.content) != index
    ]
    if problems:
        raise ValueError("\n".join(problems))

    ids = {name: backend.token_to_id(text) for name, text in content.items()}
    ends = [(content[name], ids[name]) for name in ("eos_token", "bos_token")]
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    backend.enable_truncation(files.length, direction=files.truncation_side)
    backend.enable_padding(
        length=files.length,
        pad_id=ids["pad_token"],
        pad_token=content["pad_token"],
        direction=files.padding_side,
    )
    return backend
