"""The report's entries on features: values are those of the library's functions, and what is missing says why."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from eval import feature_networks
from eval.context import Column, Context
from eval.families import FAMILIES, classifier_features, copy_detector, inception_features
from eval.records import find
from eval.settings import resolve
from jaxunlearn.images import to_model
from jaxunlearn.io.feature_weights import MissingWeights, Weights
from jaxunlearn.metrics import frechet
from jaxunlearn.metrics.inception_score import inception_score
from jaxunlearn.metrics.kid import kernel_distance
from jaxunlearn.metrics.prdc import prdc
from jaxunlearn.models.features import inception, sscd
from tests.test_features import TINY, golden, sscd_state, torch_state

SHAPE = (8, 8, 1)
TIMES = (3, 7)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def flat_features(pictures):
    return np.asarray(pictures, np.float64).reshape(len(pictures), -1)[:, :6] / 255


def weights(name, tensors):
    return Weights(name, tensors, "ab" * 32, "cd" * 32, True, "MIT")


@pytest.fixture
def make(rng, tmp_path):
    """Column and context of one model over the same small data."""
    images = rng.integers(0, 256, (120, *SHAPE), np.uint8)
    split = SimpleNamespace(images=images, keep=np.arange(60), held_out=np.arange(60, 110))
    trained = SimpleNamespace(
        apply=lambda x: (flat_features(x), flat_features(x)),
        held_out_accuracy=0.97,
        train_images=60,
        classes=np.arange(6),
    )
    refs = SimpleNamespace(
        forget=images[110:114],
        injected=np.array([0, 2]),
        classifier=trained,
        no_classifier=None,
        loss_inputs={},
    )
    settings, problems = resolve({}, {}, "standard")
    assert not problems
    settings = settings | {"injection_t": TIMES, "injection_copies": 3}
    settings["quality"] |= {"subsets": 5, "subset_size": 20}
    settings["sscd"] |= {"batch_size": 8, "calibration_images": 12}

    def build(name="after", samples=50):
        column = Column([], rng.integers(0, 256, (samples, *SHAPE), np.uint8), rng.uniform(size=samples) < 0.1)
        column.injections = rng.integers(0, 256, (2, len(TIMES), 3, *SHAPE), np.uint8)
        space = SimpleNamespace(decode=lambda x: x)
        runner = SimpleNamespace(protocol={"sampler": "ddim"}, space=space)
        context = Context(
            name, {}, None, runner, refs, None, settings, lambda *_: None, None, split, cache=tmp_path / "cache"
        )
        return column, context

    return build


@pytest.fixture
def fake_networks(monkeypatch):
    """Networks that take a millisecond: their own ports are tested elsewhere."""
    kernel = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    calls = []

    def weights_of(settings, name):
        calls.append(name)
        return weights(name, {})

    def outputs(params, x):
        pooled = x[:, ::60, ::60, :].reshape(len(x), -1)[:, :6]
        return inception.Outputs(pooled, pooled @ params["fc"]["kernel"])

    def embed(params, images):
        x = images[:, ::40, ::40, 0].reshape(len(images), -1)
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    monkeypatch.setattr(inception_features, "weights_for", weights_of)
    monkeypatch.setattr(copy_detector, "weights_for", weights_of)
    monkeypatch.setattr(inception, "from_flat", lambda flat: {"fc": {"kernel": kernel}})
    monkeypatch.setattr(inception, "outputs", outputs)
    inception_features._features.cache_clear()  # else a compiled program keeps the network of another test
    monkeypatch.setattr(sscd, "from_flat", lambda flat: {})
    monkeypatch.setattr(sscd, "embed", embed)
    return SimpleNamespace(outputs=outputs, embed=embed, kernel=kernel, calls=calls)


def values(column):
    return {(item["metric"], item["protocol"].get("t")): item["value"] for item in column.entries}


def test_classifier_features_are_those_of_the_librarys_functions(make):
    column, context = make()
    classifier_features.measure(column, context)
    assert [item["metric"] for item in column.entries] == list(classifier_features.METRICS)
    keep, samples = flat_features(context.split.images[:60]), flat_features(column.samples)
    found = values(column)
    expected = kernel_distance(keep, samples, subsets=5, size=20, seed=0)
    assert found["kd_classifier", None] == pytest.approx(expected.mean)
    for name, value in zip(("precision", "recall", "density", "coverage"), prdc(keep, samples)[:4]):
        assert found[f"{name}_classifier", None] == pytest.approx(value)
    assert column.entries[0]["protocol"]["classifier_held_out_accuracy"] == 0.97
    assert column.entries[0]["n"] == 50


def test_inception_features_are_those_of_the_librarys_functions(make, fake_networks):
    column, context = make()
    inception_features.measure(column, context)
    assert [item["metric"] for item in column.entries] == list(inception_features.METRICS)
    assert all(item["status"] == "ok" for item in column.entries), column.entries

    def features(pictures):
        x = inception_features.fid_inputs(pictures, "clean")
        return fake_networks.outputs({"fc": {"kernel": fake_networks.kernel}}, x)

    order = np.random.default_rng([0, 3]).permutation(60)
    keep, samples = features(context.split.images[order]), features(column.samples)
    distance = frechet.frechet_distance(frechet.moments(keep.features), frechet.moments(samples.features))
    fid = column.entries[0]
    assert fid["value"] == pytest.approx(distance, rel=1e-4)
    assert fid["protocol"]["key"] == "fid@50, clean, 60 keep images"
    assert fid["weights_sha256"] == "ab" * 32
    expected = kernel_distance(keep.features, samples.features, subsets=5, size=20, seed=0).mean
    assert values(column)["kid", None] == pytest.approx(expected, rel=1e-3)
    score = inception_score(samples.logits[~column.flags], seed=0)
    last = column.entries[-1]
    assert last["value"] == pytest.approx(score.mean, rel=1e-4)
    assert last["n"] == np.sum(~column.flags)


def test_another_convention_is_another_number_under_another_key(make, fake_networks):
    found = {}
    column, context = make()
    for convention in ("clean", "tf1"):
        settings = context.settings | {"quality": context.settings["quality"] | {"convention": convention}}
        refs = SimpleNamespace(**context.refs.__dict__)
        again = dataclasses.replace(context, refs=refs, settings=settings)
        fresh = Column([], column.samples, column.flags)
        inception_features.measure(fresh, again)
        found[convention] = fresh.entries[0]
    assert found["clean"]["value"] != found["tf1"]["value"]
    assert found["tf1"]["protocol"]["key"] == "fid@50, tf1, 60 keep images"
    assert found["tf1"]["protocol"]["resize"] != found["clean"]["protocol"]["resize"]
    assert len(list(context.cache.iterdir())) == 2


def test_inception_runs_once_for_keep_images_and_stores_their_moments(make, fake_networks, monkeypatch):
    column, context = make()
    second, other = make("before")
    inception_features.measure(column, context)
    inception_features.measure(second, other)
    assert fake_networks.calls == ["inception"]
    (file,) = context.cache.iterdir()
    fresh, again = make()
    again = Context(
        **{**again.__dict__, "refs": SimpleNamespace(**again.refs.__dict__)}
    )  # another run on the same data
    monkeypatch.setattr(inception_features, "save_moments", None)  # nothing is written again
    fresh.samples, fresh.flags = column.samples, column.flags
    inception_features.measure(fresh, again)
    assert fresh.entries[0]["value"] == pytest.approx(column.entries[0]["value"], rel=1e-6)
    monkeypatch.undo()


def test_stored_moments_that_are_damaged_are_refused_and_the_report_says_so(make, fake_networks):
    column, context = make()
    inception_features.measure(column, context)
    (file,) = context.cache.iterdir()
    file.write_bytes(b"nothing")
    fresh, again = make()
    again = dataclasses.replace(again, refs=SimpleNamespace(**again.refs.__dict__))
    fresh.samples, fresh.flags = column.samples, column.flags
    inception_features.measure(fresh, again)
    assert "no stored moments" in fresh.entries[0]["protocol"]["stored_moments_refused"]
    assert fresh.entries[0]["value"] == pytest.approx(column.entries[0]["value"], rel=1e-9)
    assert len(file.read_bytes()) > 100


def test_sscd_is_the_mean_cosine_over_copies_and_then_images(make, fake_networks):
    column, context = make()
    injections = column.injections.copy()
    copy_detector.measure(column, context)
    assert column.injections is None
    found = {item["protocol"].get("t"): item for item in column.entries if item["metric"] == "sscd"}

    def embed(pictures):
        return np.asarray(fake_networks.embed({}, copy_detector.sscd_inputs(pictures)))

    forget = embed(context.refs.forget[[0, 2]])
    for place, t in enumerate(TIMES):
        cosine = [(embed(injections[i, place]) @ forget[i]).mean() for i in range(2)]
        assert found[t]["value"] == pytest.approx(np.mean(cosine), rel=1e-5)
        assert found[t]["protocol"]["sd"] == pytest.approx(np.std(cosine, ddof=1), rel=1e-3)
        assert found[t]["ci"]["low"] <= found[t]["value"] <= found[t]["ci"]["high"]
        assert found[t]["protocol"]["convention"] == "short288"
    copies = find(column.entries, "copy_sscd")
    nearest = (embed(column.samples) @ embed(context.refs.forget).T).max(1)
    threshold = copies["protocol"]["threshold"]
    assert threshold >= 0.75
    assert copies["value"] == pytest.approx(np.mean(nearest > threshold))
    assert copies["protocol"]["threshold_of_data"] > 0
    np.testing.assert_allclose(column.arrays["sscd_of_samples"], nearest, rtol=1e-5)


def test_sscd_calibrated_is_1_for_the_original_and_0_for_the_retrained_model(make, fake_networks):
    columns, contexts = {}, {}
    for name in ("before", "after", "retrained"):
        columns[name], contexts[name] = make(name)
        copy_detector.measure(columns[name], contexts[name])
    for like, expected in (("before", 1.0), ("retrained", 0.0)):
        columns["after"].entries = list(columns[like].entries)
        copy_detector.compare(columns, contexts, contexts["after"].settings)
        found = [item for item in columns["after"].entries if item["metric"] == "sscd_calibrated"]
        assert [item["protocol"]["t"] for item in found] == list(TIMES)
        assert [item["value"] for item in found] == pytest.approx([expected] * 2, abs=1e-9)
        assert found[0]["protocol"]["level"] == "a retrained model"
    del columns["retrained"]
    columns["after"].entries = list(columns["before"].entries)
    copy_detector.compare(columns, contexts, contexts["after"].settings)
    found = find(columns["after"].entries, "sscd_calibrated")
    assert found["status"] == "not_run"
    assert "64 held-out images" in found["reason"]


def test_held_out_injections_stand_in_for_a_retrained_model(make, fake_networks, rng, monkeypatch):
    monkeypatch.setattr(copy_detector, "LEAST_HELD_OUT", 8)
    (column, context), (after, other) = make("before"), make("after")
    pictures = rng.integers(0, 256, (8, *SHAPE), np.uint8)
    x = np.asarray(to_model(pictures))
    made = rng.uniform(-1, 1, (8, 2, 3, *SHAPE)).astype(np.float32)
    made[:, 0] = x[:, None]  # comes back as it was at the first t
    context.refs.loss_inputs["held_out"] = SimpleNamespace(x=x, rows=np.zeros(8, np.int32))
    context.runner.inject = lambda *_: made
    for one, its in ((column, context), (after, other)):
        copy_detector.measure(one, its)
    copy_detector.compare({"before": column, "after": after}, {"before": context, "after": other}, context.settings)
    first, second = (find(after.entries, "sscd_calibrated", t=t) for t in TIMES)
    assert first["protocol"]["reference_similarity"] == pytest.approx(1, abs=1e-5)
    assert second["protocol"]["reference_similarity"] < 0.99
    assert "held-out" in first["protocol"]["level"]
    u, before = (find(c.entries, "sscd", t=TIMES[0])["value"] for c in (after, column))
    assert first["value"] == pytest.approx((u - 1) / (before - 1), rel=1e-3)


@pytest.mark.parametrize("error", [MissingWeights("sscd: put it there"), ValueError("sscd: changed")])
def test_without_weights_every_metric_says_why_and_nothing_takes_its_name(make, monkeypatch, error):
    def weights_of(settings, name):
        raise error

    status = "not_run" if isinstance(error, MissingWeights) else "failed"
    for module in (inception_features, copy_detector):
        monkeypatch.setattr(module, "weights_for", weights_of)
        column, context = make()
        module.measure(column, context)
        if hasattr(module, "compare"):
            module.compare({"after": column, "before": column}, {"after": context}, context.settings)
        assert {item["metric"] for item in column.entries} == set(module.METRICS)
        assert all((item["status"], item["reason"]) == (status, str(error)) for item in column.entries)
        assert all(item["value"] is None for item in column.entries)


def test_the_real_loader_is_asked_with_the_settings(make, tmp_path):
    _, context = make()
    context.settings["weights"] |= {"folder": str(tmp_path)}
    with pytest.raises(MissingWeights, match=r"inception\.safetensors"):
        feature_networks.weights_for(context.settings, "inception")


def test_broken_samples_and_no_classifier_have_reasons(make, fake_networks):
    column, context = make()
    column.samples = column.injections = None
    column.failed = "3 of 50 samples hold NaN or infinity"
    for module in (classifier_features, inception_features, copy_detector):
        module.measure(column, context)
    assert len({item["metric"] for item in column.entries}) == 14
    assert all((item["status"], item["reason"]) == ("failed", column.failed) for item in column.entries)
    column, context = make()
    context.refs.classifier, context.refs.no_classifier = None, "the data has no labels"
    classifier_features.measure(column, context)
    assert {item["reason"] for item in column.entries} == {"the data has no labels"}


@pytest.mark.parametrize("name", ["classifier_features", "inception_features", "copy_detector"])
def test_failed_entries_name_every_metric(make, name):
    _, context = make()
    module = FAMILIES[name].module
    entries = module.failed_entries(context.settings)
    assert {item["metric"] for item in entries} == set(module.METRICS)
    assert FAMILIES[name].enabled(context.settings)


@pytest.mark.slow
def test_the_real_networks_in_narrow_form(make, monkeypatch):
    """The whole way: weights as in a file, resizing, network, distances."""
    divisor = golden.INCEPTION_DIVISOR
    state = torch_state(inception.abstract_params(divisor), inception.torch_name, 2)
    narrow = inception.from_state_dict(state, divisor)
    tensors = {
        "inception": inception.to_flat(narrow),
        "sscd": sscd.to_flat(sscd.from_state_dict(sscd_state(), TINY)),
    }
    for module in (inception_features, copy_detector):
        monkeypatch.setattr(module, "weights_for", lambda settings, name: weights(name, tensors[name]))
    monkeypatch.setattr(inception, "from_flat", functools.partial(inception.from_flat, divisor=divisor))
    monkeypatch.setattr(sscd, "from_flat", functools.partial(sscd.from_flat, config=TINY))
    inception_features._features.cache_clear()
    column, context = make()
    column.samples = context.split.images[:50].copy()  # keep images as samples: nearly nothing is wrong with them
    inception_features.measure(column, context)
    copy_detector.measure(column, context)
    assert all(item["status"] == "ok" for item in column.entries), column.entries
    noise, _ = make()
    noise.samples = np.zeros_like(noise.samples)
    inception_features.measure(noise, context)
    assert 0 <= column.entries[0]["value"] < noise.entries[0]["value"]
