"""Does another head on the same features raise AUC on repositories that were held out?

    python extract_features.py --clip_model ViT-B/16-8bit --data_dir data --output_file held.npz \
        --layers 8,10,11 --views 2
    python -m benchmarks.levers --features_file held.npz --sources_file SOURCES.csv
    python -m benchmarks.levers --features_file held.npz --sources_file SOURCES.csv --C 1e-4

Each change costs no second pass in service. Folds and images are those of benchmarks.held_out, so
`test` and `external` are not used. The base is the shipped recipe without its degraded copies:
block 10 alone, logistic regression, the weights of train_model.py. Each row has its best C, chosen
on the same untouched images. "Degraded" is a degraded copy of each image. The differences are
paired, with 95% intervals over sources. Prints Markdown.
"""

import argparse
from collections import namedtuple
from functools import partial

import numpy as np
from sklearn.decomposition import PCA

from benchmarks.held_out import FOLDS, difference, drawn_aucs, prepared_columns
from benchmarks.measure import heading, row
from detector.base.console import Help, run, say
from detector.base.errors import UsageError
from detector.features.file import load_features
from detector.training.classifiers import estimator, row_weights

BASE_BLOCK = "10"
C = {"logistic": (1e-5, 1e-4, 1e-3, 1e-2), "svm": (0.3, 1, 3)}
GAMMA = 0.1  # of an SVM, times the number of features


# ---- heads: fitted on rows of a fold's others, they score any rows ----


def standardised(features, train):
    """Mean 0 and deviation 1 over the training rows."""
    return (features - features[train].mean(0)) / features[train].std(0)


def centred(features, train):
    """Mean 0 over the training rows, and one common scale."""
    features = features - features[train].mean(0)
    return features / features[train].std()


def unit_length(features, train):
    """Standardised, then each image scaled to length sqrt(d), so that C means the same."""
    features = standardised(features, train)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / length * features.shape[1] ** 0.5


def components(number, features, train):
    """The first principal components of the training rows, each with deviation 1."""
    features = standardised(features, train)
    return PCA(number, whiten=True, random_state=0).fit(features[train]).transform(features)


def head_scores(features, labels, weight, train, kind, value):
    """Fitted on the rows `train` -> scores of all rows, deviation 1 over the training rows."""
    point = {"C": value, **({"gamma": GAMMA} if kind == "svm" else {})}
    head = estimator(kind, features.shape[1], 0, **point)
    head.fit(features[train], labels[train], sample_weight=weight)
    scores = head.decision_function(features)
    return scores / scores[train].std()


# ---- weights of the training images ----


def even_classes(labels, sources):
    return row_weights(labels, np.full(len(labels), ""))


