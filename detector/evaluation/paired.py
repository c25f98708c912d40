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

from detector.base.constants import CLASSES, MARGIN
from detector.evaluation import intervals, metrics
from detector.evaluation.metrics import METRICS

TWO_SIDED, ONE_SIDED = 1.959964, 1.644854  # normal quantiles of 95%
DRAWN = {"auc": 1.0, "log_loss": np.inf, "calibration_error": 1.0}  # largest possible difference
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


def changes(labels, right, groups):
    """Labels [n], right verdicts [2, n], groups [n] -> float64 [classes, 3].

    A row: the share on which only b is right (gained), that on which only a is (lost), and the
    effective number of images (`intervals.effective`). Without any change no variance between
    groups is seen. The number is then as if a single image had changed.
    """
    shares = []
    for label in np.unique(labels):
        own = labels == label
        change = right[1, own].astype(int) - right[0, own]
        seen = change if change.any() else np.eye(1, len(change))[0]
        worth = max(1, intervals.effective(seen, groups[own]))
        shares.append((np.mean(change > 0), np.mean(change < 0), worth))
    return np.array(shares)


def together(shares):
    """Shares of `changes` -> (gained, lost, effective n), all classes weighing the same.

    At this n, the mean shares have the variance of the mean of the classes. Where nothing changes,
    the smaller class decides.
    """
    gained, lost, n = np.vstack([shares, shares.mean(axis=0)]).T
    classes, variance = len(shares), gained + lost - (gained - lost) ** 2
    of_mean = (variance / n)[:-1].sum() / classes**2
    even = classes**2 / (1 / n[:-1]).sum()  # where all classes have the same variance
    worth = min(even, variance[-1] / of_mean) if of_mean else classes * n.min()
    return gained[-1], lost[-1], worth


def difference(shares, z=TWO_SIDED):
    """Shares of `changes` -> limits of the difference of the balanced accuracy at quantile z.

    The score interval of paired shares (Tango, Statistics in Medicine 17, 1998). It also holds
    where few images or none change.
    """
    gained, lost, n = together(shares)
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


def mcnemar(right):
    """Right verdicts, bool [2, n] -> {only_a, only_b, p}: McNemar's exact test.

    The test takes all images as independent.
    """
    only_a, only_b = (int((right[k] & ~right[1 - k]).sum()) for k in (0, 1))
    p = float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p": p}


# ---- is b no worse than a? ----


def verdict(shares, margin):
    """Shares of `changes` -> (verdict, one-sided 95% limits of the balanced accuracy).

    'better', 'no worse' and 'slightly worse' exclude a loss of more than the margin. The margin
    decides first: 'slightly worse' is a loss beyond doubt, and smaller than the margin.
    """
    low, high = ends = difference(shares, ONE_SIDED)
    if low > -margin:
        return "better" if low > 0 else "slightly worse" if high < 0 else "no worse", ends
    return "worse" if high < 0 else "unclear", ends


def images_needed(shares, n, margin):
    """About how many images end an 'unclear' verdict, if all shares stay as they are, or None.

    The smallest multiple of n whose limits exclude 0 or the margin, to two digits. For models
    without a difference that disagree on the share d, it is near d (1.645 / margin)^2.
    """
    for factor in 1.02 ** np.arange(1, 600):
        if verdict(shares * (1, 1, factor), margin)[0] != "unclear":
            return int(float(f"{n * factor:.2g}"))


def judge(labels, right, groups, margin=MARGIN):
    """Labels [n], right verdicts [2, n], groups [n] -> {verdict, value, limits, needed, ...}."""
    shares, n = changes(labels, right, groups), len(labels)
    found, ends = verdict(shares, margin)
    return {
        "verdict": found,
        "value": float(np.subtract(*shares.mean(axis=0)[:2])),
        "limits": ends,
        "margin": margin,
        "n": n,
        "needed": images_needed(shares, n, margin) if found == "unclear" else None,
    }


def sentence(judged, a, b):
    """A result of `judge` in words; `a` and `b` name the models."""
    needed = f", about {judged['needed']} are needed" if judged["needed"] else ""
    known = VERDICTS.get(judged["verdict"])
    head = f"{b} is {known} {a}" if known else f"too few images to tell{needed}"
    low, high = judged["limits"]
    return (
        f"{head}: balanced accuracy changes by {judged['value']:+z.3f} (one-sided 95% limits"
        f" {low:+z.3f} and {high:+z.3f}) on {judged['n']} images, margin {judged['margin']:g}"
    )


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

    weights = chain([np.ones((1, len(labels)))], intervals.draw_groups(groups))
    drawn = np.concatenate([values(weight) for weight in weights], axis=2)  # first: without a draw
    change = drawn[:, 1] - drawn[:, 0]
    number = intervals.groups_of_rarer_class(labels, groups)
    return {
        name: (
            *drawn[k, :, 0],
            intervals.interval(change[k, 0], change[k, 1:], number, -most, most)
            if np.nanstd(change[k]) > 1e-9
            else None,
        )
        for k, (name, most) in enumerate(DRAWN.items())
    }


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
    rows = {accuracy: (*means, difference(changes(labels, right, groups)))}
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
