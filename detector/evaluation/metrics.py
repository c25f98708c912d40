"""Metrics of a detector, each with a 95% interval, at equal shares of both classes.

    found = measure(labels, p_fake, threshold, groups)       # found["auc"] = {"value": 0.82, "interval": [0.76, 0.86], "n": 330}

Both classes weigh the same in everything that their numbers would move (average precision, calibration, log-loss), as
in the probability itself. Images of one group (a source, copies of one picture) are not independent: shares get Wilson's
interval with the number of images that they are worth, everything else a bootstrap that draws whole groups.
"""

import numpy as np

from detector.base.console import SOON
from detector.base.constants import CLASSES
from detector.model.threshold import outside

RESAMPLES = 1000  # of a bootstrap; fewer where there are many images, but never below 200: their intervals are narrow
BINS = 10  # of equal numbers of images, for the calibration error
PREVALENCES = (0.01, 0.1, 0.5)
# name -> (words, is higher better). The order is that of every table.
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
DRAWN = tuple(METRICS)[3:]  # those whose interval is a bootstrap's


# ---- intervals ----


def wilson(successes, n):
    """95% interval of a share (Wilson 1927): [low, high]; [0, 1] where n is 0. Numbers need not be whole."""
    if n == 0:
        return [0.0, 1.0]
    z, p = 1.959964, successes / n
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return [
        0.0 if successes == 0 else float(low),
        1.0 if successes == n else float(high),
    ]  # exact, without rounding


def few(number):
    """How much wider than a normal one an interval from `number` groups is: Student's t, inf below two of them."""
    from scipy.special import stdtrit

    return float(stdtrit(number - 1, 0.975) / 1.959964) if number > 1 else np.inf


def effective(mask, groups):
    """Number of independent images that boolean [n] in groups [n] is worth for its share; at most n.

    The variance of a share between groups, against the binomial one (Kish's design effect, as Korn and Graubard 1998
    use it in Wilson's place), with Student's t for few groups. Where all images agree there is no variance to see: one a group.
    """
    _, group = np.unique(groups, return_inverse=True)
    n, number, p = len(mask), group.max() + 1, np.mean(mask)
    if p in (0, 1) or number == n:
        return number
    between = between_groups(mask, group)
    return 0 if number == 1 else min(n, p * (1 - p) / between / few(number) ** 2) if between else n


def between_groups(mask, group):
    """Variance of the share of boolean [n] that the spread between group numbers [n] alone gives."""
    number = group.max() + 1
    return (
        (np.bincount(group, mask - np.mean(mask)) ** 2).sum()
        * number
        / max(1, number - 1)
        / len(mask) ** 2
    )


def share(mask, groups=None):
    """Boolean [n], groups [n] or None (every image on its own) -> {'value', 'interval', 'n'}; value None where n is 0."""
    mask = np.asarray(mask)
    n, p = len(mask), float(np.mean(mask)) if len(mask) else None
    worth = n if groups is None or not n else effective(mask, np.asarray(groups))
    return {"value": p, "interval": wilson(p * worth if n else 0, worth), "n": n}


