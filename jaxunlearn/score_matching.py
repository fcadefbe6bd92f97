r"""Score matching in continuous time: three SDEs, the denoising loss, and the four parameterisations.

An SDE is described by its perturbation kernel ``x_tau = alpha(tau) x0 + sigma(tau) eps`` for tau in [0, 1] and by
``dx = f(tau) x dtau + g(tau) dw`` (Song et al. 2021, arXiv 2011.13456, section 3.4 and appendix B). With
``x_tau = alpha x0 + sigma eps`` one network output determines all others:

===========  ====================================  =========================================
from         eps                                   score of p(x_tau)
===========  ====================================  =========================================
``eps``      eps                                   -eps / sigma
``x0``       (x_tau - alpha x0) / sigma            (alpha x0 - x_tau) / sigma^2
``v``        alpha v + sigma x_tau                 -(alpha v + sigma x_tau) / sigma
``score``    -sigma score                          score
===========  ====================================  =========================================

The ``v`` row holds for variance-preserving kernels, ``alpha^2 + sigma^2 = 1``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.errors import at_least_float32
from jaxunlearn.schedule import per_example
from jaxunlearn.types import Array, PyTree


class SDE(Protocol):
    """A linear stochastic differential equation; every function maps tau [...] to the same shape."""

    def alpha(self, tau: Array) -> Array:
        """Scale of the clean image."""
        ...

    def sigma(self, tau: Array) -> Array:
        """Standard deviation of the noise."""
        ...

    def drift(self, tau: Array) -> Array:
        """f in ``dx = f x dtau + g dw``."""
        ...

    def diffusion(self, tau: Array) -> Array:
        """g in ``dx = f x dtau + g dw``."""
        ...


@dataclasses.dataclass(frozen=True)
class VP:
    """Variance preserving: beta rises linearly from ``beta_min`` to ``beta_max`` (the continuous DDPM).

    >>> sde = VP()
    >>> bool(abs(sde.alpha(0.3)**2 + sde.sigma(0.3)**2 - 1) < 1e-6)
    True
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def beta(self, tau: Array) -> Array:
        """Rate of noise at tau."""
        return self.beta_min + tau * (self.beta_max - self.beta_min)

    def log_alpha(self, tau: Array) -> Array:
        """``-1/2 integral of beta``."""
        return -0.25 * tau**2 * (self.beta_max - self.beta_min) - 0.5 * tau * self.beta_min

    def alpha(self, tau: Array) -> Array:
        return jnp.exp(self.log_alpha(tau))

    def sigma(self, tau: Array) -> Array:
        return jnp.sqrt(-jnp.expm1(2 * self.log_alpha(tau)))

    def drift(self, tau: Array) -> Array:
        return -0.5 * self.beta(tau)

    def diffusion(self, tau: Array) -> Array:
        return jnp.sqrt(self.beta(tau))


@dataclasses.dataclass(frozen=True)
class SubVP(VP):
    """The sub-VP SDE: the mean of :class:`VP`, a smaller variance, ``sigma = 1 - alpha^2``."""

    def sigma(self, tau: Array) -> Array:
        return -jnp.expm1(2 * self.log_alpha(tau))

    def diffusion(self, tau: Array) -> Array:
        return jnp.sqrt(self.beta(tau) * -jnp.expm1(4 * self.log_alpha(tau)))


