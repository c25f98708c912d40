"""Metrics, sources, calibration and abstention, compared with scikit-learn and simulation."""

import numpy as np
import pytest
from scipy import special, stats
from sklearn import metrics as reference
from sklearn.linear_model import LogisticRegression

from detector.evaluation import intervals, metrics
from detector.evaluation.intervals import share, wilson
from detector.evaluation.metrics import (
    DRAWN,
    METRICS,
    abstention,
    auc,
    base_rates,
    by_source,
    calibration,
    left_interval,
    measure,
    of_both,
    over_sources,
    risk_coverage,
)
from detector.model.threshold import choose_band

SHARES = ("accuracy", "accuracy_real", "accuracy_fake", "precision_real", "precision_fake")


def scored(n=200, seed=0, levels=None, fakes=0.4):
    """Labels and probabilities that are right more often than not.

    `levels`: round the probabilities to this number of steps, so that many are equal.
    """
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < fakes).astype(int)
    p_fake = rng.beta(2 + 2 * labels, 4 - 2 * labels)
    return labels, np.round(p_fake * levels) / levels if levels else p_fake


def measured(labels, p_fake, threshold=0.5):
    """Each image a group of its own."""
    return measure(labels, p_fake, threshold, np.arange(len(labels)))


def width(metric):
    return metric["interval"][1] - metric["interval"][0]


# ---- metrics ----


def even(labels):
    """Weights that give both classes the same sum."""
    return (len(labels) / 2 / np.bincount(labels))[labels]


def expected_metrics(labels, p_fake, threshold):
    """The metrics by scikit-learn, with even weights where the numbers of both classes matter."""
    answered, weight = (p_fake >= threshold).astype(int), even(labels)
    fpr, tpr, _ = reference.roc_curve(labels, p_fake, drop_intermediate=False)
    down, tenth = np.sort(p_fake)[::-1], np.arange(metrics.BINS) * len(labels) // metrics.BINS
    tops = np.unique(down[tenth])[::-1]  # of ten equal bins; equal probabilities stay in one
    bins = [
        np.flatnonzero((p_fake <= top) & (p_fake > below))
        for top, below in zip(tops, [*tops[1:], -1], strict=True)
    ]
    return {
        "accuracy": reference.accuracy_score(labels, answered),
        "auc": reference.roc_auc_score(labels, p_fake),
        "balanced_accuracy": reference.balanced_accuracy_score(labels, answered),
        "average_precision": reference.average_precision_score(
            labels, p_fake, sample_weight=weight
        ),
        "log_loss": reference.log_loss(labels, p_fake, sample_weight=weight),
        "tpr_at_1": tpr[fpr <= 0.01].max(),
        "tpr_at_5": tpr[fpr <= 0.05].max(),
        "fpr_at_95": fpr[tpr >= 0.95].min(),
        "calibration_error": (
            sum(abs((weight[b] * (labels[b] - p_fake[b])).sum()) for b in bins) / len(labels)
        ),
        **{
            f"accuracy_{name}": reference.recall_score(labels, answered, pos_label=i)
            for i, name in enumerate(("real", "fake"))
        },
        **{
            f"precision_{name}": reference.precision_score(
                labels, answered, pos_label=i, zero_division=np.nan
            )
            for i, name in enumerate(("real", "fake"))
        },
    }


@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.8])
@pytest.mark.parametrize("levels", [None, 100, 10], ids=["no ties", "some ties", "ties"])
@pytest.mark.parametrize("seed, fakes", [(0, 0.4), (1, 0.1), (2, 0.8)])
def test_the_metrics_are_those_of_scikit_learn(seed, fakes, levels, threshold):
    labels, p_fake = scored(500, seed, levels, fakes)
    p_fake = p_fake.clip(1e-6, 1 - 1e-6)
    ours = measured(labels, p_fake, threshold)
    expected = expected_metrics(labels, p_fake, threshold)
    assert {*METRICS, *SHARES} == expected.keys()
    assert {name: ours[name]["value"] for name in expected} == pytest.approx(expected, abs=1e-11)
    assert ours["confusion"] == reference.confusion_matrix(labels, p_fake >= threshold).tolist()
    assert (ours["n"], ours["threshold"]) == (500, threshold)


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_scikit_learns_also_with_ties(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 200)
    for values in (rng.integers(0, 4, 200) + labels, rng.normal(size=200), np.ones(200)):
        assert auc(labels, values, np.arange(200))["value"] == pytest.approx(
            reference.roc_auc_score(labels, values)
        )


