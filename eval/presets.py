"""Presets: how thorough an evaluation is. Each is an explicit dict of dotted settings below ``eval``.

Keys that a preset does not name keep the value of the run. Settings of the command line win over a preset.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "num_samples": 256,
        "injection_t": (100, 250),
        "injection_copies": 4,
        "injection_images": 8,
        "loss_noises": 4,
        "loss_images": 200,
        "gap.draws": 64,
        "quality.classifier": True,
        "membership.scores": ("sima",),
    },
    "standard": {
        "num_samples": 4000,
        "injection_t": (50, 100, 250, 500, 750),
        "injection_copies": 16,
        "injection_images": 10_000,
        "loss_noises": 16,
        "loss_images": 500,
        "nll.draws": 5,
        "nll.held_out": 4,
        "nll.probes": 4,
        "inversion.copies": 4,
        "gap.draws": 512,
        "relearn.keys": 3,
        "quality.classifier": True,
        "membership.scores": ("loss_t", "secmi", "pia", "pian", "sima", "clid"),
        "membership.noise_norm_images": 4,
        "extraction.detectors": ("carlini", "ratio", "patch", "ssim"),
        "quality.inception": True,
        "quality.rows": 5000,
        "sscd.enabled": True,
        "photographs.enabled": True,
    },
    "audit": {
        "num_samples": 50_000,
        "injection_t": (50, 100, 250, 500, 750),
        "injection_copies": 64,
        "injection_images": 10_000,
        "loss_noises": 64,
        "loss_images": 100_000,
        "nll.draws": 5,
        "nll.images": 64,
        "nll.held_out": 64,
        "nll.exact": True,
        "nll.tolerance": 1e-5,
        "inversion.copies": 16,
        "gap.draws": 4096,
        "relearn.keys": 5,
        "relearn.benign_steps": 500,
        "quality.classifier": True,
        "membership.scores": ("loss_t", "secmi", "pia", "pian", "sima", "clid", "quantile", "ulira"),
        "membership.noise_norm_images": 4,
        "extraction.detectors": ("carlini", "ratio", "patch", "ssim"),
        "quality.inception": True,
        "quality.rows": 10_000,
        "sscd.enabled": True,
        "photographs.enabled": True,
    },
}
"""Name -> dotted key -> value. smoke: minutes on a CPU; standard: what a report should hold; audit: nearly everything."""
