"""The images that a pretrained encoder is tuned on.

Each batch is read and decoded when it is due, so millions of images need no memory.

seen, kept, held = list_rows(args)                      # rows (path, label, source, sha256)
for crops, labels in load(seen, draws(weight, args, first), 224, workers):
    ...                                                 # uint8 [n, r, r, 3], int64 [n]
"""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from detector.base.console import printable, say
from detector.base.constants import CLASSES
from detector.base.errors import ImageError, UsageError
from detector.base.files import read_bytes, sha256
from detector.images import decoding, preprocessing
from detector.images.distort import degrade, manageable, random_view
from detector.images.folders import draw_evenly, read_folder

DEGRADED = 0.3  # share of the views that distort.py degrades first
# Pictures are shrunk to this side before they are degraded, as sites do. Larger ones take a second.
SIDE = 1024


def kept_back(digest, share):
    """Is the image with this SHA-256 kept from the encoder? Equal files get the same result."""
    return int(digest[:8], 16) < share * 2**32


def balanced_draw(rows):
    """Probability of each image: half for each class, then sources by the root of their size."""
    pairs = [row[1:3] for row in rows]
    sizes = Counter(pairs)
    weight = np.array([sizes[pair] ** -0.5 for pair in pairs])
    for label in (0, 1):
        mask = np.array([row[1] for row in rows]) == label
        weight[mask] /= 2 * weight[mask].sum()
    return weight


def held_sources(entries, share, seed):
    """Entries -> set of (label, source) to hold out: `share` of each class's sources.

    Holds out at least one source of each class and never all, unless `share` is 0. Raises
    UsageError for a class with a single source.
    """
    held = set()
    for label, name in enumerate(CLASSES):
        sources = sorted({e.source for e in entries if e.label == label})
        if share and len(sources) < 2:
            raise UsageError(
                f"--holdout {share:g}: the class '{name}' has {len(sources)} source and needs two,"
                " to train on and to hold out; give each source a folder of its own, or --holdout"
                " 0 to train for all --steps"
            )
        n = min(len(sources) - 1, max(1, round(share * len(sources)))) if share else 0
        order = np.random.default_rng([seed, label]).permutation(len(sources))
        held |= {(label, sources[i]) for i in order[:n]}
    return held


def list_rows(args):
    """Folder -> rows (path, label, source, sha256) to train on, kept for the classifier, held out.

    A file whose header is not that of an image is left out and logged. Raises UsageError.
    """
    wanted = args.train_splits.split(",")
    entries = [entry for entry in read_folder(args.data_dir).entries if entry.split in wanted]
    if len({entry.label for entry in entries}) < 2:
        raise UsageError(
            f"--data_dir {args.data_dir}: no images of both classes in the splits"
            f" {args.train_splits}"
        )
    held_out = held_sources(entries, args.holdout, args.seed)
    seen, kept, held = [], [], []
    for entry, row in hash_entries(args.data_dir, entries):
        if row[1:3] in held_out:
            held.append(row)
        elif entry.split == "train" and kept_back(row[3], args.keep):
            kept.append(row)
        else:
            seen.append(row)
    # equal files of two sources must not be on both sides
    digests = {row[3] for row in held}
    seen = [row for row in seen if row[3] not in digests]
    check_classes(args, seen, "to train on")
    if held_out:
        check_classes(args, held, "held out")
    return seen, kept, held


def hash_entries(folder, entries):
    """Yield (entry, row) of each file with an image's header, with progress."""
    paths = [Path(folder, entry.path) for entry in entries]
    with ThreadPoolExecutor() as pool:
        digests = tqdm(pool.map(hash_image, paths), total=len(paths), desc="reading", unit="image")
        for entry, path, digest in zip(entries, paths, digests, strict=True):
            if digest is not None:
                yield entry, (str(path), entry.label, entry.source, digest)


def check_classes(args, rows, purpose):
    """Raises UsageError unless the rows hold both classes."""
    if len({row[1] for row in rows}) < 2:
        raise UsageError(
            f"--data_dir {args.data_dir}: no images of both classes {purpose} in the splits"
            f" {args.train_splits}; add some, or give a smaller --keep or another --holdout"
        )


def hash_image(path):
    """SHA-256 of the file, or None and a log line if its header is not that of an image."""
    data = read_bytes(path)
    try:
        decoding.open_image(data)
    except ImageError as error:
        tqdm.write(f"left out {printable(path)}: {error}", file=sys.stderr)
        return None
    return sha256(data)


def evenly(rows, most):
    """At most `most` of the rows, even over class and source."""
    return [rows[i] for i in draw_evenly([row[1:3] for row in rows], most)]


def draws(weight, args, first):
    """Keys of the views of each forward pass, from step `first` on, by seed and step alone."""
    size = args.batch_size * args.accumulate
    for step in range(first, args.steps):
        chosen = np.random.default_rng([args.seed, step]).choice(len(weight), size, p=weight)
        keys = [(int(row), args.seed, step, place) for place, row in enumerate(chosen)]
        yield from (keys[i : i + args.batch_size] for i in range(0, size, args.batch_size))


class Views:
    """A torch data set of rows: key (row, *seed) -> a random view, (row,) -> the whole picture."""

    def __init__(self, rows, resolution):
        self.rows, self.resolution = rows, resolution

    def __getitem__(self, key):
        row, *seed = key
        path, label = self.rows[row][:2]
        try:
            image = decoding.decode_image(read_bytes(path))
        except (ImageError, UsageError) as error:  # truncated, or removed since
            say(f"left out {path}: {error}")
            return self[(row + 1) % len(self.rows), *seed]
        if seed:
            rng = np.random.default_rng(seed)
            if rng.random() < DEGRADED:
                image = degrade(manageable(image, SIDE), rng)
            image = random_view(image, rng, self.resolution)
        return np.array(
            preprocessing.resize_and_crop(image, preprocessing.clip_transform(self.resolution))
        ), label


def to_pixels(crops, labels, device):
    """The loader's uint8 [n, r, r, 3] and int64 [n] -> CLIP's input and float32 labels."""
    import torch

    transform = preprocessing.clip_transform(crops.shape[1])
    pixels = torch.from_numpy(preprocessing.normalise(crops.numpy(), transform))
    return pixels.to(device), labels.float().to(device)


def load(rows, batches, resolution, workers):
    """Rows and batches of keys -> (uint8 [n, r, r, 3], int64 labels [n]) in that order.

    `workers` processes make them in advance.
    """
    import torch

    # A loader draws a number. With torch's common generator, the number of loaders would change the
    # checkpoint.
    own = torch.Generator()
    return torch.utils.data.DataLoader(
        Views(rows, resolution), batch_sampler=batches, num_workers=workers, generator=own
    )
