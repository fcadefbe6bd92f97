"""The container of an objective, and the checks that all of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from jaxunlearn.types import Array, Aux, Batch, Draw, Predict, PyTree, Terms


@dataclasses.dataclass(frozen=True, eq=False)
class PerExampleObjective:
    """An :class:`~jaxunlearn.types.Objective`: a deterministic function with the facts a training step must know.

    Attributes:
      function: ``(predict, params, batch, draw, ref_params) -> (Terms, Aux)``.
      terms: names of its terms.
      forget_sign: -1 the forget term is ascended, +1 descended, 0 there is none.
      draw_extra: what ``draw.extra`` must hold: name -> ``(key, shape) -> array`` of the shape of the images.
      needs_ref: whether ``ref_params`` must be given.
      batch_extra: what ``batch.extra`` must hold: name -> axes, such as ``"[B,K,H,W,C]"``.
      name: the method, for messages.
    """

    function: Callable[[Predict, PyTree, Batch, Draw, PyTree], tuple[Terms, Aux]]
    terms: tuple[str, ...]
    forget_sign: int
    draw_extra: Mapping[str, Callable[[Array, tuple[int, ...]], Array]] = dataclasses.field(default_factory=dict)
    needs_ref: bool = False
    batch_extra: Mapping[str, str] = dataclasses.field(default_factory=dict)
    name: str = "this objective"

    def __call__(
        self, predict: Predict, params: PyTree, batch: Batch, draw: Draw, *, ref_params: PyTree = None
    ) -> tuple[Terms, Aux]:
        """The terms and the logged values, each [B].

        Raises:
          ValueError: the batch, the draw or ``ref_params`` lack what this objective needs.
        """
        if "forget" in self.terms:
            check_forget(batch)
        check_extra(self.name, batch, self.batch_extra)
        check_draw_extra(self.name, batch, draw, self.draw_extra)
        if self.needs_ref and ref_params is None:
            raise ValueError(f"{self.name} needs ref_params: pass TrainState(ref_params=...)")
        return self.function(predict, params, batch, draw, ref_params)


def check_forget(batch: Batch) -> None:
    """Raises ValueError unless the forget images are there and are of the shape, type and condition tree of keep."""
    keep, forget = batch.keep, batch.forget
    if forget is None:
        raise ValueError("this objective needs batch.forget: the images to be unlearned")
    if forget.x0.shape != keep.x0.shape:
        raise ValueError(f"keep and forget images must have the same shape, got {keep.x0.shape} and {forget.x0.shape}")
    if forget.x0.dtype != keep.x0.dtype:
        raise ValueError(f"keep and forget images must have the same type, got {keep.x0.dtype} and {forget.x0.dtype}")
    if jax.tree.structure(forget.cond) != jax.tree.structure(keep.cond):
        raise ValueError("keep.cond and forget.cond must have the same structure: give both rows a condition, or none")


def check_extra(name: str, batch: Batch, wanted: Mapping[str, str]) -> None:
    """Raises ValueError unless ``batch.extra`` holds the wanted arrays; all that is wrong is in one message.

    Args:
      name: the method, for the message.
      batch: the batch; B, H, W, C are those of the keep images.
      wanted: name -> axes, such as ``"[B,K,H,W,C]"``; an axis of another letter may have any size but 0.
    """
    sizes = dict(zip("BHWC", batch.keep.x0.shape))
    lines = []
    for key, axes in wanted.items():
        letters = axes.strip("[]").split(",")
        value = batch.extra.get(key)
        shape = None if value is None else np.shape(value)
        fits = shape is not None and len(shape) == len(letters)
        if not fits or any(size != sizes.get(letter, size) or not size for letter, size in zip(letters, shape)):
            got = "nothing" if shape is None else str(list(shape)).replace(" ", "")
            lines.append(
                f"{name} needs batch.extra[{key!r}] {axes}, got {got} beside keep images {list(sizes.values())}"
            )
    if lines:
        raise ValueError("\n".join(lines))


def check_draw_extra(name: str, batch: Batch, draw: Draw, wanted: Iterable[str]) -> None:
    """Raises ValueError unless ``draw.extra`` holds the wanted arrays, each of the shape of the images; see check_extra."""
    shape = list((batch.keep if batch.forget is None else batch.forget).x0.shape)
    lines = []
    for key in wanted:
        got = list(np.shape(draw.extra[key])) if key in draw.extra else "nothing"
        if got != shape:
            lines.append(
                f"{name} needs draw.extra[{key!r}] of the shape {shape} of the images, got {got}: "
                "build the draw function with extra=objective.draw_extra"
            )
    if lines:
        raise ValueError("\n".join(lines))


def require_positive(who: str, **values: float | Array) -> None:
    """Raises ValueError unless every value is finite and above 0; values that are traced are not looked at."""
    lines = [
        f"{who}: {name} must be finite and positive, got {value}"
        for name, value in values.items()
        if not isinstance(value, jax.core.Tracer) and not (np.all(np.isfinite(value)) and np.all(np.asarray(value) > 0))
    ]
    if lines:
        raise ValueError("\n".join(lines))
