"""What a run of unlearning is measured against: probes on fixed images, the target loss and where it comes from."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from jaxunlearn.images import to_model
from jaxunlearn.io.forget import open_split
from jaxunlearn.io.workdir import Workdir, retrained_names
from jaxunlearn.objectives.probes import strata
from jaxunlearn.parallel import make_mesh, replicate
from tests import oracle
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401
from train import data_summary, prepare, yardstick
from train.configs import digits
from train.examples import Examples
from train.probes import Probes, different_images
from train.watch import make_watch
from train.yardstick import Yardstick

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = types.SimpleNamespace(
    predict=tm.predict, schedule=tm.SCHEDULE, params=tm.params(), is_latent=False, takes_text=False
)
OTHER = tm.params(seed=1)


def configured(**changes):
    """The default configuration with small probes; keys of ``watch``, ``stop`` and ``unlearn``."""
    config = digits.get_config()
    config.unlearn.watch.update(dict(keep_images=6, strata=4, noises=3, forget_images=4))
    for key, value in changes.items():
        section = next(s for s in (config.unlearn.stop, config.unlearn.watch, config.unlearn) if key in s)
        section[key] = value
    return config


@pytest.fixture(scope="module")
def planted():
    """Digits and the copies of a photograph, which are the forget images."""
    return open_split(configured().data.to_dict(), 0)


@pytest.fixture(scope="module")
def ordinary():
    """Digits, of which some are the forget images."""
    config = configured()
    config.data.plant.copies, config.data.forget.planted, config.data.plant.image = 0, False, None
    config.data.forget.indices = (3, 30, 300, 700, 1000, 1500)
    return open_split(config.data.to_dict(), 0)


def make_probes(split, devices=1, **changes):
    return Probes(configured(**changes), MODEL, Examples(split), make_mesh(jax.devices()[:devices]))


def measured(tmp_path, split, **changes):
    config = configured(**changes)
    probes = make_probes(split, **changes)
    return yardstick.measure(config, Workdir(tmp_path), MODEL, Examples(split), probes, lambda: None)


# Probes


def test_the_keep_probe_equals_the_oracle(planted):
    probes = make_probes(planted)
    assert len(probes._t) == 6 * 3
    assert np.bincount(np.searchsorted(strata(1000, 4), probes._t)).tolist() == [5, 5, 4, 4]
    key = jax.random.fold_in(jax.random.key(0), prepare.stream_id("watch"))
    eps = np.stack([jax.random.normal(jax.random.fold_in(key, i), (8, 8, 1)) for i in range(18)]).astype(np.float64)
    x0 = np.repeat(probes._keep.x0, 3, axis=0).astype(np.float64)
    alpha, sigma = oracle.alpha_sigma(oracle.linear_table(), probes._t)
    x_t = oracle.noised(x0, eps, alpha, sigma)
    wide = {name: np.float64(value) for name, value in MODEL.params.items()}
    with jax.enable_x64(True):
        answer = np.asarray(tm.predict(wide, x_t, probes._t))
    wanted = np.mean((answer - eps) ** 2)
    assert probes.keep_loss(probes.local(MODEL.params)) == pytest.approx(wanted, rel=1e-5)


def test_probes_do_not_depend_on_devices_or_on_how_many_rows_are_computed_at_once(planted):
    one = make_probes(planted)
    params = one.local(MODEL.params)
    wanted, losses = one.keep_loss(params), one.losses(params, one.forget)
    many = make_probes(planted, devices=8)
    spread = many.local(replicate(MODEL.params, make_mesh()))
    assert many.keep_loss(spread) == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_array_equal(many.losses(spread, many.forget), losses)
    few = make_probes(planted, batch_size=5)
    assert few._rows_at_once == 5
    calls = []
    assert few.keep_loss(params, lambda: calls.append(1)) == pytest.approx(wanted, rel=1e-6)
    assert len(calls) == 4


def test_equal_forget_images_are_probed_once(planted, ordinary):
    assert len(make_probes(planted).forget) == 1
    chosen = make_probes(ordinary).forget
    assert len(chosen) == 4
    assert set(chosen) <= set(ordinary.forget)
    everything = different_images(0, ordinary.digests, ordinary.forget, 100)
    np.testing.assert_array_equal(everything, ordinary.forget)


# The target


def test_the_level_is_0_at_the_start_and_1_at_the_target(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "other_parameters", lambda config, path, model, key: OTHER)
    probes = make_probes(planted)
    start, other = (probes.losses(probes.local(p), probes.forget).mean() for p in (MODEL.params, OTHER))
    assert other > start
    found = measured(tmp_path, planted, source="retrained", path="a/retrained/model")
    assert found.level(start) == pytest.approx(0, abs=1e-5)
    assert found.level(other) == pytest.approx(1, rel=1e-5)
    assert found.level((start + other) / 2) == pytest.approx(0.5, rel=1e-5)
    # As the watch measures it, from the parameters.
    config = configured(source="retrained", path="a/retrained/model")
    watch = make_watch(config, Workdir(tmp_path), MODEL, Examples(planted), make_mesh(jax.devices()[:1]), lambda: None)
    ratio, level = watch._probe(MODEL.params)
    assert (ratio, level) == (pytest.approx(1, rel=1e-6), pytest.approx(0, abs=1e-5))
    assert watch._probe(OTHER)[1] == pytest.approx(1, rel=1e-5)


def test_several_retrained_models_give_their_mean(planted, tmp_path, monkeypatch, capsys):
    models = {"retrained": OTHER, "retrained_2": {name: 1.3 * value for name, value in OTHER.items()}}
    monkeypatch.setattr(prepare, "other_parameters", lambda config, path, model, key: models[path.rpartition("/")[2]])
    config = configured(source="retrained")
    config.retrain.enabled, config.retrain.count = True, 2
    probes = make_probes(planted)
    found = yardstick.measure(config, Workdir(tmp_path), MODEL, Examples(planted), probes, lambda: None)
    wanted = np.mean([probes.losses(probes.local(p), probes.forget).mean() for p in models.values()])
    assert found.target == pytest.approx(wanted, rel=1e-5)
    out = capsys.readouterr().out
    for words in ("2 retrained models", "l* =", "+-", "l_0 =", "retrained_2"):
        assert words in out


def test_a_value_is_the_target_itself(planted, tmp_path):
    found = measured(tmp_path, planted, source="value", level=5.0)
    assert found.target == pytest.approx(5, rel=1e-6)
    assert found.has_level
    about = json.loads((tmp_path / yardstick.FILE).read_text())
    assert about["status"] == "ok"
    assert about["source"] == "a value of the user"
    assert about["gap_error"] > 0


def test_without_a_source_there_is_no_level(planted, tmp_path):
    found = measured(tmp_path, planted)
    assert not found.has_level
    assert json.loads((tmp_path / yardstick.FILE).read_text())["status"] == "no_source"


def test_no_gap_is_refused_with_the_cures_or_told(planted, tmp_path, capsys):
    probes = make_probes(planted)
    start = float(probes.losses(probes.local(MODEL.params), probes.forget).mean())
    with pytest.raises(ValueError, match=r"no_gap: l\* = .*source=retrained is the definition.*stop.target=None"):
        measured(tmp_path, planted, source="value", level=start, target=0.95)
    assert not (tmp_path / yardstick.FILE).exists()
    assert not measured(tmp_path, planted, source="value", level=start).has_level
    assert "(no_gap)" in capsys.readouterr().out
    assert json.loads((tmp_path / yardstick.FILE).read_text())["status"] == "no_gap"


def test_a_resumed_run_measures_with_the_same_numbers(planted, tmp_path, monkeypatch):
    found = measured(tmp_path, planted, source="value", level=5.0)
    monkeypatch.setattr(Probes, "losses", None)
    monkeypatch.setattr(Probes, "keep_loss", None)
    assert measured(tmp_path, planted, source="value", level=5.0) == found
    assert dataclasses.astuple(found) == tuple(np.float32(v) for v in dataclasses.astuple(found))


# Look-alikes


def test_held_out_digits_stand_for_digits(ordinary, tmp_path, capsys):
    found = measured(tmp_path, ordinary, source="held_out")
    near = yardstick.look_alikes(ordinary, 0, Examples(ordinary).points, make_probes(ordinary).forget)
    assert near.shape == (4, 64)
    assert set(near.ravel()) <= set(ordinary.held_out)
    probes = make_probes(ordinary)
    params = probes.local(MODEL.params)
    positions = np.unique(near)
    assert len(positions) > 64
    of_position = dict(zip(positions, probes.losses(params, positions).mean(axis=(1, 2))))
    # The mean over forget images of what each one's own look-alikes say, some of which they share.
    target = np.mean([np.mean([of_position[p] for p in row]) for row in near])
    gap = target - probes.losses(params, probes.forget).mean()
    assert "64 held-out images most like each forget image" in capsys.readouterr().out
    # An untrained network knows none of them better: either way the numbers are those of the look-alikes.
    if found.has_level:
        assert found.target - found.start == pytest.approx(gap, rel=1e-3)
    else:
        assert gap < 0.1


def test_near_duplicates_of_forget_images_do_not_stand_for_them(ordinary):
    forget = ordinary.forget[:2]
    points = Examples(ordinary).points
    near = yardstick.look_alikes(ordinary, 0, points, forget)
    nearest = np.unique(near[:, :2])
    marked = dataclasses.replace(ordinary.near_duplicates, index=nearest)
    split = dataclasses.replace(ordinary, near_duplicates=marked)
    assert not set(nearest) & set(yardstick.look_alikes(split, 0, points, forget).ravel())


def test_a_photograph_among_digits_has_no_look_alikes(planted, ordinary):
    (line,) = data_summary.split_problems(configured(source="held_out"), planted, None)
    for words in ("unlearn.stop.source = 'held_out'", "1 of 1 forget images have no look-alikes", "source=retrained"):
        assert words in line
    assert data_summary.split_problems(configured(source="held_out"), ordinary, None) == []


def test_levels_lie_on_a_line():
    assert Yardstick(1.0, 0.2, 0.6, 0.01).level(0.4) == pytest.approx(0.5)
    assert not Yardstick(1.0).has_level
    assert retrained_names(1) == ["retrained"]
    # to_model of the images is what the look-alikes are found in.
    assert np.asarray(to_model(np.uint8([0, 255]))).tolist() == [-1, 1]
