"""Guards: what is frozen stays, what is bounded stays within, under any optimizer, on any number of devices, after resume."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import init_state, make_train_step
from jaxunlearn.combine import relative_norm, tree_norm
from jaxunlearn.guards import (
    GUARDS,
    anchor,
    frozen_units,
    l2_ball,
    mask_updates,
    plasticity_reserve,
    unit_capacity,
    unit_drift,
)
from jaxunlearn.io.checkpoint import Checkpoints
from jaxunlearn.methods import make_objective
from jaxunlearn.parallel import make_mesh, pmap_step, replicate, sharded_step
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

OPTIMIZERS = {"sgd": optax.sgd(1e-2), "adam": optax.adam(1e-2), "adamw": optax.adamw(1e-2, weight_decay=1e-2)}
KEY = jax.random.key(3)


def weights(seed=0):
    """A kernel, a convolution, a bias, a scalar."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (5, 4), "conv": (3, 3, 2, 6), "bias": (6,), "scale": ()}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def mask_of(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.random(x.shape) < 0.5, params)


def run(tx, params, steps, *, noise=1.0, state=None, first=0, ref_params=None, watch=lambda p: ()):
    """Noisy steps as one scan; returns the last parameters, the state, and what ``watch`` saw after every step."""
    tx = optax.with_extra_args_support(tx)
    rng = np.random.default_rng(first)
    grads = {k: np.float32(noise * rng.normal(size=(steps, *v.shape)) + 0.5) for k, v in params.items()}

    def body(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params, ref_params=ref_params)
        params = optax.apply_updates(params, updates)
        return (params, state), watch(params)

    @jax.jit
    def whole(params, state):
        state = tx.init(params) if state is None else state
        return jax.lax.scan(body, (params, state), grads)

    (params, state), seen = whole(params, state)
    return jax.tree.map(np.asarray, params), state, jax.tree.map(np.asarray, seen)


# Masks.


def test_masked_weights_are_bit_identical_after_a_hundred_steps_with_decay():
    params = weights()
    mask = mask_of(params)
    new, _, _ = run(optax.chain(OPTIMIZERS["adamw"], mask_updates(mask)), params, 100)
    for k, m in mask.items():
        assert np.array_equal(new[k][~m], np.asarray(params[k])[~m])
        assert np.all(new[k][m] != np.asarray(params[k])[m])


def test_masking_the_gradient_instead_lets_masked_weights_decay():
    """1 becomes .9995 in five steps of AdamW with rate 1e-2 and decay 1e-2: the reason to mask the update."""
    params = {"w": jnp.ones(2)}
    tx = optax.chain(mask_updates({"w": np.array([True, False])}), optax.adamw(1e-2, weight_decay=1e-2))
    new, _, _ = run(tx, params, 5)
    np.testing.assert_allclose(new["w"][1], 0.9995, atol=1e-6)


def test_a_full_mask_is_the_identity_and_an_update_of_nan_stays_out():
    params = weights()
    plain, _, _ = run(OPTIMIZERS["adam"], params, 3)
    full, _, _ = run(
        optax.chain(OPTIMIZERS["adam"], mask_updates(jax.tree.map(lambda x: np.ones(x.shape, bool), params))), params, 3
    )
    assert all(np.array_equal(plain[k], full[k]) for k in plain)
    tx = mask_updates({"w": np.array([1, 0])})
    updates, _ = tx.update({"w": jnp.full(2, jnp.nan)}, tx.init({"w": jnp.ones(2)}))
    assert np.isnan(updates["w"][0])
    assert updates["w"][1] == 0


# The anchor.


