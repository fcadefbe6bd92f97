"""The families of membership and of further copy detectors, on models that are known in closed form."""

from __future__ import annotations

import re
import types

import jax
import numpy as np
import pytest

from eval import membership_scores
from eval.context import Column, Context
from eval.families import extraction, membership
from eval.prompts import Conditions
from eval.records import find
from eval.references import Encoded
from eval.settings import DEFAULTS, resolve
from eval.spaces import Pixels
from jaxunlearn import schedule as schedules
from jaxunlearn.closed_form import weighted_set
from jaxunlearn.images import to_uint8
from jaxunlearn.metrics import METRICS
from jaxunlearn.metrics.denoising_loss import denoising_loss, make_loss_rows
from jaxunlearn.sampling import SamplerConfig
from tests.fast_memory import make_predict

SCHEDULE = schedules.linear(1000)
SCORES = ("loss_t", "secmi", "pia", "pian", "sima", "clid", "quantile", "ulira")


predict = make_predict(SCHEDULE)


class ClosedForm:
    """What the families use of a runner."""

    takes_text, space, conditions, schedule = False, Pixels(), Conditions(), SCHEDULE
    protocol = {"sampler": "ddim", "steps": 5}

    def __init__(self, settings):
        self.predict = predict
        self._settings, self._rows = settings, jax.jit(make_loss_rows(predict, SCHEDULE))

    def loss(self, params, x0, rows, tick):
        return denoising_loss(self._rows, params, x0, jax.random.key(0), self._settings["loss_t"], 2)


SETTINGS = {**DEFAULTS, "loss_t": (50, 400), "membership": {"scores": SCORES, "noise_norm_images": 4}}
RUNNER = ClosedForm(SETTINGS)


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    images = load_digits().images[np.random.default_rng(0).permutation(1797)]
    return (images / 8.0 - 1.0).astype(np.float32)[..., None]


def measured(forget, keep, held_out, members, runner, settings=SETTINGS):
    """The column of a model that was trained on ``members``."""
    sets = {"forget": forget, "keep": keep, "held_out": held_out}
    inputs = {name: Encoded(x, np.zeros(len(x), np.int32)) for name, x in sets.items() if len(x)}
    refs = types.SimpleNamespace(loss_inputs=inputs)
    column = Column([])
    for name, part in inputs.items():
        column.arrays[f"loss_{name}"] = runner.loss(weighted_set(members), part.x, part.rows, None)
    membership.measure(column, _context(weighted_set(members), runner, refs, settings=settings))
    return column


def _context(params, runner, refs, **more):
    base = dict(name="before", params=params, model=None, runner=runner, refs=refs, prompts=None, split=None)
    base |= dict(settings=SETTINGS, tick=lambda stage, share: None, key=jax.random.key(0))
    return Context(**{**base, **more})


@pytest.fixture(scope="module")
def columns(digits):
    """Trained on forget and keep images, and on keep images only."""
    forget, keep, held_out = np.split(digits[:600], [30, 300])
    return [measured(forget, keep, held_out, part, RUNNER) for part in (digits[:300], digits[30:300])]


def test_members_are_told_apart_and_others_are_not(columns):
    before, retrained = (column.entries for column in columns)
    for score in ("secmi", "pia", "pian", "sima"):
        item = find(before, f"mia/{score}")
        assert item["protocol"]["statistic"] == "auc"
        assert item["value"] > 0.95, score
        assert item["n"] == 30
        assert item["protocol"]["held_out_images"] == 200
        assert abs(find(retrained, f"mia/{score}")["value"] - 0.5) < 0.2, score
    assert find(before, "mia/loss_t", t=50)["value"] > 0.99
    assert find(before, "cdi_p")["value"] < 0.01
    assert find(retrained, "cdi_p")["value"] > 0.05
    assert find(retrained, "mia/sima")["ci"]["low"] < 0.5 < find(retrained, "mia/sima")["ci"]["high"]


def test_p_values_are_corrected_together(columns):
    found = [item["protocol"] for item in columns[0].entries if item["metric"].startswith("mia/") and item["value"]]
    assert len(found) == 6  # two t of the loss and four scores
    assert {one["tests_in_family"] for one in found} == {6}
    assert min(one["p_holm"] for one in found) == pytest.approx(6 * min(one["p"] for one in found), rel=1e-6)


