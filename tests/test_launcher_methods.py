"""Every method, combiner, selection and guard as the launcher builds it from a configuration."""

from __future__ import annotations

import json
import pathlib
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import errors, frequency, guards, timesteps
from jaxunlearn.io import diffusers
from jaxunlearn.io.duplicates import NearDuplicates
from jaxunlearn.io.forget import open_split
from jaxunlearn.io.latent_cache import Latents
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.methods import METHODS
from jaxunlearn.objectives.anchor import Anchor
from jaxunlearn.parallel import make_mesh
from jaxunlearn.schedule import linear
from jaxunlearn.types import Batch, Example
from tests.launching import TINY, run, start
from train import build, data_summary, examples, methods, prepare, selections, stages, validate, validate_unlearn
from train.configs import digits, folder
from train.dry_run import dry_run

WORKDIR = pathlib.Path("runs/none")
SCHEDULE = linear()
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
"""XLA need not polish a program for three steps."""
NEEDED = {
    "naive": {"select__window": (0, 0)},
    "clamped": {"cap": 60.0},
    "vdu_style": {"anchor": "l2"},
}
"""What has no default, or does not go with the default configuration."""


def configured(make=digits.get_config, **changes):
    """A configuration with some keys of ``unlearn`` changed."""
    config = make()
    for key, value in changes.items():
        node = config.unlearn
        *parents, leaf = key.split("__")
        for part in parents:
            node = node[part]
        node[leaf] = value
    return config


def problems(**changes) -> list[str]:
    return validate.config_problems(configured(**changes), WORKDIR, 1)


def weights(combiner, terms) -> dict[str, float]:
    """The factor of each term's gradient in the direction, from unit gradients that do not overlap."""
    grads = {name: {other: jnp.float32(other == name) for other in terms} for name in terms}
    direction, _, _ = combiner.apply(grads, combiner.init(grads), jnp.int32(0))
    return {name: round(float(direction[name]), 6) for name in terms}


# Methods and combiners


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_reached_by_its_name(method):
    changes = {"method": method, **NEEDED.get(method, {})}
    assert problems(**changes) == []
    for line in validate.config_problems(configured(folder.get_config, **changes), WORKDIR, 1):
        assert line.startswith("config.data.") or line.startswith("config.base.path"), line
    unlearn = configured(**changes).unlearn
    objective = methods.make_objective(unlearn, SCHEDULE, level=2.0)
    combiner = methods.make_combine(unlearn, objective)
    assert objective.forget_sign == combiner.forget_sign == METHODS[method].forget_sign
    if METHODS[method].combiner == "weighted_sum":
        assert weights(combiner, objective.terms) == pytest.approx(METHODS[method].combiner_options)