def by_source(power, labels, sources):
    """A source weighs as the `power` of its images: 0 is the same for each source."""
    weight = np.ones(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        _, source, counts = np.unique(sources[rows], return_inverse=True, return_counts=True)
        weight[rows] = counts[source] ** (power - 1.0)
        weight[rows] *= len(labels) / (2 * weight[rows].sum())
    return weight


Lever = namedtuple("Lever", "blocks, weights, copies, scaled, kinds")
BASE = Lever([(BASE_BLOCK,)], row_weights, 0, standardised, ["logistic"])


def levers(blocks):
    """{words: Lever} of what is tried. `blocks`: those of the features file."""
    others = [block for block in blocks if block != BASE_BLOCK]
    tried = {
        f"base: block {BASE_BLOCK}, logistic": BASE,
        "weights: classes alone": BASE._replace(weights=even_classes),
        "weights: root of a source's images": BASE._replace(weights=partial(by_source, 0.5)),
        "weights: the same for each source": BASE._replace(weights=partial(by_source, 0)),
        "one degraded copy of each": BASE._replace(copies=1),
        "two degraded copies of each": BASE._replace(copies=2),
        "centred, not standardised": BASE._replace(scaled=centred),
        "standardised, then unit length": BASE._replace(scaled=unit_length),
    }
    for number in (32, 64, 128, 256):
        tried[f"{number} principal components"] = BASE._replace(scaled=partial(components, number))
    for block in others:
        tried[f"block {block}"] = BASE._replace(blocks=[(block,)])
        tried[f"blocks {BASE_BLOCK} and {block} joined"] = BASE._replace(
            blocks=[(BASE_BLOCK, block)]
        )
        tried[f"mean of heads on blocks {BASE_BLOCK} and {block}"] = BASE._replace(
            blocks=[(BASE_BLOCK,), (block,)]
        )
    tried["mean of heads on all blocks"] = BASE._replace(blocks=[(block,) for block in blocks])
    tried["RBF SVM"] = BASE._replace(kinds=["svm"])
    tried["mean of logistic and RBF SVM"] = BASE._replace(kinds=["logistic", "svm"])
    return tried


# ---- measuring ----


def points_of(kinds, grid):
    """-> [{kind: C}] to try. A kind with fewer values keeps its last."""
    most = max(len(grid[kind]) for kind in kinds)
    return [
        {kind: grid[kind][min(place, len(grid[kind]) - 1)] for kind in kinds}
        for place in range(most)
    ]


def scores_of(lever, columns, features, point):
    """Scores of all rows, float64 [n]: those of fold k by heads fitted without fold k.

    `features`: {block: [n, d]}. `point`: {kind: C}.
    """
    labels, scores = columns["labels"], np.zeros(len(columns["labels"]))
    for k in range(FOLDS):
        train = np.flatnonzero((columns["fold"] != k) & (columns["view"] <= lever.copies))
        weight = lever.weights(labels[train], columns["sources"][train])
        heads = [
            head_scores(
                lever.scaled(np.hstack([features[block] for block in blocks]), train),
                *(labels, weight, train, kind, point[kind]),
            )
            for blocks in lever.blocks
            for kind in lever.kinds
        ]
        own = columns["fold"] == k
        scores[own] = np.mean(heads, axis=0)[own]
    return scores


def best_of(lever, columns, features, conditions, grid):
    """-> (value of C, [result of `drawn_aucs` of each condition]) with the best untouched AUC."""
    tried = []
    for point in points_of(lever.kinds, grid):
        scores = scores_of(lever, columns, features, point)
        results = []
        for rows in conditions:
            labels, fold, sources = (columns[name][rows] for name in ("labels", "fold", "sources"))
            results.append(drawn_aucs(labels, scores[rows], fold, sources))
        tried.append((", ".join(f"{value:g}" for value in point.values()), results))
    return max(tried, key=lambda pair: np.mean(pair[1][0][0]))


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    add("--features_file", required=True, metavar="FILE", help="features of several blocks")
    add("--sources_file", required=True, metavar="FILE", help="CSV: source and repository")
    add(
        "--C",
        type=float,
        nargs="+",
        default=C["logistic"],
        metavar="X",
        help="values of C to try, for logistic regression",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    stored = load_features(args.features_file)
    blocks = stored["meta"]["encoder"]["layers"].split(",")
    columns = prepared_columns(stored, 0, args.sources_file)
    if BASE_BLOCK not in blocks or columns["view"].max() < 2:
        raise UsageError(
            f"--features_file {args.features_file}: extract block {BASE_BLOCK} among others, with"
            " --views 2"
        )
    joined = columns["features"][:, 0].astype(float)
    features = dict(zip(blocks, np.split(joined, len(blocks), axis=1), strict=True))
    held = (columns["splits"] == "train") & (columns["fold"] >= 0)
    conditions = [np.flatnonzero(held & (columns["view"] == view)) for view in (0, 1)]
    print(
        f"Encoder `{stored['meta']['encoder']['name']}`, {len(conditions[0])} images of"
        f" {len(set(columns['sources'][conditions[0]]))} sources in {FOLDS} folds.\n"
    )
    heading("change", "C", "untouched", "to the base", "degraded", "to the base")
    base = None
    for words, lever in levers(blocks).items():
        say(words)
        value, results = best_of(lever, columns, features, conditions, C | {"logistic": args.C})
        base = base or results
        cells = (
            text
            for own, other in zip(results, base, strict=True)
            for text in (f"{np.mean(own[0]):.3f}", difference(own, other))
        )
        row(words, value, *cells)


if __name__ == "__main__":
    run(main)