@pytest.mark.parametrize("with_precision", [False, True])
def test_the_anchor_is_the_gradient_of_its_quadratic_loss(with_precision):
    params, center, precision = weights(0), weights(1), jax.tree.map(jnp.abs, weights(2))
    used = precision if with_precision else jax.tree.map(jnp.ones_like, params)

    def loss(p):
        parts = jax.tree.map(lambda p, c, f: jnp.sum(f * (p - c) ** 2), p, center, used)
        return 0.3 / 2 * sum(jax.tree.leaves(parts))

    tx = anchor(0.3, center=center, precision=precision if with_precision else None)
    grads = weights(3)
    got, _ = tx.update(grads, tx.init(params), params)
    tm.close(got, jax.tree.map(jnp.add, grads, jax.grad(loss)(params)), 1e-5)


def test_the_anchor_pulls_back():
    params = weights()
    distance = lambda p: tree_norm(jax.tree.map(jnp.subtract, p, params))  # noqa: E731
    free, _, _ = run(optax.sgd(1e-2), params, 200)
    held, _, _ = run(optax.chain(anchor(5.0), optax.sgd(1e-2)), params, 200)
    assert distance(held) < 0.2 * distance(free)


# The ball.


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_ball_is_never_left(name, relative):
    params = weights()
    bound = 0.05 * float(tree_norm(params)) if relative else 0.4
    distance = lambda p: tree_norm(jax.tree.map(jnp.subtract, p, params))  # noqa: E731
    tx = optax.chain(OPTIMIZERS[name], l2_ball(0.05 if relative else 0.4, relative=relative))
    _, _, seen = run(tx, params, 200, watch=distance)
    assert seen.max() <= bound * (1 + 1e-5)
    assert seen[-1] > 0.9 * bound
    # Before it is reached nothing is changed; a ball that is large enough is the identity.
    free, _, _ = run(OPTIMIZERS[name], params, 20)
    wide, _, _ = run(optax.chain(OPTIMIZERS[name], l2_ball(1e3)), params, 20)
    assert all(np.array_equal(free[k], wide[k]) for k in free)


def test_the_ball_projects_and_recovers_a_start_outside():
    tx = l2_ball(1.0, center={"w": jnp.zeros(2)})
    params = {"w": jnp.array([3.0, 4.0])}
    updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
    np.testing.assert_allclose(params["w"] + updates["w"], [0.6, 0.8], rtol=1e-6)
    # No step at the centre: no division by the distance 0.
    at_centre = {"w": jnp.zeros(2)}
    updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init(at_centre), at_centre)
    assert np.all(updates["w"] == 0)


# The plasticity reserve.


def used_share(center, **options):
    """The largest drift over capacity of all units that have one."""
    limits = unit_capacity(center, **options)

    def watch(params):
        shares = jax.tree.map(
            lambda d, c: jnp.max(jnp.where(c > 0, d / jnp.where(c > 0, c, 1), 0)), unit_drift(params, center), limits
        )
        return jnp.max(jnp.stack(jax.tree.leaves(shares)))

    return watch


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_unit_drifts_beyond_its_capacity(name):
    """Nor does a moving average of the weights, after any of 500 noisy steps."""
    params = weights()
    tx = optax.chain(OPTIMIZERS[name], plasticity_reserve(0.05))
    share = used_share(params, capacity=0.05)
    new, _, (seen, path) = run(tx, params, 500, watch=lambda p: (share(p), p))
    assert seen.max() <= 1 + 1e-5
    assert seen[-1] > 0.9
    averages, current = [], jax.tree.map(np.asarray, params)
    for i in range(500):
        current = {k: 0.9 * v + np.float32(0.1) * path[k][i] for k, v in current.items()}
        averages.append(current)
    of_averages = np.asarray(jax.jit(jax.vmap(share))(jax.tree.map(lambda *x: np.float32(np.stack(x)), *averages)))
    assert of_averages.max() <= 1 + 1e-5
    assert of_averages[-1] > 0.5
    # Per leaf at most twice the capacity times its magnitude.
    for k, v in params.items():
        assert np.abs(new[k] - v).sum() <= 2 * 0.05 * np.abs(v).sum() * (1 + 1e-5)