@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_the_methods_own_unless_one_is_set(method):
    own = "mean_squares" if method in ("mirrored", "clamped", "npo", "simnpo", "dpo", "kto") else "sum_squares"
    assert methods.error_of(configured(method=method).unlearn) is selections.ERRORS[own]
    for name, error in selections.ERRORS.items():
        assert methods.error_of(configured(method=method, error=name).unlearn) is error


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"combine__name": "weighted_sum"}, {"keep": 1, "forget": -0.01}),
        ({"combine__name": "weighted_sum", "combine__forget": -0.5}, {"keep": 1, "forget": -0.5}),
        ({"method": "erasediff", "combine__name": "weighted_sum"}, {"keep": 1, "forget": 0.01}),
        ({"method": "retrack", "combine__keep": 2.0}, {"keep": 2, "forget": 0.005}),
        ({"method": "surrogate"}, {"keep": 1, "forget": 0.01}),
        ({"method": "surrogate", "combine__name": "weighted_sum"}, {"keep": 1, "forget": 0.01}),
        ({"combine__name": "pcgrad", "combine__keep": 5.0, "combine__forget": 1.0}, {"keep": 5, "forget": -1}),
        ({"method": "npo", "combine__name": "pcgrad"}, {"keep": 1, "forget": 0.2}),
        ({"method": "npo", "combine__name": "fixed_norm", "combine__c": 3.0}, {"keep": 1, "forget": 3}),
        ({"method": "fisher_anchor", "combine__anchor": 7.0}, {"keep": 1, "forget": -0.02, "anchor": 7}),
        (
            {"method": "dpo", "keep_term": True, "prior_term": True, "combine__keep": 3.0, "combine__prior": 4.0},
            {"keep": 3, "forget": 1, "prior": 4},
        ),
    ],
)
def test_combiners_and_their_weights(changes, wanted):
    assert problems(**changes) == []
    unlearn = configured(**changes).unlearn
    objective = methods.make_objective(unlearn, SCHEDULE, level=1.0)
    assert weights(methods.make_combine(unlearn, objective), objective.terms) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": 0.1}, ["unlearn.beta = 0.1", "'siss'", "it has: lam"]),
        ({"method": "npo", "delta": 1.0}, ["unlearn.delta", "beta, beta_unit, level"]),
        ({"method": "kto", "winner": "keep"}, ["unlearn.winner", "'kto'"]),
        ({"method": "npo", "level": 1.0, "beta_unit": "raw"}, ["unlearn.level", "raw"]),
        ({"method": "clamped"}, ["clamped needs cap="]),
        ({"method": "vdu_style"}, ["unlearn.checkpoints = ()", "two or more folders", "anchor=fisher or l2"]),
        ({"method": "vdu_style", "checkpoints": ("/no/a", ".")}, ["no such folder: '/no/a'"]),
        ({"checkpoints": ("a", "b")}, ["unlearn.checkpoints", "checkpoint_var"]),
        ({"method": "dpo", "keep_term": True}, ["combine.keep", "beta / 4 = 1250"]),
        ({"method": "dpo", "prior_term": True}, ["combine.prior", "2.5e+07"]),
        ({"method": "dpo", "combine__name": "relative_norm"}, ["keep and forget", "has forget;", "weighted_sum"]),
        ({"method": "fisher_anchor", "combine__name": "pcgrad"}, ["keep and forget", "keep, forget, anchor"]),
        ({"combine__anchor": 1.0}, ["combine.anchor = 1.0", "no term 'anchor'"]),
        ({"combine__name": "pcgrad", "combine__forget": -1.0}, ["pcgrad", "forget >= 0"]),
        ({"method": "bernoulli", "lam": 1.0}, ["bernoulli", "lam"]),
        ({"draw": "importance", "select__window": (0, 0)}, ["importance", "select.window"]),
        ({"select__window": (500, 750), "t_max": 500}, ["unlearn.select", "no t of the range (0, 500)"]),
        ({"select__window": (99.0, 98.0), "select__window_unit": "log_snr"}, ["select", "no timestep has log_snr"]),
        ({"select__filter": "band"}, ["select.cutoff", "two radii"]),
        ({"guards__mask": "saliency", **NEEDED["naive"], "method": "naive"}, ["guards.mask", "no forget term"]),
    ],
)
def test_what_does_not_go_together_is_one_line(changes, words):
    (line,) = problems(**changes)
    assert line.startswith("config.unlearn"), line
    for word in words:
        assert word in line


def test_all_refusals_come_at_once():
    found = problems(beta=-1.0, guards__l2_radius=-1.0, select__edge=-1)
    assert [line.split(" = ")[0] for line in found] == [
        "config.unlearn.beta",
        "config.unlearn.select.edge",
        "config.unlearn.guards.l2_radius",
    ]
    assert len(problems(beta=1.0, cap=2.0, z="batch", anchor="l2")) == 4


