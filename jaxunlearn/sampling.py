"""Reverse chains as one ``lax.scan``: DDPM ancestral sampling, DDIM and PNDM, with the semantics of diffusers' schedulers.

Every step of DDPM and DDIM is one formula with numbers that depend on the timestep alone::

    x0_hat = clip(x0_from_x x + x0_from_out out)      out: what the model returned
    e_hat  = e_from_x x + e_from_out out
    x      = to_x0 x0_hat + to_x x + to_e e_hat + to_noise z

* DDPM (Ho et al. 2020, Eq. 7): with a = alphas_cumprod at t, ap at the previous timestep, ca = a / ap, cb = 1 - ca:
  ``to_x0 = sqrt(ap) cb / (1 - a)``, ``to_x = sqrt(ca) (1 - ap) / (1 - a)``, ``to_noise^2 = (1 - ap) / (1 - a) cb``
  (fixed_small) or ``cb`` (fixed_large).
* DDIM (Song et al. 2021, Eq. 12 and 16): ``s = eta sqrt((1 - ap) / (1 - a) (1 - a / ap))``, ``to_x0 = sqrt(ap)``,
  ``to_e = sqrt(1 - ap - s^2)``, ``to_noise = s``. Clipping ``x0_hat`` does not change ``e_hat``.
* PNDM (Liu et al. 2022) is the DDIM step with a combination of the last four outputs, see :mod:`jaxunlearn.pndm`.

The numbers are computed in float64 on the host, so timesteps must be concrete; arrays and parameters may be traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import pndm
from jaxunlearn.registry import unknown_name
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array, Predict, PyTree

KINDS = ("ddpm", "ddim", "pndm")
VARIANCE_TYPES = ("fixed_small", "fixed_large")
SPACINGS = ("leading", "trailing", "linspace")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How to walk a chain; the names and defaults are those of diffusers' ``scheduler_config.json``.

    Attributes:
      kind: "ddpm" (ancestral), "ddim" or "pndm" (multistep, one model call more than steps).
      clip_sample: whether the predicted clean image is clipped to ``+-clip_sample_range`` in every step. pndm never
        clips; there it is only what :meth:`with_kind` hands on.
      clip_sample_range: positive; 1 for images in [-1, 1].
      variance_type: "fixed_small" (posterior variance) or "fixed_large" (beta); ddpm only.
      timestep_spacing: "leading", "trailing" or "linspace", see :func:`timesteps`.
      steps_offset: added to the timesteps of "leading".
      set_alpha_to_one: ddim and pndm: below the last timestep alphas_cumprod counts as 1 (else as its value at
        t = 0). The default is that of ``DDIMScheduler``; ``PNDMScheduler``'s is False.
      eta: ddim only, in [0, 1]: 0 is deterministic, 1 has the noise of ddpm's fixed_small.

    Raises:
      ValueError: one line per value that is not allowed.
    """

    kind: str = "ddpm"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    variance_type: str = "fixed_small"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    eta: float = 0.0

    def __post_init__(self):
        problems = [
            unknown_name(name, getattr(self, name), allowed)
            for name, allowed in (("kind", KINDS), ("variance_type", VARIANCE_TYPES), ("timestep_spacing", SPACINGS))
            if getattr(self, name) not in allowed
        ]
        if not self.clip_sample_range > 0:
            problems.append(
                f"clip_sample_range {self.clip_sample_range!r}: must be positive; 1.0 for images in [-1, 1]"
            )
        if self.steps_offset < 0:
            problems.append(f"steps_offset {self.steps_offset!r}: must be 0 or larger")
        if not 0.0 <= self.eta <= 1.0:
            problems.append(f"eta {self.eta!r}: must be between 0 (deterministic) and 1")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def deterministic(self) -> bool:
        """Whether no noise is added after the start."""
        return self.kind == "pndm" or (self.kind == "ddim" and self.eta == 0.0)

    def with_kind(self, kind: str, schedule: Schedule | None = None, num_steps: int | None = None) -> SamplerConfig:
        """The sampler of another kind for the same model: clipping, spacing and the rest carry over, eta becomes 0.

        Args:
          kind: "ddpm", "ddim" or "pndm".
          schedule, num_steps: the chain that will be walked. With them ``steps_offset`` becomes 0 if "leading" would
            start beyond the schedule's end, as it does with an offset and as many steps as the schedule has.

        Raises:
          ValueError: an unknown kind, only one of ``schedule`` and ``num_steps``, or more steps than the schedule has.

        >>> SamplerConfig("pndm", clip_sample=False, steps_offset=1).with_kind("ddim").steps_offset
        1
        """
        if (schedule is None) != (num_steps is None):
            raise ValueError("with_kind: give both schedule and num_steps, or neither")
        offset = self.steps_offset
        if schedule is not None and self.timestep_spacing == "leading":
            first = (num_steps - 1) * _gap(schedule.num_steps, num_steps) + offset
            offset = offset if first < schedule.num_steps else 0
        return dataclasses.replace(self, kind=kind, eta=0.0, steps_offset=offset)