def test_more_images_of_a_class_do_not_change_metrics_at_even_weights():
    labels, p_fake = scored()
    more = np.concatenate([np.arange(200), np.tile(np.flatnonzero(labels == 0), 4)])
    once, again = measured(labels, p_fake), measured(labels[more], p_fake[more])
    for name in set(METRICS) - {"calibration_error"}:  # its bins hold other images
        assert again[name]["value"] == pytest.approx(once[name]["value"], abs=1e-11), name
    assert again["precision_fake"]["value"] < once["precision_fake"]["value"]


def test_every_metric_states_its_number_of_images():
    labels, p_fake = scored()
    result = measured(labels, p_fake)
    answered = p_fake >= 0.5
    n = {
        **dict.fromkeys([*METRICS, "accuracy"], 200),
        "precision_fake": answered.sum(),
        "precision_real": (~answered).sum(),
        "accuracy_real": (labels == 0).sum(),
        "accuracy_fake": (labels == 1).sum(),
    }
    assert {name: result[name]["n"] for name in n} == n


@pytest.mark.parametrize("size", [1, 8])
def test_intervals_hold_their_values_where_the_bootstrap_is_biased(size):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        p_fake = rng.random(400)  # perfectly calibrated: errors in resamples are larger
        result = measure(
            (rng.random(400) < p_fake).astype(int), p_fake, 0.5, np.arange(400) // size
        )
        for name in METRICS:
            low, high = result[name]["interval"]
            assert 0 <= low <= result[name]["value"] <= high, name
            assert high <= 1 or name == "log_loss"


@pytest.mark.parametrize("label", [0, 1])
def test_a_test_set_of_one_class_has_only_the_accuracy_of_the_class(label):
    result = measured(np.full(20, label), np.linspace(0.1, 0.9, 20))
    own, other = (("real", "fake"), ("fake", "real"))[label]
    assert (
        result[f"accuracy_{own}"]["value"] == 0.5 and result[f"accuracy_{other}"]["value"] is None
    )
    assert all(
        result[name] == {"value": None, "interval": None, "n": 20}
        for name in (*DRAWN, "balanced_accuracy")
    )
    assert (
        base_rates(result) == {}
        and calibration(np.full(20, label), np.full(20, 0.3), np.arange(20)) is None
    )


# ---- balanced accuracy and base rates ----


def of(right, n):
    return share(np.arange(n) < right)


def test_balanced_accuracy_is_the_mean_of_both_with_a_combined_interval():
    real, fake = of(80, 100), of(30, 50)
    result = of_both(real, fake)
    assert (result["value"], result["n"]) == (pytest.approx(0.7), 150)
    theory = 1.96 * np.sqrt(0.8 * 0.2 / 100 + 0.6 * 0.4 / 50) / 2
    assert result["interval"] == pytest.approx([0.7 - theory, 0.7 + theory], abs=0.01)
    assert of_both(of(20, 20), of(20, 20))["interval"] == [
        pytest.approx(1 - (1 - wilson(20, 20)[0]) / np.sqrt(2)),
        1,
    ]
    assert of_both(of(0, 0), fake) == {"value": None, "interval": None, "n": 50}


def test_at_1_percent_fakes_and_3_percent_false_positives_a_quarter_is_right():
    result = base_rates({"accuracy_real": of(97, 100), "accuracy_fake": of(100, 100), "n": 200})
    assert list(result) == ["0.01", "0.1", "0.5"] and {row["n"] for row in result.values()} == {200}
    assert [result[share]["value"] for share in result] == pytest.approx(
        [1 / (1 + 99 * 0.03), 1 / (1 + 9 * 0.03), 1 / 1.03]
    )
    low, high = result["0.01"]["interval"]
    worst, best = wilson(97, 100)
    assert low == pytest.approx(wilson(100, 100)[0] / (wilson(100, 100)[0] + 99 * (1 - worst)))
    assert high == pytest.approx(1 / (1 + 99 * (1 - best)))


