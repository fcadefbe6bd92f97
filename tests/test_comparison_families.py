"""The families of likelihood, gap, relearning and inversion, on models that are known in closed form."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from eval.context import Column, Context
from eval.families import gap, inversion, likelihood, relearning
from eval.prompts import Conditions
from eval.records import find
from eval.references import Encoded
from eval.runner import Samples
from eval.settings import DEFAULTS, resolve
from eval.spaces import Pixels
from jaxunlearn import schedule as schedules
from jaxunlearn.closed_form import make_predict, weighted_set
from jaxunlearn.images import to_uint8
from jaxunlearn.metrics import METRICS
from jaxunlearn.metrics.extraction import calibrate

SCHEDULE = schedules.linear(1000)
predict = make_predict(SCHEDULE, 0.15)
SETTINGS = {
    **DEFAULTS,
    "nll": {**DEFAULTS["nll"], "draws": 2, "images": 1, "held_out": 2, "probes": 1, "tolerance": 1e-2},
    "inversion": {"copies": 2, "steps": 10, "shares": (0.0, 0.5)},
    "gap": {"draws": 64, "replicates": 8, "images": 4},
    "relearn": {**DEFAULTS["relearn"], "keys": 3, "budget": 40, "every": 10, "learning_rate": 0.5, "batch_size": 8},
}


class Runner:
    """What the families use of a runner."""

    takes_text, space, conditions, schedule = False, Pixels(), Conditions(), SCHEDULE

    @staticmethod
    def predict(params, x_t, t, cond=None):
        """Its images are fixed: training changes the weights alone."""
        return predict(params._replace(images=jax.lax.stop_gradient(params.images)), x_t, t)

    def fits(self, model):
        return model is MODEL

    def sample(self, params, shape, texts, tick):
        """Its images, drawn by their weights."""
        weights = np.exp(np.asarray(params.log_weights, np.float64))
        chosen = np.random.default_rng(0).choice(len(weights), 200, p=weights / weights.sum())
        return Samples(to_uint8(np.asarray(params.images)[chosen]), 0)


MODEL = types.SimpleNamespace(predict_forward_mode=predict)
RUNNER = Runner()


@pytest.fixture(scope="module")
def images():
    """Sixteen images of 4x4 and of 256 levels; the first one is to be forgotten."""
    levels = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1))
    return (levels / 127.5 - 1).astype(np.float32)


def contexts(images, **weights):
    """A context for each column, whose model holds the forget image with the given weight; the last 4 are held out."""
    sets = {"forget": images[:1], "keep": images[1:12], "held_out": images[12:]}
    inputs = {name: Encoded(x, np.zeros(len(x), np.int32)) for name, x in sets.items()}
    bytes_of = {name: to_uint8(part.x) for name, part in inputs.items()}
    refs = types.SimpleNamespace(
        loss_inputs=inputs,
        injection_inputs=inputs["forget"],
        injected=np.array([0]),
        forget=bytes_of["forget"],
        keep=bytes_of["keep"],
        calibration=calibrate(bytes_of["forget"], bytes_of["keep"]),
        round_trip=None,
    )
    out = {}
    for place, (name, weight) in enumerate(weights.items()):
        keep = np.random.default_rng(place).uniform(0.7, 1.4, 11) if name.startswith("retrained") else np.ones(11)
        params = weighted_set(images[:12], np.concatenate([[weight], keep]))
        base = dict(name=name, params=params, model=MODEL, runner=RUNNER, refs=refs, prompts=None, split=None)
        base |= dict(settings=SETTINGS, tick=lambda stage, share: None, key=jax.random.key(0))
        out[name] = Context(**base)
    return out


def columns_of(found):
    out = {name: Column([]) for name in found}
    for name, context in found.items():
        out[name].samples = RUNNER.sample(context.params, None, None, None).images
    return out


@pytest.mark.slow
def test_gap_has_a_floor_and_sees_what_is_left(images):
    found = contexts(images, before=12.0, after=1e-2, retrained=0.0, retrained_2=0.0)
    columns = columns_of(found)
    gap.compare(columns, found, SETTINGS)
    near = {name: find(column.entries, "gap_kl_forget") for name, column in columns.items()}
    assert near["before"]["value"] > near["after"]["value"] > 2 * near["after"]["floor"] > 0
    assert near["retrained"]["protocol"]["ratio"] == pytest.approx(1.0)
    assert near["after"]["protocol"]["ratio_low"] > 2
    elbo = {name: find(column.entries, "elbo_gap") for name, column in columns.items()}
    assert elbo["before"]["ci"]["low"] > elbo["before"]["floor"] > 0
    assert elbo["retrained"]["value"] == pytest.approx(-elbo["retrained_2"]["value"])
    at_samples = {name: find(column.entries, "gap_kl_samples") for name, column in columns.items()}
    assert at_samples["before"]["protocol"]["ratio"] > 10  # half of its samples are copies
    assert at_samples["after"]["value"] < 0.1 * at_samples["before"]["value"]
    assert near["after"]["n"] == 512
    for name in columns:
        assert [item["metric"] for item in columns[name].entries] == list(gap.METRICS)


@pytest.mark.slow
def test_gap_without_enough_retrained_models_says_so(images):
    found = contexts(images, before=12.0, after=1e-2, retrained=0.0)
    columns = columns_of(found)
    gap.compare(columns, found, SETTINGS)
    near = find(columns["after"].entries, "gap_kl_forget")
    assert near["status"] == "ok"
    assert near["floor"] is None
    assert "needs two" in near["protocol"]["floor_is"]
    assert find(columns["retrained"].entries, "gap_kl_samples")["status"] == "not_run"
    del found["retrained"]
    columns = {name: Column([]) for name in found}
    gap.compare(columns, found, SETTINGS)
    assert {item["status"] for item in columns["after"].entries} == {"not_run"}
    assert "retrained" in columns["after"].entries[0]["reason"]
    columns, found = (
        {"before": Column([], failed="NaN"), **columns_of(found)},
        contexts(images, after=1.0, retrained=0.0),
    )
    columns = {"before": Column([], failed="1 array holds NaN"), **columns_of(found)}
    gap.compare(columns, found, SETTINGS)
    assert [item["status"] for item in columns["before"].entries] == ["failed"] * 3


@pytest.mark.slow
def test_relearning_and_benign_training(images):
    found = contexts(images, before=12.0, after=0.5, retrained=1e-4, retrained_2=1e-4)
    columns = columns_of(found)
    settings = {**SETTINGS, "relearn": {**SETTINGS["relearn"], "benign_steps": 2}}
    relearning.compare(columns, found, settings)
    steps = {name: find(column.entries, "relearn_steps")["value"] for name, column in columns.items()}
    assert steps["before"] == 0
    assert 0 < steps["after"] < steps["retrained"]
    ratio = find(columns["after"].entries, "relearn_ratio")
    assert ratio["status"] == "ok"
    protocol = ratio["protocol"]
    assert protocol["steps_after"] / np.mean(protocol["steps_reference"]) == pytest.approx(ratio["value"])
    assert ratio["value"] < 1
    assert find(columns["after"].entries, "relearn_benign")["value"] < 1  # it still knows the image
    assert find(columns["retrained"].entries, "benign_copy_rate")["value"] == 0
    assert columns["after"].arrays["relearn_losses"].shape[:2] == (3, 2)


@pytest.mark.slow
def test_relearning_without_retrained_models_or_of_a_broken_model(images):
    found = contexts(images, before=12.0, after=0.5)
    columns = {name: Column([]) for name in found}
    relearning.compare(columns, found, SETTINGS)
    names = ["relearn_steps", "relearn_ratio", "relearn_benign", "benign_copy_rate"]
    assert [item["metric"] for item in columns["after"].entries] == names
    assert {item["status"] for item in columns["after"].entries} == {"not_run"}
    found = contexts(images, before=12.0, retrained=0.0)
    columns = {"after": Column([], failed="NaN"), **{name: Column([]) for name in found}}
    relearning.compare(columns, found, SETTINGS)
    assert {item["status"] for item in columns["after"].entries} == {"failed"}


@pytest.mark.slow
def test_likelihood_and_inversion_tell_who_remembers(images):
    values, back = {}, {}
    for name, context in contexts(images, before=12.0, retrained=0.0).items():
        column = Column([])
        likelihood.measure(column, context)
        inversion.measure(column, context)
        values[name] = {metric: find(column.entries, metric) for metric in ("nll_bpd_uniform_deq", "nll_held_out")}
        assert column.arrays["nll_bpd_uniform_deq"].shape == (1, 2)
        back[name] = find(column.entries, "inversion_distance", share=0.5)["value"]
        assert find(column.entries, "inversion_distance", share=0.0)["ci"] is None
    before, after = (values[name]["nll_bpd_uniform_deq"] for name in ("before", "retrained"))
    assert before["value"] < after["value"] - 0.5
    assert "one image" in before["ci"]["method"]
    # A held-out image is as unlikely under both.
    held_out = [values[name]["nll_held_out"]["value"] for name in values]
    assert held_out[0] == pytest.approx(held_out[1], rel=0.1)
    assert back["before"] < 0.5 * back["retrained"]


@pytest.mark.slow
def test_a_solver_that_gives_up_is_reported(images):
    (context,) = contexts(images, before=1.0).values()
    few = {**SETTINGS, "nll": {**SETTINGS["nll"], "max_steps": 2}}
    column = Column([])
    other = functools.partial(dataclasses.replace, context, runner=Runner())
    likelihood.measure(column, other(settings=few))
    item = column.entries[0]
    assert (item["status"], item["value"]) == ("failed", None)
    assert item["reason"].startswith("2 of 2 solutions")


def test_settings_and_registry():
    settings, problems = resolve({}, {"relearn.keys": "2", "gap.replicates": "4", "nll.tolerance": "0"})
    named = sorted(problem.split(":")[0] for problem in problems)
    assert named == ["eval.gap.replicates", "eval.nll.tolerance", "eval.relearn.keys"]
    for family in (likelihood, gap, relearning, inversion):
        assert {item["metric"] for item in family.failed_entries(settings)} <= set(METRICS)
