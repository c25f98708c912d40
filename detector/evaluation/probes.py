"""What gives the label away without a detector: cheap classifiers on file facts and thumbnails, telling values, odd labels.

for probe in probe_all(facts, thumb, labels, groups): print(probe["what"], probe["auc"])
telling_values(facts, labels, groups)
label_errors(labels, p_fake)           # row numbers, by cleanlab's method
"""

import numpy as np

from detector.base.console import SOON
from detector.base.constants import CLASSES
from detector.evaluation.metrics import (
    auc,
    between_groups,
    drawn_auc,
    groups_of_rarer_class,
    interval,
    share,
)

FOLDS = 5
MIN_IMAGES = 20  # of each class, below which a probe says nothing
FEW_ROWS = 10_000  # below which threads only wait for each other: on a busy machine they made an audit eight times slower
MANY_GROUPS = 5000  # from which on folds are made of groups without weighing each
TAILS = (0.01, 0.02, 0.05, 0.1, 0.2)
TIMES_BYTES = (1.5, 3)
COMMON = (
    20  # of sizes and quantisation tables, so many of the most frequent are looked at one by one
)
# A value is telling where one class has it three times as often, by at least a hundredth of the class, and the
# difference is four standard errors between groups: with about a hundred values looked at, chance gives that once in 150 audits.
TIMES, SHARE, ERRORS = 3, 0.01, 4
HARD_SOURCE = 30  # images of a source from which on its labels as a whole can be doubted
MAX_AUC, MAX_RIGHT = 0.45, 1 / 3  # upper ends below which they are


# ---- facts as numbers ----


def numbers_of(facts):
    """Records of FACTS [n] -> {what: float64 [n]}, what a probe may look at."""
    width, height = facts["width"].astype(float), facts["height"].astype(float)
    per_pixel = np.log(facts["bytes"] / (width * height))
    return {
        "pixels": np.log(width * height),
        "aspect ratio": np.log(width / height),
        "sides that are multiples of 64": (
            (facts["width"] % 64 == 0) + (facts["height"] % 64 == 0).astype(float)
        ),
        "format": ranks(facts["format"]),
        "quantisation": facts["quant_mean"].astype(float),
        "quantisation table": ranks(facts["quant_hash"]),
        "bytes per pixel": per_pixel,
        "bytes per pixel for what is in the picture": per_pixel - np.log(facts["density"]),
        "blockiness": facts["blockiness"].astype(float),
    }


def ranks(values):
    """Any values [n] -> how frequent each is: 0 for the most frequent value, 1 for the next, ..., COMMON for all rarer ones."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts))
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return np.minimum(rank[inverse], COMMON)


# ---- probes ----


def boosted(train, labels, test):
    """Boosted trees on columns [n, k] -> probability of fake, float64 [test]. Neither scale nor direction matters to them:
    squares among oblongs are found as well."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits

    trees = HistGradientBoostingClassifier(
        max_iter=60,
        max_leaf_nodes=8,
        min_samples_leaf=10,
        learning_rate=0.1,
        early_stopping=False,
        random_state=0,
    )
    with threadpool_limits(1 if len(train) < FEW_ROWS else None, "openmp"):
        return trees.fit(train, labels).predict_proba(test)[:, 1]


