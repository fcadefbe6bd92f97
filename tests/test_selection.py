"""Windows and cut-offs from spectra, from the model's loss gap and from responsibilities: known answers and edge cases."""

from __future__ import annotations

import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import Example, mean_squares, sum_squares
from jaxunlearn.forgetting import make_probe_losses
from jaxunlearn.frequency import CORNER, RadialSpectrum, band, low_pass, radial_spectrum, shell_power
from jaxunlearn.objectives.probes import strata
from jaxunlearn.responsibility import ResponsibilityWindow, responsibility, window_from_responsibility
from jaxunlearn.schedule import linear, scaled_linear, zero_terminal_snr
from jaxunlearn.selection import (
    MIN_KEEP,
    Choice,
    LossGap,
    apply_choice,
    choose,
    choose_filter,
    choose_window,
    loss_gap,
)
from jaxunlearn.spectrum import (
    cutoff_from_spectrum,
    resolved_bins,
    wiener,
    window_from_spectrum,
)
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCHEDULE = linear()
T16 = strata(1000, 16)


def power_law(slope=-2.0, size=256, scale=485.27):
    """S = scale * bins^slope on the shells of a square image."""
    bins = np.arange(1, round(size / 2 * CORNER) + 1)
    return RadialSpectrum(bins, scale * bins**slope, scale, np.full(len(bins), 8.0), size, 1)


def coloured(count, power, size=32, seed=0):
    """Images of Gaussian noise whose shells have the given power [K+1]."""
    rng = np.random.default_rng(seed)
    f = np.fft.fftfreq(size) * size
    shell = np.rint(np.hypot(f[:, None], f[None, :])).astype(int)
    white = np.fft.fft2(rng.normal(size=(count, size, size)), norm="ortho")
    return np.fft.ifft2(white * np.sqrt(np.asarray(power)[shell]), norm="ortho").real[..., None]


def shells(low=30.0, size=32, **changes):
    """A falling spectrum on shells 0..K with some shells changed: ``shells(s3=50.0)``."""
    last = round(size / 2 * CORNER)
    power = low / np.maximum(np.arange(last + 1), 1.0) ** 2
    for name, value in changes.items():
        power[int(name[1:])] = value
    return power


# The spectrum and the schedule.


def test_a_power_law_gives_the_known_radii_and_windows():
    bins = resolved_bins(SCHEDULE, power_law())
    np.testing.assert_allclose(bins[[100, 250, 500, 750]], [64.4, 23.0, 6.4, 1.27], atol=0.1)
    assert np.all(np.diff(bins) <= 0)
    assert window_from_spectrum(SCHEDULE, power_law()) == (192, 781)
    assert window_from_spectrum(SCHEDULE, power_law(), finest_bins=23, coarsest_bins=1.3) == (250, 747)
    # In closed form: bin k is resolved where alpha^2 S = sigma^2.
    a = SCHEDULE.alphas_cumprod
    np.testing.assert_allclose(bins[100:680], np.sqrt(485.27 * a / (1 - a))[100:680], rtol=1e-6)


def test_cutoffs_have_a_floor_and_the_identity_at_their_ends():
    spectrum = power_law()
    table = cutoff_from_spectrum(SCHEDULE, spectrum)
    assert np.all(np.diff(table) <= 0)
    np.testing.assert_allclose(table[[250, 500]], 2 * np.array([23.0, 6.4]) / 256, atol=2 * 0.1 / 256)
    assert table[0] == CORNER
    assert table[-1] == 2 * 2.0 / 256
    assert cutoff_from_spectrum(SCHEDULE, spectrum, floor_bins=5.0)[-1] == 2 * 5.0 / 256
    # A stricter ratio resolves less.
    strict = resolved_bins(SCHEDULE, spectrum, snr=4.0)[100:580]
    np.testing.assert_allclose(strict, resolved_bins(SCHEDULE, spectrum)[100:580] / 2, rtol=1e-6)
    # A louder image by c shifts -log S by -2 log c: it is resolved where the ratio is smaller by c^2.
    louder = spectrum._replace(power=9 * spectrum.power)
    np.testing.assert_allclose(resolved_bins(SCHEDULE, louder), resolved_bins(SCHEDULE, spectrum, snr=1 / 9))
    # A flat spectrum is resolved as a whole or not at all.
    flat = resolved_bins(SCHEDULE, power_law(slope=0.0, scale=1.0))
    assert set(flat) == {0.0, 181.0}


