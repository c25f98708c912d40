"""Does fine-tuning help? AUC on whole repositories that neither encoder nor classifier saw.

    python -m benchmarks.fine_tuning --data_dir data --sources_file SOURCES.csv --work_dir study
    python -m benchmarks.fine_tuning --data_dir data --sources_file SOURCES.csv --work_dir study \
        --arms "lora:8 --last 4" --steps 2000 --seeds 0 1 2

The folds are those of benchmarks.held_out. For each of them finetune_clip.py tunes the encoder on
`train` and `extra` without the fold's repositories. A logistic regression is fitted on the images
that it kept for the classifier, and scored on the fold's images of `train`. The frozen encoders are
measured with the same images, and with all images of the other folds. The base is the first row:
the frozen encoder with the same images. Differences are paired, with 95% intervals over sources.

Everything made is kept in --work_dir, so the same command resumes. Prints Markdown. Needs torch.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.held_out import (
    FOLDS,
    difference,
    drawn_aucs,
    folds_of,
    mean_words,
    read_repositories,
)
from benchmarks.measure import heading, row
from detector.base.console import Help, need_folder, run, say
from detector.base.files import atomic_write, read_bytes, sha256
from detector.encoders.prepare import ensure_encoder
from detector.encoders.runtime import Encoder
from detector.finetuning.images import kept_back
from detector.images import decoding, preprocessing
from detector.images.distort import RESAVED, resaved
from detector.images.folders import read_folder
from detector.model.score import decision
from detector.training.classifiers import GRIDS, fit, row_weights

ARMS = ["lora:8 --last 4", "norms --last 4", "blocks:2"]
RESAVE = "50%, quality 40"
KEEP = 0.5  # default of finetune_clip.py
C = [point["C"] for point in GRIDS["logistic"]]
BATCH = 16


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    add("--data_dir", required=True, metavar="DIR", help="labelled images")
    add("--sources_file", required=True, metavar="FILE", help="CSV: source and repository")
    add("--work_dir", required=True, metavar="DIR", help="checkpoints and features, kept")
    add("--clip_model", default="ViT-B/16-8bit", metavar="NAME|FILE", help="encoder to start from")
    add("--layers", nargs="+", default=["final", "10"], metavar="L", help="of the frozen encoder")
    add("--arms", nargs="*", default=ARMS, metavar="WHAT", help="values of --train to measure")
    add("--folds", type=int, nargs="+", default=[*range(FOLDS)], metavar="K", help="folds to use")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="seeds of each arm")
    add("--steps", type=int, default=600, metavar="N", help="optimiser steps of each arm")
    args = parser.parse_args(argv)
    need_folder(args.data_dir)
    return args


class Images:
    """Labelled images of `train` and `extra`: columns of n entries. `fold` is -1 for none."""

    def __init__(self, args):
        entries = read_folder(args.data_dir).entries
        entries = [entry for entry in entries if entry.split in ("train", "extra")]
        self.paths = np.array([entry.path for entry in entries])
        self.labels = np.array([entry.label for entry in entries])
        self.sources = np.array([entry.source for entry in entries])
        train = np.array([entry.split == "train" for entry in entries])
        repository_of = read_repositories(args.sources_file, self.sources)
        repositories = np.array([repository_of[source] for source in self.sources])
        fold = folds_of(repositories[train], self.labels[train])
        self.fold = np.array([fold.get(repository, -1) for repository in repositories])
        digests = [sha256(read_bytes(Path(args.data_dir, path))) for path in self.paths]
        self.kept = train & np.array([kept_back(digest, KEEP) for digest in digests])
        self.scored = train


def linked(args, images, k):
    """A folder of links to the images outside of fold `k`."""
    folder = Path(args.work_dir, f"fold{k}")
    for path in images.paths[images.fold != k]:
        link = folder / path
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(Path(args.data_dir, path).resolve())
    return folder


def tuned_encoder(args, images, arm, seed, k):
    """Encoder of this arm without fold `k`. An existing checkpoint is not made again."""
    import finetune_clip

    name = "".join(c if c.isalnum() else "-" for c in arm)
    output = Path(args.work_dir, f"{name}-{args.steps}-fold{k}-seed{seed}.pt")
    if not output.is_file():
        say(f"{arm}, fold {k}, seed {seed}")
        flags = ["--clip_model", args.clip_model, "--data_dir", linked(args, images, k)]
        flags += ["--train", *arm.split(), "--output", output, "--steps", args.steps]
        flags += ["--holdout", 0, "--keep", KEEP, "--seed", seed]
        finetune_clip.main([*map(str, flags)])
    return Encoder(ensure_encoder(str(output)), "cpu")


def encoded(args, encoder, paths, resave=None):
    """Features of the images, float32 [n, d], stored by encoder, images and condition."""
    digest = sha256(repr([encoder.identity, resave, *paths]).encode())[:16]
    file = Path(args.work_dir, f"{digest}.npy")
    if file.is_file():
        return np.load(file)
    features = []
    for i in range(0, len(paths), BATCH):
        pictures = [
            decoding.decode_image(read_bytes(Path(args.data_dir, path)))
            for path in paths[i : i + BATCH]
        ]
        if resave:
            pictures = [resaved(picture, *RESAVED[resave]) for picture in pictures]
        pixels = [preprocessing.preprocess(picture, encoder.transform) for picture in pictures]
        features.append(encoder.encode(np.stack(pixels)))
    features = np.concatenate(features)
    with atomic_write(file) as stream:
        np.save(stream, features)
    return features


def fold_scores(args, images, encoder, k, trained):
    """{(condition, C): scores of the fold's images}. `trained`: mask of the classifier's images.

    The images of each fold are encoded apart, so that a frozen encoder does this once.
    """
    held = images.scored & (images.fold == k)
    groups = [np.flatnonzero(trained & (images.fold == j)) for j in (-1, *range(FOLDS)) if j != k]
    groups = [group for group in groups if len(group)]
    rows = np.concatenate(groups)
    features = np.concatenate([encoded(args, encoder, images.paths[group]) for group in groups])
    conditions = {
        name: encoded(args, encoder, images.paths[held], resave)
        for name, resave in (("untouched", None), ("re-saved", RESAVE))
    }
    labels, sources = images.labels[rows], images.sources[rows]
    weight, scores = row_weights(labels, sources), {}
    for value in C:
        classifier = fit("logistic", features, labels, weight, 0, C=value)
        for name, seen in conditions.items():
            scores[name, value] = decision(classifier, seen)
    return scores


def measured(args, images, encoder_of, seen_all):
    """An encoder -> (its best C in words, results of `drawn_aucs`: untouched, re-saved)."""
    scores = {}
    for k in args.folds:
        trained = images.scored | True if seen_all else images.kept
        for key, values in fold_scores(args, images, encoder_of(k), k, trained).items():
            scores.setdefault(key, []).append(values)
    held = [images.scored & (images.fold == k) for k in args.folds]
    labels, sources, fold = (
        np.concatenate([column[mask] for mask in held])
        for column in (images.labels, images.sources, images.fold)
    )
    results = {
        key: drawn_aucs(labels, np.concatenate(values), fold, sources)
        for key, values in scores.items()
    }
    best = max(C, key=lambda value: np.mean(results["untouched", value][0]))
    return f"{best:g}", results["untouched", best], results["re-saved", best]


def mean_of(seeds):
    """Results of `measured`, one a seed, all with the same draws -> the result of their mean."""
    means = []
    for condition in (1, 2):
        aucs, drawn, groups = zip(*(result[condition] for result in seeds), strict=True)
        means.append((np.mean(aucs, axis=0), np.mean(drawn, axis=0), groups[0]))
    return ", ".join(sorted({best for best, *_ in seeds})), *means


def print_row(words, seen, result, base):
    """A result of `measured`, and what it differs by from that of the base."""
    best, *conditions = result
    folds = ", ".join(f"{auc:.3f}" for auc in conditions[0][0])
    pairs = zip(conditions, base[1:], strict=True)
    cells = (text for own, other in pairs for text in (mean_words(*own), difference(own, other)))
    row(words, seen, best, folds, *cells)


def main(argv=None):
    args = parse_args(argv)
    os.makedirs(args.work_dir, exist_ok=True)
    images = Images(args)
    sizes = [int((images.scored & (images.fold == k)).sum()) for k in args.folds]
    print(
        f"Encoder `{args.clip_model}`, {args.steps} steps of 32. Folds {args.folds} of {FOLDS} with"
        f" {sizes} images. 95% intervals over sources. C is the best of {C} on untouched images.\n"
    )
    conditions = "untouched", "to the base", f"re-saved at {RESAVE}", "to the base"
    heading("encoder", "classifier's images", "C", "folds", *conditions)
    base = None
    for layers in args.layers:
        encoder = Encoder(ensure_encoder(args.clip_model, layers=layers), "cpu")
        for name, seen_all in (("kept", False), ("all", True)):
            result = measured(args, images, dict.fromkeys(args.folds, encoder).get, seen_all)
            base = base or result
            print_row(f"frozen, {layers}", name, result, base)
    for arm in args.arms:
        seeds = []
        for seed in args.seeds:
            of_fold = partial(tuned_encoder, args, images, arm, seed)
            seeds.append(measured(args, images, of_fold, False))
            print_row(f"`{arm}`, seed {seed}", "kept", seeds[-1], base)
        if len(seeds) > 1:
            print_row(f"`{arm}`, mean of {len(seeds)} seeds", "kept", mean_of(seeds), base)


if __name__ == "__main__":
    run(main)