def test_without_alarms_there_is_no_precision():
    assert (
        base_rates({"accuracy_real": of(9, 9), "accuracy_fake": of(0, 9), "n": 18})["0.5"]["value"]
        is None
    )


# ---- sources ----


def three_sources():
    """'camera' has only reals, 'generator' only fakes, 'mixed' both."""
    labels, p_fake = scored(300, fakes=0.5)
    sources = np.where(np.arange(300) < 60, "mixed", np.where(labels == 0, "camera", "generator"))
    return labels, p_fake, sources


def test_a_source_of_one_class_is_paired_with_all_images_of_the_other():
    labels, p_fake, sources = three_sources()
    rows = {
        row["source"]: row
        for row in by_source(labels, p_fake, 0.5, sources, np.arange(300), known=["camera"])
    }
    for source, label, paired in (
        ("camera", "real", "with all fake images"),
        ("generator", "fake", "with all real images"),
        ("mixed", "both", ""),
    ):
        row, own = rows[source], sources == source
        pool = own if label == "both" else own | (labels == (label == "real"))
        assert (row["label"], row["paired"], row["n"], row["known"]) == (
            label,
            paired,
            own.sum(),
            source == "camera",
        )
        assert row["auc"]["value"] == pytest.approx(
            reference.roc_auc_score(labels[pool], p_fake[pool])
        )
        right = (p_fake >= 0.5) == labels
        assert row["own"] == (row["balanced_accuracy"] if label == "both" else share(right[own]))
    assert all(row["known"] for row in by_source(labels, p_fake, 0.5, sources, np.arange(300)))


def test_sources_are_listed_worst_first_then_largest_first():
    sources = np.repeat(["a", "b", "c"], [10, 10, 20])
    # 1, 8 and 16 of them are wrong.
    p_fake = np.where(np.arange(40) < np.repeat([1, 18, 36], [10, 10, 20]), 0.9, 0.1)
    rows = by_source(np.zeros(40, int), p_fake, 0.5, sources, np.arange(40))
    assert [(row["source"], row["own"]["value"]) for row in rows] == [
        ("c", 0.2),
        ("b", 0.2),
        ("a", 0.9),
    ]


def test_a_source_of_copies_of_few_pictures_has_a_wide_interval():
    # 133 reals that are 19 pictures, each saved seven times
    labels, p_fake = np.repeat([0, 1], 133), np.repeat(scored(38, 3, fakes=0)[1], 7)
    apart, copied = (
        by_source(labels, p_fake, 0.5, labels.astype(str), clusters)[1]["own"]
        for clusters in (np.arange(266), np.arange(266) // 7)
    )
    assert apart["value"] == copied["value"] and width(copied) > 1.5 * width(apart)


def test_the_worst_source_has_the_lowest_share_or_the_highest_error():
    labels, p_fake, sources = three_sources()
    rows = by_source(labels, p_fake, 0.5, sources, np.arange(300))
    result = over_sources(rows)
    for name, (_, higher) in METRICS.items():
        have = [
            row
            for row in rows
            if not (
                name == "accuracy_real"
                and row["source"] == "generator"
                or name == "accuracy_fake"
                and row["source"] == "camera"
            )
        ]  # pools are no sources
        values = [row[name]["value"] for row in have]
        worst = have[np.argmin(values) if higher else np.argmax(values)]
        assert (result[name]["worst"], result[name]["worst_source"]) == (
            (min if higher else max)(values),
            worst["source"],
        )
        assert result[name]["worst_interval"] == worst[name]["interval"]
        assert (result[name]["n"], result[name]["mean"]) == (
            len(have),
            pytest.approx(np.mean(values)),
        )
        assert result[name]["deviation"] == pytest.approx(np.std(values, ddof=1))
        if name.startswith("accuracy"):
            t = np.clip(
                stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values)), 0, 1
            )
            assert result[name]["interval"] == pytest.approx(t, abs=1e-6)
        else:  # paired with one pool, whose errors they share
            assert result[name]["interval"] is None


