"""What a data set's files betray before any detector sees a pixel: twins across splits and labels, format, size.

    python audit.py --data_dir DIR
    python audit.py --features_file features.npz

Needs no model. Exit code 1 where something was found that makes a test figure worthless.
"""
import argparse
import json
import sys
import zlib
from pathlib import Path

import numpy as np

import common
from common import UsageError
from dataset import FACTS, list_images, load_features

NEAR_GREY = 3.0         # root mean square difference of two 8x8 thumbnails, in grey levels: copies re-saved at other
NEAR_CORRELATION = 0.9  # sizes and qualities stay below 1.9 (and above 0.95), different photographs above 7
MAX_REPEATED = 0.01     # share of test images with a twin in train above which the test figure means nothing;
                        # and share of all images that stand under both labels


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--data_dir", metavar="DIR", help="folder of labelled images")
    group.add_argument("--features_file", metavar="FILE", help="or the facts stored by extract_features.py")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser.parse_args(argv)


# ---- one image ----

def describe_image(data, max_pixels=common.MAX_PIXELS):
    """Image bytes -> (decoded RGB, {'sha256': ..., 'facts': record of FACTS, 'thumb': uint8 [64]}). Raises ImageError's kinds."""
    opened = common.open_image(data, max_pixels)
    rgb = common.load_rgb(opened)
    return rgb, {"sha256": common.sha256(data), "facts": container_facts(opened, rgb, len(data)), "thumb": thumbnail(rgb)}


def container_facts(opened, rgb, size):
    """Opened PIL image, its decoded RGB and the file's size in bytes -> one record of FACTS."""
    tables = getattr(opened, "quantization", None) or {}
    values = [v for key in sorted(tables) for v in tables[key]]
    format_name = "JPEG" if opened.format == "MPO" else opened.format
    return np.array((*opened.size, size, format_name, np.mean(values) if values else 0,
                     zlib.crc32(json.dumps(values).encode()) if values else 0,
                     # as stored: EXIF rotation moves the grid of a JPEG whose sides are no multiples of 8
                     blockiness(opened if format_name == "JPEG" else rgb)), dtype=FACTS)