def test_a_noise_level_is_judged_by_the_schedule_of_the_users_model(tmp_path):
    config = configured(select__window=(-14.0, -99.0), select__window_unit="log_snr")
    assert validate.config_problems(config, WORKDIR, 1)  # the linear schedule ends before
    config.base.path = str(tmp_path)
    assert validate.config_problems(config, WORKDIR, 1) == []
    assert "no timestep has log_snr" in validate_unlearn.schedule_problems(config.unlearn, SCHEDULE)[0]
    assert validate_unlearn.schedule_problems(config.unlearn, linear(1000, beta_end=0.05)) == []


# Selections


def residual_and_t():
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (8, 8, 8, 1)), jax.random.randint(keys[1], (8,), 0, 1000)


SELECTIONS = {
    "hard": ({}, None, timesteps.window(250, 750, 1000)),
    "fraction": (
        {"select__window_unit": "fraction", "select__window": (0.1, 0.4)},
        None,
        timesteps.window(100, 400, 1000),
    ),
    "log_snr": (
        {"select__window_unit": "log_snr", "select__window": (0.0859, -5.71)},
        None,
        timesteps.window(250, 750, 1000),
    ),
    "smooth": ({"select__edge": 100}, None, timesteps.smooth_window(250, 750, 100, 1000)),
    "high_pass": (
        {"select__filter": "high_pass", "select__cutoff": 0.5, "select__kind": "butterworth", "select__order": 4},
        frequency.high_pass(0.5, "butterworth", order=4),
        timesteps.window(250, 750, 1000),
    ),
    "band": (
        {"select__filter": "band", "select__cutoff": (1, 3), "select__unit": "bins", "select__window": (0, 0)},
        frequency.band(1, 3, unit="bins"),
        None,
    ),
    "matmul": (
        {"select__filter": "low_pass", "select__cutoff": 0.5, "select__backend": "matmul", "select__kind": "gaussian"},
        frequency.low_pass(0.5, "gaussian", backend="matmul"),
        timesteps.window(250, 750, 1000),
    ),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_selections_are_those_of_the_library(case):
    changes, chosen, weight = SELECTIONS[case]
    assert problems(**changes) == []
    expected = errors.sum_squares
    if chosen is not None:
        expected = errors.filtered(expected, chosen)
    if weight is not None:
        expected = errors.weighted(expected, weight)
    got = selections.forget_error(configured(**changes).unlearn, SCHEDULE, errors.sum_squares)
    np.testing.assert_array_equal(got(*residual_and_t()), expected(*residual_and_t()))


def test_importance_draws_follow_the_window_and_keep_the_mean():
    changes = {"draw": "importance", "importance__uniform_share": 0.2, "t_min": 100, "importance__antithetic": True}
    assert problems(**changes) == []
    unlearn = configured(**changes).unlearn
    draw_fn = selections.make_draw(unlearn, methods.make_objective(unlearn, SCHEDULE), SCHEDULE)
    draw = draw_fn(jax.random.key(0), Batch(Example(jnp.zeros((4096, 1, 1, 1)))))
    t = np.asarray(draw.t)
    assert t.min() >= 100
    assert np.mean((t >= 250) & (t < 750)) > 0.85
    assert float(jnp.mean(draw.t_weight)) == pytest.approx(1, abs=0.05)
    assert float(jnp.max(draw.t_weight)) < 5.1


def test_probes_lie_where_something_is_selected():
    assert selections.probed_range(configured().unlearn, SCHEDULE) == (250, 750, 0.5)
    unlearn = configured(t_min=500, select__window=(100, 600)).unlearn
    assert selections.probed_range(unlearn, SCHEDULE) == (500, 600, 0.2)
    assert selections.probed_range(configured(select__window=(0, 0)).unlearn, SCHEDULE) == (0, 1000, 1.0)


# Guards

PARAMS = {"w": jnp.ones((4, 2)), "b": jnp.ones((2,))}
MASK = {"w": np.array([[True, False]] * 4), "b": np.array([False, True])}


def moved(unlearn, mask=None, steps=30):
    """Parameters after steps along one gradient, and the state of the optimizer."""
    tx = build.make_guarded_tx(unlearn, mask=mask)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params, ref_params=PARAMS)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


