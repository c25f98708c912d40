"""Paired differences against independent computations, their coverage, and the verdict."""

import re
from math import comb

import numpy as np
import pytest
from commands import ROOT
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss, roc_auc_score

from detector.evaluation import metrics, paired

MARGIN = 0.03


def balanced(gained, lost, n):
    """Shares of two classes alike, n images in all."""
    return np.array([(gained, lost, n / 2)] * 2)


def judged(right, labels=None, groups=None, margin=MARGIN):
    labels = np.arange(right.shape[1]) % 2 if labels is None else labels
    groups = np.arange(right.shape[1]) if groups is None else groups
    return paired.judge(labels, right, groups, margin)


def rights(gained, lost, n):
    """Right verdicts [2, n] of images in pairs of both classes, evenly spread over the classes."""
    right = np.ones((2, n), bool)
    right[0, :gained] = False
    right[1, gained : gained + lost] = False
    return right


def two_models(n=240, groups=80, seed=0):
    """-> labels, p_fake [2, n], thresholds, groups: a is calibrated, b noisier within groups."""
    rng = np.random.default_rng(seed)
    labels, group = np.arange(n) % 2, np.arange(n) // 2 % groups
    base = 1.5 * (2 * labels - 1) + rng.normal(0, 1, n)
    noise = rng.normal(0, 1, groups)[group] + rng.normal(0, 1, n)
    logits = np.stack([base, base + noise])
    return labels, 1 / (1 + np.exp(-3 * logits)), [0.5, 0.4], group


# ---- against other computations ----


def likelihood_score(gained, lost, n, true):
    """Score statistic of a paired difference, its nuisance share found by numeric maximisation."""
    b, c = gained * n, lost * n

    def loss(share):  # of the second kind of change
        with np.errstate(divide="ignore"):
            logs = np.log([share + true, share, 1 - 2 * share - true])
        return -np.nansum(np.where(np.array([b, c, n - b - c]) > 0, [b, c, n - b - c] * logs, 0))

    low, high = max(0, -true), (1 - true) / 2
    share = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (b - c - n * true) / np.sqrt(n * (2 * share + true - true**2))


@pytest.mark.parametrize("gained, lost, n", [(0.1, 0.04, 50), (0.02, 0.3, 120), (0.25, 0.2, 40)])
def test_the_limits_are_where_the_score_statistic_is_the_quantile(gained, lost, n):
    low, high = paired.difference(np.array([(gained, lost, n)]), 1.96)
    assert likelihood_score(gained, lost, n, low) == pytest.approx(1.96, abs=1e-3)
    assert likelihood_score(gained, lost, n, high) == pytest.approx(-1.96, abs=1e-3)


def test_without_a_change_the_limits_are_those_of_the_score_of_no_event():
    z2 = 1.96**2
    low, high = paired.difference(np.array([(0, 0, 60)]), 1.96)
    assert [low, high] == pytest.approx([-z2 / (60 + z2), z2 / (60 + z2)])


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (5, 1), (3, 3), (0, 9)])
def test_mcnemar_is_the_exact_binomial_test_of_the_images_with_one_right_verdict(only_a, only_b):
    test = paired.mcnemar(rights(only_b, only_a, 20))
    n, fewer = only_a + only_b, min(only_a, only_b)
    p = min(1, 2 * sum(comb(n, k) for k in range(fewer + 1)) / 2**n)
    assert (test["only_a"], test["only_b"]) == (only_a, only_b) and test["p"] == pytest.approx(p)


def test_values_and_intervals_agree_with_a_bootstrap_of_rows_by_scikit_learn():
    labels, p_fake, thresholds, groups = two_models()
    rows = {row["metric"]: row for row in paired.measure(labels, p_fake, thresholds, groups)}
    functions = {"AUC": roc_auc_score, "log-loss": log_loss}
    rng, members = np.random.default_rng(7), [np.flatnonzero(groups == k) for k in range(80)]
    drawn = [np.concatenate([members[k] for k in rng.integers(0, 80, 80)]) for _ in range(300)]
    for name, function in functions.items():
        row = rows[name]
        assert [row["a"], row["b"]] == pytest.approx([function(labels, p) for p in p_fake])
        assert row["difference"]["value"] == pytest.approx(row["b"] - row["a"])
        changes = [
            function(labels[i], p_fake[1, i]) - function(labels[i], p_fake[0, i]) for i in drawn
        ]
        low, high = np.percentile(changes, [2.5, 97.5])
        width = high - low  # both classes weigh the same here, which changes the draws a little
        assert row["difference"]["interval"] == pytest.approx([low, high], abs=0.15 * width)


