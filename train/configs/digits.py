"""Unlearns a memorised photograph from a model of handwritten digits. Needs no data, model, network or accelerator.

    python -m train.main

On 2 CPU cores, in about 150 seconds: the photograph is about 10 % of 2,000 samples before and none of them after, at 0.5 to
0.8 times the Frechet distance (`python scripts/digits_study.py --config.eval.num_samples=2000`, 2026-11-21).

Data: the 1,797 real 8x8 digits that scikit-learn ships, plus copies of one 8x8 grey photograph (china.jpg, also
scikit-learn's). The duplicates make the model reproduce the photograph, as the T-shirt in the SISS paper.
"""

from typing import Any

from ml_collections import ConfigDict

from train.configs.defaults import defaults, optimizer

PRESETS: dict[str, dict[str, Any]] = {
    "naive": {"select.window": (0, 0)},
    "neggrad": {"optimizer.learning_rate": 1e-6},
    "siss": {},
    "siss_no_is": {},
    "bernoulli": {},
    "erasediff": {"combine.eta": 1e-3},
    "retrack": {"combine.keep": 0.9, "combine.forget": 0.1},
    "surrogate": {"combine.forget": 0.01},
    "mirrored": {"combine.forget": -0.02},
    "clamped": {"combine.forget": -0.2, "cap": 0.27},  # the retrained model's loss of seed 0, mean over the window
    "npo": {"beta": 0.1, "combine.forget": 0.05},
    "simnpo": {"beta": 0.1, "combine.forget": 0.05},
    "dpo": {"beta": 20.0, "keep_term": True, "combine.keep": 100.0},
    "kto": {"beta": 20.0, "combine.keep": 20.0},
    "vdu_style": {"anchor": "l2", "combine.forget": -0.5, "combine.anchor": 0.5},
    "fisher_anchor": {"combine.forget": -0.02, "combine.anchor": 1.0},
}
"""Method -> what its preset changes below ``unlearn``; the rest (window, rate, steps, batch) is that of the default job.

Found by hand on the model of seed 0, in this many settings: siss, siss_no_is and bernoulli 1; retrack, surrogate, clamped,
fisher_anchor 2; mirrored, simnpo 3; npo, dpo, kto 4; neggrad, erasediff 5; vdu_style 9.
beta is the inverse of the loss at which a preference fades: the published ones (5000, 1000) fade at a change of 1e-3, far
below what forgetting takes here. No setting of neggrad and of vdu_style was found that forgets and keeps the quality: with
more strength the model first makes *more* copies. The setting of erasediff holds for seed 0 and not for seeds 1 and 2; seven
others (eta, rate, noise, window) on the three seeds left shadows of the photograph or poor samples.
`python scripts/methods_table.py` measures all of them.
"""


def get_config(variant: str = "") -> ConfigDict:
    """The full run with ``siss``; ``smoke``: a few steps, to see that everything works; a method: with its preset."""
    config = defaults()
    config.name = "digits"

    config.data.name = "digits"
    config.data.plant.image = "sample:china"
    config.data.plant.copies = 80
    config.data.forget.planted = True

    config.model = ConfigDict(
        dict(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(24, 48),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=16,
        )
    )

    config.base.num_steps = 1500
    config.base.batch_size = 64
    config.base.ema_max_decay = 0.995
    config.base.optimizer = optimizer(learning_rate=1e-3, lr_schedule="cosine", warmup_steps=100)

    config.unlearn.method = "siss"
    # The forget term acts where it is decided whether a sample becomes the photograph, not where it is only sharpened.
    # Without the window distorted shadows of it remain among the samples.
    config.unlearn.select.window = (250, 750)
    config.unlearn.num_steps = 200
    config.unlearn.batch_size = 64
    config.unlearn.optimizer = optimizer(learning_rate=1e-4)

    config.checkpoint.every = 500
    config.eval.include_images = True  # a public photograph
    config.eval.num_samples = 3000  # without a copy among them its share is below .1 % (95 %), as the report asks
    if variant == "smoke":
        config.name = "digits-smoke"
        config.base.num_steps = 20
        config.unlearn.num_steps = 10
        config.checkpoint.every = 5
        config.log.every = 5
        config.log.sample_count = 16
        config.log.sample_steps = 4
        config.eval.num_samples = 32
        config.eval.batch_size = 32
        config.eval.sampling_steps = 4
        config.eval.injection_copies = 2
        config.eval.injection_t = (50, 100)
        config.eval.loss_noises = 2
        config.eval.loss_images = 16
        config.eval.classifier.steps = 30
    elif variant in PRESETS:
        config.name = f"digits-{variant}"
        config.unlearn.method = variant
        config.unlearn.update_from_flattened_dict(PRESETS[variant])
    elif variant:
        raise ValueError(f"digits.py has no variant {variant!r}; it has: smoke, {', '.join(PRESETS)}")
    return config