def test_a_table_of_cutoffs_feeds_a_filter_without_compiling_again():
    f = low_pass(cutoff_from_spectrum(SCHEDULE, power_law(size=32, scale=30.0)))
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype(np.float32)
    program = jax.jit(lambda x, t: f(x, t))
    assert np.all(np.isfinite(program(x, np.array([0, 500]))))
    np.testing.assert_allclose(program(x, np.array([0, 999]))[0], x[0], atol=1e-5)
    assert program._cache_size() == 1


def test_steeper_spectra_come_into_being_earlier_and_later():
    flat, steep = power_law(-2.0, 64), power_law(-3.0, 64)
    # Equal variance: the energy over all shells, whose number of bins grows with the radius.
    steep = steep._replace(power=steep.power * (flat.power * flat.bins).sum() / (steep.power * steep.bins).sum())
    (a1, a2), (b1, b2) = (window_from_spectrum(SCHEDULE, s) for s in (flat, steep))
    assert b1 < a1
    assert b2 > a2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: window_from_spectrum(SCHEDULE, power_law(), finest_bins=1.0, coarsest_bins=2.0), "coarsest_bins <="),
        (lambda: window_from_spectrum(SCHEDULE, power_law(), coarsest_bins=0.0), "coarsest_bins <="),
        (lambda: window_from_spectrum(SCHEDULE, power_law(0.0)), "no timestep"),
        (lambda: resolved_bins(SCHEDULE, power_law(), snr=0.0), "snr must be positive"),
        (lambda: cutoff_from_spectrum(SCHEDULE, power_law(), floor_bins=0.0), "floor_bins must be positive"),
        (lambda: resolved_bins(SCHEDULE, radial_spectrum(np.ones((3, 1, 1, 2)))), "no structure"),
        (lambda: wiener(SCHEDULE, radial_spectrum(np.ones((3, 8, 8, 1)))), "no structure"),
    ],
)
def test_spectra_that_say_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_real_digits(shared_data):
    raw = gzip.decompress((shared_data / "mnist-t10k" / "t10k-images-idx3-ubyte.gz").read_bytes())
    spectrum = radial_spectrum(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28, 1) / 127.5 - 1)
    np.testing.assert_allclose(resolved_bins(SCHEDULE, spectrum)[[100, 250, 500]], [8.2, 4.7, 1.0], atol=0.05)
    assert window_from_spectrum(SCHEDULE, spectrum) == (316, 501)


def test_the_soft_filter_is_the_gain_of_the_linear_denoiser():
    spectrum = power_law(size=32, scale=30.0)
    t = np.array([100, 400, 900])
    mask = np.asarray(wiener(SCHEDULE, spectrum).mask(32, 32, t), np.float64)
    assert mask.shape == (3, 32, 17)
    alpha2 = SCHEDULE.alphas_cumprod[t]
    for k in (1, 4, 11):
        signal = alpha2 * 30.0 / k**2
        np.testing.assert_allclose(mask[:, 0, k], signal / (signal + 1 - alpha2), rtol=1e-4)
    signal = alpha2 * spectrum.dc
    np.testing.assert_allclose(mask[:, 0, 0], signal / (signal + 1 - alpha2), rtol=1e-4)


