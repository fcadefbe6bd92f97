"""Samplers against published numbers and stored chains of diffusers; no torch needed."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import schedule as schedules
from jaxunlearn.io.schedulers import read_scheduler
from jaxunlearn.sampling import SamplerConfig, Trajectory, coefficients, example_keys, sample, timesteps, trajectory

LATENT = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
GOLDEN_ALPHAS = [
    ({}, [0.99989998, 0.52142298, 0.07779665, 4.0358304e-5]),
    (LATENT, [0.99914998, 0.67379230, 0.27633247, 4.6600951e-3]),
    ({"beta_schedule": "squaredcos_cap_v2"}, [0.99995869, 0.84588802, 0.49228504, 2.43e-9]),
    ({"rescale_betas_zero_snr": True}, [0.99989998, 0.51886052, 0.07524620, 0.0]),
]


def formula(params, x, t, cond=None):
    """The model of the stored chains."""
    return 0.3 * x + 0.01 * jnp.sin(t.astype(jnp.float32))[:, None, None, None]


def constant(params, x, t, cond=None):
    return jnp.full_like(x, 0.25)


def one_step(scheduler, t, t_prev, noise=0.0):
    x = jnp.full((1, 1, 1, 1), 0.5)
    steps = Trajectory(np.array([t]), np.array([t_prev]))
    z = jnp.full((1, 1, 1, 1, 1), noise)
    kind = scheduler.prediction_type
    return float(
        sample(constant, None, x, None, scheduler.schedule, scheduler.sampler, steps, noise=z, prediction_type=kind)[
            0, 0, 0, 0
        ]
    )


@pytest.mark.parametrize(("config", "expected"), GOLDEN_ALPHAS)
def test_golden_alphas(config, expected):
    table = read_scheduler(config).schedule.alphas_cumprod
    # The cosine table's last entry is published with three digits.
    np.testing.assert_allclose(table[[0, 250, 500]], expected[:3], rtol=1e-6)
    np.testing.assert_allclose(table[999], expected[3], rtol=2e-3 if expected[3] < 1e-8 else 1e-5)


def test_file_schedules_agree_with_the_library_schedules():
    pairs = [({}, schedules.linear()), (LATENT, schedules.scaled_linear())]
    pairs += [({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100}, schedules.cosine(100))]
    for config, mine in pairs:
        np.testing.assert_allclose(read_scheduler(config).schedule.alphas_cumprod, mine.alphas_cumprod, rtol=2e-5)


def test_golden_timesteps():
    assert timesteps(1000, 50).tolist() == list(range(980, -1, -20))
    assert timesteps(1000, 50, offset=1).tolist() == list(range(981, 0, -20))
    assert timesteps(1000, 50, "trailing").tolist() == list(range(999, 18, -20))
    linspace = timesteps(1000, 50, "linspace").tolist()
    assert linspace[:4] == [999, 979, 958, 938]
    assert linspace[-3:] == [41, 20, 0]
    assert timesteps(1000, 1000).tolist() == list(range(999, -1, -1))
    assert timesteps(10, 10).dtype == np.int32


@pytest.mark.parametrize(("n", "kwargs"), [(0, {}), (1001, {}), (1000, {"offset": 1}), (5, {"spacing": "trailling"})])
def test_timesteps_refuse(n, kwargs):
    with pytest.raises(ValueError, match="num_steps|beyond the schedule|did you mean 'trailing'"):
        timesteps(1000, n, **kwargs)


def test_ddim_leads_where_diffusers_leads():
    schedule = schedules.linear()
    steps = trajectory(schedule, SamplerConfig("ddim", timestep_spacing="trailing"), 30)
    assert steps.t[:3].tolist() == [999, 966, 932]
    assert steps.t_prev[:3].tolist() == [966, 933, 899]
    assert steps.t_prev[-1] == -1
    ddpm = trajectory(schedule, SamplerConfig("ddpm", timestep_spacing="trailing"), 30)
    assert ddpm.t_prev[:3].tolist() == [966, 932, 899]
    for n in (1, 7, 50, 300, 1000):
        steps = trajectory(schedule, SamplerConfig("ddim"), n)
        assert steps.t_prev.tolist() == [*steps.t[1:].tolist(), -1]


def test_golden_single_steps():
    # The published numbers carry the rounding of 1 - alphas_cumprod in float32.
    ddpm, ddim = read_scheduler({}), read_scheduler({"_class_name": "DDIMScheduler"})
    for t, expected in [(980, 0.41393271), (480, 0.49983089), (20, 0.48201310), (0, 0.49752467)]:
        np.testing.assert_allclose(one_step(ddpm, t, max(t - 20, -1)), expected, rtol=1e-5)
    for t, expected in [(980, 0.25933857), (480, 0.52354838), (0, 0.49752467)]:
        np.testing.assert_allclose(one_step(ddim, t, max(t - 20, -1)), expected, rtol=1e-5)
    free = read_scheduler({"_class_name": "DDIMScheduler", "clip_sample": False})
    np.testing.assert_allclose(one_step(free, 980, 960), 0.55420149, rtol=1e-5)
    for t, expected in [(981, 0.53061284), (481, 0.50912275), (1, 0.49717836)]:
        np.testing.assert_allclose(one_step(read_scheduler(LATENT), t, max(t - 20, -1)), expected, rtol=1e-5)


def test_golden_variances():
    small, large = read_scheduler({}), read_scheduler({"variance_type": "fixed_large"})
    for scheduler, t, expected in [
        (small, 980, 0.32460523),
        (large, 980, 0.32461447),
        (small, 20, 9.84293e-5),
        (large, 20, 0.00616527),
    ]:
        table = coefficients(scheduler.schedule, scheduler.sampler, Trajectory(np.array([t]), np.array([t - 20])))
        np.testing.assert_allclose(table["to_noise"] ** 2, expected, rtol=1e-5)
    for scheduler in (small, large):
        table = coefficients(scheduler.schedule, scheduler.sampler, Trajectory(np.array([0]), np.array([-1])))
        assert table["to_noise"] == 0


@pytest.mark.parametrize(
    ("prediction_type", "expected"), [("epsilon", 0.93188362), ("v_prediction", -0.10061830), ("sample", 0.25)]
)
def test_golden_predicted_images(prediction_type, expected):
    # A ddim step past the end returns the predicted image itself.
    scheduler = read_scheduler(
        {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": prediction_type}
    )
    np.testing.assert_allclose(one_step(scheduler, 500, -1), expected, rtol=2e-6)


def golden_cases(repository):
    with np.load(repository / "tests" / "golden" / "schedulers.npz") as file:
        arrays = dict(file)
    names = sorted({key.split("/")[0] for key in arrays} - {"header"})
    assert {"ddpm50", "ddim50", "pndm50_latent"} <= set(names)
    return [
        (n, json.loads(str(arrays[f"{n}/config"])), *(arrays[f"{n}/{k}"] for k in ("x_start", "noise", "x")))
        for n in names
    ]


def test_golden_chains(repository):
    """Chains of diffusers with the same noise: the end, and the state after a few steps."""
    for name, case, x_start, noise, expected in golden_cases(repository):
        schedule, sampler, kind, _ = read_scheduler(case["scheduler"])
        sampler = SamplerConfig(**{**vars(sampler), "eta": case["eta"]})
        steps = trajectory(schedule, sampler, case["steps"])
        assert len(steps.t) == len(expected), name
        for n in {min(3, len(steps.t)), len(steps.t)}:
            part = Trajectory(steps.t[:n], steps.t_prev[:n])
            z = None if sampler.kind == "pndm" else noise[:n]
            x = sample(formula, None, x_start, None, schedule, sampler, part, noise=z, prediction_type=kind)
            error = np.abs(x - expected[n - 1]).max() / max(1.0, np.abs(expected[n - 1]).max())
            assert error < 1e-5, (name, n, error)


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "pndm"])
def test_the_exact_noise_of_one_image_leads_back_to_it(kind):
    """For data that is one image the best prediction is known, and every chain ends at that image."""
    schedule = schedules.linear(100)
    image = np.random.default_rng(0).uniform(-0.9, 0.9, (1, 4, 4, 2)).astype(np.float32)

    def predict(params, x, t, cond):
        alpha, sigma = schedule.alpha(t)[:, None, None, None], schedule.sigma(t)[:, None, None, None]
        return (x - alpha * image) / sigma

    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
    config = SamplerConfig(kind)
    end = sample(predict, None, x, jax.random.key(1), schedule, config, trajectory(schedule, config, 100))
    np.testing.assert_allclose(end, np.broadcast_to(image, end.shape), atol=1e-4)


def test_ddpm_with_the_large_variance_keeps_standard_normal_data():
    """For standard normal data the best prediction is ``sigma x`` and beta is the exact variance of a step."""
    schedule = schedules.linear(200, 5e-4, 0.1)

    def predict(params, x, t, cond):
        return schedule.sigma(t)[:, None, None, None] * x

    x = jax.random.normal(jax.random.key(0), (1, 100, 100, 1))
    config = SamplerConfig("ddpm", clip_sample=False, variance_type="fixed_large")
    end = sample(predict, None, x, jax.random.key(1), schedule, config, trajectory(schedule, config, 200))
    assert abs(float(end.std()) - 1) < 0.02
    assert abs(float(end.mean())) < 0.03


def test_ddim_with_eta_one_is_ddpm():
    schedule = schedules.linear(100)
    x, noise = np.random.default_rng(0).standard_normal((2, 2, 3, 1)), None
    noise = np.random.default_rng(1).standard_normal((10, *x.shape)).astype(np.float32)
    ends = []
    for config in (SamplerConfig("ddpm", clip_sample=False), SamplerConfig("ddim", clip_sample=False, eta=1.0)):
        steps = trajectory(schedule, config, 10)
        ends.append(sample(formula, None, x.astype(np.float32), None, schedule, config, steps, noise=noise))
    np.testing.assert_allclose(ends[0], ends[1], atol=2e-6)


def test_chain_from_the_middle_and_arbitrary_lists():
    schedule, config = schedules.linear(), SamplerConfig("ddpm")
    whole, noise = (
        np.arange(250, -1, -1),
        np.random.default_rng(0).standard_normal((251, 2, 2, 2, 1)).astype(np.float32),
    )
    x = noise[0] * 0.7
    end = sample(formula, None, x, None, schedule, config, whole, noise=noise)
    # Two halves, the first ending where the second starts, are the whole.
    first = Trajectory(whole[:100], whole[1:101])
    middle = sample(formula, None, x, None, schedule, config, first, noise=noise[:100])
    np.testing.assert_allclose(
        sample(formula, None, middle, None, schedule, config, whole[100:], noise=noise[100:]), end, atol=1e-6
    )
    assert np.all(np.isfinite(sample(formula, None, x, None, schedule, SamplerConfig("ddim"), [700, 13, 4])))


def test_last_step_without_set_alpha_to_one():
    schedule = schedules.linear()
    a, ap = schedule.alphas_cumprod[[20, 0]]
    free = SamplerConfig("ddim", clip_sample=False, set_alpha_to_one=False)
    x0 = (0.5 - np.sqrt(1 - a) * 0.25) / np.sqrt(a)
    got = sample(constant, None, jnp.full((1, 1, 1, 1), 0.5), None, schedule, free, [20])
    np.testing.assert_allclose(got, np.sqrt(ap) * x0 + np.sqrt(1 - ap) * 0.25, rtol=1e-6)


def test_jit_equals_eager_and_parameters_are_arguments():
    schedule, config = schedules.linear(50), SamplerConfig("ddpm")
    steps = trajectory(schedule, config, 10)
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))

    def run(scale, x, key):
        return sample(lambda p, x, t, cond: p * x + cond[:, None, None, None], scale, x, key, schedule, config, steps,
                      cond=jnp.arange(2.0) / 10)  # fmt: skip

    key = jax.random.key(3)
    np.testing.assert_allclose(jax.jit(run)(0.4, x, key), run(0.4, x, key), atol=1e-6)
    grad = jax.grad(lambda scale: jax.jit(run)(scale, x, key).sum())(0.4)
    assert np.isfinite(grad)
    assert grad != 0
    with pytest.raises(ValueError, match="known when the function is traced"):
        jax.jit(lambda steps: sample(formula, None, x, key, schedule, config, steps))(steps.t)


@pytest.mark.slow
def test_keys_per_example_do_not_depend_on_the_batches():
    schedule, config = schedules.linear(50), SamplerConfig("ddpm")
    steps = trajectory(schedule, config, 5)
    x = jax.random.normal(jax.random.key(0), (4, 3, 3, 1))
    keys = example_keys(jax.random.key(7), np.arange(4))

    def run(x, keys):
        return sample(formula, None, x, keys, schedule, config, steps)

    whole = run(x, keys)
    np.testing.assert_allclose(jnp.concatenate([run(x[:1], keys[:1]), run(x[1:], keys[1:])]), whole, atol=1e-6)
    one_key = run(x, jax.random.key(7))
    np.testing.assert_array_equal(one_key, run(x, jax.random.key(7)))
    assert not np.allclose(one_key, run(x, jax.random.key(8)))
    raw = jax.random.PRNGKey(7)
    assert np.all(np.isfinite(run(x, raw)))
    np.testing.assert_allclose(run(x, example_keys(raw, np.arange(4))), whole, atol=1e-6)
    with pytest.raises(ValueError, match="one for each of the 4"):
        run(x, keys[:3])


def test_sample_refuses():
    schedule, config = schedules.linear(), SamplerConfig("ddpm")
    x = jnp.zeros((1, 2, 2, 1))
    for bad, match in [
        ([0, 1], "descend"),
        ([5, 5], "descend"),
        ([3, -1], "descend"),
        ([], "non-empty"),
        ([0.5], "integers"),
        (Trajectory(np.array([5]), np.array([5])), "descend"),
        ([1000, 3], "beyond"),
    ]:
        with pytest.raises(ValueError, match=match):
            sample(formula, None, x, None, schedule, config, bad, noise=jnp.zeros((len(bad), 1, 2, 2, 1)))
    with pytest.raises(ValueError, match="give a key"):
        sample(formula, None, x, None, schedule, config, [3])
    with pytest.raises(ValueError, match="noise of shape"):
        sample(formula, None, x, None, schedule, config, [3], noise=x)
    with pytest.raises(ValueError, match="did you mean 'v_prediction'"):
        sample(formula, None, x, None, schedule, SamplerConfig("ddim"), [3], prediction_type="v_predict")
    zero = schedules.zero_terminal_snr(schedule)
    with pytest.raises(ValueError, match="zero signal"):
        sample(formula, None, x, None, zero, SamplerConfig("ddim"), [999, 3])
    assert np.all(
        np.isfinite(
            sample(formula, None, x, None, zero, SamplerConfig("ddim"), [999, 3], prediction_type="v_prediction")
        )
    )
    with pytest.raises(ValueError) as error:
        SamplerConfig(
            "dddim", clip_sample_range=0, variance_type="learned", timestep_spacing="x", steps_offset=-1, eta=2
        )
    assert len(str(error.value).splitlines()) == 6
    assert "did you mean 'ddim'" in str(error.value)
