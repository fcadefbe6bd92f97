"""Filters against the full complex transform in float64, Parseval, bands, gradients, sizes and cutoffs over t."""

from __future__ import annotations

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import dft, filtered, mean_squares, sum_squares
from jaxunlearn.frequency import (
    CORNER,
    FILTERS,
    RadialFilter,
    band,
    half_plane_weights,
    hann,
    high_pass,
    low_pass,
    masked_energy,
    radial_spectrum,
    radius,
)
from jaxunlearn.methods import make_objective
from jaxunlearn.parallel import by_example, make_mesh
from jaxunlearn.step import term_grads
from tests import oracle
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = [(256, 256), (64, 64), (33, 33), (32, 48), (31, 64)]
QUICK = [(33, 33), (31, 64)]
KINDS = ["ideal", "gaussian", "butterworth"]
T0 = np.zeros(2, np.int32)


def over_shapes(*quick):
    """Parametrises over the given shapes, and over the other ones in the slow tests."""
    rest = [pytest.param(*shape, marks=pytest.mark.slow) for shape in SHAPES if shape not in quick]
    return pytest.mark.parametrize(("height", "width"), [*quick, *rest])


def images(height, width, channels=2, count=2, seed=0):
    return np.random.default_rng(seed).normal(size=(count, height, width, channels)).astype(np.float32)


