"""The plots of a report draw the numbers that it states."""

import numpy as np
import pytest
from test_metrics import scored
from test_report import evaluation_report, reported, with_sources

from detector.evaluation import plots


@pytest.fixture
def drawn():
    """Function: (plot, report) -> the axes that it drew on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield lambda plot, found: plot(found).axes[0]
    pyplot.close("all")


@pytest.mark.parametrize("levels", [None, 5], ids=["no ties", "ties"])
def test_the_drawn_roc_has_the_stated_area_and_passes_through_the_operating_point(drawn, levels):
    labels, p_fake = scored(levels=levels)
    found = reported(labels, p_fake.clip(0.001, 0.999))
    _, curve, point = drawn(plots.plot_roc, found).lines
    fpr, tpr = curve.get_data()
    assert np.trapezoid(tpr, fpr) == pytest.approx(found["overall"]["auc"]["value"], abs=1e-11)
    assert f"{found['overall']['auc']['value']:.3f}" in curve.get_label()
    at = np.array(point.get_data()).ravel()
    assert np.abs(np.stack([fpr, tpr], axis=1) - at).sum(axis=1).min() == pytest.approx(
        0, abs=1e-12
    )


def test_the_drawn_confusion_matrix_has_truth_in_rows(drawn):
    found = reported(*scored())
    ax = drawn(plots.plot_confusion, found)
    assert [int(text.get_text()) for text in ax.texts] == np.ravel(
        found["overall"]["confusion"]
    ).tolist()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("verdict", "truth")


def points(ax):
    return np.array(
        [line.get_data() for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    )[:, :, 0]


def test_the_drawn_calibration_lies_on_the_diagonal_where_probabilities_are_true(drawn):
    rng = np.random.default_rng(0)
    p_fake = rng.random(20_000)
    scores = {"labels": (rng.random(20_000) < p_fake).astype(int), "p_fake": p_fake}
    found = points(drawn(plots.plot_calibration, {"encoder": "made-up", "scores": scores}))
    assert len(found) == 10
    assert np.abs(found[:, 0] - found[:, 1]).max() < 0.03


def test_the_drawn_risk_ends_at_the_error_rate_and_the_band_lies_where_it_answers(drawn):
    found = reported(*scored())
    ax = drawn(plots.plot_risk, found)
    coverage, risk = ax.lines[0].get_data()
    assert coverage[-1] == 1 and risk[-1] == pytest.approx(
        1 - found["overall"]["accuracy"]["value"], abs=1e-4
    )
    band = found["abstention"]["overall"]
    assert points(ax).tolist() == [
        [band["answered"]["value"], 1 - band["accuracy_answered"]["value"]]
    ]


def test_the_drawn_sources_are_those_of_the_report_unseen_ones_in_another_colour(drawn):
    found = reported(*with_sources())
    ax = drawn(plots.plot_sources, found)
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [
        row["own"]["value"] for row in found["by_source"]
    ]
    assert [dot.get_color() == "C0" for dot in dots] == [row["known"] for row in found["by_source"]]
    assert plots.plot_sources(reported(*scored())) is plots.plot_robustness(found) is None


def test_the_drawn_robustness_has_a_panel_for_each_distortion_that_starts_untouched(drawn):
    found = evaluation_report()
    ax = drawn(plots.plot_robustness, found)
    assert [a.get_title() for a in ax.figure.axes if a.get_title()] == ["JPEG", "blur"]
    lines = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    rows = found["robustness"][:3]
    assert lines == {
        "reals right": [row["accuracy_real"]["value"] for row in rows],
        "fakes right": [row["accuracy_fake"]["value"] for row in rows],
        "verdicts flipped": [0, *(row["flipped"]["value"] for row in rows[1:])],
    }
