"""PNDM against published numbers, against the exact solution, and in the shapes that callers give it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import schedule as schedules
from jaxunlearn.io.schedulers import read_scheduler
from jaxunlearn.predictors import to_eps
from jaxunlearn.sampling import SamplerConfig, Trajectory, coefficients, sample, trajectory

SD = read_scheduler(
    {
        "_class_name": "PNDMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
)
# The image after call n, from 0.5 with the model 0.3 x + 0.01 sin(t).
GOLDEN = {1: 0.54203431, 2: 0.54190722, 3: 0.58721836, 4: 0.63497013, 5: 0.68291007, 6: 0.73222825, 51: 2.49028292}


def formula(params, x, t, cond=None):
    return 0.3 * x + 0.01 * jnp.sin(t.astype(x.dtype))[:, None, None, None]


def first(steps, n):
    return Trajectory(steps.t[:n], steps.t_prev[:n])


def test_golden_calls(x64):
    steps = trajectory(SD.schedule, SD.sampler, 50)
    for dtype in (jnp.float32, jnp.float64):
        for n, expected in GOLDEN.items():
            x = sample(
                formula, None, jnp.full((1, 1, 1, 1), 0.5, dtype), None, SD.schedule, SD.sampler, first(steps, n)
            )
            # The published last number carries the float32 rounding of 51 calls.
            np.testing.assert_allclose(x[0, 0, 0, 0], expected, **({"rtol": 6e-7} if n == 51 else {"atol": 1e-7}))


def test_golden_timesteps():
    steps = trajectory(SD.schedule, SD.sampler, 50)
    assert steps.t.tolist() == [981, 961, *range(961, 0, -20)]
    assert steps.t_prev.tolist() == [961, 961, *range(941, 0, -20), -1]
    assert trajectory(SD.schedule, SD.sampler, 1).t.tolist() == [1]
    assert trajectory(SD.schedule, SD.sampler, 2).t.tolist() == [501, 1, 1]


def test_the_model_is_called_once_more_than_there_are_steps():
    seen = []

    def predict(params, x, t, cond):
        jax.debug.callback(lambda t: seen.append(int(t)), t[0], ordered=True)
        return 0.3 * x

    steps = trajectory(SD.schedule, SD.sampler, 50)
    sample(predict, None, jnp.ones((2, 1, 1, 1)), None, SD.schedule, SD.sampler, steps)
    jax.effects_barrier()
    assert seen == steps.t.tolist()
    assert len(seen) == 51


def test_without_history_a_step_is_that_of_ddim(x64):
    """The first call, of noise and of v, in every spacing: the coefficients agree with DDIM's without clipping."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 2, 1)))
    for spacing in ("leading", "trailing", "linspace"):
        for kind in ("epsilon", "v_prediction"):
            ends = []
            for sampler in ("pndm", "ddim"):
                config = SamplerConfig(sampler, clip_sample=False, timestep_spacing=spacing, set_alpha_to_one=False)
                steps = first(trajectory(SD.schedule, config, 7), 1)
                ends.append(sample(formula, None, x, None, SD.schedule, config, steps, prediction_type=kind))
            np.testing.assert_allclose(*ends, rtol=1e-12)


def test_order_of_convergence(x64):
    """Data of N(0, s^2): the best prediction and the exact way from t = 999 to 199 are known. DDIM is of first order,
    PNDM of second.
    """
    s, schedule = 0.5, schedules.linear(1000, 1e-3, 0.02)
    spread = np.sqrt(schedule.alphas_cumprod * s**2 + 1 - schedule.alphas_cumprod)

    def predict(params, x, t, cond):
        return (schedule.sigma(t) / jnp.asarray(spread**2)[t])[:, None, None, None] * x

    def error(kind, n):
        config = SamplerConfig(kind, clip_sample=False, timestep_spacing="trailing")
        steps = trajectory(schedule, config, n)
        steps = first(steps, int(np.sum(steps.t_prev >= 199)))
        x = sample(predict, None, jnp.ones((1, 1, 1, 1)), None, schedule, config, steps)
        return abs(float(x[0, 0, 0, 0]) - spread[199] / spread[999])

    ddim, pndm = ([error(kind, n) for n in (100, 200)] for kind in ("ddim", "pndm"))
    assert 1.9 < ddim[0] / ddim[1] < 2.1
    assert 3.5 < pndm[0] / pndm[1] < 4.5
    assert pndm[0] < ddim[0] / 100


def test_v_combines_outputs_before_it_converts():
    """As in diffusers: a combination of v of several timesteps is not that of their noises."""
    steps = trajectory(SD.schedule, SD.sampler, 10)
    x = jnp.full((1, 1, 1, 1), 0.5)
    raw = sample(formula, None, x, None, SD.schedule, SD.sampler, steps, prediction_type="v_prediction")
    converted = sample(to_eps(formula, "v_prediction", SD.schedule), None, x, None, SD.schedule, SD.sampler, steps)
    assert 1e-3 < abs(float((raw - converted)[0, 0, 0, 0])) < 0.5


