"""Intervals: Wilson's of shares, and bootstraps that draw whole groups."""

import numpy as np
import pytest
from scipy import special, stats
from test_metrics import measured, scored, width

from detector.evaluation import intervals
from detector.evaluation.intervals import effective, few, share, wilson
from detector.evaluation.metrics import DRAWN, METRICS, auc, measure

# ---- shares ----


@pytest.mark.parametrize(
    "k, n, low, high",
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, the score method without correction
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 10, 0.0000, 0.2775),
        (10, 10, 0.7225, 1.0000),
        (5, 10, 0.2366, 0.7634),
    ],
)
def test_wilsons_interval_is_the_published_one(k, n, low, high):
    assert wilson(k, n) == pytest.approx([low, high], abs=6e-5)


def test_a_share_of_no_images_has_the_interval_0_to_1():
    assert wilson(0, 0) == [0, 1]
    assert (
        share(np.zeros(0, bool))
        == share(np.zeros(0, bool), np.zeros(0, int))
        == {"value": None, "interval": [0, 1], "n": 0}
    )


@pytest.mark.parametrize("n", [1, 7, 100, 4.3])
def test_wilsons_interval_holds_the_share_and_stays_between_0_and_1(n):
    for k in [*range(int(n) + 1), n]:
        low, high = wilson(k, n)
        assert 0 <= low <= k / n <= high <= 1


@pytest.mark.parametrize(
    "groups", [None, np.arange(40), np.arange(40).astype(str)], ids=["none", "numbers", "names"]
)
def test_a_share_of_independent_images_has_wilsons_interval(groups):
    mask = np.arange(40) < 13
    assert share(mask, groups) == {"value": 13 / 40, "interval": wilson(13, 40), "n": 40}


@pytest.mark.parametrize("copies", [2, 9])
@pytest.mark.parametrize("right", [0, 1, 30, 100])
def test_copies_of_one_picture_count_as_one(right, copies):
    mask = np.arange(100) < right
    copied = share(np.repeat(mask, copies), np.repeat(np.arange(100), copies))
    once, expected = (
        wilson(right, 100),
        (100 if right in (0, 100) else 99 / (stats.t.ppf(0.975, 99) / stats.norm.ppf(0.975)) ** 2),
    )
    assert copied["n"] == 100 * copies and copied["value"] == right / 100
    assert copied["interval"] == pytest.approx(
        wilson(copied["value"] * expected, expected), abs=1e-6
    )
    assert copied["interval"] == pytest.approx(once, abs=0.004)


def test_the_effective_number_follows_how_much_groups_differ():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(50), 10)
    assert 250 < effective(rng.random(500) < 0.5, group) <= 500  # groups do not matter
    assert effective(np.tile([True, False], 250), group) == 500  # exactly alike: no more than n
    assert effective(np.repeat(rng.random(50) < 0.5, 10), group) < 50  # groups decide all
    assert effective(np.ones(500, bool), group) == 50  # no variance: one a group
    assert effective(np.tile([True, False, False], 2), np.zeros(6)) == 0  # one group: no variance


# ---- intervals ----


def test_the_interval_of_a_mean_has_its_theoretical_width():
    labels, p_fake = scored(400)
    losses = -np.log(np.where(labels == 1, p_fake, 1 - p_fake))
    variance = sum(losses[labels == i].var() / (labels == i).sum() for i in (0, 1)) / 4
    assert width(measured(labels, p_fake)["log_loss"]) == pytest.approx(
        2 * 1.96 * np.sqrt(variance), rel=0.1
    )


def test_copies_within_groups_do_not_narrow_an_interval():
    labels, p_fake = scored(60)
    once = measured(labels, p_fake)
    copied = measure(np.repeat(labels, 5), np.repeat(p_fake, 5), 0.5, np.repeat(np.arange(60), 5))
    alone = measured(np.repeat(labels, 5), np.repeat(p_fake, 5))  # as if five times the images
    for name in DRAWN:
        assert copied[name]["interval"] == pytest.approx(once[name]["interval"], abs=1e-9)
    for name in ("auc", "balanced_accuracy", "accuracy_real", "accuracy_fake", "accuracy"):
        assert width(copied[name]) >= 0.99 * width(once[name]) > 1.5 * width(alone[name])


def test_groups_may_have_any_names_and_rows_any_order():
    labels, p_fake = scored(90)
    names = np.array(["b", "a", "c", "d"])[np.random.default_rng(0).integers(0, 4, 90)]
    order = np.random.default_rng(1).permutation(90)
    by_number = measure(labels, p_fake, 0.5, np.unique(names, return_inverse=True)[1])
    assert measure(labels, p_fake, 0.5, names) == by_number == measure(labels, p_fake, 0.5, names)
    shuffled = measure(labels[order], p_fake[order], 0.5, names[order])
    for name in METRICS:
        assert shuffled[name]["interval"] == pytest.approx(by_number[name]["interval"], abs=1e-9)


