"""One unlearning run in this process: no work directory, no checkpoints, no log files. For studies and for tuning.

The steps are those of ``python -m train.main``: the same batches, noise and order from the same configuration and seed, so a
setting that is found here gives the same model there.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.parallel import global_batch, replicate
from jaxunlearn.types import PyTree, TrainState
from train import prepare
from train.examples import Examples
from train.loop import StageRun, model_params, to_host
from train.stages import unlearning_run

WARM_UP = 3
"""Steps that are not counted in the time: the first one compiles."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a run ended with.

    Attributes:
      params: the last parameters that are the model (the moving average where there is one), numpy; where a step was
        broken, those after it.
      log: metric -> float64 [steps], see :func:`jaxunlearn.step.make_train_step`.
      step_seconds: median time of a step after the first ones; NaN if there were none.
      broken_step: the first step whose metrics or direction were not finite, where the run ended; None if there was none.
    """

    params: PyTree
    log: dict[str, np.ndarray]
    step_seconds: float
    broken_step: int | None


def measured_start(config: ConfigDict, model: DiffusersModel, examples: Examples) -> prepare.Start:
    """What a run of this configuration measures before its first step; nothing of it is kept.

    Raises:
      ValueError: as :func:`train.prepare.start`.
    """
    with tempfile.TemporaryDirectory() as folder:
        workdir = Workdir(pathlib.Path(folder))
        return prepare.start(config, workdir, model, examples, resumes=False, poll=lambda: None)


def run_trial(
    config: ConfigDict,
    model: DiffusersModel,
    examples: Examples,
    mesh: Mesh,
    start: prepare.Start | None = None,
    *,
    on_step: Callable[[int, TrainState], None] | None = None,
) -> Trial:
    """Unlearns, and returns where it ended. A step that is not finite ends the run without an error.

    Args:
      config: a whole configuration; ``config.unlearn`` and ``config.seed`` are used.
      model: the starting model.
      examples: the images as it takes them.
      mesh: the devices.
      start: what was measured before; None measures it.
      on_step: called as ``on_step(step, state)`` after every step; it must not keep the arrays, which the next step
        overwrites.

    Raises:
      ValueError: a configuration that the method refuses.
    """
    start = measured_start(config, model, examples) if start is None else start
    return run_steps(unlearning_run(config, model, examples, mesh, start=start), mesh, on_step=on_step)


def run_steps(run: StageRun, mesh: Mesh, *, on_step: Callable[[int, TrainState], None] | None = None) -> Trial:
    """The steps of any stage's run; see :func:`run_trial`."""
    state, lines, seconds, broken = replicate(run.state, mesh), [], [], None
    for step in range(run.num_steps):
        batch = global_batch(run.rows(step), mesh)
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(run.step(state, run.key, batch))
        seconds.append(time.perf_counter() - started)
        lines.append({name: float(value) for name, value in metrics.items()})
        if not np.isfinite([*lines[-1].values()]).all() or lines[-1]["finite"] != 1:
            broken = step + 1
            break
        if on_step is not None:
            on_step(step + 1, state)
    log = {name: np.array([line[name] for line in lines]) for name in (lines[0] if lines else ())}
    counted = seconds[WARM_UP:]
    return Trial(to_host(model_params(state)), log, float(np.median(counted)) if counted else float("nan"), broken)