def test_without_guards_the_optimizer_is_the_plain_one():
    unlearn = configured().unlearn
    plain = build.make_tx(unlearn.optimizer, unlearn.num_steps).init(PARAMS)
    assert jax.tree.structure(build.make_guarded_tx(unlearn).init(PARAMS)) == jax.tree.structure(plain)


def test_guards_bound_the_final_update():
    changes = {"optimizer__learning_rate": 0.1, "optimizer__weight_decay": 0.1, "guards__l2_radius": 0.5}
    params, state = moved(configured(**changes, guards__anchor_weight=1e-3).unlearn, MASK)
    drift = jax.tree.map(lambda a, b: np.asarray(a - b), params, PARAMS)
    assert np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(drift))) == pytest.approx(0.5, rel=1e-4)
    for name, mask in MASK.items():
        assert (drift[name][~mask] == 0).all()
        assert (drift[name][mask] != 0).all()
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    relative, _ = moved(configured(**{**changes, "guards__l2_relative": True, "guards__l2_radius": 0.01}).unlearn)
    length = np.sqrt(sum(float(jnp.sum((relative[k] - PARAMS[k]) ** 2)) for k in PARAMS))
    assert length == pytest.approx(0.01 * np.sqrt(10), rel=1e-3)
    reserve = configured(optimizer__learning_rate=0.1, guards__reserve__capacity=0.02).unlearn
    bounded, _ = moved(reserve)
    drifts = jax.tree.leaves(guards.unit_drift(bounded, PARAMS))
    limits = jax.tree.leaves(guards.unit_capacity(PARAMS, 0.02))
    for drift, limit in zip(drifts, limits):
        np.testing.assert_allclose(drift, limit, rtol=1e-4)


def test_the_order_of_the_guards():
    changes = {
        "guards__anchor_weight": 1e-3,
        "guards__l2_radius": 1.0,
        "guards__reserve__capacity": 0.1,
        "guards__reserve__recycle": False,
    }
    assert problems(**changes) == []
    state = build.make_guarded_tx(configured(**changes).unlearn, mask=MASK, center=None).init(PARAMS)
    names = [type(part).__name__ for part in state]
    assert names == ["AnchorState", "EmptyState", "tuple", "MaskState", "CenterState", "ReserveState"]


# Whole runs, as far as the first step


@pytest.fixture(scope="module")
def tiny():
    """A configuration of a network of one level, its images and its devices."""

    def make(**changes):
        config = configured(lambda: digits.get_config("smoke"), batch_size=4, **changes)
        config.data.limit, config.data.plant.copies = 60, 5
        config.model.update(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
        config.model.norm_num_groups = config.model.attention_head_dim = 4
        config.model.mid_block_type = None
        return config

    optimised = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)  # XLA need not polish a program for one step
    yield make
    jax.config.update("jax_disable_most_optimizations", optimised)


def started(config, tmp_path, *, resumes=False):
    """What is measured before the first step, and the run."""
    assert validate.config_problems(config, tmp_path, 1) == []
    split, mesh = open_split(config.data.to_dict(), config.seed), make_mesh(jax.devices()[:1])
    model, images = stages.new_model(config), examples.Examples(split)
    workdir = Workdir(tmp_path)
    start = prepare.start(config, workdir, model, images, resumes=resumes, poll=lambda: None)
    return start, stages.unlearning_run(config, model, images, mesh, start=start), mesh


