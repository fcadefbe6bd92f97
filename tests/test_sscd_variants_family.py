"""The variants of the SSCD similarity in the report: against their formulas, and what stands there without them."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from eval.context import Column, Context
from eval.families import FAMILIES, copy_detector, sscd_variants
from eval.settings import resolve

SHAPE, TIMES, COPIES = (4, 4, 1), (3, 7), 3


@pytest.fixture
def models(monkeypatch):
    """Columns and contexts of before and after, and the descriptors of a linear network."""
    rng = np.random.default_rng(4)
    kernel = rng.normal(size=(16, 5))
    calls = []

    def embed(pictures):
        assert pictures.dtype == np.uint8
        calls.append(len(pictures))
        found = (pictures.reshape(len(pictures), -1) / 255.0 + 0.1) @ kernel
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    forget = rng.integers(0, 256, (3, *SHAPE), np.uint8)
    refs = SimpleNamespace(forget=forget, injected=np.array([0, 2]))
    settings, problems = resolve({}, {"sscd.variants": "True", "injection_copies": "3"})
    assert not problems
    settings["injection_t"] = TIMES
    detector = copy_detector.Detector(embed, {"weights_sha256": "ab" * 32}, embed(forget), None, "none held out")
    monkeypatch.setattr(sscd_variants, "detector_of", lambda context: detector)

    def build(name, made):
        context = Context(name, {}, None, None, refs, None, settings, lambda *_: None, None, None)
        return Column([], injections=made), context

    made = [rng.integers(0, 256, (2, len(TIMES), COPIES, *SHAPE), np.uint8) for _ in range(2)]
    found = {name: build(name, x) for name, x in zip(("before", "after"), made)}
    return SimpleNamespace(**found, embed=embed, forget=forget[[0, 2]], made=made, settings=settings, calls=calls)


def by_t(column, metric):
    return {item["protocol"]["t"]: item for item in column.entries if item["metric"] == metric}


def test_the_variants_are_their_formulas_on_the_same_noises(models):
    for column, context in (models.before, models.after):
        sscd_variants.measure(column, context)
        assert column.injections is None
    before, after = (x / 255.0 for x in models.made)
    column = models.after[0]
    for place, t in enumerate(TIMES):
        distance = np.sqrt(((before[:, place] - models.forget[:, None] / 255.0) ** 2).sum((2, 3, 4)))
        projected, rate, direction = np.empty((3, 2, COPIES))
        for i in range(2):
            x_f = models.forget[i] / 255.0
            for k in range(COPIES):
                x_o, x_u = before[i, place, k], after[i, place, k]
                length = np.sqrt(((x_u - x_f) ** 2).sum())
                moved = np.clip(x_f + np.median(distance) * (x_u - x_f) / length, 0, 1)
                pictures = np.stack([np.round(x * 255).astype(np.uint8) for x in (x_f, x_o, x_u, moved)])
                f, o, u, m = models.embed(pictures)
                projected[i, k], rate[i, k] = f @ m, (1 - f @ u) / length
                direction[i, k] = (u - o) @ (f - o) / np.linalg.norm(u - o) / np.linalg.norm(f - o)
        expected = {"sscd_projected": projected, "sscd_dissimilarity_rate": rate, "sscd_direction": direction}
        for metric, values in expected.items():
            found = by_t(column, metric)[t]
            assert found["status"] == "ok"
            assert found["value"] == pytest.approx(values.mean(), rel=1e-3, abs=1e-4)
            assert found["ci"]["low"] <= found["value"] <= found["ci"]["high"]
    assert {item["reason"] for item in by_t(models.before[0], "sscd_direction").values()} == {
        sscd_variants.THE_ORIGINAL
    }
    assert {item["status"] for item in by_t(models.before[0], "sscd_projected").values()} == {"ok"}


def test_without_an_original_or_a_distance_they_say_so(models):
    column, context = models.after
    sscd_variants.measure(column, context)
    assert [item["reason"] for item in column.entries] == [sscd_variants.NO_ORIGINAL] * 6
    same = np.broadcast_to(models.forget[:, None, None], models.made[0].shape).copy()
    context = dataclasses.replace(context, name="before", refs=SimpleNamespace(**vars(context.refs)))
    column = Column([], injections=same)
    sscd_variants.measure(column, context)
    assert {item["reason"] for item in by_t(column, "sscd_projected").values()} == {sscd_variants.NO_RADIUS}
    assert {item["value"] for item in by_t(column, "sscd_dissimilarity_rate").values()} == {0.0}


def test_they_are_a_family_that_is_off_by_default(models):
    settings, _ = resolve({}, {})
    assert not FAMILIES["sscd_variants"].enabled(settings)
    entries = sscd_variants.failed_entries(models.settings)
    assert [item["metric"] for item in entries] == [name for name in sscd_variants.METRICS for _ in TIMES]


def test_a_network_that_is_missing_is_the_reason(models, monkeypatch):
    monkeypatch.setattr(sscd_variants, "detector_of", lambda context: ("sscd: put it there", "not_run"))
    column, context = models.after
    sscd_variants.measure(column, context)
    assert {(item["status"], item["reason"]) for item in column.entries} == {("not_run", "sscd: put it there")}
