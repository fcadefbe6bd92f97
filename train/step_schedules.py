"""Numbers of a configuration that may change from step to step: ``0.1``, or a text such as ``linear(0, 0.1, 100)``.

=============================================  =================================================================
``linear(start, end, steps)``                  straight from start to end, then end
``cosine(start, end, steps)``                  half a cosine from start to end, then end
``exponential(start, rate, steps)``            ``start * rate^(step / steps)``
``polynomial(start, end, power, steps)``       ``(start - end) (1 - step / steps)^power + end``, then end
``warmup_cosine(start, peak, end, warmup, steps)``  straight to peak within ``warmup``, half a cosine to end at ``steps``
``steps((0, a), (100, b), ...)``               a from step 0, b from step 100, ...
=============================================  =================================================================

All are made of optax's schedules. The step counts from 0.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn.registry import look_up
from train.problems import is_number


class Form(NamedTuple):
    """How a schedule is written.

    Attributes:
      usage: its form, for messages.
      lengths: positions of the arguments that are numbers of steps.
      count: how many arguments; None for pairs.
      make: ``(*arguments) -> optax.Schedule``.
    """

    usage: str
    lengths: tuple[int, ...]
    count: int | None
    make: Callable[..., optax.Schedule]


def _cosine(start: float, end: float, steps: int) -> optax.Schedule:
    # Of height 1: optax's alpha is a share of the start, which may be 0.
    decay = optax.cosine_decay_schedule(1.0, steps)
    return lambda step: end + (start - end) * decay(step)


def _warmup_cosine(start: float, peak: float, end: float, warmup: int, steps: int) -> optax.Schedule:
    if not warmup < steps:
        raise ValueError(f"the warm-up of {warmup} steps must be shorter than all {steps} steps")
    return optax.join_schedules(
        [optax.linear_schedule(start, peak, warmup), _cosine(peak, end, steps - warmup)], [warmup]
    )


def _steps(*pairs: tuple[int, float]) -> optax.Schedule:
    boundaries = [step for step, _ in pairs]
    if boundaries[0] != 0 or boundaries != sorted(set(boundaries)):
        raise ValueError(f"the steps must begin at 0 and rise, got {', '.join(map(str, boundaries))}")
    return optax.join_schedules([optax.constant_schedule(value) for _, value in pairs], boundaries[1:])


SCHEDULES = {
    "linear": Form("linear(start, end, steps)", (2,), 3, optax.linear_schedule),
    "cosine": Form("cosine(start, end, steps)", (2,), 3, _cosine),
    "exponential": Form(
        "exponential(start, rate, steps)",
        (2,),
        3,
        lambda start, rate, steps: optax.exponential_decay(start, steps, rate),
    ),
    "polynomial": Form("polynomial(start, end, power, steps)", (3,), 4, optax.polynomial_schedule),
    "warmup_cosine": Form("warmup_cosine(start, peak, end, warmup, steps)", (3, 4), 5, _warmup_cosine),
    "steps": Form("steps((0, value), (step, value), ...)", (), None, _steps),
}
"""Names in a configuration -> their forms."""


def is_scheduled(value: Any) -> bool:
    """Whether a value of the configuration is the text of a schedule."""
    return isinstance(value, str)


def parse(value: float | str) -> float | optax.Schedule:
    """A number as it is, a text as the function of the step that it names. Nothing of the text is executed.

    Raises:
      ValueError: neither a number nor a schedule; one line with the forms that there are.

    >>> float(parse("linear(0, 0.1, 100)")(50))
    0.05
    """
    if is_number(value):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is neither a number nor a schedule such as 'linear(0, 0.1, 100)'")
    try:
        call = ast.parse(value.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        call = None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        forms = "; ".join(form.usage for form in SCHEDULES.values())
        raise ValueError(f"{value!r} is neither a number nor a schedule; schedules: {forms}")
    form = look_up("schedule", call.func.id, SCHEDULES)
    try:
        return form.make(*_arguments(call, form))
    except ValueError as error:
        raise ValueError(f"{value!r}: {error}; write {form.usage}") from None


def _arguments(call: ast.Call, form: Form) -> list:
    if call.keywords:
        raise ValueError("the values have no names")
    try:
        values = [ast.literal_eval(node) for node in call.args]
    except (ValueError, TypeError, SyntaxError):
        raise ValueError("the values must be plain numbers") from None
    pairs = values if form.count is None else []
    if form.count is None:
        if not pairs or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
            raise ValueError("it takes pairs of a step and a value")
        numbers, lengths = [n for pair in pairs for n in pair], [step for step, _ in pairs]
    else:
        if len(values) != form.count:
            raise ValueError(f"it takes {form.count} values, got {len(values)}")
        numbers, lengths = values, [values[i] for i in form.lengths]
    if not all(is_number(n) and math.isfinite(n) for n in numbers):
        raise ValueError("the values must be plain numbers")
    least = 0 if pairs else 1
    if not all(isinstance(n, int) and n >= least for n in lengths):
        raise ValueError(f"numbers of steps must be whole, {least} or more, got {', '.join(map(str, lengths))}")
    return values


def values(value: float | str, num_steps: int) -> np.ndarray:
    """The value at each of the steps 0 .. num_steps - 1: float32 [num_steps], as a compiled step sees it.

    Raises:
      ValueError: as :func:`parse`.
    """
    made = parse(value)
    table = made(jnp.arange(num_steps)) if callable(made) else made
    return np.broadcast_to(np.asarray(table, np.float32), (num_steps,))


def all_values(value: float | str, num_steps: int, test: Callable[[float], bool]) -> bool:
    """Whether every value during the run is finite and passes the test; False for texts that do not parse.

    Raises:
      ValueError: as :func:`parse`.
    """
    if not is_scheduled(value):
        return is_number(value) and math.isfinite(value) and test(value)
    table = values(value, num_steps).astype(np.float64)
    return bool(np.all(np.isfinite(table))) and all(test(v) for v in (table.min(), table.max()))
