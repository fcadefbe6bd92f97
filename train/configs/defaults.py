"""Every key of a configuration, with its meaning and its default. A config file takes these and sets what differs.

Keys cannot be added on the command line, so a misspelt one is an error with a suggestion. Values that depend on the data
(`model`, `data`) have no useful default and are set by each config.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def optimizer(**changes) -> ConfigDict:
    """AdamW after clipping; the defaults are those of the SISS experiments on unconditional models."""
    values = dict(
        learning_rate=5e-5,
        lr_schedule="constant",  # "constant" or "cosine" (to 0 at the last step)
        warmup_steps=0,  # linear from 0
        b1=0.95,
        b2=0.999,
        eps=1e-8,
        weight_decay=1e-6,
        clip_norm=1.0,  # global norm of the combined direction
    )
    return ConfigDict({**values, **changes})


def defaults() -> ConfigDict:
    """The whole tree."""
    config = ConfigDict()
    config.name = "unnamed"  # the default work directory is runs/<name>
    config.seed = 0  # decides the held-out images, the order of the data, all noise, the initial weights
    config.num_devices = 0  # how many devices to use; 0 means all

    # The images. `keep` is the training set without the forget set.
    config.data = ConfigDict(
        dict(
            name="digits",  # digits, folder, idx, npz, tfds
            path=placeholder(str),  # file or folder, where the source needs one
            captions=placeholder(
                str
            ),  # folder only: a .jsonl file of file_name and text; None: metadata.jsonl in it, if any
            caption=placeholder(str),  # one text for all images that have none of their own
            labels_path=placeholder(str),  # idx only, if not beside the images
            split=placeholder(str),  # where the source holds several: tfds, idx
            size=placeholder(int),  # crop to a square and resize to this many pixels; None keeps the size
            channels=placeholder(int),  # 1 or 3; None keeps what is there
            limit=placeholder(int),  # use the first so many images; None means all
            held_out_fraction=0.1,  # never trained on, the yardstick of the evaluation
            near_duplicate_rms=0.02,  # rms pixel distance (images in [-1, 1]) below which two images count as near-duplicates
            near_duplicates="report",  # of forget images among the rest: "report", "forget" (unlearn them too), "error"
        )
    )
    # Adds copies of an image to the training set, so that the model memorises it: for experiments.
    config.data.plant = ConfigDict(
        dict(
            image=placeholder(str),  # a file, "sample:china" or "sample:flower"
            copies=0,
            caption=placeholder(str),  # their text; None: data.caption
        )
    )
    # What must go. Any of these; together they add up.
    config.data.forget = ConfigDict(
        dict(
            planted=False,  # the planted image
            indices=(),  # positions in the data set
            files=placeholder(str),  # a text file with one name a line
            folder=placeholder(str),  # a folder of images, found in the data set by their content
        )
    )

    # A diffusers UNet2DModel config and a DDPMScheduler config: used when the base model is trained here.
    config.model = ConfigDict()
    config.scheduler = ConfigDict(
        dict(
            num_train_timesteps=1000,
            beta_schedule="linear",
            beta_start=1e-4,
            beta_end=0.02,
            prediction_type="epsilon",
            clip_sample=True,
            variance_type="fixed_small",
        )
    )

    # Where the model comes from: a diffusers folder, or trained here on keep and forget together.
    config.base = ConfigDict(
        dict(
            path=placeholder(str),  # a diffusers folder; None: train
            variant=placeholder(str),  # weights file variant in that folder, such as "fp16"
            num_steps=1000,
            batch_size=128,
            ema=True,  # diffusers' moving average; its weights are the model
            ema_max_decay=0.9999,
        )
    )
    config.base.optimizer = optimizer(learning_rate=1e-4, lr_schedule="cosine", warmup_steps=100)

    # Models with an autoencoder: every image is encoded once, and found again by later runs with the same folder.
    config.latents = ConfigDict(
        dict(
            cache=placeholder(str),  # folder of the encoded images and texts; None: cache/ in the work directory
            batch_size=8,  # images (or texts) that the autoencoder (or text encoder) takes at a time
            sample=True,  # True: a new draw mean + std * noise each time an image is used; False: the mean
        )
    )

    # How the network computes in every stage of training; parameters, losses and the optimizer stay float32.
    config.compute = ConfigDict(
        dict(
            dtype="float32",  # or bfloat16
            remat=False,  # compute activations again in the backward pass: less memory, about a third more time
        )
    )

    # How it is unlearned.
    config.unlearn = ConfigDict(
        dict(
            method="siss",  # see the method table in README.md
            num_steps=100,
            batch_size=128,
            micro_batches=1,  # parts of a device's share that are computed one after the other, to save memory
            lam=0.5,  # probability of the forget component: siss, bernoulli
            noise="uniform01",  # target noise of erasediff: uniform01, uniform, normal
            error="sum_squares",  # or mean_squares
            draw="uniform",  # how t is drawn: uniform, antithetic
            t_min=0,  # first timestep that is drawn
            t_max=0,  # one past the last; 0 means all
            stratify=False,  # exactly lam * batch_size rows of the mixture come from forget
            # One text that conditions keep and forget images alike; None: each image's own caption. siss and bernoulli
            # mix the two images of a row, which must therefore have one text.
            prompt=placeholder(str),
        )
    )
    # Selection in the forget term alone: which t (half-open window) and which frequencies (radius in Nyquist units).
    config.unlearn.select = ConfigDict(
        dict(
            window=(0, 0),  # (t1, t2); (0, 0) means all
            filter="none",  # none, low_pass, high_pass
            cutoff=1.0,  # 1 = Nyquist, sqrt(2) = everything
            kind="ideal",  # ideal, gaussian, butterworth
        )
    )
    # The combiner; the method's own one if the name is empty. Only the values of the chosen one are used.
    config.unlearn.combine = ConfigDict(
        dict(
            name="",  # weighted_sum, fixed_norm, relative_norm, erasediff
            rho=0.1,  # relative_norm: norm of the forget part over that of the keep gradient
            c=5.0,  # fixed_norm: norm of the forget part (errors summed over pixels)
            eta=1e-3,  # erasediff: weight of the constraint
            keep=1.0,  # weighted_sum
            forget=-0.01,  # weighted_sum; negative ascends the forget loss
        )
    )
    config.unlearn.optimizer = optimizer()

    # The yardstick: the base recipe without the forget images.
    config.retrain = ConfigDict(dict(enabled=False))

    config.checkpoint = ConfigDict(dict(every=200, keep=2))  # steps; how many

    config.log = ConfigDict(
        dict(
            every=20,  # steps between lines of metrics.jsonl
            sample_every=0,  # steps between sample grids; 0 means only at the end of a stage
            sample_count=64,
            sample_steps=25,  # DDIM steps of the grids
            tensorboard=True,
        )
    )

    config.eval = ConfigDict(
        dict(
            num_samples=2000,
            sampler="ddim",  # or ddpm
            sampling_steps=50,
            batch_size=500,
            injection_t=(50, 100, 250, 500),
            injection_copies=16,
            loss_t=(50, 100, 200, 400, 600, 800),
            loss_noises=16,
            loss_images=200,
            copy_threshold=placeholder(float),  # rms distance on [0, 1] pixels that counts as a copy; None: calibrated
            confidence=0.95,
            seed=0,
            include_images=False,  # show the forget images in the report: the request may have been to erase them
            guidance=7.5,  # models of text: scale of classifier-free guidance; 1 is none
            prompts=placeholder(tuple),  # models of text: what is sampled; None: the captions of the training images
        )
    )
    config.eval.classifier = ConfigDict(
        dict(steps=600, batch_size=128, min_accuracy=0.9)  # its features judge the quality
    )

    # What the exported folder's model card says.
    config.export = ConfigDict(dict(license=placeholder(str), base_model=placeholder(str)))
    return config
