"""AUC on whole repositories of images that were held out: this figure chooses a recipe.

    CLIP_MODEL=ViT-B/16-8bit python extract_features.py --data_dir data --output_file held.npz \
        --views 1 --layers 10
    python -m benchmarks.held_out --features_file held.npz --sources_file SOURCES.csv \
        --classifier logistic --C 1e-4 1e-3
    python -m benchmarks.held_out --features_file held.npz --data_dir data \
        --sources_file SOURCES.csv --C 1 3 10 --gamma 0.1 0.3 1

So `test` and `external` can wait until the recipe is chosen. Three folds hold whole repositories,
laid out without chance, with about as many images of each class. A classifier is fitted on `train`
and `extra` without a fold's repositories, and scored on that fold's images of `train`. Prints
Markdown.
"""

import argparse
import csv
import itertools
from pathlib import Path

import numpy as np

from benchmarks.measure import heading, row
from detector.base.console import Help, need_features, need_folder, run
from detector.base.errors import UsageError
from detector.base.files import read_bytes
from detector.encoders import runtime
from detector.evaluation import intervals, metrics
from detector.features.columns import COLUMNS
from detector.features.file import crops_of, load_features, take_crops
from detector.images import decoding, preprocessing
from detector.images.distort import RESAVED, resaved
from detector.model.score import decision
from detector.training.classifiers import fit, row_weights

FOLDS = 3


def add_input_arguments(parser):
    parser.add_argument(
        "--features_file",
        required=True,
        metavar="FILE",
        help="features, with the degraded copies and crops to try",
    )
    parser.add_argument(
        "--data_dir", metavar="DIR", help="the images, to measure them re-saved as well"
    )
    parser.add_argument(
        "--sources_file",
        required=True,
        metavar="FILE",
        help="CSV with the columns source and repository",
    )


def add_classifier_arguments(parser):
    parser.add_argument(
        "--classifier",
        choices=["svm", "linear-svm", "logistic"],
        default="svm",
        help="kind of classifier",
    )
    parser.add_argument(
        "--C", type=float, nargs="+", default=[10.0], metavar="X", help="values of C to try"
    )
    parser.add_argument(
        "--gamma",
        type=float,
        nargs="+",
        default=[0.3],
        metavar="X",
        help="values of gamma times the number of features, for an svm",
    )


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add_input_arguments(parser)
    add_classifier_arguments(parser)
    args = parser.parse_args(argv)
    if args.data_dir:
        need_folder(args.data_dir)
    need_features(args.features_file)
    return args


