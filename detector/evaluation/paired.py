"""Compare two models, a and b, on the same images: paired differences and a verdict.

    rows = measure(labels, p_fake, thresholds, groups)      # differences with intervals
    judged = judge(labels, right, groups, margin=0.03)      # is b no worse than a?

Every difference is b minus a. Both models see the same images and share most of their luck. The
interval of the difference is therefore much narrower than the intervals of both models suggest.
"""

from itertools import chain

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest

from detector.base.constants import CLASSES
from detector.evaluation import metrics
from detector.evaluation.metrics import METRICS

MARGIN = 0.03  # of balanced accuracy, by which a new version may be worse
TWO_SIDED, ONE_SIDED = 1.959964, 1.644854  # normal quantiles of 95%
DRAWN = {"auc": 1.0, "log_loss": np.inf, "calibration_error": 1.0}  # largest possible difference
GROWTH, MOST = 1.02, 1e5  # steps of `images_needed`, and the factor where it gives up
VERDICTS = {
    "better": "better than",
    "no worse": "no worse than",
    "slightly worse": "worse, but within the margin, than",
    "worse": "worse than",
}


# ---- right and wrong verdicts ----


def verdicts_right(labels, p_fake, thresholds):
    """Labels [n], probabilities [2, n], both models' thresholds -> bool [2, n]."""
    return (p_fake >= np.reshape(thresholds, (2, 1))) == labels


def limits(gained, lost, n, z):
    """Limits of `gained - lost`, a difference of paired shares of n images, at normal quantile z.

    The score interval of Tango (Statistics in Medicine 17, 1998). It also holds where few images
    or none change. `n` may be a fraction. [-1, 1] where n is 0.
    """
    if n == 0:
        return [-1.0, 1.0]
    value = gained - lost

    def excess(true):
        """Squared distance to the difference `true`, less z^2 times the variance under it."""
        b = (2 - value) * true - gained - lost
        root = np.sqrt(max(0.0, b * b + 8 * lost * true * (1 - true)))
        return (value - true) ** 2 - z * z / n * ((root - b) / 2 + true * (1 - true))

    # At `value` itself the excess is 0 where no image changes.
    return [
        end if abs(value - end) < 1e-6 else float(brentq(excess, value + end * 1e-9, end))
        for end in (-1.0, 1.0)
    ]


def worth(change, groups):
    """Effective number of independent images, at most n, for the mean of int [n] in {-1, 0, 1}.

    As `metrics.effective`. Where nothing changes, no variance between groups is seen. Each image
    then counts as if a single one changed.
    """
    n, number = len(change), len(np.unique(groups))
    if change.any() or number == n:
        return metrics.effective(change, groups)
    return n * (1 - 1 / number) / metrics.few(number) ** 2


def changes(labels, right, groups):
    """Labels [n], right verdicts [2, n], groups [n] -> (gained, lost, effective n) of each class.

    Gained: the share on which only b is right. Lost: the share on which only a is right.
    """
    shares = []
    for label in np.unique(labels):
        own = labels == label
        change = right[1, own].astype(int) - right[0, own]
        shares.append((np.mean(change > 0), np.mean(change < 0), worth(change, groups[own])))
    return shares


def together(shares):
    """Shares of `changes` -> (gained, lost, effective n), both classes weighing the same.

    The mean shares of n images have the variance of the mean of both classes. Where nothing
    changes, n is twice that of the smaller class.
    """
    gained, lost, n = np.array(shares, float).T
    if not n.all():
        return gained.mean(), lost.mean(), 0.0
    variance = (variance_of(gained, lost) / n).sum() / len(n) ** 2
    both, even = variance_of(gained.mean(), lost.mean()), len(n) ** 2 / (1 / n).sum()
    worth = min(even, both / variance) if variance else len(n) * n.min()
    return gained.mean(), lost.mean(), float(worth)


def variance_of(gained, lost):
    """Variance of an image's change in {-1, 0, 1}."""
    return gained + lost - (gained - lost) ** 2


def difference(shares, z=TWO_SIDED):
    """Shares of `changes` -> (difference of the balanced accuracy, its limits)."""
    gained, lost, n = together(shares)
    return float(gained - lost), limits(gained, lost, n, z)


def mcnemar(right):
    """Right verdicts, bool [2, n] -> {only_a, only_b, p}: McNemar's exact test.

    The test takes all images as independent.
    """
    only_a, only_b = (int((right[k] & ~right[1 - k]).sum()) for k in (0, 1))
    p = binomtest(only_b, only_a + only_b).pvalue if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p": float(p)}


# ---- is b no worse than a? ----