def draw_groups(groups, seed=0, block=50):
    """Yield float64 [<= block, n] arrays, RESAMPLES rows in all: how often each row of groups [n] is drawn in a bootstrap."""
    _, group = np.unique(groups, return_inverse=True)
    number, rng = int(group.max()) + 1, np.random.default_rng(seed)
    for _ in range(0, min(RESAMPLES, max(200, RESAMPLES * 5000 // len(group))), block):
        yield rng.multinomial(number, np.full(number, 1 / number), size=block).astype(float)[
            :, group
        ]


def interval(value, drawn, number, bottom=0.0, top=1.0):
    """95% interval of `value` from its bootstrap `drawn` [resamples] over `number` groups; None where there is none.

    The percentiles, stretched for few groups (sqrt(g / (g - 1)) times Student's t over the normal: a bootstrap of few
    groups is too narrow, Cameron, Gelbach and Miller 2008), within [bottom, top]. Where all resamples agree, as at an AUC of
    1, Wilson's interval for so many groups.
    """
    drawn = drawn[np.isfinite(drawn)]
    if value is None or number < 2 or not len(drawn):
        return None
    low, high = np.percentile(drawn, [2.5, 97.5])
    low, high = (
        min(low, value),
        max(high, value),
    )  # a bootstrap of calibration errors lies above most of them
    if high - low < 1e-9 and (bottom, top) == (0, 1) and value in (0, 1):
        return wilson(value * number, number)
    stretch = np.sqrt(number / (number - 1)) * few(number)
    return [
        float(max(bottom, value - stretch * (value - low))),
        float(min(top, value + stretch * (high - value))),
    ]


def groups_of_rarer_class(labels, groups):
    """Number of groups of the class that has fewer: what an interval of both classes rests on."""
    return min(len(np.unique(groups[labels == label])) for label in (0, 1))


def words(metric, digits=2):
    """'0.82 [0.76, 0.86]'; 'n/a' without a value, no brackets without an interval, never '-0.00'."""
    if metric is None or metric["value"] is None:
        return "n/a"
    ends = metric.get("interval")
    return f"{metric['value']:z.{digits}f}" + (
        f" [{ends[0]:z.{digits}f}, {ends[1]:z.{digits}f}]" if ends else ""
    )


# ---- metrics ----


def curve(labels, scores, weight):
    """Labels, scores [n] sorted by falling score; weight [b, n] -> (FPR, TPR [b, thresholds], weight of each row within
    its class [2] of [b, n]). Ties move together; NaN where a class has no weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        of_class = [
            w / w.sum(axis=1, keepdims=True)
            for w in (weight * (labels == label) for label in (0, 1))
        ]
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True))
    return *(np.cumsum(w, axis=1)[:, last] for w in of_class), of_class


def area(fpr, tpr):
    """Area under curves [b, thresholds] -> [b]; ties count half."""
    return (np.diff(fpr, axis=1, prepend=0) * (tpr - np.diff(tpr, axis=1, prepend=0) / 2)).sum(
        axis=1
    )


def drawn_auc(labels, scores, groups):
    """-> (AUC, [RESAMPLES] of it over drawn groups, number of groups of the rarer class). The same groups are drawn for
    the same `groups`, whatever the scores: two detectors may be compared draw by draw."""
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
    """Labels, probabilities [n] sorted by falling probability; weight [b, n] -> {name: [b]} for the metrics of DRAWN.

    NaN where a class has no weight. An operating point is one that a threshold reaches, never between two.
    """
    fpr, tpr, of_class = curve(labels, p_fake, weight)
    step_tpr = np.diff(tpr, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = tpr / (tpr + fpr)
    half = (of_class[0] + of_class[1]) / 2
    p = np.clip(p_fake, 1e-15, 1 - 1e-15)
    first = np.flatnonzero(
        np.insert(np.diff(p_fake) != 0, 0, True)
    )  # no bin ends between equal probabilities
    edges = np.unique(
        first[np.searchsorted(first, np.arange(BINS) * len(labels) // BINS, side="right") - 1]
    )
    found = {
        "auc": area(fpr, tpr),
        "average_precision": np.nansum(np.where(step_tpr > 0, step_tpr * precision, 0), axis=1),
        "tpr_at_1": np.where(fpr <= 0.01 + 1e-9, tpr, 0).max(axis=1),
        "tpr_at_5": np.where(fpr <= 0.05 + 1e-9, tpr, 0).max(axis=1),
        "fpr_at_95": np.where(tpr >= 0.95 - 1e-9, fpr, 1).min(axis=1),
        "calibration_error": (
            np.abs(np.add.reduceat(half * (labels - p_fake), edges, axis=1)).sum(axis=1)
        ),
        "log_loss": -(half * np.where(labels == 1, np.log(p), np.log1p(-p))).sum(axis=1),
    }
    empty = ~np.isfinite(half.sum(axis=1))
    return {name: np.where(empty, np.nan, values) for name, values in found.items()}


def of_both(real, fake):
    """Balanced accuracy from the shares right of both classes, with the interval that theirs give.

    Squares of the distances added (Zou and Donner 2008), which holds at shares of 0 and 1, where a bootstrap is empty.
    """
    if real["value"] is None or fake["value"] is None:
        return {"value": None, "interval": None, "n": real["n"] + fake["n"]}
    value = (real["value"] + fake["value"]) / 2
    below, above = (
        np.hypot(*(m["value"] - m["interval"][side] for m in (real, fake))) / 2 for side in (0, 1)
    )
    return {
        "value": value,
        "interval": [float(value - below), float(value + above)],
        "n": real["n"] + fake["n"],
    }


def measure(labels, p_fake, threshold, groups):
    """Labels int [n], probability of fake [n], one threshold, groups [n] -> {name: {'value', 'interval', 'n'}} of METRICS.

    Beside them n, threshold, accuracy, confusion [[real as real, as fake], [fake as real, as fake]] and both precisions.
    Values are None where a class is missing.
    """
    labels, p_fake, groups = np.asarray(labels), np.asarray(p_fake, float), np.asarray(groups)
    fake, n = p_fake >= threshold, len(labels)
    found = {
        "n": n,
        "threshold": threshold,
        "accuracy": share(fake == labels, groups),
        "confusion": [[int(((labels == i) & (fake == j)).sum()) for j in (0, 1)] for i in (0, 1)],
    }
    for i, name in enumerate(CLASSES):
        found[f"accuracy_{name}"] = share(fake[labels == i] == i, groups[labels == i])
        found[f"precision_{name}"] = share(labels[fake == i] == i, groups[fake == i])
    found["balanced_accuracy"] = of_both(found["accuracy_real"], found["accuracy_fake"])
    if len(np.unique(labels)) < 2:
        return found | {name: {"value": None, "interval": None, "n": n} for name in DRAWN}
    order = np.argsort(-p_fake, kind="stable")
    labels, p_fake, groups = labels[order], p_fake[order], groups[order]
    # rounded, so that 1 is 1 and not 2e-16 beside it: `interval` asks
    values = {
        name: round(float(v[0]), 12)
        for name, v in drawn_metrics(labels, p_fake, np.ones((1, n))).items()
    }
    blocks = [drawn_metrics(labels, p_fake, weight) for weight in draw_groups(groups)]
    number = groups_of_rarer_class(labels, groups)
    for name, value in values.items():
        drawn = np.concatenate([block[name] for block in blocks])
        found[name] = {
            "value": value,
            "interval": interval(value, drawn, number, 0.0, np.inf if name == "log_loss" else 1.0),
            "n": n,
        }
    return found


def base_rates(found):
    """Share of alarms that are right where 1%, 10%, 50% of the images are fake: {'0.01': {'value', 'interval'}, ...}.

    The interval takes the ends of both recalls at once, so it is rather too wide.
    """
    real, fake = found["accuracy_real"], found["accuracy_fake"]

    def precision(prevalence, recall, alarms):
        return prevalence * recall / max(prevalence * recall + (1 - prevalence) * alarms, 1e-12)

    if real["value"] is None or fake["value"] is None:
        return {}
    alarms = fake["value"] > 0 or real["value"] < 1
    return {
        str(share): {
            "value": precision(share, fake["value"], 1 - real["value"]) if alarms else None,
            "n": found["n"],
            "interval": [
                precision(share, fake["interval"][i], 1 - real["interval"][i]) for i in (0, 1)
            ],
        }
        for share in PREVALENCES
    }


# ---- sources ----


def by_source(labels, p_fake, threshold, sources, clusters, known=None):
    """-> list of rows {source, label, known, paired, n, own, **metrics}, worst first by 'own', its own share right.

    A source with one class alone is paired with the pool of the other class ('paired' says so); n and 'own' (the
    accuracy of its class, or balanced over both) are its own. Groups are copies of one picture. `known`: the sources that the model was trained on.
    """
    from tqdm import tqdm

    rows = []
    for source in tqdm(np.unique(sources), desc="measuring each source", delay=SOON):
        own = sources == source
        classes = np.unique(labels[own])
        chosen = own if len(classes) == 2 else own | (labels != classes[0])
        found = measure(labels[chosen], p_fake[chosen], threshold, clusters[chosen])
        row = {
            "source": str(source),
            "label": CLASSES[classes[0]] if len(classes) == 1 else "both",
            "known": known is None or source == "" or str(source) in known,
            "n": int(own.sum()),
            "paired": "" if len(classes) == 2 else f"with all {CLASSES[1 - classes[0]]} images",
        }
        row |= {name: found[name] for name in METRICS}
        row["own"] = row[
            "balanced_accuracy" if row["label"] == "both" else f"accuracy_{row['label']}"
        ]
        rows.append(row)
    return sorted(rows, key=lambda r: (r["own"]["value"], -r["n"]))


def over_sources(rows):
    """Rows of `by_source` -> {metric: {mean, worst, source, deviation, n, interval of the mean}} over the sources that have it.

    Sources paired with one pool share its errors, so their mean has no interval in what needs both classes.
    """
    found = {}
    for name, (_, higher) in METRICS.items():
        have = [
            (r[name]["value"], r[name]["interval"], r["source"])
            for r in rows
            if r[name]["value"] is not None
            and not (r["paired"] and name.startswith("accuracy_") and not name.endswith(r["label"]))
        ]
        if not have:
            continue
        values = np.array([value for value, _, _ in have])
        worst = have[int(values.argmin() if higher else values.argmax())]
        spread = float(values.std(ddof=1)) if len(values) > 1 else None
        paired = not name.startswith("accuracy") and any(r["paired"] for r in rows)
        half = (
            None
            if spread is None or paired
            else 1.959964 * few(len(values)) * spread / np.sqrt(len(values))
        )
        ends = (
            None
            if half is None
            else np.clip(
                [values.mean() - half, values.mean() + half], 0, None if name == "log_loss" else 1
            ).tolist()
        )
        found[name] = {
            "mean": float(values.mean()),
            "deviation": spread,
            "n": len(values),
            "worst": worst[0],
            "worst_interval": worst[1],
            "worst_source": worst[2],
            "interval": ends,
        }
    return found


# ---- calibration ----


def logit(p):
    p = np.clip(p, 1e-15, 1 - 1e-15)
    return np.log(p) - np.log1p(-p)


def slopes(labels, z, weight):
    """Labels, logits [n], weight [b, n] -> slope [b] of the logistic regression of labels on logits, classes even; NaN where none.

    1: as sure as it should be; below 1: too sure (Cox 1958).
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        even = sum(
            w / w.sum(axis=1, keepdims=True)
            for w in (weight * (labels == label) for label in (0, 1))
        )
        a, b = np.zeros(
            (2, len(weight))
        )  # from 1 the steps diverge where the logits are far too large
        for _ in range(25):  # Newton's steps
            before = a
            p = 0.5 * (1 + np.tanh(0.5 * (a[:, None] * z + b[:, None])))
            error, curve = even * (labels - p), even * p * (1 - p)
            ga, gb = (error * z).sum(1), error.sum(1)
            haa, hab, hbb = (curve * z * z).sum(1), (curve * z).sum(1), curve.sum(1)
            det = haa * hbb - hab * hab
            a, b = a + (hbb * ga - hab * gb) / det, b + (haa * gb - hab * ga) / det
        return np.where(
            np.abs(a - before) <= 1e-6 * np.abs(a), a, np.nan
        )  # without overlap of the classes they never end


def calibration(labels, p_fake, groups, seed=0):
    """-> {slope with interval, error, expected_95, n}: that is the 95% quantile of the error of a perfectly calibrated model,
    simulated: the same probabilities, moved to the classes' shares here, labels drawn from them."""
    labels, p_fake, groups = np.asarray(labels), np.asarray(p_fake, float), np.asarray(groups)
    if len(np.unique(labels)) < 2:
        return None
    z, n = logit(p_fake), len(labels)
    value = slopes(labels, z, np.ones((1, n)))[0]
    drawn = np.concatenate([slopes(labels, z, weight) for weight in draw_groups(groups, seed)])
    value = float(value) if np.isfinite(value) else None
    order, rng = np.argsort(-p_fake, kind="stable"), np.random.default_rng(seed)
    p, fakes = p_fake[order], labels.sum()
    here = 0.5 * (1 + np.tanh(0.5 * (logit(p) + np.log(fakes / (n - fakes)))))
    perfect = [
        drawn_metrics((rng.random(n) < here).astype(int), p, np.ones((1, n)))["calibration_error"][
            0
        ]
        for _ in range(400)
    ]
    return {
        "slope": {
            "value": value,
            "interval": interval(
                value, drawn, groups_of_rarer_class(labels, groups), -np.inf, np.inf
            ),
            "n": n,
        },
        "error": float(drawn_metrics(labels[order], p, np.ones((1, n)))["calibration_error"][0]),
        "expected_95": float(np.nanpercentile(perfect, 95)),
        "n": n,
    }


# ---- abstention ----


def abstention(labels, p_fake, threshold, band, groups):
    """What the band does: share with a verdict, accuracy of those, and coverage of each class (the share that is not
    answered wrongly outside the band: what the stated error rate promises)."""
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
    """Share of errors among the images answered, as more are answered, surest first: ([coverage], [risk]).

    Sure is far from the threshold, in logits.
    """
    wrong = (p_fake >= threshold) != labels
    order = np.argsort(-np.abs(logit(p_fake) - logit(np.float64(threshold))), kind="stable")
    answered = np.arange(1, len(order) + 1)
    keep = np.unique(np.linspace(0, len(order) - 1, 200).astype(int))
    return (answered / len(order))[keep].round(4).tolist(), (np.cumsum(wrong[order]) / answered)[
        keep
    ].round(4).tolist()


# ---- two sets of metrics ----


def left_interval(now, before):
    """Metrics now and recorded -> rows (name, words, now, recorded interval, better | worse) of those that left it."""
    rows = []
    for name, (words, higher) in METRICS.items():
        value, recorded = now[name]["value"], before.get(name, {}).get("interval")
        if (
            value is not None
            and recorded is not None
            and not recorded[0] - 1e-9 <= value <= recorded[1] + 1e-9
        ):
            rows.append(
                (
                    name,
                    words,
                    value,
                    recorded,
                    "better" if (value > recorded[1]) == higher else "worse",
                )
            )
    return rows
