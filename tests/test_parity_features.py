"""The full networks against plain torch, with random weights and random statistics, at three sizes each."""

from __future__ import annotations

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jaxunlearn.io.feature_weights import MissingWeights, load_weights  # noqa: E402
from jaxunlearn.metrics import resize  # noqa: E402
from jaxunlearn.models.features import inception, sscd, trees  # noqa: E402
from tests.test_features import golden  # noqa: E402
from tests.torch_features import TorchInception, TorchSSCD  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]


def prepared(model, seed):
    """The model with seeded weights, and its state dict as numpy (counters included)."""
    values = golden.state({k: v.shape for k, v in model.state_dict().items() if v.ndim}, seed)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in values.items()}, strict=False)
    return model.eval(), {k: v.numpy() for k, v in model.state_dict().items()}


def run(model, x):
    with torch.no_grad():
        return model(torch.from_numpy(x).permute(0, 3, 1, 2))


@pytest.fixture(scope="module")
def twins():
    model, state = prepared(TorchSSCD(), 3)
    assert len(state) == 320
    return model, sscd.from_state_dict(state), jax.jit(sscd.embed)


@pytest.mark.parametrize("shape", [(96, 64), (288, 288), (288, 400)])
def test_sscd(twins, shape):
    model, params, embed = twins
    images = golden.network_input((2, *shape, 3), 4) / 3 + np.float32(0.5)
    normalised = (images - np.float32(sscd.MEAN)) / np.float32(sscd.STD)
    expected = run(model, normalised).numpy()
    out = np.asarray(embed(params, images))
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


@pytest.fixture(scope="module")
def inception_twins():
    model, state = prepared(TorchInception(), 5)
    return model, inception.from_state_dict(state), jax.jit(inception.outputs)


@pytest.mark.parametrize("shape", [(299, 299), (75, 75), (120, 91)])
def test_inception(inception_twins, shape):
    model, params, outputs = inception_twins
    x = golden.network_input((2, *shape, 3), 6)
    expected = run(model, x)
    for ours, theirs in zip(outputs(params, x), expected):
        theirs = theirs.numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert np.ptp(expected[0].numpy(), axis=0).max() > 1e-3


def torch_tensors(params, torch_name):
    """A tree as a torch state dict, the other way round than in the library."""
    order = {4: (3, 2, 0, 1), 2: (1, 0)}
    out = {}
    for path, leaf in trees.paths(params).items():
        leaf = leaf.transpose(order[leaf.ndim]) if path[-1] == "kernel" else leaf
        out[torch_name(path)] = torch.from_numpy(np.ascontiguousarray(leaf))
    return out


def real_weights(name):
    """The published weights, where they are there."""
    try:
        return load_weights(name, allow_unpinned=True).tensors
    except MissingWeights as error:
        pytest.skip(str(error))


def photos():
    """Two photos of scikit-learn in 320x320, and the first one again: darker, cropped and with noise."""
    from sklearn.datasets import load_sample_images

    first, second = (image[50:370, 100:420] for image in load_sample_images().images)
    noise = np.random.RandomState(0).normal(0, 6, first.shape)
    changed = np.clip(0.8 * first + noise, 0, 255).astype(np.uint8)
    changed = resize.pil_bilinear(changed[None, 12:308, 12:308], 320, 320)[0]
    return np.stack([first, second, changed])


def test_sscd_with_the_published_weights():
    params = sscd.from_flat(real_weights("sscd"))
    model = TorchSSCD()
    names = torch_tensors(params, lambda path: "backbone." + sscd.torch_name(path))
    assert not model.load_state_dict(names, strict=False).unexpected_keys
    images = resize.sscd_inputs(photos())
    out = np.asarray(jax.jit(sscd.embed)(params, images))
    expected = run(model.eval(), (images - np.float32(sscd.MEAN)) / np.float32(sscd.STD)).numpy()
    np.testing.assert_allclose(out, expected, atol=1e-5)
    cosine = out @ out.T
    assert cosine[0, 2] > sscd.COPY_COSINE
    assert cosine[0, 1] < 0.5


def test_inception_with_the_published_weights():
    params = inception.from_flat(real_weights("inception"))
    model = TorchInception()
    assert not model.load_state_dict(torch_tensors(params, inception.torch_name), strict=False).unexpected_keys
    x = resize.fid_inputs(photos())
    out = jax.jit(inception.outputs)(params, x)
    for ours, theirs in zip(out, run(model.eval(), x)):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5 * float(theirs.abs().max()))
    assert 0.2 < float(out.features.mean()) < 0.8  # about 0.4 on photos
