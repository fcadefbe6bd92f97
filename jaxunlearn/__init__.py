"""jaxunlearn: data unlearning in diffusion models, as pure functions in JAX.

The names below are all a training loop needs; models, files and metrics are in ``jaxunlearn.models``, ``jaxunlearn.io`` and
``jaxunlearn.metrics``, which bring their own dependencies.
"""

from jaxunlearn import (
    combine,
    errors,
    frequency,
    guidance,
    images,
    methods,
    objectives,
    parallel,
    predictors,
    sampling,
    schedule,
    score_matching,
    step,
    timesteps,
    types,
)
from jaxunlearn.combine import erasediff as erasediff_combine
from jaxunlearn.combine import fixed_norm, pcgrad, relative_norm, weighted_sum
from jaxunlearn.errors import filtered, mean_squares, sum_squares, weighted
from jaxunlearn.frequency import band, high_pass, low_pass
from jaxunlearn.methods import METHODS
from jaxunlearn.objectives import (
    bernoulli,
    clamped,
    denoise,
    dpo,
    erasediff,
    fisher_anchor,
    kto,
    mirrored,
    naive,
    neggrad,
    npo,
    retrack,
    simnpo,
    siss,
    siss_no_is,
    surrogate,
    vdu_style,
)
from jaxunlearn.schedule import Schedule
from jaxunlearn.step import init_state, make_train_step
from jaxunlearn.timesteps import window
from jaxunlearn.types import Batch, Draw, Example, TrainState

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Batch",
    "Draw",
    "Example",
    "Schedule",
    "TrainState",
    "band",
    "bernoulli",
    "clamped",
    "combine",
    "denoise",
    "dpo",
    "erasediff",
    "erasediff_combine",
    "errors",
    "filtered",
    "fisher_anchor",
    "fixed_norm",
    "frequency",
    "guidance",
    "high_pass",
    "images",
    "init_state",
    "kto",
    "low_pass",
    "make_train_step",
    "mean_squares",
    "methods",
    "mirrored",
    "naive",
    "neggrad",
    "npo",
    "objectives",
    "parallel",
    "pcgrad",
    "predictors",
    "relative_norm",
    "retrack",
    "sampling",
    "schedule",
    "score_matching",
    "simnpo",
    "siss",
    "siss_no_is",
    "step",
    "sum_squares",
    "surrogate",
    "timesteps",
    "types",
    "vdu_style",
    "weighted",
    "weighted_sum",
    "window",
]
