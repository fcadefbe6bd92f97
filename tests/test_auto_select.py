"""``config.select``: what the rules choose is what the library computes, and a run that goes on chooses nothing anew."""

from __future__ import annotations

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import selection
from jaxunlearn.errors import filtered, mean_squares, sum_squares, weighted
from jaxunlearn.forgetting import make_probe_losses
from jaxunlearn.frequency import low_pass, radial_spectrum
from jaxunlearn.images import to_model
from jaxunlearn.io.forget import open_split
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.objectives.probes import strata
from jaxunlearn.responsibility import responsibility, window_from_responsibility
from jaxunlearn.schedule import linear
from jaxunlearn.spectrum import cutoff_from_spectrum, window_from_spectrum
from jaxunlearn.timesteps import window
from jaxunlearn.types import Example
from tests import tiny_model as tm
from tests.launching import TINY, run, start
from tests.tiny_model import quick_compilation  # noqa: F401
from train import auto_select, selection_rules, selections, validate
from train.configs import digits
from train.examples import Examples

pytestmark = pytest.mark.usefixtures("quick_compilation")
SCHEDULE = linear()


@pytest.fixture(scope="module")
def images():
    """The digits and 80 copies of one photograph, which must go."""
    config = digits.get_config("smoke")
    return Examples(open_split(config.data.to_dict(), config.seed))


@pytest.fixture(scope="module")
def model():
    return types.SimpleNamespace(
        predict=tm.predict, params=tm.params(), schedule=SCHEDULE, is_latent=False, takes_text=False
    )


def configured(rule, **changes):
    config = digits.get_config("smoke")
    config.select = rule
    auto_select.clear(config)
    for key, value in changes.items():
        config.unlearn[key] = value
    return config


def points(images, part):
    return np.asarray(to_model(images.split.images[part]))


def test_auto_is_the_librarys_choice_with_the_loss_gap(images, model):
    config, split = configured("auto"), images.split
    found = auto_select.choose(config, model, images)
    gap = selection.LossGap(*(found.curves[name] for name in ("gap_t", "gap", "gap_error")))
    forget = points(images, split.forget[:1])  # the different ones: a single one
    seen = selection_rules._some(split.keep, selection_rules.KEEP_IMAGES, config, "select/keep")
    decided = window_from_responsibility(selection_rules.share_of_forget(config, model, images, lambda: None))
    wanted = selection.choose(SCHEDULE, forget, points(images, seen), gap=gap, decided=decided)
    assert found.select["window"] == wanted.window
    assert found.select["filter"] == wanted.filter
    assert found.select["cutoff"] == (1.0 if wanted.cutoff is None else wanted.cutoff)
    assert found.reasons[: len(wanted.reasons)] == wanted.reasons
    assert all(reason.endswith(".") for reason in found.reasons)
    assert auto_select.choose(config, model, images).select == found.select


def test_the_loss_gap_is_that_of_forget_against_held_out(images, model):
    """Against a direct computation with another set of noises: the same curve within its errors."""
    found, _ = selection_rules._gap(configured("auto"), model, images, lambda: None)
    assert list(found.t) == list(strata(1000, 16))
    probe = make_probe_losses(tm.predict, SCHEDULE, jax.random.key(7), error=mean_squares, count=16, noises=8)
    split = images.split
    known, unknown = (probe(model.params, Example(points(images, p))) for p in (split.forget[:1], split.held_out))
    wanted = 1 - known.mean(axis=(0, 2)) / unknown.mean(axis=(0, 2))
    assert np.all(np.abs(found.gap - wanted) < 6 * found.error + 0.02)


def test_spectrum_and_its_table_of_cutoffs(images, model):
    config = configured("spectrum")
    found = auto_select.choose(config, model, images)
    power = radial_spectrum(points(images, images.split.forget[:1]))
    cutoff, span = cutoff_from_spectrum(SCHEDULE, power), window_from_spectrum(SCHEDULE, power)
    assert found.select["window"] == span
    assert found.select["filter"] == "low_pass"
    np.testing.assert_array_equal(found.select["cutoff"], cutoff)
    assert len(found.select["cutoff"]) == 1000
    # The forget term then has the library's error with that table.
    resolved = auto_select.applied(config, found)
    error = selections.forget_error(resolved.unlearn, SCHEDULE, sum_squares)
    wanted = weighted(filtered(sum_squares, low_pass(cutoff)), window(*span, 1000))
    x, t = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.array([0, span[0], span[1] - 1, span[1]])
    np.testing.assert_allclose(error(x, t), wanted(x, t), rtol=1e-6)
    assert np.flatnonzero(error(x, t)).tolist() == [1, 2]
    # A user may write such a table as well, of the right length.
    resolved.select = "manual"
    assert validate.config_problems(resolved, pathlib.Path("runs/none"), 1) == []
    resolved.unlearn.select.cutoff = tuple(found.select["cutoff"][:-1])
    (line,) = validate.config_problems(resolved, pathlib.Path("runs/none"), 1)
    assert "a table of 1000" in line


def test_responsibility_counts_the_copies_in_the_training_set(images, model):
    found = auto_select.choose(configured("responsibility"), model, images)
    split = images.split
    one, keep = points(images, split.forget[:1]), points(images, split.keep)
    share = responsibility(SCHEDULE, one, keep, copies=80, population=len(keep))
    assert found.select["window"] == window_from_responsibility(share).window
    assert found.select["filter"] == "none"
    np.testing.assert_array_equal(found.curves["share"], share)
    single = window_from_responsibility(responsibility(SCHEDULE, one, keep, copies=1)).window
    assert found.select["window"][1] > single[1]
    assert "80 copies" in found.reasons[0]


