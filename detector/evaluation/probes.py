"""Measure what gives labels away without a detector, with cheap classifiers ("probes").

for probe in probe_all(facts, thumb, labels, groups, splits): print(probe["what"], probe["auc"])
telling_values(facts, labels, groups)  # values that one class has far more often
label_errors(labels, p_fake)           # row numbers, by cleanlab's method
"""

import numpy as np

from detector.base.console import SOON
from detector.base.constants import CLASSES
from detector.evaluation.intervals import between_groups, groups_of_rarer_class, interval, share
from detector.evaluation.metrics import auc, drawn_auc
from detector.evaluation.rules import MIN_IMAGES

FOLDS = 5
# With fewer rows, threads only wait for each other. On a busy machine they made an audit 8x slower.
FEW_ROWS = 10_000
MANY_GROUPS = 5000  # with more groups, folds are made without weighing each group
TAILS = (0.01, 0.02, 0.05, 0.1, 0.2)
TIMES_BYTES = (1.5, 3)
COMMON = 20  # the number of most frequent sizes and quantisation tables that are tested one by one
# A value is telling where one class has it TIMES as often, the difference is at least SHARE of a
# class, and it is ERRORS standard errors between groups. About a hundred values are tested.
# Chance gives one telling value in 150 audits.
TIMES, SHARE, ERRORS = 3, 0.01, 4
HARD_SOURCE = 30  # images; the labels of smaller sources are not doubted as a whole
MAX_AUC, MAX_RIGHT = 0.45, 1 / 3  # a source is doubted where the interval's upper end is lower


# ---- facts as numbers ----


def numbers_of(facts):
    """Records of FACTS [n] -> {what: float64 [n]}, the inputs of the probes."""
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
    """Any values [n] -> rank of each by frequency, float64 [n].

    0 is the most frequent value, 1 the next. All values rarer than COMMON others share COMMON.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts))
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return np.minimum(rank[inverse], COMMON)


# ---- probes ----


def boosted(train, labels, test):
    """Fit boosted trees on columns [n, k] -> probability of fake, float64 [test].

    Trees need no monotonic relation: they also separate squares from upright and lying images.
    """
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
    """At most FOLDS pairs (train, test) of row numbers, stratified by label.

    No group is on both sides of a fold. [] where a class has one group only.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    number = min(FOLDS, groups_of_rarer_class(labels, groups))
    if number < 2:
        return []
    names, first, group, size = np.unique(
        groups, return_index=True, return_inverse=True, return_counts=True
    )
    if len(names) > MANY_GROUPS and size.max() < len(labels) / 1000:
        # StratifiedGroupKFold weighs each group in Python, which takes minutes. Here no group is
        # large enough to unbalance a fold, so the groups themselves are stratified.
        folds = StratifiedKFold(number, shuffle=True, random_state=seed).split(names, labels[first])
        return [
            (np.flatnonzero(np.isin(group, train)), np.flatnonzero(np.isin(group, test)))
            for train, test in folds
        ]
    folds = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
    return list(folds.split(labels, labels, groups))


def cross_validated(classifier, values, labels, groups):
    """Score each row by a `classifier` not trained on its group -> float64 [n].

    None where folds cannot be made.
    """
    scores = np.empty(len(labels))
    folds = fold_rows(labels, groups)
    for train, test in folds:
        if len(np.unique(labels[train])) < 2:
            return None
        scores[test] = classifier(values[train], labels[train], values[test])
    return scores if folds else None


