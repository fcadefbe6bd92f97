"""The tokenizer: ids of transformers' CLIPTokenizer, forms of its files, and every way in which they can be wrong."""

import json

import numpy as np
import pytest

from jaxunlearn.io.tokenizer import load_tokenizer
from scripts import make_golden_latent_models as golden
from tests.tiny_clip import BOS, EOS, PROMPTS, merges, vocabulary, write_tokenizer

IDS = vocabulary()
FIRST, LAST = IDS[BOS], IDS[EOS]


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer", length=12)


def rewrite(folder, name, **changes):
    """Changes keys of a JSON file; None removes one."""
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    values = {key: value for key, value in (values | changes).items() if value is not None}
    path.write_text(json.dumps(values))


def as_one_file(folder):
    """The form of newer versions: tokenizer.json in the place of vocab.json and merges.txt."""
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=IDS[content], content=content, **special) for content in (BOS, EOS)]
    model = dict(type="BPE", vocab=IDS, merges=[list(pair) for pair in merges()])
    (folder / "tokenizer.json").write_text(json.dumps(dict(added_tokens=added, model=model)))
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("name", golden.PADS)
def test_golden(tmp_path, name):
    file = np.load(golden.GOLDEN / "clip_tokenizer.npz")
    assert json.loads(str(file["prompts"])) == PROMPTS
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, golden.PADS[name], golden.LENGTH))
    ids = tokenizer(PROMPTS)
    assert ids.dtype == np.int32
    for prompt, row, expected in zip(PROMPTS, ids, file[name]):
        assert row.tolist() == expected.tolist(), prompt
    whole = load_tokenizer(tmp_path, model_max_length=1000)(PROMPTS)
    beyond = whole[:, golden.LENGTH :] != tokenizer.pad_token_id
    assert tokenizer.truncated(PROMPTS) == beyond.any(1).tolist()


def test_rows_by_hand(folder):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (FIRST, LAST, LAST)
    assert tokenizer.model_max_length == 12
    assert tokenizer.vocab_size == len(IDS)
    words = [IDS[token] for token in ("the</w>", "cat</w>", "t</w>", "'</w>", "x</w>")]
    rows = tokenizer(["The  CAT t'x", "", "cat " * 10])
    np.testing.assert_array_equal(rows[0], [FIRST, *words, *[LAST] * 6])
    np.testing.assert_array_equal(rows[1], [FIRST, *[LAST] * 11])
    np.testing.assert_array_equal(rows[2], [FIRST, *[IDS["cat</w>"]] * 10, LAST])
    assert tokenizer.truncated(["cat " * 10, "cat " * 11]) == [False, True]
    assert tokenizer([]).shape == (0, 12)
    assert tokenizer.truncated([]) == []


def test_the_mark_of_stable_diffusion_2_pads_and_is_its_own_token(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, pad="!", length=6))
    assert tokenizer.pad_token_id == 0
    np.testing.assert_array_equal(tokenizer(["cat!"]), [[FIRST, IDS["cat</w>"], 0, LAST, 0, 0]])


def test_one_file_in_the_place_of_two(folder):
    expected = load_tokenizer(folder)(PROMPTS)
    np.testing.assert_array_equal(load_tokenizer(as_one_file(folder))(PROMPTS), expected)


def test_defaults_and_stated_length(folder):
    expected = load_tokenizer(folder)(PROMPTS)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="model_max_length: None is not supported"):
        load_tokenizer(folder)
    np.testing.assert_array_equal(load_tokenizer(folder, model_max_length=12)(PROMPTS[:3]), expected[:3])