def test_a_level_is_measured_once_and_kept(tiny, tmp_path):
    config = tiny(method="npo")
    start, made, _ = started(config, tmp_path)
    assert start.level > 0
    assert json.loads((tmp_path / prepare.MEASURED).read_text()) == {"level": start.level}
    # An untrained network answers with about 0, so its mean error is about that of the noise.
    assert start.level == pytest.approx(1, rel=0.5)
    (tmp_path / prepare.MEASURED).write_text(json.dumps({"level": 0.25}))
    again, _, _ = started(config, tmp_path, resumes=True)
    assert again.level == 0.25
    assert jax.tree.map(np.shape, made.state.ref_params) == jax.tree.map(np.shape, made.state.params)
    shapes = jax.eval_shape(made.step, made.state, made.key, made.rows(0))
    assert {"loss/forget", "aux/d_forget"} <= set(shapes[1])


@pytest.mark.parametrize("method", ["clamped", "mirrored"])
def test_a_cap_below_the_starting_model_leaves_nothing_to_forget(tiny, tmp_path, method):
    # The mean error of an untrained network is about 1, twice that inside of a window of half of all t.
    with pytest.raises(
        ValueError, match=r"^config\.unlearn\.cap: nothing to forget: loss \S+ is already above the cap 0.5"
    ):
        started(tiny(method=method, cap=0.5), tmp_path)
    assert started(tiny(method=method, cap=9.0), tmp_path)[0].level is None
    # A run that goes on has moved; its first start was looked at.
    started(tiny(method=method, cap=0.5), tmp_path, resumes=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"scheduler": {"prediction_type": "v_prediction"}}, "predicts 'v_prediction', the starting model 'epsilon'"),
        ({"scheduler": {"beta_schedule": "squaredcos_cap_v2"}}, "has another noise schedule than the starting model"),
        ({"model": {"block_out_channels": (4,)}}, "has other parameters than the starting model"),
    ],
)
def test_another_model_must_be_of_the_form_of_the_starting_one(tiny, tmp_path, changes, words):
    config, model = tiny(), stages.new_model(tiny())
    config.update(changes)
    diffusers.save(tmp_path / "other", stages.new_model(config, seed=1))
    if words is None:
        other = prepare.other_parameters(config, str(tmp_path / "other"), model, "retrain")
        assert jax.tree.map(np.shape, other) == jax.tree.map(np.shape, model.params)
        return
    with pytest.raises(ValueError, match=f"^config.retrain: the model in {tmp_path / 'other'} {words}"):
        prepare.other_parameters(config, str(tmp_path / "other"), model, "retrain")


@pytest.mark.slow
def test_neighbours_travel_with_their_forget_images(tiny, tmp_path):
    config = tiny(method="retrack", neighbours__k=3)
    start, made, _ = started(config, tmp_path)
    split = open_split(config.data.to_dict(), config.seed)
    table = start.extra["neighbours"]
    assert table.shape == (len(split.forget), 3)
    assert np.isin(table, split.keep).all()
    batch = made.rows(2)
    assert batch.extra["neighbours"].shape == (4, 3, 8, 8, 1)
    points = split.images.astype(np.float64)
    for image, near in zip(batch.forget.x0, batch.extra["neighbours"]):
        distances = np.sort(np.sum((points[split.keep] - image) ** 2, axis=(1, 2, 3)))[:3]
        np.testing.assert_array_equal(np.sum((near.astype(np.float64) - image) ** 2, axis=(1, 2, 3)), distances)
    stand_in = prepare.stand_ins(config, stages.new_model(config), examples.Examples(split)).extra["neighbours"]
    assert stand_in.shape == table.shape
    shapes = jax.eval_shape(made.step, made.state, made.key, batch)
    assert "aux/spread" in shapes[1]


@pytest.mark.slow
def test_a_fisher_anchor_travels_in_the_state(tiny, tmp_path):
    config = tiny(method="fisher_anchor", anchor_batches=1)
    _, made, _ = started(config, tmp_path)
    assert isinstance(made.state.ref_params, Anchor)
    precision = jax.tree.leaves(made.state.ref_params.precision)
    assert sum(float(jnp.sum(x)) for x in precision) / sum(x.size for x in precision) == pytest.approx(1, rel=1e-4)
    # A resumed run takes it from its checkpoint, whose state has the same form.
    _, again, mesh = started(config, tmp_path, resumes=True)
    assert jax.tree.map(np.shape, again.state) == jax.tree.map(np.shape, made.state)
    split = open_split(config.data.to_dict(), config.seed)
    assert "step compiled" in dry_run(config, split, mesh, None)


