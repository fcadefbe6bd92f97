"""Collapse guard, stop rule and several retrained models as a user meets them: refusals, and whole runs as processes."""

from __future__ import annotations

import json
import pathlib
import random
import time

import numpy as np
import pytest

from jaxunlearn.io import diffusers
from tests.launching import TINY, run, start
from train import validate
from train.configs import digits

QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
PROBES = ("--config.unlearn.watch.every=2", "--config.unlearn.watch.keep_images=16", "--config.unlearn.watch.noises=2")
ASCENT = (
    "--config.unlearn.method=neggrad",
    "--config.unlearn.combine.forget=-1.0",
    "--config.unlearn.optimizer.learning_rate=0.02",
    "--config.unlearn.num_steps=40",
)
"""Plain ascent with a rate that destroys a model within a few steps."""


def problems(**changes) -> list[str]:
    config = digits.get_config()
    for key, value in changes.items():
        node = config
        *parents, leaf = key.split("__")
        for part in parents:
            node = node[part]
        node[leaf] = value
    return validate.config_problems(config, pathlib.Path("runs/none"), 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("watch__every", -1),
        ("watch__keep_images", 0),
        ("watch__forget_images", 0),
        ("watch__strata", 0),
        ("watch__noises", 1),
        ("watch__warn", 0.9),
        ("watch__warn", 1.0),
        ("watch__collapse", 1.05),
        ("watch__collapse", float("inf")),
        ("watch__samples", 1),
        ("watch__samples_every", 0),
        ("watch__returns", "first"),
        ("stop__target", 0.0),
        ("stop__patience", 0),
        ("stop__source", "held-out"),
        ("stop__level", -1.0),
    ],
)
def test_each_bad_value_is_one_line(key, value):
    (line,) = problems(**{f"unlearn__{key}": value})
    assert line.startswith(f"config.unlearn.{key.replace('__', '.')}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unlearn__stop__target": 0.95}, ["stop.target = 0.95", "stop.source", "retrained"]),
        ({"unlearn__stop__source": "value"}, ["needs unlearn.stop.level"]),
        ({"unlearn__stop__level": 0.1}, ["stop.level = 0.1", "source=value"]),
        ({"unlearn__stop__path": "models/x"}, ["stop.path", "source=retrained"]),
        ({"unlearn__stop__source": "retrained", "unlearn__stop__path": "no/such"}, ["no such folder"]),
        ({"unlearn__stop__source": "retrained"}, ["retrain.enabled=True", "stop.path"]),
        ({"unlearn__watch__samples": 100, "unlearn__watch__samples_every": 25}, ["multiple of", "every = 10"]),
        (
            {"unlearn__watch__every": 0, "unlearn__watch__samples": 100, "unlearn__watch__returns": "best"},
            ["watch.every = 0", "watch.samples, unlearn.watch.returns"],
        ),
        ({"retrain__count": 0}, ["config.retrain.count = 0"]),
    ],
)
def test_values_that_do_not_go_together_are_one_line(changes, words):
    (line,) = problems(**changes)
    assert all(word in line for word in words), line


def test_good_combinations_have_no_problem(tmp_path):
    assert problems(unlearn__stop__source="held_out", unlearn__stop__target=0.95) == []
    assert problems(unlearn__stop__source="value", unlearn__stop__level=0.1) == []
    assert problems(unlearn__stop__source="retrained", unlearn__stop__path=str(tmp_path)) == []
    assert problems(unlearn__stop__source="retrained", retrain__enabled=True, retrain__count=3) == []
    assert problems(unlearn__watch__samples=100) == []
    assert problems(unlearn__watch__every=0) == []


def params_of(folder: pathlib.Path) -> list[np.ndarray]:
    import jax

    return jax.tree.leaves(diffusers.load(folder).params)


def lines(workdir: pathlib.Path, stage: str = "unlearn") -> list[dict]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if "time" not in k and "wall" not in k} for r in records if r["stage"] == stage]


def newest(workdir: pathlib.Path) -> int:
    """The last checkpoint of the unlearning."""
    return max((int(p.name) for p in workdir.glob("checkpoints/unlearn/*") if p.name.isdigit()), default=0)


