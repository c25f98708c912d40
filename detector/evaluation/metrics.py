"""Metrics of a detector, each with a 95% interval, at equal shares of both classes.

    measured = measure(labels, p_fake, threshold, groups)
    measured["auc"]                     # {"value": 0.82, "interval": [0.76, 0.86], "n": 330}

Some metrics depend on the number of images of each class: average precision, calibration and
log-loss. In these both classes weigh the same, as in the probability itself.
"""

import numpy as np

from detector.base.console import SOON
from detector.base.constants import CLASSES
from detector.evaluation.intervals import draw_groups, few, groups_of_rarer_class, interval, share
from detector.model.threshold import outside

BINS = 10  # of the calibration error, each with the same number of images
PREVALENCES = (0.01, 0.1, 0.5)
# name -> (words, is higher better), in the order of every table
METRICS = {
    "accuracy_real": ("accuracy on reals", True),
    "accuracy_fake": ("accuracy on fakes", True),
    "balanced_accuracy": ("balanced accuracy", True),
    "auc": ("AUC", True),
    "average_precision": ("average precision", True),
    "tpr_at_1": ("TPR at 1% FPR", True),
    "tpr_at_5": ("TPR at 5% FPR", True),
    "fpr_at_95": ("FPR at 95% TPR", False),
    "calibration_error": ("calibration error", False),
    "log_loss": ("log-loss", False),
}
DRAWN = tuple(METRICS)[3:]  # metrics with a bootstrap interval


# ---- metrics ----


def curve(labels, scores, weight):
    """Labels, scores [n] sorted by falling score, weight [b, n] -> (FPR, TPR, weight within class).

    FPR and TPR are [b, thresholds]: equal scores share a threshold. The weights of each row within
    its class are two arrays [b, n]. NaN where a class has no weight.
    """
    of_class = class_weights(labels, weight)
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True))
    return *(np.cumsum(w, axis=1)[:, last] for w in of_class), of_class


