"""Training: what an SVM costs from 3,000 to 48,000 rows of 768 features, against scikit-learn's own, and the whole command.

    python -m benchmarks.training                                        # fits, and where linear ones overtake: half an hour
    python -m benchmarks.training --rows --whole 48000                   # the whole command on the Kaggle set's shape
    python -m benchmarks.training --rows --whole 48000 --stock           # and its verdicts against scikit-learn's SVC: an hour more

The features are made up: two classes of twenty clusters each in a space of 64 dimensions, mixed into 768 with some noise,
so that an SVM errs on a few per cent and keeps a quarter of the rows as support vectors. What is measured is time and
agreement, not how well anything detects. Prints Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
from detector.base.files import sha256
from detector.images.facts import FACTS
from detector.model.file import load_model
from detector.model.score import decision, squares_of, standardise
from detector.training import classifiers

HELD_OUT = 12_000
POINT = {"C": 10.0, "gamma": 1.0}  # what the search finds on these rows
COMPONENTS = 2000  # of the Nystroem map


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="*",
        default=[3000, 6000, 12000, 24000, 48000],
        help="of the table of fits",
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
        help="of each fit up to 12,000 rows, in turns; larger ones run once",
    )
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
    return parser.parse_args(argv)


def made_up(n, d=768, clusters=40, dimensions=64, apart=0.55, seed=0):
    """-> features float32 [n, d], labels int [n]."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(1)
    mix = fixed.standard_normal((dimensions, d)).astype(np.float32) / np.sqrt(dimensions)
    scale = (1 / np.sqrt(1 + np.arange(dimensions) / 8)).astype(np.float32)
    centres = fixed.standard_normal((clusters, dimensions)).astype(np.float32) * apart
    cluster = rng.integers(0, clusters, n)
    latent = (centres[cluster] + rng.standard_normal((n, dimensions)).astype(np.float32)) * scale
    return (latent @ mix + 0.2 * rng.standard_normal((n, d)).astype(np.float32)).astype(
        np.float32
    ), cluster % 2


def write_features(path, features, labels, train):
    """A features file of the Kaggle set's layout: train and test, two classes, no sources."""
    n, facts, rng = len(labels), np.zeros(len(labels), FACTS), np.random.default_rng(2)
    facts["width"], facts["height"], facts["bytes"], facts["format"] = (
        640,
        480,
        rng.integers(40_000, 60_000, n),
        "JPEG",
    )
    facts["density"] = rng.uniform(0.1, 0.3, n)
    encoder = {
        "name": "made-up",
        "identity": "ab" * 32,
        "layers": "final",
        "dim": features.shape[1],
    }
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


# ---- one fit each: function of (x, y) -> function of rows -> scores ----


def stock(x, y):
    from sklearn.svm import SVC

    fitted = SVC(
        C=POINT["C"], gamma=POINT["gamma"] / x.shape[1], cache_size=classifiers.kernel_cache_mb()
    ).fit(x, y)
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

    fitted = make_pipeline(
        Nystroem(
            gamma=POINT["gamma"] / x.shape[1], n_components=min(COMPONENTS, len(x)), random_state=0
        ),
        LinearSVC(C=1.0, dual="auto", max_iter=5000, random_state=0),
    ).fit(x, y)
    return fitted.decision_function, 0


def growth(args):
    """The table of fits: seconds (median, lowest to highest), support vectors, accuracy on rows that nothing was fitted on."""
    most = max(args.rows)
    features, labels = made_up(most + HELD_OUT)
    held, truth = features[most:], labels[most:]
    print(
        "| rows | fit | seconds | against scikit-learn's | support vectors | accuracy on 12,000"
        " others | ms a verdict |\n|---|---|---|---|---|---|---|"
    )
    for n in args.rows:
        fits = {
            "scikit-learn `SVC`": stock,
            "ours, `svm`": ours,
            "`linear-svm`": linear,
            f"Nystroem of {COMPONENTS}": nystroem,
        }
        if n > args.stock_rows:
            del fits["scikit-learn `SVC`"]
        center, scale = features[:n].mean(0), features[:n].std(0)
        x, seconds, result = (features[:n] - center) / scale, {name: [] for name in fits}, {}
        for _ in range(args.runs if n <= 12_000 else 1):
            for name, function in fits.items():
                started = time.perf_counter()
                result[name] = function(x, labels[:n])
                seconds[name].append(time.perf_counter() - started)
        for name, (score, vectors) in result.items():
            accuracy = ((score((held - center) / scale) > 0) == truth).mean()
            one = np.median([timed(score, (held[i : i + 1] - center) / scale) for i in range(50)])
            base = (
                np.median(seconds["scikit-learn `SVC`"]) / np.median(seconds[name])
                if "scikit-learn `SVC`" in seconds
                else None
            )
            print(
                f"| {n:,} | {name} | {words(seconds[name])} |"
                f" {'-' if base is None else f'{base:.1f} x'} | {vectors or '-'} | {accuracy:.4f} |"
                f" {1000 * one:.2f} |",
                flush=True,
            )


def timed(function, *arguments):
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def words(seconds):
    return f"{np.median(seconds):.2f}" + (
        f" ({min(seconds):.2f} to {max(seconds):.2f})" if len(seconds) > 1 else ""
    )


def whole(n, compare):
    """train_model.py as a process; its seconds, peak memory, and with `compare` its verdicts against scikit-learn's SVC."""
    features, labels = made_up(n + HELD_OUT)
    with tempfile.TemporaryDirectory() as folder:
        write_features(Path(folder, "features.npz"), features, labels, n)
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, ROOT / "train_model.py"], cwd=folder)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            sys.exit("train_model.py failed")
        model = load_model(Path(folder, "model.joblib"))
    point = model["hyperparameters"]
    print(
        f"\nThe whole command on {n:,} training and {HELD_OUT:,} test rows: {seconds:.0f} s, peak"
        f" memory {used.ru_maxrss / 1e6:.1f} GB; {point}, {len(model['dual_coef']):,} support"
        f" vectors, solver {model['versions']['svm']}."
    )
    score = decision(model, features[n:])
    alone = np.median([timed(decision, model, features[i : i + 1]) for i in range(50)])
    print(f"A verdict's score: {1000 * alone:.2f} ms.", flush=True)
    if compare:
        from sklearn.svm import SVC

        weight = classifiers.balanced_weights(labels[:n])
        x = standardise(model, features[:n])
        started = time.perf_counter()
        fitted = SVC(
            C=point["C"],
            gamma=point["gamma"] / x.shape[1],
            cache_size=classifiers.kernel_cache_mb(),
        ).fit(x, labels[:n], sample_weight=weight)
        seconds, theirs = (
            time.perf_counter() - started,
            fitted.decision_function(standardise(model, features[n:])),
        )
        print(
            f"scikit-learn's SVC, one fit: {seconds:.0f} s. Verdicts at score 0 that differ on"
            f" {HELD_OUT:,} held-out rows: {((score > 0) != (theirs > 0)).sum()}; scores differ by"
            f" at most {np.abs(score - theirs).max():.1e}."
        )


def main(argv=None):
    args = parse_args(argv)
    if (
        args.whole
    ):  # first, since a child's peak memory counts from what its parent held when it was born
        whole(args.whole, args.stock)
    if args.rows:
        growth(args)


if __name__ == "__main__":
    main()