def test_capacities_are_those_of_the_definition():
    params = jax.tree.map(np.asarray, weights())
    limits = jax.tree.map(np.asarray, unit_capacity(params, 0.1, 0.02))
    kernel = np.abs(params["kernel"]).sum(axis=0)
    np.testing.assert_allclose(
        limits["kernel"].ravel(), np.maximum(0.1 * np.maximum(kernel, kernel.mean()), 0.02 * 5), rtol=1e-6
    )
    conv = np.abs(params["conv"]).sum(axis=(0, 1, 2))
    np.testing.assert_allclose(
        limits["conv"].ravel(), np.maximum(0.1 * np.maximum(conv, conv.mean()), 0.02 * 18), rtol=1e-6
    )
    bias = np.abs(params["bias"])
    np.testing.assert_allclose(limits["bias"], np.maximum(0.1 * np.maximum(bias, bias.mean()), 0.02), rtol=1e-6)
    # Another unit axis: the inputs of the kernel.
    rows = np.asarray(unit_capacity({"k": params["kernel"]}, 0.1, unit_axis=0)["k"]).ravel()
    norms = np.abs(params["kernel"]).sum(axis=1)
    np.testing.assert_allclose(rows, 0.1 * np.maximum(norms, norms.mean()), rtol=1e-6)


def test_capacity_zero_freezes_and_a_large_one_is_the_identity():
    params = weights()
    frozen, _, _ = run(optax.chain(OPTIMIZERS["adamw"], plasticity_reserve(0.0)), params, 20)
    assert all(np.array_equal(frozen[k], params[k]) for k in params)
    free, _, _ = run(OPTIMIZERS["adamw"], params, 20)
    wide, _, _ = run(optax.chain(OPTIMIZERS["adamw"], plasticity_reserve(1e4)), params, 20)
    assert all(np.array_equal(free[k], wide[k]) for k in free)


def test_beyond_the_capacity_only_moves_inward_pass():
    center = {"k": jnp.ones((2, 2))}
    params = {"k": jnp.array([[3.0, 1.0], [1.0, 1.0]])}  # the first unit has drifted by 2, its capacity is .1
    tx = plasticity_reserve(0.05, center=center)
    state = tx.init(params)
    out, _ = tx.update({"k": jnp.full((2, 2), 0.01)}, state, params)
    assert np.all(out["k"][:, 0] == 0)
    np.testing.assert_allclose(out["k"][:, 1], 0.01)
    back, _ = tx.update({"k": jnp.array([[-1.0, 0.0], [0.0, 0.0]])}, state, params)
    np.testing.assert_allclose(back["k"], [[-1.0, 0.0], [0.0, 0.0]])


def test_before_the_learning_rate_the_bound_does_not_hold():
    """Momentum and rate come after it there: hence the guard is last in the chain."""
    params = weights()
    tx = optax.chain(plasticity_reserve(0.05), OPTIMIZERS["adam"])
    _, _, seen = run(tx, params, 300, watch=used_share(params, capacity=0.05))
    assert seen.max() > 1.5


def test_a_leaf_of_zeros_is_frozen_unless_it_has_a_floor():
    params = {"new": jnp.zeros((3, 2)), "bias": jnp.zeros(4), "old": jnp.ones((2, 2))}
    assert frozen_units(params) == 2 + 4
    assert frozen_units(params, floor=0.01) == 0
    stuck, _, _ = run(optax.chain(optax.adam(1e-2), plasticity_reserve(0.05)), params, 10)
    assert np.all(stuck["new"] == 0)
    assert np.all(stuck["bias"] == 0)
    freed, _, seen = run(
        optax.chain(optax.adam(1e-2), plasticity_reserve(0.05, floor=0.01)),
        params,
        50,
        watch=used_share(params, capacity=0.05, floor=0.01),
    )
    assert np.all(freed["bias"] != 0)
    assert seen.max() <= 1 + 1e-5


