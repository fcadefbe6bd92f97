"""What a run writes while it trains: metrics.jsonl, TensorBoard events, status lines, a progress bar."""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections.abc import Mapping

FIGURES = {"eval/keep_ratio": "keep ratio", "eval/forget_level": "forget level", "eval/copies": "copies"}
"""Figures of a probe that the status lines show."""


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


def truncate_metrics(path: pathlib.Path, stage: str, step: int) -> None:
    """Drops the lines of ``stage`` after ``step``, and a last line torn by a kill: the resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("stage") != stage or record["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


class TrainingLog:
    """The log of one stage.

    Args:
      metrics_path: metrics.jsonl; lines are appended.
      tensorboard: folder of event files, or None.
      stage: name of the stage, the prefix of TensorBoard tags.
      start_step: the step from which the stage goes on.
      num_steps: its last step.
      every: steps between lines.
      writes: whether this process writes at all; one of several does.
    """

    def __init__(
        self,
        metrics_path: pathlib.Path,
        tensorboard: pathlib.Path | None,
        *,
        stage: str,
        start_step: int,
        num_steps: int,
        every: int,
        writes: bool = True,
    ):
        self._file = None
        if writes:
            # A stage that begins anew writes its step 0 again, too.
            truncate_metrics(metrics_path, stage, start_step or -1)
            self._file = metrics_path.open("a")
        self._stage, self._num_steps, self._every = stage, num_steps, every
        self._start_time = time.monotonic()
        self._timed_from: tuple[int, float] | None = None  # the first finished step; before it lies the compilation
        self._last_line = 0.0
        self._writer = None
        if writes and tensorboard is not None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard / stage), purge_step=start_step and start_step + 1)
        self._bar = None
        if writes and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=start_step, desc=stage, unit="step", dynamic_ncols=True)

    def due(self, step: int) -> bool:
        """Whether a finished step is written to metrics.jsonl. To be asked once for every step, in order."""
        self._timed_from = self._timed_from or (step, time.monotonic())
        return step % self._every == 0 or step == self._num_steps or step == 1

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a finished step, or the figures of the start as step 0."""
        if self._file is None:
            return
        now = time.monotonic()
        first, since = self._timed_from or (step, now)
        rate = (step - first) / (now - since) if step > first else None
        record = {"stage": self._stage, "step": step, "wall_seconds": round(now - self._start_time, 3)}
        if rate is not None:
            metrics = {**metrics, "time/steps_per_second": rate}
        record |= dict(metrics)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        parts = {k.removeprefix("loss/"): v for k, v in metrics.items() if k.startswith("loss/")}
        parts |= {name: metrics[key] for key, name in FIGURES.items() if key in metrics}
        losses = "  ".join(f"{name} {value:.4g}" for name, value in parts.items())
        if not step:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(losses)
        elif now - self._last_line > 5 or step == self._num_steps:
            self._last_line = now
            speed = (
                f"{rate:.1f} steps/s  {_duration((self._num_steps - step) / rate)} left" if rate else "first step done"
            )
            say(f"{self._stage} {step}/{self._num_steps}  {losses}  {speed}")

    def close(self) -> None:
        """Flushes everything."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
