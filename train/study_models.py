"""The models that a study starts from: base and retrained, one of each for a seed, trained once and kept in a folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxunlearn.io import diffusers
from jaxunlearn.io.forget import Split, open_split
from jaxunlearn.io.manifest import write_json
from train import build, prepare
from train.examples import Examples
from train.log import say
from train.loop import TrainingFailed, model_params, to_host
from train.stages import computing, fingerprint, training_run, untrained_model, user_model
from train.trials import run_steps

CHECKPOINTS = (0.7, 0.8, 0.9)
"""Shares of the base training after which a checkpoint is kept, beside the last state."""
TRAINED_WITH = "trained_with.json"
"""The file beside the models that says, in hashes, what they were trained with."""
SECTIONS = ("seed", "data", "model", "scheduler", "base", "compute")
"""The sections of a configuration that they depend on."""


@dataclasses.dataclass(frozen=True, eq=False)
class StudyModels:
    """The models of one seed.

    Attributes:
      config: the configuration with this seed.
      folder: where they are kept: ``base``, ``checkpoint_<step>``, ``retrained``, and :data:`TRAINED_WITH`. Models of a
        folder without that file are taken as they are.
      mesh: the devices.
      source: a folder of finished models, such as ``models`` of a work directory, that is looked into first; nothing is
        written there.
      split_seed: which images are held out; a user's model has one division of its data, whatever the study's seed is.

    A user's model (``config.base.path``) takes the place of ``base``; it has no checkpoints.
    """

    config: ConfigDict
    folder: pathlib.Path
    mesh: Mesh
    source: pathlib.Path | None = None
    split_seed: int = 0

    @functools.cached_property
    def split(self) -> Split:
        """The images of this seed."""
        return open_split(self.config.data.to_dict(), self.split_seed)

    @property
    def examples(self) -> Examples:
        """The images as a pixel model takes them."""
        return Examples(self.split)

    @functools.cached_property
    def base(self) -> diffusers.DiffusersModel:
        """The model before unlearning, trained on everything."""
        if self.config.base.path is not None:
            return user_model(self.config)
        return self._trained("base", "base")

    @functools.cached_property
    def retrained(self) -> diffusers.DiffusersModel:
        """The same recipe without the forget images."""
        model = self._trained("retrain", "retrained")
        folder = self._finished("retrained") or self.folder / "retrained"
        prepare.check_form(model, self.base, f"the model in {folder}")
        return model

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Folders of late models of the base training, the last one included; empty for models from elsewhere."""
        if self.config.base.path is not None or self._finished("base"):
            return ()
        _ = self.base
        return tuple(str(self.folder / name) for name in (*map("checkpoint_{}".format, self._checkpoint_steps), "base"))

    def _finished(self, name: str) -> pathlib.Path | None:
        found = self.source / name if self.source is not None else None
        return found if found is not None and found.exists() else None

    @property
    def _checkpoint_steps(self) -> tuple[int, ...]:
        total = self.config.base.num_steps
        return tuple(sorted({max(1, round(share * total)) for share in CHECKPOINTS} - {total}))

    def _trained(self, stage: str, name: str) -> diffusers.DiffusersModel:
        target = self._finished(name)
        if target is None:
            target = self.folder / name
            self._check_folder()
            if not target.exists():
                self._train(stage, target)
        # A retrained user's model is written as that model came.
        variant, scheduler = self.config.base.variant, build.scheduler_json(self.config)
        return computing(self.config, diffusers.load(target, variant, default_scheduler=scheduler))

    def _check_folder(self) -> None:
        """Refuses a folder of models with another past; a new folder is told what its models will be trained with."""
        path = self.folder / TRAINED_WITH
        now = {name: fingerprint(self.config, name) for name in SECTIONS} | {"split_seed": self.split_seed}
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            write_json(path, now)
        elif path.exists():
            kept = json.loads(path.read_text())
            others = [name for name, value in now.items() if kept.get(name) != value]
            if others:
                raise ValueError(
                    f"{self.folder}: its models were trained with another configuration ({', '.join(others)}); "
                    "choose another --out"
                )

    def _train(self, stage: str, target: pathlib.Path) -> None:
        say(f"seed {self.config.seed}: training {target.name}, {self.config.base.num_steps} steps")
        source = user_model(self.config) if stage == "retrain" else None
        model = untrained_model(self.config, source, self.config.seed)
        population = self.split.train if stage == "base" else self.split.keep
        run = training_run(self.config, model, self.examples, self.mesh, stage=stage, population=population)

        def on_step(step, state) -> None:
            late = self.folder / f"checkpoint_{step}"
            if stage == "base" and step in self._checkpoint_steps and not late.exists():
                diffusers.save(late, model.with_params(to_host(model_params(state))))

        trial = run_steps(run, self.mesh, on_step=on_step)
        if trial.broken_step is not None:
            raise TrainingFailed(f"{stage}: step {trial.broken_step} is not finite; lower base.optimizer.learning_rate")
        diffusers.save(target, model.with_params(trial.params))


def study_models(
    config: ConfigDict, seed: int, folder: pathlib.Path, mesh: Mesh | None = None, source: pathlib.Path | None = None
) -> StudyModels:
    """The models of a configuration with another seed, under ``folder/seed<seed>``.

    Args:
      config: of the study. With a user's model (``config.base.path``) its own seed decides which images are held out.
      seed: of this part of the study.
      folder: where models are kept.
      mesh: the devices; the first one if None.
      source: see :class:`StudyModels`.
    """
    from jaxunlearn.parallel import make_mesh

    split_seed = seed if config.base.path is None else config.seed
    seeded = config.copy_and_resolve_references()
    with seeded.unlocked():
        seeded.seed = seed
    return StudyModels(seeded, folder / f"seed{seed}", mesh or make_mesh(jax.devices()[:1]), source, split_seed)