def test_one_source_has_no_deviation_and_no_source_no_summary():
    labels, p_fake, sources = three_sources()
    result = over_sources(
        [
            row
            for row in by_source(labels, p_fake, 0.5, sources, np.arange(300))
            if row["source"] == "mixed"
        ]
    )
    assert (
        result["auc"]["deviation"] is result["auc"]["interval"] is None
        and result["auc"]["mean"] == result["auc"]["worst"]
    )
    assert over_sources([]) == {}


# ---- calibration ----


def calibrated(seed, n=600, fakes=0.5, sure=1.0):
    """Labels and probabilities that are calibrated at equal shares of both classes.

    `sure`: a factor of their logits.
    """
    rng = np.random.default_rng(seed)
    z = rng.normal(scale=1.5, size=20 * n)
    labels = (rng.random(len(z)) < special.expit(z)).astype(int)
    rows = np.concatenate(
        [
            np.flatnonzero(labels == i)[:size]
            for i, size in enumerate((n - int(n * fakes), int(n * fakes)))
        ]
    )
    return labels[rows], special.expit(sure * z[rows])


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 100)


@pytest.mark.parametrize("fakes", [0.5, 0.15])
@pytest.mark.parametrize("sure", [-1, 0.01, 0.5, 1, 2, 8])
def test_the_slope_is_that_of_an_unregularised_logistic_regression(few_resamples, sure, fakes):
    labels, p_fake = calibrated(0, fakes=fakes, sure=sure)
    slope = calibration(labels, p_fake, np.arange(600))["slope"]
    fitted = LogisticRegression(C=np.inf, class_weight="balanced", tol=1e-10, max_iter=1000).fit(
        metrics.logit(p_fake)[:, None], labels
    )
    assert slope["value"] == pytest.approx(fitted.coef_[0, 0], rel=1e-5) and slope[
        "value"
    ] == pytest.approx(1 / sure, rel=0.2)
    assert slope["interval"][0] < slope["value"] < slope["interval"][1] and slope["n"] == 600


@pytest.mark.parametrize("fakes", [0.5, 0.2])
def test_a_calibrated_model_stays_below_expected_95_and_an_overconfident_does_not(
    few_resamples, fakes
):
    good = [calibration(*calibrated(seed, fakes=fakes), np.arange(600)) for seed in range(12)]
    sure = [
        calibration(*calibrated(seed, fakes=fakes, sure=2), np.arange(600)) for seed in range(4)
    ]
    assert sum(result["error"] <= result["expected_95"] for result in good) >= 10
    assert (
        sum(
            result["slope"]["interval"][0] <= 1 <= result["slope"]["interval"][1] for result in good
        )
        >= 10
    )
    assert all(result["error"] > result["expected_95"] for result in sure)
    assert all(result["slope"]["interval"][1] < 1 for result in sure)


@pytest.mark.parametrize("fakes", [0.5, 0.05])
def test_calibrated_models_stay_below_expected_95_in_95_of_100_draws(few_resamples, fakes):
    def error(labels, p_fake):
        order = np.argsort(-p_fake)
        return metrics.drawn_metrics(labels[order], p_fake[order], np.ones((1, 600)))[
            "calibration_error"
        ][0]

    true = np.percentile([error(*calibrated(seed, fakes=fakes)) for seed in range(300)], 95)
    stated = np.mean(
        [
            calibration(*calibrated(seed, fakes=fakes), np.arange(600))["expected_95"]
            for seed in range(4)
        ]
    )
    assert 0.93 < stated / true < 1.15


def test_classes_without_overlap_have_no_slope():
    result = calibration(np.repeat([0, 1], 20), np.linspace(0.1, 0.9, 40), np.arange(40))
    assert result["slope"] == {"value": None, "interval": None, "n": 40} and result["error"] > 0


# ---- abstention ----