def test_shells_of_each_image():
    x = coloured(5, shells())
    power, count = shell_power(x)
    assert power.shape == (5, len(count))
    np.testing.assert_allclose((power * count).sum(axis=1), np.sum(x**2, axis=(1, 2, 3)), rtol=1e-10)
    spectrum = radial_spectrum(x)
    np.testing.assert_allclose(spectrum.power, power.mean(axis=0)[1:])
    assert (spectrum.size, spectrum.planes) == (32, 5)


# Responsibilities.


def test_responsibilities():
    rng = np.random.default_rng(3)
    keep, a0 = rng.normal(size=(300, 4, 4, 1)), rng.normal(size=(2, 4, 4, 1))
    share = responsibility(SCHEDULE, a0, keep, every=20)
    assert share.shape == (1000,)
    assert share[0] > 0.999
    assert share[-1] < 0.05
    # By chunks, one row at a time, and as a sample of a population: the same formula.
    np.testing.assert_allclose(responsibility(SCHEDULE, a0, keep, every=20, chunk=7), share, rtol=1e-9)
    twice = responsibility(SCHEDULE, a0, keep, every=20, population=600, copies=2)
    np.testing.assert_allclose(twice, share, rtol=1e-9)
    # More copies: the image is chosen earlier in the denoising, the window moves to larger t.
    windows = [window_from_responsibility(responsibility(SCHEDULE, a0, keep, every=20, copies=c)) for c in (1, 10)]
    assert windows[1].window[0] > windows[0].window[0]
    assert windows[1].window[1] > windows[0].window[1]
    assert not windows[0].memorised


def test_half_the_share_is_where_the_closed_form_says():
    """For distances that are almost equal the nearest image decides: SNR = 2 log(population / copies) / D^2."""
    rng = np.random.default_rng(0)
    keep, a0 = rng.normal(size=(500, 16, 16, 1)), rng.normal(size=(1, 16, 16, 1))
    share = responsibility(SCHEDULE, a0, keep, every=10, probes=16, seed=7)
    nearest = np.min(np.sum((keep - a0) ** 2, axis=(1, 2, 3)))
    snr = SCHEDULE.alphas_cumprod / (1 - SCHEDULE.alphas_cumprod)
    closed = int(np.sum(snr > 2 * np.log(500) / nearest))
    assert abs(int(np.sum(share > 0.5)) - closed) < 60


def test_a_memorised_image_gets_the_last_quarter_and_bad_input_is_refused():
    assert window_from_responsibility(np.ones(1000)) == ((750, 1000), 1000, True)
    with pytest.raises(ValueError, match="never chosen"):
        window_from_responsibility(np.full(1000, 0.01))
    with pytest.raises(ValueError, match="low < high"):
        window_from_responsibility(np.ones(10), high=0.1, low=0.5)
    keep = np.random.default_rng(0).normal(size=(5, 2, 2, 1))
    with pytest.raises(ValueError, match="forget image 0 is keep image 3"):
        responsibility(SCHEDULE, keep[3:4], keep, every=500)
    with pytest.raises(ValueError, match="copies must be at least 1, got 0\nprobes must be at least 1"):
        responsibility(SCHEDULE, keep[:1], keep[1:], copies=0, probes=0)
    with pytest.raises(ValueError, match="needs forget and keep images"):
        responsibility(SCHEDULE, keep[:0], keep)


# What the model knows.