def test_whole_groups_are_drawn():
    group = np.array([0, 0, 0, 1, 2, 2])
    drawn = np.concatenate(list(intervals.draw_groups(group)))
    assert drawn.shape == (intervals.RESAMPLES, 6)
    assert (drawn[:, 0] == drawn[:, 1]).all() and (drawn[:, 4] == drawn[:, 5]).all()
    assert (drawn[:, [0, 3, 4]].sum(axis=1) == 3).all() and len(np.unique(drawn, axis=0)) == 10


def test_resamples_of_one_class_are_left_out():
    result = measured(np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.4, 0.9]))
    assert all(np.isfinite(result[name]["interval"]).all() for name in DRAWN)
    # All resamples that are left agree.
    result = measured(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9]))
    assert (result["tpr_at_1"]["interval"], result["fpr_at_95"]["interval"]) == (
        wilson(2, 2),
        wilson(0, 2),
    )


def with_group_effect(seed, effect, gap=1.5, groups=5, images=20):
    """Labels, probabilities and groups: five a class, each shifted by its own effect."""
    rng = np.random.default_rng(seed)
    labels, group = np.repeat([0, 1], groups * images), np.repeat(np.arange(2 * groups), images)
    z = (
        rng.normal(size=len(labels))
        + effect * rng.normal(size=2 * groups)[group]
        + gap * (labels - 0.5)
    )
    return labels, special.expit(z), group


@pytest.mark.parametrize("effect", [1.0, 0.5])
def test_intervals_over_few_groups_cover_the_truth_and_over_images_do_not(effect):
    gap, draws = 1.5, 80
    spread = np.sqrt(1 + effect**2)
    truth = {
        "auc": special.ndtr(gap / spread / np.sqrt(2)),
        "balanced_accuracy": special.ndtr(gap / 2 / spread),
    }
    truth["accuracy_real"] = truth["balanced_accuracy"]
    hits = {(unit, name): 0 for unit in ("groups", "images") for name in truth}
    for seed in range(draws):
        labels, p_fake, group = with_group_effect(seed, effect, gap)
        for unit, result in (
            ("groups", measure(labels, p_fake, 0.5, group)),
            ("images", measured(labels, p_fake)),
        ):
            for name, value in truth.items():
                hits[unit, name] += (
                    result[name]["interval"][0] <= value <= result[name]["interval"][1]
                )
    for name in truth:
        assert hits["groups", name] >= 0.88 * draws and hits["images", name] < 0.8 * draws, hits


def test_one_group_in_a_class_gives_no_interval():
    labels, p_fake = scored()
    groups = np.where(labels == 1, 0, np.arange(200) % 7 + 1)
    result = measure(labels, p_fake, 0.5, groups)
    assert all(
        result[name]["interval"] is None and result[name]["value"] is not None for name in DRAWN
    )
    assert auc(labels, p_fake, groups)["interval"] is None
    assert (
        result["accuracy_fake"]["interval"] == [0, 1] and 0 < result["accuracy_real"]["interval"][0]
    )


@pytest.mark.parametrize("real, fake", [(2, 9), (23, 5), (30, 30), (41, 58)])
def test_a_perfect_ranking_is_no_certainty(real, fake):
    labels = np.repeat([0, 1], [real, fake])
    result = measured(labels, np.linspace(0.01, 0.99, real + fake))
    for name, value in (
        ("auc", 1),
        ("average_precision", 1),
        ("tpr_at_1", 1),
        ("tpr_at_5", 1),
        ("fpr_at_95", 0),
    ):
        assert result[name]["value"] == value
        assert result[name]["interval"] == wilson(value * min(real, fake), min(real, fake))
    assert result["auc"] == auc(
        labels, np.linspace(0.01, 0.99, real + fake), np.arange(real + fake)
    )
    copies = measure(
        np.repeat([0, 1], 50), np.repeat([0.1, 0.9], 50), 0.5, np.repeat(np.arange(10), 10)
    )
    assert copies["auc"]["interval"] == wilson(5, 5)


def test_an_interval_from_few_groups_is_wider_by_students_t():
    assert [few(n) for n in (2, 5, 30)] == pytest.approx(
        [stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975) for n in (2, 5, 30)], rel=1e-6
    )
    assert few(1) == few(0) == np.inf
