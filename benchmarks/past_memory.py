"""Training on more rows than memory holds: train_model.py --classifier linear-svm on Parquet data sets of growing size.

    python -m benchmarks.past_memory                              # half a million to 2 million rows of 768 features: half an hour, 9 GB of disk
    python -m benchmarks.past_memory --rows 60000 --max_rows 8000   # quick

The named alternative is the same classifier in memory, on the sample alone: an .npz of as many rows. Features are made up (60
sources, two classes that a plane divides, no two images alike), a tenth of the rows to test on: time, memory and what more rows
bring are measured, not how well anything detects. Prints Markdown.
"""
import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measure import run

ROOT = Path(__file__).resolve().parent.parent
from detector.base.files import sha256
from detector.features import storage
from detector.features.file import FeaturesFile, load_rows
from detector.images.facts import FACTS

PART = 4096  # as parts are that a GPU made
DIM = 768
SOURCES = 60
ENCODER = {"name": "made-up", "identity": "ab" * 32, "layers": "final", "dim": DIM}


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[500_000, 1_000_000, 2_000_000], help="of each data set")
    parser.add_argument("--max_rows", type=int, default=100_000, help="as train_model.py has it")
    return parser.parse_args(argv)


def made_up(start, n, total):
    """Rows `start` to `start + n` of `total` -> columns; each split has its reals first and its sources one after the other."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng([1, start])
    apart = fixed.choice([-0.1, 0.1], DIM) * (fixed.random(DIM) < 0.1)
    of_source = fixed.normal(size=(SOURCES, DIM)) * 0.4
    number = np.arange(start, start + n)
    test = number < total // 10
    within = np.where(test, number / (total // 10), (number - total // 10) / (total - total // 10))
    labels, source = (within >= 0.5).astype(np.int8), (within * SOURCES).astype(int)
    facts = np.zeros(n, FACTS)
    facts["width"], facts["height"], facts["bytes"], facts["format"] = 640, 480, rng.integers(40_000, 60_000, n), "JPEG"
    facts["density"] = rng.uniform(0.1, 0.3, n)
    return {"features": (rng.normal(size=(n, DIM)) + of_source[source] + np.where(labels, 1, -1)[:, None] * apart).astype(np.float32),
            "labels": labels, "paths": np.array([f"{i:09d}.jpg" for i in number]), "splits": np.where(test, "test", "train"),
            "sources": np.array([f"source{i:02d}" for i in source]), "view": np.zeros(n, np.int8), "facts": facts,
            "sha256": np.array([sha256(str(i).encode()) for i in number]),
            "thumb": np.clip(rng.integers(30, 225, (n, 1)) + rng.integers(-30, 30, (n, 64)), 0, 255).astype(np.uint8)}


def write(folder, total):
    """A data set of `total` rows."""
    names = []
    for number, start in enumerate(range(0, total, PART)):
        names.append(f"part-{number:06d}-{start:016x}.parquet")
        storage.write_part(folder, names[-1], made_up(start, min(PART, total - start), total), {})
    storage.write_bytes(folder, "_meta.json", json.dumps({"encoder": ENCODER, "parts": names}).encode())


def measured(features, place, max_rows):
    """train_model.py on them -> 'seconds | peak MB | AUC on the test images'."""
    command = [sys.executable, ROOT / "train_model.py", "--features_file", features, "--classifier", "linear-svm", "--max_rows", max_rows,
               "--model_output_path", place / "m.joblib"]
    seconds, memory = run("train_model.py", command)
    overall = json.loads((place / "m_report" / "metrics.json").read_text())["overall"]
    auc, n = overall["auc"], overall["auc"].get("n", "")
    return f"{seconds:.0f} | {memory:.0f} | {auc['value']:.4f} [{auc['interval'][0]:.4f}, {auc['interval'][1]:.4f}] | {n}"


def main():
    args, place = parse_args(None), Path(tempfile.mkdtemp())
    print("| rows | trained on | seconds | peak MB | AUC | test images |\n|---|---|---|---|---|---|", flush=True)
    try:
        for rows in args.rows:
            write(place / "f.parquet", rows)
            print(f"| {rows:,} | all of them | {measured(place / 'f.parquet', place, args.max_rows)} |", flush=True)
            if rows == args.rows[-1]:
                columns, _ = load_rows([FeaturesFile(place / "f.parquet")], args.max_rows)
                np.savez(place / "f.npz", meta=np.array(json.dumps({"encoder": ENCODER})), **columns)
                n = len(columns["labels"])
                del columns
                print(f"| {rows:,} | a sample, in memory | {measured(place / 'f.npz', place, n)} |", flush=True)
            shutil.rmtree(place / "f.parquet")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
