"""The images that a pretrained encoder is tuned on: read and decoded when their batch is due, so that millions need no memory.

seen, kept, held = list_rows(args)                      # rows (path, label, source, sha256)
for crops, labels in load(seen, draws(weight, args, first), 224, workers): ...    # uint8 [n, r, r, 3], int64 [n]
"""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from detector.base.console import say
from detector.base.constants import CLASSES
from detector.base.errors import ImageError, UsageError
from detector.base.files import read_bytes, sha256
from detector.images import decoding, preprocessing
from detector.images.distort import degrade, manageable, random_view
from detector.images.folders import draw_evenly, read_folder

DEGRADED = 0.3  # share of the views that go through a chain of distort.py's degradations first
SIDE = 1024  # of such a picture: a site shrinks it to as much, and a large one would take a second


def kept_back(digest, share):
    """Is the image with this SHA-256 kept from the encoder? Decided by its content, so equal files stay together."""
    return int(digest[:8], 16) < share * 2**32


def balanced_draw(rows):
    """Probability of each image: half of the mass to each class, within it to sources by the root of their size."""
    labels, sources = [r[1] for r in rows], [r[2] for r in rows]
    pairs = list(zip(labels, sources))
    size = Counter(pairs)
    weight = np.array([size[p] ** -0.5 for p in pairs])
    for label in (0, 1):
        mask = np.array(labels) == label
        weight[mask] /= 2 * weight[mask].sum()
    return weight


def held_sources(entries, share, seed):
    """Entries -> the set of (label, source) that is held out: `share` of each class's sources, at least one, never all."""
    held = set()
    for label, name in enumerate(CLASSES):
        sources = sorted({e.source for e in entries if e.label == label})
        if share and len(sources) < 2:
            raise UsageError(
                f"--holdout {share:g}: the class '{name}' has {len(sources)} source, and at least"
                " one must be trained on and one held out; give each a folder of its own, or"
                " --holdout 0 to train for all --steps"
            )
        n = min(len(sources) - 1, max(1, round(share * len(sources)))) if share else 0
        held |= {
            (label, sources[i])
            for i in np.random.default_rng([seed, label]).permutation(len(sources))[:n]
        }
    return held


def list_rows(args):
    """Folder -> rows (path, label, source, sha256) to learn from, kept for the classifier, and of the sources held out.

    A file whose header says that it is no image we take is left out and named.
    """
    entries = [
        e for e in read_folder(args.data_dir).entries if e.split in args.train_splits.split(",")
    ]
    if len({e.label for e in entries}) < 2:
        raise UsageError(
            f"--data_dir {args.data_dir}: no images of both classes in the splits"
            f" {args.train_splits}"
        )
    held, rows = (
        held_sources(entries, args.holdout, args.seed),
        {"seen": [], "kept": [], "held": []},
    )
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda e: hash_image(Path(args.data_dir, e.path)), entries)
        for e, digest in zip(
            entries, tqdm(found, total=len(entries), desc="reading", unit="image")
        ):
            if digest is None:
                continue
            part = (
                "held"
                if (e.label, e.source) in held
                else "kept"
                if e.split == "train" and kept_back(digest, args.keep)
                else "seen"
            )
            rows[part].append((str(Path(args.data_dir, e.path)), e.label, e.source, digest))
    of_held = {
        row[3] for row in rows["held"]
    }  # equal files under two sources must not be on both sides
    rows["seen"] = [row for row in rows["seen"] if row[3] not in of_held]
    for part in ("seen", "held") if held else ("seen",):
        if len({row[1] for row in rows[part]}) < 2:
            purpose = {"seen": "to learn from", "held": "held out"}[part]
            raise UsageError(
                f"--data_dir {args.data_dir}: no images of both classes {purpose} in the splits"
                f" {args.train_splits}; add some, or give a smaller --keep or another --holdout"
            )
    return rows["seen"], rows["kept"], rows["held"]


def hash_image(path):
    """SHA-256 of the file, None (and a line) where its header is not that of an image we take."""
    data = read_bytes(path)
    try:
        decoding.open_image(data)
    except ImageError as error:
        tqdm.write(f"left out {path}: {error}", file=sys.stderr)
        return None
    return sha256(data)


def evenly(rows, most):
    """At most `most` of the rows, even over class and source."""
    return [rows[i] for i in draw_evenly([row[1:3] for row in rows], most)]


def draws(weight, args, first):
    """Keys of the views of each forward pass, from step `first` on; they follow from seed and step, whoever makes them and when."""
    size = args.batch_size * args.accumulate
    for step in range(first, args.steps):
        chosen = np.random.default_rng([args.seed, step]).choice(len(weight), size, p=weight)
        keys = [(int(row), args.seed, step, place) for place, row in enumerate(chosen)]
        yield from (keys[i : i + args.batch_size] for i in range(0, size, args.batch_size))


class Views:
    """Rows as a data set of torch's: key (row, *seed) -> a random view; (row,) -> the picture as the encoder will see it."""

    def __init__(self, rows, resolution):
        self.rows, self.resolution = rows, resolution

    def __getitem__(self, key):
        row, *seed = key
        path, label = self.rows[row][:2]
        try:
            image = decoding.decode_image(read_bytes(path))
        except (
            ImageError,
            UsageError,
        ) as error:  # truncated, or gone since: another takes its place
            say(f"left out {path}: {error}")
            return self[(row + 1) % len(self.rows), *seed]
        if seed:
            rng = np.random.default_rng(seed)
            if rng.random() < DEGRADED:
                image = degrade(manageable(image, SIDE), rng)
            image = random_view(image, rng, self.resolution)
        return np.array(preprocessing.resize_and_crop(image, self.resolution)), label


def load(rows, batches, resolution, workers):
    """Rows and batches of keys -> (uint8 [n, r, r, 3], int64 labels [n]) in that order, made by `workers` processes beside."""
    import torch

    own = torch.Generator()  # a loader draws a number; from the common generator the checkpoint would depend on how many there were
    return torch.utils.data.DataLoader(
        Views(rows, resolution), batch_sampler=batches, num_workers=workers, generator=own
    )