def fold_rows(labels, groups, seed=0):
    """At most FOLDS (train, test) row numbers, stratified by label, no group on both sides; [] where there are no two."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    number = min(FOLDS, groups_of_rarer_class(labels, groups))
    names, first, group, size = np.unique(
        groups, return_index=True, return_inverse=True, return_counts=True
    )
    if len(names) > MANY_GROUPS and size.max() < len(labels) / 1000:
        # StratifiedGroupKFold weighs each group in Python: minutes. Of so many, none tips a fold: stratify groups as such
        folds = StratifiedKFold(number, shuffle=True, random_state=seed).split(names, labels[first])
        return [
            (np.flatnonzero(np.isin(group, train)), np.flatnonzero(np.isin(group, test)))
            for train, test in folds
        ]
    return (
        list(
            StratifiedGroupKFold(number, shuffle=True, random_state=seed).split(
                labels, labels, groups
            )
        )
        if number > 1
        else []
    )


def cross_validated(classifier, values, labels, groups):
    """What `classifier` says of each row when it has not seen its group, float64 [n]; None where folds cannot be made."""
    scores = np.empty(len(labels))
    folds = fold_rows(labels, groups)
    for train, test in folds:
        if len(np.unique(labels[train])) < 2:
            return None
        scores[test] = classifier(values[train], labels[train], values[test])
    return scores if folds else None


def probes_of(facts, thumb):
    """-> list of (what, values [n, k]): each fact that varies alone, all of them, the 8x8 picture."""
    numbers = numbers_of(facts)
    return [
        *(
            (what, values[:, None])
            for what, values in numbers.items()
            if len(np.unique(values)) > 1
        ),
        ("all file facts", np.stack(list(numbers.values()), axis=1)),
        ("8x8 thumbnail", thumb.astype(float)),
    ]


def probe_all(facts, thumb, labels, groups, splits):
    """-> rows {what, auc, on_test}: AUC cross-validated over groups, and of the test split when learnt on the train split.

    Each with its interval, None where it cannot be had; [] with fewer than MIN_IMAGES of a class.
    """
    if min(np.bincount(labels, minlength=2)) < MIN_IMAGES:
        return []
    from tqdm import tqdm

    train, test = (np.flatnonzero(splits == name) for name in ("train", "test"))
    split = (
        min(np.bincount(labels[rows], minlength=2).min() for rows in (train, test)) >= MIN_IMAGES
    )
    rows = []
    for what, values in tqdm(probes_of(facts, thumb), desc="probing files", delay=SOON):
        scores = cross_validated(boosted, values, labels, groups)
        on_test = boosted(values[train], labels[train], values[test]) if split else None
        rows.append(
            {
                "what": what,
                "auc": None if scores is None else auc(labels, scores, groups),
                "on_test": auc(labels[test], on_test, groups[test]) if split else None,
            }
        )
    return rows


def probe_scores(facts, thumb, labels, train, test):
    """The two joint probes, trained on the rows `train` as the detector is -> {what: float64 [test]}."""
    return {
        what: boosted(values[train], labels[train], values[test])
        for what, values in probes_of(facts, thumb)[-2:]
    }


def detector_minus_leak(p_fake, leaks, labels, groups):
    """Detector's probabilities, {what: a probe's} on the same test rows -> the best leak and how far the detector is above it.

    {what, leak, detector, difference: {'value', 'interval', 'n'}}: AUCs, the interval over groups, in pairs.
    """
    if len(np.unique(labels)) < 2:
        return None
    drawn = {what: drawn_auc(labels, leak, groups) for what, leak in leaks.items()}
    what = max(drawn, key=lambda name: drawn[name][0])
    leak, leak_drawn, _ = drawn[what]
    value, value_drawn, number = drawn_auc(labels, p_fake, groups)
    return {
        "what": what,
        "leak": leak,
        "detector": value,
        "difference": {
            "value": value - leak,
            "interval": interval(value - leak, value_drawn - leak_drawn, number, -1.0),
            "n": len(labels),
        },
    }


# ---- telling values ----


def values_of(facts):
    """-> yields (words, boolean [n]): formats, tables and sizes that many files share, tails of the numbers."""
    for name in np.unique(facts["format"]):
        yield f"{name} files", facts["format"] == name
    size = np.char.add(np.char.add(facts["width"].astype(str), "x"), facts["height"].astype(str))
    for words, values in (
        ("files of {} pixels", size),
        ("files with quantisation table {}", facts["quant_hash"]),
    ):
        found, counts = np.unique(values, return_counts=True)
        for value in found[np.argsort(-counts, kind="stable")][:COMMON]:
            yield words.format(value), values == value
    yield (
        "files with both sides multiples of 64",
        (facts["width"] % 64 == 0) & (facts["height"] % 64 == 0),
    )
    numbers = numbers_of(facts)
    times = np.exp(numbers["bytes per pixel for what is in the picture"])
    for bar in TIMES_BYTES:
        yield (
            f"files with over {bar:g} times the bytes that their picture takes as JPEG 90",
            times > bar,
        )
        yield (
            f"files with under 1/{bar:g} of the bytes that their picture takes as JPEG 90",
            times < 1 / bar,
        )
    for what in ("pixels", "aspect ratio", "bytes per pixel", "blockiness"):
        for tail in TAILS:
            yield (
                f"files with {what} among the lowest {tail:.0%}",
                numbers[what] < np.quantile(numbers[what], tail),
            )
            yield (
                f"files with {what} among the highest {tail:.0%}",
                numbers[what] > np.quantile(numbers[what], 1 - tail),
            )


def telling_values(facts, labels, groups):
    """-> rows {what, real, fake, errors}, clearest first: values that one class has far more often than the other.

    `real`, `fake`: share of each class; `errors`: their difference in standard errors between groups.
    """
    rows = []
    of_class = [
        (labels == i, np.unique(groups[labels == i], return_inverse=True)[1]) for i in (0, 1)
    ]
    if any(not mask.any() for mask, _ in of_class):
        return rows
    for what, value in values_of(facts):
        shares, variances = zip(
            *(share_and_variance(value[mask], group) for mask, group in of_class)
        )
        errors = abs(shares[1] - shares[0]) / np.sqrt(sum(variances))
        if (
            errors >= ERRORS
            and abs(shares[1] - shares[0]) >= SHARE
            and max(shares) >= TIMES * min(shares)
        ):
            rows.append(
                {"what": what, "real": shares[0], "fake": shares[1], "errors": float(errors)}
            )
    return sorted(rows, key=lambda row: -row["errors"])


def share_and_variance(value, group):
    """Boolean [n], group numbers [n] -> (share, its variance between groups; at least the binomial one, smoothed)."""
    n, smooth = len(value), (value.sum() + 1) / (len(value) + 2)
    return float(np.mean(value)), max(between_groups(value, group), smooth * (1 - smooth) / n)


# ---- labels ----


def linear_scores(features, labels, groups):
    """Probability of fake of each row by a logistic regression that has not seen its group, or None."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def logistic(train, y, test):
        fitted = make_pipeline(
            StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000)
        ).fit(train, y)
        return fitted.predict_proba(test)[:, 1]

    return cross_validated(logistic, features, labels, groups)


