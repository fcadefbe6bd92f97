"""Titles and rows of the report's tables: every metric has a name, and what differs stands in rows of its own."""

from eval.families import FAMILIES
from eval.records import entry
from eval.report_tables import _rows
from eval.wording import FAMILY_TITLES, TITLES, headline, number, title
from jaxunlearn.metrics import COPY_DETECTORS, MEMBERSHIP_SCORES, METRICS
from tests.report_example import make_columns


def test_every_metric_and_every_table_has_a_title():
    assert set(TITLES) == set(METRICS)
    assert len({title(name) for name in METRICS}) == len(METRICS)
    for name, family in FAMILIES.items():
        assert name in FAMILY_TITLES or family.module.GROUPS, name


def test_the_names_that_can_be_asked_for_are_metrics():
    assert {f"copy_{name}" for name in COPY_DETECTORS} <= set(METRICS)
    asked = {name if name == "ulira" else f"mia/{name}" for name in MEMBERSHIP_SCORES}
    assert asked == {name for name in METRICS if name.startswith("mia/") or name == "ulira"}


def test_each_share_of_fresh_noise_has_its_row():
    entries = [entry("inversion_distance", share, n=4, protocol={"share": share}) for share in (0.0, 0.3, 0.6)]
    rows = _rows({"text": None}, {"after": entries, "control": []}, ["after"], "inversion_distance")
    assert len(rows) == 3
    for share, row in zip((0, 30, 60), rows):
        assert f"{share}&nbsp;% fresh noise" in row
        assert f"<b>{number(share / 100)}</b>" in row


def test_rates_are_written_in_percent():
    for name, metric in METRICS.items():
        if metric.unit in ("share of samples", "share of injections") and name not in (
            "precision",
            "precision_classifier",
        ):
            assert number(0.5, name) == "50.0 %", name


def test_the_headline_states_the_confidence_as_it_is():
    columns = make_columns(0)
    report = {"evaluation": {**columns, "reference": []}, "forget_set": {"unique": 1}, "text": None}
    for confidence, words in ((0.95, "with 95 % confidence"), (0.975, "with 97.5 %"), (0.999, "with 99.9 %")):
        assert words in headline({**report, "settings": {"confidence": confidence}})
