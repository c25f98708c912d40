"""Whole repositories of images as if never seen: by this a recipe is chosen before `test` and `external` are looked at.

    CLIP_MODEL=ViT-B/16-8bit python extract_features.py --data_dir data --output_file held.npz --views 1 --layers 10
    python -m benchmarks.held_out --features_file held.npz --sources_file SOURCES.csv --classifier logistic --C 1e-4 1e-3
    python -m benchmarks.held_out --features_file held.npz --data_dir data --sources_file SOURCES.csv --C 1 3 10 --gamma 0.1 0.3 1

Three folds of whole repositories, laid out without chance, about even in the images of each class. A classifier is fitted on
`train` and `extra` without a fold's repositories and scored on that fold's images of `train`. Prints Markdown.
"""

import argparse
import csv
import itertools
from pathlib import Path

import numpy as np

from detector.base.console import Help, need_features, need_folder, run
from detector.base.errors import UsageError
from detector.base.files import read_bytes
from detector.encoders import runtime
from detector.evaluation import metrics
from detector.features.columns import COLUMNS
from detector.features.file import crops_of, load_features, take_crops
from detector.images import decoding, preprocessing
from detector.images.distort import RESAVED, resaved
from detector.model.score import decision
from detector.training.classifiers import fit, row_weights

