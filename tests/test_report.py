"""Metrics, their intervals and the plots: held against published numbers and against scikit-learn's."""
import json

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as reference

import report
from conftest import ROOT
from report import balanced_accuracy, bootstrap, by_source, measure, share, table, wilson, write_report

METRICS = ("accuracy", "balanced_accuracy", "auc", "precision_real", "recall_real", "precision_fake", "recall_fake")
PLOTS = ("confusion_matrix", "roc", "calibration")


def scored(n=200, seed=0, levels=None, fakes=0.4):
    """Labels and probabilities that lean the right way; `levels`: rounded to so many, so that many tie."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < fakes).astype(int)
    p_fake = rng.beta(2 + 2 * labels, 4 - 2 * labels)
    return labels, np.round(p_fake * levels) / levels if levels else p_fake


def full_metrics(labels, p_fake, threshold=0.5):
    """What write_report takes, with one group an image."""
    return {"encoder": "made-up", "test": measure(labels, p_fake, threshold, np.arange(len(labels))),
            "scores": {"labels": labels.tolist(), "p_fake": p_fake.tolist()}}


# ---- intervals ----

@pytest.mark.parametrize("k, n, low, high", [
    # Newcombe, Statistics in Medicine 17 (1998), table I, the score method without correction
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718),
    (0, 10, 0.0000, 0.2775), (10, 10, 0.7225, 1.0000), (5, 10, 0.2366, 0.7634),
])
def test_wilsons_interval_is_the_published_one(k, n, low, high):
    assert wilson(k, n) == pytest.approx([low, high], abs=6e-5)


def test_of_nothing_everything_is_possible():
    assert wilson(0, 0) == [0, 1]
    assert share(np.zeros(0, bool)) == {"value": None, "interval": [0, 1], "n": 0}


@pytest.mark.parametrize("n", [1, 7, 100])
def test_wilsons_interval_holds_the_share_and_stays_between_0_and_1(n):
    for k in range(n + 1):
        low, high = wilson(k, n)
        assert 0 <= low <= k / n <= high <= 1


def width(interval):
    return interval[1] - interval[0]


def test_the_bootstrap_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(size=400)
    expected = 2 * 1.96 * values.std() / np.sqrt(400)
    assert width(bootstrap(np.mean, np.arange(400), values)) == pytest.approx(expected, rel=0.1)


def test_the_bootstrap_resamples_groups_not_images():
    values = np.random.default_rng(0).normal(size=100)
    repeated, groups = np.repeat(values, 9), np.repeat(np.arange(100), 9)
    alone = bootstrap(np.mean, np.arange(900), repeated)    # nine times the images, so it seems
    grouped = bootstrap(np.mean, groups, repeated)          # the copies say nothing new
    assert width(grouped) == pytest.approx(3 * width(alone), rel=0.15)
    assert grouped == pytest.approx(bootstrap(np.mean, np.arange(100), values), abs=1e-12)


def test_the_bootstrap_takes_any_names_as_groups_in_any_order():
    values, groups = np.random.default_rng(0).normal(size=90), np.array(["b", "a", "c"] * 30)
    by_number = bootstrap(np.mean, np.unique(groups, return_inverse=True)[1], values)
    assert bootstrap(np.mean, groups, values) == by_number
    assert bootstrap(np.mean, np.sort(groups), values[np.argsort(groups, kind="stable")]) == pytest.approx(by_number)


def test_the_bootstrap_repeats_itself_and_leaves_out_resamples_of_one_class():
    labels, fake = np.array([0, 0, 1]), np.array([False, False, True])
    groups = np.arange(3)
    assert bootstrap(balanced_accuracy, groups, labels, fake) == [1, 1]
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap(np.mean, np.arange(50), values) == bootstrap(np.mean, np.arange(50), values)


# ---- metrics ----

@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.8])
@pytest.mark.parametrize("levels", [None, 10], ids=["no ties", "ties"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_metrics_are_those_of_scikit_learn(seed, levels, threshold):
    labels, p_fake = scored(seed=seed, levels=levels)
    answered = (p_fake >= threshold).astype(int)
    ours = measure(labels, p_fake, threshold, np.arange(len(labels)))
    expected = {"accuracy": reference.accuracy_score(labels, answered), "auc": reference.roc_auc_score(labels, p_fake),
                "balanced_accuracy": reference.balanced_accuracy_score(labels, answered)}
    for label, name in enumerate(("real", "fake")):
        expected[f"recall_{name}"] = reference.recall_score(labels, answered, pos_label=label)
        expected[f"precision_{name}"] = reference.precision_score(labels, answered, pos_label=label)
    assert {name: ours[name]["value"] for name in METRICS} == pytest.approx(expected, abs=1e-12)
    assert ours["confusion"] == reference.confusion_matrix(labels, answered).tolist()
    assert (ours["n"], ours["threshold"]) == (200, threshold)


def test_every_metric_lies_in_its_interval_and_says_how_many_images_it_rests_on():
    labels, p_fake = scored()
    found = measure(labels, p_fake, 0.5, np.arange(len(labels)))
    for name in METRICS:
        assert found[name]["interval"][0] <= found[name]["value"] <= found[name]["interval"][1]
    answered = p_fake >= 0.5
    assert [found[name]["n"] for name in METRICS] == [200, 200, 200, (~answered).sum(), (labels == 0).sum(),
                                                      answered.sum(), (labels == 1).sum()]


def test_copies_within_groups_do_not_narrow_the_intervals_of_auc_and_balanced_accuracy():
    labels, p_fake = scored(60)
    once = measure(labels, p_fake, 0.5, np.arange(60))
    copied = measure(np.repeat(labels, 5), np.repeat(p_fake, 5), 0.5, np.repeat(np.arange(60), 5))
    for name in ("auc", "balanced_accuracy"):
        assert copied[name]["interval"] == pytest.approx(once[name]["interval"], abs=1e-9)


def test_sources_are_listed_worst_first_with_their_shares():
    labels, p_fake = np.array([0, 0, 1, 1, 1, 0]), np.array([0.1, 0.6, 0.9, 0.8, 0.2, 0.3])
    sources = np.array(["a", "a", "b", "b", "b", "b"])
    rows = by_source(labels, p_fake, 0.5, sources)
    assert [(r["source"], r["label"], r["n"], r["value"]) for r in rows] == [
        ("a", "real", 2, 0.5), ("b", "fake", 3, 2 / 3), ("b", "real", 1, 1.0)]
    assert all(r["interval"] == wilson(round(r["value"] * r["n"]), r["n"]) for r in rows)


def test_the_table_has_a_line_for_each_metric_with_value_interval_and_number():
    found = measure(*scored(), 0.5, np.arange(200))
    lines = table(found).splitlines()[1:]
    for name, line in zip(METRICS, lines, strict=True):
        low, high = found[name]["interval"]
        assert line.startswith(name.replace("_", " "))
        assert line.split()[-5:] == [f"{found[name]['value']:.3f}", f"{low:.3f}", "..", f"{high:.3f}", str(found[name]["n"])]


# ---- files ----

def parsed(path):
    """JSON as the standard has it: Python's own NaN and Infinity are refused."""
    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}")
    return json.loads(path.read_text(), parse_constant=refuse)