def test_what_cannot_run_says_why(columns):
    entries = columns[0].entries
    for metric, reason in (
        ("mia/clid", "takes no text"),
        ("mia/quantile", "100 held-out images .* needs 300"),
        ("ulira", "64 models"),
        ("noise_norm", "takes no text"),
    ):
        item = find(entries, metric)
        assert item["status"] == "not_run"
        assert item["value"] is None
        assert re.search(reason, item["reason"])
    assert {item["metric"] for item in entries} >= {item["metric"] for item in membership.failed_entries(SETTINGS)}


def test_all_models_share_the_t_that_the_first_one_chose(columns):
    first, second = (find(column.entries, "mia/sima")["protocol"]["t"] for column in columns)
    assert first == second
    assert 0 <= first <= 300


def test_few_forget_images_are_ranked(digits):
    forget, keep, held_out = np.split(digits[:200], [2, 100])
    settings = {**SETTINGS, "membership": {"scores": ("loss_t",), "noise_norm_images": 0}}
    column = measured(forget, keep, held_out, digits[:100], RUNNER, settings)
    item = find(column.entries, "mia/loss_t", t=50)
    assert item["protocol"]["statistic"] == "rank_p"
    assert item["unit"] == "rank among held-out images"
    assert len(item["protocol"]["ranks"]) == 2
    assert item["value"] == pytest.approx(np.mean(item["protocol"]["ranks"]))
    assert item["ci"] is None
    assert "2 forget and 66 held-out" in find(column.entries, "cdi_p")["reason"]


def test_too_few_held_out_images(digits):
    column = measured(digits[:3], digits[3:50], digits[50:60], digits[:50], RUNNER)
    for item in column.entries:
        if item["metric"] != "noise_norm":
            assert "10 images were held out" in item["reason"]


class ClosedFormOfText(ClosedForm):
    """Its condition [2, 1] says how much the answer is shifted."""

    takes_text = True
    conditions = Conditions(("", "a digit", "the digit"), np.array([0.0, 0.5, 2.0], np.float32)[:, None, None])

    def __init__(self, settings):
        self._settings = settings
        self.predict = lambda params, x, t, cond: predict(params, x, t) + cond[:, :, :, None]
        self._rows = jax.jit(make_loss_rows(self.predict, SCHEDULE))

    def loss(self, params, x0, rows, tick):
        cond, t = self.conditions.at(rows), self._settings["loss_t"]
        return denoising_loss(self._rows, params, x0, jax.random.key(0), t, 2, cond=cond)


def test_models_of_text_have_clid_and_the_norm_of_the_guidance(digits):
    settings = {
        **SETTINGS, "sampling_steps": 3, "membership": {"scores": ("clid",), "noise_norm_images": 2}
    }  # fmt: skip
    runner, sets = ClosedFormOfText(settings), (("forget", 2), ("keep", 1), ("held_out", 1))
    inputs = {name: Encoded(digits[:40], np.full(40, row, np.int32)) for name, row in sets}
    column = Column([])
    for name, part in inputs.items():
        column.arrays[f"loss_{name}"] = runner.loss(weighted_set(digits[:100]), part.x, part.rows, None)
    context = _context(
        weighted_set(digits[:100]),
        runner,
        types.SimpleNamespace(loss_inputs=inputs, keep=np.zeros((1, 8, 8, 1), np.uint8)),
        settings=settings,
        prompts=types.SimpleNamespace(forget=("a digit", "the digit", "a digit")),
        model=types.SimpleNamespace(sampler=SamplerConfig("ddim", clip_sample=False)),
    )
    membership.measure(column, context)
    norm = find(column.entries, "noise_norm")
    assert norm["value"] == pytest.approx(
        8 * (0.5 + 2.0) / 2, rel=1e-4
    )  # the shift times sqrt(64), mean over two prompts
    assert norm["n"] == 2
    # The same images: the text of the forget set shifts the answer more, so it explains them worse.
    assert find(column.entries, "mia/clid")["value"] == 0.0
    assert find(column.entries, "mia/clid")["protocol"]["no_interval"]


