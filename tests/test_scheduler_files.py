"""Scheduler files: what is read, refused, corrected and written; no torch needed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from jaxunlearn.io.schedulers import complete_scheduler_config, read_scheduler, scheduler_config
from jaxunlearn.sampling import SamplerConfig
from jaxunlearn.schedule import linear

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LATENT = SCALED | {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
OLD_PNDM = SCALED | {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.2.2",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "trained_betas": None,
}


def test_scheduler_files():
    schedule, *rest = read_scheduler({"timestep_values": None, "tensor_format": "pt", "_diffusers_version": "0"})
    assert (schedule.num_steps, *rest) == (1000, SamplerConfig(), "epsilon", ())
    assert read_scheduler(LATENT).sampler == SamplerConfig("ddim", False, steps_offset=1, set_alpha_to_one=False)
    assert read_scheduler({"_class_name": "DDPMScheduler"}, "DDIMScheduler").sampler.kind == "ddim"
    with pytest.warns(UserWarning, match="no effect: colour, zoom"):
        read_scheduler({"zoom": 1, "colour": 2})
    betas = [0.1, 0.2, 0.5]
    config = {"trained_betas": betas, "num_train_timesteps": 3, "beta_schedule": "linear"}
    np.testing.assert_allclose(read_scheduler(config).schedule.alphas_cumprod, [0.9, 0.72, 0.36], rtol=1e-6)


REFUSALS = [
    ("_class_name", "EulerDiscreteScheduler", "DDPMScheduler, DDIMScheduler, PNDMScheduler; convert: "),
    ("beta_schedule", "sigmoid", "trained_betas"),
    ("beta_schedule", "linaer", "did you mean 'linear'"),
    ("beta_start", -1, "between 0 and 1"),
    ("trained_betas", [0.1], "num_train_timesteps"),
    ("trained_betas", "many", "list of numbers"),
    ("prediction_type", "flow", "v_prediction"),
    ("variance_type", "learned_range", "fixed_large"),
    ("variance_type", "fixed_small_log", "fixed_small"),
    ("thresholding", True, "false"),
    ("clip_sample", 1, "true, false"),
    ("clip_sample_range", 0, "positive"),
    ("num_train_timesteps", 0, "above 0"),
    ("steps_offset", 1.5, "integer"),
    ("timestep_spacing", "log", "trailing"),
    ("rescale_betas_zero_snr", "yes", "true, false"),
]


@pytest.mark.parametrize(("key", "value", "hint"), REFUSALS)
def test_scheduler_refusals_name_key_value_and_remedy(key, value, hint):
    with pytest.raises(ValueError) as error:
        read_scheduler({key: value})
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{key}: {value!r} is not supported; allowed: ")
    assert hint in line


def test_all_scheduler_refusals_come_together():
    with pytest.raises(ValueError) as error:
        read_scheduler({key: value for key, value, _ in REFUSALS[1:]})
    assert len(str(error.value).splitlines()) == len({key for key, _, _ in REFUSALS[1:]}) - 1  # beta_start goes unused


@pytest.mark.parametrize("config", [{}, LATENT, {"rescale_betas_zero_snr": True}, OLD_PNDM | {"clip_sample": True}])
def test_written_schedulers_read_back(config):
    before = read_scheduler(config)
    written = json.loads(json.dumps(scheduler_config(*before[:3])))
    after = read_scheduler(written)
    assert after[1:] == before[1:]
    np.testing.assert_allclose(after.schedule.alphas_cumprod[:-1], before.schedule.alphas_cumprod[:-1], rtol=1e-5)
    np.testing.assert_allclose(after.schedule.alphas_cumprod[-1], before.schedule.alphas_cumprod[-1], rtol=2e-4)
    complete = complete_scheduler_config(config)
    assert complete_scheduler_config(complete) == complete
    assert read_scheduler(complete)[1:] == before[1:]


def test_pndm_files():
    """The file of Stable Diffusion 1.4 as it first came out, and the keys that came later."""
    sampler = SamplerConfig("pndm", clip_sample=False, set_alpha_to_one=False)
    assert read_scheduler(OLD_PNDM)[1:] == (sampler, "epsilon", ())
    assert read_scheduler(OLD_PNDM | {"set_alpha_to_one": True}).sampler.set_alpha_to_one
    later = OLD_PNDM | {"steps_offset": 1, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    expected = dataclasses.replace(sampler, steps_offset=1, timestep_spacing="trailing")
    assert read_scheduler(later)[1:] == (expected, "v_prediction", ())
    # Keys of other schedulers stay in a file that diffusers converted; they have no effect, and clipping is handed on.
    shared = {"clip_sample": True, "clip_sample_range": 2.0, "thresholding": True, "rescale_betas_zero_snr": True}
    converted = read_scheduler(OLD_PNDM | shared | {"variance_type": "learned"})
    assert converted.sampler == dataclasses.replace(sampler, clip_sample=True, clip_sample_range=2.0)
    assert converted.schedule.alphas_cumprod[-1] > 0
    assert not read_scheduler(OLD_PNDM).sampler.with_kind("ddim").clip_sample


def test_pndm_refusals_come_together():
    with pytest.raises(ValueError) as error:
        read_scheduler({"_class_name": "PNDMScheduler", "prediction_type": "sample", "steps_offset": -1})
    prediction, prk, offset = str(error.value).splitlines()
    assert prediction == (
        "prediction_type: 'sample' is not supported; allowed: epsilon, v_prediction;"
        " use a DDIMScheduler for a model of the sample"
    )
    assert prk.startswith("skip_prk_steps: False is not supported; allowed: true; set it to true")
    assert offset.startswith("steps_offset: -1")
    with pytest.raises(ValueError, match="prediction_type: 'sample'"):
        scheduler_config(linear(), SamplerConfig("pndm"), "sample")


OFFSET_NOTE = "steps_offset is 0 in the scheduler's config: 1 is used instead, as StableDiffusionPipeline does"
CLIP_NOTE = "clip_sample is true in the scheduler's config: false is used instead, as StableDiffusionPipeline does"


@pytest.mark.parametrize(
    ("config", "notes"),
    [
        (OLD_PNDM, (OFFSET_NOTE,)),
        (OLD_PNDM | {"steps_offset": 1, "clip_sample": False}, ()),
        (OLD_PNDM | {"steps_offset": 1, "clip_sample": True}, (CLIP_NOTE,)),
        ({"_class_name": "DDIMScheduler"}, (OFFSET_NOTE, CLIP_NOTE)),
        ({"_class_name": "DDPMScheduler", "clip_sample": False}, (OFFSET_NOTE,)),
        ({"_class_name": "DDIMScheduler", "steps_offset": 4}, (OFFSET_NOTE.replace("is 0", "is 4"), CLIP_NOTE)),
        (LATENT, ()),
    ],
)
def test_stable_diffusion_pipelines_correct_their_scheduler(config, notes):
    read = read_scheduler(config, pipeline="StableDiffusionPipeline")
    assert read.notes == notes
    assert (read.sampler.steps_offset, read.sampler.clip_sample) == (1, False)
    img2img = read_scheduler(config, pipeline="StableDiffusionImg2ImgPipeline")
    assert len(img2img.notes) == len(notes)
    for other in (
        None,
        "DDIMPipeline",
        "LDMTextToImagePipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
    ):
        assert read_scheduler(config, pipeline=other)[1:] == read_scheduler(config)[1:]
