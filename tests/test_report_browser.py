"""The pages in a real browser, wide and narrow: they load, need nothing from elsewhere, and fit."""

from __future__ import annotations

import json
import os
import pathlib

import numpy as np
import pytest

from eval.main import main
from tests.browser import Browser, find_browser
from tests.report_example import make_columns, make_report
from tests.test_eval_report import config, make_workdir

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no chromium, chromium-browser or google-chrome on this machine"),
]
WIDTHS = (1200, 390)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report with everything in it, and a comparison."""
    root = tmp_path_factory.mktemp("pages")
    work = make_workdir(root / "run", config(eval={"include_images": True, "num_samples": 64}), retrained=True)
    rows = [
        {
            "stage": "unlearn",
            "step": s,
            "eval/forget_level": s / 9,
            "eval/keep_ratio": 1.0 + s / 100,
            "eval/copies": 0.0,
        }
        for s in range(10)
    ]
    with open(work / "metrics.jsonl", "a") as file:
        file.write("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    chosen = {"rule": "auto", "summary": "t in [10, 20)", "reasons": ["A reason."], "num_steps": 50, "curves": {}}
    (work / "selection.json").write_text(json.dumps(chosen))
    from PIL import Image

    Image.fromarray(np.full((60, 900, 3), 200, np.uint8)).save(work / "selection.png")
    assert main(["--workdir", str(work)]) == 0
    for name, fd in (("a-run-with-a-rather-long-name", 6.0), ("b", 5.0)):
        make_report(root / name, columns=make_columns(2, fd=fd))
    runs = [str(root / "a-run-with-a-rather-long-name"), str(root / "b")]
    assert main(["compare", *runs, "--out", str(root / "out")]) == 0
    return {"report": work / "report.html", "compare": root / "out" / "compare.html"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(find_browser(), tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "compare"])
def test_pages_load_and_fit(pages, browser, tmp_path, name, width):
    # For people who want to see them: the pictures stay where this variable says.
    folder = pathlib.Path(os.environ.get("JAXUNLEARN_SCREENSHOTS") or tmp_path)
    picture = folder / f"{name}_{width}.png"
    seen = browser.look(pages[name], width, picture)
    look = seen.look
    assert seen.errors == []
    assert seen.requests == []
    assert look["scripts"] == 0
    assert width - 20 <= look["width"] <= width  # less a scroll bar
    assert look["scroll"] <= look["width"], look["wide"]
    assert look["wide"] == []
    assert look["broken"] == []
    assert look["unnamed"] == 0
    assert picture.stat().st_size > 10_000
    if name == "compare":
        assert look["plots"] == ["Forgetting against quality of all runs"]
        return
    assert look["images"] >= 12
    assert look["title"] == "Unlearning report (evidence)"
    for plot in (
        "Forgetting against quality",
        "Loss over the steps of unlearning",
        "forget level over the steps of unlearning",
        "Loss on the forget images",
        "Distance of samples to the forget set",
        "Denoising injection",
    ):
        assert plot in look["plots"], plot


def test_the_check_would_notice(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><body><img alt="x" src="data:image/png;base64,AA">'
        '<div style="width:2000px">wide</div><img alt="y" src="http://localhost:9/none.png"><script>undefined.x</script>'
    )
    seen = browser.look(page, 390)
    assert seen.errors
    assert seen.requests == ["http://localhost:9/none.png"]
    assert seen.look["broken"] == ["x", "y"]
    assert seen.look["scripts"] == 1
    assert seen.look["scroll"] > 390
    assert seen.look["wide"]
