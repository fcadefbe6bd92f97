"""Numbers of a configuration that change from step to step: what is parsed, what is refused, and that the steps see it."""

from __future__ import annotations

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.schedule import linear
from tests.launching import TINY, run
from train import examples, methods, step_schedules, validate
from train.configs import digits

STEP = np.arange(0, 121)
COSINE = 0.5 * (1 + np.cos(np.pi * np.minimum(STEP, 100) / 100))


def configured(**changes):
    config = digits.get_config()
    for key, value in changes.items():
        node = config.unlearn
        *parents, leaf = key.split("__")
        for part in parents:
            node = node[part]
        node[leaf] = value
    return config


def problems(**changes) -> list[str]:
    return validate.config_problems(configured(**changes), pathlib.Path("runs/none"), 1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("linear(0, 0.1, 100)", 0.1 * np.minimum(STEP, 100) / 100),
        (" linear( -0.2,0.3 , 50) ", -0.2 + 0.5 * np.minimum(STEP, 50) / 50),
        ("cosine(0.1, 0, 100)", 0.1 * COSINE),
        ("cosine(0, 0.4, 100)", 0.4 - 0.4 * COSINE),
        ("exponential(0.5, 0.25, 40)", 0.5 * 0.25 ** (STEP / 40)),
        ("polynomial(1, 0.5, 2, 60)", 0.5 * (1 - np.minimum(STEP, 60) / 60) ** 2 + 0.5),
        ("steps((0, 0.05), (100, 0.1))", np.where(STEP < 100, 0.05, 0.1)),
        ("steps((0, 3), (1, 2), (7, 1))", np.select([STEP < 1, STEP < 7], [3, 2], 1)),
        (
            "warmup_cosine(0, 1, 0.2, 20, 120)",
            np.where(STEP < 20, STEP / 20, 0.2 + 0.4 * (1 + np.cos(np.pi * np.clip(STEP - 20, 0, 100) / 100))),
        ),
        (0.3, np.full(len(STEP), 0.3)),
    ],
)
def test_schedules_are_their_formulas(text, wanted):
    np.testing.assert_allclose(step_schedules.values(text, len(STEP)), wanted, atol=2e-7)
    parsed = step_schedules.parse(text)
    assert callable(parsed) == step_schedules.is_scheduled(text)
    if callable(parsed):
        np.testing.assert_allclose(jax.jit(parsed)(jnp.int32(60)), wanted[60], atol=2e-7)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("abc", ["'abc'", "neither a number nor a schedule", "linear(start, end, steps)"]),
        ("lin(0, 1, 2)", ["unknown schedule 'lin'", "did you mean 'linear'"]),
        ("linear(0, 1)", ["3 values, got 2", "linear(start, end, steps)"]),
        ("linear(0, 1, 2.5)", ["whole", "2.5"]),
        ("linear(0, 1, 0)", ["1 or more"]),
        ("linear(a, 1, 2)", ["plain numbers"]),
        ("linear(0, 1e999, 2)", ["plain numbers"]),
        ("linear(0, end=1, steps=2)", ["no names"]),
        ("linear(0, 1, " + "(" * 500, ["neither"]),
        ("steps((5, 1))", ["begin at 0"]),
        ("steps((0, 1), (0, 2))", ["rise"]),
        ("steps()", ["pairs"]),
        ("warmup_cosine(0, 1, 0, 9, 9)", ["shorter"]),
        ("__import__('os').getcwd()", ["neither"]),
        (None, ["None", "neither"]),
        (True, ["neither"]),
        ((1, 2), ["neither"]),
    ],
)
def test_what_is_not_a_schedule_is_one_line(value, words):
    with pytest.raises(ValueError) as error:
        step_schedules.parse(value)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lam": "linear(0, 1.5, 100)"}, ["unlearn.lam", "in [0, 1] at every step"]),
        ({"lam": "abc"}, ["unlearn.lam", "schedules:"]),
        ({"lam": None}, ["unlearn.lam", "[0, 1]"]),
        ({"method": "bernoulli", "lam": "linear(0, 0.5, 10)"}, ["strictly between 0 and 1"]),
        ({"lam": "linear(0, 1, 10)", "stratify": True}, ["stratify", "one number for lam"]),
        ({"combine__rho": "cosine(0.1, -0.1, 20)"}, ["combine.rho", "0 or more at every step"]),
        ({"method": "npo", "combine__forget": "linear(0, -0.2, 20)"}, ["combine.forget", "npo descends"]),
        ({"method": "mirrored", "combine__forget": "linear(-0.1, 0.2, 20)"}, ["mirrored ascends"]),
        ({"combine__name": "pcgrad", "combine__keep": "linear(1, -1, 20)"}, ["combine.keep", "pcgrad"]),
    ],
)
def test_a_bad_schedule_is_one_line_of_the_configuration(changes, words):
    (line,) = problems(**changes)
    for word in words:
        assert word in line