@dataclasses.dataclass(frozen=True)
class VE:
    """Variance exploding: the image stays, ``sigma`` grows geometrically from ``sigma_min`` to ``sigma_max``.

    The kernel starts from ``sigma(0) = sigma_min``; the data at tau = 0 are already that noisy.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def alpha(self, tau: Array) -> Array:
        return jnp.ones_like(jnp.asarray(tau, jnp.result_type(float)))

    def sigma(self, tau: Array) -> Array:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** jnp.asarray(tau)

    def drift(self, tau: Array) -> Array:
        return jnp.zeros_like(jnp.asarray(tau, jnp.result_type(float)))

    def diffusion(self, tau: Array) -> Array:
        return self.sigma(tau) * jnp.sqrt(2 * jnp.log(self.sigma_max / self.sigma_min))


def perturb(sde: SDE, x0: Array, eps: Array, tau: Array) -> Array:
    """``alpha(tau) x0 + sigma(tau) eps``: [B,H,W,C], tau [B] in [0, 1]."""
    return per_example(sde.alpha(tau), x0) * x0 + per_example(sde.sigma(tau), x0) * eps


def score_from_eps(eps: Array, sigma: Array) -> Array:
    """``-eps / sigma``; sigma [B]."""
    return -eps / per_example(sigma, eps)


def eps_from_score(score: Array, sigma: Array) -> Array:
    """``-sigma score``; sigma [B]."""
    return -per_example(sigma, score) * score


def _need_alpha(who: str, alpha: Array) -> None:
    if not isinstance(alpha, jax.core.Tracer) and np.any(np.asarray(alpha) == 0):
        raise ValueError(f"{who} needs alpha > 0: at alpha = 0 (zero terminal SNR) nothing is left of the image")


def x0_from_eps(x_tau: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
    """``(x_tau - sigma eps) / alpha``; alpha, sigma [B].

    Raises:
      ValueError: an alpha of 0 (values that are traced are not looked at).
    """
    _need_alpha("x0_from_eps", alpha)
    return (x_tau - per_example(sigma, eps) * eps) / per_example(alpha, eps)


def eps_from_x0(x_tau: Array, x0: Array, alpha: Array, sigma: Array) -> Array:
    """``(x_tau - alpha x0) / sigma``; alpha, sigma [B]. Also the regression target of a noised x_tau seen from x0."""
    return (x_tau - per_example(alpha, x0) * x0) / per_example(sigma, x0)


def v_from_eps(x_tau: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
    """``(eps - sigma x_tau) / alpha``; alpha, sigma [B], alpha^2 + sigma^2 = 1.

    Raises:
      ValueError: an alpha of 0 (values that are traced are not looked at).
    """
    _need_alpha("v_from_eps", alpha)
    return (eps - per_example(sigma, eps) * x_tau) / per_example(alpha, eps)


def eps_from_v(x_tau: Array, v: Array, alpha: Array, sigma: Array) -> Array:
    """``alpha v + sigma x_tau``; alpha, sigma [B], alpha^2 + sigma^2 = 1."""
    return per_example(alpha, v) * v + per_example(sigma, v) * x_tau


WEIGHTINGS = ("noise", "likelihood", "none")


def denoising_score_matching(
    score_fn: Callable[[PyTree, Array, Array], Array],
    params: PyTree,
    x0: Array,
    tau: Array,
    eps: Array,
    sde: SDE,
    *,
    weighting: str = "noise",
) -> Array:
    """Denoising score matching, one number per example (Vincent 2011; Song et al. 2021, Eq. 7).

    ``lambda(tau) sum_hwc (score(x_tau, tau) + eps / sigma(tau))^2`` with ``x_tau = alpha x0 + sigma eps``.

    Args:
      score_fn: ``(params, x_tau [B,H,W,C], tau [B]) -> score [B,H,W,C]``.
      params: its parameters.
      x0: [B,H,W,C], clean images.
      tau: [B] in (0, 1].
      eps: [B,H,W,C], standard normal.
      sde: the perturbation.
      weighting: ``noise`` sigma^2 (equals ``sum (eps_hat - eps)^2``); ``likelihood`` g^2 (bounds the negative
        log-likelihood, Song et al. 2021, arXiv 2101.09258); ``none`` 1.

    Returns:
      [B], float32 or wider.

    Raises:
      ValueError: unknown weighting.

    >>> import jax, jax.numpy as jnp
    >>> x0, tau = jnp.ones((2, 4, 4, 1)), jnp.array([0.2, 0.9])
    >>> eps = jax.random.normal(jax.random.key(0), x0.shape)
    >>> sde = VP()
    >>> exact = lambda params, x, tau: score_from_eps(eps, sde.sigma(tau))
    >>> bool(jnp.all(denoising_score_matching(exact, None, x0, tau, eps, sde) < 1e-10))
    True
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}; known: {', '.join(WEIGHTINGS)}")
    sigma = sde.sigma(tau)
    score = at_least_float32(score_fn(params, perturb(sde, x0, eps, tau), tau))
    # sigma * (score + eps / sigma) avoids dividing by a small sigma where the weight would multiply it again.
    scaled = per_example(sigma, eps) * score + eps
    squares = jnp.sum(jnp.square(scaled), axis=tuple(range(1, scaled.ndim)))
    if weighting == "noise":
        return squares
    if weighting == "likelihood":
        return squares * jnp.square(sde.diffusion(tau) / sigma)
    return squares / jnp.square(sigma)
