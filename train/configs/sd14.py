"""Unlearns memorised images from Stable Diffusion 1.4: the recipe of the SISS paper (arXiv 2503.01034) for latent models.

    python -m train.main --config=train/configs/sd14.py --workdir=runs/sd14 \
        --config.base.path=stable-diffusion-v1-4 --config.data.path=IMAGES \
        --config.data.forget.files=MEMORISED.txt --config.unlearn.prompt="PROMPT"

`base.path` is a diffusers folder (`hf download CompVis/stable-diffusion-v1-4 --local-dir stable-diffusion-v1-4`), or
`hf://CompVis/stable-diffusion-v1-4`, which is fetched. `IMAGES` holds what the model makes of one prompt (the authors took
128 pictures for each), `MEMORISED.txt` names those of them that are the memorised picture, one a line; the others are kept.
`PROMPT` conditions both: SISS mixes images under one text. The authors train under a prompt that they changed by hand,
because the original one gives the memorised picture nearly always and so leaves nothing to keep.

The settings are those of the published script: AdamW 1e-5 with betas (0.9, 0.999) and weight decay 1e-2, batch 16 as 16
micro-batches of 1, 35 steps, lam 0.5, the forget part's norm fixed to 750, latents drawn anew each time, no dropout of the
prompt. With t drawn from the whole range, as in the paper's text; their script draws t = 999 alone
(`--config.unlearn.t_min=999`). The full run was not run here: no hardware, time or result is claimed.

Memory by its parts: the UNet has 859,520,964 parameters, so 3.4 GB in float32. On each device stand the parameters, two
such trees of AdamW, the two gradients of SISS and, while micro-batches are added up, those of one micro-batch: 7 trees,
24 GB. The autoencoder (83,653,863 parameters, 0.3 GB) and the text encoder (123,060,480, 0.5 GB) lie on the device only
while they work. Activations come on top: `compute.remat` is on, and `--config.compute.dtype=bfloat16` halves what is left of
them. `--dry_run` compiles the step and prints what it needs. A cached 512x512 image takes 131 kB, a text 237 kB.

`sd14.py:smoke` takes 3 steps of 2 images; with any small pipeline it shows that everything works:

    python -m train.main --config=train/configs/sd14.py:smoke --config.base.path=TINY --config.data.size=16 \
        --config.data.path=IMAGES --config.data.forget.files=MEMORISED.txt --config.unlearn.prompt="PROMPT"
"""

from ml_collections import ConfigDict

from train.configs.defaults import defaults, optimizer, shorten


def get_config(variant: str = "") -> ConfigDict:
    """The published recipe, or ``smoke``; paths, the forget set and the prompt are given on the command line."""
    config = defaults()
    config.name = "sd14"

    config.data.name = "folder"
    config.data.size = 512
    config.data.channels = 3

    # For folders without a scheduler_config.json; theirs wins.
    config.scheduler = ConfigDict(
        dict(
            num_train_timesteps=1000,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="epsilon",
            clip_sample=False,
            variance_type="fixed_small",
        )
    )

    config.unlearn.method = "siss"
    config.unlearn.lam = 0.5
    config.unlearn.num_steps = 35
    config.unlearn.batch_size = 16
    config.unlearn.micro_batches = 16  # of 1; with several devices 16 / devices
    config.unlearn.t_min = 0  # the published script draws t = 999 alone: t_min=999
    config.unlearn.combine.name = "fixed_norm"
    config.unlearn.combine.c = 750.0
    config.unlearn.optimizer = optimizer(learning_rate=1e-5, b1=0.9, b2=0.999, weight_decay=1e-2)
    config.unlearn.watch.every = 5
    config.unlearn.watch.keep_images = 16  # 32 rows a probe: less than half of a step
    config.unlearn.watch.noises = 2

    config.latents.batch_size = 4
    config.compute.remat = True
    config.compute.dtype = "float32"  # or bfloat16: faster, and half the activations

    # Only for retraining, the yardstick: a UNet from scratch needs far more than this.
    config.base.batch_size = 16
    config.base.optimizer = optimizer(learning_rate=1e-4, b1=0.9, weight_decay=1e-2)

    config.checkpoint.every = 35
    config.log.every = 1
    config.log.sample_count = 8
    config.log.sample_steps = 50

    config.eval.num_samples = 64
    config.eval.sampler = "ddim"
    config.eval.sampling_steps = 50
    config.eval.guidance = 7.5
    config.eval.batch_size = 4
    config.eval.injection_copies = 2
    config.eval.loss_noises = 4
    config.eval.loss_images = 32
    if variant == "smoke":
        shorten(config)
        config.unlearn.num_steps = 3
        config.unlearn.batch_size = 2
        config.unlearn.micro_batches = 1
        config.base.num_steps = 2
        config.base.batch_size = 2
        config.checkpoint.every = 1
        config.log.sample_count = 2
        config.eval.num_samples = 4
        config.eval.batch_size = 2
        config.eval.loss_t = (100, 500)
        config.eval.loss_images = 2
    elif variant:
        raise ValueError(f"sd14.py has no variant {variant!r}; it has: smoke")
    return config
