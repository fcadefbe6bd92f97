"""Devices: the only file that knows them. The same step under jit over a mesh, and under pmap.

The form is ``shard_map`` with explicit averages: each device runs the step on its rows and the step averages the gradients
of the terms over the mesh axis. ``check_vma=False`` is part of it: with the check on, a ``pmean`` of ``grad`` silently gives
a gradient that is too large by the number of devices.

The randomness of a step is drawn outside the mapped function for the whole batch from ``fold_in(key, step)``, so any number
of devices sees the same draw.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxunlearn.step import Metrics, TrainStep
from jaxunlearn.types import Array, Batch, DrawFn, PyTree, TrainState

AXIS = "data"
"""Name of the mesh axis over which examples are split."""

GlobalStep = Callable[[TrainState, Array, Batch], tuple[TrainState, Metrics]]
"""``(state, key, global batch) -> (state, metrics)``."""


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, ``"data"``, over the given devices (all of every process if None)."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def check_divisible(batch_size: int, mesh: Mesh, micro_batches: int = 1) -> None:
    """Raises ValueError unless every device gets the same number of examples, in equal micro-batches."""
    parts = mesh.size * micro_batches
    if batch_size % parts:
        raise ValueError(
            f"a batch of {batch_size} does not divide over {mesh.size} devices x {micro_batches} micro-batches; "
            f"choose a multiple of {parts}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays of which every device holds a whole copy."""
    return NamedSharding(mesh, P())


def by_example(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is split over the devices."""
    return NamedSharding(mesh, P(AXIS))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """The tree with a whole copy on every device of the mesh. The result may share memory with the input."""
    return jax.device_put(tree, replicated(mesh))


def global_batch(rows: PyTree, mesh: Mesh) -> PyTree:
    """The global arrays of which this process holds ``rows`` (its share of the first axis, in order)."""
    sharding = by_example(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), rows)


def sharded_step(step: TrainStep, draw_fn: DrawFn, mesh: Mesh, *, donate: bool = True) -> GlobalStep:
    """The step over a mesh: one compiled function of the state, a key and the global batch.

    Place the first state with :func:`replicate`: a state that lies elsewhere makes the second step compile again.

    Args:
      step: from :func:`jaxunlearn.step.make_train_step`.
      draw_fn: draws the randomness of the global batch from ``fold_in(key, state.step)``.
      mesh: from :func:`make_mesh`; a mesh of one device is the ordinary case.
      donate: reuse the memory of the old state, which is then deleted.
    """
    mapped = jax.shard_map(
        partial(step, axis_name=AXIS),
        mesh=mesh,
        in_specs=(P(), P(AXIS), P(AXIS)),
        out_specs=P(),
        check_vma=False,
    )

    def global_step(state: TrainState, key: Array, batch: Batch) -> tuple[TrainState, Metrics]:
        draw = draw_fn(jax.random.fold_in(key, state.step), batch)
        return mapped(state, batch, draw)

    return jax.jit(global_step, donate_argnums=(0,) if donate else ())


def sharded_family(
    make_step: Callable[[PyTree], TrainStep], draw_fn: DrawFn, mesh: Mesh, *, donate: bool = True
) -> Callable[[TrainState, Array, Batch, PyTree], tuple[TrainState, Metrics]]:
    """As :func:`sharded_step`, for steps that differ in numbers alone: one compiled function serves all of them.

    Args:
      make_step: ``values -> step``; values is a tree of arrays, traced here: windows as tables, filters as masks
        (:func:`jaxunlearn.timesteps.table_weight`, :func:`jaxunlearn.frequency.from_mask`), the numbers of a combiner.
      draw_fn: as for :func:`sharded_step`.
      mesh: likewise.
      donate: likewise.

    Returns:
      ``(state, key, global batch, values) -> (state, metrics)``. Place the values with :func:`replicate`.
    """

    def of_device(state: TrainState, batch: Batch, draw: PyTree, values: PyTree) -> tuple[TrainState, Metrics]:
        return make_step(values)(state, batch, draw, axis_name=AXIS)

    specs = (P(), P(AXIS), P(AXIS), P())
    mapped = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)

    def global_step(state: TrainState, key: Array, batch: Batch, values: PyTree) -> tuple[TrainState, Metrics]:
        draw = draw_fn(jax.random.fold_in(key, state.step), batch)
        return mapped(state, batch, draw, values)

    return jax.jit(global_step, donate_argnums=(0,) if donate else ())


def pmap_step(step: TrainStep, draw_fn: DrawFn, devices: Sequence[jax.Device] | None = None) -> GlobalStep:
    """The same step under ``jax.pmap``, for programs that are built on it; state in and out are not stacked.

    ``sharded_step`` dispatches faster and gives the same numbers.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    mapped = jax.pmap(
        partial(step, axis_name=AXIS), axis_name=AXIS, in_axes=(None, 0, 0), out_axes=None, devices=devices
    )

    def split(x: Array) -> Array:
        if x.shape[0] % len(devices):
            raise ValueError(f"a batch of {x.shape[0]} does not divide over {len(devices)} devices")
        return jnp.reshape(x, (len(devices), x.shape[0] // len(devices), *x.shape[1:]))

    mesh = make_mesh(devices)

    # pmap takes only arrays that already lie where it wants them.
    @partial(jax.jit, out_shardings=by_example(mesh))
    def shards(key: Array, step: Array, batch: Batch) -> PyTree:
        draw = draw_fn(jax.random.fold_in(key, step), batch)
        return jax.tree.map(split, (batch, draw))

    def global_step(state: TrainState, key: Array, batch: Batch) -> tuple[TrainState, Metrics]:
        # A state from elsewhere and the state of the last step must look alike, or the second step compiles again.
        state = replicate(state, mesh)
        return mapped(state, *shards(key, state.step, batch))

    return global_step


class InFlight:
    """Keeps at most two steps in flight: waits for the output of the step before the last one.

    Without a bound a loop dispatches hundreds of steps ahead; emulated CPU devices then deadlock in their collectives, and
    every backend holds the memory of all of them.
    """

    def __init__(self, depth: int = 2):
        self._outputs: collections.deque[Any] = collections.deque()
        self._depth = depth

    def add(self, output: PyTree) -> list[PyTree]:
        """Remembers a step's output, and returns the outputs that are complete: none, or that of ``depth`` steps before."""
        self._outputs.append(output)
        return [self._complete()] if len(self._outputs) > self._depth else []

    def drain(self) -> list[PyTree]:
        """Waits for everything and returns it, oldest first."""
        return [self._complete() for _ in range(len(self._outputs))]

    def _complete(self) -> PyTree:
        return jax.block_until_ready(self._outputs.popleft())