def test_without_recycling_the_path_is_bounded():
    params = weights()
    tx = optax.chain(optax.adam(1e-2), plasticity_reserve(0.05, recycle=False))
    new, state, seen = run(tx, params, 300, noise=5.0, watch=lambda p: p)
    for k, limit in unit_capacity(params, 0.05).items():
        path = np.concatenate([np.asarray(params[k])[None], seen[k]])
        length = np.abs(np.diff(path, axis=0))
        axes = (0,) if length.ndim < 3 else tuple(range(length.ndim - 1))
        assert np.all(length.sum(axis=axes) <= np.ravel(limit).reshape(length.sum(axis=axes).shape) * (1 + 1e-4))
    # Spent means spent: nothing moves any more.
    later, _, _ = run(tx, jax.tree.map(jnp.asarray, new), 5, noise=5.0, state=state, first=300)
    tm.close(later, new, 1e-5)


def test_without_recycling_no_old_weights_are_stored():
    """What is left is known from the first: of the parameters at init, or of a tree that is given."""
    params, center = weights(), weights(1)
    for given, old in ((None, params), (center, center)):
        state = plasticity_reserve(0.05, recycle=False, center=given).init(params)
        assert state.center is None
        tm.close(state.left, unit_capacity(old, 0.05), 1e-6)
    with pytest.raises(ValueError, match="center must be a tree of the structure"):
        plasticity_reserve(0.05, recycle=False, center={"k": jnp.ones(2)}).init(params)


# All of them.


def all_guards(params):
    return optax.chain(
        anchor(1e-2, precision=jax.tree.map(lambda x: jnp.abs(x) + 0.1, params)),
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-2),
        mask_updates(jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape) % 3 != 0, params)),
        l2_ball(0.2, relative=True),
        plasticity_reserve(0.05),
    )


@pytest.mark.slow
def test_guards_are_the_same_on_one_and_eight_devices_and_under_pmap():
    params = tm.params()
    tx, combine = all_guards(params), relative_norm(0.3)
    step = make_train_step(make_objective("siss", tm.SCHEDULE), combine, tm.predict, tx)
    batch, _ = tm.batch_and_draw(tm.arrays(16))
    results = []
    for devices in (1, 8):
        mesh = make_mesh(jax.devices()[:devices])
        run_step = sharded_step(step, tm.cheap_draw, mesh)
        state = replicate(init_state(params, tx, combine), mesh)
        for _ in range(3):
            state, _ = jax.block_until_ready(run_step(state, KEY, batch))
        assert run_step._cache_size() == 1
        results.append(jax.device_get(state.params))
    state = init_state(params, tx, combine)
    run_step = pmap_step(step, tm.cheap_draw)
    for _ in range(3):
        state, _ = jax.block_until_ready(run_step(state, KEY, batch))
    results.append(jax.device_get(state.params))
    assert tree_norm(jax.tree.map(np.subtract, results[0], params)) > 1e-3
    for other in results[1:]:
        tm.close(other, results[0], 2e-5)


def test_sharded_parameters_have_the_same_unit_norms():
    """Parameters split over devices, under automatic sharding: every guard gives the same update."""
    params, grads = {"k": weights()["conv"][..., :4].reshape(8, 9)}, {"k": weights(1)["conv"][..., :4].reshape(8, 9)}
    tx = optax.chain(l2_ball(0.05, relative=True), plasticity_reserve(0.01), anchor(0.1))
    state = tx.init(params)

    def update(grads, params):
        return tx.update(grads, state, params)[0]

    mesh = make_mesh()
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    want = jax.jit(update)(grads, params)
    got = jax.jit(update)(jax.device_put(grads, split), jax.device_put(params, split))
    tm.close(jax.block_until_ready(got), want, 1e-5)