def verdict(shares, margin):
    """Shares of `changes` -> (verdict, one-sided 95% limits of the balanced accuracy).

    'better', 'no worse' and 'slightly worse' exclude a loss of more than the margin. The margin
    decides first: 'slightly worse' is a loss beyond doubt, and smaller than the margin.
    """
    low, high = difference(shares, ONE_SIDED)[1]
    if low > -margin:
        return "better" if low > 0 else "slightly worse" if high < 0 else "no worse", (low, high)
    return "worse" if high < 0 else "unclear", (low, high)


def images_needed(shares, n, margin):
    """About how many images end an 'unclear' verdict, if all shares stay as they are, or None.

    The smallest multiple of n whose interval leaves 0 or the margin, to two digits. Without a
    difference, and with the share d of images on which the models disagree, this is about
    d (1.645 / margin)^2.
    """
    factor = 1.0
    while factor < MOST:
        factor *= GROWTH
        if verdict([(*share, factor * m) for *share, m in shares], margin)[0] != "unclear":
            return int(float(f"{n * factor:.2g}"))
    return None


def judge(labels, right, groups, margin=MARGIN):
    """Labels [n], right verdicts [2, n], groups [n] -> {verdict, value, limits, needed, ...}."""
    shares, n = changes(labels, right, groups), len(labels)
    found, ends = verdict(shares, margin)
    return {
        "verdict": found,
        "value": difference(shares)[0],
        "limits": list(ends),
        "margin": margin,
        "n": n,
        "needed": images_needed(shares, n, margin) if found == "unclear" else None,
    }


def sentence(judged, a, b):
    """A result of `judge` in words; `a` and `b` name the models."""
    low, high = judged["limits"]
    ends = (
        f"balanced accuracy {judged['value']:+z.3f}, one-sided 95% limits {low:+z.3f} and"
        f" {high:+z.3f}, margin {judged['margin']:g}, {judged['n']} images"
    )
    if judged["verdict"] == "unclear":
        about = f", about {judged['needed']} are needed" if judged["needed"] else ""
        return f"too few images to tell{about}: {ends}"
    return f"{b} is {VERDICTS[judged['verdict']]} {a}: {ends}"


# ---- all metrics ----


def bootstrap(labels, p_fake, groups):
    """Labels [n], probabilities [2, n] -> {metric of DRAWN: (a, b, interval of b minus a)}.

    The resamples depend on the groups alone, so the difference is taken draw by draw. There is no
    interval where no resample differs.
    """
    orders = np.argsort(-p_fake, axis=1, kind="stable")

    def values(weight):
        of_both = [
            metrics.drawn_metrics(labels[order], p[order], weight[:, order])
            for p, order in zip(p_fake, orders, strict=True)
        ]
        return np.array([[one[name] for one in of_both] for name in DRAWN])

    weights = chain([np.ones((1, len(labels)))], metrics.draw_groups(groups))
    drawn = np.concatenate([values(weight) for weight in weights], axis=2)  # first: without a draw
    number = metrics.groups_of_rarer_class(labels, groups)
    return {
        name: (a[0], b[0], interval(b - a, number, most))
        for (name, most), (a, b) in zip(DRAWN.items(), drawn, strict=True)
    }


def interval(change, number, most):
    """The difference, then its bootstrap -> `metrics.interval`, or None where all are equal."""
    if np.nanstd(change) < 1e-9:
        return None
    return metrics.interval(change[0], change[1:], number, -most, most)


def measure(labels, p_fake, thresholds, groups, images="all", drawn=True):
    """Labels int [n], probabilities float64 [2, n], both thresholds, groups [n] -> table rows.

    A row: {images, metric, n, a, b, difference, better, only_a, only_b, p}. `better` is 'a' or 'b'
    where the interval excludes 0. The last three are McNemar's test, in the row of accuracy. That
    row is the only one of a single class, and without `drawn`.
    """
    right, classes = verdicts_right(labels, p_fake, thresholds), np.unique(labels)
    both, test = len(classes) == 2, mcnemar(right)
    accuracy = "balanced_accuracy" if both else f"accuracy_{CLASSES[classes[0]]}"
    means = [np.mean([one[labels == label].mean() for label in classes]) for one in right]
    rows = {accuracy: (*means, difference(changes(labels, right, groups))[1])}
    rows |= bootstrap(labels, p_fake, groups) if both and drawn else {}
    return [
        {
            "images": images,
            "metric": METRICS[name][0],
            "n": len(labels),
            "a": float(a),
            "b": float(b),
            "difference": {"value": float(b - a), "interval": ends, "n": len(labels)},
            "better": better(ends, METRICS[name][1]),
            **(test if name == accuracy else dict.fromkeys(test)),
        }
        for name, (a, b, ends) in rows.items()
    ]


def better(ends, higher):
    """Interval of b minus a -> 'a' or 'b' where it excludes 0, else ''."""
    low, high = ends or (0, 0)
    return "" if low <= 0 <= high else "b" if (low > 0) == higher else "a"