def wanted(x, m):
    """``(filtered, energy)`` by the full complex transform in float64; the result must be real."""
    y, imaginary = oracle.apply_mask(np.float64(x), m)
    assert imaginary < 1e-12
    return y, (y**2).sum(axis=(1, 2, 3))


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_filters_and_energies_equal_the_full_transform(height, width):
    x = images(height, width)
    cases = {}
    for kind in KINDS:
        low, high = oracle.mask(kind, 0.3217, height, width), oracle.mask(kind, 0.7713, height, width)
        cases[f"low {kind}"] = low_pass(0.3217, kind), low
        cases[f"high {kind}"] = high_pass(0.3217, kind), 1 - low
        cases[f"band {kind}"] = band(0.3217, 0.7713, kind), high - low
    cases["order 4"] = low_pass(0.5, "butterworth", order=4), oracle.mask("butterworth", 0.5, height, width, 4)

    @jax.jit
    def run(x):
        return {k: (f(x, T0), masked_energy(x, T0, f), f.mask(height, width, T0)) for k, (f, _) in cases.items()}

    for name, (y, energy, mask) in run(x).items():
        m = cases[name][1]
        # Symmetric under k -> -k, hence a real result.
        reflected = np.roll(m[::-1, ::-1], (1, 1), (0, 1))
        np.testing.assert_allclose(m, reflected, atol=1e-12)
        np.testing.assert_allclose(mask, m[:, : width // 2 + 1], atol=1e-5, err_msg=name)
        y64, energy64 = wanted(x, m)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, y64, atol=3e-5, err_msg=name)
        np.testing.assert_allclose(energy, energy64, rtol=2e-5, err_msg=name)
        # Parseval: the energy of the half spectrum is that of the filtered image.
        np.testing.assert_allclose(energy, np.sum(np.square(np.float64(y)), axis=(1, 2, 3)), rtol=2e-5)


@pytest.mark.parametrize(("height", "width"), SHAPES[1:])
def test_radius_and_half_plane(height, width):
    full = oracle.radius(height, width)
    np.testing.assert_allclose(radius(height, width), full[:, : width // 2 + 1], atol=1e-15)
    assert half_plane_weights(width).sum() * height == height * width
    assert radius(height, width).max() <= CORNER + 1e-12


IDENTITIES = [("ideal", CORNER), ("ideal", 5.0), ("gaussian", 1e4), ("butterworth", 1e4)]
"""Filters that let everything pass: kind and cut-off."""


@over_shapes(*QUICK)
def test_the_whole_spectrum_is_the_identity(height, width):
    x = images(height, width)

    def run(x, f):
        errors = [(filtered(error, f)(x, T0), error(x, T0)) for error in (sum_squares, mean_squares)]
        return f(x, T0), errors

    filters = [low_pass(cutoff, kind) for kind, cutoff in IDENTITIES]
    passed, nothing = tm.evaluate(lambda x: ([run(x, f) for f in filters], high_pass(CORNER)(x, T0)), x)
    assert np.all(nothing == 0)
    for y, errors in passed:
        np.testing.assert_allclose(y, x, atol=1e-5)
        for got, want in errors:
            np.testing.assert_allclose(got, want, rtol=1e-5)


@over_shapes((8, 8))
def test_a_training_step_with_the_identity_filter_is_the_plain_one(height, width):
    """Losses and gradients."""
    batch, draw = tm.batch_and_draw(tm.arrays(4, shape=(height, width, 1)))

    @jax.jit
    def run(p):
        objectives = [make_objective("siss", tm.SCHEDULE)]
        for kind, cutoff in IDENTITIES[1:]:
            keep_all = filtered(sum_squares, low_pass(cutoff, kind))
            objectives.append(make_objective("siss", tm.SCHEDULE, error=keep_all, forget_error=keep_all))
        return [term_grads(o, tm.predict, p, batch, draw)[:2] for o in objectives]

    plain, *selected = run(tm.params())
    for step in selected:
        tm.close(step, plain, 2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_passes_through_float32(dtype):
    f = low_pass(0.4)

    def run(x):
        x = x.astype(dtype)
        return f(x, T0), f(x.astype(jnp.float32), T0), masked_energy(x, T0, f)

    y, want, energy = tm.evaluate(run, images(32, 48))
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(np.float32), want, atol=float(jnp.finfo(dtype).eps) * 4)
    assert energy.dtype == np.float32


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64():
    x = np.float64(images(33, 33))
    f = low_pass(0.4, "gaussian")
    got = tm.evaluate(lambda x: (f(x, T0), masked_energy(x, T0, f)), x)
    for g, w in zip(got, wanted(x, oracle.mask("gaussian", 0.4, 33, 33))):
        np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)


def test_ideal_bands_partition_energy_and_signal():
    x = images(31, 64)
    bands = low_pass(0.31), band(0.31, 0.77), high_pass(0.77)
    parts = tm.evaluate(lambda x: [(masked_energy(x, T0, f), f(x, T0)) for f in bands], x)
    np.testing.assert_allclose(sum(e for e, _ in parts), np.sum(np.float64(x) ** 2, axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(sum(y for _, y in parts), x, atol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "butterworth"])
def test_soft_bands_add_as_signals_and_not_as_energies(kind):
    x = images(32, 48)
    low, high = low_pass(0.5, kind), high_pass(0.5, kind)
    # The complement in energy is sqrt(1 - M^2): its energies add, its signals do not.
    rest = RadialFilter(lambda rho, t: jnp.sqrt(1 - low.transfer(rho, t) ** 2))
    energy, y = tm.evaluate(lambda x: list(zip(*((masked_energy(x, T0, f), f(x, T0)) for f in (low, high, rest)))), x)
    whole = np.sum(np.float64(x) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(y[0] + y[1], x, atol=1e-5)
    assert np.all(np.abs(energy[0] + energy[1] - whole) > 0.05 * whole)
    np.testing.assert_allclose(energy[0] + energy[2], whole, rtol=1e-5)
    assert np.max(np.abs(y[0] + y[2] - x)) > 0.05


@over_shapes(*QUICK)
def test_gradients(height, width):
    """Spectral = spatial = 2 M^2 e / (HWC); for an ideal mask that is the filtered gradient of the plain error."""
    x, cutoff = images(height, width), 0.4517  # between two radii of every shape
    size = x[0].size

    def each(x, f):
        spectral = jax.grad(lambda x: jnp.sum(filtered(mean_squares, f)(x, T0)))(x)
        spatial = jax.grad(lambda x: jnp.sum(mean_squares(f(x, T0), T0)))(x)
        plain = jax.grad(lambda x: jnp.sum(mean_squares(x, T0)))(x)
        return [size * slope for slope in (spectral, spatial, f(plain, T0))]

    for kind, slopes in zip(KINDS, tm.evaluate(lambda x: [each(x, low_pass(cutoff, k)) for k in KINDS], x)):
        spectral, spatial, filtered_gradient = slopes
        m = oracle.mask(kind, cutoff, height, width)
        want = 2 * oracle.apply_mask(np.float64(x), m**2)[0]
        np.testing.assert_allclose(spectral, want, atol=3e-5, err_msg=kind)
        np.testing.assert_allclose(spatial, want, atol=3e-5, err_msg=kind)
        if kind == "ideal":
            np.testing.assert_allclose(spectral, filtered_gradient, atol=3e-5)
        else:
            assert np.max(np.abs(spectral - filtered_gradient)) > 0.03


@over_shapes((31, 64))
def test_operator_properties(height, width):
    x, y = (images(height, width, seed=s) for s in (0, 1))
    shifted = np.roll(x, (5, -7), (1, 2))
    one = np.zeros_like(x)
    one[..., 0] = x[..., 0]
    cutoffs = (0.1, 0.3, 0.5, 0.9, 1.5)

    def each(x, y, kind):
        f = lambda z: low_pass(0.4517, kind)(z, T0)  # noqa: E731
        energies = jnp.stack([masked_energy(x, T0, low_pass(c, kind)) for c in cutoffs])
        return f(x), f(y), f(f(x)), f(2 * x - y), f(shifted), f(one), energies

    inner = lambda a, b: np.sum(np.float64(a) * np.float64(b))  # noqa: E731
    for kind, found in zip(KINDS, tm.evaluate(lambda x, y: [each(x, y, k) for k in KINDS], x, y)):
        fx, fy, ffx, combination, f_shifted, f_one, energies = found
        # Self-adjoint, up to the rounding of the filtered images.
        np.testing.assert_allclose(inner(fx, y), inner(x, fy), atol=1e-6 * np.sqrt(inner(x, x) * inner(y, y)))
        if kind == "ideal":
            np.testing.assert_allclose(ffx, fx, atol=1e-5)  # idempotent
        else:
            assert np.max(np.abs(ffx - fx)) > 0.05
        np.testing.assert_allclose(combination, 2 * fx - fy, atol=1e-5, err_msg=kind)  # linear
        np.testing.assert_allclose(f_shifted, np.roll(fx, (5, -7), (1, 2)), atol=1e-5, err_msg=kind)
        assert np.all(np.diff(energies, axis=0) > 0)  # monotone
        assert np.all(f_one[..., 1] == 0)  # channels do not mix


@pytest.mark.parametrize("size", [32, 64, 128])
def test_energies_do_not_depend_on_the_resolution(size):
    """Three waves of 3.6, 9 and 11.7 cycles: mean energies .5, .125 and .03125, whatever the number of pixels."""
    grid = np.arange(size) / size
    x, y = grid[None, :], grid[:, None]
    wave = np.cos(2 * np.pi * (3 * x + 2 * y) + 0.3) + 0.5 * np.cos(2 * np.pi * 9 * y + 0.1 + 0 * x)
    wave = np.float32(wave + 0.25 * np.cos(2 * np.pi * (11 * x - 4 * y)))[None, :, :, None]
    below = lambda bins: filtered(mean_squares, low_pass(bins / (size / 2)))  # noqa: E731
    got = tm.evaluate(lambda x: jnp.stack([below(bins)(x, T0[:1])[0] for bins in (5, 10, 13)]), wave)
    np.testing.assert_allclose(got, [0.5, 0.625, 0.65625], rtol=1e-4)


@pytest.mark.parametrize("size", [33, 64, 256])
def test_passband_normalisation_keeps_the_mean_square_of_white_noise(size):
    x = images(size, size, channels=3)
    cutoffs = (0.5, 0.75)

    def run(x):
        for cutoff in cutoffs:
            unit, plain = low_pass(cutoff, normalise="passband"), low_pass(cutoff)
            share = jnp.sum(plain.mask(size, size, T0) ** 2 * half_plane_weights(size)) / size**2
            yield share, filtered(mean_squares, unit)(x, T0), filtered(mean_squares, plain)(x, T0)

    for cutoff, (p, got, plain) in zip(cutoffs, tm.evaluate(lambda x: list(run(x)), x)):
        assert abs(p - np.pi * cutoff**2 / 4) < 0.012  # the share of the disc in the square
        np.testing.assert_allclose(got, plain / p, rtol=1e-5)
        # 1 within the statistical error of p * values squares.
        assert np.all(np.abs(got - 1) < 5 * np.sqrt(2 / (p * x[0].size)))


def test_passband_shares_at_256():
    shares = {0.1: 0.0078, 0.25: 0.0490, 0.5: 0.1961, 0.75: 0.4412, 1.0: 0.7848}
    masks = tm.evaluate(lambda: [low_pass(cutoff).mask(256, 256, T0) for cutoff in shares])
    for m, share in zip(masks, shares.values()):
        assert abs((m**2 * half_plane_weights(256)).sum() / 256**2 - share) < 1.5e-4


def test_an_empty_band_gives_zero_and_no_nan():
    def run(x):
        for normalise in (None, "passband"):
            f = band(0.30, 0.31, normalise=normalise)
            yield jax.value_and_grad(lambda x, f=f: jnp.sum(masked_energy(x, T0, f)))(x)

    for value, slope in tm.evaluate(lambda x: list(run(x)), images(8, 8)):
        assert value == 0
        assert np.all(slope == 0)


def test_cutoff_over_t():
    """A table, a function of t and a loop over numbers agree; a new t does not compile again."""
    x = images(32, 48, count=3)
    table = np.linspace(1.3, 0.11, 1000)
    by_table, by_function = low_pass(table), low_pass(lambda t: jnp.asarray(table)[t])

    @jax.jit
    def run(x, t):
        return by_table(x, t), masked_energy(x, t, by_table), masked_energy(x, t, by_function)

    assert jax.eval_shape(lambda t: by_table.mask(32, 48, t), np.array([1, 2, 3])).shape == (3, 32, 25)
    for t in ([0, 500, 999], [3, 333, 777]):
        y, energy, energy_2 = jax.tree.map(np.asarray, run(x, np.array(t)))
        np.testing.assert_allclose(energy_2, energy, rtol=1e-5)
        for i in range(3):
            m = oracle.mask("ideal", table[t[i]], 32, 48)
            want, want_energy = wanted(x[i : i + 1], m)
            np.testing.assert_allclose(y[i : i + 1], want, atol=1e-5)
            np.testing.assert_allclose(energy[i], want_energy[0], rtol=1e-5)
    assert run._cache_size() == 1


def test_band_and_passband_over_t():
    x = images(32, 32, count=2)
    f = band(np.array([0.2, 0.3]), np.array([0.6, 0.9]), normalise="passband")

    def run(x):
        singles = [band(low, high, normalise="passband") for low, high in ((0.2, 0.6), (0.3, 0.9))]
        return masked_energy(x, jnp.array([0, 1]), f), [masked_energy(x, T0, single) for single in singles]

    got, (first, second) = tm.evaluate(run, x)
    np.testing.assert_allclose(got, [first[0], second[1]], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: low_pass(0.0), "positive"),
        (lambda: low_pass(-1.0), "positive"),
        (lambda: low_pass(float("nan")), "positive"),
        (lambda: high_pass(np.array([0.5, 0.0])), "positive"),
        (lambda: low_pass(0.5, "box"), "unknown filter kind 'box'; known: ideal, gaussian, butterworth"),
        (lambda: low_pass(0.5, normalise="energy"), "normalise"),
        (lambda: low_pass(0.5, unit="pixels"), "unknown unit of a cutoff 'pixels'; known: nyquist, bins"),
        (lambda: high_pass(0.5, backend="mat"), "unknown filter backend 'mat'; did you mean 'matmul'"),
        (lambda: band(0.5, 0.5), "low < high"),
        (lambda: band(0.5, 0.2), "low < high"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["ideal", "gaussian"])
def test_the_optimum_of_keep_minus_filtered_forget(kind):
    """p_k |e - e_k|^2 - s p_f |M (e - e_f)|^2 has its optimum at e_k + kappa (e_k - e_f) per bin, and at e_k where M = 0."""
    e_k, e_f = np.float64(images(16, 16, channels=1, count=1)), np.float64(images(16, 16, channels=1, count=1, seed=1))
    p_k, s_p_f, f = 1.0, 0.4, low_pass(0.5, kind)
    mask = oracle.mask(kind, 0.5, 16, 16)
    kappa = s_p_f * mask**2 / (p_k - s_p_f * mask**2)
    best = e_k + oracle.apply_mask(e_k - e_f, kappa)[0]
    t = T0[:1]

    def loss(e):
        return jnp.sum(p_k * sum_squares(e - e_k, t) - s_p_f * filtered(sum_squares, f)(e - e_f, t))

    slope, rest = tm.evaluate(lambda e: (jax.grad(loss)(e), high_pass(0.5, kind)(e - e_k, t)), best)
    np.testing.assert_allclose(slope, 0, atol=1e-5)
    if kind == "ideal":
        np.testing.assert_allclose(rest, 0, atol=1e-9)


# The transform by matrix products.


@pytest.mark.parametrize(("height", "width"), SHAPES[2:])
def test_matrix_products_equal_the_fft(height, width):
    """Filters, energies and gradients, constant cut-offs (of which only the passing frequencies are computed) and tables."""
    x = images(height, width)
    table = np.linspace(1.3, 0.11, 1000)
    t = np.array([3, 700], np.int32)

    def make(backend):
        options = {"backend": backend}
        return [
            low_pass(0.3217, **options),
            high_pass(0.3217, "gaussian", **options),
            band(0.3217, 0.7713, "butterworth", **options),
            band(0.3217, 0.7713, normalise="passband", **options),
            low_pass(table, **options),
        ]

    @jax.jit
    def run(x):
        def each(f):
            slope = jax.grad(lambda x: jnp.sum(masked_energy(x, t, f)))(x)
            return f(x, t), masked_energy(x, t, f), slope

        return [[each(f) for f in make(backend)] for backend in ("fft", "matmul")]

    want, got = run(x)
    for (y, energy, slope), (y_2, energy_2, slope_2) in zip(want, got):
        np.testing.assert_allclose(y_2, y, atol=3e-5)
        np.testing.assert_allclose(energy_2, energy, rtol=3e-5)
        np.testing.assert_allclose(slope_2, slope, atol=6e-5)


@pytest.mark.usefixtures("x64")
def test_matrix_products_in_float64_and_halves():
    x = np.float64(images(33, 48))
    rows, columns = np.arange(33), np.arange(25)
    real, imaginary = tm.evaluate(lambda x: dft.transform(x, rows, columns), x)
    want = np.fft.rfft2(x, axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(real + 1j * imaginary, want, atol=1e-12)
    back = tm.evaluate(lambda a, b: dft.inverse(a, b, rows, columns, (33, 48), half_plane_weights(48)), real, imaginary)
    np.testing.assert_allclose(back, x, atol=1e-12)
    half = tm.evaluate(lambda x: low_pass(0.4, backend="matmul")(x.astype(jnp.bfloat16), T0), x)
    assert half.dtype == jnp.bfloat16


def test_matrix_products_leave_out_what_does_not_pass():
    rows, columns = dft.rows_and_columns(low_pass(0.25).mask(32, 48, T0))
    assert set(columns) == set(range(7))
    assert set(rows) == {0, 1, 2, 3, 4, 28, 29, 30, 31}
    # An empty band costs nothing and gives zero.
    x = images(8, 8)
    energy, y = tm.evaluate(lambda x: [g(x) for g in each_of(band(0.30, 0.31, backend="matmul"))], x)
    assert np.all(energy == 0)
    assert np.all(y == 0)
    # Work of the compiled program: far less than that of all frequencies.
    work = []
    for cutoff in (0.25, 2.0):
        f = low_pass(cutoff, backend="matmul")
        compiled = jax.jit(lambda x, f=f: masked_energy(x, T0, f)).lower(images(64, 64)).compile()
        work.append(compiled.cost_analysis()["flops"])
    assert work[0] < 0.2 * work[1]


def each_of(f):
    return (lambda x: masked_energy(x, T0, f)), (lambda x: f(x, T0))


def test_under_automatic_sharding_matrix_products_do_not_gather_the_batch():
    """``shard_map`` and pmap need no gather either way (test_parallel); this is for other programs' plain jit."""
    mesh = make_mesh()
    x = jax.device_put(images(16, 16, count=16), by_example(mesh))
    t = jax.device_put(np.arange(16) * 60, by_example(mesh))
    compiled = {}
    for backend in ("fft", "matmul"):
        error = filtered(sum_squares, low_pass(np.linspace(1.4, 0.2, 1000), backend=backend))
        program = jax.jit(jax.value_and_grad(lambda x, t, error=error: jnp.mean(error(x, t))))
        compiled[backend] = program.lower(x, t).compile()
    moved = {k: set(re.findall(r"all-gather|all-to-all|collective-permute", c.as_text())) for k, c in compiled.items()}
    assert moved == {"fft": {"all-gather"}, "matmul": set()}
    (value, slope), (value_2, slope_2) = (jax.block_until_ready(c(x, t)) for c in compiled.values())
    np.testing.assert_allclose(value_2, value, rtol=1e-5)
    np.testing.assert_allclose(slope_2, slope, atol=1e-5)


# Units and spectra.


@pytest.mark.parametrize(("height", "width"), SHAPES[1:])
def test_cutoffs_in_bins(height, width):
    """Bins are cycles along the shorter side: 2 / min(H, W) Nyquist units each."""
    scale = 2 / min(height, width)
    for name, bins in (("low_pass", (5.3,)), ("high_pass", (5.3,)), ("band", (2.1, 9.4))):
        make = FILTERS[name]
        for kind in KINDS:
            a = make(*bins, kind, unit="bins").mask(height, width, T0)
            b = make(*(scale * v for v in bins), kind).mask(height, width, T0)
            np.testing.assert_allclose(a, b, atol=1e-5)
    # A table over t in bins; a whole number of bins includes its own shell.
    f = low_pass(np.array([1.0, 3.0]), unit="bins")
    mask = np.asarray(f.mask(32, 32, np.array([0, 1])))
    assert mask[0, 0].tolist() == [1, 1] + [0] * 15
    assert mask[1, 0, :5].tolist() == [1, 1, 1, 1, 0]


def test_radial_spectrum_subtracts_a_reference_and_tapers():
    x = np.float64(images(64, 64, count=8))
    slope = np.linspace(-3, 3, 64)[None, None, :, None]
    np.testing.assert_allclose(
        radial_spectrum(x + slope, reference=slope[0] * np.ones((64, 64, 2))).power, radial_spectrum(x).power
    )
    np.testing.assert_allclose(np.mean(hann(31, 48) ** 2), 1)
    # White noise keeps its power under the taper; the leakage of a slope at its edges goes away.
    tapered = radial_spectrum(x, taper="hann")
    np.testing.assert_allclose(tapered.power[3:-3], 1, atol=0.25)
    plane = np.broadcast_to(slope, (1, 64, 64, 1))
    assert radial_spectrum(plane, taper="hann").power[20] < 1e-3 * radial_spectrum(plane).power[20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((0, 4, 4, 1)),), "N >= 1"),
        ((np.zeros((4, 4)),), "N,H,W,C"),
        ((np.zeros((1, 4, 4, 1)), "hamming"), "taper"),
    ],
)
def test_spectra_of_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        radial_spectrum(arguments[0], taper=arguments[1] if len(arguments) > 1 else None)


def test_radial_spectrum():
    x = images(33, 48, channels=3, count=4)
    s = radial_spectrum(x)
    # Shells times counts sum to the total energy of the mean image spectrum.
    total = np.mean(np.sum(np.float64(x) ** 2, axis=(1, 2)))
    np.testing.assert_allclose((s.power * s.count).sum() + s.dc, total, rtol=1e-10)
    assert s.count.sum() + 1 == 33 * 48
    assert np.array_equal(s.bins, np.arange(1, len(s.bins) + 1))
    assert (s.size, s.planes) == (33, 12)
    # White noise has power 1, within the error of count * images * channels values.
    many = s.count >= 50
    assert np.all(np.abs(s.power[many] - 1) < 5 * np.sqrt(2 / (s.count[many] * 12)))
    # The order of the images, shifts and flips have no effect.
    for other in (x[::-1], np.roll(x, (3, 7), (1, 2)), x[:, ::-1, ::-1]):
        np.testing.assert_allclose(radial_spectrum(other).power, s.power, rtol=1e-10)
    np.testing.assert_allclose(radial_spectrum(2 * x).power, 4 * s.power, rtol=1e-10)


def test_radial_spectrum_finds_a_wave():
    grid = np.arange(64) / 64
    wave = np.cos(2 * np.pi * 7 * grid)[None, None, :, None] * np.ones((1, 64, 1, 1))
    s = radial_spectrum(wave)
    assert s.bins[np.argmax(s.power)] == 7
    np.testing.assert_allclose(s.power[6] * s.count[6], 0.5 * 64 * 64, rtol=1e-10)


def test_the_benchmark_runs(repository, capsys):
    spec = importlib.util.spec_from_file_location("bench", repository / "scripts" / "benchmark_filters.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    results = benchmark.main(["--configs", "--losses", "2x8x1", "--rounds", "2"])
    assert set(results) == {"2x8x1"}
    assert set(results["2x8x1"]) == {"plain", "fft", "matmul"}
    assert all(ratio > 0 for ratio in results["2x8x1"].values())
    assert len(capsys.readouterr().out.splitlines()) == 2 + 3