def test_the_loss_gap_of_a_model_that_knows_its_images():
    """A predictor that removes the noise of one image exactly at small t, and answers zero elsewhere."""
    rng = np.random.default_rng(0)
    known, unknown = rng.normal(size=(1, 4, 4, 1)), rng.normal(size=(6, 4, 4, 1))
    known, unknown = np.float32(known), np.float32(unknown)

    def predict(params, x_t, t, cond=None):
        alpha, sigma = (z(t)[:, None, None, None] for z in (SCHEDULE.alpha, SCHEDULE.sigma))
        eps_hat = (x_t - alpha * known) / sigma
        is_it = (jnp.mean(eps_hat**2, axis=(1, 2, 3)) < 3) & (t < 400)
        return jnp.where(is_it[:, None, None, None], eps_hat, 0)

    probes = make_probe_losses(predict, SCHEDULE, jax.random.key(0), count=10, noises=4)
    t = strata(1000, 10)
    gap = loss_gap(probes, None, Example(known), Example(unknown), t)
    np.testing.assert_allclose(gap.gap[1:4], 1, atol=0.05)  # t = 150, 250, 350
    np.testing.assert_allclose(gap.gap[4:], 0, atol=1e-6)
    assert np.all(gap.error >= 0)
    span, _ = choose_window(SCHEDULE, power_law(slope=-2.0, size=32, scale=30.0), gap, share=0.7)
    assert span[1] <= 400
    with pytest.raises(ValueError, match="at least 2 held-out ones, got 1 and 1"):
        loss_gap(probes, None, Example(known), Example(unknown[:1]), t)
    with pytest.raises(ValueError, match="t must name the 10 strata"):
        loss_gap(probes, None, Example(known), Example(unknown), t[:5])


def gap_of(values, error=0.01):
    return LossGap(T16, np.asarray(values, float), np.full(16, error))


def test_the_window_is_where_images_take_shape_and_the_model_knows_them():
    spectrum = power_law()  # takes shape in [192, 781)
    known = np.where((T16 > 300) & (T16 < 600), 0.5, 0.0)
    span, reasons = choose_window(SCHEDULE, spectrum, gap_of(known), share=1.0)
    assert span == (312, 625)  # the strata's own borders
    assert len(reasons) == 3
    # A gap at small t is cut where nothing but detail is decided.
    span, _ = choose_window(SCHEDULE, spectrum, gap_of(np.where(T16 < 500, 0.5, 0.0)), share=1.0)
    assert span == (192, 500)
    # The same at another schedule, by noise level.
    assert choose_window(scaled_linear(), spectrum, None)[0] == window_from_spectrum(scaled_linear(), spectrum)
    # The shortest run with the share: the small bump is left out; of two equal ones the earlier is taken.
    bumps = np.zeros(16)
    bumps[[5, 6, 12]] = 1.0, 1.0, 0.2
    assert choose_window(SCHEDULE, spectrum, gap_of(bumps), share=0.8)[0] == (312, 437)
    equal = np.zeros(16)
    equal[[5, 9]] = 1.0
    assert choose_window(SCHEDULE, spectrum, gap_of(equal), share=0.5)[0] == (312, 375)


def test_the_window_in_which_it_is_decided_begins_where_images_take_shape():
    spectrum, decided = power_law(), ResponsibilityWindow((400, 900), 650, False)
    # Nothing is known, or as far as the pixels tell: the window stays, from where images take shape.
    for gap in (
        None,
        gap_of(np.zeros(16)),
        gap_of(np.where(T16 < 700, 0.5, 0.0)),
        gap_of(np.where(T16 < 800, 0.5, 0.0)),
    ):
        span, reasons = choose_window(SCHEDULE, spectrum, gap, decided=decided)
        assert span == (192, 900)
        assert "decided in t = [400, 900)" in reasons[0]
        assert not any("moved" in reason for reason in reasons)
    late = ResponsibilityWindow((100, 150), 120, False)
    assert choose_window(SCHEDULE, spectrum, None, decided=late)[0] == (100, 150)
    pixel = radial_spectrum(np.ones((4, 1, 1, 3)))  # nothing takes shape
    assert choose_window(SCHEDULE, pixel, None, decided=decided)[0] == (400, 900)