def test_a_choice_is_kept_and_reused(images, model, tmp_path, monkeypatch, capsys):
    config, workdir = configured("responsibility"), Workdir(tmp_path)
    first = auto_select.resolve(config, workdir, model, images, lambda: None)
    written = json.loads((tmp_path / "selection.json").read_text())
    kept = json.loads(workdir.config.read_text())
    assert kept["resolved"]["select"]["window"] == list(first.unlearn.select.window) == written["select"]["window"]
    assert kept["resolved"]["summary"] == written["summary"]
    assert kept["unlearn"]["select"]["window"] == [0, 0]
    assert written["reasons"]
    assert (tmp_path / "selection.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"select: responsibility chose {written['summary']}"
    assert said[1:] == [f"select: {reason}" for reason in written["reasons"]]
    monkeypatch.setattr(auto_select, "choose", lambda *_: pytest.fail("chosen anew"))
    before = (tmp_path / "selection.json").read_bytes()
    again = auto_select.resolve(config, workdir, model, images, lambda: None)
    assert again.to_json() == first.to_json()
    assert (tmp_path / "selection.json").read_bytes() == before
    # What is written at the start of a run that goes on holds the numbers too.
    auto_select.write_config(workdir, config)
    assert json.loads(workdir.config.read_text()) == kept
    (tmp_path / "selection.json").write_text("{}")
    with pytest.raises(ValueError, match=r"selection\.json: cannot be used.*delete it"):
        auto_select.resolve(config, workdir, model, images, lambda: None)


def test_a_choice_that_no_drawn_t_meets_is_refused(images, model):
    with pytest.raises(ValueError, match=r"'responsibility' chose t in \[\d+, \d+\).*no t of the range \(900, 1000\)"):
        auto_select.choose(configured("responsibility", t_min=900), model, images)


def test_a_rule_replaces_the_file_but_not_the_command_line():
    config = digits.get_config()
    assert auto_select.clear(config) is None
    assert auto_select.conflicts(config, ["x", "--config.unlearn.select.window=(1,2)"]) == []
    config.select = "auto"
    command = ["train.main", "--config.unlearn.select.window=(1,2)", "--config.unlearn.select.filter", "low_pass"]
    (line,) = auto_select.conflicts(config, command)
    assert "config.select = 'auto'" in line
    assert "config.unlearn.select.window, config.unlearn.select.filter" in line
    assert auto_select.conflicts(config, ["train.main", "--config.unlearn.select.edge=5"]) == []
    assert "(250, 750)" in auto_select.clear(config)
    assert config.unlearn.select.window == (0, 0)
    assert auto_select.clear(config) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "naive"}, ["config.select = 'auto'", "'naive' has no forget term", "--config.select=manual"]),
        ({"rule": "autom"}, ["unknown selection rule 'autom'", "did you mean 'auto'", "manual"]),
    ],
)
def test_what_no_rule_can_do_is_one_line(changes, words):
    config = configured(changes.pop("rule", "auto"), **changes)
    (line,) = validate.config_problems(config, pathlib.Path("runs/none"), 1)
    for word in words:
        assert word in line


def test_what_needs_a_window_is_judged_with_some_window():
    assert validate.config_problems(configured("auto", draw="importance"), pathlib.Path("runs/none"), 1) == []
    assert validate.config_problems(configured("manual", draw="importance"), pathlib.Path("runs/none"), 1) == []


# As processes


@pytest.mark.slow
def test_a_run_chooses_once_and_says_so(tmp_path):
    flags = (*TINY, "--config.select=auto", "--mode=unlearn", f"--workdir={tmp_path / 'run'}")
    dry = run("train.main", *flags, "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert "must first be trained" in dry.stdout
    assert not (tmp_path / "run").exists()
    process = start("train.main", *flags)
    while process.poll() is None and not (tmp_path / "run" / "selection.png").exists():
        pass
    process.kill()
    process.communicate()
    chosen = (tmp_path / "run" / "selection.json").read_bytes()
    dry = run("train.main", *flags, "--dry_run")
    assert f"select: auto chose {json.loads(chosen)['summary']}" in dry.stdout
    done = run("train.main", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "selection.json").read_bytes() == chosen
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]
    assert resolved["select"] == json.loads(chosen)["select"]
    # The numbers by hand give the same weights.
    select = resolved["select"]
    by_hand = [
        *TINY,
        f"--config.unlearn.select.window=({select['window'][0]},{select['window'][1]})",
        f"--config.unlearn.select.filter={select['filter']}",
        f"--config.unlearn.select.cutoff={select['cutoff']}",
        "--mode=unlearn",
        f"--workdir={tmp_path / 'hand'}",
    ]
    done = run("train.main", *by_hand)
    assert done.returncode == 0, done.stderr
    weights = "models/unlearned/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "hand" / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


@pytest.mark.slow
def test_a_conflict_and_a_users_model(tmp_path):
    flags = (*TINY, "--config.select=auto", f"--workdir={tmp_path / 'run'}")
    refused = run("train.main", *flags, "--config.unlearn.select.window=(1,2)")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: config.select = 'auto' chooses config.unlearn.select.window")
    assert list(tmp_path.iterdir()) == []
    done = run("train.main", *TINY, "--mode=base", f"--workdir={tmp_path / 'base'}")
    assert done.returncode == 0, done.stderr
    dry = run("train.main", *flags, f"--config.base.path={tmp_path / 'base' / 'models' / 'base'}", "--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert "select: auto chose" in dry.stdout
    assert "nothing was written" in dry.stdout
    assert not (tmp_path / "run").exists()
