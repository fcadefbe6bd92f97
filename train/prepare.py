"""What an unlearning run needs to know before its first step: levels, masks, anchors, further images.

Everything is a function of the configuration, the images and the starting model. Masks and anchors travel in the training
state; a measured level is kept in the work directory. So a resumed run goes on with the same numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxunlearn import masks, objectives, timesteps
from jaxunlearn.images import to_model
from jaxunlearn.io import diffusers
from jaxunlearn.io.batches import batch_indices, stream_id
from jaxunlearn.io.manifest import write_json
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.objectives.anchor import Anchor, checkpoint_anchor, fisher_precision, squared_gradients
from jaxunlearn.types import Batch, Draw, Example, PyTree
from train import methods, selections
from train.distributed import from_first
from train.examples import Examples, extra_images
from train.log import say

LEVEL_IMAGES = 64
"""Forget images on which a level is measured, at most, each at ``LEVEL_STRATA`` timesteps."""
LEVEL_STRATA = 16
CAP_IMAGES = 8
"""Forget images on which a cap is compared with the starting model, at most."""
ANCHOR_ROWS = 16
"""Images of a batch on which a Fisher anchor is measured; they are taken one at a time."""
MEASURED = "measured.json"
"""The file in the work directory."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What is known before the first step.

    Attributes:
      level: mean forget error of the starting model, where the method needs it.
      mask: tree of booleans like the parameters, where a mask is configured.
      anchor: center and precision, for an anchor that needs them.
      extra: name -> positions in the split, see :func:`train.examples.extra_images`.
      cap: float64 [T], measured caps of ``clamped`` in the unit of its forget error; None: ``unlearn.cap``.
    """

    level: float | None = None
    mask: PyTree = None
    anchor: Anchor | None = None
    extra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    cap: np.ndarray | None = None


def anchor_kind(unlearn: ConfigDict) -> str | None:
    """``fisher`` or ``checkpoint_var`` where the state must hold an :class:`Anchor`, else None."""
    if "anchor" not in methods.method_of(unlearn).options:
        return None
    kind = methods.option(unlearn, "anchor")
    return None if kind == "l2" else kind


def _stand_in_mask(unlearn: ConfigDict, params: PyTree) -> PyTree:
    if unlearn.guards.mask == "none":
        return None
    return jax.tree.map(lambda p: np.broadcast_to(np.bool_(True), np.shape(p)), params)


def _stand_in_anchor(unlearn: ConfigDict, params: PyTree) -> Anchor | None:
    if anchor_kind(unlearn) is None:
        return None
    return Anchor(params, jax.tree.map(lambda p: np.broadcast_to(np.float32(1), np.shape(p)), params))


def stand_ins(config: ConfigDict, model: diffusers.DiffusersModel, examples: Examples) -> Start:
    """Arrays of the right shapes for a dry run: nothing is measured."""
    unlearn, split = config.unlearn, examples.split
    level = 1.0 if methods.needs_level(unlearn) else None
    wanted = methods.make_objective(unlearn, model.schedule, level).batch_extra
    shapes = {"neighbours": (len(split.forget), unlearn.neighbours.k), "surrogate": (len(split.forget),)}
    return Start(
        level,
        _stand_in_mask(unlearn, model.params),
        _stand_in_anchor(unlearn, model.params),
        {name: np.full(shapes[name], split.keep[0]) for name in wanted if name in shapes},
    )


def start(
    config: ConfigDict,
    workdir: Workdir,
    model: diffusers.DiffusersModel,
    examples: Examples,
    *,
    resumes: bool,
    poll: Callable[[], None],
) -> Start:
    """Measures what the method and the guards need.

    Args:
      config: the configuration.
      workdir: where a level is kept.
      model: the starting model.
      examples: the images as it takes them.
      resumes: whether a checkpoint holds masks and anchors, so that stand-ins serve.
      poll: called now and then; what it raises ends the measuring.

    Raises:
      ValueError: what cannot be measured or found, with its remedy.
    """
    unlearn = config.unlearn
    if not resumes and unlearn.cap is not None:
        _check_cap(config, model, examples)
    level = _level(config, workdir, model, examples) if methods.needs_level(unlearn) else None
    wanted = methods.make_objective(unlearn, model.schedule, level).batch_extra
    extra = extra_images(unlearn, examples, wanted, config.seed)
    if resumes:
        return Start(level, _stand_in_mask(unlearn, model.params), _stand_in_anchor(unlearn, model.params), extra)
    mask = None if unlearn.guards.mask == "none" else _mask(config, model, examples, poll)
    return Start(level, mask, _anchor(config, model, examples, poll), extra)


def _images(config: ConfigDict, examples: Examples, part: str, stream: str, step: int, count: int) -> Example:
    """``count`` images of keep or forget as the model sees them, the same in every process."""
    population = getattr(examples.split, part)
    images = population[batch_indices(config.seed, stream, step, len(population), count)]
    taken = examples.take(images, seed=config.seed, stream=stream, step=step, whole=True)
    return taken._replace(x0=to_model(taken.x0))


def _key(config: ConfigDict, stream: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), stream_id(stream))


def _noised(
    config: ConfigDict,
    model: diffusers.DiffusersModel,
    examples: Examples,
    part: str,
    stream: str,
    count: int,
    size: int,
    poll: Callable[[], None],
):
    """``count`` batches of (images, draw) of keep or forget."""
    unlearn, key = config.unlearn, _key(config, stream)
    num_steps = model.schedule.num_steps
    draw_fn = timesteps.uniform(num_steps, t_min=unlearn.t_min, t_max=unlearn.t_max or num_steps)
    for i in range(count):
        poll()
        example = _images(config, examples, part, stream, i, size)
        draw: Draw = draw_fn(jax.random.fold_in(key, i), Batch(example))
        yield example, draw


def _level(config: ConfigDict, workdir: Workdir, model: diffusers.DiffusersModel, examples: Examples) -> float:
    """E[m] of the forget images over the drawn t: from the work directory, or measured and written there."""
    path = workdir.root / MEASURED
    if path.exists():
        return float(from_first(np.float32(json.loads(path.read_text())["level"])))
    count = min(LEVEL_IMAGES, len(examples.split.forget))
    errors, share = _start_errors(config, model, examples, count)
    level = float(from_first(np.float32(share * np.mean(errors))))
    if not (np.isfinite(level) and level > 0):
        raise ValueError(
            f"the forget error of the starting model is {level}; check the model and select, or give level"
        )
    say(f"unlearn: level {level:.6g}, the mean forget error of the starting model on {count} forget images")
    if jax.process_index() == 0:
        write_json(path, {"level": level})
    return level


def _start_errors(
    config: ConfigDict, model: diffusers.DiffusersModel, examples: Examples, count: int
) -> tuple[np.ndarray, float]:
    """The starting model's errors on ``count`` forget images: float64 [count, strata], and the share of t they stand for."""
    unlearn, schedule = config.unlearn, model.schedule
    error = selections.forget_error(unlearn, schedule, methods.error_of(unlearn))
    # Outside of a window the error is zero; there no probe is spent.
    t1, t2, share = selections.probed_range(unlearn, schedule)
    errors = jax.jit(
        lambda params, example, key: objectives.probe_levels(
            model.predict,
            params,
            example,
            schedule,
            key,
            error=error,
            count=min(LEVEL_STRATA, t2 - t1),
            noises=1,
            t_min=t1,
            t_max=t2,
        )
    )(model.params, _images(config, examples, "forget", "level", 0, count), _key(config, "level"))
    return np.asarray(errors, np.float64), share


