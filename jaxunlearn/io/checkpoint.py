"""Checkpoints of a training state: atomic, asynchronous, restorable on any number of devices (Orbax).

A saved state holds global arrays only. It is always restored onto the shardings of the running program, so that a run may
continue on another topology.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxunlearn.types import PyTree, TrainState

logger = logging.getLogger(__name__)

_KEPT = "kept"
"""The key of a checkpoint's JSON that names its further parameters."""


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      step: number of finished steps.
      state: the whole state, on the wanted shardings.
      meta: plain JSON.
      kept: name -> parameters of other steps, numpy.
    """

    step: int
    state: TrainState
    meta: dict[str, Any]
    kept: dict[str, PyTree]


class Checkpoints:
    """The checkpoints of one training stage, newest last.

    Args:
      directory: created if missing. Each step is a folder in it; unfinished ones are ignored and cleaned up.
      keep: how many to keep; at least 2, so that a damaged newest one has a predecessor.

    Raises:
      ValueError: ``keep`` below 1.
    """

    def __init__(self, directory: pathlib.Path | str, *, keep: int = 2):
        import orbax.checkpoint as ocp

        if keep < 1:
            raise ValueError(f"at least one checkpoint must be kept, got keep={keep}")
        self._ocp = ocp
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._manager = self._open()

    def _open(self):
        options = self._ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True)
        return self._ocp.CheckpointManager(self._directory, options=options)

    def steps(self) -> list[int]:
        """The finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: TrainState, meta: dict[str, Any], kept: Mapping[str, PyTree] | None = None
    ) -> None:
        """Saves in the background; the arrays are copied before this returns, so they may be donated at once.

        Args:
          step: number of finished steps.
          state: the whole state.
          meta: plain JSON, restored beside the state.
          kept: name -> numpy parameters of other steps, shaped as those of the state; they must not change any more.
        """
        if step in self.steps():
            return
        items = {"state": self._ocp.args.StandardSave(_as_dict(state))}
        if kept:
            items["kept"] = self._ocp.args.StandardSave(dict(kept))
        meta = self._ocp.args.JsonSave({**meta, _KEPT: sorted(kept or ())})
        self._manager.save(step, args=self._ocp.args.Composite(**items, meta=meta))

    def restore(self, like: TrainState) -> Restored | None:
        """The newest checkpoint that can be read, or None if there is none at all.

        One that cannot be read is named in a warning and moved to ``<directory>.damaged``; the one before it is taken.

        Args:
          like: a state of the wanted shapes, types and shardings.

        Raises:
          ValueError: checkpoints exist but none can be restored into ``like``.
        """
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _as_dict(like))
        failures: dict[int, str] = {}
        for step in reversed(self.steps()):
            args = self._ocp.args.Composite(
                state=self._ocp.args.StandardRestore(target), meta=self._ocp.args.JsonRestore()
            )
            try:
                restored = self._manager.restore(step, args=args)
                meta = dict(restored["meta"])
                kept = self._restore_kept(step, meta.pop(_KEPT, []), like.params)
            # Orbax reports damaged files by many exception types; whatever it is, an older checkpoint may still be good.
            except Exception as error:
                first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
                logger.warning("checkpoint %s cannot be restored (%s)", self._directory / str(step), first_line)
                failures[step] = first_line
                continue
            if failures:
                self._set_aside(list(failures))
            return Restored(step, TrainState(**restored["state"]), meta, kept)
        if failures:
            raise ValueError(
                f"no checkpoint in {self._directory} can be restored "
                f"({'; '.join(f'{step}: {why}' for step, why in failures.items())}); "
                "move the folder away to start this stage afresh"
            )
        return None

    def _restore_kept(self, step: int, names: list[str], params: PyTree) -> dict[str, PyTree]:
        if not names:
            return {}
        like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), params)
        args = self._ocp.args.Composite(kept=self._ocp.args.StandardRestore(dict.fromkeys(names, like)))
        return self._manager.restore(step, args=args)["kept"]

    def _set_aside(self, steps: list[int]) -> None:
        """Moves damaged checkpoints out of the way of the ones that will be written again; nothing is deleted."""
        aside = self._directory.with_name(self._directory.name + ".damaged")
        aside.mkdir(exist_ok=True)
        for step in steps:
            target = aside / str(step)
            while target.exists():
                target = target.with_name(target.name + "x")
            (self._directory / str(step)).rename(target)
        self._manager.close()
        self._manager = self._open()

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the manager."""
        self.wait()
        self._manager.close()


def _as_dict(state: TrainState) -> dict[str, PyTree]:
    """The fields by name, so that files do not depend on their order in the tuple."""
    return dict(state._asdict())
