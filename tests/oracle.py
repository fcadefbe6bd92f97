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


def objective(
    name,
    params,
    x0,
    a0,
    t,
    eps,
    u,
    alphas_cumprod,
    *,
    lam=0.5,
    noise=None,
    m=None,
    time_weight=None,
    neighbours=None,
    surrogate=None,
    ref=None,
    **options,
):
    """Terms and gradients of a method; ``m`` and ``time_weight`` select in the forget term.

    ``ref`` are the reference parameters, or the pair (center, precision) of an anchor.
    """
    alpha, sigma = alpha_sigma(alphas_cumprod, t)
    x_t, a_t = noised(x0, eps, alpha, sigma), noised(a0, eps, alpha, sigma)
    select = {"m": m, "time_weight": time_weight}
    if name in ("npo", "simnpo", "dpo", "kto"):
        return preference(name, params, ref, x0, a0, t, eps, alphas_cumprod, **select, **options)
    if name in ("mirrored", "clamped"):
        options["cap"] = np.broadcast_to(options["cap"], alphas_cumprod.shape)[t]
        return bounded(params, x0, a0, t, eps, alphas_cumprod, **select, **options)
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
        if name in ("naive", "siss_no_is", "erasediff", "retrack", "surrogate", "fisher_anchor"):
            out["keep"] = _branch(params, x_t, t, eps)
        if name in ("neggrad", "siss_no_is", "vdu_style", "fisher_anchor"):
            out["forget"] = _branch(params, a_t, t, eps, **select)
        if name == "erasediff":
            out["forget"] = _branch(params, a_t, t, noise, **select)
        if name in ("retrack", "surrogate"):
            near = neighbours if name == "retrack" else surrogate[:, None]
            target = redirection(a0, near, eps, alpha, sigma)[2].astype(np.float64)
            out["forget"] = _branch(params, a_t, t, target, **select)
        if name in ("vdu_style", "fisher_anchor"):
            value, gradient = anchor(params, *ref)
            out["anchor"] = np.full(len(t), value), gradient
    return {k: v for k, (v, _) in out.items()}, {k: g for k, (_, g) in out.items()}


# Redirection.


def redirection(a0, neighbours, eps, alpha, sigma):
    """``(w [B,K], v [B,K,H,W,C], target [B,H,W,C], spread [B])`` from the K noises that lead to the noised forget image.

    The weights by their definition: Gaussian densities of a_t around the neighbours, in extended precision.
    """
    a0, neighbours, eps, alpha, sigma = (np.asarray(z, np.longdouble) for z in (a0, neighbours, eps, alpha, sigma))
    a_t = noised(a0, eps, alpha, sigma)
    v = np.stack([(a_t - col(alpha) * y) / col(sigma) for y in np.moveaxis(neighbours, 1, 0)], axis=1)
    log_density = -(v**2).sum(axis=(2, 3, 4)) / 2
    w = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    w /= w.sum(axis=1, keepdims=True)
    target = np.einsum("bk,bkhwc->bhwc", w, v)
    spread = np.einsum("bk,bk->b", w, ((v - target[:, None]) ** 2).sum(axis=(2, 3, 4)))
    return w, v, target, spread


# Preference losses of the error m: value and slope. `sigmoid` and `softplus` by exponentials of the safe sign.


def sigmoid(z):
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, small) / (1 + small)


def softplus(z):
    """log(1 + e^z) = -log sigmoid(-z)."""
    return np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))


def npo(d, beta):
    return 2 / beta * softplus(-beta * d), -2 * sigmoid(-beta * d)


def dpo(d_keep, d_forget, beta):
    """Value, slope in m_keep; the slope in m_forget is its negative."""
    z = beta / 2 * (d_keep - d_forget)
    return softplus(z), beta / 2 * sigmoid(z)


def kto(d, y, beta):
    z = y * beta * -d
    return 1 - sigmoid(z), y * beta * sigmoid(z) * sigmoid(-z)


def _error_and_gradient(params, z_t, t, target, m, time_weight, size):
    """m [B] per value, and a function from weights [B] to the gradient of mean(weights * m)."""
    residual = net(params, z_t, t) - target
    value, slope = squares(residual, m, time_weight)
    gradient = lambda w: net_gradient(params, z_t, t, col(w) * slope / size / len(z_t))  # noqa: E731
    return value / size, gradient


def preference(name, params, ref, x0, a0, t, eps, alphas_cumprod, *, m, time_weight, beta=1.0, level=1.0, delta=0.0):
    """Terms and gradients of npo, simnpo, dpo and kto with errors averaged over pixels; npo's beta is divided by level."""
    alpha, sigma = alpha_sigma(alphas_cumprod, t)
    x_t, a_t = noised(x0, eps, alpha, sigma), noised(a0, eps, alpha, sigma)
    size = x0[0].size
    none = {"m": None, "time_weight": None, "size": size}
    selected = {"m": m, "time_weight": time_weight, "size": size}
    keep, keep_gradient = _error_and_gradient(params, x_t, t, eps, **none)
    forget, forget_gradient = _error_and_gradient(params, a_t, t, eps, **selected)
    if name in ("npo", "simnpo"):
        before = delta if name == "simnpo" else _error_and_gradient(ref, a_t, t, eps, **selected)[0]
        value, slope = npo(forget - before, beta / level)
        out = {"keep": (keep, keep_gradient(np.ones(len(t)))), "forget": (value, forget_gradient(slope))}
    elif name == "dpo":
        win, win_gradient = _error_and_gradient(params, x_t, t, eps, **selected)
        before = [_error_and_gradient(ref, z, t, eps, **selected)[0] for z in (x_t, a_t)]
        value, slope = dpo(win - before[0], forget - before[1], beta)
        up, down = win_gradient(slope), forget_gradient(-slope)
        out = {"forget": (value, add(up, 1.0, down))}
    else:
        d = keep - _error_and_gradient(ref, x_t, t, eps, **none)[0]
        kept, kept_slope = kto(d, +1, beta)
        d = forget - _error_and_gradient(ref, a_t, t, eps, **selected)[0]
        value, slope = kto(d, -1, beta)
        out = {"keep": (kept, keep_gradient(kept_slope)), "forget": (value, forget_gradient(slope))}
    return {k: v for k, (v, _) in out.items()}, {k: g for k, (_, g) in out.items()}