def test_the_accuracies_are_those_of_both_models_at_their_own_thresholds():
    labels, p_fake, thresholds, groups = two_models()
    (row,) = paired.measure(labels, p_fake, thresholds, groups, drawn=False)
    for k, name in enumerate("ab"):
        right = (p_fake[k] >= thresholds[k]) == labels
        assert row[name] == pytest.approx(
            (right[labels == 0].mean() + right[labels == 1].mean()) / 2
        )
    low, high = row["difference"]["interval"]
    assert row["difference"]["value"] == pytest.approx(row["b"] - row["a"])
    assert low < row["b"] - row["a"] < high


@pytest.mark.parametrize(
    "sizes, shares",
    [
        ((75, 75), ((0, 0.06), (0, 0))),
        ((75, 75), ((0.025, 0.025), (0.025, 0.025))),
        ((75, 75), ((0.05, 0.08), (0.05, 0.08))),
        ((40, 160), ((0.04, 0.1), (0.01, 0.01))),
        ((40, 160), ((0.01, 0.04), (0.01, 0.04))),
    ],
)
def test_the_lower_limit_lies_above_the_true_difference_in_about_5_of_100_samples(sizes, shares):
    rng, above, samples = np.random.default_rng(0), 0, 1500
    true = np.mean([gained - lost for gained, lost in shares])
    for _ in range(samples):
        drawn = [
            (*rng.multinomial(n, [gained, lost, 1 - gained - lost])[:2] / n, n)
            for n, (gained, lost) in zip(sizes, shares, strict=True)
        ]
        above += paired.difference(np.array(drawn), paired.ONE_SIDED)[0] > true + 1e-9
    assert above / samples < 0.07


def test_clustered_changes_widen_the_limits_to_hold():
    """Changes of whole groups of 5 images: 30 groups a class, as if 60 images in all."""
    rng, above, naive, samples = np.random.default_rng(1), 0, 0, 400
    labels, groups = np.repeat([0, 1], 150), np.arange(300) // 5
    for _ in range(samples):
        change = rng.choice([-1, 0, 1], 60, p=[0.15, 0.7, 0.15])[groups]
        right = np.stack([change <= 0, change >= 0])
        for own in (groups, np.arange(300)):
            low = paired.difference(paired.changes(labels, right, own), paired.ONE_SIDED)[0]
            above += low > 0 and own is groups
            naive += low > 0 and own is not groups
    assert above / samples < 0.08 < naive / samples


def widths(labels, p_fake, thresholds, groups):
    """Width of the interval of each drawn difference."""
    rows = paired.measure(labels, p_fake, thresholds, groups)[1:]
    return np.array([np.ptp(row["difference"]["interval"]) for row in rows])


def test_copies_of_an_image_in_one_group_are_no_further_evidence():
    labels, p_fake, thresholds, _ = two_models()
    copies = np.repeat(np.arange(240), 4)
    once = widths(labels, p_fake, thresholds, np.arange(240))
    four = labels[copies], p_fake[:, copies], thresholds
    assert widths(*four, copies)[:2] == pytest.approx(once[:2], rel=0.1)
    assert widths(*four, np.arange(len(copies)))[:2] == pytest.approx(once[:2] / 2, rel=0.15)


def test_what_both_models_share_does_not_widen_the_interval():
    labels, p_fake, thresholds, groups = two_models()
    nudge = np.random.default_rng(3).normal(0, 0.001, len(labels))
    alike = np.stack([p_fake[0], np.clip(p_fake[0] + nudge, 0.001, 0.999)])
    apart = np.ptp(metrics.auc(labels, p_fake[0], groups)["interval"])
    assert widths(labels, alike, thresholds, groups)[0] < 0.1 * apart


# ---- order and identity ----


def test_the_order_of_the_models_flips_every_difference():
    labels, p_fake, thresholds, groups = two_models()
    forth = paired.measure(labels, p_fake, thresholds, groups)
    back = paired.measure(labels, p_fake[::-1], thresholds[::-1], groups)
    for one, other in zip(forth, back, strict=True):
        ends = other["difference"]["interval"]
        assert one["difference"]["value"] == pytest.approx(-other["difference"]["value"])
        assert one["difference"]["interval"] == pytest.approx([-ends[1], -ends[0]], abs=1e-9)
        assert (one["a"], one["only_a"], one["p"]) == (other["b"], other["only_b"], other["p"])
        assert one["better"] == {"a": "b", "b": "a", "": ""}[other["better"]]
    assert {row["better"] for row in forth} == {"a"}  # also of the metrics where lower is better


