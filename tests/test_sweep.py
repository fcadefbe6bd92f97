"""The sweep: what the flags mean, one program for all rows, the rule and its table, and the launcher as a process."""

from __future__ import annotations

import json
import math
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import filtered, low_pass, sum_squares, weighted
from jaxunlearn.frequency import band, from_mask
from jaxunlearn.io import diffusers
from jaxunlearn.io.forget import open_split
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.parallel import global_batch, make_mesh, replicate
from jaxunlearn.schedule import linear
from jaxunlearn.timesteps import smooth_window, table_weight
from tests import tiny_model as tm
from tests.launching import TINY, run, start
from tests.tiny_model import quick_compilation  # noqa: F401
from train import auto_select, heat_map, prepare, stages, sweep_grid, sweep_table
from train.configs import digits
from train.examples import Examples
from train.sweep_grid import Axes, Row
from train.sweep_judge import Judge
from train.sweep_program import SweepProgram

pytestmark = pytest.mark.usefixtures("quick_compilation")
SCHEDULE = linear()


# The grid


def test_the_flags_name_the_grid():
    axes = sweep_grid.parse_axes("all (250, 750)  auto", "0.25 none (0.2,0.5)", None, "0.1 1e-2")
    assert axes == Axes(((0, 0), (250, 750), "auto"), (0.25, "none", (0.2, 0.5)), (None,), (0.1, 0.01))
    rows = axes.rows()
    assert len(rows) == len({row.key for row in rows}) == 2 * 3 * 2 + 2  # the automatic choice brings its own filter
    assert [row for row in rows if row.is_auto] == [Row("auto", None, None, 0.1), Row("auto", None, None, 0.01)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, ["nothing to sweep", "--windows"]),
        ({"windows": "(1,2"}, ["--windows", "'(1,2'", "(250,750) auto all"]),
        ({"windows": "5"}, ["--windows", "'5'"]),
        ({"windows": "(1,2,3)"}, ["'(1,2,3)'"]),
        ({"windows": " "}, ["is empty"]),
        ({"cutoffs": "0.5 0.5"}, ["--cutoffs", "twice"]),
        ({"cutoffs": "auto"}, ["'auto'", "0.5 (0.2,0.5) none"]),
        ({"lams": "nan"}, ["--lams", "'nan'"]),
        ({"scales": "1e999"}, ["--scales"]),
        ({"scales": "os.getcwd()"}, ["not understood"]),
    ],
)
def test_flags_that_are_not_understood_are_one_line(flags, words):
    with pytest.raises(ValueError) as error:
        sweep_grid.parse_axes(*(flags.get(name) for name in ("windows", "cutoffs", "lams", "scales")))
    (line,) = str(error.value).splitlines()
    for word in words:
        assert word in line


def test_a_row_is_a_configuration_of_the_launcher():
    config = digits.get_config("smoke")
    config.unlearn.select.filter, config.unlearn.select.cutoff = "high_pass", 0.3
    row = sweep_grid.configured(config, Row((100, 200), 0.5, 0.25, 0.2)).unlearn
    assert (row.select.window, row.select.filter, row.select.cutoff) == ((100, 200), "high_pass", 0.5)
    assert (row.lam, row.combine.rho) == (0.25, 0.2)
    assert sweep_grid.configured(config, Row(cutoff=(0.2, 0.5))).unlearn.select.filter == "band"
    assert sweep_grid.configured(config, Row(cutoff="none")).unlearn.select.filter == "none"
    assert sweep_grid.configured(config, Row(lam=0.1)).unlearn.select == config.unlearn.select
    config.unlearn.method = "npo"
    assert sweep_grid.configured(config, Row(scale=0.7)).unlearn.combine.forget == 0.7
    chosen = auto_select.Selection("auto", auto_select.EVERYTHING | {"window": (5, 9)}, (), {})
    assert sweep_grid.configured(config, Row("auto"), chosen).unlearn.select.window == (5, 9)


