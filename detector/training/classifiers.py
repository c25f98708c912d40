"""Classifiers on frozen features: search, fit, out-of-fold scores and calibration.

Each ends as plain arrays, which detector/model/file.py stores.

svm           RBF support vector machine, the default
linear-svm    the same without a kernel
logistic      logistic regression
mlp           a neural network with one hidden layer
"""

import math
import os
import warnings

import numpy as np

from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.evaluation import probes
from detector.evaluation.probes import FOLDS
from detector.images.folders import draw_evenly
from detector.model.score import decision, standardise, whole_of

SEARCH_ROWS = 3000  # most rows in the search; an SVM's cost grows with the square of their number
HALVINGS = 2  # rounds of the search on fewer rows, each of which keeps the best third of the points
HIDDEN = 64
# Largest slope of a calibration. All probabilities are then near 0.5, in the order of the scores.
FLATTEST = -1e-3
MAX_SHARE = 1.5  # no source weighs more than this times its even share of its class
# Points to search. gamma is in units of 1 / number of features, scikit-learn's 'scale' for
# standardised features.
GRIDS = {
    "svm": [{"C": C, "gamma": g} for C in (0.3, 1, 3, 10, 30) for g in (0.1, 0.3, 1, 3)],
    "linear-svm": [{"C": C} for C in (1e-4, 1e-3, 1e-2, 1e-1, 1)],
    "logistic": [{"C": C} for C in (1e-4, 1e-3, 1e-2, 1e-1, 1)],
    "mlp": [{"alpha": a} for a in (0.1, 1, 10, 30)],
}


# ---- rows ----


def fold_rows(labels, groups, seed):
    """List of FOLDS (train, test) row numbers, stratified by label.

    No group is on both sides. Raises UsageError for too few groups.
    """
    numbers = [len(np.unique(groups[labels == label])) for label in (0, 1)]
    if min(numbers) < FOLDS:
        raise UsageError(
            f"only {min(numbers)} groups of {CLASSES[int(np.argmin(numbers))]} images for {FOLDS}"
            " folds: add images of other sources, or images that are no copies"
        )
    return probes.fold_rows(labels, groups, seed)


def balanced_weights(labels):
    """Weight of each row, mean 1, with the same sum for both classes."""
    return (len(labels) / (2 * np.bincount(labels, minlength=2)))[labels]


