"""SSCD and Inception: golden outputs of plain torch, conversion of weights, invariances of the networks."""

from __future__ import annotations

import functools
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from jaxunlearn.models.features import inception, layers, sscd, trees

ROOT = pathlib.Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("make_golden_features", ROOT / "scripts" / "make_golden_features.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TINY = sscd.SSCDConfig(**golden.SSCD_TINY)


def torch_state(abstract, torch_name, seed):
    """The seeded weights of the golden files, from the shapes of our own tree."""
    order = {4: (3, 2, 0, 1), 2: (1, 0)}
    shapes = {}
    for path, leaf in trees.paths(abstract).items():
        axes = order.get(len(leaf.shape)) if path[-1] == "kernel" else None
        shapes[torch_name(path)] = leaf.shape if axes is None else tuple(leaf.shape[i] for i in axes)
    return golden.state(shapes, seed)


def sscd_state():
    return torch_state(sscd.abstract_params(TINY), lambda path: "backbone." + sscd.torch_name(path), 1)


def sscd_images():
    """The golden input, before the normalisation that `embed` does itself."""
    return golden.network_input(golden.SSCD_SHAPE, 11) * np.float32(sscd.STD) + np.float32(sscd.MEAN)


def test_sscd_gives_what_torch_gives():
    params = sscd.from_state_dict(sscd_state(), TINY)
    stored = np.load(ROOT / "tests" / "golden" / "features_sscd.npz")["out"]
    out = quick_jit(sscd.embed)(params, sscd_images())
    np.testing.assert_allclose(out, stored, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), 1, rtol=1e-6)
    assert np.abs(stored[0] - stored[1]).max() > 1e-2  # else the comparison would show nothing


def test_inception_gives_what_torch_gives():
    divisor = golden.INCEPTION_DIVISOR
    params = inception.from_state_dict(
        torch_state(inception.abstract_params(divisor), inception.torch_name, 2), divisor
    )
    stored = np.load(ROOT / "tests" / "golden" / "features_inception.npz")
    out = quick_jit(inception.outputs)(params, golden.network_input(golden.INCEPTION_SHAPE, 12))
    np.testing.assert_allclose(out.features, stored["features"], atol=1e-5 * np.abs(stored["features"]).max())
    np.testing.assert_allclose(out.logits[:, ::40], stored["logits"], atol=1e-5 * np.abs(stored["logits"]).max())
    assert np.ptp(stored["features"], axis=0).max() > 1e-2


def test_the_full_networks_have_the_published_sizes():
    def count(abstract, *skip):
        return sum(int(np.prod(leaf.shape)) for path, leaf in trees.paths(abstract).items() if path[-1] not in skip)

    assert count(sscd.abstract_params(), "mean", "var") == 24_557_120
    assert len(trees.paths(sscd.abstract_params())) == 320 - 53
    # The published file has 95,628,359 bytes, of which these are all but the names.
    assert 4 * count(inception.abstract_params()) == 95_541_568
    abstract = inception.abstract_params()
    assert abstract["fc"]["kernel"].shape == (2048, 1008)
    assert abstract["Mixed_7c"]["branch_pool"]["conv"]["kernel"].shape == (1, 1, 2048, 192)


def test_the_pool_branch_of_7c_takes_the_maximum_and_that_of_7b_the_mean():
    x = np.zeros((1, 5, 5, 1), np.float32)
    x[0, 2, 2, 0] = 9
    pools = jax.jit(lambda x: (layers.mean_pool_inside(x), layers.max_pool(x, 1, 1)))
    mean, most = map(np.asarray, pools(x))
    assert mean[0, 1, 1, 0] == 1.0
    np.testing.assert_array_equal(most[0, 1:4, 1:4, 0], 9.0)
    mean, most = map(np.asarray, pools(-np.ones((1, 5, 5, 1), np.float32)))
    np.testing.assert_allclose(mean, -1, rtol=1e-6)  # padding is not counted
    np.testing.assert_array_equal(most, -1)  # nor is it a zero


def test_flat_files_hold_the_tree_and_refuse_another():
    params = sscd.from_state_dict(sscd_state(), TINY)
    flat = sscd.to_flat(params)
    assert flat["layer1_0.downsample_1.mean"].shape == (16,)
    assert all(a.dtype == np.float32 and a.flags.c_contiguous for a in flat.values())
    back = sscd.from_flat(flat, TINY)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    flat["conv1.kernel"] = flat["conv1.kernel"][:-1]
    flat["fc.bias"] = np.full_like(flat["fc.bias"], np.nan)
    del flat["bn1.var"]
    flat["extra"] = np.zeros(3)
    with pytest.raises(ValueError) as error:
        sscd.from_flat(flat, TINY)
    for line in ("missing: bn1.var (4,)", "unexpected: extra (3,)", "wrong shape: conv1.kernel", "not finite: fc.bias"):
        assert line in str(error.value)
    assert "4 problems" in str(error.value)


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_state_dicts_lose_their_counters_and_nothing_else(prefix):
    state = {name.replace("backbone.", prefix): value for name, value in sscd_state().items()}
    expected = sscd.from_state_dict(state, TINY)
    counters = {f"{prefix}bn1.num_batches_tracked": np.array(7)}
    jax.tree.map(np.testing.assert_array_equal, sscd.from_state_dict(state | counters, TINY), expected)
    with pytest.raises(ValueError, match="unexpected: layer1.0.bn1.steps"):
        sscd.from_state_dict(state | {f"{prefix}layer1.0.bn1.steps": np.array(7)}, TINY)
    state.pop(f"{prefix}fc.bias")
    with pytest.raises(ValueError, match=r"missing: fc.bias \(8,\)"):
        sscd.from_state_dict(state, TINY)


def test_foreign_names_are_mapped_by_their_order():
    state = sscd_state()
    ordered = {name: state["backbone." + name] for name in sscd._torch_shapes(TINY)}
    foreign = {f"tensor_{i}": value for i, value in enumerate(ordered.values())}
    named = sscd.by_order(foreign, TINY)
    assert list(named) == list(ordered)
    assert list(named)[:6] == [
        "conv1.weight",
        *(f"bn1.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
    ] + ["layer1.0.conv1.weight"]
    assert list(named)[-1] == "fc.bias"
    assert all(named[name] is ordered[name] for name in named)
    with pytest.raises(ValueError, match="the file"):
        sscd.by_order(dict(list(foreign.items())[1:]), TINY)
    swapped = list(foreign.items())
    swapped[0], swapped[1] = swapped[1], swapped[0]
    with pytest.raises(ValueError, match="stands where conv1.weight"):
        sscd.by_order(dict(swapped), TINY)


def test_other_shapes_of_images_are_refused():
    params = sscd.from_state_dict(sscd_state(), TINY)
    with pytest.raises(ValueError, match="grey"):
        sscd.embed(params, np.zeros((1, 64, 64, 1), np.float32))
    with pytest.raises(ValueError, match="fid_inputs"):
        inception.outputs({}, np.zeros((1, 32, 32, 3), np.float32))
