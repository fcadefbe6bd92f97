"""The grid of a sweep: what the flags name, and the rows that follow."""

from __future__ import annotations

import ast
import copy
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxunlearn.schedule import Schedule
from train import auto_select, methods, selections
from train.problems import Problems, is_number
from train.validate_unlearn import check_unlearn

AUTO, ALL, NONE = "auto", "all", "none"


class Row(NamedTuple):
    """One run of the grid. None: as the configuration says.

    Attributes:
      window: two bounds in ``unlearn.select.window_unit``, (0, 0) for all; ``"auto"`` for the automatic choice.
      cutoff: radius, two of a band, ``"none"`` for all frequencies; None of a row that chooses by itself.
      lam: probability of the forget component.
      scale: the combiner's number.
    """

    window: tuple[float, float] | str | None = None
    cutoff: float | tuple[float, float] | str | None = None
    lam: float | None = None
    scale: float | None = None

    @property
    def is_auto(self) -> bool:
        """Whether window and filter are chosen automatically."""
        return self.window == AUTO

    @property
    def key(self) -> str:
        """Names the row in sweep.json."""
        return repr(tuple(self))


class Axes(NamedTuple):
    """The values of every axis; an axis that is not swept holds None alone."""

    windows: tuple = (None,)
    cutoffs: tuple = (None,)
    lams: tuple = (None,)
    scales: tuple = (None,)

    @property
    def swept(self) -> bool:
        """Whether there is anything to sweep."""
        return any(axis != (None,) for axis in self)

    def rows(self) -> list[Row]:
        """Every row; the automatic choice brings its own filter and is not crossed with the cut-offs."""
        found = []
        for window, lam, scale in itertools.product(self.windows, self.lams, self.scales):
            cutoffs = (None,) if window == AUTO else self.cutoffs
            found.extend(Row(window, cutoff, lam, scale) for cutoff in cutoffs)
        return found


def parse_axis(flag: str, text: str | None, *, words: Mapping[str, Any], pairs: bool, numbers: bool) -> tuple:
    """The values of one flag: numbers, pairs in parentheses and words, with spaces between them.

    Args:
      flag: its name, for messages.
      text: what was given; None: nothing.
      words: word -> value.
      pairs: whether pairs are allowed.
      numbers: whether single numbers are.

    Raises:
      ValueError: one line that says what is allowed.

    >>> parse_axis("windows", "(0,500) auto", words={"auto": "auto"}, pairs=True, numbers=False)
    ((0, 500), 'auto')
    """
    if text is None:
        return (None,)
    kinds = [("numbers", "0.5")] * numbers + [("pairs", "(250,750)" if not numbers else "(0.2,0.5)")] * pairs
    kinds += [("words", word) for word in words]
    allowed = f"values with spaces between them, such as {' '.join(example for _, example in kinds)}"
    found = []
    for token in re.findall(r"\([^()]*\)|\S+", text):
        value = words.get(token)
        if value is None:
            try:
                value = ast.literal_eval(token)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise ValueError(f"--{flag}: {token!r} is not understood; give {allowed}") from None
            is_pair = isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value))
            sound = (pairs and is_pair) or (numbers and is_number(value))
            if not sound or not all(map(math.isfinite, value if is_pair else (value,))):
                raise ValueError(f"--{flag}: {token!r} is not understood; give {allowed}")
        if value in found:
            raise ValueError(f"--{flag}: {token} stands twice")
        found.append(value)
    if not found:
        raise ValueError(f"--{flag}: is empty; give {allowed}")
    return tuple(found)