def test_the_decision_moves_to_where_the_model_stops_knowing_by_one_factor_in_the_snr():
    pixel, decided = radial_spectrum(np.ones((4, 1, 1, 3))), ResponsibilityWindow((400, 900), 650, False)
    log_snr = SCHEDULE.log_snr(np.arange(1000))
    # All that is known counts, however little of the gap lies there; the strata's border is at 500.
    known = np.where(T16 < 500, 0.1, 0.0) + np.where(T16 < 200, 0.8, 0.0)
    (t1, t2), reasons = choose_window(SCHEDULE, pixel, gap_of(known), decided=decided)
    assert f"moved to t = [{t1}, {t2})" in reasons[2]
    change = log_snr[500] - log_snr[650]
    for moved, pixels in ((t1, 400), (t2, 900)):
        assert log_snr[moved] <= log_snr[pixels] + change < log_snr[moved - 1]
    # A memorised image is chosen in the last quarter, whatever the model knows elsewhere.
    assert choose_window(SCHEDULE, pixel, gap_of(known), decided=decided._replace(memorised=True))[0] == (400, 900)


def test_a_schedule_that_ends_in_pure_noise_has_windows_too():
    pixel, ends = radial_spectrum(np.ones((4, 1, 1, 3))), zero_terminal_snr(SCHEDULE)
    known = gap_of(np.where(T16 < 500, 0.5, 0.0))
    for middle in (650, 999, 1000):
        decided = ResponsibilityWindow((400, 1000), middle, False)
        t1, t2 = choose_window(ends, pixel, known, decided=decided)[0]
        assert 0 <= t1 < t2 <= 1000


@pytest.mark.parametrize("bad", [((5, 5), 5), ((-1, 5), 2), ((0, 1001), 5), ((0, 5), 1001)])
def test_decisions_outside_of_the_schedule_are_refused(bad):
    with pytest.raises(ValueError, match="decided must hold 0 <= t1 < t2 <= 1000"):
        choose_window(SCHEDULE, power_law(), None, decided=ResponsibilityWindow(*bad, False))


def test_windows_without_evidence():
    spectrum = power_law()
    for gap in (None, gap_of(np.zeros(16)), gap_of(np.full(16, 0.02)), gap_of(np.full(16, -0.5))):
        span, reasons = choose_window(SCHEDULE, spectrum, gap)
        assert span == (192, 781)
        assert "No loss gap" in reasons[1] or "flat" in reasons[1]
    # Too little in common: the model's own evidence.
    late = np.where(T16 > 900, 0.5, 0.0)
    span, reasons = choose_window(SCHEDULE, spectrum, gap_of(late), share=1.0)
    assert span == (875, 1000)
    assert "too little in common" in reasons[-1]
    # No spectrum (one pixel): the gap alone, or everything.
    pixel = radial_spectrum(np.ones((4, 1, 1, 3)))
    assert choose_window(SCHEDULE, pixel, gap_of(late), share=1.0)[0] == (875, 1000)
    assert choose_window(SCHEDULE, pixel, None)[0] == (0, 1000)


@pytest.mark.parametrize(
    ("gap", "share", "message"),
    [
        (LossGap(T16, np.zeros(15), np.zeros(16)), 0.8, "rising t"),
        (LossGap(T16[::-1], np.zeros(16), np.zeros(16)), 0.8, "rising t"),
        (LossGap(T16 + 100, np.zeros(16), np.zeros(16)), 0.8, "0..999"),
        (LossGap(T16, np.full(16, np.nan), np.zeros(16)), 0.8, "finite"),
        (LossGap(T16, np.ones(16), np.zeros(16)), 0.0, "share must lie in"),
    ],
)
def test_bad_gaps_are_refused(gap, share, message):
    with pytest.raises(ValueError, match=message):
        choose_window(SCHEDULE, power_law(), gap, share=share)


# What sets the forget images apart.

SIZE = 32


def filter_for(forget, keep=None, resolved=23.0, count=200, forget_count=20, floor=0.0):
    keep = shells() if keep is None else keep
    a, b = shell_power(coloured(forget_count, forget, seed=1)), shell_power(coloured(count, keep, seed=2))
    return choose_filter(a.power, b.power, a.count, resolved, SIZE, floor=floor)


