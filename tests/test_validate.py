"""The checks of a configuration, one by one."""

from __future__ import annotations

import pathlib

import pytest

from jaxunlearn.schedule import linear
from train import data_summary, validate
from train.configs import defaults, digits, mnist_tshirt, mnist_tshirt_cpu, sd14

WORKDIR = pathlib.Path("runs/none")


def problems(num_devices: int = 1, **changes) -> list[str]:
    config = digits.get_config()
    for key, value in changes.items():
        node = config
        *parents, leaf = key.split("__")
        for part in parents:
            node = node[part]
        node[leaf] = value
    return validate.config_problems(config, WORKDIR, num_devices)


@pytest.mark.parametrize("variant", ["", "smoke"])
def test_the_default_configuration_has_no_problem(variant):
    assert validate.config_problems(digits.get_config(variant), WORKDIR, 1) == []


@pytest.mark.parametrize("module", [mnist_tshirt, mnist_tshirt_cpu])
def test_the_mnist_configurations_lack_only_their_files(module):
    found = validate.config_problems(module.get_config(), WORKDIR, 1)
    assert found
    assert all("config.data." in line for line in found), found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("base__num_steps", 0),
        ("base__batch_size", 0),
        ("base__ema_max_decay", 1.0),
        ("base__optimizer__learning_rate", -1e-3),
        ("base__optimizer__lr_schedule", "linear"),
        ("base__optimizer__clip_norm", 0.0),
        ("unlearn__optimizer__b1", 1.0),
        ("unlearn__optimizer__warmup_steps", -1),
        ("unlearn__optimizer__learning_rate", float("nan")),
        ("unlearn__method", "SISS"),
        ("latents__batch_size", 0),
        ("latents__cache", __file__),
        ("compute__dtype", "float16"),
        ("eval__guidance", -1.0),
        ("eval__prompts", ()),
        ("eval__prompts", ("a cat", "a cat")),
        ("eval__prompts", ("a cat", "")),
        ("unlearn__lam", -0.1),
        ("unlearn__noise", "gauss"),
        ("unlearn__error", "l1"),
        ("unlearn__draw", "quasi"),
        ("unlearn__micro_batches", 0),
        ("unlearn__micro_batches", 7),
        ("unlearn__t_min", 1000),
        ("unlearn__t_max", 1001),
        ("unlearn__select__window", (500, 250)),
        ("unlearn__select__window", (0, 1001)),
        ("unlearn__select__filter", "lowpass"),
        ("unlearn__select__cutoff", 0.0),
        ("unlearn__select__kind", "box"),
        ("unlearn__combine__name", "pcgrda"),
        ("unlearn__combine__rho", -1.0),
        ("unlearn__combine__prior", float("inf")),
        ("unlearn__cap", 0.0),
        ("unlearn__beta", -1.0),
        ("unlearn__beta_unit", "pixels"),
        ("unlearn__level", 0.0),
        ("unlearn__delta", float("nan")),
        ("unlearn__winner", "nobody"),
        ("unlearn__z", -1),
        ("unlearn__z", "mean"),
        ("unlearn__anchor", "l1"),
        ("unlearn__anchor_batches", 0),
        ("unlearn__checkpoints", ("a", "a")),
        ("unlearn__importance__uniform_share", 0.0),
        ("unlearn__neighbours__k", 0),
        ("unlearn__neighbours__copy_rms", -0.1),
        ("unlearn__select__window_unit", "seconds"),
        ("unlearn__select__window", (0.25, 0.75)),
        ("unlearn__select__window", (250, 500, 750)),
        ("unlearn__select__edge", -1),
        ("unlearn__select__edge", 501),
        ("unlearn__select__cutoff", (0.2, 0.5)),
        ("unlearn__select__cutoff", "half"),
        ("unlearn__select__cutoff", None),
        ("unlearn__select__order", 0),
        ("unlearn__select__unit", "pixels"),
        ("unlearn__select__backend", "dct"),
        ("unlearn__guards__anchor_weight", -1.0),
        ("unlearn__guards__l2_radius", 0.0),
        ("unlearn__guards__mask", "random"),
        ("unlearn__guards__fraction", 0.0),
        ("unlearn__guards__threshold", -1.0),
        ("unlearn__guards__batches", 0),
        ("unlearn__guards__batch_size", 0),
        ("unlearn__guards__reserve__capacity", -0.1),
        ("unlearn__guards__reserve__floor", -0.1),
        ("checkpoint__every", 0),
        ("checkpoint__keep", 1),
        ("log__every", 0),
        ("log__sample_steps", 1001),
        ("eval__sampling_steps", 1001),
        ("eval__num_samples", 0),
        ("eval__sampler", "euler"),
        ("eval__injection_t", (1000,)),
        ("eval__injection_t", (100, 50, 100)),
        ("eval__loss_t", ()),
        ("eval__confidence", 1.0),
        ("eval__copy_threshold", -1.0),
        ("data__held_out_fraction", 1.5),
        ("scheduler__beta_schedule", "sigmoid"),
        ("base__path", "/no/such/folder"),
    ],
)
def test_a_bad_value_is_named_with_its_key(key, value):
    found = problems(**{key: value})
    assert len(found) == 1, found
    first, *rest = key.split("__")
    assert found[0].startswith(f"config.{first}")
    assert rest == [] or rest[-1] in found[0] or str(value) in found[0]