@pytest.mark.slow
def test_resumed_runs_keep_the_old_weights(tmp_path):
    """States are arrays that checkpoint; a new init from moved parameters does not move the centre of a restored run."""
    params = jax.tree.map(jnp.asarray, tm.params())
    tx, combine = all_guards(params), relative_norm(0.3)
    state = init_state(params, tx, combine)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    grads = jax.tree.map(jnp.ones_like, params)
    for _ in range(3):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        state = state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {})
    checkpoints.wait()
    restored = checkpoints.restore(init_state(state.params, tx, combine)).state
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state)):
        assert x.dtype == y.dtype
        assert np.array_equal(x, y)
    reserve = restored.opt_state[-1]
    for k, v in params.items():
        assert np.array_equal(reserve.center[k], v)
        assert not np.array_equal(state.params[k], v)


@pytest.mark.parametrize("make", [anchor, l2_ball, plasticity_reserve])
def test_the_centre_may_be_the_frozen_parameters_of_the_training_state(make):
    params = jax.tree.map(jnp.asarray, tm.params())
    batch, draw = tm.batch_and_draw(tm.arrays(4))
    combine = relative_norm(0.3)
    results = []
    for center in (None, "ref_params", params):
        guard = make(0.02, center=center)
        tx = optax.chain(optax.sgd(1e-1), guard) if make is not anchor else optax.chain(guard, optax.sgd(1e-1))
        step = make_train_step(make_objective("siss", tm.SCHEDULE), combine, tm.predict, tx)
        state = init_state(params, tx, combine, ref=center == "ref_params")
        stored = len(jax.tree.leaves(state.opt_state))
        assert stored == (0 if isinstance(center, str) else len(params))
        for _ in range(2):
            state, _ = jax.jit(step)(state, batch, draw)
        results.append(state.params)
    tm.close(results[1], results[0], 1e-6)
    tm.close(results[2], results[0], 1e-6)
    guard = make(0.02, center="ref_params")
    with pytest.raises(ValueError, match="needs update.*ref_params"):
        guard.update(params, guard.init(params), params)


def test_a_donated_step_keeps_the_centre():
    params = jax.tree.map(jnp.asarray, tm.params())
    tx, combine = plasticity_reserve(0.05), relative_norm(0.1)
    step = make_train_step(make_objective("siss", tm.SCHEDULE), combine, tm.predict, optax.chain(optax.sgd(1e-2), tx))
    mesh = make_mesh(jax.devices()[:1])
    state = replicate(init_state(params, optax.chain(optax.sgd(1e-2), tx), combine), mesh)
    batch, _ = tm.batch_and_draw(tm.arrays(4))
    run_step = sharded_step(step, tm.cheap_draw, mesh)
    for _ in range(2):
        state, _ = jax.block_until_ready(run_step(state, KEY, batch))
    for k, v in tm.params().items():
        assert np.array_equal(state.opt_state[-1].center[k], v)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: anchor(-1.0), "weight >= 0, got -1"),
        (lambda: anchor(float("nan")), "weight >= 0"),
        (lambda: l2_ball(0.0), "radius > 0, got 0"),
        (lambda: plasticity_reserve(-0.1), "capacity >= 0"),
        (lambda: plasticity_reserve(0.1, floor=float("inf")), "floor >= 0"),
        (lambda: l2_ball(1.0, center="old"), "center must be None, a tree or 'ref_params'"),
        (lambda: plasticity_reserve(recycle=False, center="ref_params"), "before any ref_params.*take center=None"),
        (lambda: mask_updates({"w": np.array([0.5])}), "booleans"),
        (lambda: mask_updates({"w": np.ones(3, bool)}).init({"w": np.ones(2)}), "mask must be a tree of the structure"),
        (lambda: anchor(1.0, precision={"v": np.ones(2)}).init({"w": np.ones(2)}), "precision must be a tree"),
        (lambda: l2_ball(1.0, center={"w": np.ones(3)}).init({"w": np.ones(2)}), "center must be a tree"),
        (lambda: plasticity_reserve().update({}, plasticity_reserve().init({})), "needs the parameters"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_registry_is_complete():
    assert set(GUARDS) == {"anchor", "mask_updates", "l2_ball", "plasticity_reserve"}
