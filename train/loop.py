"""The training loop that every stage shares: read it from top to bottom.

The batch of a step, its noise and its order are functions of (seed, step) alone, so a run that is killed and started again
ends in the same parameters, bit for bit.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from jaxunlearn.io.checkpoint import Checkpoints
from jaxunlearn.parallel import GlobalStep, InFlight, global_batch, replicate
from jaxunlearn.types import Batch, PyTree, TrainState
from train.log import TrainingLog, say
from train.watch import CURES, Watch


class TrainingFailed(Exception):
    """The run cannot go on: NaN, a broken checkpoint. ``str`` says why and what to try."""


class Collapsed(TrainingFailed):
    """The model was destroyed on the way.

    Attributes:
      step: the last sound step.
      params: its parameters, numpy.
    """

    def __init__(self, text: str, step: int, params: PyTree):
        super().__init__(text)
        self.step, self.params = step, params


class Preempted(Exception):
    """A termination signal came; the state is saved, the same command goes on from there."""


@dataclasses.dataclass
class StageRun:
    """One stage of training.

    Attributes:
      name: ``base``, ``unlearn`` or ``retrain``.
      step: the compiled step.
      state: the state before the first step.
      rows: ``step -> Batch`` of this process's rows, uint8 numpy.
      key: the stage's key; a step folds in its number.
      num_steps: how many steps.
      checkpoint_every: steps between checkpoints.
      sample_every: steps between sample grids; 0 for none before the end.
      meta: plain JSON that a checkpoint must agree with (the configuration's fingerprint).
      watch: what probes the model, ends a run that collapses or has forgotten enough, and says what is returned; None for
        nobody.
    """

    name: str
    step: GlobalStep
    state: TrainState
    rows: Callable[[int], Batch]
    key: jax.Array
    num_steps: int
    checkpoint_every: int
    sample_every: int
    meta: dict
    watch: Watch | None = None


class Termination:
    """Whether the run shall stop because a termination signal came (SIGTERM or SIGUSR1, as schedulers send them).

    With several processes JAX's preemption service catches SIGTERM instead and lets all of them stop after the same step.
    """

    def __init__(self):
        self._event = threading.Event()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Termination:
        if jax.process_count() == 1:
            self.listen()
        return self

    def listen(self) -> None:
        """Catches the signals here: in a single process from the start, in one of several when it goes on alone."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                previous = signal.signal(number, lambda *_: self._event.set())
                self._previous.setdefault(number, previous)

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def came(self) -> bool:
        """Whether a signal came to this process."""
        return self._event.is_set()

    def before_step(self, step: int) -> bool:
        """Whether to stop before this step; the same answer in every process."""
        if jax.process_count() == 1:
            return self.came()
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


def fresh_or_restored(run: StageRun, mesh: Mesh, checkpoints: Checkpoints) -> TrainState:
    """The state of the newest checkpoint, or the first one."""
    state = replicate(run.state, mesh)
    try:
        restored = checkpoints.restore(state)
    except ValueError as error:
        raise TrainingFailed(str(error)) from None
    if restored is None:
        return state
    step, state, meta, kept = restored
    for key, value in run.meta.items():
        if meta.get(key) != value:
            raise TrainingFailed(
                f"the checkpoint of step {step} was made with another {key} ({meta.get(key)!r}, now {value!r}); "
                "use another --workdir"
            )
    if run.watch is not None:
        run.watch.restore(meta["watch"], kept)
    say(f"{run.name}: going on after step {step}")
    return state


def train(
    run: StageRun,
    mesh: Mesh,
    checkpoints: Checkpoints,
    make_log: Callable[[int], TrainingLog],
    on_sample: Callable[[int, PyTree], None],
    stop: Termination,
) -> TrainState:
    """Runs a stage to its end.

    Args:
      run: the stage.
      mesh: the devices.
      checkpoints: where its states are kept.
      make_log: ``start_step -> TrainingLog``.
      on_sample: called as ``on_sample(step, params)`` every ``sample_every`` steps.
      stop: asked before every step.

    Returns:
      The final state. Of a watched run that returns another step: with the step and the parameters of that one.

    Raises:
      TrainingFailed: a term or gradient is not finite, or no checkpoint can be restored.
      Collapsed: likewise, or the keep loss has grown too much, in a watched run.
      Preempted: a termination signal came; the state is saved.
    """
    state = fresh_or_restored(run, mesh, checkpoints)
    start = int(state.step)
    log = make_log(start)
    in_flight = InFlight()
    watch, probed = run.watch, {}

    def finished(outputs) -> None:
        """Looks at the steps whose results are there."""
        for step, metrics in outputs:
            values = {name: float(value) for name, value in metrics.items()}
            if not np.isfinite([*values.values()]).all() or values["finite"] != 1:
                bad = sorted(name for name, value in values.items() if not np.isfinite(value)) or ["the direction"]
                text = f"{run.name}, step {step}: {', '.join(bad)} not finite"
                if watch is not None:
                    raise collapsed(f"collapsed: {text}", watch)
                raise TrainingFailed(
                    f"{text}; the last checkpoint is intact. Try a smaller learning rate or a weaker forget part"
                )
            figures = probed.pop(step, {})
            if log.due(step) or figures:
                log.write(step, values | figures)

    def save(step: int) -> None:
        if watch is None:
            checkpoints.save(step, state, run.meta)
        else:
            checkpoints.save(step, state, {**run.meta, "watch": watch.meta()}, watch.kept())

    try:
        if watch is not None and start == 0:
            log.write(0, watch.first(state.params))
        for step in range(start, run.num_steps):
            if stop.before_step(step):
                finished(in_flight.drain())
                save(step)
                checkpoints.wait()
                raise Preempted(f"{run.name}: stopped after step {step}; the same command goes on from there")
            state, metrics = run.step(state, run.key, global_batch(run.rows(step), mesh))
            finished(in_flight.add((step + 1, metrics)))
            done = step + 1
            if watch is not None and watch.due(done):
                seen = watch.look(done, state.params)
                probed[done] = seen.figures
                finished(in_flight.drain())
                decision = watch.take(seen)
                if decision.reason == "collapsed":
                    raise collapsed(f"unlearn: {decision.text}", watch)
                if decision.action == "stop":
                    say(f"{run.name}: stopped after step {done}: {decision.text}")
                    break
            if done % run.checkpoint_every == 0 or done == run.num_steps:
                finished(in_flight.drain())
                save(done)
            if run.sample_every and done % run.sample_every == 0 and done != run.num_steps:
                on_sample(done, model_params(state))
        finished(in_flight.drain())
        checkpoints.wait()
        return state if watch is None else returned(state, watch)
    finally:
        log.close()


def collapsed(text: str, watch: Watch) -> Collapsed:
    """The end of a run that destroyed the model: says where the last sound step is, and what to try."""
    step = watch.decision.last_sound_step or 0  # None where not even the start is below the warning
    back = f"the last sound parameters are those of {f'step {step}' if step else 'the start'}"
    return Collapsed(f"{text}; {back}. {CURES}", step, watch.params_of(step))


def returned(state: TrainState, watch: Watch) -> TrainState:
    """The state with the step and the parameters that the watch returns."""
    step = watch.returned_step()
    if step == int(state.step):
        return state
    say(f"unlearn: returns step {step}")
    return state._replace(step=np.int32(step), params=watch.params_of(step))


def model_params(state: TrainState) -> PyTree:
    """The parameters that are the model: the moving average where there is one."""
    return state.params if state.ema_params is None else state.ema_params


def to_host(tree: PyTree) -> PyTree:
    """numpy copies."""
    return jax.tree.map(lambda x: np.asarray(jax.device_get(x)), tree)