def _check_cap(config: ConfigDict, model: diffusers.DiffusersModel, examples: Examples) -> None:
    """Refuses a cap that the starting model exceeds on most probes, where nothing would be ascended.

    Raises:
      ValueError: it does.
    """
    cap, count = config.unlearn.cap, min(CAP_IMAGES, len(examples.split.forget))
    median = float(from_first(np.float32(np.median(_start_errors(config, model, examples, count)[0]))))
    if median >= cap:
        raise ValueError(
            f"config.unlearn.cap: nothing to forget: loss {median:.3g} is already above the cap {cap:g} (the median forget "
            f"error of the starting model on {count} forget images); give that of a retrained model, or a higher one"
        )


def _mask(config: ConfigDict, model: diffusers.DiffusersModel, examples: Examples, poll: Callable[[], None]) -> PyTree:
    """The configured mask; the error is that of the forget term, with its selections."""
    unlearn, chosen = config.unlearn, config.unlearn.guards
    error = selections.forget_error(unlearn, model.schedule, methods.error_of(unlearn))

    def batches(part):
        return _noised(config, model, examples, part, f"mask/{part}", chosen.batches, chosen.batch_size, poll)

    model_args = model.predict, model.schedule, model.params
    if chosen.mask == "saliency":
        mask = masks.saliency_mask(*model_args, batches("forget"), fraction=chosen.fraction, error=error)
    else:
        both = batches("forget"), batches("keep")
        mask = masks.fisher_ratio_mask(*model_args, *both, threshold=chosen.threshold, error=error)
    mask = from_first(jax.tree.map(np.asarray, mask))
    total = sum(x.size for x in jax.tree.leaves(mask))
    moving = sum(int(np.count_nonzero(x)) for x in jax.tree.leaves(mask))
    if not moving:
        raise ValueError(f"mask {chosen.mask!r} lets no weight move; lower unlearn.guards.threshold")
    say(f"unlearn: mask {chosen.mask!r}, {moving:,} of {total:,} weights move")
    return mask