class Trajectory(NamedTuple):
    """The timesteps at which the model is called and where each call leads.

    Attributes:
      t: int32 [n], strictly descending, except that pndm has the second timestep twice (n is one more than steps).
      t_prev: int32 [n], below t; -1 means past the last timestep. pndm's second call repeats the first step, so there
        ``t_prev`` is t itself. The first few entries are a chain as well, which ends where the last of them leads.
    """

    t: np.ndarray
    t_prev: np.ndarray


def timesteps(num_train_steps: int, num_steps: int, spacing: str = "leading", offset: int = 0) -> np.ndarray:
    """The ``num_steps`` timesteps out of ``num_train_steps`` at which the model is asked, int32, descending.

    leading: multiples of ``num_train_steps // num_steps``, plus ``offset``. trailing: ``round(T - i T / n) - 1``.
    linspace: ``round(linspace(0, T - 1, n))`` (Lin et al. 2023, table 2).

    Raises:
      ValueError: an unknown spacing, more steps than the schedule has, or a timestep beyond its end.

    >>> timesteps(1000, 5).tolist(), timesteps(1000, 5, "trailing").tolist()
    ([800, 600, 400, 200, 0], [999, 799, 599, 399, 199])
    """
    gap = _gap(num_train_steps, num_steps)
    if spacing == "leading":
        steps = np.arange(num_steps)[::-1] * gap + offset
    elif spacing == "trailing":
        # np.arange, as in diffusers: its rounding decides the ties. It may add one more entry, which is not a timestep.
        steps = np.round(np.arange(num_train_steps, 0, -num_train_steps / num_steps)[:num_steps]) - 1
    elif spacing == "linspace":
        steps = np.round(np.linspace(0, num_train_steps - 1, num_steps))[::-1]
    else:
        raise ValueError(unknown_name("timestep_spacing", spacing, SPACINGS))
    if steps[0] >= num_train_steps:
        raise ValueError(
            f"steps_offset {offset} with {num_steps} steps: the first timestep {int(steps[0])} is beyond the schedule's"
            f" last, {num_train_steps - 1}; use fewer steps or a smaller offset"
        )
    return steps.astype(np.int32)


def _gap(num_train_steps: int, num_steps: int) -> int:
    """How far apart the timesteps of "leading" are."""
    if not 1 <= num_steps <= num_train_steps:
        raise ValueError(f"num_steps {num_steps}: must be between 1 and the schedule's {num_train_steps}")
    return num_train_steps // num_steps


