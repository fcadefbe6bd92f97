"""Everything that can be wrong with ``config.unlearn``: each value, and whether they go together."""

from __future__ import annotations

import contextlib
import copy
import pathlib
from collections.abc import Callable

from ml_collections import ConfigDict

from jaxunlearn import frequency, timesteps
from jaxunlearn.io import hub
from jaxunlearn.io.schedulers import read_scheduler
from jaxunlearn.methods import METHODS
from jaxunlearn.objectives.anchor import KINDS
from jaxunlearn.objectives.erasediff import NOISES
from jaxunlearn.objectives.preference import BETA_UNITS, WINNERS
from jaxunlearn.schedule import Schedule
from train import build, methods, prepare, selections, step_schedules
from train.auto_select import MANUAL, stand_in
from train.problems import Problems, is_number, whole_numbers
from train.validate_steps import Steps, steps_of
from train.validate_watch import check_watch


def check_unlearn(p: Problems, schedule: Schedule | None = None) -> None:
    """Adds the problems of ``config.unlearn``, but for batch size and optimizer.

    Args:
      p: where to.
      schedule: of the user's model. None before it is loaded, where what depends on its noise schedule is left for later, and
        where the base model is trained here.
    """
    unlearn, steps = p.config.unlearn, steps_of(p.config, schedule)
    before = len(p.lines)
    p.name("unlearn.method", "method", METHODS)
    p.check("unlearn.micro_batches", "1 or more", lambda v: v >= 1)
    _check_value(p, "unlearn.lam", "in [0, 1]", lambda v: 0 <= v <= 1)
    p.name("unlearn.noise", "noise", NOISES)
    for key in ("cap", "beta", "level"):
        p.maybe(f"unlearn.{key}", "positive", lambda v: v > 0)
    p.maybe_name("unlearn.beta_unit", "unit of beta", BETA_UNITS)
    p.maybe("unlearn.delta", "finite", lambda v: True)
    p.maybe_name("unlearn.winner", "winner", WINNERS)
    p.maybe("unlearn.z", "0 or more, 'batch'", lambda v: v == "batch" or (is_number(v) and v >= 0))
    p.maybe_name("unlearn.anchor", "anchor", KINDS)
    p.check("unlearn.anchor_batches", "1 or more", lambda v: v >= 1)
    p.check("unlearn.checkpoints", "different folders", lambda v: all(isinstance(x, str) for x in v) and _different(v))
    p.maybe_name("unlearn.error", "error", selections.ERRORS)
    p.name("unlearn.draw", "draw", selections.DRAWS)
    p.check("unlearn.t_min", f"in [0, {steps.text})", lambda v: 0 <= v < steps.most)
    p.check(
        "unlearn.t_max", f"0 (all) or in (t_min, {steps.text}]", lambda v: v == 0 or unlearn.t_min < v <= steps.most
    )
    p.check("unlearn.importance.uniform_share", "in (0, 1]", lambda v: 0 < v <= 1)
    p.check("unlearn.neighbours.k", "1 or more", lambda v: v >= 1)
    p.check("unlearn.neighbours.copy_rms", "0 (no check) or more", lambda v: v >= 0)
    _check_select(p, steps)
    for key in ("rho", "c", "eta"):
        _check_value(p, f"unlearn.combine.{key}", "0 or more", lambda v: v >= 0)
    for key in methods.TERM_WEIGHTS:
        if unlearn.combine[key] is not None:
            _check_value(p, f"unlearn.combine.{key}", "finite", lambda v: True)
    if unlearn.combine.name:
        p.name("unlearn.combine.name", "combiner", methods.COMBINER_VALUES)
    _check_guards(p)
    check_watch(p)
    if len(p.lines) == before:
        _check_method(p, schedule)


def _check_value(p: Problems, key: str, allowed: str, test: Callable[[float], bool]) -> None:
    """One line unless every value of a number or schedule passes the test at every step of unlearning."""
    value, num_steps = p.value(key), max(p.config.unlearn.num_steps, 1)
    try:
        if step_schedules.all_values(value, num_steps, test):
            return
    except ValueError as error:
        p.lines.append(f"config.{key}: {error}")
        return
    at_every_step = " at every step" if step_schedules.is_scheduled(value) else ""
    p.lines.append(f"config.{key} = {value!r}: must be {allowed}{at_every_step}")


