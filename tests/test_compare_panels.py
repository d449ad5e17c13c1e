"""The picture of a comparison: its bands against the tables' intervals, and what it says."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
import pytest

from riskpo.compare import numbers
from riskpo.compare.panels import (
    Page,
    by_step,
    covariances,
    half_width,
    pass_at_k,
    pass_rise,
    smoothed,
    strata,
)
from riskpo.compare.plot import headline
from riskpo.metrics.intervals import t_interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend has to be chosen first


def drawn(draw, page):
    """The panel, on an axis of its own."""
    axis = plt.figure().add_subplot()
    draw(axis, page)
    plt.close(axis.figure)
    return axis


def words(axis):
    return [text.get_text() for text in axis.texts]


def band(axis, i):
    """(lower, upper) ends of the i-th band at its last step."""
    corners = axis.collections[i].get_paths()[0].vertices
    last = corners[corners[:, 0] == corners[:, 0].max(), 1]
    return last.min(), last.max()


def page_of(logs, against="a"):
    """{system: [numbers of a step, by step, by seed]} as a page."""
    runs = {
        (system, seed): numbers.by_step([{"step": i + 1, **r} for i, r in enumerate(rows)])
        for system, seeds in logs.items()
        for seed, rows in enumerate(seeds)
    }
    return Page(runs, against)


def test_bands_are_the_intervals_of_the_tables():
    """One system's spread stays out of another's band; a share's band ends at 0."""
    values = {"a": [0.01, 0.02, 0.03], "b": [0.0, 0.5, 0.1], "c": [0.02, 0.03, 0.04]}
    page = page_of({s: [[{"clip_fraction": v}] * 2 for v in y] for s, y in values.items()})
    axis = drawn(by_step("clip_fraction", band=True, share=True), page)
    expected = {s: t_interval(y) for s, y in values.items()}
    for i, x in enumerate(expected.values()):
        assert band(axis, i) == pytest.approx((max(x.low, 0.0), x.high))
    assert expected["b"].low < 0 < expected["a"].high < 0.05
    axis = drawn(by_step("clip_fraction", band=True, minus=True, zero=True), page)
    pairs = zip(values["b"], values["a"], strict=True)
    x = t_interval([b - a for b, a in pairs])
    assert band(axis, 0) == pytest.approx((x.low, x.high))
    assert band(axis, 1) == pytest.approx((0.01, 0.01))  # c is .01 above a on every seed
    assert half_width(pd.DataFrame(np.ones((1, 4)))).tolist() == [0.0] * 4


def test_the_covariance_panel_adds_up():
    row = {"cov_mean": 0.5, "cov_mvar": 0.2, "cov_upper": 0.4}
    page = page_of({"a": [[row, {}, row]] * 2, "b": [[{}]] * 2})
    axis = drawn(covariances, page)
    assert axis.lines[0].get_ydata() == pytest.approx([0.3, 0.4, -0.1])
    assert words(drawn(covariances, page_of({"a": [[{}]]}))) == ["not logged"]


def test_a_panel_says_what_it_lacks():
    page = page_of({"a": [[{"mvar": 1.0}]], "b": [[{}]], "c": [[{}]]})
    assert drawn(by_step("mvar"), page).get_xlabel() == "step (not logged by b, c)"
    assert words(drawn(by_step("q_beta"), page)) == ["not logged"]
    assert words(drawn(by_step("mvar", minus=True), page)) == ["nothing to compare with"]
    for draw in (pass_at_k, pass_rise, strata):
        assert words(drawn(draw, page)) == ["no held-out questions"]
    page.runs = {(s, 0): numbers.by_step([], [{"step": 0, "pass@1": 0.5}]) for s in "abc"}
    assert words(drawn(strata, page)) == ["no strata"]
    assert drawn(pass_at_k, page).get_xticklabels()[0].get_text() == "1"


def test_systems_look_different_and_the_headline_is_right():
    page = page_of({f"s{i}": [[{"mvar": 1.0}] * 45] * 2 for i in range(20)}, "s0")
    assert len({tuple(style.values()) for style in page.style.values()}) == 20
    assert headline(page).startswith("2 seeds, 45 steps; lines: means, smoothed over 3 steps; band")
    impulse = smoothed(pd.DataFrame(np.eye(45)), page.window).loc[20]
    assert (impulse > 0).sum() == 3  # as wide as the headline has it
    single = headline(page_of({"a": [[{}]]}))
    assert single == "1 seed, 1 step; lines: means; no intervals from one seed"


def test_a_step_without_an_update_leaves_no_hole():
    rows = pd.DataFrame([[np.nan, 1.0, np.nan, 3.0, np.nan], [np.nan] * 5])
    values, none = smoothed(rows, 1).to_numpy()
    assert np.isnan(values[0]) and values[1:].tolist() == [1.0, 1.0, 3.0, 3.0]
    assert np.isnan(none).all()
    (wide,) = smoothed(pd.DataFrame([[np.nan, 1.0, 4.0, 4.0]]), 3).to_numpy()
    assert np.isnan(wide[0]) and wide[1:].tolist() == [2.5, 3.0, 4.0]
