"""Unlearning objectives, one file per paper: pure functions of arrays that return one number per example and term."""

from jaxunlearn.objectives.base import PerExampleObjective
from jaxunlearn.objectives.denoise import denoise, naive, neggrad, siss_no_is
from jaxunlearn.objectives.erasediff import erasediff
from jaxunlearn.objectives.siss import (
    bernoulli,
    importance_weights,
    log_ratio,
    mixture_sample,
    mixture_weights,
    siss,
)

__all__ = [
    "PerExampleObjective",
    "bernoulli",
    "denoise",
    "erasediff",
    "importance_weights",
    "log_ratio",
    "mixture_sample",
    "mixture_weights",
    "naive",
    "neggrad",
    "siss",
    "siss_no_is",
]