def test_inside_the_band_there_is_no_verdict_and_no_error():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    p_fake = np.array([0.1, 0.3, 0.5, 0.9, 0.1, 0.3, 0.7, 0.9])
    result = abstention(labels, p_fake, 0.5, [0.3, 0.7], np.arange(8))
    assert result["band"] == [0.3, 0.7]
    assert {name: (m["value"], m["n"]) for name, m in result.items() if name != "band"} == {
        "answered": (0.5, 8),
        "accuracy_answered": (0.5, 4),
        "coverage_real": (0.75, 4),
        "coverage_fake": (0.75, 4),
    }


def test_the_band_keeps_its_stated_rate_of_errors_on_new_images():
    held = {"real": [], "fake": []}
    for seed in range(40):
        (labels, p_fake), (new_labels, new) = scored(300, seed), scored(300, seed + 100)
        result = abstention(
            new_labels, new, 0.5, choose_band(p_fake, labels, 0.5, 0.1).tolist(), np.arange(300)
        )
        for name in held:
            held[name].append(result[f"coverage_{name}"]["value"])
    assert 0.89 < np.mean(held["real"]) < 0.96 and 0.89 < np.mean(held["fake"]) < 0.96


def test_risk_starts_at_the_surest_images_and_ends_at_the_error_rate():
    labels, p_fake = np.array([1, 0, 0, 1]), np.array([0.99, 0.02, 0.7, 0.4])
    assert risk_coverage(labels, p_fake, 0.5) == ([0.25, 0.5, 0.75, 1], [0, 0, 0.3333, 0.5])
    # Sure means far from the threshold. At 0.9, both 0.7 and 0.4 are 'real', and 0.99 is the least
    # sure.
    assert risk_coverage(labels, p_fake, 0.9) == ([0.25, 0.5, 0.75, 1], [0, 0.5, 0.3333, 0.25])
    coverage, risk = risk_coverage(*scored(1000), 0.3)
    wrong = 1 - measured(*scored(1000), 0.3)["accuracy"]["value"]
    assert (
        len(coverage) == 200
        and coverage[-1] == 1
        and risk[-1] == pytest.approx(wrong, abs=1e-4)
        and risk[20] < risk[-1]
    )


# ---- two sets of metrics ----


def recorded(value, low, high):
    return {name: {"value": value, "interval": [low, high]} for name in METRICS}


def test_a_metric_outside_its_interval_is_better_or_worse_by_its_direction():
    before = recorded(0.5, 0.4, 0.6)
    up = {row[0]: row[4] for row in left_interval(recorded(0.7, 0, 1), before)}
    down = {row[0]: row[4] for row in left_interval(recorded(0.3, 0, 1), before)}
    assert up == {name: "better" if higher else "worse" for name, (_, higher) in METRICS.items()}
    assert (up["auc"], up["fpr_at_95"], up["log_loss"]) == ("better", "worse", "worse")
    assert down == {
        name: {"better": "worse", "worse": "better"}[verdict] for name, verdict in up.items()
    }
    assert left_interval({**before, "auc": {"value": 0.7, "interval": None}}, before) == [
        ("auc", "AUC", 0.7, [0.4, 0.6], "better")
    ]


@pytest.mark.parametrize("now", [0.4, 0.5, 0.6, None])
def test_a_metric_in_its_interval_or_without_one_is_not_listed(now):
    assert left_interval(recorded(now, 0, 1), recorded(0.5, 0.4, 0.6)) == []
    assert (
        left_interval(
            recorded(0.9, 0, 1), {name: {"value": 0.5, "interval": None} for name in METRICS}
        )
        == []
    )


def test_the_same_metrics_again_leave_no_interval():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        p_fake = rng.random(300)
        result = measured((rng.random(300) < p_fake).astype(int), p_fake)
        assert left_interval(result, result) == []


def test_the_calibration_error_does_not_depend_on_the_order_of_equal_probabilities():
    labels, groups = np.repeat([0, 1], 50), np.arange(100)
    for order in (np.arange(100), np.arange(100)[::-1], np.random.default_rng(0).permutation(100)):
        assert measure(labels[order], np.full(100, 0.7), 0.5, groups)["calibration_error"][
            "value"
        ] == pytest.approx(0.2)
