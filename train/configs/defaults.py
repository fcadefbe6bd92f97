"""Every key of a configuration, with its meaning and its default. A config file takes these and sets what differs.

Keys cannot be added on the command line, so a misspelt one is an error with a suggestion. Values that depend on the data
(`model`, `data`) have no useful default and are set by each config.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder


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


def shorten(config: ConfigDict) -> None:
    """What every ``smoke`` variant has in common: it shows that all stages work, and its figures mean nothing.

    Numbers of steps, batches and samples depend on the network; each configuration sets its own.
    """
    config.name += "-smoke"
    config.log.sample_steps = 2
    config.eval.sampling_steps = 2
    config.eval.injection_t = (5, 10)
    config.eval.injection_copies = 1
    config.eval.loss_noises = 1
    config.eval.classifier.steps = 20


def defaults() -> ConfigDict:
    """The whole tree."""
    config = ConfigDict()
    config.name = "unnamed"  # the default work directory is runs/<name>
    config.seed = 0  # decides the held-out images, the order of the data, all noise, the initial weights
    # Who chooses unlearn.select.window and filter: manual (they stand below), or a rule that measures when the base model is
    # there: auto (what the model knows of the forget images, and what sets them apart), spectrum, responsibility.
    config.select = "manual"
    config.num_devices = 0  # how many devices to use; 0 means all

    # The images. `keep` is the training set without the forget set.
    config.data = ConfigDict(
        dict(
            name="digits",  # digits, folder, idx, npz, tfds
            path=placeholder(str),  # file or folder, where the source needs one
            # folder only: a .jsonl file of file_name and text; None: metadata.jsonl in it, if any
            captions=placeholder(str),
            caption=placeholder(str),  # one text for all images that have none of their own
            labels_path=placeholder(str),  # idx only, if not beside the images
            split=placeholder(str),  # where the source holds several: tfds, idx
            size=placeholder(int),  # crop to a square and resize to this many pixels; None keeps the size
            channels=placeholder(int),  # 1 or 3; None keeps what is there
            limit=placeholder(int),  # at most so many images, evenly spaced over the set; None means all
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

    # How it is unlearned. Options that are None are not set: the method's own defaults hold. One that the chosen method
    # does not have is refused.
    config.unlearn = ConfigDict(
        dict(
            method="siss",  # see the method table in README.md
            num_steps=100,
            batch_size=128,
            micro_batches=1,  # parts of a device's share that are computed one after the other, to save memory
            # A number, or a schedule such as "linear(0, 0.5, 100)" (train/step_schedules.py):
            lam=FieldReference(0.5, field_type=object),  # probability of the forget component: siss, bernoulli
            noise="uniform01",  # target noise of erasediff: uniform01, uniform, normal
            cap=placeholder(float),  # mirrored: null level (None: of each row); clamped: the measured level, required
            beta=placeholder(float),  # npo, simnpo, dpo, kto: strength of the preference, positive
            beta_unit=placeholder(str),  # npo, simnpo: "loss" (beta is divided by the level) or "raw"
            level=placeholder(float),  # npo, simnpo: mean forget error at the start; None: measured
            delta=placeholder(float),  # simnpo: margin in the unit of the forget error
            winner=placeholder(str),  # dpo: "keep" (the row's own) or "surrogate" (one for each forget image)
            keep_term=placeholder(bool),  # dpo: adds the denoising error of keep; needs combine.keep
            prior_term=placeholder(bool),  # dpo: holds the answer to pure noise; needs combine.prior
            z=placeholder(object),  # kto: the reference point, a number of 0 or more, or "batch"
            anchor=placeholder(str),  # vdu_style, fisher_anchor: "l2", "fisher" or "checkpoint_var"
            anchor_batches=16,  # anchor "fisher": batches of 16 keep images on which it is measured
            checkpoints=(),  # anchor "checkpoint_var": two or more folders of late models of one training run
            error=placeholder(str),  # sum_squares or mean_squares
            draw="uniform",  # how t is drawn: uniform, antithetic, importance (mostly inside select.window)
            t_min=0,  # first timestep that is drawn
            t_max=0,  # one past the last; 0 means all
            stratify=False,  # exactly lam * batch_size rows of the mixture come from forget
            # One text that conditions keep and forget images alike; None: each image's own caption. Methods that mix the
            # images of a row (siss, bernoulli, retrack, surrogate, dpo) need one text in it.
            prompt=placeholder(str),
        )
    )
    # draw="importance": every t keeps a positive probability, and the terms keep their means.
    config.unlearn.importance = ConfigDict(
        dict(
            uniform_share=0.25,  # share of the draws that follow no window, in (0, 1]
            antithetic=False,  # in pairs on opposite sides of the median
        )
    )
    # retrack: the nearest keep images of every forget image, in the model's space (pixels, or means of the latents).
    config.unlearn.neighbours = ConfigDict(
        dict(
            k=10,  # how many
            copy_rms=0.02,  # keep images within this rms difference count as copies and are refused; 0 allows them
        )
    )
    # Selection in the forget term alone: which t (half-open window) and which frequencies.
    config.unlearn.select = ConfigDict(
        dict(
            window=(0, 0),  # two bounds, the cleaner one first; (0, 0) means all
            window_unit="t",  # of the bounds: t (steps), fraction (of all steps), log_snr (high, low)
            edge=0,  # width in steps of the flanks of a smooth window; 0 is a hard one
            filter="none",  # none, low_pass, high_pass, band
            cutoff=FieldReference(1.0, field_type=object),  # radius; of a band two, (low, high)
            kind="ideal",  # ideal, gaussian, butterworth
            order=2,  # of the butterworth filter
            unit="nyquist",  # of the cutoff: nyquist (1; sqrt(2) is everything) or bins (cycles along the shorter side)
            backend="fft",  # fft, or matmul, which computes only the frequencies that pass
        )
    )
    # The combiner; the method's own one if the name is empty. Only the values of the chosen one are used. Every number may
    # be a schedule, such as "linear(0, 0.1, 100)" or "steps((0, 0.05), (100, 0.1))": see train/step_schedules.py.
    config.unlearn.combine = ConfigDict(
        dict(
            name="",  # weighted_sum, fixed_norm, relative_norm, erasediff, pcgrad
            rho=FieldReference(0.1, field_type=object),  # relative_norm: norm of the forget part over that of keep
            c=FieldReference(5.0, field_type=object),  # fixed_norm: norm of the forget part (errors summed over pixels)
            eta=FieldReference(1e-3, field_type=object),  # erasediff: weight of the constraint
            # weighted_sum, pcgrad: weights of the terms; None: the method's own, else 1 for keep and 0.01 for forget.
            keep=placeholder(object),
            forget=placeholder(object),  # weighted_sum: negative ascends the forget loss; pcgrad: 0 or more
            anchor=placeholder(object),  # weighted_sum: of vdu_style and fisher_anchor
            prior=placeholder(object),  # weighted_sum: of dpo with prior_term
            two_sided=True,  # pcgrad: False never weakens the keep gradient
        )
    )
    # What holds the weights near those of the starting model, whatever the method. None, "none": nothing.
    config.unlearn.guards = ConfigDict(
        dict(
            anchor_weight=placeholder(float),  # pull of weight * (theta - theta0), added to the direction
            l2_radius=placeholder(float),  # bound of |theta - theta0|
            l2_relative=False,  # measure l2_radius in norms of theta0
            mask="none",  # which weights move: saliency (forget pulls at them most), fisher_ratio (forget more than keep)
            fraction=0.5,  # saliency: share of the weights that move
            threshold=1.0,  # fisher_ratio: least ratio of the two importances
            batches=8,  # on which a mask is computed, before the first step
            batch_size=16,  # images of each of them
        )
    )
    # A bound for every unit (row of weights) on its own.
    config.unlearn.guards.reserve = ConfigDict(
        dict(
            capacity=placeholder(float),  # share of a unit's own magnitude that it may drift; None: no bound
            floor=0.0,  # capacity of each weight of a unit of zeros
            recycle=True,  # moving back refunds; False bounds the length of the path
        )
    )
    config.unlearn.optimizer = optimizer()
    # Probes of the model while it unlearns, on fixed images with fixed noises. The collapse guard: a run whose loss on keep
    # images has grown too much ends with exit code 1 and gives back the last sound parameters in models/restored.
    config.unlearn.watch = ConfigDict(
        dict(
            every=10,  # steps between probes; 0: never, and then there is no guard
            keep_images=64,  # keep images of a probe, each with `noises` noises at timesteps that take turns
            forget_images=16,  # different forget images of a probe, at most, each at all strata; without a source none
            strata=16,  # timesteps: midpoints of so many equal parts of all of them
            noises=4,
            warn=1.1,  # keep loss over that of the start from which on a step is not sound
            collapse=1.5,  # from which on the run ends
            samples=0,  # how many samples a probe makes, to count copies and for a Frechet distance; 0: none
            samples_every=50,  # steps between such probes, a multiple of `every`
            returns=placeholder(str),  # "last" step or "best" one; None: last, with a stop rule best. See best.json
        )
    )
    # The stop rule: ends the run at the first of `patience` probes in a row whose forget level has reached the target.
    config.unlearn.stop = ConfigDict(
        dict(
            target=placeholder(float),  # forget level, such as 0.95; None: all steps are made
            patience=2,
            # Where the loss comes from at which the level is 1. None: there is no forget level.
            # "retrained": of the retrained models (retrain.enabled), which are then trained before; the definition.
            # "held_out": of the starting model on the held-out images most like each forget image, if they are alike.
            # "value": given below.
            source=placeholder(str),
            path=placeholder(str),  # retrained: a diffusers folder of such a model, instead of training one
            level=placeholder(float),  # value: the loss on the forget images, mean square per pixel
        )
    )

    # The yardstick: the base recipe without the forget images.
    config.retrain = ConfigDict(
        dict(
            enabled=False,
            count=1,  # how many models; the second and further ones with other initial weights, order and noise
        )
    )

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
            preset=placeholder(str),  # smoke, standard or audit: replaces what is left at its default; None: nothing
            num_samples=2000,
            sampler="ddim",  # or ddpm, pndm
            sampling_steps=50,
            batch_size=500,
            injection_t=(50, 100, 250, 500),
            injection_copies=16,
            injection_images=16,  # forget images of the injection test, at most
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

    # Quality on features beyond Frechet distance: of the run's classifier, and of Inception (FID, KID, ...).
    config.eval.quality = ConfigDict(
        dict(
            classifier=False,
            inception=False,  # needs its weights
            convention="clean",  # how pictures become 299 pixels wide: clean, tf1, half_pixel or antialias
            rows=2000,  # features of each side for kernel distance, precision, recall, density and coverage
            subsets=100,  # of the kernel distance
            subset_size=1000,
            batch_size=50,  # pictures in one call of Inception
        )
    )

    # Weights of the networks of FID, SSCD and CLIP: files that scripts/convert_weights.py makes.
    config.eval.weights = ConfigDict(
        dict(
            folder=placeholder(str),  # of these files; None: the environment variable JAXUNLEARN_WEIGHTS
            allow_unpinned=(),  # names of weights that may come from another file than the public one
        )
    )

    # The copy detector on injections and samples; needs its weights.
    config.eval.sscd = ConfigDict(
        dict(
            enabled=False,
            variants=False,  # three reconstructed variants of the similarity as well, see metrics/sscd_variants.py
            convention="short288",  # how pictures are resized: short288 (short edge, aspect kept) or square320
            batch_size=16,
            calibration_images=2000,  # keep and held-out images behind the threshold of copies, at most
        )
    )

    # How samples look: sharpness, noise, ...; CLIP-IQA and the aesthetic score, which need weights.
    config.eval.photographs = ConfigDict(
        dict(
            enabled=False,
            force=False,  # let CLIP judge pictures below 64 pixels as well
            samples=1000,  # at most
            keep_images=1000,  # whose values are the yardstick, at most
            batch_size=16,
        )
    )

    # Whether an attacker can tell from the model that the forget images were trained on.
    config.eval.membership = ConfigDict(
        dict(
            scores=(),  # of loss_t, secmi, pia, pian, sima, clid (text), quantile (loss_images of at least 900), ulira
            noise_norm_images=0,  # models of text: images per forget prompt
        )
    )

    # Further detectors of copies among the samples: carlini, ratio, patch, ssim.
    config.eval.extraction = ConfigDict(dict(detectors=()))

    # Likelihood of forget and held-out images (probability-flow ODE).
    config.eval.nll = ConfigDict(
        dict(
            draws=0,  # dequantisations of each forget image; 0: no likelihood
            images=8,  # forget images, at most
            held_out=8,  # held-out images, at most, each dequantised once
            probes=placeholder(int),  # random signs of the divergence; None: 16, fewer for large images
            exact=False,  # exact divergence, for images of up to 1024 values
            tolerance=1e-4,
            max_steps=4096,
        )
    )

    # How far around its own noise a forget image still comes back.
    config.eval.inversion = ConfigDict(
        dict(
            copies=0,  # fresh noises of each share; 0: no such probe
            steps=100,  # of DDIM, up and down
            shares=(0.0, 0.3, 0.6),  # of fresh noise
        )
    )

    # Distance to the retrained models (retrain.enabled, retrain.count of at least 2).
    config.eval.gap = ConfigDict(
        dict(
            draws=0,  # noised images of each replicate; 0: no gap
            replicates=8,  # for the standard error
            images=64,  # forget images, at most
        )
    )

    # How soon the forget images are learned again, against the retrained models.
    config.eval.relearn = ConfigDict(
        dict(
            keys=0,  # repetitions, at least 3; 0: none
            budget=200,  # steps, at most
            every=5,  # steps between two looks at the loss
            learning_rate=1e-4,  # between a tenth of that of training and all of it
            batch_size=16,
            images=16,  # forget images, at most
            benign_steps=0,  # steps of training on keep images alone, after which copies are counted; 0: none
        )
    )

    # What the report says about the request that the run answers, word for word.
    config.eval.request = ConfigDict(
        dict(
            id=placeholder(str),  # its number
            received_utc=placeholder(str),
            operator=placeholder(str),  # who is responsible for the run
            basis=placeholder(str),  # why the images have to go
        )
    )

    # What the exported folder's model card says.
    config.export = ConfigDict(dict(license=placeholder(str), base_model=placeholder(str)))
    return config