def blockiness(image):
    """Grey steps across the 8x8 grid over those inside it, in the middle 512 pixels; 1 where no JPEG ever was."""
    left, top = (max(0, (side - 512) // 2) // 8 * 8 for side in image.size)
    crop = image.crop((left, top, min(left + 512, image.width), min(top + 512, image.height)))
    grey = np.asarray(crop.convert("L")).astype(np.int16)
    if min(grey.shape) < 16:
        return 1.0
    across, down = np.abs(np.diff(grey, axis=1)).mean(axis=0), np.abs(np.diff(grey, axis=0)).mean(axis=1)
    edge = np.concatenate([across[7::8], down[7::8]]).mean()
    inside = np.concatenate([np.delete(d, np.s_[7::8]) for d in (across, down)]).mean()
    return float((edge + 0.1) / (inside + 0.1))


def thumbnail(rgb):
    """8x8 grey picture, uint8 [64]."""
    small = rgb.resize((8, 8), common.Image.Resampling.BOX)  # no reducing_gap: it moves greys by 10
    return np.asarray(small.convert("L")).reshape(64)


# ---- twins ----

def near_pairs(thumb, block=256):
    """uint8 [n, 64] -> index pairs [m, 2], first below second, whose 8x8 pictures agree.

    Within NEAR_GREY of each other and, so that flat pictures do not all agree, correlated by NEAR_CORRELATION.
    """
    grey = thumb.astype(np.float32)
    square = (grey * grey).sum(axis=1)
    shape = grey - grey.mean(axis=1, keepdims=True)
    shape /= np.maximum(np.linalg.norm(shape, axis=1, keepdims=True), 1e-6)
    pairs = [np.empty((0, 2), int)]
    for start in range(0, len(grey), block):
        rows = slice(start, start + block)
        distance = (square[rows, None] + square - 2 * grey[rows] @ grey.T) / 64
        i, j = np.nonzero(distance <= NEAR_GREY ** 2)
        i, j = i[start + i < j], j[start + i < j]
        alike = (shape[start + i] * shape[j]).sum(axis=1) >= NEAR_CORRELATION
        pairs.append(np.stack([start + i[alike], j[alike]], axis=1))
    return np.concatenate(pairs)


def twin_clusters(thumb, sha256):
    """Cluster number of each image, int [n]: byte-identical and near-identical images share one.

    Seen in the pictures, not in features: on a few pictures saved many times whitened features tell copies apart
    (cosine -0.5), and plain cosine chains half of a data set together.
    """
    _, cluster = np.unique(sha256, return_inverse=True)
    return merge(cluster, near_pairs(thumb))


def merge(cluster, pairs):
    """Cluster numbers joined along index pairs [m, 2], renumbered from 0."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    n = int(cluster.max()) + 1
    left, right = cluster[pairs[:, 0]], cluster[pairs[:, 1]]
    return connected_components(coo_matrix((np.ones(len(pairs)), (left, right)), (n, n)), directed=False)[1][cluster]


# ---- findings ----

def auc(values, labels):
    """AUC of one number for fake against real; ties count half (Mann and Whitney)."""
    from scipy.stats import rankdata
    n1 = int((labels == 1).sum())
    n0 = len(labels) - n1
    return float((rankdata(values)[labels == 1].sum() - n1 * (n1 + 1) / 2) / (n0 * n1))


def audit(columns):
    """Columns of a features file -> findings, a dict of plain numbers and strings."""
    known = np.flatnonzero(columns["labels"] >= 0)
    labels, facts = columns["labels"][known], columns["facts"][known]
    splits, cluster = columns["splits"][known], twin_clusters(columns["thumb"], columns["sha256"])[known]
    pixels = facts["width"].astype(float) * facts["height"]
    numbers = {"pixels": pixels, "aspect ratio": np.abs(np.log(facts["width"] / facts["height"])),
               "bytes per pixel": facts["bytes"] / pixels, "quantisation": facts["quant_mean"],
               "blockiness": facts["blockiness"]}
    both = np.intersect1d(cluster[labels == 0], cluster[labels == 1])
    trained = np.isin(cluster, cluster[splits == "train"])
    return {
        "images": len(known),
        "formats": {name: {str(f): int(n) for f, n in zip(*np.unique(facts["format"][labels == value], return_counts=True))}
                    for name, value in (("real", 0), ("fake", 1))},
        "twins": {"test": int((splits == "test").sum()), "test_with_twin_in_train": int(trained[splits == "test"].sum()),
                  "clusters_with_both_labels": len(both), "largest_cluster": int(np.bincount(cluster).max(initial=0))},
        "examples": [examples(columns["paths"][known], cluster, cluster[mask])
                     for mask in (trained & (splits == "test"), np.isin(cluster, both))],
        "auc_of_one_number": {name: round(auc(value, labels), 3) for name, value in numbers.items()}
        if len(set(labels)) == 2 else {},
    }


def examples(paths, cluster, chosen):
    """Of the three largest of the chosen clusters, the paths of four images each."""
    numbers, sizes = np.unique(chosen, return_counts=True)
    return [[str(path) for path in paths[cluster == c][:4]] for c in numbers[np.argsort(-sizes, kind="stable")][:3]]


def sentences(found):
    """Findings -> (lines that are fatal for a test figure, lines to know)."""
    twins, fatal, note = found["twins"], [], []
    if repeated := twins["test_with_twin_in_train"]:
        line = (f"{repeated} of {twins['test']} test images have a twin in train "
                f"(such as {', '.join(found['examples'][0][0])})")
        if repeated > MAX_REPEATED * twins["test"]:
            fatal.append(f"{line}: a test accuracy on this split says how well pictures are remembered. Train with --resplit.")
        else:
            note.append(f"{line}.")
    if both := twins["clusters_with_both_labels"]:
        (fatal if both > MAX_REPEATED * found["images"] else note).append(
            f"{both} pictures stand under both labels, as copies of each other, such as {', '.join(found['examples'][1][0])}.")
    totals = [sum(found["formats"][c].values()) or 1 for c in common.CLASSES]
    for name in sorted(set(found["formats"]["real"]) | set(found["formats"]["fake"])):
        share = [found["formats"][c].get(name, 0) / n for c, n in zip(common.CLASSES, totals)]
        if abs(share[0] - share[1]) >= 0.5:
            note.append(f"{name} files are {share[0]:.0%} of the reals and {share[1]:.0%} of the fakes.")
    for name, value in found["auc_of_one_number"].items():
        if max(value, 1 - value) >= 0.7:
            note.append(f"{name} alone separates the labels: AUC {max(value, 1 - value):.2f}.")
    return fatal, note


def describe_folder(data_dir):
    """Folder -> the columns that `audit` needs; images that cannot be read are told and left out."""
    from tqdm import tqdm
    entries, rows = [], []
    for entry in tqdm(list_images(data_dir), desc="reading", unit="image"):
        try:
            rows.append(describe_image(Path(data_dir, entry.path).read_bytes())[1])
            entries.append(entry)
        except (OSError, common.ImageError) as error:
            tqdm.write(f"left out {entry.path}: {error}", file=sys.stderr)
    if not rows:
        raise UsageError(f"--data_dir {data_dir}: no readable image")
    return {**{f"{name}s": np.array([getattr(e, name) for e in entries]) for name in ("label", "split", "path")},
            **{name: np.array([row[name] for row in rows]) for name in rows[0]}}


def main(argv=None):
    args = parse_args(argv)
    columns = describe_folder(args.data_dir) if args.data_dir else load_features(args.features_file)
    found = audit(columns)
    fatal, note = sentences(found)
    if args.json:
        print(json.dumps({**found, "fatal": fatal, "note": note}))
    else:
        print(f"{found['images']} images; formats of reals {found['formats']['real']}, of fakes {found['formats']['fake']}")
        print("\n".join([*(f"LEAK  {line}" for line in fatal), *(f"note  {line}" for line in note)]
                        or ["no twins across splits or labels, no single number that separates them"]))
    return 1 if fatal else 0


if __name__ == "__main__":
    common.run(main)
