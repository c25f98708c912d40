"""Probes on file facts, telling values, and labels and sources that look wrong."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from detector.evaluation import metrics, probes, rules
from detector.evaluation.probes import (
    boosted,
    cross_validated,
    detector_minus_leak,
    doubtful_sources,
    fold_rows,
    label_errors,
    linear_scores,
    numbers_of,
    probe_all,
    probe_scores,
    ranks,
    telling_values,
)
from detector.images.facts import FACTS

NO_SPLIT = np.full(200, "")


def make_facts(n=200, seed=0):
    """Random facts that give no label away."""
    rng, facts = np.random.default_rng(seed), np.zeros(n, FACTS)
    facts["width"], facts["height"] = 7 * rng.integers(30, 200, (2, n))
    facts["density"] = rng.uniform(0.1, 0.6, n)
    facts["bytes"] = facts["width"] * facts["height"] * facts["density"] * rng.uniform(0.5, 2, n)
    facts["format"] = rng.choice(["JPEG", "PNG", "WEBP"], n)
    facts["quant_mean"], facts["quant_hash"] = rng.uniform(5, 50, n), rng.integers(0, 30, n)
    facts["blockiness"] = rng.normal(1.1, 0.05, n)
    return facts


def half(n=200):
    """Labels: the first half reals."""
    return np.repeat([0, 1], n // 2)


def probed(facts, labels, groups=None, splits=NO_SPLIT, thumb=None):
    """The rows of `probe_all` by name, with blank thumbnails by default."""
    thumb = np.zeros((len(labels), 64), np.uint8) if thumb is None else thumb
    rows = probe_all(
        facts, thumb, labels, np.arange(len(labels)) if groups is None else groups, splits
    )
    return {row["what"]: row for row in rows}


# ---- probes ----


def larger(facts, fake):
    facts["width"][fake] *= 3
    facts["height"][fake] *= 3
    facts["bytes"][fake] *= 9


def square(facts, fake):
    """Reals are upright or lying: no threshold on the ratio separates them from squares."""
    facts["height"][fake] = facts["width"][fake]
    tall = ~fake & (np.arange(len(facts)) % 2 == 0)
    facts["height"][tall] = 2 * facts["width"][tall]
    facts["height"][~fake & ~tall] = facts["width"][~fake & ~tall] // 2


def of_64(facts, fake):
    for side in ("width", "height"):
        facts[side][fake] = facts[side][fake] // 64 * 64 + 64


def busier(facts, fake):
    facts["density"][fake] *= 8
    facts["bytes"][fake] *= 8


def set_to(name, value):
    def change(facts, fake):
        facts[name][fake] = value

    return change


def times(name, factor):
    def change(facts, fake):
        facts[name][fake] = facts[name][fake] * factor

    return change


RAW, PER_PICTURE = "bytes per pixel", "bytes per pixel for what is in the picture"
PLANTS = {
    # what is planted into the fakes: (the change, the probes that must report it, those that may)
    "nothing": (lambda facts, fake: None, set(), set()),
    "larger": (larger, {"pixels"}, set()),
    "square among oblongs": (
        square,
        {"aspect ratio"},
        {"pixels", RAW, PER_PICTURE, "sides that are multiples of 64"},
    ),
    "sides a multiple of 64": (
        of_64,
        {"sides that are multiples of 64"},
        {"aspect ratio", "pixels"},
    ),
    "PNG": (set_to("format", "PNG"), {"format"}, set()),
    "saved worse": (set_to("quant_mean", 60), {"quantisation"}, set()),
    "one quantisation table": (set_to("quant_hash", 77), {"quantisation table"}, set()),
    "saved larger": (times("bytes", 4), {RAW, PER_PICTURE}, set()),
    "busier pictures": (busier, {RAW}, set()),
    "blocks": (times("blockiness", 1.3), {"blockiness"}, set()),
}


@pytest.mark.parametrize("plant, expected, may", PLANTS.values(), ids=PLANTS)
def test_only_the_probes_of_the_planted_facts_separate_the_labels(
    plant, expected, may, monkeypatch
):
    monkeypatch.setattr(probes, "FOLDS", 3)  # quicker
    facts, labels = make_facts(), half()
    plant(facts, labels == 1)
    rows = probed(facts, labels)
    separate = {what for what, row in rows.items() if row["auc"]["interval"][0] >= 0.6}
    assert separate - {"all file facts"} - may == expected - may
    assert ("all file facts" in separate) == bool(expected)
    assert all(rows[what]["auc"]["value"] > 0.8 for what in expected)
    assert rows["8x8 thumbnail"]["auc"]["value"] == pytest.approx(0.5, abs=0.02)
    assert all(row["on_test"] is None for row in rows.values())


def test_thumbnails_that_separate_the_labels_are_found_and_constant_facts_are_no_probes():
    labels, rng = half(), np.random.default_rng(0)
    thumb = (rng.integers(0, 120, (200, 64)) + 60 * labels[:, None]).astype(np.uint8)
    rows = probed(np.repeat(make_facts(1), 200), labels, thumb=thumb)
    assert rows.keys() == {"all file facts", "8x8 thumbnail"}
    assert rows["8x8 thumbnail"]["auc"]["value"] > 0.95
    assert rows["all file facts"]["auc"]["value"] == 0.5


@pytest.mark.long
def test_no_group_is_on_both_sides_so_that_its_mark_gives_nothing_away():
    """400 images of 80 groups: each group has a random size, which identifies it."""
    group = np.repeat(np.arange(80), 5)
    facts = np.repeat(make_facts(80), 5)
    labels = (np.random.default_rng(1).permutation(80) % 2)[group]
    apart, mixed = (
        probed(facts, labels, groups, np.full(400, "")) for groups in (group, np.arange(400))
    )
    for what in ("pixels", "all file facts"):
        assert mixed[what]["auc"]["value"] > 0.9
        assert (
            abs(apart[what]["auc"]["value"] - 0.5) < 0.15
            and apart[what]["auc"]["interval"][0] < 0.5
        )
    features = np.random.default_rng(2).normal(size=(80, 200))[group]
    assert roc_auc_score(labels, linear_scores(features, labels, np.arange(400))) > 0.9
    assert abs(roc_auc_score(labels, linear_scores(features, labels, group)) - 0.5) < 0.15


def test_each_row_is_scored_once_by_a_classifier_not_trained_on_its_group():
    rng = np.random.default_rng(0)
    labels, groups = half(), rng.integers(0, 40, 200)
    seen = []

    def classifier(train, y, test):
        seen.append(test[:, 0])
        assert not np.isin(groups[train[:, 0]], groups[test[:, 0]]).any() and len(np.unique(y)) == 2
        return test[:, 0]

    assert (
        cross_validated(classifier, np.arange(200)[:, None], labels, groups) == np.arange(200)
    ).all()
    assert sorted(np.concatenate(seen)) == list(range(200)) and len(seen) == probes.FOLDS == len(
        fold_rows(labels, groups)
    )


def test_a_class_of_one_group_cannot_be_cross_validated():
    labels = half()
    groups = np.where(labels == 1, 0, np.arange(200))
    assert fold_rows(labels, groups) == []
    assert cross_validated(boosted, np.zeros((200, 1)), labels, groups) is None
    rows = probed(make_facts(), labels, groups)
    assert rows and all(row["auc"] is None for row in rows.values())


@pytest.mark.long
def test_a_probe_trained_on_train_is_tested_on_test():
    """The fakes of train are PNG, those of test are not."""
    facts, labels, splits = make_facts(), half(), np.tile(["train", "test"], 100)
    facts["format"] = np.where((labels == 1) & (splits == "train"), "PNG", "JPEG")
    rows = probed(facts, labels, splits=splits)
    result = rows["format"]
    assert abs(rows["pixels"]["on_test"]["value"] - 0.5) < 0.15  # sizes of test are unseen
    assert (
        result["on_test"]["value"] == 0.5
        and result["on_test"]["n"] == 100
        and result["auc"]["value"] > 0.65
    )
    facts["format"] = np.where(labels == 1, "PNG", "JPEG")
    assert probed(facts, labels, splits=splits)["format"]["on_test"]["value"] == 1


@pytest.mark.parametrize(
    "reals, probed_at_all", [(rules.MIN_IMAGES - 1, False), (rules.MIN_IMAGES, True)]
)
def test_a_class_of_too_few_images_has_no_probes(reals, probed_at_all):
    labels = np.repeat([0, 1], [reals, 200 - reals])
    assert bool(probed(make_facts(), labels)) == probed_at_all


def test_the_probes_beside_a_detector_are_trained_on_its_training_rows_alone():
    facts, labels, rng = make_facts(), half(), np.random.default_rng(0)
    larger(facts, labels == 1)
    train, test = np.split(rng.permutation(200), [120])
    thumb, inverted = rng.integers(0, 255, (200, 64)), labels.copy()
    inverted[test] = 1 - inverted[test]
    result, same = (probe_scores(facts, thumb, y, train, test) for y in (labels, inverted))
    assert (
        list(result) == ["all file facts", "8x8 thumbnail"]
        and roc_auc_score(labels[test], result["all file facts"]) > 0.9
    )
    assert all((result[what] == same[what]).all() for what in result)


def test_facts_become_finite_numbers_and_values_get_ranks_by_frequency():
    assert all(
        np.isfinite(values).all() and values.dtype == float
        for values in numbers_of(make_facts()).values()
    )
    assert ranks(np.array(["b", "a", "b", "c", "a", "b"])).tolist() == [0, 1, 0, 2, 1, 0]
    assert ranks(np.arange(100)).max() == probes.COMMON


# ---- detector and leak ----


def test_the_detector_is_compared_with_the_best_leak():
    labels, rng = half(), np.random.default_rng(0)
    scores = {gap: rng.normal(size=200) + gap * labels for gap in (0.2, 1, 3)}
    for detector, sign in ((3, 1), (0.2, -1)):
        result = detector_minus_leak(
            scores[detector],
            {"weak": rng.normal(size=200), "strong": scores[1]},
            labels,
            np.arange(200),
        )
        assert result["what"] == "strong" and result["difference"]["n"] == 200
        assert (result["detector"], result["leak"]) == pytest.approx(
            [roc_auc_score(labels, scores[gap]) for gap in (detector, 1)]
        )
        assert result["difference"]["value"] == result["detector"] - result["leak"]
        low, high = result["difference"]["interval"]
        assert (
            -1 <= low < result["difference"]["value"] < high <= 1
            and min(sign * low, sign * high) > 0
        )
    assert (
        detector_minus_leak(scores[1], {"weak": scores[3]}, np.zeros(200, int), np.arange(200))
        is None
    )


def test_detector_and_leak_are_compared_in_pairs():
    """Two rankings nearly agree: the interval of their difference is narrow."""
    labels, rng = half(), np.random.default_rng(0)
    scores = rng.normal(size=200) + labels
    result = detector_minus_leak(
        scores + 0.02 * rng.normal(size=200), {"leak": scores}, labels, np.arange(200)
    )["difference"]
    low, high = metrics.auc(labels, scores, np.arange(200))["interval"]
    assert result["interval"][1] - result["interval"][0] < (high - low) / 10
    assert detector_minus_leak(scores, {"leak": scores}, labels, np.arange(200))["difference"][
        "interval"
    ] == [0, 0]


# ---- telling values ----


def every(n):
    return np.arange(400) % n == 0


def of_one_size(facts, mask):
    facts["width"][mask], facts["height"][mask] = 1024, 768


TELLING = {
    # what is reported: (the change, n: planted into every n-th image of one class)
    "PNG files": (set_to("format", "PNG"), 4),
    "files of 1024x768 pixels": (of_one_size, 5),
    "files with both sides multiples of 64": (of_64, 4),
    "files with quantisation table 77": (set_to("quant_hash", 77), 5),
    "files with blockiness among the highest 10%": (set_to("blockiness", 3), 5),
    "files with bytes per pixel among the lowest 10%": (times("bytes", 0.01), 5),
}


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize(
    "what, plant, which", [(what, *planted) for what, planted in TELLING.items()], ids=TELLING
)
def test_a_value_that_one_class_has_far_more_often_is_listed_with_both_shares(
    what, plant, which, label
):
    facts, labels = make_facts(400), half(400)
    facts["format"] = "JPEG"
    plant(facts, (labels == label) & every(which))
    row = next(row for row in telling_values(facts, labels, np.arange(400)) if row["what"] == what)
    shares = (row["real"], row["fake"])
    assert (
        shares[label] == pytest.approx(1 / which, abs=0.02)
        and shares[1 - label] < 0.02
        and row["errors"] >= 4
    )


def test_a_difference_too_small_to_matter_is_not_listed():
    """0.9% of 50,000 fakes are PNG: significant, but too few to matter to a detector."""
    facts, labels = np.repeat(make_facts(1), 100_000), half(100_000)
    facts["format"][labels == 1] = np.where(np.arange(50_000) % 1000 < 9, "PNG", "JPEG")
    facts["format"][labels == 0] = "JPEG"
    assert telling_values(facts, labels, np.arange(100_000)) == []
    facts["format"][labels == 1] = np.where(np.arange(50_000) % 1000 < 11, "PNG", "JPEG")
    assert [row["what"] for row in telling_values(facts, labels, np.arange(100_000))] == [
        "PNG files"
    ]


def test_telling_values_are_listed_clearest_first():
    facts, labels = make_facts(), half()
    facts["format"][labels == 0], facts["format"][labels == 1] = (
        "JPEG",
        np.where(np.arange(100) % 2, "PNG", "JPEG"),
    )
    facts["quant_hash"][labels == 1] = 77
    result = telling_values(facts, labels, np.arange(200))
    assert [row["what"] for row in result] == ["files with quantisation table 77", "PNG files"]
    assert [(row["real"], row["fake"]) for row in result] == [(0, 1), (0, 0.5)] and result[0][
        "errors"
    ] > result[1]["errors"]


@pytest.mark.parametrize("often, telling", [(0.64, False), (0.96, True)])
def test_a_value_is_telling_from_three_times_as_often_on(often, telling):
    facts, labels = np.repeat(make_facts(1), 2000), half(2000)
    facts["format"] = np.where(
        np.arange(2000) % 100 < 100 * np.where(labels == 1, often, 0.32), "PNG", "WEBP"
    )
    facts["format"][np.arange(2000) % 100 >= 98] = "GIF"
    values = [row["what"] for row in telling_values(facts, labels, np.arange(2000))]
    assert ("PNG files" in values) == telling


@pytest.mark.parametrize(
    "facts", [make_facts(), np.repeat(make_facts(1), 200)], ids=["random facts", "constant facts"]
)
def test_random_labels_have_no_telling_values(facts):
    for seed in range(10):
        labels = np.random.default_rng(seed).permutation(half())
        assert telling_values(facts, labels, np.arange(200)) == []
    assert telling_values(facts, np.zeros(200, int), np.arange(200)) == []


def test_a_value_of_one_group_is_no_property_of_the_class():
    facts, labels = make_facts(), half()
    facts["format"] = np.where(np.arange(200) >= 160, "PNG", "JPEG")  # 40 of 100 fakes: one source
    assert "PNG files" in [row["what"] for row in telling_values(facts, labels, np.arange(200))]
    assert "PNG files" not in [
        row["what"] for row in telling_values(facts, labels, np.arange(200) // 40)
    ]


# ---- labels ----


@pytest.mark.parametrize("fakes", [0.5, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_label_errors_are_those_of_cleanlab_clearest_first(seed, fakes):
    from cleanlab.filter import find_label_issues

    rng = np.random.default_rng(seed)
    labels = (rng.random(300) < fakes).astype(int)
    p_fake = 1 / (1 + np.exp(-rng.normal(2 * seed * (labels - 0.5), 1.5)))
    labels = np.where(rng.random(300) < 0.1, 1 - labels, labels)
    result = label_errors(labels, p_fake)
    expected = find_label_issues(
        labels, np.stack([1 - p_fake, p_fake], axis=1), filter_by="confident_learning", n_jobs=1
    )
    assert set(result) == set(np.flatnonzero(expected)) and len(result)
    margin = np.where(labels == 1, 2 * p_fake - 1, 1 - 2 * p_fake)[result]
    assert (np.diff(margin) >= 0).all() and margin.max() < 0


def test_labels_that_fit_and_a_single_class_have_no_errors():
    assert len(label_errors(half(), np.where(half() == 1, 0.9, 0.1))) == 0
    assert len(label_errors(np.zeros(20, int), np.linspace(0, 1, 20))) == 0


def test_planted_label_errors_are_found_in_features_by_a_linear_classifier():
    rng, labels = np.random.default_rng(0), half()
    features = rng.normal(size=(200, 8)) + 5 * labels[:, None] * (np.arange(8) < 2)
    given = labels.copy()
    given[::25] = 1 - given[::25]
    result = label_errors(given, linear_scores(features, given, np.arange(200)))
    # Of the eight errors, those with a probability above the mean of their class.
    assert {*result} <= {*range(0, 200, 25)} and len(result) >= 4


SOURCES = {
    # name: (n, number wrong, is it doubtful?)
    "swapped": (30, 30, True),
    "mostly wrong": (60, 50, True),
    "three quarters wrong": (60, 45, False),
    "half": (60, 30, False),
    "too few": (29, 29, False),
    "fine": (60, 3, False),
    "": (60, 60, False),
}


@pytest.mark.parametrize("label", [0, 1])
def test_a_source_of_one_class_that_is_mostly_wrong_is_doubtful(label):
    sources = np.repeat(list(SOURCES), [n for n, _, _ in SOURCES.values()])
    wrong = np.concatenate([np.arange(n) < bad for n, bad, _ in SOURCES.values()])
    labels, alone = np.full(len(sources), label), np.arange(len(sources))
    rows = doubtful_sources(labels, np.where(wrong == label, 0.2, 0.8), sources, alone)
    assert [row["source"] for row in rows] == sorted(
        name for name, (_, _, doubtful) in SOURCES.items() if doubtful
    )
    for row in rows:
        n, bad, _ = SOURCES[row["source"]]
        assert (row["n"], row["value"], row["labels"]) == (
            n,
            pytest.approx(1 - bad / n),
            [("real", "fake")[label]],
        )


def test_copies_of_a_picture_make_no_source_doubtful():
    wrong, sources = np.full(60, 0.9), np.full(60, "camera")
    labels = np.zeros(60, int)
    assert doubtful_sources(labels, wrong, sources, np.arange(60))
    assert doubtful_sources(labels, wrong, sources, np.arange(60) % 3) == []


@pytest.mark.parametrize(
    "reals, fakes, gap, doubtful",
    [
        (30, 30, -2, True),
        (30, 30, 0, False),
        (30, 30, 2, False),
        (40, 15, -2, True),
        (60, 14, -2, False),
        (14, 15, -2, False),
    ],
)
def test_a_source_whose_fakes_look_more_real_than_its_reals_is_doubtful(
    reals, fakes, gap, doubtful
):
    labels, rng = np.repeat([0, 1], [reals, fakes]), np.random.default_rng(0)
    # Nearly all are called fake, so that the accuracy does not depend on the order.
    p_fake = 1 / (1 + np.exp(-rng.normal(gap * labels + 3)))
    rows = doubtful_sources(labels, p_fake, np.full(len(labels), "pairs"), np.arange(len(labels)))
    assert len(rows) == doubtful
    for row in rows:
        assert (row["what"], row["labels"], row["n"]) == ("AUC", ["real", "fake"], reals + fakes)
        assert (
            row["value"] == pytest.approx(roc_auc_score(labels, p_fake))
            and row["interval"][1] < probes.MAX_AUC
        )


def test_many_small_groups_are_split_without_weighing_each(monkeypatch):
    monkeypatch.setattr(probes, "MANY_GROUPS", 2000)
    labels = np.repeat(np.random.default_rng(0).integers(0, 2, 3000), 2)
    groups = np.repeat(np.arange(3000), 2)  # two views of each image
    folds = fold_rows(labels, groups, 0)
    tests = [test for _, test in folds]
    assert len(folds) == probes.FOLDS
    assert np.array_equal(np.sort(np.concatenate(tests)), np.arange(6000))
    for train, test in folds:
        assert not set(groups[train]) & set(groups[test]) and len(train) + len(test) == 6000
        assert abs(labels[test].mean() - labels.mean()) < 0.01 and len(test) == 1200
    assert not np.array_equal(tests[0], fold_rows(labels, groups, 1)[0][1])  # another seed
    alone = np.where(labels == 1, 6000, np.arange(6000))
    assert fold_rows(labels, alone) == []  # one class is one group


def test_a_large_group_among_many_is_weighed_by_scikit_learns_splitter(monkeypatch):
    labels, groups = np.arange(4000) % 2, np.r_[np.zeros(1000, int), np.arange(1, 3001)]
    monkeypatch.setattr(probes, "MANY_GROUPS", 2000)
    theirs = StratifiedGroupKFold(probes.FOLDS, shuffle=True, random_state=0).split(
        labels, labels, groups
    )
    for ours, expected in zip(fold_rows(labels, groups, 0), theirs, strict=True):
        assert np.array_equal(ours[1], expected[1])
