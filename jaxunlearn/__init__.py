"""jaxunlearn: data unlearning in diffusion models, as pure functions in JAX.

The names below are all a training loop needs; models, files and metrics are in ``jaxunlearn.models``, ``jaxunlearn.io`` and
``jaxunlearn.metrics``, which bring their own dependencies.
"""

from jaxunlearn import (
    combine,
    errors,
    frequency,
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
from jaxunlearn.combine import fixed_norm, relative_norm, weighted_sum
from jaxunlearn.errors import filtered, mean_squares, sum_squares, weighted
from jaxunlearn.frequency import band, high_pass, low_pass
from jaxunlearn.methods import METHODS
from jaxunlearn.objectives import bernoulli, denoise, erasediff, naive, neggrad, siss, siss_no_is
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
    "combine",
    "denoise",
    "erasediff",
    "erasediff_combine",
    "errors",
    "filtered",
    "fixed_norm",
    "frequency",
    "high_pass",
    "images",
    "init_state",
    "low_pass",
    "make_train_step",
    "mean_squares",
    "methods",
    "naive",
    "neggrad",
    "objectives",
    "parallel",
    "predictors",
    "relative_norm",
    "sampling",
    "schedule",
    "score_matching",
    "siss",
    "siss_no_is",
    "step",
    "sum_squares",
    "timesteps",
    "types",
    "weighted",
    "weighted_sum",
    "window",
]
