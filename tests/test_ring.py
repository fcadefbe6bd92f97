"""The study of the ring: methods that are meant to be gentle are, and plain ascent is caught by the collapse rule."""

from __future__ import annotations

import numpy as np
import pytest

from jaxunlearn.forgetting import Measurement, StopRule
from scripts import ring


def test_the_points():
    points = ring.ring(4000, 1).reshape(-1, 2)
    radius = np.linalg.norm(points, axis=1)
    # Of a Gaussian around radius r the mean radius is about r + variance / (2 r).
    np.testing.assert_allclose(radius.mean(), 2 + 0.15**2 / 4, atol=0.01)
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=0.1)
    assert np.linalg.norm(points - ring.POINT, axis=1).min() > ring.NEAR


@pytest.mark.slow
def test_the_whole_study(capsys):
    rows = ring.main([])
    assert rows["before"].deleted < 0.992
    assert rows["retrained"].deleted == 1
    assert rows["retrained"].level == pytest.approx(1)
    for name, distance in {"siss": 0.08, "siss_no_is": 0.08, "npo": 0.15, "simnpo": 0.15, "mirrored": 0.15}.items():
        assert rows[name].deleted > 0.999, name
        assert rows[name].distance < distance, name
        assert rows[name].keep_ratio < 1.05, name
    assert rows["naive"].deleted < 0.998
    last = rows["neggrad"]
    decision = StopRule().decide([Measurement(0, 1.0, 0.0), Measurement(300, last.keep_ratio, last.level)])
    assert decision.reason == "collapsed"
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