def assert_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 200
        assert np.asarray(image.convert("L")).std() > 5  # something is drawn


@pytest.mark.parametrize("labels, p_fake", [
    scored(), scored(12), scored(fakes=0), scored(fakes=1), (np.array([0, 1]), np.array([0.2, 0.2])),
    (np.array([0] * 20 + [1] * 20), np.repeat([0.0, 1.0], 20)),
], ids=["200 images", "12 images", "reals only", "fakes only", "one answer for all", "all right"])
def test_the_report_is_three_pictures_and_one_json_file_without_nan(tmp_path, labels, p_fake):
    folder = write_report(tmp_path / "a" / "report", full_metrics(labels, p_fake))
    assert sorted(p.name for p in folder.iterdir()) == sorted([*(f"{name}.png" for name in PLOTS), "metrics.json"])
    for name in PLOTS:
        assert_picture(folder / f"{name}.png")
    metrics = parsed(folder / "metrics.json")
    assert metrics == full_metrics(labels, p_fake)
    assert all(0 <= low <= high <= 1 for low, high in (metrics["test"][name]["interval"] for name in METRICS))
    assert "nan" not in table(metrics["test"])


def test_the_report_leaves_no_figure_open_and_can_be_written_again(tmp_path):
    from matplotlib import pyplot
    before = pyplot.get_fignums()
    for seed in (0, 1):
        write_report(tmp_path, full_metrics(*scored(seed=seed)))
    assert pyplot.get_fignums() == before
    assert parsed(tmp_path / "metrics.json")["scores"]["labels"] == scored(seed=1)[0].tolist()


@pytest.fixture
def drawn():
    """Function: (plot, metrics) -> the axes that it drew on."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    yield lambda plot, metrics: plot(metrics).axes[0]
    pyplot.close("all")


@pytest.mark.parametrize("levels", [None, 5], ids=["no ties", "ties"])
def test_the_drawn_roc_has_the_stated_area_and_passes_through_the_operating_point(drawn, levels):
    metrics = full_metrics(*scored(levels=levels))
    _, curve, point = drawn(report.plot_roc, metrics).lines
    fpr, tpr = curve.get_data()
    assert np.trapezoid(tpr, fpr) == pytest.approx(metrics["test"]["auc"]["value"], abs=1e-12)
    assert f"{metrics['test']['auc']['value']:.3f}" in curve.get_label()
    at = np.array(point.get_data()).ravel()
    assert np.abs(np.stack([fpr, tpr], axis=1) - at).sum(axis=1).min() == pytest.approx(0, abs=1e-12)


def test_the_drawn_confusion_matrix_has_truth_in_rows(drawn):
    metrics = full_metrics(*scored())
    ax = drawn(report.plot_confusion, metrics)
    assert [int(text.get_text()) for text in ax.texts] == np.ravel(metrics["test"]["confusion"]).tolist()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("answered", "is")


def test_the_drawn_calibration_lies_on_the_diagonal_where_probabilities_are_true(drawn):
    rng = np.random.default_rng(0)
    p_fake = rng.random(20_000)
    scores = {"labels": (rng.random(20_000) < p_fake).astype(int), "p_fake": p_fake}
    ax = drawn(report.plot_calibration, {"encoder": "made-up", "scores": scores})
    points = np.array([line.get_data() for line in ax.lines if line.get_marker() == "o"])[:, :, 0]
    assert len(points) == 10
    assert np.abs(points[:, 0] - points[:, 1]).max() < 0.03


def test_the_shipped_report_is_complete():
    metrics = parsed(ROOT / "models" / "baseline_report" / "metrics.json")
    assert {"encoder", "test", "by_source", "scores", "audit"} <= metrics.keys()