def test_a_combiner_that_would_train_on_the_forget_set_is_refused():
    found = problems(unlearn__combine__name="weighted_sum", unlearn__combine__forget=0.5)
    assert len(found) == 1
    assert "ascends" in found[0]
    assert problems(unlearn__combine__name="weighted_sum", unlearn__combine__forget=-0.5) == []


def test_a_selection_needs_a_forget_term():
    found = problems(unlearn__method="naive")
    assert len(found) == 1
    assert "select.window=(0,0)" in found[0]
    assert problems(unlearn__method="naive", unlearn__select__window=(0, 0)) == []


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    found = problems(num_devices=3)
    assert [line.split(" = ")[0] for line in found] == ["config.base.batch_size", "config.unlearn.batch_size"]
    assert all("multiple of 3" in line for line in found)


def test_a_work_directory_inside_the_source_model_is_refused(tmp_path):
    config = digits.get_config()
    config.base.path = str(tmp_path)
    found = validate.config_problems(config, tmp_path / "runs" / "x", 1)
    assert len(found) == 1
    assert "inside the source model" in found[0]


def test_a_cache_inside_the_source_model_is_refused(tmp_path):
    config = digits.get_config()
    config.base.path, config.latents.cache = str(tmp_path / "model"), str(tmp_path / "model" / "cache")
    (tmp_path / "model").mkdir()
    (line,) = validate.config_problems(config, WORKDIR, 1)
    assert line.startswith("config.latents.cache")
    assert "inside the source model" in line


def test_a_model_of_the_hub_is_not_looked_for_on_disk():
    assert problems(base__path="hf://owner/name") == []


def test_the_stable_diffusion_configuration_lacks_only_its_files():
    for variant in ("", "smoke"):
        found = validate.config_problems(sd14.get_config(variant), WORKDIR, 1)
        assert {line.split(":")[0] for line in found} == {"config.data.path", "config.base.path"}, found


def test_a_missing_section_is_named():
    config = digits.get_config()
    del config.eval
    assert validate.config_problems(config, WORKDIR, 1) == [
        "config.eval: missing; start from train/configs/defaults.py"
    ]


@pytest.mark.parametrize(
    ("group", "key", "likely"),
    [("unlearn", "num_step", "num_steps"), ("unlearn.watch", "evry", "every"), ("", "sed", "seed")],
)
def test_a_misspelt_key_of_a_configuration_file_is_named(group, key, likely):
    config = digits.get_config()
    node = config
    for part in filter(None, group.split(".")):
        node = node[part]
    node[key] = 400  # as a file does it, whose tree is open
    (line,) = validate.config_problems(config, WORKDIR, 1)
    assert line.startswith(".".join(filter(None, ("config", group, key))) + ": unknown key")
    assert f"did you mean {likely!r}?" in line


def test_timesteps_are_those_of_the_users_model(tmp_path):
    config = digits.get_config()
    config.base.path = str(tmp_path)
    config.unlearn.t_max, config.eval.loss_t, config.eval.injection_t = 1500, (100, 1400), (100,)
    config.unlearn.select.window, config.log.sample_steps = (250, 1300), 1200
    assert validate.config_problems(config, WORKDIR, 1) == []  # the model has yet to be loaded
    config.unlearn.combine.name, config.unlearn.combine.forget = "weighted_sum", 0.5
    assert "ascends" in validate.config_problems(config, WORKDIR, 1)[0]  # which no noise schedule changes
    config.unlearn.combine.name, config.unlearn.combine.forget = "", None
    assert data_summary.schedule_problems(config, linear(2000)) == []
    found = data_summary.schedule_problems(config, linear(1000))
    assert [line.split(" = ")[0].removeprefix("config.") for line in found] == [
        "unlearn.t_max",
        "unlearn.select.window",
        "log.sample_steps",
        "eval.loss_t",
    ]
    assert all("1000" in line for line in found)
    config.base.path = None
    assert len(validate.config_problems(config, WORKDIR, 1)) == 4


def test_differences_name_the_keys():
    saved = {"a": {"b": 1, "c": 2}, "d": 3}
    now = {"a": {"b": 1, "c": 5}, "e": 3}
    assert validate.differences(saved, now) == [
        "config.a.c: 2 in the work directory, 5 now",
        "config.d: only in the saved configuration",
        "config.e: only in this configuration",
    ]


def test_every_default_is_explained():
    """Every key of the tree stands on a line with a comment or under one."""
    source = pathlib.Path(defaults.__file__).read_text()
    keys = ("near_duplicate_rms", "lam", "rho", "copy_threshold", "sample_every", "window", "caption", "guidance")
    selected = ("window_unit", "edge", "cutoff", "order", "backend", "uniform_share", "copy_rms")
    of_methods = ("cap", "beta", "beta_unit", "level", "delta", "winner", "keep_term", "prior_term", "z", "anchor")
    guarded = ("anchor_weight", "l2_radius", "mask", "fraction", "threshold", "batches", "capacity", "floor", "recycle")
    for key in (*keys, *selected, *of_methods, *guarded, "two_sided", "checkpoints", "error"):
        line = next(line for line in source.splitlines() if line.strip().startswith(f"{key}="))
        assert "#" in line
