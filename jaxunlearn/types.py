"""The vocabulary of the library: what every part passes to every other.

Symbols: B batch size; H, W, C height, width, channels (channels last); T number of diffusion steps. Images are float32
in [-1, 1]. Timestep 0 is the cleanest, T - 1 the noisiest: ``x_t = alpha(t) x0 + sigma(t) eps``.

``keep`` is the training set without the images to be unlearned, ``forget`` is those images. Everything here is a name
for arrays or for a function of arrays; nothing holds state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

Array = jax.Array
PyTree = Any

Terms = dict[str, Array]
"""Term name -> [B]. Importance weights are applied; terms are never averaged and never signed."""

Aux = dict[str, Array]
"""Name -> [B]. Logged, never differentiated."""

Predict = Callable[[PyTree, Array, Array, PyTree], Array]
"""``(params, x_t [B,H,W,C], t [B], cond) -> eps_hat [B,H,W,C]``: any JAX model, see :mod:`jaxunlearn.predictors`."""

Error = Callable[[Array, Array], Array]
"""``(residual [B,H,W,C], t [B]) -> [B]``, see :mod:`jaxunlearn.errors`."""

TimeWeight = Callable[[Array], Array]
"""``t [B] -> weight [B]``, see :mod:`jaxunlearn.timesteps`."""


class Example(NamedTuple):
    """Clean images and what they are conditioned on.

    Attributes:
      x0: [B,H,W,C]; uint8 in 0..255 on the way to the device, float32 in [-1, 1] from there on.
      cond: what the model takes as its condition (class labels [B], text embeddings, ...) or None.
    """

    x0: Array
    cond: PyTree = None


class Batch(NamedTuple):
    """One step's images.

    Attributes:
      keep: drawn from the training set without the forget set.
      forget: drawn from the forget set; None for objectives without a forget term.
      extra: name -> array, for objectives that need more images (neighbours, a surrogate).
    """

    keep: Example
    forget: Example | None = None
    extra: Mapping[str, Array] = {}


class Draw(NamedTuple):
    """All randomness of a step, drawn before anything is computed, so that objectives are deterministic.

    Attributes:
      t: int32 [B], timesteps.
      t_weight: float32 [B]; 1, or the exact reweighting of an importance-sampled t. The training step multiplies every
        term by it, objectives do not.
      eps: float32 [B,H,W,C], standard normal noise; the same for the keep and the forget image of a row.
      u: float32 [B] in [0, 1); chooses the component of a mixture.
      extra: name -> array, for objectives that ask for more (EraseDiff's target noise).
    """

    t: Array
    t_weight: Array
    eps: Array
    u: Array
    extra: Mapping[str, Array] = {}


class TrainState(NamedTuple):
    """Arrays only, so that it can be checkpointed as it is.

    Attributes:
      step: int32 scalar, number of finished steps.
      params: trained parameters.
      opt_state: state of the optax transformation.
      combine_state: state of the combiner.
      ema_params: exponential moving average of ``params``, or None.
      ref_params: frozen original parameters for objectives and guards that compare with them, or None.
    """

    step: Array
    params: PyTree
    opt_state: PyTree
    combine_state: PyTree = ()
    ema_params: PyTree = None
    ref_params: PyTree = None


@runtime_checkable
class Filter(Protocol):
    """A linear map of images, diagonal in the Fourier domain; may depend on t. See :mod:`jaxunlearn.frequency`."""

    def __call__(self, x: Array, t: Array) -> Array:
        """``[B,H,W,C] -> [B,H,W,C]``."""
        ...

    def mask(self, height: int, width: int, t: Array) -> Array:
        """Transfer function on the rfft2 grid: [H, W//2+1], or [B, H, W//2+1] where it depends on t."""
        ...


class DrawFn(Protocol):
    """Draws the randomness of one global batch. See :mod:`jaxunlearn.timesteps`."""

    def __call__(self, key: Array, batch: Batch) -> Draw: ...


class Objective(Protocol):
    """``(predict, params, batch, draw, *, ref_params=None) -> (Terms, Aux)``, deterministic, one number per example.

    Attributes:
      terms: names of the terms it returns.
      forget_sign: -1 if the forget term is ascended, +1 if it is descended, 0 if there is none. The combiner carries
        the same attribute, and :func:`jaxunlearn.step.make_train_step` refuses a mismatch.
      draw_extra: name -> ``(key, shape) -> Array``, the further arrays that ``draw.extra`` must hold.
      needs_ref: whether ``ref_params`` must be given.
    """

    terms: tuple[str, ...]
    forget_sign: int
    draw_extra: Mapping[str, Callable[[Array, tuple[int, ...]], Array]]
    needs_ref: bool

    def __call__(
        self, predict: Predict, params: PyTree, batch: Batch, draw: Draw, *, ref_params: PyTree = None
    ) -> tuple[Terms, Aux]: ...


class Combine(NamedTuple):
    """How the gradients of the terms become one direction.

    Attributes:
      init: ``params -> combine_state``.
      apply: ``(grads, combine_state, step) -> (direction, combine_state, metrics)`` where ``grads`` maps term names to
        gradient trees that are already averaged over micro-batches and devices.
      forget_sign: as in :class:`Objective`.
    """

    init: Callable[[PyTree], PyTree]
    apply: Callable[[dict[str, PyTree], PyTree, Array], tuple[PyTree, PyTree, dict[str, Array]]]
    forget_sign: int