FOLDS = 3


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument(
        "--features_file",
        required=True,
        metavar="FILE",
        help="with degraded copies and crops where they are to be tried",
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
    parser.add_argument(
        "--classifier", choices=["svm", "linear-svm", "logistic"], default="svm", help="kind"
    )
    parser.add_argument(
        "--C", type=float, nargs="+", default=[10.0], metavar="X", help="of the classifier"
    )
    parser.add_argument(
        "--gamma",
        type=float,
        nargs="+",
        default=[0.3],
        metavar="X",
        help="of an svm, by the number of features",
    )
    args = parser.parse_args(argv)
    if args.data_dir:
        need_folder(args.data_dir)
    need_features(args.features_file)
    return args


def read_repositories(path, sources):
    """CSV file -> {source: repository}. Raises UsageError unless it names that of each of the sources."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            found = {row["source"]: row["repository"] for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError):
        raise UsageError(
            f"--sources_file {path}: name a CSV file with the columns source and repository"
        ) from None
    if missing := sorted(set(sources) - set(found)):
        raise UsageError(
            f"--sources_file {path}: names no repository of '{missing[0]}' ({len(missing)} sources"
            " in all): add a line for each"
        )
    return found


def folds_of(repositories, labels):
    """Repository and label of each image to score -> {repository: fold}: the largest first, each to where it evens the classes most."""
    names, number = np.unique(repositories, return_inverse=True)
    size = np.stack(
        [np.bincount(number[labels == label], minlength=len(names)) for label in (0, 1)], 1
    )
    load, fold = np.zeros((FOLDS, 2)), {}
    for i in np.argsort(-size.sum(1), kind="stable"):
        after = [((load + np.eye(FOLDS)[:, [k]] * size[i]) ** 2).sum() for k in range(FOLDS)]
        fold[names[i]] = int(np.argmin(after))
        load[fold[names[i]]] += size[i]
    return fold


def encode_resaved(encoder, data_dir, paths, crops, share, quality):
    """Features of the images as a site hands them out, float32 [n, 1 + crops, d]."""

    def pieces(path):
        image = resaved(decoding.decode_image(read_bytes(Path(data_dir, path))), share, quality)
        return encoder.encode(
            preprocessing.normalise(
                np.stack(preprocessing.in_pieces(image, encoder.resolution, crops))
            )
        )

    return np.stack([pieces(path) for path in paths])


def mean_auc(labels, scores, fold, sources):
    """AUCs of the folds and 'mean [interval]': sources are drawn anew within each fold."""
    found = [
        metrics.drawn_auc(labels[fold == k], scores[fold == k], sources[fold == k])
        for k in range(FOLDS)
    ]
    values, drawn, numbers = zip(*found)
    drawn = np.mean([d[: min(map(len, drawn))] for d in drawn], axis=0)
    value = float(np.mean(values))
    return values, metrics.words(
        {"value": value, "interval": metrics.interval(value, drawn, sum(numbers))}, 3
    )


def held_scores(columns, seen, kind, point, copies, crops, combine):
    """Scores of the images under each condition (`seen`: {name: features [n, pieces, d]}) by the classifier that was fitted
    without their repositories; `copies`: are degraded copies trained on, too. -> {name: float64 [n]}
    """
    scored, found = (
        columns["scored"],
        {name: np.empty(len(features)) for name, features in seen.items()},
    )
    for k in range(FOLDS):
        train = np.flatnonzero((columns["fold"] != k) & (columns["view"] <= copies))
        weight = row_weights(columns["labels"][train], columns["sources"][train])
        features = (
            columns["features"][train, : 1 + crops] if crops else columns["features"][train, 0]
        )
        classifier = fit(kind, features, columns["labels"][train], weight, 0, **point)
        own = columns["fold"][scored] == k
        for name, features in seen.items():
            pieces = features[own, : 1 + crops]
            values = decision(classifier, pieces.reshape(-1, pieces.shape[2])).reshape(
                pieces.shape[:2]
            )
            found[name][own] = combine(values, axis=1)
    return found


def prepared_columns(columns, crops, sources_file):
    """Columns of `train` and `extra` with each row's fold (one that has no image of `train`: none), and `scored`: the untouched rows
    of `train`. Raises UsageError."""
    wanted = np.isin(columns["splits"], ["train", "extra"]) & (columns["labels"] >= 0)
    columns = {name: columns[name][wanted] for name in COLUMNS}
    columns["labels"] = columns["labels"].astype(int)
    columns["features"] = take_crops(columns["features"], crops, crops).reshape(
        len(columns["labels"]), 1 + crops, -1
    )
    repository_of = read_repositories(sources_file, columns["sources"])
    repositories = np.array([repository_of[source] for source in columns["sources"]])
    columns["scored"] = scored = np.flatnonzero(
        (columns["view"] == 0) & (columns["splits"] == "train")
    )
    fold = folds_of(repositories[scored], columns["labels"][scored])
    columns["fold"] = np.array([fold.get(repository, -1) for repository in repositories])
    for k in range(FOLDS):
        if len(set(columns["labels"][scored][columns["fold"][scored] == k])) < 2:
            raise UsageError(
                f"--features_file: the {len(fold)} repositories of 'train' make no {FOLDS} folds"
                " with both classes: add sources"
            )
    return columns


def main(argv=None):
    args = parse_args(argv)
    stored = load_features(args.features_file)
    crops, entry = crops_of(stored["meta"]), stored["meta"]["encoder"]
    folder = runtime.find_encoder(identity=entry["identity"])
    if folder is None:
        raise UsageError(
            f"--features_file {args.features_file}: '{entry['name']}' is not prepared here; run"
            " prepare_clip.py"
        )
    encoder = runtime.Encoder(folder, "cpu")
    if encoder.manifest.get("seen"):
        raise UsageError(
            f"--features_file {args.features_file}: '{encoder.name}' has seen images itself; they"
            " would not be held out"
        )
    columns = prepared_columns(stored, crops, args.sources_file)
    scored = columns["scored"]
    labels, sources, fold = (columns[name][scored] for name in ("labels", "sources", "fold"))
    degraded = {path: row for row, path in enumerate(columns["paths"]) if columns["view"][row] == 1}
    copies = (
        {"degraded": columns["features"][[degraded[path] for path in columns["paths"][scored]]]}
        if degraded
        else {}
    )
    seen = {
        "untouched": columns["features"][scored],
        **{
            f"re-saved at {name}": encode_resaved(
                encoder, args.data_dir, columns["paths"][scored], crops, *how
            )
            for name, how in RESAVED.items()
            if args.data_dir
        },
        **copies,
    }

    print(
        f"Encoder `{encoder.name}`, {len(scored)} images of {len(set(sources))} sources in {FOLDS}"
        f" folds ({', '.join(f'{(fold == k).sum()}' for k in range(FOLDS))}). 95% intervals over"
        " sources.\n"
    )
    print(
        "| trained on, scored | of the classifier | folds | "
        + " | ".join(seen)
        + " |\n|"
        + "---|" * (3 + len(seen)),
        flush=True,
    )
    ways = [("whole images", 0, 0, np.mean)]
    ways += [("the same and a degraded copy of each", 1, 0, np.mean)] if copies else []
    ways += [
        (f"whole images and {crops} crops, {words}", 0, crops, combine)
        for words, combine in (("mean", np.mean), ("highest", np.max))
        if crops
    ]
    points = [{"C": C, "gamma": gamma} for C, gamma in itertools.product(args.C, args.gamma)]
    if args.classifier != "svm":
        points = [{"C": C} for C in args.C]
    for (words, *how), point in itertools.product(ways, points):
        scores = held_scores(columns, seen, args.classifier, point, *how)
        cells = {name: mean_auc(labels, values, fold, sources) for name, values in scores.items()}
        folds = ", ".join(f"{auc:.3f}" for auc in cells["untouched"][0])
        values = ", ".join(f"{name} {value:g}" for name, value in point.items())
        print(
            f"| {words} | {args.classifier}, {values} | {folds} | "
            + " | ".join(text for _, text in cells.values())
            + " |",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