def bounded(params, x0, a0, t, eps, alphas_cumprod, *, cap, m, time_weight):
    """Terms and gradients of bounded ascent; ``cap`` [B] beside the error averaged over pixels, inf for none."""
    alpha, sigma = alpha_sigma(alphas_cumprod, t)
    size = x0[0].size
    keep = _error_and_gradient(params, noised(x0, eps, alpha, sigma), t, eps, None, None, size)
    forget = _error_and_gradient(params, noised(a0, eps, alpha, sigma), t, eps, m, time_weight, size)
    below = forget[0] < cap
    terms = {"keep": keep[0], "forget": np.where(below, forget[0], cap)}
    return terms, {"keep": keep[1](np.ones(len(t))), "forget": forget[1](below.astype(float))}


def anchor(params, center, precision):
    value = sum(0.5 * (precision[k] * (params[k] - center[k]) ** 2).sum() for k in params)
    return value, {k: precision[k] * (params[k] - center[k]) for k in params}


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


def pcgrad(keep, forget, w_keep, w_forget, sign=-1, two_sided=True):
    """Each vector minus its projection on the other, where they conflict (plain vectors, one after the other)."""
    names = sorted(keep)
    g = np.concatenate([np.ravel(keep[k]) for k in names]).astype(np.float64)
    h = sign * np.concatenate([np.ravel(forget[k]) for k in names]).astype(np.float64)
    new_g, new_h = g, h
    if g @ h < 0:
        new_h = h - (h @ g) / (g @ g) * g
        if two_sided:
            new_g = g - (g @ h) / (h @ h) * h
    flat, out = w_keep * new_g + w_forget * new_h, {}
    for k in names:
        out[k], flat = flat[: keep[k].size].reshape(keep[k].shape), flat[keep[k].size :]
    return out


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


# The optimal denoiser of a finite weighted set, one row at a time.


def weighted_set_eps(x, t, images, weights, bandwidth, alphas_cumprod):
    """``sigma / v (x - alpha E[y | x])`` with v = sigma^2 + alpha^2 h^2; x [B,...], t [B], images [N,...], weights [N]."""
    out = []
    for one, alpha, sigma in zip(x, *alpha_sigma(alphas_cumprod, t)):
        v = sigma**2 + alpha**2 * bandwidth**2
        log_w = [
            np.log(c) - ((one - alpha * y) ** 2).sum() / (2 * v) if c > 0 else -np.inf for c, y in zip(weights, images)
        ]
        w = np.exp(np.array(log_w) - max(log_w))
        mean = np.tensordot(w / w.sum(), images, axes=1)
        out.append(sigma / v * (one - alpha * mean))
    return np.array(out)


def weighted_set_log_density(x, t, images, weights, bandwidth, alphas_cumprod):
    """log of the mixture of N(alpha y_i, v I) with the given weights, [B]."""
    out, size = [], np.asarray(x)[0].size
    for one, alpha, sigma in zip(x, *alpha_sigma(alphas_cumprod, t)):
        v = sigma**2 + alpha**2 * bandwidth**2
        terms = [-((one - alpha * y) ** 2).sum() / (2 * v) for y in images]
        top = max(term for term, c in zip(terms, weights) if c > 0)
        total = sum(c * np.exp(term - top) for term, c in zip(terms, weights))
        out.append(top + np.log(total / sum(weights)) - size / 2 * np.log(2 * np.pi * v))
    return np.array(out)


# Gaussians under the noise of a schedule.


def gaussian_eps(x, alpha, sigma, mean, covariance):
    """The exact noise prediction of N(mean, covariance): sigma C^-1 (x - alpha mean), C = alpha^2 S + sigma^2 I."""
    noisy = alpha**2 * covariance + sigma**2 * np.eye(len(mean))
    return sigma * np.linalg.solve(noisy, (x - alpha * mean).T).T


def gaussian_log_density(x, mean, covariance):
    gap = x - mean
    _, logdet = np.linalg.slogdet(2 * np.pi * covariance)
    return -0.5 * (gap * np.linalg.solve(covariance, gap.T).T).sum(axis=1) - 0.5 * logdet


def gaussian_kl(mean, covariance, other_mean, other_covariance):
    inverse, gap = np.linalg.inv(other_covariance), other_mean - mean
    logdets = np.linalg.slogdet(other_covariance)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (np.trace(inverse @ covariance) + gap @ inverse @ gap - len(mean) + logdets)
