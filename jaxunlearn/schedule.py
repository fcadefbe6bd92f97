"""Noise schedules: the table ``alphas_cumprod`` and what follows from it.

``x_t = alpha(t) x0 + sigma(t) eps`` with ``alpha = sqrt(alphas_cumprod)`` and ``sigma = sqrt(1 - alphas_cumprod)``
(DDPM, Ho et al. 2020, Eq. 4). Timestep 0 is the cleanest.

Between two timesteps, at a floating t, ``log_snr`` is linear in t, and alpha and sigma follow from it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving noise schedule.

    Attributes:
      alphas_cumprod: float64 numpy [T], strictly between 0 (allowed at the last step only) and 1, non-increasing.

    Raises:
      ValueError: the table is not one-dimensional, not in range, or increases somewhere.

    >>> linear(1000).num_steps
    1000
    >>> print(f"{float(linear(1000).alpha(500)):.6f} {float(linear(1000).sigma(500)):.6f}")
    0.278921 0.960314
    """

    alphas_cumprod: np.ndarray

    def __post_init__(self):
        table = np.array(self.alphas_cumprod, np.float64)
        if table.ndim != 1 or table.size < 1:
            raise ValueError(f"alphas_cumprod must be a non-empty vector, got shape {table.shape}")
        if not (np.all(np.isfinite(table)) and np.all(table >= 0) and np.all(table < 1) and np.all(table[:-1] > 0)):
            raise ValueError("alphas_cumprod must lie in (0, 1); only the last entry may be 0 (zero terminal SNR)")
        if np.any(np.diff(table) > 0):
            raise ValueError("alphas_cumprod must not increase: t = 0 is the cleanest step")
        table.setflags(write=False)
        object.__setattr__(self, "alphas_cumprod", table)

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def last_step(self) -> int:
        """The last timestep that still holds a trace of the image: T - 1, or T - 2 at zero terminal SNR."""
        return self.num_steps - (1 if self.alphas_cumprod[-1] > 0 else 2)

    def alpha(self, t: Array) -> Array:
        """Scale of the image at t: ``sqrt(alphas_cumprod[t])``, shape of t."""
        if _floating(t):
            return jnp.sqrt(jax.nn.sigmoid(self.log_snr(t)))
        return jnp.asarray(np.sqrt(self.alphas_cumprod))[t]

    def sigma(self, t: Array) -> Array:
        """Standard deviation of the noise at t: ``sqrt(1 - alphas_cumprod[t])``, shape of t."""
        if _floating(t):
            return jnp.sqrt(jax.nn.sigmoid(-self.log_snr(t)))
        return jnp.asarray(np.sqrt(1.0 - self.alphas_cumprod))[t]

    def log_snr(self, t: Array) -> Array:
        """``log(alpha^2 / sigma^2)``, shape of t; falls with t, -inf at zero terminal SNR. Linear between timesteps."""
        table = self._log_snr_table()
        if not _floating(t):
            return jnp.asarray(table)[t]
        t = jnp.asarray(t)
        table = jnp.asarray(table, jnp.result_type(t, jnp.float32))
        low = jnp.clip(jnp.floor(t), 0, self.num_steps - 1).astype(jnp.int32)
        share = jnp.clip(t, 0, self.num_steps - 1) - low
        above = table[jnp.minimum(low + 1, self.num_steps - 1)]
        return jnp.where(share > 0, table[low] * (1 - share) + above * jnp.where(share > 0, share, 1), table[low])

    def time_of(self, log_snr: Array) -> Array:
        """The floating t at which ``log_snr(t)`` has the given value; the first or last timestep for values beyond them.

        >>> print(f"{float(linear(1000).time_of(linear(1000).log_snr(250.5))):.2f}")
        250.50
        """
        table = self._log_snr_table()[: self.last_step + 1]
        log_snr = jnp.asarray(log_snr)
        return jnp.interp(-log_snr, jnp.asarray(-table, log_snr.dtype), jnp.arange(len(table), dtype=log_snr.dtype))

    def _log_snr_table(self) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod)

    def add_noise(self, x0: Array, eps: Array, t: Array) -> Array:
        """``alpha(t) x0 + sigma(t) eps``: x0, eps [B,H,W,C], t [B] -> [B,H,W,C]."""
        return per_example(self.alpha(t), x0) * x0 + per_example(self.sigma(t), x0) * eps


def _floating(t: Array) -> bool:
    return jnp.issubdtype(jnp.result_type(t), jnp.floating)


def per_example(values: Array, like: Array) -> Array:
    """Reshapes [B] to [B,1,...,1] with the rank of ``like``, so that it multiplies each example by its own number."""
    return jnp.reshape(values, values.shape + (1,) * (like.ndim - values.ndim))


def from_betas(betas: np.ndarray) -> Schedule:
    """The schedule of the given betas [T]: ``alphas_cumprod = cumprod(1 - betas)``."""
    return Schedule(np.cumprod(1.0 - np.asarray(betas, np.float64)))


def linear(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Betas evenly spaced (DDPM, Ho et al. 2020, section 4)."""
    return from_betas(np.linspace(beta_start, beta_end, num_steps))


def scaled_linear(num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """Square roots of the betas evenly spaced (latent diffusion, Rombach et al. 2022)."""
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2)


def cosine(num_steps: int = 1000, max_beta: float = 0.999) -> Schedule:
    """The squared-cosine schedule (Nichol and Dhariwal 2021, Eq. 17), betas capped at ``max_beta``."""

    def alpha_bar(tau):
        return np.cos((tau + 0.008) / 1.008 * np.pi / 2) ** 2

    tau = np.arange(num_steps) / num_steps
    return from_betas(np.minimum(1.0 - alpha_bar(tau + 1.0 / num_steps) / alpha_bar(tau), max_beta))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shifts and scales ``alpha`` so that the last step is pure noise (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(schedule.alphas_cumprod)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return Schedule(root**2)


SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine}
"""The one registry of schedules: name -> factory(num_steps, ...)."""
