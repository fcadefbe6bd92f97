"""Unlearning objectives, one file per paper or family: pure functions of arrays, one number per example and term."""

from jaxunlearn.objectives.anchor import (
    Anchor,
    anchor_loss,
    anchored,
    checkpoint_anchor,
    fisher_precision,
    squared_gradients,
)
from jaxunlearn.objectives.base import PerExampleObjective
from jaxunlearn.objectives.bounded import clamped, mirrored
from jaxunlearn.objectives.denoise import denoise, naive, neggrad, siss_no_is
from jaxunlearn.objectives.erasediff import erasediff
from jaxunlearn.objectives.neighbours import Neighbours, nearest
from jaxunlearn.objectives.preference import dpo, dpo_loss, kto, kto_loss, npo, npo_loss, simnpo
from jaxunlearn.objectives.probes import level_table, probe_levels
from jaxunlearn.objectives.retrack import posterior_weights, redirect_target, retrack, surrogate
from jaxunlearn.objectives.siss import (
    bernoulli,
    importance_weights,
    log_ratio,
    mixture_sample,
    mixture_weights,
    siss,
)
from jaxunlearn.objectives.vdu import fisher_anchor, vdu_style

__all__ = [
    "Anchor",
    "Neighbours",
    "PerExampleObjective",
    "anchor_loss",
    "anchored",
    "bernoulli",
    "checkpoint_anchor",
    "clamped",
    "denoise",
    "dpo",
    "dpo_loss",
    "erasediff",
    "fisher_anchor",
    "fisher_precision",
    "importance_weights",
    "kto",
    "kto_loss",
    "level_table",
    "log_ratio",
    "mirrored",
    "mixture_sample",
    "mixture_weights",
    "naive",
    "nearest",
    "neggrad",
    "npo",
    "npo_loss",
    "posterior_weights",
    "probe_levels",
    "redirect_target",
    "retrack",
    "simnpo",
    "siss",
    "siss_no_is",
    "squared_gradients",
    "surrogate",
    "vdu_style",
]