def _anchor(
    config: ConfigDict, model: diffusers.DiffusersModel, examples: Examples, poll: Callable[[], None]
) -> Anchor | None:
    kind, unlearn = anchor_kind(config.unlearn), config.unlearn
    if kind == "checkpoint_var":
        others = [other_parameters(config, path, model, "unlearn.checkpoints") for path in unlearn.checkpoints]
        return checkpoint_anchor(others)
    if kind == "fisher":
        squares = jax.jit(
            lambda params, example, draw: squared_gradients(model.predict, params, example, draw, model.schedule)
        )
        batches = _noised(config, model, examples, "keep", "anchor", unlearn.anchor_batches, ANCHOR_ROWS, poll)
        # Kept as one sum: all parts at once would take the memory of as many models.
        total = None
        for example, draw in batches:
            part = jax.tree.map(np.asarray, squares(model.params, example, draw))
            total = part if total is None else jax.tree.map(np.add, total, part)
        say(f"unlearn: Fisher anchor on {unlearn.anchor_batches * ANCHOR_ROWS} keep images")
        return Anchor(model.params, from_first(jax.tree.map(np.asarray, fisher_precision([total]))))
    return None


def other_parameters(config: ConfigDict, path: str, model: diffusers.DiffusersModel, key: str) -> PyTree:
    """The parameters of another model of the same form.

    Args:
      config: the configuration.
      path: a diffusers folder.
      model: the starting model.
      key: of the configuration that says where the folder comes from, for the message.

    Raises:
      ValueError: the folder cannot be loaded, or its parameters would mean something else in the starting model.
    """
    other = diffusers.load(path, config.base.variant, default_scheduler=model.scheduler_json, companions=False)
    check_form(other, model, f"config.{key}: the model in {path}")
    return other.params


def check_form(other: diffusers.DiffusersModel, model: diffusers.DiffusersModel, name: str) -> None:
    """Refuses a model whose parameters would mean something else in the starting model.

    Args:
      other: the model.
      model: the starting model.
      name: of the other one, for the message.

    Raises:
      ValueError: parameters of other shapes, another kind of prediction, or another noise schedule.
    """
    shapes = [jax.tree.map(np.shape, m.params) for m in (model, other)]
    tables = [m.schedule.alphas_cumprod for m in (model, other)]
    if shapes[0] != shapes[1]:
        differs = "has other parameters than the starting model"
    elif model.prediction_type != other.prediction_type:
        differs = f"predicts {other.prediction_type!r}, the starting model {model.prediction_type!r}"
    elif not np.array_equal(*tables):
        differs = "has another noise schedule than the starting model"
    else:
        return
    raise ValueError(f"{name} {differs}; one of the same form is needed")