def parse_axes(windows: str | None, cutoffs: str | None, lams: str | None, scales: str | None) -> Axes:
    """The grid that the flags describe.

    Raises:
      ValueError: one line per problem.
    """
    calls = {
        "windows": (windows, {"words": {AUTO: AUTO, ALL: (0, 0)}, "pairs": True, "numbers": False}),
        "cutoffs": (cutoffs, {"words": {NONE: NONE}, "pairs": True, "numbers": True}),
        "lams": (lams, {"words": {}, "pairs": False, "numbers": True}),
        "scales": (scales, {"words": {}, "pairs": False, "numbers": True}),
    }
    axes, problems = [], []
    for flag, (text, options) in calls.items():
        try:
            axes.append(parse_axis(flag, text, **options))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    found = Axes(*axes)
    if not found.swept:
        raise ValueError("nothing to sweep; give --windows, --cutoffs, --lams or --scales")
    return found


def configured(config: ConfigDict, row: Row, automatic: auto_select.Selection | None = None) -> ConfigDict:
    """The configuration of a row: what ``python -m train.main`` would be given for it.

    Args:
      config: of the sweep.
      row: the row.
      automatic: the choice, for a row that takes it; without it such a row keeps the configuration's selection.
    """
    config = copy.deepcopy(config)
    if row.is_auto and automatic is not None:
        config = auto_select.applied(config, automatic)
    unlearn, select = config.unlearn, config.unlearn.select
    if row.window is not None and not row.is_auto:
        select.window = row.window
    if row.cutoff == NONE:
        select.filter, select.cutoff = "none", 1.0
    elif row.cutoff is not None:
        single = select.filter if select.filter in ("low_pass", "high_pass") else "low_pass"
        select.filter = "band" if isinstance(row.cutoff, tuple) else single
        select.cutoff = row.cutoff
    if row.lam is not None:
        unlearn.lam = row.lam
    if row.scale is not None:
        unlearn.combine[methods.SCALES[methods.combiner_name(unlearn)]] = row.scale
    return config


def axis_problems(config: ConfigDict, axes: Axes, schedule: Schedule | None = None) -> list[str]:
    """What is wrong with the values of the axes, one line each: every value on its own, with the rest as configured.

    Args:
      config: of the sweep.
      axes: the grid.
      schedule: of the user's model, whose timesteps count; None before it is loaded, or where there is none.
    """
    unlearn, problems = config.unlearn, []
    method = methods.method_of(unlearn)
    if config.select != auto_select.MANUAL:
        problems.append(
            f"config.select = {config.select!r}: a sweep has its own windows; set it to manual and give --windows=auto"
        )
    if not method.forget_sign:
        return [f"config.unlearn.method = {unlearn.method!r}: has no forget term to sweep"]
    if axes.lams != (None,) and "lam" not in method.options:
        problems.append(f"--lams: method {unlearn.method!r} has no lam; leave it out")
    if axes.lams != (None,) and unlearn.stratify:
        problems.append("config.unlearn.stratify = True: draws for one lam; set it to False, or leave --lams out")
    if unlearn.draw == "importance":
        problems.append("config.unlearn.draw = 'importance': follows one window; a sweep needs uniform or antithetic")
    if unlearn.guards.mask != "none":
        problems.append(
            f"config.unlearn.guards.mask = {unlearn.guards.mask!r}: is measured for one selection; set it to none"
        )
    if unlearn.stop.target is not None:
        problems.append(
            f"config.unlearn.stop.target = {unlearn.stop.target}: a sweep makes all steps of every row; set it to None"
        )
    if selections.is_table(unlearn.select.cutoff):
        problems.append("config.unlearn.select.cutoff: a table over t cannot be swept; give one radius")
    if problems:
        return problems
    checks = [("windows", v, Row(window=v)) for v in axes.windows]
    checks += [("cutoffs", v, Row(cutoff=v)) for v in axes.cutoffs]
    checks += [("lams", v, Row(lam=v)) for v in axes.lams] + [("scales", v, Row(scale=v)) for v in axes.scales]
    for flag, value, row in checks:
        if value is None or value == AUTO:
            continue
        found = Problems(configured(config, row))
        check_unlearn(found, schedule)
        problems += [f"--{flag}: {line}" for line in found.lines]
    return list(dict.fromkeys(problems))