@pytest.mark.parametrize(
    ("changes", "axes", "words"),
    [
        ({}, {"windows": ((750, 250),)}, ["--windows: config.unlearn.select.window = (750, 250)"]),
        ({}, {"windows": ((0, 1001),)}, ["<= 1000"]),
        ({}, {"cutoffs": (-0.5,)}, ["--cutoffs", "positive"]),
        ({}, {"cutoffs": ((0.5, 0.2),)}, ["--cutoffs", "low < high"]),
        ({}, {"lams": (1.5,)}, ["--lams: config.unlearn.lam = 1.5"]),
        ({}, {"scales": (-1.0,)}, ["--scales: config.unlearn.combine.rho = -1.0"]),
        ({"method": "npo"}, {"lams": (0.5,)}, ["--lams", "'npo' has no lam"]),
        ({"method": "npo"}, {"scales": (-0.5,)}, ["--scales", "npo", "check config.unlearn.combine"]),
        ({"method": "naive"}, {"scales": (0.5,)}, ["no forget term"]),
        ({"draw": "importance"}, {"scales": (0.5,)}, ["'importance'", "uniform"]),
        ({"stratify": True}, {"lams": (0.5,)}, ["stratify"]),
        ({"stop": {"target": 0.95}}, {"scales": (0.5,)}, ["stop.target = 0.95", "all steps", "None"]),
    ],
)
def test_values_that_cannot_be_swept_are_one_line(changes, axes, words):
    config = digits.get_config("smoke")
    config.unlearn.update(changes)
    (line,) = sweep_grid.axis_problems(config, Axes(**axes))
    for word in words:
        assert word in line
    good = Axes(windows=((0, 500), "auto"), cutoffs=(0.5, 1.5, "none"), scales=(0.1,))
    assert sweep_grid.axis_problems(digits.get_config("smoke"), good) == []


def test_windows_are_judged_by_the_schedule_of_the_users_model(tmp_path):
    config, axes = digits.get_config("smoke"), Axes(windows=((0, 1500),))
    config.base.path = str(tmp_path)
    assert sweep_grid.axis_problems(config, axes) == []
    assert sweep_grid.axis_problems(config, axes, linear(2000)) == []
    (line,) = sweep_grid.axis_problems(config, axes, linear(1200))
    assert line.startswith("--windows: config.unlearn.select.window = (0, 1500)")
    assert "<= 1200" in line


# One program


def test_filters_and_windows_may_be_arguments_of_one_program():
    x, t = jax.random.normal(jax.random.key(0), (4, 9, 12, 2)), jnp.array([10, 260, 500, 740])

    @jax.jit
    def error(mask, weight):
        return weighted(filtered(sum_squares, from_mask(mask)), table_weight(weight))(x, t)

    for chosen, weight in (
        (low_pass(0.5), smooth_window(250, 750, 100, 1000)),
        (band(0.2, 0.7, "gaussian"), smooth_window(0, 600, 0, 1000)),
    ):
        wanted = weighted(filtered(sum_squares, chosen), weight)(x, t)
        got = error(chosen.mask(9, 12, t), weight(jnp.arange(1000)))
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert error._cache_size() == 1
    with pytest.raises(ValueError, match=r"mask must be \[9, 7\].*got \[9, 6\]"):
        from_mask(np.ones((9, 6)))(x, t)


@pytest.fixture(scope="module")
def images():
    config = digits.get_config("smoke")
    return Examples(open_split(config.data.to_dict(), config.seed))


def tiny(**changes):
    """A configuration of four steps, and a model of a few numbers."""
    config = digits.get_config("smoke")
    config.unlearn.num_steps, config.unlearn.batch_size = 4, 8
    for key, value in changes.items():
        config.unlearn[key] = value
    model = types.SimpleNamespace(predict=tm.predict, params=tm.params(), schedule=SCHEDULE)
    return config, model


def by_the_launcher(config, model, images, mesh, level):
    """Parameters after an ordinary unlearning run."""
    made = stages.unlearning_run(config, model, images, mesh, start=prepare.Start(level=level))
    state = replicate(made.state, mesh)
    for step in range(made.num_steps):
        state, _ = made.step(state, made.key, global_batch(made.rows(step), mesh))
    return state.params


