"""METHODS: the one registry of unlearning methods. A method is an objective and the combiner that goes with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxunlearn import combine, objectives
from jaxunlearn.registry import look_up
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Combine, Error, Objective


class Method(NamedTuple):
    """A named pair of objective and combiner.

    Attributes:
      objective: factory ``(schedule, **options) -> Objective``.
      options: names of the objective's own options (beside the errors).
      combiner: name of the default combiner in COMBINERS.
      combiner_options: its default arguments.
      forget_sign: -1 the forget term is ascended, +1 descended, 0 there is none.
      passes: forward and backward passes of one batch, ``"1F 2B"``; F' is a forward pass of the reference model, without a
        gradient.
      summary: one line for tables.
    """

    objective: Callable[..., Objective]
    options: tuple[str, ...]
    combiner: str
    combiner_options: Mapping[str, float]
    forget_sign: int
    passes: str
    summary: str


METHODS: dict[str, Method] = {
    "naive": Method(
        objectives.naive, (), "weighted_sum", {"keep": 1.0}, 0, "1F 1B", "fine-tuning on keep alone (baseline)"
    ),
    "neggrad": Method(
        objectives.neggrad,
        (),
        "weighted_sum",
        {"forget": -0.01},
        -1,
        "1F 1B",
        "ascent on forget alone; destroys the model if run for long (baseline)",
    ),
    "siss": Method(
        objectives.siss,
        ("lam",),
        "relative_norm",
        {"rho": 0.1},
        -1,
        "1F 2B",
        "importance-sampled mixture, keep minus rescaled forget (ICLR 2025)",
    ),
    "siss_no_is": Method(
        objectives.siss_no_is,
        (),
        "relative_norm",
        {"rho": 0.1},
        -1,
        "2F 2B",
        "SISS with a forward pass for each term, no importance sampling",
    ),
    "bernoulli": Method(
        objectives.bernoulli,
        ("lam",),
        "relative_norm",
        {"rho": 0.1},
        -1,
        "1F 2B",
        "each row serves one term by a coin; SISS without the weights",
    ),
    "erasediff": Method(
        objectives.erasediff,
        ("noise",),
        "erasediff",
        {"eta": 1e-3},
        +1,
        "2F 2B",
        "forget images are answered with unrelated noise, bi-level step",
    ),
    "retrack": Method(
        objectives.retrack,
        (),
        "weighted_sum",
        {"keep": 0.995, "forget": 0.005},
        +1,
        "2F 2B",
        "forget images are answered as their nearest keep images would be",
    ),
    "surrogate": Method(
        objectives.surrogate,
        (),
        "pcgrad",
        {"keep": 1.0, "forget": 0.01},
        +1,
        "2F 2B",
        "forget images are answered as one given image would be",
    ),
    "mirrored": Method(
        objectives.mirrored,
        ("cap",),
        "weighted_sum",
        {"keep": 1.0, "forget": -0.2},
        -1,
        "2F 2B",
        "ascent up to the error of a network that knows nothing",
    ),
    "clamped": Method(
        objectives.clamped,
        ("cap",),
        "weighted_sum",
        {"keep": 1.0, "forget": -0.2},
        -1,
        "2F 2B",
        "ascent up to a measured error, such as a retrained model's",
    ),
    "npo": Method(
        objectives.npo,
        ("beta", "beta_unit", "level"),
        "weighted_sum",
        {"keep": 1.0, "forget": 0.2},
        +1,
        "2F 1F' 2B",
        "ascent that fades as the error leaves that of the starting model",
    ),
    "simnpo": Method(
        objectives.simnpo,
        ("beta", "beta_unit", "level", "delta"),
        "weighted_sum",
        {"keep": 1.0, "forget": 0.2},
        +1,
        "2F 2B",
        "ascent that fades as the error grows; no reference model",
    ),
    "dpo": Method(
        objectives.dpo,
        ("beta", "winner", "keep_term", "prior_term"),
        "weighted_sum",
        {"forget": 1.0},
        +1,
        "2F 2F' 2B",
        "keep images are preferred to forget images, in pairs",
    ),
    "kto": Method(
        objectives.kto,
        ("beta", "z"),
        "weighted_sum",
        {"keep": 1.0, "forget": 1.0},
        +1,
        "2F 2F' 2B",
        "keep images are wanted, forget images are not, without pairs",
    ),
    "vdu_style": Method(
        objectives.vdu_style,
        ("anchor",),
        "weighted_sum",
        {"forget": -0.9997, "anchor": 0.0003},
        -1,
        "1F 1B",
        "ascent held by the variance of checkpoints, without keep images; the weight needs tuning",
    ),
    "fisher_anchor": Method(
        objectives.fisher_anchor,
        ("anchor",),
        "weighted_sum",
        {"keep": 1.0, "forget": -0.02, "anchor": 1.0},
        -1,
        "2F 2B",
        "ascent held by a Fisher anchor; ten times the forget weight destroyed a small model",
    ),
}
"""Method name -> :class:`Method`."""


def make_objective(name: str, schedule: Schedule, *, forget_error: Error | None = None, **options: Any) -> Objective:
    """The objective of a method.

    Args:
      name: a key of METHODS.
      schedule: the noise schedule.
      forget_error: error of the forget term, with its selections; refused for methods without a forget term.
      **options: the objective's own options, and ``error``.

    ``clamped`` needs ``cap``, and ``npo`` and ``simnpo`` need ``level`` (or ``beta_unit="raw"``): numbers of the starting or
    of a retrained model, which have no default. What ``batch.extra``, ``draw.extra`` and ``ref_params`` must hold stands in
    the objective's ``batch_extra``, ``draw_extra`` and ``needs_ref``.

    Raises:
      ValueError: unknown method, an option that it does not have, or one that is out of its range.
    """
    method = look_up("method", name, METHODS)
    unknown = set(options) - set(method.options) - {"error"}
    if unknown:
        raise ValueError(
            f"method {name!r} has no option {sorted(unknown)}; it has: {', '.join(method.options) or 'none'}"
        )
    if forget_error is not None:
        if method.forget_sign == 0:
            raise ValueError(f"method {name!r} has no forget term, so nothing can be selected in it")
        options["forget_error"] = forget_error
    return method.objective(schedule, **options)


def make_combine(name: str, combiner: str | None = None, **options: Any) -> Combine:
    """The combiner of a method: its default one, or another by name with its options.

    Numbers may be functions of the step. The sign of the forget part is the method's.

    Raises:
      ValueError: unknown method or combiner, or options that the combiner does not take.
    """
    method = look_up("method", name, METHODS)
    if combiner is None or combiner == method.combiner:
        options = {**method.combiner_options, **options}
    factory = look_up("combiner", combiner or method.combiner, combine.COMBINERS)
    if factory in (combine.fixed_norm, combine.relative_norm, combine.pcgrad) or callable(options.get("forget")):
        options.setdefault("forget_sign", method.forget_sign or -1)
    try:
        return factory(**options)
    except TypeError as error:
        raise ValueError(f"combiner {combiner or method.combiner!r}: {error}") from None
