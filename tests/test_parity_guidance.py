"""Chains of 50 steps and guidance against loops written with diffusers' schedulers and torch."""

from __future__ import annotations

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.guidance import classifier_free
from jaxunlearn.io.schedulers import read_scheduler
from jaxunlearn.sampling import sample, trajectory
from jaxunlearn.schedule import Schedule

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False} | SCALED
NOT_OF = {
    "DDPMScheduler": {"set_alpha_to_one"},
    "DDIMScheduler": set(),
    "PNDMScheduler": {"clip_sample"},
}
SETTINGS = {
    "stable diffusion": SD,
    "defaults": {},
    "trailing": SCALED | {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True},
    "linspace": {"timestep_spacing": "linspace", "num_train_timesteps": 400},
}
B, H, C, N, D = 2, 3, 4, 5, 6


@contextlib.contextmanager
def drawn(z):
    """diffusers' DDPM scheduler takes no noise, so its draw is replaced."""
    from diffusers.schedulers import scheduling_ddpm

    with mock.patch.object(scheduling_ddpm, "randn_tensor", return_value=z):
        yield


def pair(name, settings, kind):
    """Their scheduler and ours, of the same keys."""
    keys = {key: value for key, value in settings.items() if key not in NOT_OF[name]} | {"prediction_type": kind}
    keys |= {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    return getattr(diffusers, name)(**keys), read_scheduler(keys | {"_class_name": name})


def network(xp, weights, x, t, text):
    """A small network of x [B,H,H,C], t [B] and text [B,N,D], the same in numpy's language for jax and torch."""
    pooled = xp.tanh(text.mean(1) @ weights["text"])[:, None, None, :]
    when = xp.sin(t[:, None] * weights["time"])[:, None, None, :]
    hidden = xp.tanh(x @ weights["in"] + when + pooled)
    return hidden @ weights["out"]


def make_weights(rng, width=16):
    shapes = {"text": (D, width), "time": (width,), "in": (C, width), "out": (width, C)}
    scales = {"text": 1.0, "time": 0.01, "in": 0.5, "out": 0.1}
    return {name: (scales[name] * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def models(schedule, kind, weights):
    """Best prediction for standard normal data plus the network, as (ours, theirs): the network alone would be chaotic."""
    abar = schedule.alphas_cumprod
    best = (np.sqrt(1 - abar) if kind == "epsilon" else 0 * abar).astype(np.float32)
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}

    def ours(params, x, t, cond):
        return jnp.asarray(best)[t][:, None, None, None] * x + network(jnp, params, x, t.astype(x.dtype), cond)

    def theirs(x, t, text):
        times = torch.full((len(x),), float(t), dtype=x.dtype)
        return float(best[int(t)]) * x + network(torch, tensors, x, times, text)

    return ours, theirs


def walk(scheduler, steps, model, x, noise):
    """A loop with their scheduler."""
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(x)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            with drawn(torch.from_numpy(noise[min(i, steps - 1)])):
                x = scheduler.step(model(x, t), t, x).prev_sample
    return x.numpy()


def difference(got, expected):
    """The largest one, relative to the scale of what is expected."""
    return float(np.abs(np.asarray(got) - expected).max() / max(1.0, np.abs(expected).max()))


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    shapes = {"x": (B, H, H, C), "noise": (50, B, H, H, C), "text": (B, N, D), "null": (1, N, D)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} | {
        "weights": make_weights(rng)
    }


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", NOT_OF)
def test_chains_of_50_steps(name, settings, kind, inputs):
    scheduler, mine = pair(name, SETTINGS[settings], kind)
    ours, theirs = models(mine.schedule, kind, inputs["weights"])
    text = torch.from_numpy(inputs["text"])
    chains = {
        "network": (ours, lambda x, t: theirs(x, t, text)),
        "formula": (
            lambda p, x, t, cond: 0.3 * x + 0.1 * jnp.sin(t.astype(jnp.float32))[:, None, None, None],
            lambda x, t: 0.3 * x + 0.1 * torch.sin(t.float()),
        ),
    }
    steps = trajectory(mine.schedule, mine.sampler, 50)
    noise = None if mine.sampler.deterministic else inputs["noise"]
    for label, (model, reference) in chains.items():
        expected = walk(scheduler, 50, reference, inputs["x"], inputs["noise"])
        got = jax.jit(
            lambda params, x, model=model: sample(
                model, params, x, None, mine.schedule, mine.sampler, steps,
                cond=inputs["text"], noise=noise, prediction_type=kind,
            )
        )(inputs["weights"], inputs["x"])  # fmt: skip
        error = difference(got, expected)
        assert error < 1e-5, (label, error)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", NOT_OF)
def test_guidance(name, kind, inputs):
    """Stable Diffusion's loop: both conditions in one batch, the unconditional half first, scale 7.5."""
    scheduler, mine = pair(name, SD, kind)
    ours, theirs = models(mine.schedule, kind, inputs["weights"])
    null, text = (torch.from_numpy(inputs[part]) for part in ("null", "text"))
    both = torch.cat([null.expand(B, -1, -1), text])

    def guided(x, t):
        without, following = theirs(torch.cat([x, x]), t, both).chunk(2)
        return without + 7.5 * (following - without)

    expected = walk(scheduler, 50, guided, inputs["x"], inputs["noise"])
    steps = trajectory(mine.schedule, mine.sampler, 50)
    got = jax.jit(
        lambda params, x, cond, null: sample(
            classifier_free(ours, 7.5, null), params, x, None, mine.schedule, mine.sampler, steps, cond=cond,
            noise=None if mine.sampler.deterministic else inputs["noise"], prediction_type=kind,
        )
    )(inputs["weights"], inputs["x"], inputs["text"], inputs["null"])  # fmt: skip
    error = difference(got, expected)
    assert error < 1e-5
    plain = walk(scheduler, 50, lambda x, t: theirs(x, t, text), inputs["x"], inputs["noise"])
    assert difference(plain, expected) > 0.01


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_pndm_in_64_bit(kind, spacing, x64):
    """With one table and one dtype nothing but the formulas is left."""
    for n in (1, 2, 3, 4, 5, 11, 30, 1000):
        scheduler, mine = pair("PNDMScheduler", {"timestep_spacing": spacing}, kind)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
        schedule = Schedule(scheduler.alphas_cumprod.numpy())
        scheduler.set_timesteps(n)
        steps = trajectory(schedule, mine.sampler, n)
        assert steps.t.tolist() == scheduler.timesteps.tolist()
        x = np.random.default_rng(n).standard_normal((1, 2, 2, 1))
        expected = walk(
            scheduler, n, lambda x, t: torch.tanh(0.3 * x + 0.1 * torch.sin(t.double())), x, np.zeros((n, 1))
        )
        got = sample(
            lambda p, x, t, cond: jnp.tanh(0.3 * x + 0.1 * jnp.sin(t.astype(jnp.float64))[:, None, None, None]),
            None, x, None, schedule, mine.sampler, steps, prediction_type=kind,
        )  # fmt: skip
        assert difference(got, expected) < 1e-11, n


@pytest.mark.parametrize("name", NOT_OF)
@pytest.mark.parametrize("keys", [{}, {"steps_offset": 0}, {"steps_offset": 1}, {"clip_sample": True}, SD])
def test_stable_diffusion_corrects_the_same(name, keys):
    """What their pipeline makes of a scheduler's config; its other parts are left out."""
    config = keys | {"_class_name": name, "skip_prk_steps": True}
    scheduler = getattr(diffusers, name).from_config(config)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    pipeline = diffusers.StableDiffusionPipeline(scheduler=scheduler, requires_safety_checker=False, **parts)
    theirs, mine = pipeline.scheduler.config, read_scheduler(config, pipeline="StableDiffusionPipeline")
    plain = getattr(diffusers, name).from_config(config).config
    assert theirs["steps_offset"] == mine.sampler.steps_offset
    assert theirs.get("clip_sample", False) == mine.sampler.clip_sample
    changed = [key for key in ("steps_offset", "clip_sample") if theirs.get(key) != plain.get(key)]
    assert [note.split()[0] for note in mine.notes] == changed