def class_weights(labels, weight):
    """Weight [b, n] of labels [n] -> [2] arrays [b, n] that each sum to 1; NaN without weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return [
            own / own.sum(axis=1, keepdims=True)
            for own in (weight * (labels == label) for label in (0, 1))
        ]


def area(fpr, tpr):
    """Area under curves [b, thresholds] -> [b]; ties count half."""
    steps, rises = (np.diff(rate, axis=1, prepend=0) for rate in (fpr, tpr))
    return (steps * (tpr - rises / 2)).sum(axis=1)


def drawn_auc(labels, scores, groups):
    """-> (AUC, its bootstrap [RESAMPLES] over groups, number of groups of the rarer class).

    The draws depend on `groups` alone, so two detectors can be compared draw by draw.
    """
    order = np.argsort(-scores, kind="stable")
    labels, scores, groups = labels[order], scores[order], groups[order]
    drawn = [area(*curve(labels, scores, weight)[:2]) for weight in draw_groups(groups)]
    value = area(*curve(labels, scores, np.ones((1, len(labels))))[:2])[0]
    return round(float(value), 12), np.concatenate(drawn), groups_of_rarer_class(labels, groups)


def auc(labels, scores, groups):
    """-> {'value', 'interval', 'n'}; None without both classes."""
    if len(np.unique(labels)) < 2:
        return None
    value, drawn, number = drawn_auc(labels, scores, groups)
    return {"value": value, "interval": interval(value, drawn, number), "n": len(labels)}


def drawn_metrics(labels, p_fake, weight):
    """Labels, probabilities [n] sorted by falling probability, weight [b, n] -> {name: [b]}.

    The names are those of DRAWN. Values are NaN where a class has no weight. Operating points are
    those of a threshold, without interpolation.
    """
    fpr, tpr, of_class = curve(labels, p_fake, weight)
    step_tpr = np.diff(tpr, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = tpr / (tpr + fpr)
    half = (of_class[0] + of_class[1]) / 2
    p = np.clip(p_fake, 1e-15, 1 - 1e-15)
    # No bin ends between equal probabilities.
    first = np.flatnonzero(np.insert(np.diff(p_fake) != 0, 0, True))
    edges = np.unique(
        first[np.searchsorted(first, np.arange(BINS) * len(labels) // BINS, side="right") - 1]
    )
    errors = np.add.reduceat(half * (labels - p_fake), edges, axis=1)
    values = {
        "auc": area(fpr, tpr),
        "average_precision": np.nansum(np.where(step_tpr > 0, step_tpr * precision, 0), axis=1),
        "tpr_at_1": np.where(fpr <= 0.01 + 1e-9, tpr, 0).max(axis=1),
        "tpr_at_5": np.where(fpr <= 0.05 + 1e-9, tpr, 0).max(axis=1),
        "fpr_at_95": np.where(tpr >= 0.95 - 1e-9, fpr, 1).min(axis=1),
        "calibration_error": np.abs(errors).sum(axis=1),
        "log_loss": -(half * np.where(labels == 1, np.log(p), np.log1p(-p))).sum(axis=1),
    }
    empty = ~np.isfinite(half.sum(axis=1))
    return {name: np.where(empty, np.nan, value) for name, value in values.items()}


def of_both(real, fake):
    """Balanced accuracy from the accuracies of both classes, {'value', 'interval', 'n'} each.

    The interval adds the squared distances to the ends of both intervals (Zou and Donner 2008).
    It also holds at accuracies of 0 and 1, where a bootstrap has no spread.
    """
    n = real["n"] + fake["n"]
    if real["value"] is None or fake["value"] is None:
        return {"value": None, "interval": None, "n": n}
    value = (real["value"] + fake["value"]) / 2
    below, above = (
        np.hypot(*(m["value"] - m["interval"][side] for m in (real, fake))) / 2 for side in (0, 1)
    )
    return {"value": value, "interval": [float(value - below), float(value + above)], "n": n}


def measure(labels, p_fake, threshold, groups):
    """Labels int [n], probability of fake [n], groups [n] -> {name: {'value', 'interval', 'n'}}.

    The names are those of METRICS, accuracy, precision_real and precision_fake. Also n, threshold
    and confusion [[real as real, as fake], [fake as real, as fake]]. Values are None where a class
    is missing.
    """
    labels, p_fake, groups = np.asarray(labels), np.asarray(p_fake, float), np.asarray(groups)
    fake, n = p_fake >= threshold, len(labels)
    metrics = {
        "n": n,
        "threshold": threshold,
        "accuracy": share(fake == labels, groups),
        "confusion": [[int(((labels == i) & (fake == j)).sum()) for j in (0, 1)] for i in (0, 1)],
    }
    for i, name in enumerate(CLASSES):
        metrics[f"accuracy_{name}"] = share(fake[labels == i] == i, groups[labels == i])
        metrics[f"precision_{name}"] = share(labels[fake == i] == i, groups[fake == i])
    metrics["balanced_accuracy"] = of_both(metrics["accuracy_real"], metrics["accuracy_fake"])
    if len(np.unique(labels)) < 2:
        return metrics | {name: {"value": None, "interval": None, "n": n} for name in DRAWN}
    return metrics | with_bootstrap(labels, p_fake, groups)


def with_bootstrap(labels, p_fake, groups):
    """The metrics of DRAWN -> {name: {'value', 'interval', 'n'}}."""
    order = np.argsort(-p_fake, kind="stable")
    labels, p_fake, groups = labels[order], p_fake[order], groups[order]
    n, number = len(labels), groups_of_rarer_class(labels, groups)
    values = drawn_metrics(labels, p_fake, np.ones((1, n)))
    blocks = [drawn_metrics(labels, p_fake, weight) for weight in draw_groups(groups)]
    metrics = {}
    for name in DRAWN:
        value = round(float(values[name][0]), 12)  # `interval` needs an exact 1, not 1 - 2e-16
        drawn = np.concatenate([block[name] for block in blocks])
        top = np.inf if name == "log_loss" else 1.0
        ends = interval(value, drawn, number, 0.0, top)
        metrics[name] = {"value": value, "interval": ends, "n": n}
    return metrics


def base_rates(metrics):
    """Precision on fakes where 1%, 10%, 50% of the images are fake -> {'0.01': metric, ...}.

    The interval combines the ends of both recalls, so it is rather too wide.
    """
    real, fake = metrics["accuracy_real"], metrics["accuracy_fake"]
    if real["value"] is None or fake["value"] is None:
        return {}
    return {str(share): precision_at(share, complement(real), fake) for share in PREVALENCES}


def complement(metric):
    """Share of boolean [n] -> the share of its opposite."""
    if metric["value"] is None:
        return metric
    low, high = metric["interval"]
    return {"value": 1 - metric["value"], "interval": [1 - high, 1 - low], "n": metric["n"]}


def precision_at(prevalence, false_alarms, caught):
    """Share of alarms that are right, where the share `prevalence` of the images is fake.

    `false_alarms`: share of the reals called fake; `caught`: share of the fakes. The interval
    combines the ends of both, so it is rather too wide. The value is None without an alarm.
    """

    def precision(caught, false_alarms):
        right = prevalence * caught
        return right / max(right + (1 - prevalence) * false_alarms, 1e-12)

    alarms = caught["value"] > 0 or false_alarms["value"] > 0
    return {
        "value": precision(caught["value"], false_alarms["value"]) if alarms else None,
        "interval": [
            precision(caught["interval"][i], false_alarms["interval"][1 - i]) for i in (0, 1)
        ],
        "n": caught["n"] + false_alarms["n"],
    }


# ---- sources ----


def by_source(labels, p_fake, threshold, sources, clusters, known=None):
    """-> rows {source, label, known, paired, n, own, **metrics}, worst first by 'own'.

    'own' is the accuracy of the source's class, or the balanced accuracy of both. 'own' and n are
    of the source alone. For all other metrics a source with one class is paired with all images of
    the other class, and 'paired' says so. `clusters`: duplicates share a number. `known`: the
    sources that the model was trained on.
    """
    from tqdm import tqdm

    rows = []
    for source in tqdm(np.unique(sources), desc="measuring each source", delay=SOON):
        own = sources == source
        classes = np.unique(labels[own])
        both = len(classes) == 2
        chosen = own if both else own | (labels != classes[0])
        metrics = measure(labels[chosen], p_fake[chosen], threshold, clusters[chosen])
        label = "both" if both else CLASSES[classes[0]]
        rows.append(
            {
                "source": str(source),
                "label": label,
                "known": known is None or source == "" or str(source) in known,
                "n": int(own.sum()),
                "paired": "" if both else f"with all {CLASSES[1 - classes[0]]} images",
                **{name: metrics[name] for name in METRICS},
                "own": metrics["balanced_accuracy" if both else f"accuracy_{label}"],
            }
        )
    return sorted(rows, key=lambda r: (r["own"]["value"], -r["n"]))


def over_sources(rows):
    """Rows of `by_source` -> {metric: {mean, worst, source, deviation, n, interval of the mean}}.

    Sources paired with one pool share its errors. The mean of a metric of both classes then has no
    interval.
    """
    summaries = {}
    for name, (_, higher) in METRICS.items():
        measured = [r for r in rows if r[name]["value"] is not None and is_own(r, name)]
        if not measured:
            continue
        values = np.array([row[name]["value"] for row in measured])
        worst = measured[int(values.argmin() if higher else values.argmax())]
        paired = not name.startswith("accuracy") and any(r["paired"] for r in rows)
        summaries[name] = {
            "mean": float(values.mean()),
            "deviation": float(values.std(ddof=1)) if len(values) > 1 else None,
            "n": len(values),
            "worst": worst[name]["value"],
            "worst_interval": worst[name]["interval"],
            "worst_source": worst["source"],
            "interval": None if paired else interval_of_mean(values, name),
        }
    return summaries


def is_own(row, name):
    """Is this metric of the source itself, and not the accuracy of the pool of the other class?"""
    return not (row["paired"] and name.startswith("accuracy_") and not name.endswith(row["label"]))


def interval_of_mean(values, name):
    """95% interval of the mean of values [n] of a metric; None below two values."""
    n = len(values)
    if n < 2:
        return None
    half = 1.959964 * few(n) * values.std(ddof=1) / np.sqrt(n)
    top = None if name == "log_loss" else 1
    return np.clip([values.mean() - half, values.mean() + half], 0, top).tolist()


# ---- calibration ----


def logit(p):
    p = np.clip(p, 1e-15, 1 - 1e-15)
    return np.log(p) - np.log1p(-p)


def slopes(labels, z, weight):
    """Labels, logits z [n], weight [b, n] -> slope [b] of a logistic regression of labels on z.

    Both classes weigh the same. A slope of 1 is calibrated, a slope below 1 is overconfident
    (Cox 1958). NaN where the classes do not overlap, because the steps never end there.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        even = sum(class_weights(labels, weight))
        # A start at 0: from 1 the steps diverge where the logits are far too large.
        a, b = np.zeros((2, len(weight)))
        for _ in range(25):  # Newton's steps
            before = a
            p = 0.5 * (1 + np.tanh(0.5 * (a[:, None] * z + b[:, None])))
            error, curve = even * (labels - p), even * p * (1 - p)
            ga, gb = (error * z).sum(1), error.sum(1)
            haa, hab, hbb = (curve * z * z).sum(1), (curve * z).sum(1), curve.sum(1)
            det = haa * hbb - hab * hab
            a, b = a + (hbb * ga - hab * gb) / det, b + (haa * gb - hab * ga) / det
        return np.where(np.abs(a - before) <= 1e-6 * np.abs(a), a, np.nan)


