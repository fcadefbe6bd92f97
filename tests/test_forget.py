"""Dividing a data set: the forget set by every criterion, copies, near duplicates, held-out images, and the errors."""

import json
import pathlib
import types

import numpy as np
import pytest
from PIL import Image

from jaxunlearn.io.data_problems import DEFAULTS
from jaxunlearn.io.duplicates import content_groups, find_near_duplicates, pixel_digests
from jaxunlearn.io.forget import Split, data_problems, open_split

SHAPE = (6, 6, 1)


def random_images(count, seed=0, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture
def npz(tmp_path):
    """Writes images as an npz file and gives the data section that opens it."""

    def write(images, labels=None, **section):
        arrays = {"images": images} if labels is None else {"images": images, "labels": labels}
        np.savez(tmp_path / "set.npz", **arrays)
        return {"name": "npz", "path": str(tmp_path / "set.npz"), **section}

    return write


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(path)
    return str(path)


def check_invariants(split: Split) -> None:
    """What holds for every split."""
    everything = np.concatenate([split.keep, split.forget, split.held_out])
    np.testing.assert_array_equal(np.sort(everything), np.arange(len(split.images)), "disjoint and complete")
    for part in (split.keep, split.forget, split.held_out):
        assert part.dtype == np.int64
        np.testing.assert_array_equal(part, np.sort(part))
    unmatched = [i for i, name in enumerate(split.names) if name in split.unmatched]
    trained = np.setdiff1d(np.arange(len(split.images)), [*split.held_out, *unmatched])
    np.testing.assert_array_equal(split.train, trained)
    groups = content_groups(pixel_digests(split.images))
    parts = [set(groups[p].tolist()) for p in (split.keep, split.forget, split.held_out)]
    assert parts[0].isdisjoint(parts[1])
    assert parts[0].isdisjoint(parts[2])
    assert parts[1].isdisjoint(parts[2])
    assert len(split.names) == len(set(split.names)) == len(split.images)
    np.testing.assert_array_equal(split.digests, pixel_digests(split.images))
    assert split.labels is None or len(split.labels) == len(split.images)


def brute_force_near(images, candidates, targets, rms):
    """Candidate -> (nearest target, distance), from the definition in float64."""
    x = images.astype(np.float64) / 127.5 - 1
    found = {}
    for i in candidates:
        distance = [np.sqrt(np.mean((x[i] - x[j]) ** 2)) for j in targets]
        if min(distance) < rms:
            found[int(i)] = (int(targets[int(np.argmin(distance))]), min(distance))
    return found


# The default set


def test_digits_with_planted_picture():
    split = open_split({"plant": {"image": "sample:china", "copies": 18}, "forget": {"planted": True}}, seed=0)
    check_invariants(split)
    assert split.images.shape == (1815, 8, 8, 1)
    np.testing.assert_array_equal(split.forget, np.arange(1797, 1815))
    np.testing.assert_array_equal(split.planted, split.forget)
    assert split.names[1797] == "planted/0000"
    assert (split.labels[split.forget] == -1).all()
    assert len(split.held_out) == 180
    assert len(split.keep) == 1797 - 180
    assert (split.images[split.forget] == split.images[1797]).all()
    assert split.searched == 1797


def test_without_criterion_the_forget_set_is_empty():
    split = open_split({}, seed=0)
    check_invariants(split)
    assert split.forget.shape == (0,)
    assert split.forget.dtype == np.int64
    np.testing.assert_array_equal(split.train, split.keep)
    assert len(split.near_duplicates) == 0


def test_planted_copies_are_kept_unless_named():
    split = open_split({"plant": {"image": "sample:flower", "copies": 3}, "forget": {"indices": (0,)}}, seed=0)
    check_invariants(split)
    np.testing.assert_array_equal(split.forget, [0])
    assert set(split.planted.tolist()) <= set(split.keep.tolist())


def test_accepts_config_dicts():
    from ml_collections import ConfigDict

    section = ConfigDict({**DEFAULTS, "forget": {**DEFAULTS["forget"], "indices": (3, 4)}})
    np.testing.assert_array_equal(open_split(section, seed=0).forget, [3, 4])
    frozen = types.MappingProxyType({"forget": types.MappingProxyType({"indices": np.array([3, 4])})})
    np.testing.assert_array_equal(open_split(frozen, seed=0).forget, [3, 4])


# Held-out images


def test_held_out_is_a_fixed_choice_of_the_seed(npz):
    section = npz(random_images(200), held_out_fraction=0.25)
    a, b, c = (open_split(section, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(a.held_out, b.held_out)
    assert len(a.held_out) == len(c.held_out) == 50
    assert not np.array_equal(a.held_out, c.held_out)
    assert abs(np.mean(a.held_out) - 99.5) < 30, "spread over the set"
    assert open_split(section, seed=0).held_out[:6].tolist() == [2, 8, 9, 18, 31, 32]  # pinned: resumed runs rely on it


def test_held_out_does_not_depend_on_the_content(npz):
    a = open_split(npz(random_images(60, seed=1)), seed=0)
    b = open_split(npz(random_images(60, seed=2)), seed=0)
    np.testing.assert_array_equal(a.held_out, b.held_out)


def test_naming_a_forget_set_never_moves_a_trained_image_to_held_out(npz):
    images = random_images(100)
    before = open_split(npz(images, held_out_fraction=0.2), seed=3)
    forget = (*before.held_out[:5].tolist(), *before.keep[:30].tolist())
    after = open_split(npz(images, held_out_fraction=0.2, forget={"indices": forget}), seed=3)
    check_invariants(after)
    np.testing.assert_array_equal(after.held_out, before.held_out[5:])


def test_at_least_one_held_out_image(npz):
    images = random_images(10)
    only = open_split(npz(images, held_out_fraction=0.001), seed=0).held_out
    assert len(only) == 1
    split = open_split(npz(images, held_out_fraction=0.001, forget={"indices": only.tolist()}), seed=0)
    check_invariants(split)
    assert len(split.held_out) == 1
    assert len(open_split(npz(images, held_out_fraction=0), seed=0).held_out) == 0


def test_copies_are_never_held_out(npz):
    images = random_images(40)
    images[20:] = images[0]
    images[1] = images[2]
    split = open_split(npz(images, held_out_fraction=0.4), seed=0)
    check_invariants(split)
    assert len(split.held_out) == 16
    assert set(split.held_out.tolist()).isdisjoint({0, 1, 2, *range(20, 40)})


def test_planted_picture_that_is_in_the_data(npz, tmp_path):
    images = random_images(20)
    picture = save(tmp_path / "p.png", images[7])
    section = npz(images, plant={"image": picture, "copies": 4}, forget={"planted": True})
    split = open_split(section, seed=0)
    check_invariants(split)
    np.testing.assert_array_equal(split.forget, [7, 20, 21, 22, 23])
    np.testing.assert_array_equal(split.exact_copies, [7])
    assert split.files[20].path == picture
    assert split.files[0] is None


# Criteria


def test_exact_copies_of_named_images_are_forgotten(npz):
    images = random_images(30)
    images[[4, 9, 25]] = images[1]
    split = open_split(npz(images, np.arange(30) % 3, forget={"indices": (1, 2)}), seed=0)
    check_invariants(split)
    np.testing.assert_array_equal(split.forget, [1, 2, 4, 9, 25])
    np.testing.assert_array_equal(split.exact_copies, [4, 9, 25])
    np.testing.assert_array_equal(split.labels, np.arange(30) % 3)


def test_indices_are_positions_in_the_whole_source(npz):
    images = random_images(30)
    split = open_split(npz(images, limit=10, forget={"indices": (3, 27)}), seed=0)
    assert len(split.images) == 10
    np.testing.assert_array_equal(split.images[split.forget], images[[3, 27]])
    with pytest.raises(ValueError, match=r"indices: \[4\] of 1 are left out by data.limit=10.*fix: data.limit=None"):
        open_split(npz(images, limit=10, forget={"indices": (3, 4)}), seed=0)
    with pytest.raises(ValueError, match=r"indices: \[30, 31\] of 2 are outside the data; allowed: 0 to 29"):
        open_split(npz(images, forget={"indices": (30, 0, 31)}), seed=0)
    with pytest.raises(ValueError, match="data.forget.indices: -1, 2.5; allowed: whole numbers"):
        open_split(npz(images, forget={"indices": (-1, 0, 2.5)}), seed=0)


@pytest.fixture
def tree(tmp_path):
    images = random_images(8)
    names = ["cat/one.png", "cat/two.png", "dog/one.png", "dog/three.png", "dog/#odd.png", "dog/five.png"]
    for name, image in zip(names, images):
        save(tmp_path / "tree" / name, image)
    return tmp_path / "tree"


def test_list_of_files(tree, tmp_path):
    lines = [
        "# a request",
        "",
        "cat/one.png",
        "  three.png  ",
        "./dog/#odd.png",
        f"{tree}/dog/five.png",
        "cat\\two.png",
    ]
    (tmp_path / "list.txt").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    section = {
        "name": "folder",
        "path": str(tree),
        "held_out_fraction": 0,
        "forget": {"files": str(tmp_path / "list.txt")},
    }
    split = open_split(section, seed=0)
    check_invariants(split)
    forgotten = {split.names[i] for i in split.forget}
    assert forgotten == {"cat/one.png", "cat/two.png", "dog/three.png", "dog/#odd.png", "dog/five.png"}
    assert [split.names[i] for i in split.keep] == ["dog/one.png"]


def test_all_unknown_names_are_listed(tree, tmp_path):
    (tmp_path / "list.txt").write_text("cat/two.png\ncat/tow.png\none.png\nzebra\n")
    section = {"name": "folder", "path": str(tree), "forget": {"files": str(tmp_path / "list.txt")}}
    with pytest.raises(ValueError) as error:
        open_split(section, seed=0)
    head, *lines = str(error.value).split("\n")
    assert head.startswith("data.forget.files: 3 of 4 names in")
    assert lines == [
        "  'cat/tow.png': no such image; did you mean 'cat/two.png'?",
        "  'one.png': 2 images have this name, for example 'cat/one.png'",
        "  'zebra': no such image",
    ]
    (tmp_path / "list.txt").write_text("# nothing\n\n")
    with pytest.raises(ValueError, match="names no image; allowed: one name per line"):
        open_split(section, seed=0)
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        open_split(section, seed=0)


def test_folder_of_pictures_is_found_by_pixels(npz, tmp_path):
    images = random_images(12)
    images[11] = images[5]
    other = random_images(1, seed=9)[0]
    save(tmp_path / "request" / "a.png", images[5])
    save(tmp_path / "request" / "deep" / "b.bmp", images[2])
    file = save(tmp_path / "request" / "c.png", other)
    section = npz(images, np.zeros(12, int), forget={"folder": str(tmp_path / "request")})
    split = open_split(section, seed=0)
    check_invariants(split)
    np.testing.assert_array_equal(split.forget, [2, 5, 11, 12])
    assert split.unmatched == ("unmatched/c.png",)
    assert split.names[12] == "unmatched/c.png"
    assert split.files[12].path == file
    assert split.labels[12] == -1
    np.testing.assert_array_equal(split.images[12], other)
    assert len(split.exact_copies) == 0, "both copies were found by their pixels"


def test_folder_follows_the_size_and_channels_of_the_data(tree, tmp_path):
    big = random_images(1, seed=4, shape=(20, 30, 3))[0]
    save(tree / "cat" / "big.png", big)
    save(tmp_path / "request" / "x.png", big)
    section = {
        "name": "folder",
        "path": str(tree),
        "size": 6,
        "channels": 1,
        "forget": {"folder": str(tmp_path / "request")},
    }
    split = open_split(section, seed=0)
    assert [split.names[i] for i in split.forget] == ["cat/big.png"]
    assert split.unmatched == ()


def test_folder_of_another_size_is_refused(npz, tmp_path):
    save(tmp_path / "request" / "x.png", random_images(1, shape=(9, 9, 1))[0])
    section = npz(random_images(5), forget={"folder": str(tmp_path / "request")})
    with pytest.raises(
        ValueError, match=r"1 pictures do not have the data's size \(6, 6\), for example 'x.png' \(9, 9\)"
    ):
        open_split(section, seed=0)


def test_criteria_are_united(npz, tmp_path):
    images = random_images(20)
    save(tmp_path / "request" / "a.png", images[3])
    (tmp_path / "list.txt").write_text("00004\n")
    forget = {
        "planted": True,
        "indices": (5,),
        "files": str(tmp_path / "list.txt"),
        "folder": str(tmp_path / "request"),
    }
    split = open_split(npz(images, plant={"image": "sample:china", "copies": 2}, forget=forget), seed=0)
    check_invariants(split)
    np.testing.assert_array_equal(split.forget, [3, 4, 5, 20, 21])


def test_nothing_left(npz):
    images = random_images(4)
    with pytest.raises(ValueError, match="nothing is left to keep of 4 images"):
        open_split(npz(images, held_out_fraction=0, forget={"indices": range(4)}), seed=0)
    with pytest.raises(ValueError, match="every one of the 4 images has an exact copy or is to be forgotten"):
        open_split(npz(np.repeat(images[:2], 2, axis=0)), seed=0)


# Near duplicates


@pytest.mark.parametrize("shape", [(6, 6, 1), (16, 12, 3), (64, 64, 3)])
@pytest.mark.parametrize("chunk", [None, (3, 2)])
def test_search_equals_the_definition(monkeypatch, shape, chunk):
    if chunk is not None:
        monkeypatch.setattr("jaxunlearn.io.duplicates._CHUNK_ROWS", chunk)
    rng = np.random.default_rng(0)
    images = random_images(40, shape=shape)
    for i in range(20, 40):  # neighbours of the first four at distances around the threshold
        noise = np.round(rng.normal(0, rng.uniform(1.0, 5.0), shape))
        images[i] = np.clip(images[i % 4] + noise, 0, 255)
    candidates, targets = np.arange(10, 40), np.arange(0, 10)
    near = find_near_duplicates(images, candidates, targets, 0.02)
    expected = brute_force_near(images, candidates, targets, 0.02)
    assert 0 < len(expected) < 20
    np.testing.assert_array_equal(near.index, sorted(expected))
    np.testing.assert_array_equal(near.nearest, [expected[i][0] for i in sorted(expected)])
    np.testing.assert_allclose(near.rms, [expected[i][1] for i in sorted(expected)], rtol=1e-12)


def test_search_does_not_lose_small_differences_in_large_images():
    """One grey level in 500 x 500 x 3 pixels: |x|^2 + |y|^2 - 2xy in plain float32 would be off by far more."""
    images = np.full((4, 500, 500, 3), 200, np.uint8)
    images[1] += 1
    images[2, :, :, 0] += 5
    near = find_near_duplicates(images, np.array([1, 2]), np.array([0]), 0.02)
    np.testing.assert_array_equal(near.index, [1])
    np.testing.assert_allclose(near.rms, [1 / 127.5], rtol=1e-12)
    both = find_near_duplicates(images, np.array([1, 2]), np.array([0]), 0.0227)
    np.testing.assert_allclose(both.rms, [1 / 127.5, 5 / 3**0.5 / 127.5], rtol=1e-12)


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_threshold_is_sharp(levels):
    images = random_images(2) // 2
    images[1] = images[0] + levels
    for factor, found in [(1 + 1e-9, 1), (1 - 1e-9, 0)]:
        near = find_near_duplicates(images, np.array([1]), np.array([0]), levels / 127.5 * factor)
        assert len(near) == found


def near_set():
    """Image 1 is close to 0, image 2 close to 1 but not to 0; the rest is far away."""
    images = random_images(40) // 2
    images[1] = images[0] + 2
    images[2] = images[0] + 4
    return images


def test_near_duplicates_are_reported(npz):
    split = open_split(npz(near_set(), forget={"indices": (0,)}), seed=0)
    check_invariants(split)
    np.testing.assert_array_equal(split.forget, [0])
    np.testing.assert_array_equal(split.near_duplicates.index, [1])
    np.testing.assert_array_equal(split.near_duplicates.nearest, [0])
    np.testing.assert_allclose(split.near_duplicates.rms, [2 / 127.5])
    assert split.searched == 39


def test_near_duplicates_are_moved_until_none_is_left(npz):
    split = open_split(npz(near_set(), forget={"indices": (0,)}, near_duplicates="forget"), seed=0)
    check_invariants(split)
    np.testing.assert_array_equal(split.forget, [0, 1, 2])
    np.testing.assert_array_equal(split.near_duplicates.index, [1, 2])
    np.testing.assert_array_equal(split.near_duplicates.nearest, [0, 1])


def test_near_duplicates_are_refused(npz):
    with pytest.raises(ValueError) as error:
        open_split(npz(near_set(), forget={"indices": (0,)}, near_duplicates="error"), seed=0)
    text = str(error.value)
    assert "1 images outside the forget set are within rms 0.02" in text
    assert "fix: data.near_duplicates='forget'" in text
    assert "'set/00001' is 0.0157 from 'set/00000'" in text
    open_split(npz(near_set(), forget={"indices": (30,)}, near_duplicates="error"), seed=0)


def test_near_duplicates_of_held_out_images_and_of_copies(npz):
    images = near_set()
    seed = next(s for s in range(100) if 1 in open_split(npz(images, held_out_fraction=0.3), seed=s).held_out)
    split = open_split(npz(images, held_out_fraction=0.3, forget={"indices": (0,)}), seed=seed)
    assert 1 in split.held_out
    np.testing.assert_array_equal(split.near_duplicates.index, [1])
    moved = open_split(
        npz(images, held_out_fraction=0.3, forget={"indices": (0,)}, near_duplicates="forget"), seed=seed
    )
    check_invariants(moved)
    assert 1 in moved.forget
    images[5] = images[1]
    copies = open_split(npz(images, forget={"indices": (0,)}, near_duplicates="forget"), seed=0)
    check_invariants(copies)
    np.testing.assert_array_equal(copies.forget, [0, 1, 2, 5])


def test_search_can_be_switched_off(npz):
    split = open_split(npz(near_set(), forget={"indices": (0,)}, near_duplicate_rms=0), seed=0)
    assert len(split.near_duplicates) == 0
    assert split.searched == 0


# Problems found before anything is loaded

BAD_SECTIONS = [
    ({"nmae": "digits"}, "data.nmae: unknown key; allowed: name, path,", "did you mean 'name'?"),
    ({"forget": {"index": (1,)}}, "data.forget.index: unknown key", "did you mean 'indices'?"),
    ({"forget": (1, 2)}, "data.forget: (1, 2) is a value; allowed: a group", "planted"),
    ({"name": "digit"}, "data.name: unknown dataset 'digit'; did you mean 'digits'?", "known: digits, folder"),
    ({"name": ["digits"]}, "data.name: unknown dataset ['digits']", "known: digits"),
    (
        {"path": "x"},
        "data.path: 'x' is given, but 'digits' takes only size, channels, limit",
        "fix: set data.path=None",
    ),
    ({"name": "folder"}, "data.path: None; allowed: where the 'folder' data is", "--config.data.path="),
    ({"name": "folder", "path": "/no/such"}, "data.path: '/no/such' does not exist", "fix: check the path"),
    ({"name": "idx", "path": 3}, "data.path: 3; allowed: a path", "fix"),
    (
        {"captions": "x.jsonl"},
        "data.captions: 'x.jsonl' is given, but 'digits' takes only",
        "fix: set data.captions=None",
    ),
    ({"caption": 3}, "data.caption: 3; allowed: a text or None", "fix"),
    ({"plant": {"caption": ("a",)}}, "data.plant.caption: ('a',); allowed: a text or None", "fix"),
    ({"size": 0}, "data.size: 0; allowed: a whole number, 1 to 4096, or None", "fix"),
    ({"size": 8.0}, "data.size: 8.0; allowed: a whole number", "fix"),
    ({"limit": -5}, "data.limit: -5; allowed: a whole number, 1 or more", "fix"),
    ({"channels": 4}, "data.channels: 4; allowed: 1 (grey), 3 (RGB)", "fix"),
    ({"channels": True}, "data.channels: True; allowed: 1 (grey)", "fix"),
    ({"held_out_fraction": 1.0}, "data.held_out_fraction: 1.0; allowed: 0 or more, below 1", "fix: 0.1"),
    ({"held_out_fraction": float("nan")}, "data.held_out_fraction: nan; allowed", "fix: 0.1"),
    ({"near_duplicate_rms": -0.1}, "data.near_duplicate_rms: -0.1; allowed: 0 (no search) to 2", "fix: 0.02"),
    ({"near_duplicates": "drop"}, "data.near_duplicates: 'drop'; allowed: report, forget, error", "fix"),
    ({"plant": {"copies": 2}}, "data.plant.image: None with copies=2; allowed: a picture file", "data.plant.copies=0"),
    ({"plant": {"copies": -1}}, "data.plant.copies: -1; allowed: a whole number, 0 or more", "fix"),
    ({"plant": {"image": "sample:dog", "copies": 1}}, "data.plant.image: 'sample:dog'; allowed: sample:china", "fix"),
    ({"plant": {"image": "/no.png", "copies": 1}}, "data.plant.image: '/no.png' is not a file", "fix: check the path"),
    ({"plant": {"image": 5, "copies": 1}}, "data.plant.image: 5; allowed: a path", "fix"),
    ({"forget": {"planted": True}}, "data.forget.planted: True, but nothing is planted", "set data.plant.copies"),
    ({"forget": {"planted": 1}}, "data.forget.planted: 1; allowed: True or False", "fix"),
    ({"forget": {"indices": "0,1"}}, "data.forget.indices: '0,1'; allowed: a sequence", "fix"),
    ({"forget": {"indices": 5}}, "data.forget.indices: 5; allowed: a sequence", "fix"),
    ({"forget": {"indices": (-1, True)}}, "data.forget.indices: -1, True; allowed: whole numbers", "fix"),
    ({"forget": {"files": "/no.txt"}}, "data.forget.files: '/no.txt' is not a file", "fix: check the path"),
    ({"forget": {"files": ("a.png",)}}, "data.forget.files: ('a.png',); allowed: the path of a text file", "fix"),
    ({"forget": {"folder": "/no/such"}}, "data.forget.folder: '/no/such' does not exist", "fix: check the path"),
]


@pytest.mark.parametrize(("section", "start", "part"), BAD_SECTIONS, ids=[s for _, s, _ in BAD_SECTIONS])
def test_problems_say_key_value_allowed_and_fix(section, start, part):
    problems = data_problems(section)
    assert len(problems) == 1
    assert problems[0].startswith(start)
    assert part in problems[0]
    with pytest.raises(ValueError) as error:
        open_split(section, seed=0)
    assert str(error.value) == problems[0]


def test_all_problems_at_once_and_none_for_good_sections(tmp_path):
    bad = {"size": 0, "channels": 2, "near_duplicates": "no", "forget": {"planted": True, "folder": "/no"}}
    assert len(data_problems(bad)) == 5
    assert data_problems({}) == []
    assert data_problems(DEFAULTS) == []
    assert data_problems({"name": "folder", "path": tmp_path}) == []
    with pytest.raises(ValueError, match="seed: -1; allowed: a whole number"):
        open_split({}, seed=-1)


def test_captions_of_the_set_of_planted_copies_and_of_unmatched_pictures(tree, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"file_name": "cat/one.png", "text": "the first"}) + "\n")
    stranger = save(tmp_path / "strangers" / "s.png", random_images(1, seed=99)[0])
    section = {
        "name": "folder",
        "path": str(tree),
        "captions": str(texts),
        "plant": {"image": "sample:china", "copies": 2, "caption": "a palace"},
        "forget": {"folder": str(pathlib.Path(stranger).parent)},
    }
    bare = open_split(section, seed=0)
    assert bare.captions == ("the first", *[""] * 5, "a palace", "a palace", "")
    filled = open_split({**section, "caption": "a picture"}, seed=0)
    assert filled.captions == ("the first", *["a picture"] * 5, "a palace", "a palace", "a picture")
    again = {**section, "plant": {"image": "sample:china", "copies": 2}, "caption": "a picture"}
    assert open_split(again, seed=0).captions[-3:] == ("a picture",) * 3
    assert len(bare.unmatched) == 1


def test_without_any_text_there_are_no_captions(npz):
    assert open_split({}, seed=0).captions is None
    assert open_split({"plant": {"caption": "nothing is planted"}}, seed=0).captions is None
    section = npz(random_images(4), caption="a square", limit=2)
    assert open_split(section, seed=0).captions == ("a square", "a square")


def test_reserved_names(tmp_path):
    np.savez(tmp_path / "x.npz", images=random_images(3), names=np.array(["planted/0000", "b", "c"]))
    section = {"name": "npz", "path": str(tmp_path / "x.npz"), "plant": {"image": "sample:china", "copies": 1}}
    with pytest.raises(ValueError, match="begin with 'planted/' or 'unmatched/' are reserved"):
        open_split(section, seed=0)
