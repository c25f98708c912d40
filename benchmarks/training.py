"""Training: what an SVM costs from 3,000 to 48,000 rows of 768 features, against scikit-learn's.

    python -m benchmarks.training
    python -m benchmarks.training --rows --whole 48000
    python -m benchmarks.training --rows --whole 48000 --stock

The first line measures single fits, half an hour. The second runs the whole command on rows of the
Kaggle set's shape. The third compares its verdicts with those of scikit-learn's SVC, an hour more.

The features are made up: two classes of twenty clusters each in a space of 64 dimensions, mixed
into 768 with some noise. An SVM errs on a few per cent of them and keeps a quarter of the rows as
support vectors. Time and agreement are measured, not how well anything detects. Prints Markdown.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import heading, row, run, spread
from detector.base.files import sha256
from detector.images.facts import FACTS
from detector.model.file import load_model
from detector.model.score import decision, squares_of, standardise
from detector.training import classifiers

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 12_000
POINT = {"C": 10.0, "gamma": 1.0}  # the best of the grid on these rows
COMPONENTS = 2000  # of the Nystroem map
ENCODER = {"name": "made-up", "identity": "ab" * 32, "layers": "final", "dim": 768}


def add_fit_arguments(parser):
    parser.add_argument(
        "--rows",
        type=int,
        nargs="*",
        default=[3000, 6000, 12000, 24000, 48000],
        help="numbers of rows in the table of fits",
    )
    parser.add_argument(
        "--stock_rows",
        type=int,
        default=12000,
        help="largest fit by scikit-learn's own SVC: 48,000 take an hour",
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=3,
        help="runs of each fit up to 12,000 rows, in turns; larger ones run once",
    )


def add_whole_arguments(parser):
    parser.add_argument(
        "--whole",
        type=int,
        default=0,
        metavar="N",
        help="also train_model.py on N rows, as a process",
    )
    parser.add_argument(
        "--stock",
        action="store_true",
        help="fit scikit-learn's SVC at the point that train_model.py chose",
    )


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_fit_arguments(parser)
    add_whole_arguments(parser)
    return parser.parse_args(argv)


def made_up(n, d=768, clusters=40, dimensions=64, apart=0.55, seed=0):
    """-> features float32 [n, d], labels int [n]."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(1)
    mix = fixed.standard_normal((dimensions, d)).astype(np.float32) / np.sqrt(dimensions)
    scale = (1 / np.sqrt(1 + np.arange(dimensions) / 8)).astype(np.float32)
    centres = fixed.standard_normal((clusters, dimensions)).astype(np.float32) * apart
    cluster = rng.integers(0, clusters, n)
    latent = (centres[cluster] + rng.standard_normal((n, dimensions)).astype(np.float32)) * scale
    noise = 0.2 * rng.standard_normal((n, d)).astype(np.float32)
    return (latent @ mix + noise).astype(np.float32), cluster % 2


def write_features(path, features, labels, train, encoder=ENCODER):
    """A features file of the Kaggle set's layout: train and test, two classes, no sources."""
    n, facts, rng = len(labels), np.zeros(len(labels), FACTS), np.random.default_rng(2)
    facts["width"], facts["height"], facts["format"] = 640, 480, "JPEG"
    facts["bytes"] = rng.integers(40_000, 60_000, n)
    facts["density"] = rng.uniform(0.1, 0.3, n)
    np.savez(
        path,
        features=features,
        labels=labels.astype(np.int8),
        facts=facts,
        view=np.zeros(n, np.int8),
        paths=np.array([f"{i:06d}.jpg" for i in range(n)]),
        splits=np.where(np.arange(n) < train, "train", "test"),
        sources=np.full(n, ""),
        sha256=np.array([sha256(str(i).encode()) for i in range(n)]),
        thumb=rng.integers(0, 256, (n, 64)).astype(np.uint8),
        meta=np.array(json.dumps({"encoder": encoder})),
    )


# ---- single fits: function of (x, y) -> (function of rows -> scores, support vectors) ----


def svc(x, y, C, gamma, weight=None):
    """scikit-learn's own SVC, with as large a cache as ours."""
    from sklearn.svm import SVC

    cache = classifiers.kernel_cache_mb()
    return SVC(C=C, gamma=gamma / x.shape[1], cache_size=cache).fit(x, y, sample_weight=weight)


def stock(x, y):
    fitted = svc(x, y, **POINT)
    return fitted.decision_function, len(fitted.dual_coef_[0])


def ours(x, y):
    fitted = classifiers.fit("svm", x, y, np.ones(len(y)), 0, **POINT)
    fitted["squares"] = squares_of(fitted)  # as load_model does
    return lambda rows: decision(fitted, rows), len(fitted["dual_coef"])


def linear(x, y):
    fitted = classifiers.estimator("linear-svm", x.shape[1], 0, C=1e-3).fit(x, y)
    return fitted.decision_function, 0


