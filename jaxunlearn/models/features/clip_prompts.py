"""The text vectors of CLIP for two fixed prompts, computed once at the conversion, in numpy and float64.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", Section 2.4: a
causal transformer whose output at the end token is projected. The prompts of CLIP-IQA are short and fixed, so their
token ids stand here and no tokenizer is needed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

PROMPT_IDS = {
    "Good photo.": (49406, 886, 1125, 269, 49407),
    "Bad photo.": (49406, 2103, 1125, 269, 49407),
}
"""Prompt -> token ids of CLIP's byte-pair vocabulary: begin, "good", "photo", ".", end.

The vocabulary lists 256 bytes, the same bytes at the end of a word, then the merges in their order, then begin and end.
"." is byte 13 of the printable ones, hence 256 + 13 = 269 at the end of a word; "good", "bad" and "photo" at the end of a
word are the merges 374, 1591 and 613 (counted from 0) of ``bpe_simple_vocab_16e6.txt``, hence 512 more.
"""

HEAD_DIM = 64
"""Channels of an attention head, in all CLIP text towers."""

_LN_EPS = 1e-5


def prompt_vectors(state: Mapping[str, np.ndarray], head_dim: int = HEAD_DIM) -> np.ndarray:
    """Unit text vectors of the prompts of :data:`PROMPT_IDS`.

    Args:
      state: tensors of a published CLIP file; only those of the text tower are read.
      head_dim: channels of an attention head.

    Returns:
      float32 [2,dims], "Good photo." first.

    Raises:
      ValueError: tensors of the text tower that are missing or do not fit.
    """
    rows = [text_vector(state, ids, head_dim) for ids in PROMPT_IDS.values()]
    return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


def text_vector(state: Mapping[str, np.ndarray], ids: tuple[int, ...], head_dim: int = HEAD_DIM) -> np.ndarray:
    """Text vector float64 [dims] of one prompt, not of unit norm.

    Tokens behind the end token cannot change it, because no token sees those behind it: they are left out.

    Args:
      state: as for :func:`prompt_vectors`.
      ids: from the begin token to the end token.
      head_dim: channels of an attention head.

    Raises:
      ValueError: as :func:`prompt_vectors`.
    """
    try:
        return _run({name: np.asarray(value) for name, value in state.items()}, np.array(ids), head_dim)
    except KeyError as error:
        raise ValueError(f"missing: {error.args[0]} of the text tower; is it a whole CLIP file?") from None
    except (IndexError, ValueError) as error:
        raise ValueError(f"the text tower of the file does not fit ({error}); is it a CLIP file of OpenAI?") from None


def _run(state: Mapping[str, np.ndarray], ids: np.ndarray, head_dim: int) -> np.ndarray:
    def tensor(name):
        return state[name].astype(np.float64)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + _LN_EPS)
        return scaled * tensor(f"{name}.weight") + tensor(f"{name}.bias")

    def linear(x, weight, bias):
        return x @ tensor(weight).T + tensor(bias)

    # A slice first: the whole table of a real model in float64 would be large.
    x = state["token_embedding.weight"][ids].astype(np.float64) + tensor("positional_embedding")[: len(ids)]
    count, width = x.shape
    hidden = np.where(np.tri(count, dtype=bool), 0.0, -np.inf)
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")}
    for layer in range(len(layers)):
        block = f"transformer.resblocks.{layer}"
        parts = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias")
        q, k, v = parts.reshape(count, 3, width // head_dim, head_dim).transpose(1, 2, 0, 3)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(head_dim) + hidden
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        mixed = mixed.transpose(1, 0, 2).reshape(count, width)
        x = x + linear(mixed, f"{block}.attn.out_proj.weight", f"{block}.attn.out_proj.bias")
        y = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc.weight", f"{block}.mlp.c_fc.bias")
        y = y / (1 + np.exp(-1.702 * y))
        x = x + linear(y, f"{block}.mlp.c_proj.weight", f"{block}.mlp.c_proj.bias")
    return norm(x[-1], "ln_final") @ tensor("text_projection")
