"""Classifiers on frozen features: fitted, searched, scored out of fold, calibrated; each ends as plain arrays (detector/model/file.py).

svm           RBF support vector machine, the default
linear-svm    the same without a kernel
logistic      logistic regression
mlp           a neural network with one hidden layer
"""

import os
import warnings

import numpy as np

from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.evaluation import probes
from detector.evaluation.probes import FOLDS
from detector.images.folders import draw_evenly
from detector.model.score import decision, standardise, whole_of

SEARCH_ROWS = 3000  # hyperparameters are searched on at most so many rows; the cost of an SVM grows with their square
HALVINGS = 2  # so often half of the rows choose the better third of the points first
HIDDEN = 64
FLATTEST = (
    -1e-3
)  # slope of a calibration that knows nothing: all probabilities near 0.5, in the scores' order
MAX_SHARE = 1.5  # no source weighs more than this times its even share of its class
# What is searched for each kind. gamma in units of 1 / number of features, scikit-learn's 'scale' for standardised ones.
GRIDS = {
    "svm": [{"C": C, "gamma": g} for C in (0.3, 1, 3, 10, 30) for g in (0.1, 0.3, 1, 3)],
    "linear-svm": [{"C": C} for C in (1e-4, 1e-3, 1e-2, 1e-1, 1)],
    "logistic": [{"C": C} for C in (1e-4, 1e-3, 1e-2, 1e-1, 1)],
    "mlp": [{"alpha": a} for a in (0.1, 1, 10, 30)],
}


# ---- rows ----


def fold_rows(labels, groups, seed):
    """List of FOLDS (train, test) row numbers, stratified by label, no group on both sides. Raises UsageError."""
    number = [len(np.unique(groups[labels == label])) for label in (0, 1)]
    if min(number) < FOLDS:
        raise UsageError(
            f"only {min(number)} groups of {CLASSES[int(np.argmin(number))]} images for {FOLDS}"
            " folds: add images of other sources, or ones that are no copies"
        )
    return probes.fold_rows(labels, groups, seed)


def balanced_weights(labels):
    """Weight of each row, mean 1, the same sum for both classes: probabilities then hold at equal shares."""
    return (len(labels) / (2 * np.bincount(labels, minlength=2)))[labels]


