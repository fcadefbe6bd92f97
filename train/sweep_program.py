"""The compiled part of a sweep: one step for all rows. What they differ in are its arguments, so nothing compiles twice.

A window is a table of weights over t, a filter is a mask on the frequency grid, lam comes with the batch, the number of the
combiner is a table over the steps. Rows whose cutoff is a table over t have a mask for every t, and compile once more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxunlearn import guards
from jaxunlearn.errors import filtered, weighted
from jaxunlearn.frequency import RadialFilter, from_mask, radius
from jaxunlearn.images import to_model
from jaxunlearn.io.batches import batch_indices, stream_id
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.objectives.denoise import denoising_error
from jaxunlearn.objectives.probes import strata
from jaxunlearn.parallel import InFlight, global_batch, replicate, sharded_family
from jaxunlearn.step import init_state, make_train_step
from jaxunlearn.timesteps import table_weight
from jaxunlearn.types import Array, Draw, Error, Example, PyTree
from train import build, methods, prepare, selections, step_schedules
from train.examples import Examples, unlearning_rows
from train.stages import stage_key

FROM_ROWS = "from the rows"
"""In place of a number for lam: it comes with the batch."""


class Values(NamedTuple):
    """What a row is, as arrays.

    Attributes:
      weight: float32 [T], weight of t in the forget term, of mean 1.
      mask: float32 [H, W//2+1], transfer function on the forget term's residual; [T, H, W//2+1] where it depends on t.
      scale: float32 [steps], the combiner's number.
      level: float32, mean forget error of the starting model, for methods that ask for it; else 1.
    """

    weight: Array
    mask: Array
    scale: Array
    level: Array


def selection_values(config: ConfigDict, model: DiffusersModel, shape: tuple[int, ...]) -> Values:
    """The arrays of a configuration for images of a shape [H,W,C]; the level is 1.

    Raises:
      ValueError: a bad window or filter.
    """
    unlearn, schedule = config.unlearn, model.schedule
    t = np.arange(schedule.num_steps)
    weight, chosen = selections.time_weight(unlearn, schedule), selections.frequency_filter(unlearn)
    key = methods.SCALES[methods.combiner_name(unlearn)]
    number = unlearn.combine[key]
    if number is None:
        number = methods.weight_of(unlearn, key)
        number = abs(number) if methods.combiner_name(unlearn) == "pcgrad" else number
    return Values(
        np.ones(len(t), np.float32) if weight is None else np.asarray(weight(t), np.float32),
        np.asarray(np.ones_like(radius(*shape[:2])) if chosen is None else chosen.mask(*shape[:2], t), np.float32),
        step_schedules.values(number, unlearn.num_steps).copy(),
        np.float32(1),
    )


def _forget_error(error: Error, values: Values) -> Error:
    mask = values.mask
    chosen = from_mask(mask) if mask.ndim == 2 else RadialFilter(lambda rho, t: mask[t])
    return weighted(filtered(error, chosen), table_weight(values.weight))


class Finished(NamedTuple):
    """How a row ended.

    Attributes:
      params: the parameters after the last step.
      broken_step: the step at which a term or gradient was not finite, or None.
    """

    params: PyTree
    broken_step: int | None


class SweepProgram:
    """Runs rows of a sweep from one starting model.

    Args:
      config: the configuration of the sweep.
      model: the starting model.
      examples: the images as it takes them.
      mesh: the devices.
      start: from :func:`train.prepare.start`, with a stand-in for a level.

    Attributes:
      step: the compiled step, ``(state, key, batch, values) -> (state, metrics)``.
    """

    def __init__(self, config: ConfigDict, model: DiffusersModel, examples: Examples, mesh: Mesh, start: prepare.Start):
        self._config, self._model, self._examples, self._mesh, self._start = config, model, examples, mesh, start
        unlearn, schedule = copy.deepcopy(config.unlearn), model.schedule
        if "lam" in methods.method_of(unlearn).options:
            unlearn.lam = FROM_ROWS
        error = methods.error_of(unlearn)
        center = guards.REF_PARAMS if start.anchor is None else None
        tx = build.make_guarded_tx(unlearn, mask=start.mask, center=center)

        def objective_of(values: Values):
            level = values.level if methods.needs_level(unlearn) else None
            selected = _forget_error(error, values)
            return methods.make_objective(unlearn, schedule, level, start.cap, forget_error=selected)

        def combine_of(values: Values, objective):
            return methods.make_combine(unlearn, objective, scale=lambda step: values.scale[step])

        def make_step(values: Values):
            objective = objective_of(values)
            combiner = combine_of(values, objective)
            return make_train_step(objective, combiner, model.predict, tx, micro_batches=unlearn.micro_batches)

        example = selection_values(config, model, examples.shape)
        objective = objective_of(example)
        combiner = combine_of(example, objective)
        ref = start.anchor is None and (objective.needs_ref or build.has_guards(unlearn))
        draw_fn = selections.make_draw(config.unlearn, objective, schedule)
        self._takes_lam = "lam" in objective.batch_extra
        self.step = sharded_family(make_step, draw_fn, mesh)

        def first_state(params, anchor):
            state = init_state(params, tx, combiner, ref=ref)
            return state if anchor is None else state._replace(ref_params=anchor)

        self._first_state = jax.jit(first_state)
        self._levels = jax.jit(self._probe)

    def values(self, config: ConfigDict) -> Values:
        """The arrays of a row's configuration, its level measured where the method needs one.

        Raises:
          ValueError: a bad selection, or an error of the starting model that is no level.
        """
        values = selection_values(config, self._model, self._examples.shape)
        if not methods.needs_level(config.unlearn):
            return values
        t1, t2, share = selections.probed_range(config.unlearn, self._model.schedule)
        t = strata(self._model.schedule.num_steps, min(prepare.LEVEL_STRATA, t2 - t1), t_min=t1, t_max=t2)
        population = self._examples.split.forget
        count = min(prepare.LEVEL_IMAGES, len(population))
        images = population[batch_indices(self._config.seed, "level", 0, len(population), count)]
        example = self._examples.take(images, seed=self._config.seed, stream="level", step=0, whole=True)
        level = share * float(np.mean(self._levels(self._model.params, example, t, values)))
        if not (np.isfinite(level) and level > 0):
            raise ValueError(f"the forget error of the starting model is {level}; check the model and the selection")
        return values._replace(level=np.float32(level))

    def _probe(self, params: PyTree, example: Example, t: Array, values: Values) -> Array:
        """Forget errors [N, S] of images at timesteps t [S]: what an unlearning run measures for the same selection."""
        key = jax.random.fold_in(jax.random.key(self._config.seed), stream_id("level"))
        x0 = to_model(example.x0)
        eps = jax.random.normal(key, (len(t), *x0.shape[1:]), jnp.float32)
        draw = Draw(t, jnp.ones(t.shape), eps, jnp.zeros(t.shape))
        error = _forget_error(methods.error_of(self._config.unlearn), values)

        def of_one(one):
            rows = jax.tree.map(lambda z: jnp.broadcast_to(z, (len(t), *z.shape)), one)
            return denoising_error(self._model.predict, params, rows, draw, self._model.schedule, error)

        return jax.lax.map(of_one, Example(x0, example.cond))

    def run(self, config: ConfigDict, poll: Callable[[], None] = lambda: None) -> Finished:
        """Unlearns as a row's configuration says, from the starting model.

        Args:
          config: of the row, see :func:`train.sweep_grid.configured`.
          poll: called before every step; what it raises ends the row.
        """
        unlearn = config.unlearn
        lam = step_schedules.values(unlearn.lam, unlearn.num_steps) if self._takes_lam else None
        extra, seed = self._start.extra, config.seed
        rows = unlearning_rows(self._examples, seed=seed, batch_size=unlearn.batch_size, extra=extra, lam=lam)
        values = replicate(self.values(config), self._mesh)
        state = replicate(self._first_state(self._model.params, self._start.anchor), self._mesh)
        key, in_flight = stage_key(seed, "unlearn"), InFlight()

        def broken(outputs) -> int | None:
            for step, metrics in outputs:
                if float(metrics["finite"]) != 1 or not np.isfinite([float(v) for v in metrics.values()]).all():
                    return step
            return None

        for step in range(unlearn.num_steps):
            poll()
            state, metrics = self.step(state, key, global_batch(rows(step), self._mesh), values)
            bad = broken(in_flight.add((step + 1, metrics)))
            if bad is not None:
                return Finished(state.params, bad)
        return Finished(state.params, broken(in_flight.drain()))
