"""The study of the half-moons: its measures, and (slow) at a small size and as a whole."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from tests.tiny_model import quick_compilation  # noqa: F401


@pytest.fixture(scope="module")
def half_moons():
    from tests.conftest import REPOSITORY

    spec = importlib.util.spec_from_file_location("half_moons", REPOSITORY / "scripts" / "half_moons.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_measures(half_moons):
    upper, lower = (half_moons.moon(500, u, 3).reshape(-1, 2) for u in (True, False))
    np.testing.assert_allclose(np.mean(half_moons.off_the_moon(upper, True)), 0.05 * np.sqrt(2 / np.pi), rtol=0.2)
    assert np.median(half_moons.off_the_moon(upper, False)) > 0.3
    assert half_moons.sliced_distance(upper, upper) == 0
    # A shift by s has the distance s times the mean of |cos|.
    np.testing.assert_allclose(half_moons.sliced_distance(upper + [0.3, 0.0], upper), 0.3 * 2 / np.pi, rtol=1e-2)
    row = half_moons.measure("both", (0, 1), np.concatenate([upper, lower]), upper)
    assert 0.4 < row.forget_share < 0.55
    assert row.stray_share < 0.01
    far = half_moons.measure("far", (0, 1), upper + 5, upper)
    assert (far.forget_share, far.stray_share) == (0, 1)
    assert half_moons.windows(2) == [("all t", (0, 1000)), ("[0, 500)", (0, 500)), ("[500, 1000)", (500, 1000))]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.slow
def test_a_small_study_writes_a_table_and_a_picture(half_moons, tmp_path, capsys):
    path = tmp_path / "moons.png"
    size = ["--base-steps=20", "--steps=3", "--batch-size=16", "--width=8", "--samples=40", "--windows=2"]
    tables = half_moons.main([*size, f"--output={path}"])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000
    lines = capsys.readouterr().out.splitlines()
    assert set(tables) == {"neggrad", "siss"}
    assert len(lines) == 2 + 2 * 4
    for rows in tables.values():
        assert [r.name for r in rows] == ["before", "all t", "[0, 500)", "[500, 1000)"]
        assert all(np.isfinite(r.distance) for r in rows)


@pytest.mark.slow
def test_the_whole_study_shows_where_the_moon_is_unlearned(half_moons, tmp_path):
    tables = half_moons.main([f"--output={tmp_path / 'moons.png'}"])
    before = tables["neggrad"][0]
    assert 0.4 < before.forget_share < 0.55
    assert before.stray_share < 0.08
    ascent = {r.name: r for r in tables["neggrad"][1:]}
    # At small t the moon stays; a little above it goes with little damage; at large t it goes and the rest goes with it.
    assert ascent["[0, 200)"].forget_share > 0.15
    assert ascent["[200, 400)"].forget_share < 0.1
    assert ascent["[200, 400)"].stray_share < 0.75 * ascent["[800, 1000)"].stray_share
    for row in tables["siss"][1:]:
        assert row.forget_share < 0.12
        assert row.distance < before.distance