def calibration_error(labels, p_fake):
    """Labels, probabilities [n] sorted by falling probability -> the calibration error."""
    errors = drawn_metrics(labels, p_fake, np.ones((1, len(labels))))["calibration_error"]
    return float(errors[0])


def calibration(labels, p_fake, groups, seed=0):
    """-> {slope with interval, error, expected_95, n}; None without both classes.

    `expected_95` is the 95% quantile of the error of a perfectly calibrated model. The simulation
    moves the same probabilities to the shares of the classes here and draws labels from them.
    """
    labels, p_fake, groups = np.asarray(labels), np.asarray(p_fake, float), np.asarray(groups)
    if len(np.unique(labels)) < 2:
        return None
    z, n = logit(p_fake), len(labels)
    value = float(slopes(labels, z, np.ones((1, n)))[0])
    value = value if np.isfinite(value) else None
    drawn = np.concatenate([slopes(labels, z, weight) for weight in draw_groups(groups, seed)])
    number = groups_of_rarer_class(labels, groups)
    order, rng = np.argsort(-p_fake, kind="stable"), np.random.default_rng(seed)
    p, fakes = p_fake[order], labels.sum()
    here = 0.5 * (1 + np.tanh(0.5 * (logit(p) + np.log(fakes / (n - fakes)))))
    perfect = [calibration_error((rng.random(n) < here).astype(int), p) for _ in range(400)]
    ends = interval(value, drawn, number, -np.inf, np.inf)
    return {
        "slope": {"value": value, "interval": ends, "n": n},
        "error": calibration_error(labels[order], p),
        "expected_95": float(np.nanpercentile(perfect, 95)),
        "n": n,
    }