def _different(values: tuple) -> bool:
    return len(set(values)) == len(values)


def _check_select(p: Problems, steps: Steps) -> None:
    select = p.config.unlearn.select
    if p.name("unlearn.select.window_unit", "unit of a window", timesteps.WINDOW_UNITS):
        allowed, test = {
            "t": (
                f"two whole numbers (t1, t2) with 0 <= t1 < t2 <= {steps.text}",
                lambda v: whole_numbers(v) and 0 <= v[0] < v[1] <= steps.most,
            ),
            "fraction": ("two numbers (start, stop) with 0 <= start < stop <= 1", lambda v: 0 <= v[0] < v[1] <= 1),
            "log_snr": ("two numbers (high, low) with low < high", lambda v: v[1] < v[0]),
        }[select.window_unit]
        p.check(
            "unlearn.select.window",
            f"{allowed}, or (0, 0) for all",
            lambda v: len(v) == 2 and all(map(is_number, v)) and (v == (0, 0) or test(v)),
        )
    p.check("unlearn.select.edge", "0 or more steps", lambda v: v >= 0)
    known = p.name("unlearn.select.filter", "filter", ("none", *frequency.FILTERS))
    if known and select.filter == "band":
        p.check(
            "unlearn.select.cutoff",
            "two radii (low, high) with 0 < low < high, such as (0.2,0.5)",
            lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(is_number, v)) and 0 < v[0] < v[1],
        )
    else:
        p.check(
            "unlearn.select.cutoff",
            f"one positive radius (1 = Nyquist), or a table of {steps.text}, one for every t",
            lambda v: (
                all(is_number(x) and x > 0 for x in (v if isinstance(v, tuple) else (v,)))
                and not (isinstance(v, tuple) and steps.known and len(v) != steps.most)
            ),
        )
    p.name("unlearn.select.kind", "filter kind", selections.FILTER_KINDS)
    p.check("unlearn.select.order", "1 or more", lambda v: v >= 1)
    p.name("unlearn.select.unit", "unit of a cutoff", frequency.UNITS)
    p.name("unlearn.select.backend", "filter backend", frequency.BACKENDS)


def _check_guards(p: Problems) -> None:
    p.maybe("unlearn.guards.anchor_weight", "0 or more", lambda v: v >= 0)
    p.maybe("unlearn.guards.l2_radius", "positive", lambda v: v > 0)
    p.name("unlearn.guards.mask", "mask", ("none", "saliency", "fisher_ratio"))
    p.check("unlearn.guards.fraction", "in (0, 1]", lambda v: 0 < v <= 1)
    p.check("unlearn.guards.threshold", "positive", lambda v: v > 0)
    p.check("unlearn.guards.batches", "1 or more", lambda v: v >= 1)
    p.check("unlearn.guards.batch_size", "1 or more", lambda v: v >= 1)
    p.maybe("unlearn.guards.reserve.capacity", "0 or more", lambda v: v >= 0)
    p.check("unlearn.guards.reserve.floor", "0 or more", lambda v: v >= 0)


def _check_method(p: Problems, schedule: Schedule | None) -> None:
    """Whether the values, each good in itself, go together."""
    unlearn = p.config.unlearn
    p.lines.extend(methods.option_problems(unlearn))
    _check_anchor(p)
    if unlearn.level is not None and unlearn.beta_unit == "raw":
        p.lines.append("config.unlearn.level: is not used with beta_unit='raw'; set it to None")
    if unlearn.guards.mask != "none" and not METHODS[unlearn.method].forget_sign:
        p.lines.append(
            f"config.unlearn.guards.mask = {unlearn.guards.mask!r}: method {unlearn.method!r} has no forget term to "
            "measure it with; set it to 'none'"
        )
    _check_scheduled(p)
    if p.config.select != MANUAL and not METHODS[unlearn.method].forget_sign:
        p.lines.append(
            f"config.select = {p.config.select!r}: method {unlearn.method!r} has no forget term to select in; "
            "set --config.select=manual"
        )
        return
    unlearn = stand_in(p.config)
    if schedule is None:
        if p.config.base.path is not None:
            unlearn = _some_timesteps(unlearn)
        with contextlib.suppress(ValueError):  # told under config.scheduler
            schedule = read_scheduler(build.scheduler_json(p.config)).schedule
    if schedule is not None:
        p.lines.extend(schedule_problems(unlearn, schedule))