def row_weights(labels, sources, unnamed=""):
    """Weight of each row for fitting, mean 1: classes are even, and no source dominates its class.

    A source weighs as many images as it has, but at most MAX_SHARE times its even share of the
    class. A class with images of no source (`unnamed`) is not capped.
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
    """Counts [k] -> float64 [k], cut so that none exceeds the share `largest` of their sum."""
    low, high = 0.0, float(counts.max())
    for _ in range(60):  # bisection: a lower cut lowers the largest share
        middle = (low + high) / 2
        cut = np.minimum(counts, middle)
        low, high = (middle, high) if cut.max() <= largest * cut.sum() else (low, middle)
    return np.minimum(counts, high).astype(float)


def search_rows(labels, groups, images, seed, most):
    """At most `most` row numbers, one view of an image, drawn from all groups in turn.

    The smaller class gives all its images, but at most half of the rows.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    one_view = order[np.sort(np.unique(images[order], return_index=True)[1])]
    by_class = [one_view[labels[one_view] == label] for label in (0, 1)]
    small = min(*map(len, by_class), most // 2)
    drawn = [
        rows[draw_evenly(groups[rows].tolist(), most - small if len(rows) > small else small, seed)]
        for rows in by_class
    ]
    return np.sort(np.concatenate(drawn))


# ---- fitting ----


def one_thread():
    """Context in which BLAS and OpenMP use one thread.

    More threads add the terms of a sum in another order. The same features and seed would then give
    a slightly different model. scikit-learn-intelex keeps threads of its own.
    """
    import sklearn.svm  # noqa: F401  threadpoolctl limits only the libraries that are loaded
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


def estimator(kind, dim, seed, C=1.0, gamma=1.0, alpha=1.0):
    """scikit-learn's estimator of that kind, not yet fitted."""
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
    """Largest kernel cache of an SVM's fit, in MB: 4 GB, but at most a quarter of the memory.

    48,000 rows with 18,471 support vectors took 42 s with 4 GB and 145 s with 1 GB.
    """
    return min(4000, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4_000_000)


def svc():
    """The SVC of scikit-learn-intelex if that is installed, else scikit-learn's.

    The former solves the same problem 9 to 16 times as fast.
    """
    try:
        from sklearnex.svm import SVC
    except ImportError:
        from sklearn.svm import SVC
    return SVC


def fit(kind, features, labels, weight, seed, **point):
    """Features float32 [n, d] or [n, pieces, d] -> kind and plain arrays of the fitted classifier.

    Each piece of an image is a row of its own with its share of the weight.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.preprocessing import StandardScaler

    if features.ndim == 3:
        pieces = features.shape[1]
        features = features.reshape(-1, features.shape[2])
        labels, weight = labels.repeat(pieces), weight.repeat(pieces) / pieces
    scaler = StandardScaler().fit(features)
    classifier = estimator(kind, features.shape[1], seed, **point)
    with warnings.catch_warnings():
        # a fixed number of iterations is part of the recipe
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(scaler.transform(features), labels, sample_weight=weight)
    return {"classifier": kind, **plain_arrays(kind, scaler, classifier)}


def plain_arrays(kind, scaler, fitted):
    """Fitted scaler and estimator -> dict of arrays and numbers, as in file.CLASSIFIERS."""
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
        fitted = fit(kind, features[train], labels[train], weight[train], seed, **point)
        scores[test] = decision(fitted, features[test])
    return scores


def search(kind, features, labels, weight, groups, images, seed):
    """The point of the kind's grid with the best out-of-fold AUC, on at most SEARCH_ROWS images.

    The search sees a single view of each image. Successive halving (Jamieson and Talwalkar 2016)
    tries all points on a quarter of the rows, the best third of them on half, and the best third of
    those on all. With fewer images, all points are tried once, on all
    images. With crops the limit is SEARCH_ROWS over the number of pieces.
    """
    from scipy.stats import rankdata
    from tqdm import tqdm

    points = GRIDS[kind]
    most = SEARCH_ROWS // (features.shape[1] if features.ndim == 3 else 1)
    for halving in range(HALVINGS if len(np.unique(images)) >= most else 0, -1, -1):
        rows = search_rows(labels, groups, images, seed, most >> halving)
        x, y, w = features[rows], labels[rows], weight[rows]
        # not the folds of the calibration, where the chosen point would look too good
        folds = fold_rows(y, groups[rows], seed + 1)
        quality = []  # proportional to the AUC
        for point in tqdm(points, desc=f"searching, {kind}"):
            scores = out_of_fold(kind, x, y, w, folds, seed, **point)
            quality.append(rankdata(scores)[y == 1].sum())
        best_first = np.argsort(-np.array(quality), kind="stable")
        points = [points[i] for i in best_first[: math.ceil(len(points) / 3)]]
    return points[0]


def fit_sigmoid(scores, labels):
    """Platt's sigmoid P(fake) = 1 / (1 + exp(a score + b)) -> float64 [a, b], a at most FLATTEST.

    Classes are weighted equal, and targets are smoothed as in his paper. The same as
    CalibratedClassifierCV(method='sigmoid', ensemble=False) on these scores, but the slope keeps
    its sign. Out-of-fold scores of a few groups may be worse than chance, and a free slope would
    then reverse every verdict.
    """
    from scipy.optimize import minimize

    weight = balanced_weights(labels)
    n_real, n_fake = (weight[labels == label].sum() for label in (0, 1))
    target = np.where(labels == 1, (n_fake + 1) / (n_fake + 2), 1 / (n_real + 2))

    def loss(ab):
        z = ab[0] * scores + ab[1]
        p = 0.5 * (1 - np.tanh(0.5 * z))
        slope = weight * (target - p)
        value = (weight * (np.logaddexp(0, z) - (1 - target) * z)).sum()
        return value, np.array([slope @ scores, slope.sum()])

    return minimize(
        loss,
        [-1.0, 0.0],
        jac=True,
        method="L-BFGS-B",
        bounds=[(None, FLATTEST), (None, None)],
        options={"gtol": 1e-6, "ftol": 64 * np.finfo(float).eps},
    ).x


def calibrated(fitted, point, scores, rows):
    """A fitted classifier and rows.Rows -> its part of the model, calibrated on out-of-fold scores.

    `means` holds each class's mean of the standardised untouched images. The service measures drift
    from them.
    """
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
            "groups": rows.groups.astype(np.int64),
        },
    }
