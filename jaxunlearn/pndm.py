"""The multistep part of PNDM sampling (Liu et al. 2022), in the form that skips the Runge-Kutta calls ("PLMS").

A step is that of DDIM with ``eta = 0`` and without clipping (the paper's transfer part), but with a combination ``g`` of
the model's outputs in place of the last one (its gradient part)::

    x = from_x x + from_g g       g = sum_k w_k out_k       out_0 the newest output

``w`` is 1 in the first call, (3, -1)/2, (23, -16, 5)/12 once two and three outputs are known, and then always
(55, -59, 37, -9)/24 (Adams and Bashforth). The second timestep is asked twice: the second call there repeats the
first step from its start with the mean of both outputs (Heun's method), and its output is not kept. So a chain has one
call more than steps. The outputs are combined as the model returns them, noise or v; what a combination means is worked
out at the timestep and for the image that the step starts from.

:mod:`jaxunlearn.sampling` is the way in; nothing here is called from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.types import Array

REPEAT = 1
"""The call that repeats the step of the call before it."""


def with_repeat(t: np.ndarray, t_prev: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inserts the repeated call into the timesteps [n] of a chain and where they lead: [n + 1], or [1] for n = 1.

    >>> [part.tolist() for part in with_repeat(np.array([9, 6, 3]), np.array([6, 3, -1]))]
    [[9, 6, 6, 3], [6, 6, 3, -1]]
    """
    if len(t) == 1:
        return t, t_prev
    return np.insert(t, REPEAT, t[REPEAT]), np.insert(t_prev, REPEAT, t[REPEAT])


def without_repeat(t: np.ndarray, t_prev: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Undoes :func:`with_repeat`; the calls may also be the first few of a chain.

    Raises:
      ValueError: the second call does not repeat the first step.
    """
    if len(t) > 1 and not (t_prev[REPEAT] == t[REPEAT] < t[0] and (len(t) == 2 or t[2] == t[1])):
        raise ValueError(
            f"a trajectory of pndm asks the second timestep twice, got {t.tolist()[:12]}: take it from trajectory(),"
            " or give a list that names each timestep once"
        )
    return np.delete(t, slice(REPEAT, REPEAT + 1)), np.delete(t_prev, slice(REPEAT, REPEAT + 1))


def starts(t: np.ndarray, t_prev: np.ndarray) -> np.ndarray:
    """The timestep that each call's step starts from: t, but for the repeat a first step's length above it.

    That is the first timestep, unless the spacing is uneven: there diffusers starts from another one than it asked at.
    """
    result = np.array(t)
    if len(t) > 1:
        result[REPEAT] += t[0] - t_prev[0]
    return result


def table(outputs: Mapping[str, np.ndarray], moves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``from_x``, ``from_g`` float64 [n] and ``w`` [n,4] from the numbers of deterministic DDIM steps."""
    calls = len(moves["to_x0"])
    w = np.tile(np.array([55.0, -59.0, 37.0, -9.0]) / 24, (calls, 1))
    first = [[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0]]
    w[:4] = first[:calls]
    return {
        "from_x": moves["to_x0"] * outputs["x0_from_x"] + moves["to_e"] * outputs["e_from_x"],
        "from_g": moves["to_x0"] * outputs["x0_from_out"] + moves["to_e"] * outputs["e_from_out"],
        "w": w,
    }


def walk(ask: Callable[[Array, Array], Array], x_start: Array, t: Array, rows: Mapping[str, Array]) -> Array:
    """The chain as one ``lax.scan``; the last three kept outputs travel in its carry.

    Args:
      ask: ``(x, t) -> out``, the model at one timestep.
      x_start: [B,H,W,C].
      t: int32 [n], the timestep of each call.
      rows: :func:`table` in x's dtype.
    """

    def body(carry, scanned):
        x, kept = carry
        call, t, row = scanned
        out = ask(x, t).astype(x.dtype)
        # Written out: a matrix product would round on accelerators.
        g = sum(w * known for w, known in zip(row["w"], (out, *kept), strict=True))
        repeat = call == REPEAT
        x = row["from_x"] * jnp.where(repeat, x_start, x) + row["from_g"] * g
        newer = (out, *kept[:2])
        return (x, tuple(jnp.where(repeat, old, new) for old, new in zip(kept, newer, strict=True))), None

    # Zeros made from x_start are laid out over devices as it is.
    nothing = jnp.zeros_like(x_start)
    (x, _), _ = jax.lax.scan(body, (x_start, (nothing,) * 3), (jnp.arange(len(t)), t, rows))
    return x