def row_weights(labels, sources, unnamed=""):
    """Weight of each row for fitting, mean 1: classes even, and within a class no source dominates.

    A source weighs as many images as it has, but at most MAX_SHARE times its even share of the class. Images without a
    source (`unnamed`) count one by one.
    """
    weight = np.ones(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        names, source, counts = np.unique(sources[rows], return_inverse=True, return_counts=True)
        if len(names) > 1 and not (names == unnamed).any():
            weight[rows] = (capped(counts, MAX_SHARE / len(names)) / counts)[source]
        weight[rows] *= len(labels) / (2 * weight[rows].sum())
    return weight


def capped(counts, largest):
    """Counts [k] -> counts cut at a height above which none has more than the share `largest` of their sum, float64 [k]."""
    low, high = 0.0, float(counts.max())
    for _ in range(60):  # the share of the highest falls with the cut
        middle = (low + high) / 2
        cut = np.minimum(counts, middle)
        low, high = (middle, high) if cut.max() <= largest * cut.sum() else (low, middle)
    return np.minimum(counts, high).astype(float)


def search_rows(labels, groups, images, seed, most):
    """At most `most` row numbers, one view of an image, all groups in turn: of the smaller class as many as there
    are, up to half."""
    order = np.random.default_rng(seed).permutation(len(labels))
    first = order[
        np.sort(np.unique(images[order], return_index=True)[1])
    ]  # the first view that comes
    of_class = [first[labels[first] == label] for label in (0, 1)]
    small = min(len(of_class[0]), len(of_class[1]), most // 2)
    drawn = [
        rows[draw_evenly(groups[rows].tolist(), most - small if len(rows) > small else small, seed)]
        for rows in of_class
    ]
    return np.sort(np.concatenate(drawn))


# ---- fitting ----


def one_thread():
    """Context in which BLAS and OpenMP take one thread: with more, sums are added in another order,
    and the same features and seed give a slightly different model. scikit-learn-intelex has its own
    threads.
    """
    import sklearn.svm  # noqa: F401  libraries are limited only once they are loaded
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


def estimator(kind, dim, seed, C=1.0, gamma=1.0, alpha=1.0):
    """scikit-learn's estimator of that kind, not fitted yet."""
    if kind == "svm":
        return svc()(C=C, gamma=gamma / dim, cache_size=kernel_cache_mb())
    if kind == "linear-svm":
        from sklearn.svm import LinearSVC

        return LinearSVC(C=C, dual="auto", max_iter=5000, random_state=seed)
    if kind == "logistic":
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=C, max_iter=2000)
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier((HIDDEN,), alpha=alpha, max_iter=40, random_state=seed)


def kernel_cache_mb():
    """What an SVM's fit may take to keep its kernel, as it needs it: 4 GB, but no more than a quarter of the machine's memory.

    48,000 rows with 18,471 support vectors fit in 42 s, with 1 GB in 145 s.
    """
    if not hasattr(os, "sysconf"):
        return 1000
    return min(4000, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4_000_000)


def svc():
    """scikit-learn's SVC, or the same problem solved by scikit-learn-intelex, 9 to 16 times as fast, where that is installed."""
    try:
        from sklearnex.svm import SVC
    except ImportError:
        from sklearn.svm import SVC
    return SVC


def fit(kind, features, labels, weight, seed, **point):
    """-> the fitted classifier as the plain arrays that score.decision scores with, and its kind. Of images in pieces, float32
    [n, pieces, d], each piece is a row of its own with its share of the weight."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.preprocessing import StandardScaler

    if features.ndim == 3:
        number = features.shape[1]
        features, labels, weight = (
            features.reshape(-1, features.shape[2]),
            labels.repeat(number),
            weight.repeat(number) / number,
        )
    scaler = StandardScaler().fit(features)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # a fixed number of rounds is part of the recipe
        fitted = estimator(kind, features.shape[1], seed, **point).fit(
            scaler.transform(features), labels, sample_weight=weight
        )
    return {"classifier": kind, **plain_arrays(kind, scaler, fitted)}


def plain_arrays(kind, scaler, fitted):
    """Fitted scaler and estimator -> dict of arrays and numbers (file.CLASSIFIERS)."""
    arrays = {"center": scaler.mean_.astype(float), "scale": scaler.scale_.astype(float)}
    if kind == "mlp":
        (w1, w2), (b1, b2) = fitted.coefs_, fitted.intercepts_
        return arrays | {
            "hidden_weights": w1.astype(np.float32),
            "hidden_bias": b1.astype(np.float32),
            "output_weights": w2[:, 0].astype(np.float32),
            "intercept": float(b2[0]),
        }
    arrays["intercept"] = float(fitted.intercept_[0])
    if kind == "svm":
        return arrays | {
            "support_vectors": fitted.support_vectors_.astype(np.float32),
            "dual_coef": fitted.dual_coef_[0],
            "gamma": float(fitted.gamma),
        }
    return arrays | {"coef": fitted.coef_[0].astype(float)}


def out_of_fold(kind, features, labels, weight, folds, seed, **point):
    """Decision value of each row by a classifier that has not seen its group, float64 [n]."""
    scores = np.empty(len(labels))
    for train, test in folds:
        scores[test] = decision(
            fit(kind, features[train], labels[train], weight[train], seed, **point), features[test]
        )
    return scores


def search(kind, features, labels, weight, groups, images, seed):
    """The point of the kind's grid with the best out-of-fold AUC on at most SEARCH_ROWS images, one view of each.

    By successive halving (Jamieson and Talwalkar 2016): all points on a quarter of the rows, the best third of them on
    half, the best third of those on all. Few images are not worth halving.
    """
    from scipy.stats import rankdata
    from tqdm import tqdm

    points = GRIDS[kind]
    most = SEARCH_ROWS // (features.shape[1] if features.ndim == 3 else 1)
    for halving in range(HALVINGS if len(np.unique(images)) >= most else 0, -1, -1):
        rows = search_rows(labels, groups, images, seed, most >> halving)
        x, y, w = features[rows], labels[rows], weight[rows]
        folds = fold_rows(
            y, groups[rows], seed + 1
        )  # not the folds that calibrate: there the chosen point looks too good

        def quality(point):  # proportional to the AUC
            return rankdata(out_of_fold(kind, x, y, w, folds, seed, **point))[y == 1].sum()

        order = np.argsort(
            [-quality(point) for point in tqdm(points, desc=f"searching, {kind}")], kind="stable"
        )
        points = [points[i] for i in order[: -(-len(points) // 3) if halving else 1]]
    return points[0]


def fit_sigmoid(scores, labels):
    """Platt's sigmoid with his smoothed targets, classes weighted equal: P(fake) = 1 / (1 + exp(a score + b)).

    The same as CalibratedClassifierCV(method='sigmoid', ensemble=False) on these scores, but the
    slope keeps its sign. Out-of-fold scores of a few groups may be worse than chance, and a free
    slope would then turn every verdict round. -> float64 [a, b], a at most FLATTEST
    """
    from scipy.optimize import minimize

    weight = balanced_weights(labels)
    n_real, n_fake = (weight[labels == label].sum() for label in (0, 1))
    target = np.where(labels == 1, (n_fake + 1) / (n_fake + 2), 1 / (n_real + 2))

    def loss(ab):
        z = ab[0] * scores + ab[1]
        p = 0.5 * (1 - np.tanh(0.5 * z))
        slope = weight * (target - p)
        return (weight * (np.logaddexp(0, z) - (1 - target) * z)).sum(), np.array(
            [slope @ scores, slope.sum()]
        )

    return minimize(
        loss,
        [-1.0, 0.0],
        jac=True,
        method="L-BFGS-B",
        bounds=[(None, FLATTEST), (None, None)],
        options={"gtol": 1e-6, "ftol": 64 * np.finfo(float).eps},
    ).x


def calibrated(fitted, point, scores, rows):
    """A fitted classifier -> its part of the model: with the sigmoid on its out-of-fold scores, these, and what the service's drift
    is measured from, each class's mean of the standardised untouched images. `rows`: rows.Rows."""
    x = standardise(fitted, whole_of(rows.features))
    return {
        **fitted,
        "hyperparameters": point,
        "calibrator": fit_sigmoid(scores, rows.labels),
        "means": np.stack([x[rows.whole & (rows.labels == label)].mean(0) for label in (0, 1)]),
        "out_of_fold": {
            "scores": scores.astype(np.float32),
            "labels": rows.labels.astype(np.int8),
            "view": rows.columns["view"].astype(np.int8),
        },
    }