def read_repositories(path, sources):
    """CSV file -> {source: repository}. Raises UsageError where a source has none."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            repositories = {row["source"]: row["repository"] for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError):
        raise UsageError(
            f"--sources_file {path}: name a CSV file with the columns source and repository"
        ) from None
    if missing := sorted(set(sources) - set(repositories)):
        raise UsageError(
            f"--sources_file {path}: names no repository of '{missing[0]}' ({len(missing)} sources"
            " in all): add a line for each"
        )
    return repositories


def folds_of(repositories, labels):
    """Repository and label of each image to score -> {repository: fold}.

    The largest repository comes first. Each goes to the fold that keeps the classes most even.
    """
    names, number = np.unique(repositories, return_inverse=True)
    counts = [np.bincount(number[labels == label], minlength=len(names)) for label in (0, 1)]
    size, load, fold = np.stack(counts, 1), np.zeros((FOLDS, 2)), {}
    for i in np.argsort(-size.sum(1), kind="stable"):
        after = [((load + np.eye(FOLDS)[:, [k]] * size[i]) ** 2).sum() for k in range(FOLDS)]
        fold[names[i]] = int(np.argmin(after))
        load[fold[names[i]]] += size[i]
    return fold


def encode_resaved(encoder, data_dir, paths, crops, share, quality):
    """Features of the images as a web site re-saves them, float32 [n, 1 + crops, d]."""
    features = []
    for path in paths:
        image = resaved(decoding.decode_image(read_bytes(Path(data_dir, path))), share, quality)
        pieces = preprocessing.in_pieces(image, encoder.transform, crops)
        features.append(
            encoder.encode(preprocessing.normalise(np.stack(pieces), encoder.transform))
        )
    return np.stack(features)


def drawn_aucs(labels, scores, fold, sources):
    """-> (AUC of each fold, draws of their mean, groups of the rarer class).

    Sources are drawn anew within each fold, whatever the scores.
    """
    masks = [fold == k for k in np.unique(fold)]
    aucs = [metrics.drawn_auc(labels[m], scores[m], sources[m]) for m in masks]
    values, drawn, numbers = zip(*aucs, strict=True)
    drawn = np.mean([d[: min(map(len, drawn))] for d in drawn], axis=0)
    return values, drawn, sum(numbers)


def mean_words(values, drawn, number):
    """A result of `drawn_aucs` -> 'mean [interval]'."""
    value = float(np.mean(values))
    interval = intervals.interval(value, drawn, number)
    return intervals.words({"value": value, "interval": interval}, 3)


def difference(result, base):
    """Paired difference of two results of `drawn_aucs`, in words."""
    value, drawn = np.mean(result[0]) - np.mean(base[0]), result[1] - base[1]
    low, high = intervals.interval(value, drawn, base[2], -1, 1)
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def mean_auc(labels, scores, fold, sources):
    """AUCs of the folds and 'mean [interval]'."""
    result = drawn_aucs(labels, scores, fold, sources)
    return result[0], mean_words(*result)


def held_scores(columns, seen, kind, point, copies, crops, combine):
    """Scores of the held-out images under each condition -> {name: float64 [n]}

    `seen`: {name: features [n, pieces, d]}. `copies`: 1 trains on degraded copies too. The
    classifier of each fold is fitted without the fold's repositories.
    """
    scores = {name: np.empty(len(features)) for name, features in seen.items()}
    for k in range(FOLDS):
        train = np.flatnonzero((columns["fold"] != k) & (columns["view"] <= copies))
        weight = row_weights(columns["labels"][train], columns["sources"][train])
        features = columns["features"][train]
        features = features[:, : 1 + crops] if crops else features[:, 0]
        classifier = fit(kind, features, columns["labels"][train], weight, 0, **point)
        own = columns["fold"][columns["scored"]] == k
        for name, features in seen.items():
            pieces = features[own, : 1 + crops]
            values = decision(classifier, pieces.reshape(-1, pieces.shape[2]))
            scores[name][own] = combine(values.reshape(pieces.shape[:2]), axis=1)
    return scores


def prepared_columns(columns, crops, sources_file):
    """Columns of `train` and `extra`, with `fold` (-1 for none) and `scored`. Raises UsageError.

    `scored`: the untouched rows of `train`. A repository without such a row has no fold.
    """
    wanted = np.isin(columns["splits"], ["train", "extra"]) & (columns["labels"] >= 0)
    columns = {name: columns[name][wanted] for name in COLUMNS}
    columns["labels"] = labels = columns["labels"].astype(int)
    features = take_crops(columns["features"], crops, crops)
    columns["features"] = features.reshape(len(labels), 1 + crops, -1)
    repository_of = read_repositories(sources_file, columns["sources"])
    repositories = np.array([repository_of[source] for source in columns["sources"]])
    scored = np.flatnonzero((columns["view"] == 0) & (columns["splits"] == "train"))
    fold = folds_of(repositories[scored], labels[scored])
    columns["scored"] = scored
    columns["fold"] = np.array([fold.get(repository, -1) for repository in repositories])
    for k in range(FOLDS):
        if len(set(labels[scored][columns["fold"][scored] == k])) < 2:
            raise UsageError(
                f"--features_file: the {len(fold)} repositories of 'train' make no {FOLDS} folds"
                " with both classes: add sources"
            )
    return columns


def find_encoder(path, entry):
    """The encoder of a features file. Raises UsageError where it is missing or fine-tuned."""
    folder = runtime.find_encoder(identity=entry["identity"])
    if folder is None:
        raise UsageError(
            f"--features_file {path}: '{entry['name']}' is not prepared here; run prepare_clip.py"
        )
    encoder = runtime.Encoder(folder, "cpu")
    if encoder.manifest.get("seen"):
        raise UsageError(
            f"--features_file {path}: '{encoder.name}' has seen images itself; they would not be"
            " held out"
        )
    return encoder


def conditions(columns, encoder, data_dir, crops):
    """-> {name: features of the scored images, [n, pieces, d]}"""
    paths = columns["paths"][columns["scored"]]
    seen = {"untouched": columns["features"][columns["scored"]]}
    if data_dir:
        for name, save in RESAVED.items():
            features = encode_resaved(encoder, data_dir, paths, crops, *save)
            seen[f"re-saved at {name}"] = features
    degraded = {columns["paths"][row]: row for row in np.flatnonzero(columns["view"] == 1)}
    if degraded:
        seen["degraded"] = columns["features"][[degraded[path] for path in paths]]
    return seen


def recipes(crops, with_copies):
    """Ways to train and score: (words, copies, crops, combine) of `held_scores`."""
    yield "whole images", 0, 0, np.mean
    if with_copies:
        yield "the same and a degraded copy of each", 1, 0, np.mean
    if crops:
        yield f"whole images and {crops} crops, mean", 0, crops, np.mean
        yield f"whole images and {crops} crops, highest", 0, crops, np.max


def points(args):
    if args.classifier != "svm":
        return [{"C": C} for C in args.C]
    return [{"C": C, "gamma": gamma} for C, gamma in itertools.product(args.C, args.gamma)]


def print_table(args, columns, seen, crops):
    labels, sources, fold = (
        columns[name][columns["scored"]] for name in ("labels", "sources", "fold")
    )
    heading("trained on, scored", "of the classifier", "folds", *seen)
    ways = recipes(crops, "degraded" in seen)
    for (words, *way), point in itertools.product(ways, points(args)):
        scores = held_scores(columns, seen, args.classifier, point, *way)
        aucs = {name: mean_auc(labels, values, fold, sources) for name, values in scores.items()}
        values = ", ".join(f"{name} {value:g}" for name, value in point.items())
        folds = ", ".join(f"{auc:.3f}" for auc in aucs["untouched"][0])
        row(words, f"{args.classifier}, {values}", folds, *(text for _, text in aucs.values()))


def main(argv=None):
    args = parse_args(argv)
    stored = load_features(args.features_file)
    crops = crops_of(stored["meta"])
    encoder = find_encoder(args.features_file, stored["meta"]["encoder"])
    columns = prepared_columns(stored, crops, args.sources_file)
    seen = conditions(columns, encoder, args.data_dir, crops)
    scored = columns["scored"]
    sizes = np.bincount(columns["fold"][scored], minlength=FOLDS)
    print(
        f"Encoder `{encoder.name}`, {len(scored)} images of {len(set(columns['sources'][scored]))}"
        f" sources in {FOLDS} folds ({', '.join(map(str, sizes))}). 95% intervals over sources.\n"
    )
    print_table(args, columns, seen, crops)


if __name__ == "__main__":
    run(main)
