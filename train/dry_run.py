"""``--dry_run``: resolves everything, compiles one step on abstract values, writes nothing."""

from __future__ import annotations

import time

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.forget import Split
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.parallel import by_example, replicated
from train import prepare
from train.auto_select import preview
from train.examples import abstract_examples
from train.stages import new_model, unlearning_run


def _megabytes(tree) -> float:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e6


def dry_run(
    config: ConfigDict, split: Split, mesh: Mesh, source: DiffusersModel | None, workdir: Workdir | None = None
) -> str:
    """Compiles the unlearning step, of the user's model or of the one that would be trained.

    Args:
      config: the configuration, checked.
      split: the images.
      mesh: the devices.
      source: the user's model, or None.
      workdir: where an automatic choice may stand already, or a trained base model to make it with.

    Returns:
      What the run would be: sizes, devices, batches, bytes.
    """
    model = source or new_model(config)
    examples = abstract_examples(config, split, model)
    config, selection = preview(config, workdir, model, examples, own_model=source is not None)
    run = unlearning_run(config, model, examples, mesh, start=prepare.stand_ins(config, model, examples))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), run.state)

    def whole_batch(x):
        shape = (config.unlearn.batch_size, *x.shape[1:])  # of all processes; rows() gives those of this one
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=by_example(mesh))

    rows = jax.tree.map(whole_batch, run.rows(0))
    started = time.monotonic()
    compiled = run.step.lower(state, run.key, rows).compile()
    seconds = time.monotonic() - started
    memory = compiled.memory_analysis()
    per_device = config.unlearn.batch_size // mesh.size
    trained = f"trained, {config.base.num_steps} steps of {config.base.batch_size}"
    lines = [
        f"model: {model.num_params:,} parameters ({_megabytes(run.state.params):.1f} MB), "
        f"training state {_megabytes(run.state):.1f} MB",
        f"devices: {mesh.size} ({mesh.devices.flat[0].device_kind})",
        f"base: {config.base.path or trained}",
        f"unlearn: {config.unlearn.method}, {config.unlearn.num_steps} steps, global batch {config.unlearn.batch_size}, "
        f"per device {per_device}, micro-batches {config.unlearn.micro_batches}",
        *selection,
        f"step compiled in {seconds:.1f} s"
        + (f", temporaries {memory.temp_size_in_bytes / 1e6:.0f} MB a device" if memory is not None else ""),
        "dry run: nothing was written",
    ]
    return "\n".join(lines)
