"""The shipped model on re-saved images: models/evaluation/resaved.json. Part of `make ship`.

    python models/resaved.py --data_dir IMAGES

evaluate.py puts a draw of the images through all of its distortions. These two count most, so all
images go through them.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402
from classify import Detector  # noqa: E402
from distort import RESAVED, resaved  # noqa: E402
from evaluate import condition, read_picture, split_rows  # noqa: E402
from facts import make_groups, twin_clusters  # noqa: E402
from features import load_features  # noqa: E402
from model import decision, probability  # noqa: E402
from report import known_rows  # noqa: E402

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
    columns, detector = load_features(HERE / "features.npz"), Detector(HERE / "baseline.joblib")
    keep, _ = split_rows(columns, detector.model, [])
    columns = {name: column[keep] for name, column in columns.items() if name != "meta"}
    groups, _ = make_groups(columns, twin_clusters(columns["thumb"], columns["sha256"]))
    known, threshold = known_rows(detector.model, columns["sources"]), detector.model["threshold"]
    untouched = probability(detector.model, decision(detector.model, columns["features"]))
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
    with common.atomic_write(HERE / "evaluation" / "resaved.json", "w") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    common.run(main)