@pytest.mark.slow
def test_the_stop_rule_refuses_a_photograph_among_digits_and_writes_nothing(tmp_path):
    rule = ("--config.unlearn.stop.target=0.95", "--config.unlearn.stop.source=held_out")
    done = run("train.main", *TINY, *rule, f"--workdir={tmp_path / 'run'}", **QUICK)
    assert done.returncode == 2
    assert "have no look-alikes" in done.stderr
    assert "stop.source=retrained" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_destroyed_model_is_given_back_restored(tmp_path):
    workdir = tmp_path / "run"
    arguments = (*TINY, *PROBES, *ASCENT, f"--workdir={workdir}")
    done = run("train.main", *arguments, **QUICK)
    assert done.returncode == 1, done.stdout
    failed = (workdir / "FAILED").read_text()
    for words in ("collapsed", "learning_rate", "reserve.capacity", "models/restored"):
        assert words in failed
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workdir / "models" / "unlearned").exists()
    best = json.loads((workdir / "best.json").read_text())
    assert best["status"] == "collapsed"
    restored, base = (params_of(workdir / "models" / name) for name in ("restored", "base"))
    assert all(np.isfinite(leaf).all() for leaf in restored)
    moved = any(not np.array_equal(a, b) for a, b in zip(restored, base))
    assert moved == (best["step"] > 0)
    ratios = {line["step"]: line["eval/keep_ratio"] for line in lines(workdir) if "eval/keep_ratio" in line}
    assert ratios[best["step"]] < 1.1
    assert all(ratio >= 1.1 for step, ratio in ratios.items() if step > best["step"])
    # The same command comes to the same end.
    before = [leaf.copy() for leaf in restored]
    again = run("train.main", *arguments, **QUICK)
    assert again.returncode == 1
    assert (workdir / "FAILED").read_text() == failed
    assert all(np.array_equal(a, b) for a, b in zip(before, params_of(workdir / "models" / "restored")))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_run_is_the_same_after_kills(tmp_path):
    """The model of 20 steps is nearly untrained: a level just above its start is reached within the run."""
    common = (*TINY, *PROBES, "--mode=unlearn", "--config.checkpoint.every=3", *ASCENT[:2])
    common += ("--config.unlearn.optimizer.learning_rate=0.002", "--config.unlearn.num_steps=60")
    common += ("--config.unlearn.watch.collapse=100.0", "--config.unlearn.watch.warn=100.0")
    free = run("train.main", *common, f"--workdir={tmp_path / 'free'}", "--config.unlearn.stop.source=value",
               "--config.unlearn.stop.level=2.0", **QUICK)  # fmt: skip
    assert free.returncode == 0, free.stderr
    levels = {r["step"]: r["eval/forget_level"] for r in lines(tmp_path / "free") if "eval/forget_level" in r}
    assert levels[0] == 0
    start_loss = json.loads((tmp_path / "free" / "yardstick.json").read_text())["start_loss"]
    # The target of the other runs: what this one reached in the middle, passed only once.
    middle = sorted(levels)[len(levels) // 2]
    assert all(levels[s] > levels[middle] for s in levels if s > middle)
    wanted = start_loss + levels[middle] * (2.0 - start_loss) / 0.9999
    rule = ("--config.unlearn.stop.source=value", f"--config.unlearn.stop.level={wanted}")
    rule += ("--config.unlearn.stop.target=0.9999",)
    common += (f"--config.base.path={tmp_path / 'free' / 'models' / 'base'}",)
    unbroken = run("train.main", *common, *rule, f"--workdir={tmp_path / 'unbroken'}", **QUICK)
    assert unbroken.returncode == 0, unbroken.stderr
    assert "stopped after step" in unbroken.stdout
    best = json.loads((tmp_path / "unbroken" / "best.json").read_text())
    assert best["status"] == "reached"
    assert best["step"] == best["returned_step"]
    assert best["step"] in (middle, middle + 2)
    workdir, chance = tmp_path / "broken", random.Random(0)
    for _ in range(2):
        process, seen = start("train.main", *common, *rule, f"--workdir={workdir}", **QUICK), newest(workdir)
        try:
            while process.poll() is None and newest(workdir) == seen:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.2))  # anywhere in the next steps
        finally:
            process.kill()
            process.communicate()
    done = run("train.main", *common, *rule, f"--workdir={workdir}", **QUICK)
    assert done.returncode == 0, done.stderr
    for one, other in zip(
        params_of(workdir / "models" / "unlearned"), params_of(tmp_path / "unbroken/models/unlearned")
    ):
        np.testing.assert_array_equal(one, other)
    assert (workdir / "best.json").read_text() == (tmp_path / "unbroken" / "best.json").read_text()
    assert lines(workdir) == lines(tmp_path / "unbroken")


@pytest.mark.slow
def test_two_retrained_models_differ_and_come_before_the_unlearning_they_measure(tmp_path):
    workdir = tmp_path / "run"
    arguments = ("--config.retrain.enabled=True", "--config.retrain.count=2", "--config.unlearn.stop.source=retrained")
    samples = ("--config.unlearn.watch.samples=8", "--config.unlearn.watch.samples_every=4")
    done = run("train.main", *TINY, *PROBES, *arguments, *samples, "--mode=unlearn", f"--workdir={workdir}", **QUICK)
    assert done.returncode == 0, done.stderr
    one, two = (params_of(workdir / "models" / name) for name in ("retrained", "retrained_2"))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two))
    order = [json.loads(line)["stage"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(order)) == ["base", "retrain", "retrain_2", "unlearn"]
    # The second model starts from other weights and sees other rows: its first loss differs already.
    first = [lines(workdir, stage)[0]["loss/keep"] for stage in ("retrain", "retrain_2")]
    assert first[0] != first[1]
    assert "2 retrained models" in json.loads((workdir / "yardstick.json").read_text())["source"]
    # Models of 20 steps may not differ from the base model; either way the run says which.
    assert ("forget level 1 is l*" in done.stdout) != ("(no_gap)" in done.stdout)
    copies = {line["step"] for line in lines(workdir) if "eval/copies" in line}
    assert copies == {0, 4, 8, 10}
    assert all("eval/fd" in line for line in lines(workdir) if "eval/copies" in line)
    # The first one is what count=1 makes, and its folder serves another run as the target.
    other = run("train.main", *TINY, *PROBES, "--config.unlearn.stop.source=retrained", "--mode=unlearn",
                f"--config.unlearn.stop.path={workdir / 'models' / 'retrained_2'}",
                f"--config.base.path={workdir / 'models' / 'base'}", f"--workdir={tmp_path / 'other'}", **QUICK)  # fmt: skip
    assert other.returncode == 0, other.stderr
    assert not (tmp_path / "other" / "models" / "retrained").exists()