def nystroem(x, y):
    from sklearn.kernel_approximation import Nystroem
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    gamma, components = POINT["gamma"] / x.shape[1], min(COMPONENTS, len(x))
    fitted = make_pipeline(
        Nystroem(gamma=gamma, n_components=components, random_state=0),
        LinearSVC(C=1.0, dual="auto", max_iter=5000, random_state=0),
    ).fit(x, y)
    return fitted.decision_function, 0


STOCK = "scikit-learn `SVC`"
FITS = {STOCK: stock, "ours, `svm`": ours, "`linear-svm`": linear}
FITS[f"Nystroem of {COMPONENTS}"] = nystroem


def growth(args):
    """Print the table of fits. The accuracy is on rows that no classifier was fitted on."""
    features, labels = made_up(max(args.rows) + HELD_OUT)
    heading(
        "rows",
        "fit",
        "seconds",
        "against scikit-learn's",
        "support vectors",
        "accuracy on 12,000 others",
        "ms a verdict",
    )
    for n in args.rows:
        fits = {name: fit for name, fit in FITS.items() if name != STOCK or n <= args.stock_rows}
        x = (features - features[:n].mean(0)) / features[:n].std(0)
        runs = args.runs if n <= 12_000 else 1
        seconds, fitted = time_fits(fits, x[:n], labels[:n], runs)
        for name, (score, vectors) in fitted.items():
            held = x[-HELD_OUT:]
            accuracy = ((score(held) > 0) == labels[-HELD_OUT:]).mean()
            base = np.median(seconds[STOCK]) / np.median(seconds[name]) if STOCK in fits else None
            row(
                f"{n:,}",
                name,
                spread(seconds[name]) if runs > 1 else f"{seconds[name][0]:.2f}",
                "-" if base is None else f"{base:.1f} x",
                vectors or "-",
                f"{accuracy:.4f}",
                f"{1000 * seconds_a_verdict(score, held):.2f}",
            )


def time_fits(fits, x, y, runs):
    """-> ({name: [seconds]}, {name: the last fit}), in turns"""
    seconds, fitted = {name: [] for name in fits}, {}
    for _ in range(runs):
        for name, fit in fits.items():
            started = time.perf_counter()
            fitted[name] = fit(x, y)
            seconds[name].append(time.perf_counter() - started)
    return seconds, fitted


def seconds_a_verdict(score, rows):
    """Median seconds to score a single row."""
    seconds = []
    for i in range(50):
        started = time.perf_counter()
        score(rows[i : i + 1])
        seconds.append(time.perf_counter() - started)
    return np.median(seconds)


# ---- the whole command ----


def train(features, labels, n):
    """train_model.py as a process -> (model, seconds, peak GB)"""
    with tempfile.TemporaryDirectory() as folder:
        write_features(Path(folder, "features.npz"), features, labels, n)
        model = Path(folder, "model.joblib")
        files = ["--features_file", Path(folder, "features.npz"), "--model_output_path", model]
        seconds, megabytes = run([sys.executable, ROOT / "train_model.py", *files])
        return load_model(model), seconds, megabytes / 1000


def whole(n, compare):
    """Print seconds and memory of train_model.py; `compare`: its verdicts with SVC's too."""
    features, labels = made_up(n + HELD_OUT)
    model, seconds, gigabytes = train(features, labels, n)
    print(
        f"\nThe whole command on {n:,} training and {HELD_OUT:,} test rows: {seconds:.0f} s, peak"
        f" memory {gigabytes:.1f} GB; {model['hyperparameters']}, {len(model['dual_coef']):,}"
        f" support vectors, solver {model['versions']['svm']}."
    )
    alone = seconds_a_verdict(lambda rows: decision(model, rows), features)
    print(f"A verdict's score: {1000 * alone:.2f} ms.", flush=True)
    if compare:
        compare_verdicts(model, features, labels, n)


def compare_verdicts(model, features, labels, n):
    """Fit scikit-learn's SVC at the model's point, and print how far the two differ."""
    x, weight = standardise(model, features), classifiers.balanced_weights(labels[:n])
    started = time.perf_counter()
    fitted = svc(x[:n], labels[:n], **model["hyperparameters"], weight=weight)
    seconds = time.perf_counter() - started
    score, theirs = decision(model, features[n:]), fitted.decision_function(x[n:])
    print(
        f"scikit-learn's SVC, one fit: {seconds:.0f} s. Verdicts at score 0 that differ on"
        f" {HELD_OUT:,} held-out rows: {((score > 0) != (theirs > 0)).sum()}; scores differ by"
        f" at most {np.abs(score - theirs).max():.1e}."
    )


def main(argv=None):
    args = parse_args(argv)
    if args.whole:
        whole(args.whole, args.stock)
    if args.rows:
        growth(args)


if __name__ == "__main__":
    main()
