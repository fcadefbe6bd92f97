"""Measures of photographs: sums written out, invariants, white noise of known size; CLIP-IQA and the aesthetic score."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxunlearn.metrics import METRICS
from jaxunlearn.metrics.aesthetic import aesthetic, clip_inputs
from jaxunlearn.metrics.clip_iqa import clip_iqa, clip_iqa_inputs
from jaxunlearn.metrics.photographic import MEASURES, sharpness, too_small

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (3, 7, 10, 2), dtype=np.uint8)
UNIT = BYTES / 255.0


@functools.cache
def jitted(name):
    return jax.jit(MEASURES[name], compiler_options={"xla_backend_optimization_level": 0})


def by_loops(name, image):
    """The measure of one channel [H,W] with every sum written out."""
    height, width = image.shape
    inside = [(y, x) for y in range(1, height - 1) for x in range(1, width - 1)]
    if name == "sharpness":
        crosses = [
            image[y - 1, x] + image[y + 1, x] + image[y, x - 1] + image[y, x + 1] - 4 * image[y, x] for y, x in inside
        ]
        return np.var(crosses)
    if name == "total_variation":
        down = [abs(image[y + 1, x] - image[y, x]) for y in range(height - 1) for x in range(width)]
        across = [abs(image[y, x + 1] - image[y, x]) for y in range(height) for x in range(width - 1)]
        return np.mean(down) + np.mean(across)
    if name == "noise_sigma":
        mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
        total = sum(abs(np.sum(mask * image[y - 1 : y + 2, x - 1 : x + 2])) for y, x in inside)
        return np.sqrt(np.pi / 2) / (6 * (width - 2) * (height - 2)) * total
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["sharpness", "total_variation", "noise_sigma"])
def test_sums_written_out(name):
    wanted = [np.mean([by_loops(name, image[..., c]) for c in range(2)]) for image in UNIT]
    np.testing.assert_allclose(jitted(name)(BYTES), wanted, rtol=1e-5)


def test_high_band_against_the_full_spectrum():
    wanted = []
    for image in UNIT:
        power, high = 0.0, 0.0
        for channel in range(2):
            energy = np.abs(np.fft.fft2(image[..., channel])) ** 2
            for (k, l), value in np.ndenumerate(energy):
                fy, fx = (2 * min(i, n - i) / n for i, n in zip((k, l), image.shape))
                power += value * bool(k or l)
                high += value * (np.hypot(fy, fx) > 0.5)
        wanted.append(high / power)
    np.testing.assert_allclose(jitted("high_band_energy")(BYTES), wanted, rtol=1e-5)


@pytest.mark.parametrize("name", MEASURES)
def test_bytes_floats_and_jit_give_one_number(name):
    measure = MEASURES[name]
    found = measure(BYTES)
    assert found.shape == (3,)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, jitted(name)(UNIT.astype(np.float32)), rtol=1e-5)
    np.testing.assert_allclose(found, jitted(name)(BYTES), rtol=1e-5)
    np.testing.assert_allclose(found[1], jitted(name)(BYTES[[1, 1, 0]])[0], rtol=1e-5)  # pictures do not mix
    assert METRICS[name].fn is measure
    assert METRICS[name].needs == ()


@pytest.mark.parametrize("name", MEASURES)
def test_a_constant_picture_has_none(name):
    np.testing.assert_array_equal(jitted(name)(np.full((1, 9, 9, 3), 0.7, np.float32)), 0)


@pytest.mark.parametrize("sigma", [0.01, 0.1])
def test_noise_sigma_is_the_standard_deviation_of_white_noise(sigma):
    """On top of a plane, which the mask does not see."""
    y, x = np.mgrid[:128, :128] / 128
    picture = (0.2 + 0.4 * x + 0.1 * y)[None, :, :, None]
    noisy = picture + sigma * RNG.standard_normal((4, 128, 128, 1))
    np.testing.assert_allclose(jitted("noise_sigma")(noisy.astype(np.float32)), sigma, rtol=0.04)
    assert float(jitted("noise_sigma")(picture.astype(np.float32))[0]) < 1e-6


def test_scales():
    """Sharpness is quadratic in contrast, noise linear, the share of high frequencies does not know it."""
    x = UNIT.astype(np.float32)
    sharpness, noise_sigma, high = (jitted(name) for name in ("sharpness", "noise_sigma", "high_band_energy"))
    np.testing.assert_allclose(sharpness(x / 2), sharpness(x) / 4, rtol=1e-4)
    np.testing.assert_allclose(noise_sigma(x / 2), noise_sigma(x) / 2, rtol=1e-4)
    np.testing.assert_allclose(high(np.float32(0.3) + x / 2), high(x), rtol=1e-3)


@pytest.mark.parametrize(("cycles", "share"), [(3, 0.0), (4, 0.0), (5, 1.0), (8, 1.0)])
def test_high_band_of_a_wave(cycles, share):
    """At 16 pixels the Nyquist frequency has 8 cycles, so half of it has 4, which still counts as low."""
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * cycles * np.arange(16) / 16)
    picture = np.broadcast_to(wave[None, None, :, None], (1, 16, 16, 1)).astype(np.float32)
    np.testing.assert_allclose(jitted("high_band_energy")(picture), share, atol=1e-6)


def test_refused_pictures():
    for images in (np.zeros((2, 2, 9, 1)), np.zeros((9, 9, 3)), np.zeros((1, 9, 9, 3), np.int32)):
        with pytest.raises(ValueError, match="pictures must be"):
            sharpness(images)
    assert too_small(64, 100) is None
    assert "pictures of 63x100 are none" in too_small(63, 100)


def test_clip_iqa_in_float64():
    rng = np.random.default_rng(5)
    vectors, prompts = rng.standard_normal((9, 8)), 0.1 * rng.standard_normal((2, 8)) + rng.standard_normal(8)
    cosines = (vectors / np.linalg.norm(vectors, axis=1)[:, None]) @ (
        prompts / np.linalg.norm(prompts, axis=1)[:, None]
    ).T
    wanted = 1 / (1 + np.exp(100 * (cosines[:, 1] - cosines[:, 0])))
    assert wanted.min() < 0.4 < 0.6 < wanted.max()
    found = np.asarray(clip_iqa(vectors.astype(np.float32), prompts.astype(np.float32)))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    run = jax.jit(clip_iqa)
    np.testing.assert_allclose(run(np.float32(vectors), np.float32(prompts)), found, atol=1e-5)
    # Lengths of vectors do not count, and the other order gives the rest to one.
    np.testing.assert_allclose(run(np.float32(3 * vectors), np.float32(7 * prompts)), found, atol=1e-5)
    np.testing.assert_allclose(run(np.float32(vectors), np.float32(prompts[::-1])), 1 - found, atol=1e-5)


def test_aesthetic_is_affine_in_the_unit_vector():
    vectors, weight, bias = RNG.standard_normal((5, 8)), RNG.standard_normal(8), np.array([4.5])
    wanted = vectors @ weight / np.linalg.norm(vectors, axis=1) + 4.5
    arguments = (np.float32(weight), np.float32(bias))
    np.testing.assert_allclose(aesthetic(np.float32(vectors), *arguments), wanted, rtol=1e-5)
    np.testing.assert_allclose(aesthetic(np.float32(9 * vectors), *arguments), wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(aesthetic)(np.float32(vectors), *arguments), wanted, rtol=1e-5)


def test_refused_vectors():
    with pytest.raises(ValueError, match=r"prompts \[2,d\], got shapes \(3, 4\) and \(2, 5\)"):
        clip_iqa(np.zeros((3, 4)), np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"weight \[d\]"):
        aesthetic(np.zeros((3, 4)), np.zeros((4, 1)), np.zeros(1))


@pytest.mark.parametrize("shape", [(224, 224), (224, 301), (90, 64), (300, 517)])
def test_clip_inputs_are_those_of_pil(shape):
    """Shorter side to 224 with PIL's bicubic filter, then the centre."""
    image = pytest.importorskip("PIL.Image")
    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    height, width = (int(224 * side / min(shape)) for side in shape)
    resized = np.asarray(image.fromarray(picture).resize((width, height), image.Resampling.BICUBIC))
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    found = clip_inputs(picture[None])[0]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.rint(found * 255), resized[top : top + 224, left : left + 224])


def test_clip_iqa_inputs_keep_every_pixel():
    found = clip_iqa_inputs(BYTES[..., :1])
    assert found.shape == (3, 7, 10, 3)
    np.testing.assert_array_equal(np.rint(found * 255), np.repeat(BYTES[..., :1], 3, axis=-1))
    with pytest.raises(TypeError, match="uint8"):
        clip_iqa_inputs(UNIT[..., :1])


def test_importing_metrics_loads_no_network_and_no_other_framework():
    watched = ("flax", "torch", "sklearn", "diffrax", "equinox", "safetensors", "PIL", "matplotlib", "tensorflow")
    program = (
        "import sys, warnings; warnings.simplefilter('error'); import jaxunlearn.metrics; "
        f"print([m for m in {watched!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