def test_a_mask_is_computed_from_forget_images(tiny, tmp_path):
    config = tiny(guards__mask="saliency", guards__batches=1, guards__batch_size=4, guards__fraction=0.25)
    start, made, _ = started(config, tmp_path)
    mask = jax.tree.leaves(start.mask)
    assert sum(int(np.count_nonzero(x)) for x in mask) == sum(x.size for x in mask) // 4
    (held,) = [part for part in made.state.opt_state if isinstance(part, guards.MaskState)]
    for a, b in zip(mask, jax.tree.leaves(held.mask)):
        np.testing.assert_array_equal(a, b)
    resumed, again, _ = started(config, tmp_path, resumes=True)
    assert all(np.all(x) for x in jax.tree.leaves(resumed.mask))
    assert jax.tree.map(np.shape, again.state) == jax.tree.map(np.shape, made.state)


def test_surrogates_are_one_keep_image_for_each_forget_image(tiny):
    config = tiny(method="dpo", winner="surrogate")
    split = open_split(config.data.to_dict(), config.seed)
    images = examples.Examples(split)
    table = examples.extra_images(config.unlearn, images, ("surrogate",), config.seed)["surrogate"]
    assert len(table) == len(split.forget) == len(set(table.tolist()))
    assert np.isin(table, split.keep).all()
    rows = examples.unlearning_rows(images, seed=0, batch_size=4, extra={"surrogate": table})
    assert rows(0).extra["surrogate"].shape == (4, 8, 8, 1)
    assert rows(0).extra["surrogate"].dtype == np.uint8


def latent_images() -> examples.Examples:
    """Five keep and two forget images whose latents are numbers, drawn with noise."""
    position = np.array([0.0, 1.0, 2.0, 5.0, 9.0, 0.1, 5.2], np.float32).reshape(-1, 1, 1, 1)
    split = types.SimpleNamespace(keep=np.arange(5), forget=np.array([5, 6]), images=np.zeros((7, 8, 8, 1), np.uint8))
    latents = Latents(position, np.full_like(position, 1e-3), np.arange(7))
    return examples.Examples(split, latents, sample=True)


def test_neighbours_of_latents_are_those_of_their_means(monkeypatch):
    images = latent_images()
    unlearn = configured(method="retrack", neighbours__k=2).unlearn
    table = examples.extra_images(unlearn, images, ("neighbours",), 0)["neighbours"]
    np.testing.assert_array_equal(table, [[0, 1], [3, 2]])
    rows = examples.unlearning_rows(images, seed=0, batch_size=4, extra={"neighbours": table})
    whole = rows(1)
    near = whole.extra["neighbours"]
    assert near.shape == (4, 2, 1, 1, 1)
    wanted = np.where(whole.forget.x0[:, None] < 1, np.array([0, 1]).reshape(1, 2, 1, 1, 1), 0)
    wanted = np.where(whole.forget.x0[:, None] > 1, np.array([5, 2]).reshape(1, 2, 1, 1, 1), wanted)
    np.testing.assert_allclose(near, wanted, atol=1e-2)
    assert len(np.unique(near)) == near.size  # every use is a draw of its own
    monkeypatch.setattr("jax.process_count", lambda: 2)
    parts = []
    for process in range(2):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        parts.append(rows(1).extra["neighbours"])
    np.testing.assert_array_equal(np.concatenate(parts), near)