def test_sets_that_choose_and_sets_that_are_judged_do_not_meet():
    inputs = {
        name: Encoded(np.zeros((n, 2, 2, 1)), np.zeros(n, int))
        for name, n in (("forget", 4), ("keep", 50), ("held_out", 31))
    }
    sets = membership_scores.sets_of(inputs)
    every = np.concatenate([sets.forget, sets.judged, sets.calibration, sets.keep])
    assert len(np.unique(every)) == len(every)
    assert (len(sets.judged), len(sets.calibration), len(sets.keep)) == (20, 11, 11)
    assert every.max() < 85


def test_copies_are_counted_by_every_detector(digits):
    images = to_uint8(digits[:400])
    forget, keep, samples = images[:2], images[2:300], images[300:].copy()
    samples[:7] = forget[[0, 1, 0, 1, 0, 1, 0]]  # copies
    split = types.SimpleNamespace(
        images=images,
        keep=np.arange(2, 280),
        held_out=np.arange(280, 300),
        near_duplicates=types.SimpleNamespace(index=np.array([5])),
    )
    refs = types.SimpleNamespace(forget=forget, keep=keep, round_trip=None)
    settings = {**SETTINGS, "extraction": {"detectors": ("carlini", "ratio", "patch", "ssim")}}
    column = Column([], samples=samples)
    extraction.measure(column, _context(None, RUNNER, refs, settings=settings, split=split))
    for name in ("carlini", "ratio", "patch", "ssim"):
        item = find(column.entries, f"copy_{name}")
        assert item["n"] == 100
        assert item["protocol"]["count"] == pytest.approx(7, abs=1), name
        assert np.all(column.arrays[f"copy_{name}"][:7] < item["protocol"]["threshold"]), name
        assert item["ci"]["low"] < 0.07 < item["ci"]["high"]
    column = Column([], failed="3 of 100 samples hold NaN")
    extraction.measure(column, _context(None, RUNNER, refs, settings=settings, split=split))
    assert [item["status"] for item in column.entries] == ["failed"] * 4


class Blurry:
    """An autoencoder that keeps the mean of every 2 x 2 square."""

    latent = True

    def encode(self, images):
        x = images.astype(np.float32) / 127.5 - 1
        return x.reshape(len(x), 4, 2, 4, 2, 1).mean(axis=(2, 4))

    def decode(self, x):
        return np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)


def test_latent_models_copy_what_the_autoencoder_makes(digits):
    images, space = to_uint8(digits[:200]), Blurry()
    forget = images[:2]
    made = to_uint8(space.decode(space.encode(images)))
    samples = np.concatenate([made[:2], made[150:]])
    split = types.SimpleNamespace(
        images=images,
        keep=np.arange(2, 150),
        held_out=np.arange(150, 200),
        near_duplicates=types.SimpleNamespace(index=np.zeros(0, int)),
    )
    trip = types.SimpleNamespace(images=made[:2])
    refs = types.SimpleNamespace(forget=forget, keep=images[2:150], round_trip=trip)
    runner = types.SimpleNamespace(space=space, protocol={}, takes_text=False)
    runner = type("Runner", (), vars(runner))()  # a family remembers thresholds for each runner
    settings = {**SETTINGS, "extraction": {"detectors": ("patch", "ssim")}}
    column = Column([], samples=samples)
    extraction.measure(column, _context(None, runner, refs, settings=settings, split=split))
    for name in ("patch", "ssim"):
        item = find(column.entries, f"copy_{name}")
        assert item["protocol"]["count"] == 2, name  # reconstructions of other images are no copies
        assert "autoencoder" in item["protocol"]["copy_of"]


def test_settings_name_known_scores():
    settings, problems = resolve({}, {"membership.scores": "('sima', 'pia')", "extraction.detectors": "['ssim']"})
    assert problems == []
    assert settings["membership"]["scores"] == ("sima", "pia")
    assert settings["extraction"]["detectors"] == ("ssim",)
    for value in ("('sima', 'sima')", "('lira',)", "sima"):
        _, problems = resolve({}, {"membership.scores": value})
        assert "loss_t, secmi" in problems[0]


def test_every_metric_of_the_families_is_registered():
    names = {item["metric"] for family in (membership, extraction) for item in family.failed_entries(DEFAULTS)}
    assert names == set(membership.METRICS) | set(extraction.METRICS)
    assert names <= set(METRICS)