def probes_of(facts, thumb):
    """-> [(what, values [n, k])]: each fact that varies, then all facts, then the 8x8 thumbnail."""
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
    """-> rows {what, auc, on_test}, each AUC with its interval; [] below MIN_IMAGES of a class.

    `auc` is cross-validated over groups. `on_test` is of a probe trained on the train split and
    tested on the test split. An AUC that cannot be measured is None.
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
    """The probes of all facts and of the thumbnail, trained on `train` -> {what: float64 [test]}.

    `train`, `test`: row numbers, the same as the detector's.
    """
    return {
        what: boosted(values[train], labels[train], values[test])
        for what, values in probes_of(facts, thumb)[-2:]
    }


def detector_minus_leak(p_fake, leaks, labels, groups):
    """Compare the detector's AUC with the best probe's on the same test rows.

    `p_fake` [n] is the detector's, `leaks` {what: [n]} the probes'. -> {what, leak, detector,
    difference: {'value', 'interval', 'n'}}. Both AUCs use the same bootstrap draws of groups.
    None without both classes.
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
    """Yield (words, boolean [n]): frequent formats, tables and sizes, and tails of the numbers."""
    for name in np.unique(facts["format"]):
        yield f"{name} files", facts["format"] == name
    size = np.char.add(np.char.add(facts["width"].astype(str), "x"), facts["height"].astype(str))
    for words, values in (
        ("files of {} pixels", size),
        ("files with quantisation table {}", facts["quant_hash"]),
    ):
        distinct, counts = np.unique(values, return_counts=True)
        for value in distinct[np.argsort(-counts, kind="stable")][:COMMON]:
            yield words.format(value), values == value
    whole = (facts["width"] % 64 == 0) & (facts["height"] % 64 == 0)
    yield "files with both sides multiples of 64", whole
    numbers = numbers_of(facts)
    times = np.exp(numbers["bytes per pixel for what is in the picture"])
    taken = "the bytes that their picture takes as JPEG 90"
    for limit in TIMES_BYTES:
        yield f"files with over {limit:g} times {taken}", times > limit
        yield f"files with under 1/{limit:g} of {taken}", times < 1 / limit
    for what in ("pixels", "aspect ratio", "bytes per pixel", "blockiness"):
        for tail in TAILS:
            low, high = np.quantile(numbers[what], [tail, 1 - tail])
            yield f"files with {what} among the lowest {tail:.0%}", numbers[what] < low
            yield f"files with {what} among the highest {tail:.0%}", numbers[what] > high


def telling_values(facts, labels, groups):
    """-> rows {what, real, fake, errors}: values that one class has far more often, clearest first.

    `real`, `fake`: share of each class. `errors`: their difference in standard errors between
    groups.
    """
    of_class = [
        (labels == i, np.unique(groups[labels == i], return_inverse=True)[1]) for i in (0, 1)
    ]
    if any(not mask.any() for mask, _ in of_class):
        return []
    rows = []
    for what, value in values_of(facts):
        (real, real_variance), (fake, fake_variance) = (
            share_and_variance(value[mask], group) for mask, group in of_class
        )
        difference, rarer, oftener = abs(fake - real), *sorted((real, fake))
        errors = float(difference / np.sqrt(real_variance + fake_variance))
        if errors >= ERRORS and difference >= SHARE and oftener >= TIMES * rarer:
            rows.append({"what": what, "real": real, "fake": fake, "errors": errors})
    return sorted(rows, key=lambda row: -row["errors"])


def share_and_variance(value, group):
    """Boolean [n], group numbers [n] -> (share, its variance between groups).

    The variance is at least the smoothed binomial one.
    """
    n, smooth = len(value), (value.sum() + 1) / (len(value) + 2)
    return float(np.mean(value)), max(between_groups(value, group), smooth * (1 - smooth) / n)


# ---- labels ----


def linear_scores(features, labels, groups):
    """Probability of fake of each row by a logistic regression, cross-validated, or None."""
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
    """Labels, out-of-fold probabilities [n] -> rows of probable label errors, clearest first.

    Confident learning (Northcutt, Jiang and Chuang 2021; cleanlab's filter 'confident_learning').
    An image is a probable error where its probability of the other class is at least the mean of
    that probability among the other class's own images.
    """
    p = np.stack([1 - p_fake, p_fake], axis=1)
    mean = np.array([p[labels == i, i].mean() if (labels == i).any() else np.inf for i in (0, 1)])
    given, other = p[np.arange(len(labels)), labels], p[np.arange(len(labels)), 1 - labels]
    rows = np.flatnonzero((other >= mean[1 - labels]) & (other > given))
    return rows[np.argsort((given - other)[rows], kind="stable")]


def doubtful_sources(labels, p_fake, sources, twins):
    """Sources whose labels a classifier trained on the other sources contradicts.

    Copies of one picture share a number of `twins` and count as one image.

    -> rows {source, labels, what, n, value, interval}. A source with both classes has at least
    HARD_SOURCE / 2 of each, and an AUC whose interval lies below MAX_AUC. A source with one class
    has a share right whose interval lies below MAX_RIGHT.
    """
    rows = []
    for source in np.unique(sources[sources != ""]):
        own = sources == source
        _, first = np.unique(twins[own], return_index=True)
        number = np.bincount(labels[own][first], minlength=2)
        if number.sum() < HARD_SOURCE or 0 < number.min() < HARD_SOURCE / 2:
            continue
        if number.min():
            what, limit = "AUC", MAX_AUC
            metric = auc(labels[own], p_fake[own], twins[own])
        else:
            what, limit = "share right", MAX_RIGHT
            metric = share((p_fake[own] >= 0.5) == labels[own], twins[own])
        if metric["interval"][1] < limit:
            classes = [CLASSES[i] for i in np.flatnonzero(number)]
            rows.append({"source": str(source), "labels": classes, "what": what, **metric})
    return rows