def test_copies_among_the_neighbours_are_refused():
    images = latent_images()
    unlearn = configured(method="retrack", neighbours__k=2, neighbours__copy_rms=0.2).unlearn
    with pytest.raises(ValueError, match="2 keep images are copies"):
        examples.extra_images(unlearn, images, ("neighbours",), 0)
    # What is seen before anything runs: images 0 and 5 as pixels.
    images.split.near_duplicates = NearDuplicates(np.array([0]), np.array([5]), np.array([0.01]))
    config = configured(method="retrack", neighbours__k=6)
    few, near = data_summary.neighbour_problems(config, images.split, None)
    assert "there are only 5 keep images" in few
    assert "1 keep images are that close" in near
    config.unlearn.neighbours.copy_rms, config.unlearn.neighbours.k = 0.0, 5
    assert data_summary.neighbour_problems(config, images.split, None) == []
    assert data_summary.neighbour_problems(configured(), images.split, None) == []


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_mix_images_need_one_text(method):
    mixes = method in ("siss", "bernoulli", "retrack", "surrogate", "dpo")
    split = types.SimpleNamespace(keep=[0], forget=[1], captions=("a cat", "a dog"))
    source = types.SimpleNamespace(takes_text=True, text_encoder=0, tokenizer=0)
    assert len(data_summary.text_problems(configured(method=method), split, source)) == mixes
    assert data_summary.text_problems(configured(method=method, prompt="a pet"), split, source) == []


# As processes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two models of a few steps, for every launch below."""
    folders = []
    for steps in (18, 20):
        workdir = tmp_path_factory.mktemp("runs") / str(steps)
        done = run("train.main", *TINY, f"--config.base.num_steps={steps}", "--mode=base", f"--workdir={workdir}")
        assert done.returncode == 0, done.stderr
        folders.append(workdir / "models" / "base")
    return folders


def launch_flags(base, method: str) -> list[str]:
    flags = [f"--config.base.path={base[1]}", f"--config.unlearn.method={method}", "--mode=unlearn"]
    needed = {**NEEDED, "vdu_style": {"checkpoints": f"({str(base[0])!r},{str(base[1])!r})"}}.get(method, {})
    return flags + [f"--config.unlearn.{key.replace('__', '.')}={value}" for key, value in needed.items()]


def final_weights(workdir) -> bytes:
    return (workdir / "models" / "unlearned" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(base, tmp_path, method):
    flags = [*TINY, *launch_flags(base, method), "--config.unlearn.num_steps=3", f"--workdir={tmp_path / 'run'}"]
    done = run("train.main", *flags, **QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    source = (base[1] / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert final_weights(tmp_path / "run") != source
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = methods.make_objective(configured(method=method, **NEEDED.get(method, {})).unlearn, SCHEDULE, 1.0).terms
    assert {key for key in last if key.startswith("loss/")} == {f"loss/{term}" for term in wanted}


@pytest.mark.slow
def test_a_killed_run_with_everything_measured_ends_in_the_same_bits(base, tmp_path):
    flags = [
        *TINY,
        *launch_flags(base, "npo"),
        "--config.unlearn.num_steps=120",
        "--config.checkpoint.every=40",
        "--config.unlearn.guards.mask=fisher_ratio",
        "--config.unlearn.guards.anchor_weight=1e-3",
        "--config.unlearn.guards.reserve.capacity=0.05",
        "--config.unlearn.guards.reserve.recycle=False",
    ]
    done = run("train.main", *flags, f"--workdir={tmp_path / 'unbroken'}")
    assert done.returncode == 0, done.stderr
    workdir = tmp_path / "broken"
    process = start("train.main", *flags, f"--workdir={workdir}")
    checkpoints = workdir / "checkpoints" / "unlearn"
    while process.poll() is None and not (
        checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())
    ):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (workdir / "models" / "unlearned").exists()
    level = (workdir / prepare.MEASURED).read_bytes()
    done = run("train.main", *flags, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stdout
    assert (workdir / prepare.MEASURED).read_bytes() == level == (tmp_path / "unbroken" / prepare.MEASURED).read_bytes()
    assert final_weights(workdir) == final_weights(tmp_path / "unbroken")
