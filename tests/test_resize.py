"""Resizing of pictures: stored arrays of the original tools, PIL itself, and what must hold for every convention."""

from __future__ import annotations

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from jaxunlearn.metrics import resize

ROOT = pathlib.Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("make_golden_features", ROOT / "scripts" / "make_golden_features.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


@pytest.fixture(scope="module")
def stored():
    return dict(np.load(ROOT / "tests" / "golden" / "resize.npz"))


@pytest.mark.parametrize("size", golden.RESIZED_FROM)
@pytest.mark.parametrize("convention", resize.CONVENTIONS)
def test_each_convention_gives_what_its_tool_gives(stored, convention, size):
    out = resize.resize(golden.picture(size)[None], convention)[0]
    assert out.shape == (299, 299, 3)
    assert out.dtype == np.float32
    for name, value in golden.crop(out).items():
        tolerance = dict(rtol=1e-5) if name in ("mean", "square") else dict(atol=2e-3)
        np.testing.assert_allclose(value, stored[f"{convention}/{size}/{name}"], err_msg=name, **tolerance)


@pytest.mark.parametrize("size", golden.RESIZED_FROM)
@pytest.mark.parametrize("convention", ["short288", "square320"])
def test_sscd_inputs_are_pils_bytes(stored, convention, size):
    image = golden.picture(size)
    out = resize.sscd_inputs(image[None], convention)[0]
    side = int(convention[-3:])
    assert out.shape == (side, side, 3)
    pixels = np.round(out * 255)
    np.testing.assert_array_equal(pixels, np.asarray(Image.fromarray(image).resize((side, side), 2)))
    for name, value in golden.crop(pixels).items():
        np.testing.assert_allclose(value, stored[f"{convention}/{size}/{name}"], rtol=1e-12)


def test_clean_is_pils_bicubic_on_floating_planes():
    image = golden.picture(64)[:, :41]
    planes = [Image.fromarray(image[..., c].astype(np.float32)).resize((299, 299), 3) for c in range(3)]
    expected = np.clip(np.stack([np.asarray(p) for p in planes], -1), 0, 255)
    assert np.max(expected) == 255  # the picture overshoots, so the clipping is seen
    np.testing.assert_allclose(resize.resize(image[None], "clean")[0], expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(100, 60), (60, 100), (288, 288), (301, 700)])
def test_the_short_edge_becomes_288_and_the_bytes_are_pils(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    height, width = resize.sscd_size(*shape, "short288")
    assert min(height, width) == 288
    assert abs(height / width - shape[0] / shape[1]) < 0.01
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize.pil_bilinear(image[None], height, width)[0], expected)


def test_tall_pictures_differ_from_pil_by_one_at_most():
    """Newer versions of PIL resize the height first here."""
    image = np.random.default_rng(0).integers(0, 256, (700, 301, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((288, 669), Image.Resampling.BILINEAR))
    assert np.abs(resize.pil_bilinear(image[None], 669, 288)[0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("convention", resize.CONVENTIONS)
def test_weights_add_up_and_the_own_size_is_the_identity(convention):
    matrix = resize.CONVENTIONS[convention].matrix
    for size in (1, 2, 28, 299, 400):
        np.testing.assert_allclose(matrix(size, 299).sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(matrix(299, 299), np.eye(299), atol=1e-9)


def test_conventions_differ_as_much_as_is_known():
    """On average over photos 11 of 255 at 32 px (half pixel against TF1); here, at 512 px, more than 2."""
    image = golden.picture(512)[None]
    made = {name: resize.resize(image, name) for name in resize.CONVENTIONS}
    for first in made:
        for second in made:
            if first < second and {first, second} != {"clean", "antialias"}:
                assert np.abs(made[first] - made[second]).mean() > 2, (first, second)


def test_on_the_device_as_on_the_host_with_scaling_and_grey():
    grey = golden.picture(32)[None, ..., :1]
    for name, expected in (("clean", 1 / 128), ("half_pixel", 1 / 127.5)):
        host = resize.fid_inputs(grey, name)
        device = jax.jit(resize.fid_inputs, static_argnums=1)(grey, name)
        assert isinstance(host, np.ndarray)
        np.testing.assert_allclose(device, host, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(host[..., 0], host[..., 2])
        back = resize.resize(resize.three_channels(grey), name)
        slope = np.ptp(host) / np.ptp(back)
        assert slope == pytest.approx(expected, rel=1e-5)
    assert host.shape == (1, 299, 299, 3)


def test_what_cannot_be_resized_is_refused():
    with pytest.raises(ValueError, match="did you mean 'clean'"):
        resize.resize(np.zeros((1, 8, 8, 3), np.uint8), "clear")
    with pytest.raises(TypeError, match="to_uint8"):
        resize.fid_inputs(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match=r"\[N,H,W,1\]"):
        resize.sscd_inputs(np.zeros((1, 8, 8, 4), np.uint8))
    with pytest.raises(ValueError, match="short288"):
        resize.sscd_inputs(np.zeros((1, 8, 8, 3), np.uint8), "square288")