def test_sides_learned_words_and_tokens_that_stay_text(folder):
    rewrite(folder, "added_tokens.json", **{"cat": len(IDS)})
    rewrite(folder, "tokenizer_config.json", padding_side="left", truncation_side="left", model_max_length=5)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == len(IDS) + 1
    the, sat = IDS["the</w>"], IDS["sat</w>"]
    np.testing.assert_array_equal(tokenizer(["cat", "the the the cat sat"])[0], [LAST, LAST, FIRST, len(IDS), LAST])
    np.testing.assert_array_equal(tokenizer(["the the the cat sat"])[0], [FIRST, the, len(IDS), sat, LAST])
    (folder / "added_tokens.json").unlink()
    plain = load_tokenizer(folder, 40)([f"the {EOS}"])
    rewrite(folder, "tokenizer_config.json", split_special_tokens=True)
    assert (load_tokenizer(folder, 40)([f"the {EOS}"]) != LAST).sum() >= (plain != LAST).sum()


def test_prompts_that_are_no_texts(folder):
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ValueError, match="must be a sequence of texts, got the text 'cat'"):
        tokenizer("cat")
    with pytest.raises(ValueError) as error:
        tokenizer.truncated(["cat", None, 3, "\ud83d"])
    assert [line[:8] for line in str(error.value).splitlines()] == ["prompt 1", "prompt 2", "prompt 3"]


def test_missing_files(folder):
    with pytest.raises(ValueError, match="is not a folder"):
        load_tokenizer(folder / "nothing")
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"^merges.txt: not found; a tokenizer needs vocab.json and merges.txt, or"):
        load_tokenizer(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(ValueError, match=r"^vocab.json and merges.txt: not found"):
        load_tokenizer(folder)


TEXTS = {
    "vocab.json": [
        "",
        "[1]",
        "{",
        '{"a": "b"}',
        '{"a": -1}',
        '{"a": true}',
        '{"a": 99999999999}',
        '{"a": 1, "a": 2}',
        "{}",
    ],
    "merges.txt": ["a b c", "ab", "t h\nzz yy", "\udcff", "#version: 0.2\nq q"],
    "tokenizer_config.json": [
        "null",
        '{"tokenizer_class": "T5Tokenizer", "model_max_length": 9}',
        '{"model_max_length": 2}',
        '{"model_max_length": 9.5}',
        '{"model_max_length": 1000000000000000019884624838656}',
        '{"model_max_length": 9, "padding_side": "up"}',
        '{"model_max_length": 9, "split_special_tokens": 3}',
        '{"model_max_length": 9, "added_tokens_decoder": [1]}',
        '{"model_max_length": 9, "added_tokens_decoder": {"x": "cat"}}',
        '{"model_max_length": 9, "added_tokens_decoder": {"4": "cat"}}',
        '{"model_max_length": 9, "added_tokens_decoder": {"4": 3}}',
        '{"model_max_length": 9, "extra_special_tokens": 7}',
    ],
    "special_tokens_map.json": [
        '{"eos_token": null}',
        '{"eos_token": "zz"}',
        '{"eos_token": 3}',
        '{"pad_token": null}',
        '{"pad_token": ""}',
        '{"bos_token": {"content": null}}',
        '{"bos_token": {"content": "<|startoftext|>", "lstrip": 1}}',
    ],
    "added_tokens.json": ['{"cat": "x"}', '{"cat": 3}', '{"": 570}'],
    "tokenizer.json": [
        "{}",
        '{"model": {"type": "Unigram"}}',
        '{"model": {"vocab": {}, "merges": {}}}',
        '{"model": {"vocab": {"a": 1}, "merges": [[1, 2]]}}',
        '{"model": {"vocab": {"a": 1}, "merges": [["a", "a"]]}}',
        '{"added_tokens": [3], "model": {"vocab": {"a": 1}, "merges": []}}',
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in TEXTS.items() for text in texts])
def test_files_that_cannot_be_understood(folder, name, text):
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        load_tokenizer(folder)
    for line in str(error.value).splitlines():
        assert ":" in line
        assert len(line) < 400


def test_all_problems_at_once(folder):
    rewrite(folder, "tokenizer_config.json", tokenizer_class="T5Tokenizer", model_max_length=1, padding_side="up")
    rewrite(folder, "special_tokens_map.json", eos_token="zz")
    with pytest.raises(ValueError) as error:
        load_tokenizer(folder)
    assert len(str(error.value).splitlines()) == 4
