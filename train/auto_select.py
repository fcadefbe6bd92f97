"""``config.select``: which t and which frequencies are unlearned, chosen by a rule once the base model is there.

======================  ============================================================================================
``manual``              what ``unlearn.select`` says
``auto``                :func:`jaxunlearn.selection.choose`, with the loss gap between forget and held-out images
``spectrum``            where the forget images take shape, and at each t the frequencies that the noise leaves of them
``responsibility``      where the training images decide that a forget image comes out; all frequencies
======================  ============================================================================================

The choice takes the place of ``unlearn.select``. It is kept in ``selection.json`` and, the numbers alone, under ``resolved``
in ``config.json``; a run that goes on reads it there and chooses nothing anew.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxunlearn import timesteps
from jaxunlearn.io import diffusers
from jaxunlearn.io.json_files import parse_json
from jaxunlearn.io.manifest import write_json
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.schedule import Schedule
from train import selection_rules, selections
from train.distributed import from_first_text
from train.examples import Examples
from train.log import say
from train.selection_figure import draw_selection

MANUAL = "manual"
RULES = (MANUAL, *selection_rules.RULES)
RESOLVED = "resolved"
"""The key of config.json under which chosen numbers stand."""
SELECTION = "selection.json"
"""The file in the work directory; beside it lies ``selection.png``."""
CHOSEN = ("window", "window_unit", "filter", "cutoff", "kind", "unit")
"""The keys of ``unlearn.select`` that a rule decides."""
EVERYTHING = {"window": (0, 0), "window_unit": "t", "filter": "none", "cutoff": 1.0, "kind": "ideal", "unit": "nyquist"}


class Selection(NamedTuple):
    """What a rule chose.

    Attributes:
      rule: its name.
      select: values of the keys :data:`CHOSEN`.
      reasons: why, in whole sentences.
      curves: what is behind it: name -> float64 array.
    """

    rule: str
    select: Mapping[str, Any]
    reasons: tuple[str, ...]
    curves: Mapping[str, np.ndarray]


def conflicts(config: ConfigDict, command: Sequence[str]) -> list[str]:
    """One line where the command line sets by hand what a rule shall choose. A configuration file may: it is replaced."""
    if config.get("select", MANUAL) == MANUAL:
        return []
    by_hand = [f"config.unlearn.select.{key}" for key in CHOSEN if _is_set(command, f"--config.unlearn.select.{key}")]
    if not by_hand:
        return []
    return [f"config.select = {config.select!r} chooses {', '.join(by_hand)}; leave one of both out"]


def _is_set(command: Sequence[str], flag: str) -> bool:
    return any(argument.split("=", 1)[0].lstrip("-") == flag.lstrip("-") for argument in command)


def clear(config: ConfigDict) -> str | None:
    """Where a rule shall choose, ``unlearn.select`` is set to everything; the sentence that says what was replaced."""
    if config.get("select", MANUAL) == MANUAL or "unlearn" not in config:
        return None
    select = config.unlearn.select
    before = {key: select[key] for key in ("window", "filter") if select[key] != EVERYTHING[key]}
    for key, value in EVERYTHING.items():
        select[key] = value
    if not before:
        return None
    was = ", ".join(f"{key} {value}" for key, value in before.items())
    return f"select: the rule {config.select!r} replaces what the configuration file says ({was})"


def stand_in(config: ConfigDict) -> ConfigDict:
    """``config.unlearn``, with some window where a rule has yet to choose: what else there is can be judged with it."""
    if config.select == MANUAL:
        return config.unlearn
    unlearn = copy.deepcopy(config.unlearn)
    unlearn.select.window, unlearn.select.window_unit = (0.25, 0.75), "fraction"
    return unlearn


def window_in_t(select: ConfigDict, schedule: Schedule) -> tuple[int, int]:
    """The configured window in whole timesteps; (0, 0) for all.

    Raises:
      ValueError: a bad window.
    """
    window = tuple(select.window)
    return window if window == (0, 0) else timesteps.resolve_window(schedule, window, select.window_unit)


def describe(select: Mapping[str, Any], num_steps: int, unit: str = "nyquist") -> str:
    """The chosen values in a few words; the window in timesteps, the cutoff in the unit.

    >>> describe(EVERYTHING | {"window": (250, 750), "filter": "low_pass", "cutoff": 0.5}, 1000)
    't in [250, 750), low_pass at 0.5 Nyquist'
    """
    window, cutoff = tuple(select["window"]), select["cutoff"]
    when = f"every t of {num_steps}" if window == (0, 0) else f"t in [{window[0]}, {window[1]})"
    if select["filter"] == "none":
        return f"{when}, all frequencies"
    if selections.is_table(cutoff):
        t1, t2 = (0, num_steps) if window == (0, 0) else window
        radii = f"from {cutoff[t1]:.3g} at t = {t1} to {cutoff[t2 - 1]:.3g} at t = {t2 - 1}"
    else:
        radii = "to ".join(f"{radius:.3g} " for radius in np.atleast_1d(cutoff)).strip()
        radii = f"at {radii}" if np.ndim(cutoff) == 0 else f"from {radii}"
    return f"{when}, {select['filter']} {radii} {'Nyquist' if unit == 'nyquist' else unit}"


def choose(
    config: ConfigDict, model: diffusers.DiffusersModel, examples: Examples, poll: Callable[[], None] = lambda: None
) -> Selection:
    """What the configured rule chooses for a model and its images. Deterministic.

    Args:
      config: the configuration; ``config.select`` names a rule.
      model: the model before unlearning.
      examples: the images as it takes them.
      poll: called now and then; what it raises ends the choice.

    Raises:
      ValueError: the rule finds nothing, or something that does not go with the rest of ``config.unlearn``.
    """
    proposal = selection_rules.RULES[config.select](config, model, examples, poll)
    num_steps = model.schedule.num_steps
    window = (0, 0) if proposal.window == (0, num_steps) else tuple(map(int, proposal.window))
    chosen = {"window": window, "filter": proposal.filter, "kind": proposal.kind}
    if proposal.filter != "none":
        cutoff = np.asarray(proposal.cutoff, np.float64)
        chosen["cutoff"] = tuple(cutoff.tolist()) if cutoff.ndim else float(cutoff)
    found = Selection(config.select, EVERYTHING | chosen, tuple(proposal.reasons), proposal.curves)
    try:
        selections.probed_range(applied(config, found).unlearn, model.schedule)
    except ValueError as error:
        raise ValueError(
            f"config.select = {config.select!r} chose {describe(found.select, num_steps)}, which does not go with the rest "
            f"of config.unlearn: {error}"
        ) from None
    return found


def applied(config: ConfigDict, selection: Selection) -> ConfigDict:
    """The configuration with the chosen values in ``unlearn.select``; the original is left alone."""
    config = copy.deepcopy(config)
    for key in CHOSEN:
        config.unlearn.select[key] = selection.select[key]
    return config


def lines(selection: Selection, num_steps: int) -> list[str]:
    """What a user is told: the values, then the reasons."""
    first = f"select: {selection.rule} chose {describe(selection.select, num_steps)}"
    return [first, *(f"select: {reason}" for reason in selection.reasons)]


def resolve(
    config: ConfigDict,
    workdir: Workdir,
    model: diffusers.DiffusersModel,
    examples: Examples,
    poll: Callable[[], None],
) -> ConfigDict:
    """The configuration that unlearning follows: with the choice of an earlier start, or with one that is made and kept.

    Raises:
      ValueError: as :func:`choose`; a selection.json that cannot be used.
    """
    if config.select == MANUAL:
        return config
    writes, num_steps = jax.process_index() == 0, model.schedule.num_steps
    found = read(workdir)
    before = found is not None
    if not before:
        found = choose(config, model, examples, poll)
    # Of several processes the first one's choice holds.
    found = _from_plain(json.loads(from_first_text(json.dumps(_plain(found, num_steps)))))
    for line in lines(found, num_steps)[: 1 if before else None]:
        say(line)
    if writes and not before:
        write_json(workdir.root / SELECTION, _plain(found, num_steps))
        draw_selection(workdir.root / "selection.png", found, num_steps, describe(found.select, num_steps))
    if writes:
        write_config(workdir, config)
    return applied(config, found)


def preview(
    config: ConfigDict,
    workdir: Workdir | None,
    model: diffusers.DiffusersModel,
    examples: Examples,
    *,
    own_model: bool,
) -> tuple[ConfigDict, list[str]]:
    """What a dry run can know of the choice, without writing: the configuration to compile, and lines.

    Args:
      config: the configuration.
      workdir: of the run, or None.
      model: the user's model, or one of the configuration that is not trained.
      examples: the images; of a latent model or one of text they are stand-ins.
      own_model: whether it is the user's model.

    Raises:
      ValueError: as :func:`choose`; a selection.json that cannot be used.
    """
    if config.select == MANUAL:
        return config, []
    found = read(workdir) if workdir is not None else None
    unknown = copy.deepcopy(config)
    unknown.unlearn = stand_in(config)
    if found is None and (model.is_latent or model.takes_text):
        return unknown, [
            f"select: {config.select} chooses when the images have been encoded; compiled with some window"
        ]
    if found is None:
        trained = workdir is not None and workdir.model("base").is_dir()
        if not own_model and trained:
            model = diffusers.load(workdir.model("base")).with_compute(config.compute.dtype, config.compute.remat)
        elif not own_model and config.select in selection_rules.NEED_MODEL:
            wait = (
                f"select: {config.select} asks the base model, which must first be trained; compiled with some window"
            )
            return unknown, [wait]
        found = choose(config, model, examples)
    return applied(config, found), lines(found, model.schedule.num_steps)


# Files.


def _plain(selection: Selection, num_steps: int) -> dict:
    """As JSON; numbers that are not finite become None."""

    def number(x: float) -> float | None:
        return float(x) if np.isfinite(x) else None

    return {
        "rule": selection.rule,
        "summary": describe(selection.select, num_steps),
        "select": {key: list(value) if isinstance(value, tuple) else value for key, value in selection.select.items()},
        "reasons": list(selection.reasons),
        "num_steps": num_steps,
        "curves": {name: [number(x) for x in np.atleast_1d(curve)] for name, curve in selection.curves.items()},
    }


def _from_plain(content: Mapping[str, Any]) -> Selection:
    select = {key: tuple(v) if isinstance(v := content["select"][key], list) else v for key in CHOSEN}
    curves = {name: np.asarray(curve, np.float64) for name, curve in content["curves"].items()}
    return Selection(content["rule"], select, tuple(content["reasons"]), curves)


def read(workdir: Workdir) -> Selection | None:
    """The choice in a work directory, or None.

    Raises:
      ValueError: the file is damaged.
    """
    path = workdir.root / SELECTION
    if not path.exists():
        return None
    try:
        return _from_plain(parse_json(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be used ({error}); delete it and the unlearning stage starts anew") from None


def write_config(workdir: Workdir, config: ConfigDict) -> None:
    """Writes config.json: the configuration as it was given, and under ``resolved`` what a rule chose, if it did."""
    content = json.loads(config.to_json_best_effort())
    path = workdir.root / SELECTION
    if config.select != MANUAL and path.exists() and read(workdir) is not None:
        chosen = parse_json(path.read_bytes())
        content[RESOLVED] = {"rule": chosen["rule"], "summary": chosen["summary"], "select": chosen["select"]}
    write_json(workdir.config, content)