def _some_timesteps(unlearn: ConfigDict) -> ConfigDict:
    """The same with a selection that goes with every noise schedule, to judge the rest before a user's model is loaded."""
    unlearn = copy.deepcopy(unlearn)
    unlearn.t_min = unlearn.t_max = unlearn.select.edge = 0
    if tuple(unlearn.select.window) != (0, 0):
        unlearn.select.window, unlearn.select.window_unit = (0.25, 0.75), "fraction"
    if selections.is_table(unlearn.select.cutoff):
        unlearn.select.cutoff = 1.0
    return unlearn


def _check_scheduled(p: Problems) -> None:
    """What a schedule may not do during the run, beyond the range of its key; the library sees only numbers."""
    unlearn, method = p.config.unlearn, METHODS[p.config.unlearn.method]
    if unlearn.method == "bernoulli" and step_schedules.is_scheduled(unlearn.lam):
        _check_value(p, "unlearn.lam", "strictly between 0 and 1 for bernoulli", lambda v: 0 < v < 1)
    name = methods.combiner_name(unlearn)
    for key in set(methods.COMBINER_VALUES[name]) & set(methods.TERM_WEIGHTS):
        if not step_schedules.is_scheduled(unlearn.combine[key]):
            continue
        if name == "pcgrad":
            _check_value(p, f"unlearn.combine.{key}", "0 or more for pcgrad", lambda v: v >= 0)
        elif key == "forget" and method.forget_sign:
            verb = {-1: "ascends the forget term, so 0 or less", 1: "descends the forget term, so 0 or more"}
            _check_value(
                p,
                "unlearn.combine.forget",
                f"of one sign: {unlearn.method} {verb[method.forget_sign]}",
                lambda v: v * method.forget_sign >= 0,
            )


def _selection_problems(unlearn: ConfigDict, schedule: Schedule) -> list[str]:
    """What is wrong with the window and the filter under a noise schedule: one line each."""
    found = []
    for call in (
        lambda: selections.probed_range(unlearn, schedule),
        lambda: selections.frequency_filter(unlearn),
    ):
        try:
            call()
        except ValueError as error:
            found.append(f"config.unlearn.select: {error}")
    return found


def schedule_problems(unlearn: ConfigDict, schedule: Schedule) -> list[str]:
    """What is wrong with selection, objective, combiner, draw and guards under a noise schedule: one line each."""
    found = _selection_problems(unlearn, schedule)
    if found:
        return found
    try:
        objective = methods.make_objective(unlearn, schedule, level=1.0)
        combiner = methods.make_combine(unlearn, objective)
        selections.make_draw(unlearn, objective, schedule)
        build.make_guarded_tx(unlearn)
    except ValueError as error:
        return [f"config.unlearn: {line}" for line in str(error).splitlines()]
    found = methods.weight_problems(unlearn, objective)
    if objective.forget_sign != combiner.forget_sign:
        verb = {-1: "ascends", 0: "has no", 1: "descends"}
        found.append(
            f"config.unlearn: method {unlearn.method!r} {verb[objective.forget_sign]} forget term, but the combiner "
            f"{unlearn.combine.name or 'of the method'!r} with these values {verb[combiner.forget_sign]} it; "
            "check config.unlearn.combine"
        )
    return found


def _check_anchor(p: Problems) -> None:
    unlearn = p.config.unlearn
    kind = prepare.anchor_kind(unlearn)
    if kind != "checkpoint_var":
        if unlearn.checkpoints:
            p.lines.append(
                f"config.unlearn.checkpoints = {unlearn.checkpoints!r}: only an anchor 'checkpoint_var' (methods "
                "vdu_style, fisher_anchor) uses them; set it to ()"
            )
        return
    if len(unlearn.checkpoints) < 2:
        p.lines.append(
            f"config.unlearn.checkpoints = {unlearn.checkpoints!r}: an anchor 'checkpoint_var' (method "
            f"{unlearn.method!r}) needs two or more folders of late models of one training run; or set "
            "--config.unlearn.anchor=fisher or l2, which need none"
        )
    for path in unlearn.checkpoints:
        if not path.startswith(hub.PREFIX) and not pathlib.Path(path).expanduser().is_dir():
            p.lines.append(f"config.unlearn.checkpoints: no such folder: {path!r}; give folders of diffusers models")