def test_the_band_in_which_spectra_differ():
    nyquist = lambda bins: 2 * bins / SIZE  # noqa: E731
    # More power at low, middle and high radii: low-pass, band, high-pass.
    name, cutoff, reasons, difference = filter_for(shells(s1=300.0, s3=60.0))
    assert (name, cutoff) == ("low_pass", nyquist(3.5))
    assert set(np.flatnonzero(difference)) <= set(range(0, 5)) | set(range(5, 23))
    assert "bins" in reasons[-1]
    name, cutoff, *_ = filter_for(shells(s6=50.0, s7=50.0, s8=50.0))
    assert (name, cutoff) == ("band", (nyquist(5.5), nyquist(8.5)))
    high = shells()
    high[8:] = 5.0
    name, cutoff, *_ = filter_for(high)
    assert name == "high_pass"
    assert nyquist(7.0) < cutoff < nyquist(11.0)
    # Everywhere different: no filter.
    assert filter_for(3 * shells())[0] == "low_pass"  # most of the power is low
    assert filter_for(shells(0.0) + 20.0, keep=shells(0.0) + 1.0)[0] == "high_pass"  # most of the bins are high
    broad = shells(s0=3e3, s1=500.0)
    broad[8:] = 5.0
    assert filter_for(broad)[:2] == ("none", None)
    # Less power counts too.
    less = shells(s6=0.0, s7=0.0)
    name, cutoff, *_ = filter_for(less)
    assert (name, cutoff) == ("band", (nyquist(5.5), nyquist(7.5)))


def test_what_noise_hides_is_left_out():
    nyquist = lambda bins: 2 * bins / SIZE  # noqa: E731
    both = shells(s1=300.0, s12=90.0, s13=90.0, s14=90.0)
    assert filter_for(both)[:2] == ("low_pass", nyquist(14.5))
    name, cutoff, *_ = filter_for(both, resolved=8.0)
    assert (name, cutoff) == ("low_pass", nyquist(2.0))  # never below the floor of 2 bins
    # Nothing differs within what is resolved: the band is what is resolved.
    only_high = shells(s12=90.0, s13=90.0)
    name, cutoff, reasons, difference = filter_for(only_high, resolved=8.0)
    assert (name, cutoff) == ("low_pass", nyquist(8.0))
    assert not difference.any()
    assert "do not differ" in reasons[-1]


def test_filters_are_not_narrow():
    """By default nothing below half of Nyquist is cut, wherever the power differs."""
    for changed in (shells(s1=300.0), shells(s3=60.0), shells(s6=50.0, s7=50.0)):
        assert filter_for(changed, floor=0.5)[:2] == ("low_pass", 0.5)
    name, cutoff, reasons, _ = filter_for(shells(), resolved=3.0, floor=0.5)
    assert (name, cutoff) == ("low_pass", 0.5)
    assert "up to 3 of 23 bins are resolved" in reasons[0]
    assert "keeps at least 8 bins" in reasons[0]
    assert filter_for(shells(s12=90.0, s13=90.0, s14=90.0), floor=0.5)[:2] == ("band", (11.5 / 16, 14.5 / 16))


def test_the_share_that_a_band_holds_is_what_is_said():
    name, (inner, outer), reasons, difference = filter_for(shells(s6=50.0, s7=50.0, s8=50.0))
    first, last = round(inner * SIZE / 2 + 0.5), round(outer * SIZE / 2 - 0.5)
    held = difference[first : last + 1].sum() / difference.sum()
    assert reasons[-1].startswith(f"{held:.0%} of the difference")
    assert f"bins {first} to {last}." in reasons[-1]


def test_filters_without_evidence():
    same = shells()
    assert filter_for(same)[:2] == ("none", None)
    assert filter_for(same, resolved=8.0)[:2] == ("low_pass", 0.5)
    assert filter_for(same, resolved=0.0)[:2] == ("low_pass", 2 * 2 / SIZE)
    name, cutoff, reasons, _ = filter_for(shells(s1=300.0), count=MIN_KEEP - 1, resolved=8.0)
    assert (name, cutoff) == ("low_pass", 0.5)
    assert "too few to compare" in reasons[-1]
    # One forget image: its own scatter must not look like a difference.
    assert filter_for(same, forget_count=1, resolved=8.0)[:2] == ("low_pass", 0.5)