def test_a_model_against_itself_differs_nowhere():
    labels, p_fake, thresholds, groups = two_models()
    rows = paired.measure(labels, p_fake[[0, 0]], [0.5, 0.5], groups)
    assert {row["difference"]["value"] for row in rows} == {0} == {len(r["better"]) for r in rows}
    accuracy, *drawn = rows
    low, high = accuracy["difference"]["interval"]
    assert low == -high < 0 and (accuracy["only_a"], accuracy["only_b"], accuracy["p"]) == (0, 0, 1)
    assert [row["difference"]["interval"] for row in drawn] == [None] * 3


def test_images_of_one_class_have_their_accuracy_alone():
    labels, p_fake, thresholds, groups = two_models()
    fake = labels == 1
    (row,) = paired.measure(labels[fake], p_fake[:, fake], thresholds, groups[fake], "source")
    assert (row["images"], row["metric"], row["n"]) == ("source", "accuracy on fakes", 120)


# ---- the verdict ----


@pytest.mark.parametrize(
    "gained, lost, n, verdict",
    [
        (0.10, 0.02, 400, "better"),
        (0.03, 0.03, 400, "no worse"),
        (0.00, 0.01, 5000, "slightly worse"),  # the margin decides first
        (0.00, 0.08, 400, "worse"),
        (0.03, 0.06, 200, "unclear"),
        (0.00, 0.00, 60, "unclear"),
        (0.00, 0.00, 160, "no worse"),
    ],
)
def test_the_margin_decides_first_and_zero_second(gained, lost, n, verdict):
    found, (low, high) = paired.verdict(balanced(gained, lost, n), MARGIN)
    assert found == verdict and low < gained - lost < high
    assert (low > -MARGIN) == (verdict in ("better", "no worse", "slightly worse"))


def test_a_smaller_margin_asks_for_more():
    shares = balanced(0.0, 0.01, 5000)
    assert paired.verdict(shares, 0.03)[0] == "slightly worse"
    assert paired.verdict(shares, 0.005)[0] == "worse"


@pytest.mark.parametrize("gained, lost, n", [(3, 3, 120), (1, 3, 120), (0, 0, 50), (4, 10, 200)])
def test_as_many_images_as_are_named_end_the_doubt(gained, lost, n):
    result = judged(rights(gained, lost, n))
    assert result["verdict"] == "unclear" and result["needed"] > n
    shares = gained / n, lost / n
    for times, verdicts in ((1.03, ["no worse", "worse", "slightly worse"]), (0.9, ["unclear"])):
        found, _ = paired.verdict(balanced(*shares, times * result["needed"]), MARGIN)
        assert found in verdicts


@pytest.mark.parametrize("disagree, words", [(0, "About 90 "), (0.05, "About 190 "), (0.1, "320 ")])
def test_the_documented_numbers_of_images_are_enough_and_hardly_more(disagree, words):
    assert words in (ROOT / "docs/evaluation.md").read_text()
    number = int(re.search(r"\d+", words)[0])
    verdicts = [
        paired.verdict(balanced(disagree / 2, disagree / 2, n), MARGIN)[0]
        for n in (0.93 * number, 1.01 * number)
    ]
    assert verdicts == ["unclear", "no worse"]


def test_the_number_named_for_equal_models_is_near_the_normal_formula():
    needed = paired.images_needed(balanced(0.1, 0.1, 100), 100, MARGIN)
    assert needed == pytest.approx(0.2 * (paired.ONE_SIDED / MARGIN) ** 2, rel=0.1)


def test_images_of_few_groups_count_less():
    right, n = rights(6, 6, 400), np.arange(400)
    assert judged(right)["verdict"] == "no worse"
    groups = np.where(n < 12, n // 6, 2 + n % 6)  # a group gains, another loses, six change nothing
    result = judged(right, groups=groups)
    assert result["verdict"] == "unclear" and result["needed"] > 400


def test_a_single_group_tells_nothing():
    result = judged(rights(0, 0, 400), groups=np.zeros(400))
    assert result["verdict"] == "unclear" and result["limits"][0] < -0.5


@pytest.mark.parametrize(
    "gained, lost, n, words",
    [
        (0, 40, 400, "b is worse than a: balanced accuracy changes by -0.100 ("),
        (40, 0, 400, "b is better than a: balanced accuracy changes by +0.100 ("),
        (
            3,
            3,
            120,
            "too few images to tell, about 190 are needed: balanced accuracy changes by +0.000 (",
        ),
    ],
)
def test_the_sentence_names_verdict_limits_margin_and_images(gained, lost, n, words):
    line = paired.sentence(judged(rights(gained, lost, n)), "a", "b")
    assert line.startswith(words) and line.endswith(f" on {n} images, margin 0.03")
