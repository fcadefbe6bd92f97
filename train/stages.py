"""The stages of a run, in order: base -> unlearn -> (retrain) -> evaluate and report -> export.

Where the stop rule is measured against retrained models, they are trained before the unlearning.

A stage is done when its result is in the work directory; results appear by renaming, so never half.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxunlearn import combine, guards, objectives, timesteps
from jaxunlearn.errors import mean_squares
from jaxunlearn.io import diffusers
from jaxunlearn.io.checkpoint import Checkpoints
from jaxunlearn.io.forget import Split
from jaxunlearn.io.json_files import read_object
from jaxunlearn.io.manifest import write_json
from jaxunlearn.io.workdir import Workdir, retrained_names
from jaxunlearn.models.parameters import init_params
from jaxunlearn.models.unet2d_config import UNet2DConfig
from jaxunlearn.parallel import sharded_step
from jaxunlearn.step import init_state, make_train_step
from jaxunlearn.types import PyTree
from train import auto_select, build, methods, prepare, selections, step_schedules
from train.distributed import barrier
from train.examples import Examples, encoded_examples, training_rows, unlearning_rows
from train.grids import GridSampler, save_grid
from train.log import TrainingLog, say
from train.loop import Collapsed, Preempted, StageRun, Termination, TrainingFailed, model_params, to_host, train
from train.watch import Watch, make_watch

MODEL_OF_STAGE = {"base": "base", "unlearn": "unlearned", "retrain": "retrained"}
"""The model that a stage makes; further retrained ones are named by :func:`jaxunlearn.io.workdir.retrained_names`."""
BEST, RESTORED = "best", "restored"
"""Models beside those of the stages: the best step where another one was returned, and the last sound one of a collapse."""
MODEL_SECTIONS = ("seed", "data", "model", "scheduler", "base", "latents", "compute")
"""The sections of a configuration that every stage of training depends on."""


def stage_key(seed: int, stage: str) -> jax.Array:
    """The key of a stage: no two stages share noise."""
    return jax.random.fold_in(jax.random.key(seed), list(MODEL_OF_STAGE).index(stage))


def fingerprint(config: ConfigDict, *sections: str) -> str:
    """A hash of what a stage's result depends on."""
    content = {
        name: config[name].to_dict() if isinstance(config[name], ConfigDict) else config[name] for name in sections
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def training_run(
    config: ConfigDict,
    model: diffusers.DiffusersModel,
    examples: Examples,
    mesh: Mesh,
    *,
    stage: str,
    population: np.ndarray,
    name: str | None = None,
    seed: int | None = None,
) -> StageRun:
    """Ordinary training of a model on some of the images: stages ``base`` and ``retrain``.

    Args:
      config: the configuration.
      model: what is trained.
      examples: the images as it takes them.
      mesh: the devices.
      stage: ``base`` or ``retrain``.
      population: positions of the images.
      name: in the log; the stage if None.
      seed: of order and noise; that of the configuration if None.
    """
    base, seed = config.base, config.seed if seed is None else seed
    objective = objectives.denoise(model.schedule, error=mean_squares)
    tx = build.make_tx(base.optimizer, base.num_steps)
    combiner = combine.weighted_sum(keep=1.0)
    decay = build.ema_decay(base.ema_max_decay) if base.ema else None
    step = make_train_step(objective, combiner, model.predict, tx, ema_decay=decay)
    return StageRun(
        name=name or stage,
        step=sharded_step(step, timesteps.uniform(model.schedule.num_steps), mesh),
        state=init_state(model.params, tx, combiner, ema=base.ema),
        rows=training_rows(examples, population, seed=seed, stage=stage, batch_size=base.batch_size),
        key=stage_key(seed, stage),
        num_steps=base.num_steps,
        checkpoint_every=config.checkpoint.every,
        sample_every=config.log.sample_every,
        meta={"configuration": fingerprint(config, *MODEL_SECTIONS)},
    )


def unlearning_run(
    config: ConfigDict, model: diffusers.DiffusersModel, examples: Examples, mesh: Mesh, *, start: prepare.Start
) -> StageRun:
    """The unlearning of a model: stage ``unlearn``. ``start`` is what was measured before it."""
    unlearn, schedule = config.unlearn, model.schedule
    objective = methods.make_objective(unlearn, schedule, start.level, start.cap)
    combiner = methods.make_combine(unlearn, objective)
    lam = step_schedules.values(unlearn.lam, unlearn.num_steps) if "lam" in objective.batch_extra else None
    # One copy of the starting parameters serves the objective and the guards, unless an anchor takes its place.
    center = guards.REF_PARAMS if start.anchor is None else None
    tx = build.make_guarded_tx(unlearn, mask=start.mask, center=center)
    step = make_train_step(objective, combiner, model.predict, tx, micro_batches=unlearn.micro_batches)
    ref = start.anchor is None and (objective.needs_ref or build.has_guards(unlearn))
    state = init_state(model.params, tx, combiner, ref=ref)
    if start.anchor is not None:
        state = state._replace(ref_params=jax.tree.map(lambda x: jnp.array(x, copy=True), start.anchor))
    return StageRun(
        name="unlearn",
        step=sharded_step(step, selections.make_draw(unlearn, objective, schedule), mesh),
        state=state,
        rows=unlearning_rows(examples, seed=config.seed, batch_size=unlearn.batch_size, extra=start.extra, lam=lam),
        key=stage_key(config.seed, "unlearn"),
        num_steps=unlearn.num_steps,
        checkpoint_every=config.checkpoint.every,
        sample_every=config.log.sample_every,
        meta={"configuration": fingerprint(config, *MODEL_SECTIONS, "unlearn")},
    )


def new_model(config: ConfigDict, seed: int | None = None) -> diffusers.DiffusersModel:
    """The untrained model of the configuration, with the weights of a seed: that of the configuration if None."""
    architecture = UNet2DConfig.from_dict(config.model.to_dict())
    params = init_params(architecture, config.seed if seed is None else seed)
    model = diffusers.new(architecture, params, build.scheduler_json(config))
    return computing(config, model)


def user_model(config: ConfigDict) -> diffusers.DiffusersModel | None:
    """The model in the user's folder, or None where the base model is trained here.

    Raises:
      ValueError: the folder cannot be loaded; one line per problem.
    """
    if config.base.path is None:
        return None
    model = diffusers.load(config.base.path, config.base.variant, default_scheduler=build.scheduler_json(config))
    return computing(config, model)


def computing(config: ConfigDict, model: diffusers.DiffusersModel) -> diffusers.DiffusersModel:
    """The model with the precision and the memory of ``config.compute``."""
    return model.with_compute(config.compute.dtype, config.compute.remat)


def untrained_model(config: ConfigDict, source: diffusers.DiffusersModel | None, seed: int) -> diffusers.DiffusersModel:
    """What retraining starts from: the model of the configuration, or the user's own with a newly drawn UNet."""
    if source is None:
        return new_model(config, seed)
    say("retrain: the user's model with a newly initialised UNet, trained with config.base on keep alone")
    return source.with_params(init_params(source.config, seed))


class Runner:
    """Runs the stages of one work directory, in order, skipping what is done.

    Args:
      config: the configuration, checked.
      workdir: where results are.
      split: the images.
      mesh: the devices.
      stop: whether a termination signal came.
      source: the user's model (:func:`user_model`), or None to train one.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Workdir,
        split: Split,
        mesh: Mesh,
        stop: Termination,
        source: diffusers.DiffusersModel | None,
    ):
        self.config, self.workdir, self.split, self.mesh, self.stop = config, workdir, split, mesh, stop
        self._source = source

    def stages(self) -> dict[str, Callable[[], None]]:
        """Name -> stage, in the order of this configuration."""
        middle = {"unlearn": self.unlearn, "retrain": self.retrain}
        stop = self.config.unlearn.stop
        if stop.source == "retrained" and stop.path is None:
            middle = dict(reversed(middle.items()))
        return {"base": self.base, **middle, "eval": self.evaluate, "export": self.export}

    @property
    def _writes(self) -> bool:
        return jax.process_index() == 0

    def base(self) -> None:
        """Trains the base model on keep and forget together, unless the user brought one."""
        if self._source is None:
            make_run = partial(training_run, stage="base", population=self.split.train)
            self._train("base", lambda: new_model(self.config), make_run)

    def unlearn(self) -> None:
        """Unlearns the forget set."""
        self._train("unlearn", self.source_model, self._unlearning_run)

    def retrain(self) -> None:
        """Trains the base recipe without the forget set, once for each seed: the yardstick."""
        if not self.config.retrain.enabled:
            return
        for i, model in enumerate(retrained_names(self.config.retrain.count)):
            seed, name = self.config.seed + i, model.replace("retrained", "retrain")
            make_run = partial(training_run, stage="retrain", population=self.split.keep, name=name, seed=seed)
            self._train(name, partial(untrained_model, self.config, self._source, seed), make_run, model=model)

    def evaluate(self) -> None:
        """Evaluates and reports as ``python -m eval.main`` does: in a process of its own, so that a signal ends it at once.

        The chips of a TPU serve one process at a time; there it runs in this one, and a signal counts when it has ended.
        """
        # From here on process 0 works alone. Others that wait for it give up after minutes, and take it with them.
        jax.distributed.shutdown()
        if not self._writes:
            return
        if self._is_evaluated:
            say("evaluate: done before")
            return
        self.stop.listen()
        run = _run_here if jax.default_backend() == "tpu" else self._run_apart
        code = run("eval.main", f"--workdir={self.workdir.root}")
        if code and self.stop.came():
            raise Preempted("evaluate: stopped; the same command starts the evaluation again")
        if code:
            command = f"python -m eval.main --workdir={self.workdir.root}"
            raise TrainingFailed(f"evaluation ended with exit code {code}; run it alone: {command}")

    def _run_apart(self, *command: str) -> int:
        """``python -m command`` in a process of its own, which is ended by the signals that end this one."""
        process = subprocess.Popen([sys.executable, "-m", *command])
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if self.stop.came():
                    process.terminate()

    @property
    def _is_evaluated(self) -> bool:
        """Whether the report is there, and no model of it could not be measured."""
        if not self.workdir.report_html.exists():
            return False
        try:
            return not read_object(self.workdir.root, self.workdir.report.name)["evaluation"]["failed"]
        except (ValueError, KeyError, TypeError):  # no report, or not one of ours
            return False

    @property
    def is_finished(self) -> bool:
        """Whether the results of the last stages are there, whichever stages this start ran."""
        return self._is_evaluated and self.workdir.export.exists()

    def export(self) -> None:
        """Writes the unlearned model as a diffusers folder, with its model card and report."""
        if self.workdir.export.exists():
            say("export: done before")
            return
        if not self._writes:
            return
        from jaxunlearn.io.model_card import model_card

        report = json.loads(self.workdir.report.read_text()) if self.workdir.report.exists() else None
        config = json.loads(self.workdir.config.read_text())
        model = self.source_model()
        files = {"README.md": model_card(config, report, takes_text=model.takes_text)}
        if report is not None:
            files["unlearning_report.json"] = self.workdir.report.read_bytes()
        unlearned = diffusers.load(
            self.workdir.model("unlearned"),
            self.config.base.variant,
            default_scheduler=build.scheduler_json(self.config),
            companions=False,
        )
        for note in diffusers.save(self.workdir.export, model.with_params(unlearned.params), files):
            say(f"export: {note}")
        say(f"export: {self.workdir.export}")

    def source_model(self) -> diffusers.DiffusersModel:
        """The model that is unlearned: the user's, or the base model, which must be there."""
        return self._source or computing(self.config, diffusers.load(self.workdir.model("base")))

    def _unlearning_run(
        self, config: ConfigDict, model: diffusers.DiffusersModel, examples: Examples, mesh: Mesh
    ) -> StageRun:
        """Measures what the run needs, and builds it."""

        def poll() -> None:
            if self.stop.came():
                raise Preempted("unlearn: stopped before the first step; the same command starts that again")

        config = auto_select.resolve(config, self.workdir, model, examples, poll)
        folder = self.workdir.checkpoints("unlearn")
        resumes = folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())
        start = prepare.start(config, self.workdir, model, examples, resumes=resumes, poll=poll)
        run = unlearning_run(config, model, examples, mesh, start=start)
        run.watch = make_watch(config, self.workdir, model, examples, mesh, poll)
        return run

    def _encoded(self, stage: str, model: diffusers.DiffusersModel) -> Examples:
        """The images as the model takes them."""

        def poll() -> None:
            if self.stop.came():
                raise Preempted(f"{stage}: stopped while the images were encoded; the same command starts that again")

        return encoded_examples(self.config, self.workdir, self.split, model, stage, poll)

    def _train(
        self, stage: str, make_model: Callable, make_run: Callable[..., StageRun], *, model: str | None = None
    ) -> None:
        folder = self.workdir.model(model or MODEL_OF_STAGE[stage])
        if folder.exists():
            say(f"{stage}: done before")
            return
        model = make_model()
        examples = self._encoded(stage, model)
        run = make_run(self.config, model, examples, self.mesh)
        # Made when the first grid is due: an autoencoder need not lie on the device before that.
        make_sampler = functools.cache(partial(GridSampler, self.config, model, examples))
        grid = partial(self._sample_grid, stage, make_sampler)
        checkpoints = Checkpoints(self.workdir.checkpoints(stage), keep=self.config.checkpoint.keep)
        try:
            state = train(run, self.mesh, checkpoints, partial(self._log, run), grid, self.stop)
        except Collapsed as reason:
            raise self._restored(reason, run.watch, model) from None
        finally:
            checkpoints.close()
        params = to_host(model_params(state))
        grid(int(state.step), params)
        if self._writes:
            if run.watch is not None:
                self._keep_best(run.watch, model)
            for note in diffusers.save(folder, model.with_params(params)):
                say(f"{stage}: {note}")
        barrier(f"{stage} saved")

    def _keep_best(self, watch: Watch, model: diffusers.DiffusersModel) -> None:
        """Writes best.json and, where another step is returned, the model of the best one."""
        found = watch.summary()
        best, folder = found["step"], self.workdir.model(BEST)
        if best not in (None, 0, found["returned_step"]):
            _save_anew(folder, model.with_params(watch.params_of(best)))
            found["model"] = str(folder.relative_to(self.workdir.root))
            say(f"unlearn: the best step is {best}, not the returned {found['returned_step']}; it is in {folder}")
        write_json(self.workdir.best, found)
        say(f"unlearn: {found['reason']}")
        level = watch.measurements[-1].level
        if level is not None and level < 0.1:
            say("warning: unlearn: hardly anything was forgotten; more steps, a larger forget part or rate may help")

    def _restored(self, reason: Collapsed, watch: Watch, model: diffusers.DiffusersModel) -> TrainingFailed:
        """Saves the last sound parameters of a collapsed run; what to say about it."""
        folder = self.workdir.model(RESTORED)
        if self._writes:
            _save_anew(folder, model.with_params(reason.params))
            about = {"status": "collapsed", "reason": str(reason), "step": reason.step, "returned_step": None}
            write_json(
                self.workdir.best, {**watch.summary(), **about, "model": str(folder.relative_to(self.workdir.root))}
            )
        barrier("restored")
        return TrainingFailed(f"{reason}\nthe restored model is in {folder}; the destroyed one was not saved")

    def _log(self, run: StageRun, start_step: int) -> TrainingLog:
        log = self.config.log
        return TrainingLog(
            self.workdir.metrics,
            self.workdir.tensorboard if log.tensorboard else None,
            stage=run.name,
            start_step=start_step,
            num_steps=run.num_steps,
            every=log.every,
            writes=self._writes,
        )

    def _sample_grid(self, stage: str, make_sampler: Callable[[], GridSampler], step: int, params: PyTree) -> None:
        """A grid of samples; the noise is the same at every step and stage."""
        if self._writes:
            save_grid(self.workdir.samples / f"{stage}_{step:06d}.png", make_sampler()(to_host(params)))


def _run_here(*command: str) -> int:
    """``python -m command`` in this process."""
    before, sys.argv = sys.argv, list(command)
    try:
        runpy.run_module(command[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return 0


def _save_anew(folder: pathlib.Path, model: diffusers.DiffusersModel) -> None:
    """Saves a model that an earlier attempt at this run may have saved already."""
    if folder.exists():
        shutil.rmtree(folder)
    diffusers.save(folder, model)
