"""The formulas in numpy, float64 (weights in extended precision), written from the papers; imports nothing of the library.

Conventions: images [B,H,W,C]; ``alpha`` and ``sigma`` are [B]; a gradient is a dict of arrays. The errors are sums over
pixels and channels, the losses means over examples.
"""

from __future__ import annotations

import numpy as np

# Schedules: the tables alphas_cumprod, by their recurrences.


def table(betas):
    """prod_{s <= t} (1 - beta_s), one factor after the other."""
    out, product = [], 1.0
    for beta in betas:
        product *= 1.0 - float(beta)
        out.append(product)
    return np.array(out)


def linear_table(steps=1000, first=1e-4, last=0.02):
    return table([first + (last - first) * i / (steps - 1) for i in range(steps)])


def scaled_linear_table(steps=1000, first=0.00085, last=0.012):
    low, high = first**0.5, last**0.5
    return table([(low + (high - low) * i / (steps - 1)) ** 2 for i in range(steps)])


def cosine_table(steps=1000, cap=0.999):
    def f(u):
        return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2

    return table([min(1 - f((i + 1) / steps) / f(i / steps), cap) for i in range(steps)])


def alpha_sigma(alphas_cumprod, t):
    bar = np.asarray(alphas_cumprod, np.float64)[np.asarray(t)]
    return np.sqrt(bar), np.sqrt(1 - bar)


def col(values):
    return np.asarray(values)[:, None, None, None]


def noised(z0, eps, alpha, sigma):
    return col(alpha) * z0 + col(sigma) * eps


# A small tanh network with its own backward pass. Two arrays: "inner" [2C+2, hidden] and "outer" [hidden, C].


def net_params(seed, channels, hidden=4):
    rng = np.random.default_rng(seed)
    return {
        "inner": 0.7 * rng.normal(size=(2 * channels + 2, hidden)),
        "outer": 0.7 * rng.normal(size=(hidden, channels)),
    }


def net_features(x, t):
    """Pixel values, their mean over the image, a function of t, and 1."""
    mean = np.broadcast_to(x.mean(axis=(1, 2), keepdims=True), x.shape)
    time = np.broadcast_to(col(np.sin(np.asarray(t, np.float64) / 100)), (*x.shape[:3], 1))
    return np.concatenate([x, mean, time, np.ones((*x.shape[:3], 1))], axis=-1)


def net(params, x, t):
    return np.tanh(net_features(x, t) @ params["inner"]) @ params["outer"]


def net_gradient(params, x, t, cotangent):
    """Gradient of sum(cotangent * net) in the parameters."""
    features = net_features(x, t)
    hidden = np.tanh(features @ params["inner"])
    back = (cotangent @ params["outer"].T) * (1 - hidden**2)
    flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    return {"inner": flat(features).T @ flat(back), "outer": flat(hidden).T @ flat(cotangent)}


# Filters by the full complex transform.