def trajectory(schedule: Schedule, config: SamplerConfig, num_steps: int) -> Trajectory:
    """The chain of ``num_steps`` steps from (nearly) pure noise to the image, exactly as diffusers walks it.

    ddpm: a step leads to the next timestep of the list. ddim and pndm: to ``t - T // num_steps``, which is the same for
    "leading" but not always for "trailing" and "linspace". pndm: the second timestep comes twice, so that the chain has
    ``num_steps + 1`` model calls (if it has more than one step).

    Raises:
      ValueError: as :func:`timesteps`.

    >>> from jaxunlearn.schedule import linear
    >>> trajectory(linear(1000), SamplerConfig("pndm", steps_offset=1), 4).t.tolist()
    [751, 501, 501, 251, 1]
    """
    t = timesteps(schedule.num_steps, num_steps, config.timestep_spacing, config.steps_offset)
    if config.kind == "ddpm":
        return _as_trajectory(t, config.kind)
    t_prev = np.maximum(t - schedule.num_steps // num_steps, -1)
    return Trajectory(*pndm.with_repeat(t, t_prev)) if config.kind == "pndm" else Trajectory(t, t_prev)


def example_keys(key: Array, indices: Array) -> Array:
    """One key per example, ``fold_in(key, index)``: [B] keys for :func:`sample`, whatever the batches are.

    >>> example_keys(jax.random.key(0), np.arange(3)).shape
    (3,)
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(indices))


def sample(
    predict: Predict,
    params: PyTree,
    x_start: Array,
    key: Array | None,
    schedule: Schedule,
    config: SamplerConfig,
    timesteps: Trajectory | Sequence[int] | np.ndarray,
    *,
    cond: PyTree = None,
    noise: Array | None = None,
    prediction_type: str = "epsilon",
) -> Array:
    """Walks the chain from ``x_start`` at ``timesteps[0]`` to the clean image. Pure; may be jitted.

    Args:
      predict: the model. It returns noise, or what ``prediction_type`` says.
      params: its parameters.
      x_start: [B,H,W,C], standard normal noise, or ``schedule.add_noise(x0, eps, t)`` to start in the middle.
      key: one key, or one per example [B] (see :func:`example_keys`): with one per example a result does not depend
        on how the examples are divided into batches. The noise of a step is drawn with ``fold_in(key, t)``. May be
        None if the chain is deterministic or ``noise`` is given.
      schedule: the noise schedule.
      config: the sampler. Spacing and offset are not read here: they are already in ``timesteps``.
      timesteps: a :class:`Trajectory`, or any strictly descending timesteps, of which each leads to the next and the
        last to the clean image (alphas_cumprod = 1; for ddim and pndm without ``set_alpha_to_one`` its value at
        t = 0). A list names each timestep once, whatever the kind.
      cond: given to the model as it is.
      noise: [n,B,H,W,C], used in place of drawn noise. Not used by a deterministic chain.
      prediction_type: "epsilon", "v_prediction" or "sample" (not with pndm). Models with zero terminal SNR can start at
        the last timestep with the latter two only: noise does not determine the image there.

    Returns:
      [B,H,W,C], not clipped after the last step.

    Raises:
      ValueError: timesteps that do not descend or leave the schedule, missing key, wrong shape of noise or keys.
    """
    steps = _as_trajectory(timesteps, config.kind)
    table = coefficients(schedule, config, steps, prediction_type)
    noisy = not config.deterministic
    if noise is not None and noise.shape != (len(steps.t), *x_start.shape):
        raise ValueError(f"noise of shape {noise.shape}: must be {(len(steps.t), *x_start.shape)}")
    if noisy and noise is None and key is None:
        raise ValueError("this chain draws noise: give a key, or noise")

    def ask(x, t):
        return predict(params, x, jnp.full((x.shape[0],), t, jnp.int32), cond)

    def body(x, scanned):
        t, row, z = scanned
        out = ask(x, t)
        if noisy and z is None:
            z = _noise(key, t, x)
        return _advance(x, out, z if noisy else None, row, config), None

    rows = {name: jnp.asarray(values, x_start.dtype) for name, values in table.items()}
    t = jnp.asarray(steps.t, jnp.int32)
    if config.kind == "pndm":
        return pndm.walk(ask, x_start, t, rows)
    return jax.lax.scan(body, x_start, (t, rows, noise if noisy else None))[0]


def ancestral_chain(
    predict: Predict, schedule: Schedule, config: SamplerConfig, t_max: int
) -> Callable[[PyTree, Array, Array, Array], Array]:
    """``(params, x_t [B,H,W,C], t, keys [B]) -> x0``: every step from t to 0, as :func:`sample`, but t may be traced.

    One compilation serves every t up to ``t_max``, where :func:`sample` needs one for each.

    Args:
      predict: the model, of noise, without a condition.
      schedule: the noise schedule.
      config: a sampler of kind "ddpm".
      t_max: the largest t that may be asked for.

    Raises:
      ValueError: another kind of sampler, ``t_max`` outside the schedule.
    """
    if config.kind != "ddpm":
        raise ValueError(f"an ancestral chain is of kind 'ddpm', got {config.kind!r}")
    table = coefficients(schedule, config, _as_trajectory(np.arange(t_max, -1, -1), "ddpm"))

    def chain(params, x_t, t, keys):
        by_t = {name: jnp.asarray(values[::-1].copy(), x_t.dtype) for name, values in table.items()}

        def body(done, x):
            step = t - done
            row = {name: values[step] for name, values in by_t.items()}
            out = predict(params, x, jnp.full((x.shape[0],), step, jnp.int32), None)
            return _advance(x, out, _noise(keys, step, x), row, config)

        return jax.lax.fori_loop(0, t + 1, body, x_t)

    return chain


def _advance(x: Array, out: Array, z: Array | None, row: dict[str, Array], config: SamplerConfig) -> Array:
    """One step: the formula of the module's docstring with the numbers of one row."""
    x0 = row["x0_from_x"] * x + row["x0_from_out"] * out
    e = row["e_from_x"] * x + row["e_from_out"] * out
    if config.clip_sample:
        x0 = jnp.clip(x0, -config.clip_sample_range, config.clip_sample_range)
    x = row["to_x0"] * x0 + row["to_x"] * x + row["to_e"] * e
    return x if z is None else x + row["to_noise"] * z


def coefficients(
    schedule: Schedule, config: SamplerConfig, steps: Trajectory, prediction_type: str = "epsilon"
) -> dict[str, np.ndarray]:
    """The numbers of every call, float64 [n] each (pndm's ``w``: [n,4]), under the names of the module's docstring.

    Raises:
      ValueError: a timestep beyond the schedule, an unknown prediction type, noise prediction where alphas_cumprod is
        0, or pndm with a model of the sample.
    """
    starts = pndm.starts(*steps) if config.kind == "pndm" else steps.t
    if starts.max() >= schedule.num_steps:
        raise ValueError(f"timestep {starts.max()} is beyond the schedule's last, {schedule.num_steps - 1}")
    if config.kind == "pndm" and prediction_type == "sample":
        raise ValueError(
            "prediction_type 'sample' does not go with pndm, which combines predictions of noise or v; sample with ddim"
        )
    a = schedule.alphas_cumprod[starts]
    last = 1.0 if config.kind == "ddpm" or config.set_alpha_to_one else schedule.alphas_cumprod[0]
    ap = np.where(steps.t_prev >= 0, schedule.alphas_cumprod[steps.t_prev], last)
    zero, one = np.zeros_like(a), np.ones_like(a)

    if prediction_type == "epsilon":
        if np.any(a == 0):
            raise ValueError(
                f"timestep {steps.t[0]} has zero signal (alphas_cumprod 0), where predicted noise does not determine"
                " the image: start below it, or use a model that predicts v or the sample"
            )
        outputs = {"x0_from_x": a**-0.5, "x0_from_out": -np.sqrt(1 / a - 1), "e_from_x": zero, "e_from_out": one}
    elif prediction_type == "v_prediction":
        alpha, sigma = np.sqrt(a), np.sqrt(1 - a)
        outputs = {"x0_from_x": alpha, "x0_from_out": -sigma, "e_from_x": sigma, "e_from_out": alpha}
    elif prediction_type == "sample":
        sigma = np.sqrt(1 - a)
        outputs = {"x0_from_x": zero, "x0_from_out": one, "e_from_x": 1 / sigma, "e_from_out": -np.sqrt(a) / sigma}
    else:
        raise ValueError(unknown_name("prediction_type", prediction_type, PREDICTION_TYPES))

    shrink = (1 - ap) / (1 - a)
    beta = 1 - a / ap
    if config.kind == "ddpm":
        # The floor is diffusers': it differs from 0 only where a step ends the chain at t > 0.
        variance = np.maximum(shrink * beta, 1e-20) if config.variance_type == "fixed_small" else beta
        moves = {
            "to_x0": np.sqrt(ap) * beta / (1 - a),
            "to_x": np.sqrt(a / ap) * shrink,
            "to_e": zero,
            "to_noise": np.where(steps.t > 0, np.sqrt(variance), 0.0),
        }
    else:
        s = (config.eta if config.kind == "ddim" else 0.0) * np.sqrt(shrink * beta)
        # 1 - ap - s^2 is never negative for eta <= 1, rounding aside.
        direction = np.sqrt(np.maximum(1 - ap - s**2, 0.0))
        moves = {"to_x0": np.sqrt(ap), "to_x": zero, "to_e": direction, "to_noise": s}
    return pndm.table(outputs, moves) if config.kind == "pndm" else outputs | moves


def _as_trajectory(steps: Trajectory | Sequence[int] | np.ndarray, kind: str) -> Trajectory:
    """Any description of a chain, checked."""
    if isinstance(steps, jax.core.Tracer):
        raise ValueError("timesteps must be known when the function is traced: close over them instead of passing them")
    if isinstance(steps, Trajectory):
        t, t_prev = (np.asarray(part) for part in steps)
    else:
        t = np.asarray(steps)
        t_prev = np.append(t[1:], -1)
    if t.ndim != 1 or t.size == 0 or t.shape != t_prev.shape or not np.issubdtype(t.dtype, np.integer):
        raise ValueError(f"timesteps must be a non-empty vector of integers, got {t.dtype} of shape {t.shape}")
    given = isinstance(steps, Trajectory)
    once, once_prev = pndm.without_repeat(t, t_prev) if kind == "pndm" and given else (t, t_prev)
    if np.any(np.diff(once) >= 0) or np.any(t < 0) or np.any(once_prev >= once) or np.any(once_prev < -1):
        raise ValueError(f"timesteps must descend strictly to 0 or more, got {t.tolist()[:12]}")
    if kind == "pndm" and not given:
        t, t_prev = pndm.with_repeat(t, t_prev)
    return Trajectory(t.astype(np.int32), t_prev.astype(np.int32))


def _noise(key: Array, t: Array, x: Array) -> Array:
    """Standard normal noise of x's shape for the step at t, from one key or from one per example."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    rank = key.ndim if typed else key.ndim - 1
    if rank == 0:
        return jax.random.normal(jax.random.fold_in(key, t), x.shape, x.dtype)
    if rank != 1 or key.shape[0] != x.shape[0]:
        raise ValueError(f"keys of shape {key.shape}: must be one key, or one for each of the {x.shape[0]} examples")
    draw = jax.vmap(lambda one: jax.random.normal(jax.random.fold_in(one, t), x.shape[1:], x.dtype))
    return draw(key)
