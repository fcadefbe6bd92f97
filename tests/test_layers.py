"""The fast forms of the layers against textbook forms in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.models import layers
from jaxunlearn.models.layer_norm import LayerNorm, layer_norm

P = jax.P
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def eager_pullback(function, *arguments):
    """Values and all gradients for a fixed cotangent."""
    out, back = jax.vjp(function, *arguments)
    return [out, *back(jnp.asarray(normal(99, *out.shape), out.dtype))]


def pullback(function, *arguments):
    """The same under jit."""
    return quick_jit(functools.partial(eager_pullback, function))(*arguments)


def assert_trees_close(actual, expected, rtol):
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=rtol * np.abs(e).max())


CASES = {
    "group_norm": (
        lambda fast: lambda x, s, b: layers.group_norm(x, s, b, 4, 1e-5, fast),
        lambda: (normal(0, 2, 3, 5, 8) * 3 + 1, normal(1, 8), normal(2, 8)),
    ),
    "attention": (
        lambda fast: lambda q, k, v: layers.attention(q, k, v, "folded", fast),
        lambda: (3 * normal(0, 2, 7, 3, 4), normal(1, 2, 7, 3, 4), normal(2, 2, 7, 3, 4)),
    ),
    "cross_attention": (
        lambda fast: lambda q, k, v: layers.attention(q, k, v, "folded", fast),
        lambda: (3 * normal(0, 2, 7, 3, 4), normal(1, 2, 5, 3, 4), normal(2, 2, 5, 3, 4)),
    ),
    "layer_norm": (
        lambda fast: lambda x, s, b: layer_norm(x, s, b, 1e-5, fast),
        lambda: (normal(0, 2, 15, 8) * 3 + 1, normal(1, 8), normal(2, 8)),
    ),
    "add_bias": (
        lambda fast: layers.add_bias if fast else lambda x, b: x + b,
        lambda: (normal(0, 2, 3, 5, 8), normal(1, 8)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_fast_forms_are_the_textbook_forms(name, x64):
    make, arguments = CASES[name]
    arguments = [jnp.asarray(a) for a in arguments()]
    result, expected = pullback(make(True), *arguments), pullback(make(False), *arguments)
    assert all(a.dtype == jnp.float64 for a in result)
    assert_trees_close(result, expected, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_fast_forms_in_float32(name):
    make, arguments = CASES[name]
    result = pullback(make(True), *[jnp.asarray(a, jnp.float32) for a in arguments()])
    assert all(a.dtype == jnp.float32 for a in result)
    with jax.enable_x64(True):
        expected = pullback(make(False), *[jnp.asarray(a) for a in arguments()])
    assert_trees_close(result, expected, 2e-6)


def test_group_norm_oracle(x64):
    x, scale, bias = normal(0, 2, 4, 3, 6), normal(1, 6), normal(2, 6)
    expected = np.empty_like(x)
    for b in range(2):
        for group in ((0, 1, 2), (3, 4, 5)):
            values = x[b][..., group]
            expected[b][..., group] = (values - values.mean()) / np.sqrt(values.var() + 1e-3)
    expected = expected * scale + bias
    for fast in (True, False):
        np.testing.assert_allclose(layers.group_norm(jnp.asarray(x), scale, bias, 2, 1e-3, fast), expected, atol=1e-12)


def test_layer_norm_oracle(x64):
    x, scale, bias = normal(0, 2, 5, 6), normal(1, 6), normal(2, 6)
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-3) * scale + bias
    for fast in (True, False):
        np.testing.assert_allclose(layer_norm(jnp.asarray(x), scale, bias, 1e-3, fast), expected, atol=1e-12)
    params = LayerNorm().init(jax.random.key(0), x)["params"]
    assert {k: v.shape for k, v in params.items()} == {"scale": (6,), "bias": (6,)}
    standard = LayerNorm().apply({"params": params}, 10 * x)
    np.testing.assert_allclose(standard.mean(-1), 0, atol=1e-12)
    np.testing.assert_allclose(standard.std(-1), 1, atol=1e-5)


def test_a_dense_layer_without_bias():
    module = layers.Dense(3, use_bias=False)
    kernel = normal(0, 4, 3).astype(np.float32)
    x = normal(1, 2, 4).astype(np.float32)
    assert set(module.init(jax.random.key(0), x)["params"]) == {"kernel"}
    np.testing.assert_allclose(module.apply({"params": {"kernel": kernel}}, x), x @ kernel, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_group_norm_where_the_mean_is_far_larger_than_the_deviation(offset):
    """float32 keeps about |mean| / std bits less; the fast form loses no more than that, forward and backward."""
    x = (normal(0, 2, 28, 28, 16) + offset * np.repeat([1.0, -1.7, 1.3, -1.1], 4)).astype(np.float32)
    scale, bias = np.ones(16, np.float32), np.zeros(16, np.float32)
    result = pullback(CASES["group_norm"][0](True), jnp.asarray(x), scale, bias)
    with jax.enable_x64(True):
        expected = pullback(CASES["group_norm"][0](False), *[jnp.asarray(a, jnp.float64) for a in (x, scale, bias)])
    assert_trees_close(result, expected, 2e-6 + 3e-7 * offset)


def test_gradient_of_a_bias_keeps_its_bits():
    """One long float32 sum of 2^20 numbers would be wrong in the fourth digit."""
    dy = np.full((1, 1024, 1024, 1), 0.1, np.float32)
    back = quick_jit(lambda b: jax.vjp(lambda b: layers.add_bias(jnp.zeros_like(dy), b), b)[1](jnp.asarray(dy))[0])
    exact = float(np.float32(0.1)) * 2**20
    np.testing.assert_allclose(back(jnp.zeros(1)), exact, rtol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_fast_forms_under_vmap(name):
    make, arguments = CASES[name]
    arguments = [jnp.asarray(a, jnp.float32) for a in arguments()]
    stacked = [jnp.stack([a, 2 * a]) for a in arguments]
    both = quick_jit(jax.vmap(functools.partial(eager_pullback, make(True))))(*stacked)
    for i, factor in enumerate((1, 2)):
        one = pullback(make(True), *[factor * a for a in arguments])
        assert_trees_close([b[i] for b in both], one, 1e-5)


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_fast_forms_under_shard_map(name, varying):
    """Gradients of parameters that are the same everywhere are sums over devices, as in the textbook form."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    make, arguments = CASES[name]
    arguments = [jnp.asarray(a, jnp.float32) for a in arguments()]
    is_data = [a.ndim > 1 for a in arguments]

    def gradients(function):
        def loss(*arguments):
            return jnp.sum(jnp.sin(function(*arguments)))

        return jax.grad(loss, argnums=tuple(range(len(arguments))))

    def local(*arguments):
        if varying:
            arguments = [a if d else jax.lax.pcast(a, "data", to="varying") for a, d in zip(arguments, is_data)]
        out = gradients(make(True))(*arguments)
        return tuple(g if d or not varying else jax.lax.psum(g, "data") for g, d in zip(out, is_data))

    specs = tuple(P("data") if d else P() for d in is_data)
    sharded = quick_jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))
    assert_trees_close(sharded(*arguments), gradients(make(False))(*arguments), 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_keeps_its_type(name):
    make, arguments = CASES[name]
    arguments = [jnp.asarray(a, jnp.bfloat16) for a in arguments()]
    result = pullback(make(True), *arguments)
    assert all(a.dtype == jnp.bfloat16 for a in result)
    assert_trees_close(result, pullback(make(False), *[a.astype(jnp.float32) for a in arguments]), 3e-2)


def test_attention_with_large_scores():
    q, k, v = (jnp.asarray(normal(i, 1, 5, 2, 4), jnp.float32) for i in range(3))
    result = pullback(CASES["attention"][0](True), 1e3 * q, k, v)
    assert all(np.isfinite(a).all() for a in result)
    assert_trees_close(result[:1], pullback(CASES["attention"][0](False), 1e3 * q, k, v)[:1], 1e-5)


def test_attention_switch():
    q, k, v = (jnp.asarray(normal(i, 2, 6, 2, 4), jnp.float32) for i in range(3))
    folded = pullback(lambda *a: layers.attention(*a, impl="folded"), q, k, v)
    assert_trees_close(pullback(lambda *a: layers.attention(*a, impl="xla"), q, k, v), folded, 1e-5)
    assert_trees_close(pullback(lambda *a: layers.attention(*a, impl="auto"), q, k, v), folded, 1e-6)
    with pytest.raises(ValueError, match=r"attention_impl must be one of auto, .* got 'flash'"):
        layers.attention(q, k, v, impl="flash")


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_works_in_the_textbook_form_only(name):
    make, arguments = CASES[name]
    arguments = tuple(jnp.asarray(a, jnp.float32) for a in arguments())
    _, tangent = jax.jvp(make(False), arguments, arguments)
    assert np.isfinite(tangent).all()
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(make(True), arguments, arguments)


def test_convolution_and_dense_oracles(x64):
    x = jnp.asarray(normal(0, 2, 5, 4, 3))
    conv = layers.Conv(2, stride=2, padding=(0, 1), dtype=jnp.float64)
    kernel, bias = normal(1, 3, 3, 3, 2), normal(2, 2)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    expected = np.empty((2, 2, 2, 2))
    for i in range(2):
        for j in range(2):
            expected[:, i, j] = np.tensordot(padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel, 3) + bias
    result = conv.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(result, expected, atol=1e-12)
    kernel = normal(3, 3, 7)
    result = layers.Dense(7, dtype=jnp.float64).apply({"params": {"kernel": kernel, "bias": np.ones(7)}}, x)
    np.testing.assert_allclose(result, np.asarray(x) @ kernel + 1, atol=1e-12)


@pytest.mark.parametrize("module", [layers.Conv(64), layers.Dense(64)])
def test_new_layers_have_the_distribution_of_torch(module):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for kernel and bias."""
    params = module.init(jax.random.key(0), jnp.zeros((1, 3, 3, 32)))["params"]
    bound = 1 / np.sqrt(np.prod(params["kernel"].shape[:-1]))
    for leaf in params.values():
        assert 0.9 * bound < float(jnp.abs(leaf).max()) <= bound
    np.testing.assert_allclose(float(params["kernel"].std()), bound / np.sqrt(3), rtol=0.05)