def radius(height, width):
    """Of every bin of the full spectrum, in units of the Nyquist frequency."""

    def frequency(n):
        return np.array([(k if k < (n + 1) // 2 else k - n) / n for k in range(n)]) / 0.5

    return np.sqrt(frequency(height)[:, None] ** 2 + frequency(width)[None, :] ** 2)


def mask(kind, cutoff, height, width, order=2):
    rho = radius(height, width)
    if kind == "ideal":
        return (rho <= cutoff * (1 + 1e-9)).astype(float)
    if kind == "gaussian":
        return np.exp(-(rho**2) / (2 * cutoff**2))
    return 1 / np.sqrt(1 + (rho / cutoff) ** (2 * order))


def apply_mask(x, m):
    """``(filtered image, largest imaginary part)``; ``m`` is [H,W] or [B,H,W]."""
    m = m[None] if m.ndim == 2 else m
    y = np.fft.ifft2(np.fft.fft2(x, axes=(1, 2)) * m[..., None], axes=(1, 2))
    return y.real, np.abs(y.imag).max()


def squares(residual, m=None, weight=None):
    """Sum of squares per example and its derivative, with a filter mask and weights [B] where given."""
    if m is None:
        value, slope = (residual**2).sum(axis=(1, 2, 3)), 2 * residual
    else:
        passed, _ = apply_mask(residual, m)
        value, slope = (passed**2).sum(axis=(1, 2, 3)), 2 * apply_mask(passed, m)[0]
    if weight is not None:
        value, slope = weight * value, col(weight) * slope
    return value, slope


# SISS.


def log_density(m, z, alpha, sigma):
    """log N(m; alpha z, sigma^2) up to a constant, summed over the image, in extended precision."""
    m, z, alpha, sigma = (np.asarray(v, np.longdouble) for v in (m, z, alpha, sigma))
    return -((m - col(alpha) * z) ** 2).sum(axis=(1, 2, 3)) / (2 * sigma**2)


def mixture_weights(gap, lam):
    """q(m|x0) / q_lam(m) and q(m|a0) / q_lam(m), densities divided by the larger of the two."""
    gap, lam = np.asarray(gap, np.longdouble), np.longdouble(lam)
    keep, forget = np.exp(-np.maximum(gap, 0)), np.exp(-np.maximum(-gap, 0))
    mixture = (1 - lam) * keep + lam * forget
    with np.errstate(divide="ignore", over="ignore"):
        return keep / mixture, forget / mixture


def siss_weights(m, x0, a0, alpha, sigma, lam):
    gap = log_density(m, a0, alpha, sigma) - log_density(m, x0, alpha, sigma)
    return gap, *mixture_weights(gap, lam)


# Objectives: ``(terms {name: [B]}, gradients {name: gradient of the mean of the term})``.


def _branch(params, z_t, t, target, weight=None, m=None, time_weight=None):
    residual = net(params, z_t, t) - target
    value, slope = squares(residual, m, time_weight)
    if weight is not None:
        weight = np.asarray(weight, np.float64)
        value, slope = weight * value, col(weight) * slope
    return value, net_gradient(params, z_t, t, slope / len(z_t))


def objective(name, params, x0, a0, t, eps, u, alphas_cumprod, *, lam=0.5, noise=None, m=None, time_weight=None):
    """Terms and gradients of a method; ``m`` and ``time_weight`` select in the forget term."""
    alpha, sigma = alpha_sigma(alphas_cumprod, t)
    x_t, a_t = noised(x0, eps, alpha, sigma), noised(a0, eps, alpha, sigma)
    select = {"m": m, "time_weight": time_weight}
    if name in ("siss", "bernoulli"):
        from_forget = u < lam
        m_t = np.where(col(from_forget), a_t, x_t)
        if name == "siss":
            _, w_keep, w_forget = siss_weights(m_t, x0, a0, alpha, sigma, lam)
        else:
            w_keep, w_forget = ~from_forget / (1 - lam), from_forget / lam
        out = {
            "keep": _branch(params, m_t, t, (m_t - col(alpha) * x0) / col(sigma), w_keep),
            "forget": _branch(params, m_t, t, (m_t - col(alpha) * a0) / col(sigma), w_forget, **select),
        }
    else:
        out = {}
        if name in ("naive", "siss_no_is", "erasediff"):
            out["keep"] = _branch(params, x_t, t, eps)
        if name in ("neggrad", "siss_no_is"):
            out["forget"] = _branch(params, a_t, t, eps, **select)
        if name == "erasediff":
            out["forget"] = _branch(params, a_t, t, noise, **select)
    return {k: v for k, (v, _) in out.items()}, {k: g for k, (_, g) in out.items()}


# Combiners on dicts of arrays.


def dot(a, b):
    return sum(float((a[k] * b[k]).sum()) for k in a)


def norm(a):
    return np.sqrt(dot(a, a))


def add(a, scale, b):
    return {k: a[k] + scale * b[k] for k in a}


def fixed_norm(keep, forget, c, sign=-1):
    return add(keep, sign * c / norm(forget), forget)


def relative_norm(keep, forget, rho, sign=-1):
    return fixed_norm(keep, forget, rho * norm(keep), sign)


def erasediff(keep, forget, eta):
    return add(keep, max(eta - dot(keep, forget) / dot(forget, forget), 0.0), forget)


# The optimiser: clipping by the global norm, AdamW (Loshchilov and Hutter).


def clip(g, limit):
    scale = min(1.0, limit / norm(g))
    return {k: scale * v for k, v in g.items()}


def adamw(params, g, state, rate, b1=0.9, b2=0.999, tiny=1e-8, decay=1e-4):
    """``(params, state)``; the state is ``(count, first moments, second moments)``, None at the start."""
    zero = {k: np.zeros_like(v) for k, v in params.items()}
    count, first, second = state or (0, zero, zero)
    count += 1
    first = {k: b1 * first[k] + (1 - b1) * g[k] for k in g}
    second = {k: b2 * second[k] + (1 - b2) * g[k] ** 2 for k in g}
    new = {
        k: params[k]
        - rate * (first[k] / (1 - b1**count) / (np.sqrt(second[k] / (1 - b2**count)) + tiny) + decay * params[k])
        for k in params
    }
    return new, (count, first, second)