# The whole choice.


def test_the_choice_joins_all_and_is_deterministic():
    forget, keep = coloured(10, shells(s1=300.0, s2=100.0), seed=3), coloured(100, shells(), seed=4)
    known = np.where((T16 > 300) & (T16 < 700), 0.5, 0.0)
    a, b = (choose(SCHEDULE, forget, keep, gap=gap_of(known)) for _ in range(2))
    assert a[:5] == b[:5]
    assert a.filter == "low_pass"
    assert a.kind == "ideal"
    assert 0 < a.window[0] < a.window[1] < 1000
    assert all(isinstance(r, str) and r.endswith(".") for r in a.reasons)
    sizes = {k: np.shape(v) for k, v in a.curves.items()}
    assert sizes["bins"] == sizes["forget_power"] == sizes["keep_power"] == sizes["difference"] == (24,)
    assert sizes["cutoff"] == sizes["resolved_bins"] == (1000,)
    assert sizes["gap"] == sizes["gap_t"] == sizes["gap_error"] == (16,)
    # The order of the images has no effect.
    c = choose(SCHEDULE, forget[::-1], keep[::-1], gap=gap_of(known))
    assert c.window == a.window
    np.testing.assert_allclose(c.cutoff, a.cutoff)


def test_forget_images_that_equal_keep():
    keep = coloured(64, shells(), seed=4)
    choice = choose(SCHEDULE, keep, keep, gap=gap_of(np.zeros(16)))
    assert choice.window == window_from_spectrum(SCHEDULE, radial_spectrum(keep))
    assert choice.filter in ("low_pass", "none")
    assert any("do not differ" in r for r in choice.reasons)
    assert any("flat" in r for r in choice.reasons)


@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 8, 8, 1)], ids=["one pixel", "constant"])
def test_images_without_structure(shape):
    choice = choose(SCHEDULE, np.zeros(shape), np.zeros((40, *shape[1:])))
    assert choice.window == (0, 1000)
    assert choice.filter == ("none" if shape[1] == 1 else "low_pass")
    assert any("structure" in r for r in choice.reasons)


def test_too_few_and_misshapen_images():
    keep = coloured(40, shells(), seed=4)
    one = choose(SCHEDULE, keep[:1], keep[1:])
    assert one.filter in ("low_pass", "none")
    alone = choose(SCHEDULE, keep[:1], keep[:0])
    assert any("0 keep images are too few" in r for r in alone.reasons)
    for forget, others in ((keep[:0], keep), (keep, keep[:, :16]), (keep[0], keep)):
        with pytest.raises(ValueError, match="at least one forget image"):
            choose(SCHEDULE, forget, others)
    with pytest.raises(ValueError, match="must be finite"):
        choose(SCHEDULE, keep * np.nan, keep)


def test_applying_a_choice_selects():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32, 32, 1)), jnp.float32)
    t = np.array([100, 300, 600])
    narrow = Choice((250, 500), "band", "ideal", (0.2, 0.5), (), {})
    whole = Choice((0, 1000), "none", "ideal", None, (), {})
    got = tm.evaluate(lambda x: apply_choice(narrow, mean_squares, 1000, backend="matmul")(x, t), x)
    want = tm.evaluate(lambda x: mean_squares(band(0.2, 0.5)(x, t), t), x)
    np.testing.assert_allclose(got, np.array([0, 4, 0]) * want, rtol=1e-4)
    assert apply_choice(whole, sum_squares, 1000) is sum_squares
    low = Choice((0, 1000), "low_pass", "ideal", 0.3, (), {})
    np.testing.assert_allclose(
        apply_choice(low, mean_squares, 1000)(x, t), mean_squares(low_pass(0.3)(x, t), t), rtol=1e-4
    )