ROWS = (
    Row((0, 0), "none", None, 0.1),
    Row((250, 750), 0.5, None, 0.3),
    Row((100, 900), (0.3, 0.8), None, 0.05),
)


@pytest.mark.parametrize(
    "method", ["siss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("npo", "retrack"))]
)
def test_one_program_serves_all_rows_and_each_equals_its_own_run(images, method):
    config, model = tiny(method=method)
    mesh = make_mesh(jax.devices()[:1])
    start_of = prepare.Start() if method != "retrack" else prepare.Start(extra={"neighbours": neighbours(images)})
    program = SweepProgram(config, model, images, mesh, start_of)
    rows = [row._replace(lam=0.2 + 0.3 * i) if method == "siss" else row for i, row in enumerate(ROWS)]
    ends = []
    for row in rows:
        finished = program.run(sweep_grid.configured(config, row))
        assert finished.broken_step is None
        ends.append(jax.tree.map(np.asarray, finished.params))
    assert program.step._cache_size() == 1
    assert len({float(end["inner"].sum()) for end in ends}) == len(rows)
    if method == "retrack":
        return
    row_config = sweep_grid.configured(config, rows[1])
    level = float(program.values(row_config).level)
    wanted = by_the_launcher(row_config, model, images, mesh, level)
    for name in wanted:
        moved = np.abs(np.asarray(wanted[name]) - model.params[name]).max()
        np.testing.assert_allclose(ends[1][name], wanted[name], atol=2e-3 * moved)


def test_a_cutoff_of_every_t_is_a_row_like_any_other(images):
    """What a rule chooses: at each t another radius."""
    config, model = tiny(method="siss")
    mesh = make_mesh(jax.devices()[:1])
    program = SweepProgram(config, model, images, mesh, prepare.Start())
    config.unlearn.select.filter = "low_pass"
    config.unlearn.select.cutoff = tuple(np.linspace(1.2, 0.3, SCHEDULE.num_steps).tolist())
    ended = program.run(config).params
    wanted = by_the_launcher(config, model, images, mesh, None)
    config.unlearn.select.cutoff = 0.3
    other = program.run(config).params
    for name in wanted:
        moved = np.abs(np.asarray(wanted[name]) - model.params[name]).max()
        np.testing.assert_allclose(ended[name], wanted[name], atol=2e-3 * moved)
    assert any(np.abs(np.asarray(ended[name]) - np.asarray(other[name])).max() > 0 for name in wanted)


def neighbours(images):
    forget, keep = images.split.forget, images.split.keep
    return np.broadcast_to(keep[:3], (len(forget), 3))


@pytest.mark.slow
def test_two_devices_give_the_same_row(images):
    config, model = tiny(method="siss")
    ends = []
    for count in (1, 2):
        program = SweepProgram(config, model, images, make_mesh(jax.devices()[:count]), prepare.Start())
        ends.append(program.run(sweep_grid.configured(config, ROWS[1])).params)
        program.run(sweep_grid.configured(config, ROWS[2]))
        assert program.step._cache_size() == 1
    for name, value in ends[0].items():
        moved = np.abs(np.asarray(value) - model.params[name]).max()
        np.testing.assert_allclose(ends[1][name], value, atol=1e-2 * moved)


@pytest.mark.slow
def test_levels_are_those_that_a_run_measures(images, tmp_path):
    config, model = tiny(method="npo")
    program = SweepProgram(config, model, images, make_mesh(jax.devices()[:1]), prepare.Start())
    for i, row in enumerate(ROWS[:2]):
        row_config = sweep_grid.configured(config, row)
        wanted = prepare.start(
            row_config, Workdir(tmp_path / str(i)), model, images, resumes=False, poll=lambda: None
        ).level
        assert float(program.values(row_config).level) == pytest.approx(wanted, rel=1e-5)


# The table and the picture


def judged(copies, fd, *, window=(250, 750), cutoff=0.5, scale=0.1, auto=False, level=None):
    figures = {"samples": 500, "copies": copies, "nearest": 0.01, "fd": fd, "fd_name": "fd_pixel"}
    return {
        "key": repr((window, cutoff, scale, auto)),
        "auto": auto,
        "window": list(window),
        "column": None if auto else cutoff,
        "selection": f"t in [{window[0]}, {window[1]}), low_pass at {cutoff} Nyquist",
        "lam": 0.5,
        "scale": scale,
        "status": "ok" if fd is not None else "broken at step 3",
        "figures": figures if fd is not None else None,
        "keep_ratio": 1.0,
        "forget_level": None if level is None else {"level": level},
        "seconds": 1.5,
    }


def result(*rows, copies=50):
    return {
        "method": "siss",
        "combiner": "relative_norm",
        "scale_name": "rho",
        "has_lam": True,
        "num_steps": 100,
        "sampling_steps": 25,
        "before": judged(copies, 1.0)["figures"],
        "retrained": None,
        "rows": list(rows),
    }


def test_the_best_row_forgets_enough_at_the_lowest_distance():
    enough, better = judged(5, 1.4), judged(0, 1.3, cutoff="none")
    near, broken = judged(6, 1.1, scale=0.2), judged(0, None, scale=0.3)
    found = result(broken, near, enough, better)
    assert sweep_table.ordered(found["rows"], found["before"]) == [better, enough, near, broken]
    assert sweep_table.best_of(found["rows"], found["before"]) is better
    assert "low_pass at none" in sweep_table.verdict(found)
    # Without copies before, copies say nothing; a forget level does.
    assert sweep_table.best_of(found["rows"], {**found["before"], "copies": 0}) is None
    nothing = sweep_table.verdict(result(enough, judged(0, 1.0, auto=True), copies=0))
    assert nothing.endswith("no row can be called the best.")
    reached = judged(0, 2.0, level=0.95)
    assert sweep_table.best_of([better, reached], {**found["before"], "copies": 0}) is reached
    assert "No row has forgotten enough" in sweep_table.verdict(result(near, broken))


def test_a_collapsed_row_is_never_the_best():
    destroyed, sound = judged(0, 0.9) | {"keep_ratio": 1.5}, judged(3, 1.4, cutoff="none")
    lost, weak = judged(0, 0.8, scale=0.2) | {"keep_ratio": None}, judged(30, 1.0, scale=0.3)
    rows, before = [destroyed, lost, weak, sound], judged(50, 1.0)["figures"]
    assert sweep_table.best_of(rows, before) is sound
    assert not sweep_table.enough(destroyed, before)
    assert not sweep_table.enough(lost, before)
    assert sweep_table.ordered(rows, before)[:2] == [sound, weak]
    assert sweep_table.best_of([destroyed, lost], before) is None


def test_a_retrained_model_of_another_form_is_refused_first(tmp_path):
    config = digits.get_config("smoke")
    workdir, model = Workdir(tmp_path), stages.new_model(config)
    config.scheduler.beta_schedule = "squaredcos_cap_v2"
    diffusers.save(workdir.model("retrained"), stages.new_model(config))
    with pytest.raises(ValueError, match=r"^config\.retrain: the model in \S+ has another noise schedule"):
        Judge(config, model, None, workdir, 10, 2)


def test_the_table_names_rule_best_and_automatic_choice():
    rows = (
        judged(0, 1.3),
        judged(9, 1.2, scale=0.2),
        judged(1, 1.35, window=(100, 300), auto=True),
        judged(0, None, scale=1),
    )
    text = sweep_table.table(result(*rows))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 1 + 4
    assert "before" in lines[2]
    assert "**best**" in lines[3]
    assert "1.3 " in lines[3]
    assert "**auto**" in lines[4]
    assert "broken at step 3" in lines[6]
    for words in ("at most 0.1 of the starting model's", "lowest Frechet distance", "comes 2. of 4", "100 steps a row"):
        assert words in text


def test_the_picture_shows_every_row(tmp_path):
    rows = [
        judged(int(10 * scale), 1 + w / 1000, window=(w, w + 250), cutoff=c, scale=scale)
        for w in (0, 250)
        for c in (0.25, 0.5, "none")
        for scale in (0.1, 0.2)
        if c != "none" or w
    ]
    rows += [judged(1, 1.3, window=(100, 300), scale=s, auto=True) for s in (0.1, 0.2)] + [
        judged(0, None, cutoff=(0.2, 0.5))
    ]
    lines = heat_map.panels(result(*rows))
    assert [title for title, _ in lines] == ["lam 0.5, rho 0.1", "lam 0.5, rho 0.2"]
    assert sum(len(group) for _, group in lines) == len(rows)
    heat_map.draw_sweep(tmp_path / "a.png", result(*rows))
    many = [dict(row, scale=s, key=f"{row['key']}{s}") for row in rows for s in (1, 2, 3, 4, 5)]
    ((title, group),) = heat_map.panels(result(*many))
    assert title == "each cell: its best rho"
    assert len(group) == len({(tuple(r["window"]), str(r["column"])) for r in many})
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


# As a process

SWEEP = (
    *TINY,
    "--windows=(250,750) auto",
    "--cutoffs=0.5 none",
    "--scales=0.1 0.2",
    "--num_samples=16",
    "--sampling_steps=3",
)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--windows=(750,250)", "--scales=-1"], ["--windows: config.unlearn.select.window", "--scales: "]),
        (["--lams=0.5", "--mode=unlearn"], ["--mode=unlearn"]),
        (["--windows=auto", "--config.select=auto"], ["config.select"]),
    ],
)
@pytest.mark.slow
def test_mistakes_are_told_before_anything_is_written(arguments, words, tmp_path):
    done = run("train.sweep", *TINY, *arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(words)
    for line, word in zip(lines, words):
        assert line.startswith("error: " + word)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_with_the_missing_rows(tmp_path):
    workdir = tmp_path / "run"
    flags = (*SWEEP, f"--workdir={workdir}", "--config.retrain.enabled=True")
    dry = run("train.sweep", *flags, "--dry_run")
    assert "sweep: 6 rows of 10 steps, 0 of them done before" in dry.stdout
    assert not workdir.exists()
    process = start("train.sweep", *flags)
    while process.poll() is None and not (workdir / "sweep.json").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    stopped = json.loads((workdir / "sweep.json").read_text())
    assert process.returncode == 75 or len(stopped["rows"]) == 6
    done = run("train.sweep", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"{len(stopped['rows'])} of them done before" in done.stdout
    content = json.loads((workdir / "sweep.json").read_text())
    assert content["rows"][: len(stopped["rows"])] == stopped["rows"]
    assert len({row["key"] for row in content["rows"]}) == 6
    assert sum(row["auto"] for row in content["rows"]) == 2
    assert content["compilations"] <= 1
    assert content["retrained"]["samples"] == content["before"]["samples"] == 16
    assert "status" in content["rows"][0]["forget_level"]
    assert all(math.isfinite(row["figures"]["fd"]) for row in content["rows"])
    assert (workdir / "sweep.md").read_text().count("**auto**") == 2
    assert (workdir / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # More values: only the new row runs. The full launcher takes the same work directory.
    more = [flag for flag in flags if not flag.startswith("--scales")] + ["--scales=0.1 0.2 0.4", "--windows=(250,750)"]
    done = run("train.sweep", *more)
    assert "sweep: 6 rows of 10 steps, 4 of them done before" in done.stdout
    other = run("train.sweep", *more, "--num_samples=8")
    assert other.returncode == 2
    assert "were judged with 16" in other.stderr
    main = [flag for flag in flags if flag.startswith("--config") or flag.startswith("--workdir")]
    done = run("train.main", *main, "--mode=unlearn")
    assert done.returncode == 0, done.stderr
    assert "base: done before" in done.stdout


@pytest.mark.slow
def test_the_help_names_the_flags():
    done = run("train.sweep", "--help")
    assert done.returncode == 0
    for word in ("--windows", "--cutoffs", "--scales", "--config.unlearn.method='siss'", "python -m train.sweep"):
        assert word in done.stdout
