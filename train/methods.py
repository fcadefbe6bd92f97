"""From ``config.unlearn`` to an objective and its combiner."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxunlearn import combine, methods
from jaxunlearn.objectives.siss import FROM_BATCH
from jaxunlearn.registry import look_up
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array, Combine, Error, Objective
from train import selections, step_schedules

OPTIONAL = ("cap", "beta", "beta_unit", "level", "delta", "winner", "keep_term", "prior_term", "z", "anchor")
"""Keys of ``unlearn`` that go to the objective where they are set; ``lam`` and ``noise`` always have a value."""
TERM_WEIGHTS = ("keep", "forget", "anchor", "prior")
COMBINER_VALUES = {
    "weighted_sum": TERM_WEIGHTS,
    "fixed_norm": ("c",),
    "relative_norm": ("rho",),
    "erasediff": ("eta",),
    "pcgrad": ("keep", "forget", "two_sided"),
}
"""The combiners, and which keys of ``unlearn.combine`` each of them reads."""
SCALES = {"weighted_sum": "forget", "fixed_norm": "c", "relative_norm": "rho", "erasediff": "eta", "pcgrad": "forget"}
"""The one number of each combiner that says how strong the forget part is."""


def method_of(unlearn: ConfigDict) -> methods.Method:
    """The registry's entry of the configured method."""
    return look_up("method", unlearn.method, methods.METHODS)


def option(unlearn: ConfigDict, name: str) -> Any:
    """The value of one of the method's options: the configured one, or the method's own default."""
    value = unlearn[name]
    return inspect.signature(method_of(unlearn).objective).parameters[name].default if value is None else value


def error_of(unlearn: ConfigDict) -> Error:
    """The configured error, or the method's own one; without selections."""
    if unlearn.error is not None:
        return selections.ERRORS[unlearn.error]
    return inspect.signature(method_of(unlearn).objective).parameters["error"].default


def needs_level(unlearn: ConfigDict) -> bool:
    """Whether the mean forget error of the starting model must be measured."""
    if "level" not in method_of(unlearn).options:
        return False
    return unlearn.level is None and option(unlearn, "beta_unit") == "loss"


def option_problems(unlearn: ConfigDict) -> list[str]:
    """One line for each option that is set although the chosen method does not have it."""
    method = method_of(unlearn)
    has = ", ".join(method.options) or "none"
    return [
        f"config.unlearn.{name} = {unlearn[name]!r}: method {unlearn.method!r} has no such option (it has: {has}); "
        "set it to None"
        for name in OPTIONAL
        if unlearn[name] is not None and name not in method.options
    ]


def make_objective(
    unlearn: ConfigDict,
    schedule: Schedule,
    level: float | None = None,
    cap: np.ndarray | None = None,
    *,
    forget_error: Error | None = None,
) -> Objective:
    """The objective of the configured method.

    Args:
      unlearn: ``config.unlearn``.
      schedule: the noise schedule.
      level: the measured one, where :func:`needs_level`.
      cap: a measured table over t in place of ``unlearn.cap``.
      forget_error: the error of the forget term in place of the selections of ``unlearn.select``.

    Raises:
      ValueError: options that the method refuses, a selection without a forget term.
    """
    method, error = method_of(unlearn), error_of(unlearn)
    selected = forget_error
    if selected is None and selections.selects(unlearn):
        if method.forget_sign == 0:
            raise ValueError(
                f"method {unlearn.method!r} has no forget term to select in; "
                "set '--config.unlearn.select.window=(0,0)' and --config.unlearn.select.filter=none"
            )
        selected = selections.forget_error(unlearn, schedule, error)
    options = {name: unlearn[name] for name in method.options if unlearn[name] is not None}
    if step_schedules.is_scheduled(options.get("lam")):
        options["lam"] = FROM_BATCH  # each step's rows bring it
    if needs_level(unlearn):
        options["level"] = level
    if cap is not None:
        options["cap"] = cap
    return methods.make_objective(unlearn.method, schedule, error=error, forget_error=selected, **options)


def make_combine(
    unlearn: ConfigDict, objective: Objective, *, scale: Callable[[Array], Array] | None = None
) -> Combine:
    """The configured combiner, or the method's own one, for the terms of the objective. Numbers may be schedules.

    Args:
      unlearn: ``config.unlearn``.
      objective: whose terms are combined.
      scale: a function of the step in place of the combiner's number in :data:`SCALES`.

    Raises:
      ValueError: unknown name, values out of range, terms that the combiner does not take or has no weight for.
    """
    method, name = method_of(unlearn), combiner_name(unlearn)
    if name == "weighted_sum":
        weights = {term: step_schedules.parse(weight_of(unlearn, term)) for term in objective.terms}
        if scale is not None:
            weights["forget"] = scale
        sign = method.forget_sign if callable(weights.get("forget")) else None
        return combine.weighted_sum(forget_sign=sign, **weights)
    # A method with another number of terms is told by its sign where it has no forget term.
    if objective.forget_sign and set(objective.terms) != {"keep", "forget"}:
        raise ValueError(
            f"combiner {name!r} takes the terms keep and forget, but method {unlearn.method!r} has "
            f"{', '.join(objective.terms)}; set --config.unlearn.combine.name=weighted_sum"
        )
    options = {key: unlearn.combine[key] for key in COMBINER_VALUES[name]}
    for term in TERM_WEIGHTS:
        if term in options:
            options[term] = abs(weight_of(unlearn, term)) if unlearn.combine[term] is None else unlearn.combine[term]
    options = {key: value if key == "two_sided" else step_schedules.parse(value) for key, value in options.items()}
    if scale is not None:
        options[SCALES[name]] = scale
    return methods.make_combine(unlearn.method, name, **options)


def combiner_name(unlearn: ConfigDict) -> str:
    """The name of the configured combiner, or of the method's own one.

    Raises:
      ValueError: unknown name.
    """
    name = unlearn.combine.name or method_of(unlearn).combiner
    look_up("combiner", name, COMBINER_VALUES)
    return name


def weight_of(unlearn: ConfigDict, term: str) -> float | str:
    """The weight of a term: the configured one, the method's own one, or a general one for keep and forget."""
    method = method_of(unlearn)
    if unlearn.combine[term] is not None:
        return unlearn.combine[term]
    if term in method.combiner_options:
        return method.combiner_options[term]
    if unlearn.method == "dpo":
        beta = option(unlearn, "beta")
        about = {
            "keep": f"beta / 4 = {beta / 4:g}, the slope of the forget term,",
            "prior": f"1e4 beta / 2 = {5e3 * beta:g}",
        }
        raise ValueError(
            f"dpo has no weight of its own for the term {term!r}; set --config.unlearn.combine.{term}, "
            f"{about[term]} is a start"
        )
    return {"keep": 1.0, "forget": 0.01 * method.forget_sign}[term]


def weight_problems(unlearn: ConfigDict, objective: Objective) -> list[str]:
    """One line for each weight of a further term that is set although the objective has no such term."""
    return [
        f"config.unlearn.combine.{term} = {unlearn.combine[term]!r}: method {unlearn.method!r} has no term {term!r} "
        f"here (it has: {', '.join(objective.terms)}); set it to None"
        for term in ("anchor", "prior")
        if unlearn.combine[term] is not None and term not in objective.terms
    ]