def label_errors(labels, p_fake):
    """Labels, out-of-fold probabilities [n] -> row numbers of probable label errors, clearest first.

    Confident learning (Northcutt, Jiang and Chuang 2021; cleanlab's filter 'confident_learning'): an image of one class
    whose probability of the other is at least the mean of that probability among the other's own images.
    """
    p = np.stack([1 - p_fake, p_fake], axis=1)
    mean = np.array([p[labels == i, i].mean() if (labels == i).any() else np.inf for i in (0, 1)])
    given, other = p[np.arange(len(labels)), labels], p[np.arange(len(labels)), 1 - labels]
    rows = np.flatnonzero((other >= mean[1 - labels]) & (other > given))
    return rows[np.argsort((given - other)[rows], kind="stable")]


def doubtful_sources(labels, p_fake, sources):
    """-> rows {source, labels, what, n, value, interval}: sources whose labels a classifier trained on the others contradicts.

    A source with both classes (HARD_SOURCE / 2 of each at least): an AUC within it below one half, its interval below
    MAX_AUC. With one class: a share right whose interval lies below MAX_RIGHT. Swapped labels, or unlike all else.
    """
    rows = []
    for source in np.unique(sources[sources != ""]):
        own = sources == source
        number = np.bincount(labels[own], minlength=2)
        if own.sum() < HARD_SOURCE or 0 < number.min() < HARD_SOURCE / 2:
            continue
        if number.min():
            what, found, bar = "AUC", auc(labels[own], p_fake[own], np.arange(own.sum())), MAX_AUC
        else:
            what, found, bar = "share right", share((p_fake[own] >= 0.5) == labels[own]), MAX_RIGHT
        if found["interval"][1] < bar:
            rows.append(
                {
                    "source": str(source),
                    "labels": [CLASSES[i] for i in np.flatnonzero(number)],
                    "what": what,
                    **found,
                }
            )
    return rows
