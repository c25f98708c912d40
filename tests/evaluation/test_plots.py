"""The plots of a report show its numbers."""

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

    yield lambda plot, result: plot(result).axes[0]
    pyplot.close("all")


@pytest.mark.parametrize("levels", [None, 5], ids=["no ties", "ties"])
def test_the_drawn_roc_has_the_stated_area_and_passes_through_the_operating_point(drawn, levels):
    labels, p_fake = scored(levels=levels)
    result = reported(labels, p_fake.clip(0.001, 0.999))
    _, curve, point = drawn(plots.plot_roc, result).lines
    fpr, tpr = curve.get_data()
    assert np.trapezoid(tpr, fpr) == pytest.approx(result["overall"]["auc"]["value"], abs=1e-11)
    assert f"{result['overall']['auc']['value']:.3f}" in curve.get_label()
    at = np.array(point.get_data()).ravel()
    assert np.abs(np.stack([fpr, tpr], axis=1) - at).sum(axis=1).min() == pytest.approx(
        0, abs=1e-12
    )


def test_the_drawn_confusion_matrix_has_truth_in_rows(drawn):
    result = reported(*scored())
    ax = drawn(plots.plot_confusion, result)
    assert [int(text.get_text()) for text in ax.texts] == np.ravel(
        result["overall"]["confusion"]
    ).tolist()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("verdict", "truth")


def points(ax):
    return np.array(
        [line.get_data() for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    )[:, :, 0]


def test_the_drawn_calibration_of_true_probabilities_is_the_diagonal(drawn):
    rng = np.random.default_rng(0)
    p_fake = rng.random(20_000)
    scores = {"labels": (rng.random(20_000) < p_fake).astype(int), "p_fake": p_fake}
    result = points(drawn(plots.plot_calibration, {"encoder": "made-up", "scores": scores}))
    assert len(result) == 10
    assert np.abs(result[:, 0] - result[:, 1]).max() < 0.03


def test_the_drawn_risk_ends_at_the_error_rate_and_marks_the_band(drawn):
    result = reported(*scored())
    ax = drawn(plots.plot_risk, result)
    coverage, risk = ax.lines[0].get_data()
    assert coverage[-1] == 1 and risk[-1] == pytest.approx(
        1 - result["overall"]["accuracy"]["value"], abs=1e-4
    )
    band = result["abstention"]["overall"]
    assert points(ax).tolist() == [
        [band["answered"]["value"], 1 - band["accuracy_answered"]["value"]]
    ]


def test_the_drawn_sources_are_those_of_the_report_in_two_colours(drawn):
    result = reported(*with_sources())
    ax = drawn(plots.plot_sources, result)
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [
        row["own"]["value"] for row in result["by_source"]
    ]
    assert [dot.get_color() == "C0" for dot in dots] == [
        row["known"] for row in result["by_source"]
    ]
    assert plots.plot_sources(reported(*scored())) is plots.plot_robustness(result) is None


def test_each_distortion_has_a_panel_that_starts_untouched(drawn):
    result = evaluation_report()
    ax = drawn(plots.plot_robustness, result)
    assert [a.get_title() for a in ax.figure.axes if a.get_title()] == ["JPEG", "blur"]
    lines = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    rows = result["robustness"][:3]
    assert lines == {
        "reals right": [row["accuracy_real"]["value"] for row in rows],
        "fakes right": [row["accuracy_fake"]["value"] for row in rows],
        "verdicts flipped": [0, *(row["flipped"]["value"] for row in rows[1:])],
    }