# ---- abstention ----


def abstention(labels, p_fake, threshold, band, groups):
    """Share of images outside the 'uncertain' band, their accuracy, and the coverage of each class.

    Coverage is the share that is not wrong outside the band. The stated error rate promises it.
    """
    sure, fake = outside(p_fake, band), p_fake >= threshold
    wrong = np.where(labels == 1, p_fake < band[0], p_fake > band[1])
    return {
        "band": list(band),
        "answered": share(sure, groups),
        "accuracy_answered": share(fake[sure] == labels[sure], groups[sure]),
        **{
            f"coverage_{name}": share(~wrong[labels == i], groups[labels == i])
            for i, name in enumerate(CLASSES)
        },
    }


def risk_coverage(labels, p_fake, threshold):
    """-> ([coverage], [risk]): share of errors as more images are kept, surest first.

    An image is sure where its logit is far from the threshold's.
    """
    wrong = (p_fake >= threshold) != labels
    order = np.argsort(-np.abs(logit(p_fake) - logit(np.float64(threshold))), kind="stable")
    answered = np.arange(1, len(order) + 1)
    keep = np.unique(np.linspace(0, len(order) - 1, 200).astype(int))
    coverage, risk = answered / len(order), np.cumsum(wrong[order]) / answered
    return coverage[keep].round(4).tolist(), risk[keep].round(4).tolist()


# ---- two sets of metrics ----


def left_interval(now, before):
    """Metrics that left their recorded interval -> rows (name, words, now, interval, verdict).

    The verdict is 'better' or 'worse'.
    """
    rows = []
    for name, (words, higher) in METRICS.items():
        value, recorded = now[name]["value"], before.get(name, {}).get("interval")
        if value is None or recorded is None:
            continue
        if not recorded[0] - 1e-9 <= value <= recorded[1] + 1e-9:
            verdict = "better" if (value > recorded[1]) == higher else "worse"
            rows.append((name, words, value, recorded, verdict))
    return rows
