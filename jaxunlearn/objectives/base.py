"""The container of an objective, and the checks that all of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from jaxunlearn.types import Array, Aux, Batch, Draw, Predict, PyTree, Terms


@dataclasses.dataclass(frozen=True, eq=False)
class PerExampleObjective:
    """An :class:`~jaxunlearn.types.Objective`: a deterministic function with the facts a training step must know.

    Attributes:
      function: ``(predict, params, batch, draw, ref_params) -> (Terms, Aux)``.
      terms: names of its terms.
      forget_sign: -1 the forget term is ascended, +1 descended, 0 there is none.
      draw_extra: what ``draw.extra`` must hold: name -> ``(key, shape) -> array``.
      needs_ref: whether ``ref_params`` must be given.
    """

    function: Callable[[Predict, PyTree, Batch, Draw, PyTree], tuple[Terms, Aux]]
    terms: tuple[str, ...]
    forget_sign: int
    draw_extra: Mapping[str, Callable[[Array, tuple[int, ...]], Array]] = dataclasses.field(default_factory=dict)
    needs_ref: bool = False

    def __call__(
        self, predict: Predict, params: PyTree, batch: Batch, draw: Draw, *, ref_params: PyTree = None
    ) -> tuple[Terms, Aux]:
        """The terms and the logged values, each [B].

        Raises:
          ValueError: the batch, the draw or ``ref_params`` lack what this objective needs.
        """
        if "forget" in self.terms:
            check_forget(batch)
        for name in self.draw_extra:
            if name not in draw.extra:
                raise ValueError(
                    f"this objective needs draw.extra[{name!r}]: build the draw function with extra=objective.draw_extra"
                )
        if self.needs_ref and ref_params is None:
            raise ValueError("this objective needs ref_params: pass TrainState(ref_params=...)")
        return self.function(predict, params, batch, draw, ref_params)


def check_forget(batch: Batch) -> None:
    """Raises ValueError unless the forget images are there and have the shape of the keep images."""
    if batch.forget is None:
        raise ValueError("this objective needs batch.forget: the images to be unlearned")
    if batch.forget.x0.shape != batch.keep.x0.shape:
        raise ValueError(
            f"keep and forget images must have the same shape, got {batch.keep.x0.shape} and {batch.forget.x0.shape}"
        )
