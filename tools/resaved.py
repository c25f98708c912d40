"""The shipped model on re-saved images: models/evaluation/resaved.json. Part of `make ship`.

    python -m tools.resaved --data_dir IMAGES

evaluate.py puts a draw of the images through all of its distortions. Re-saving counts most, so all
images are re-saved.
"""

import argparse
import json

import numpy as np

from detector.base.console import run
from detector.base.files import atomic_write
from detector.base.project import HERE
from detector.evaluation.assess import split_rows
from detector.evaluation.pictures import condition, read_picture
from detector.evaluation.report import known_rows
from detector.features.file import load_features
from detector.images.distort import RESAVED, resaved
from detector.images.facts import make_groups, twin_clusters
from detector.model.score import p_fake_of
from detector.verdict import Detector

MODELS = HERE / "models"
BATCH = 8


def p_resaved(detector, data_dir, columns, save):
    """Probability of fake of each image after `resaved(image, *save)`, float64 [n]."""

    def pixels(i):
        image = read_picture(data_dir, columns["paths"][i], columns["sha256"][i])
        return detector.pixels(resaved(image, *save))

    chunks = np.array_split(np.arange(len(columns["paths"])), -(-len(columns["paths"]) // BATCH))
    return np.concatenate(
        [detector.p_fake(np.stack([pixels(i) for i in chunk])) for chunk in chunks]
    )


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data_dir",
        required=True,
        metavar="DIR",
        help="folder of the images of the shipped features",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    columns, detector = load_features(MODELS / "features.npz"), Detector(MODELS / "baseline.joblib")
    model = detector.model
    keep, _ = split_rows(columns, model, [])
    columns = {name: column[keep] for name, column in columns.items() if name != "meta"}
    labels, known = columns["labels"].astype(int), known_rows(model, columns["sources"])
    groups, _ = make_groups(columns, twin_clusters(columns["thumb"], columns["sha256"]))
    untouched = p_fake_of(model, columns["features"])
    p_fakes = {"untouched": untouched}
    for name, save in RESAVED.items():
        p_fakes[name] = p_resaved(detector, args.data_dir, columns, save)
    shared = (untouched, model["threshold"], groups, known)
    rows = [condition("re-saved", name, labels, p, *shared) for name, p in p_fakes.items()]
    with atomic_write(MODELS / "evaluation" / "resaved.json", "w") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    run(main)
