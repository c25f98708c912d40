"""The shipped model on re-saved images: models/evaluation/resaved.json. Part of `make ship`.

    python -m tools.resaved --data_dir IMAGES

evaluate.py puts a draw of the images through all of its distortions. These two count most, so all
images go through them.
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


def p_resaved(detector, data_dir, columns, how):
    """Probability of fake of each image, re-saved, float64 [n]."""

    def pixels(i):
        return detector.pixels(
            resaved(read_picture(data_dir, columns["paths"][i], columns["sha256"][i]), *how)
        )

    chunks = np.array_split(np.arange(len(columns["paths"])), -(-len(columns["paths"]) // BATCH))
    return np.concatenate(
        [detector.p_fake(np.stack([pixels(i) for i in chunk])) for chunk in chunks]
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data_dir", required=True, metavar="DIR", help="the images of models/features.npz"
    )
    args = parser.parse_args(argv)
    columns, detector = load_features(MODELS / "features.npz"), Detector(MODELS / "baseline.joblib")
    keep, _ = split_rows(columns, detector.model, [])
    columns = {name: column[keep] for name, column in columns.items() if name != "meta"}
    groups, _ = make_groups(columns, twin_clusters(columns["thumb"], columns["sha256"]))
    known, threshold = known_rows(detector.model, columns["sources"]), detector.model["threshold"]
    untouched = p_fake_of(detector.model, columns["features"])
    found = {
        "untouched": untouched,
        **{name: p_resaved(detector, args.data_dir, columns, how) for name, how in RESAVED.items()},
    }
    rows = [
        condition(
            "re-saved",
            name,
            columns["labels"].astype(int),
            p_fake,
            untouched,
            threshold,
            groups,
            known,
        )
        for name, p_fake in found.items()
    ]
    with atomic_write(MODELS / "evaluation" / "resaved.json", "w") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    run(main)