def test_values_beyond_the_last_step_do_not_count():
    assert problems(lam="linear(0, 2, 500)", num_steps=200) == []
    assert len(problems(lam="linear(0, 2, 500)", num_steps=300)) == 1


@pytest.mark.parametrize(
    ("changes", "part", "wanted"),
    [
        ({"combine__name": "weighted_sum", "combine__forget": "linear(-0.1, -0.3, 10)"}, "forget", -0.2),
        ({"method": "npo", "combine__forget": "linear(0.1, 0.3, 10)"}, "forget", 0.2),
        ({"method": "npo", "combine__keep": "linear(1, 3, 10)"}, "keep", 2.0),
        ({"combine__rho": "linear(0, 0.4, 10)"}, "forget", -0.2),
        ({"combine__name": "fixed_norm", "combine__c": "steps((0, 1), (5, 7))"}, "forget", -7.0),
        ({"method": "erasediff", "combine__eta": "linear(0, 1, 10)"}, "forget", 0.5),
        ({"combine__name": "pcgrad", "combine__forget": "linear(0, 1, 10)"}, "forget", -0.5),
    ],
)
def test_combiners_follow_the_schedule(changes, part, wanted):
    """At step 5, from unit gradients that do not overlap."""
    assert problems(**changes) == []
    unlearn = configured(**changes).unlearn
    objective = methods.make_objective(unlearn, linear(), level=1.0)
    combiner = methods.make_combine(unlearn, objective)
    grads = {name: {other: jnp.float32(other == name) for other in objective.terms} for name in objective.terms}
    direction, _, _ = combiner.apply(grads, combiner.init(grads), jnp.int32(5))
    assert float(direction[part]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("method", ["siss", "bernoulli"])
def test_a_scheduled_lam_comes_with_the_rows(method):
    changes = {"method": method, "lam": "linear(0.1, 0.9, 100)"}
    assert problems(**changes) == []
    unlearn = configured(**changes).unlearn
    objective = methods.make_objective(unlearn, linear())
    assert dict(objective.batch_extra) == {"lam": "[B]"}
    split = types.SimpleNamespace(keep=np.arange(5), forget=np.arange(5, 7), images=np.zeros((7, 8, 8, 1), np.uint8))
    lam = step_schedules.values(unlearn.lam, unlearn.num_steps)
    rows = examples.unlearning_rows(examples.Examples(split), seed=0, batch_size=4, lam=lam)
    np.testing.assert_allclose(rows(50).extra["lam"], np.full(4, 0.5), rtol=1e-6)
    assert rows(0).extra["lam"].dtype == np.float32
    plain = methods.make_objective(configured(method=method, lam=0.3).unlearn, linear())
    assert dict(plain.batch_extra) == {}


@pytest.mark.slow
def test_schedules_from_the_command_line(tmp_path):
    """The share of forget rows in the mixture and the ratio of the gradients follow what was typed."""
    done = run(
        "train.main",
        *TINY,
        "--config.unlearn.lam=steps((0, 0.0), (5, 1.0))",
        "--config.unlearn.combine.rho=linear(0, 1, 10)",
        "--config.log.every=1",
        "--mode=unlearn",
        f"--workdir={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    records = {r["step"]: r for r in records if r["stage"] == "unlearn" and "loss/keep" in r}
    for step, record in records.items():
        assert record["aux/from_forget"] == (0.0 if step <= 5 else 1.0)
        rho = (step - 1) / 10
        wanted = rho * record["grad_norm/keep"]
        assert record["forget_scale"] * record["grad_norm/forget"] == pytest.approx(wanted, rel=1e-3)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["unlearn"]["lam"] == "steps((0, 0.0), (5, 1.0))"