def test_lists_name_each_timestep_once():
    x = jnp.full((2, 2, 2, 1), 0.5)
    steps = trajectory(SD.schedule, SD.sampler, 20)
    whole = sample(formula, None, x, None, SD.schedule, SD.sampler, steps)
    plain = np.delete(steps.t, 1)
    np.testing.assert_array_equal(sample(formula, None, x, None, SD.schedule, SD.sampler, plain), whole)
    for custom in ([700, 300, 4], [700, 300], [700]):
        assert np.all(np.isfinite(sample(formula, None, x, None, SD.schedule, SD.sampler, custom)))
    for bad in (steps.t, [3, 3]):
        with pytest.raises(ValueError, match="descend strictly"):
            sample(formula, None, x, None, SD.schedule, SD.sampler, bad)
    with pytest.raises(ValueError, match="asks the second timestep twice"):
        sample(formula, None, x, None, SD.schedule, SD.sampler, Trajectory(plain, np.append(plain[1:], -1)))
    far = Trajectory(np.array([999, 700]), np.array([399, 700]))
    with pytest.raises(ValueError, match="timestep 1300 is beyond"):
        sample(formula, None, x, None, SD.schedule, SD.sampler, far)


def test_noise_and_keys_are_not_used_and_nothing_is_clipped():
    assert SamplerConfig("pndm", eta=1.0).deterministic
    steps = trajectory(SD.schedule, SD.sampler, 5)
    x = jnp.full((2, 2, 2, 1), 3.0)
    plain = sample(formula, None, x, None, SD.schedule, SD.sampler, steps)
    loud = dataclasses.replace(SD.sampler, clip_sample=True, clip_sample_range=0.1, eta=1.0)
    np.testing.assert_array_equal(sample(formula, None, x, jax.random.key(0), SD.schedule, loud, steps), plain)


def test_models_that_pndm_cannot_walk():
    steps = trajectory(SD.schedule, SD.sampler, 5)
    with pytest.raises(ValueError, match="'sample' does not go with pndm"):
        coefficients(SD.schedule, SD.sampler, steps, "sample")
    zero = schedules.zero_terminal_snr(SD.schedule)
    trailing = dataclasses.replace(SD.sampler, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="zero signal"):
        coefficients(zero, trailing, trajectory(zero, trailing, 5))
    table = coefficients(zero, trailing, trajectory(zero, trailing, 5), "v_prediction")
    assert all(np.all(np.isfinite(values)) for values in table.values())


@pytest.mark.slow
def test_jit_grad_and_devices():
    steps = trajectory(SD.schedule, SD.sampler, 6)
    x = jax.random.normal(jax.random.key(0), (8, 2, 2, 1))

    def run(scale, x):
        return sample(lambda p, x, t, cond: p * jnp.tanh(x), scale, x, None, SD.schedule, SD.sampler, steps)

    whole = jax.jit(run)(0.4, x)
    np.testing.assert_allclose(whole, run(0.4, x), atol=1e-6)
    np.testing.assert_allclose(jnp.concatenate([run(0.4, x[:3]), run(0.4, x[3:])]), whole, atol=1e-6)
    slope = jax.grad(lambda scale: jax.jit(run)(scale, x).sum())(0.4)
    np.testing.assert_allclose(slope, (run(0.41, x).sum() - run(0.39, x).sum()) / 0.02, rtol=2e-2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    divided = jax.jit(run, in_shardings=(None, rows), out_shardings=rows)(0.4, x)
    np.testing.assert_allclose(divided, whole, atol=1e-6)
    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P("data")))
    np.testing.assert_allclose(mapped(0.4, x), whole, atol=1e-6)


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "pndm"])
def test_with_kind_keeps_what_the_model_was_made_with(kind):
    own = SamplerConfig("ddim", False, 2.0, "fixed_large", "leading", 1, False, eta=0.5)
    other = own.with_kind(kind)
    assert other == dataclasses.replace(own, kind=kind, eta=0.0)
    schedule = schedules.linear()
    assert own.with_kind(kind, schedule, 50) == other
    # With as many steps as the schedule has, an offset would start beyond its end.
    every = own.with_kind(kind, schedule, 1000)
    assert every == dataclasses.replace(other, steps_offset=0)
    assert trajectory(schedule, every, 1000).t[0] == 999
    trailing = dataclasses.replace(own, timestep_spacing="trailing")
    assert trailing.with_kind(kind, schedule, 1000).steps_offset == 1


def test_with_kind_refuses():
    with pytest.raises(ValueError, match="unknown kind 'pdnm'; did you mean 'pndm'\\? known: ddpm, ddim, pndm"):
        SamplerConfig().with_kind("pdnm")
    with pytest.raises(ValueError, match="both schedule and num_steps"):
        SamplerConfig().with_kind("ddim", schedules.linear())
    with pytest.raises(ValueError, match="num_steps 0: must be between 1 and the schedule's 1000"):
        SamplerConfig().with_kind("ddim", schedules.linear(), 0)
