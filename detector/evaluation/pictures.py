"""The parts of an evaluation that need image files: features, distortions, contact sheets."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from detector.base import files
from detector.base.console import printable, say
from detector.base.constants import CLASSES, MAX_PIXELS
from detector.base.errors import UsageError
from detector.base.files import atomic_write, read_bytes
from detector.evaluation import intervals, metrics, report
from detector.features.extraction import encode_ahead, join_parts, labels_of
from detector.features.file import take_crops
from detector.images import decoding
from detector.images.distort import ARMS, CONDITIONS, manageable
from detector.images.folders import draw_evenly

BATCH = 16


def announce(detector, images, what, remedy=""):
    """Say how long the encoder will take for so many images, where it is over a minute."""
    blank = detector.pixels(Image.new("RGB", (224, 224)))[None]
    for _ in range(2):  # the first pass of a size is slow
        started = time.perf_counter()
        detector.features(blank)
    seconds = images * (time.perf_counter() - started)
    if seconds > 60:
        end = f"; {remedy}" if remedy else ""
        about = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
        say(f"{what} will take about {about} ({images} images){end}")


# ---- features ----


def encode_folder(detector, data_dir, entries):
    """Folder and entries of its images -> (columns as in a features file, unreadable files: n).

    Prints a line for each file that cannot be read.
    """
    from tqdm import tqdm

    parts = []
    announce(detector, len(entries), "encoding")
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(entries), desc="encoding", unit="image") as progress,
    ):
        for part in encode_ahead(
            data_dir, entries, detector.encoder, BATCH, pool, MAX_PIXELS, crops=detector.crops
        ):
            parts.append(part)
            progress.update(min(BATCH, len(entries) - progress.n))
    columns, skipped = join_parts(parts)
    columns["features"] = take_crops(columns["features"], detector.crops, detector.crops)
    for path, why, _ in skipped:
        say(f"left out {printable(path)}: {why}")
    unreadable = sum(is_image for _, _, is_image in skipped)
    return columns | labels_of(columns, entries, detector.encoder), unreadable


# ---- distortions ----


def read_picture(data_dir, path, sha256):
    """The decoded image of a row. Raises UsageError where its file has changed since."""
    data = read_bytes(Path(data_dir, path))
    if files.sha256(data) != sha256:
        raise UsageError(
            f"--data_dir {data_dir}: '{path}' is not the file that was encoded; extract again"
        )
    return decoding.decode_image(data)


def changed(detector, data_dir, columns, changes):
    """Probability of fake of each image under each change, float64 [images, 1 + changes].

    The first column is of the untouched images. `changes`: pairs (for reals, for fakes).
    """
    from tqdm import tqdm

    paths, labels = columns["paths"], columns["labels"]

    def pixels(i):
        image = read_picture(data_dir, paths[i], columns["sha256"][i])
        base = manageable(image)
        altered = (detector.pixels(change[labels[i]](base)) for change in changes)
        return np.stack([detector.pixels(image), *altered])

    p_fake = np.empty((len(paths), 1 + len(changes)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = [pool.submit(pixels, i) for i in range(min(2, len(paths)))]
        for i in tqdm(range(len(paths)), desc="distorting", unit="image"):
            rows = ahead.pop(0).result()
            if i + 2 < len(paths):
                ahead.append(pool.submit(pixels, i + 2))
            batches = (rows[k : k + BATCH] for k in range(0, len(rows), BATCH))
            p_fake[i] = np.concatenate([detector.p_fake(batch) for batch in batches])
    return p_fake


def condition(panel, level, labels, p_fake, untouched, threshold, groups, known):
    """A row of the tables of distortions and arms.

    `untouched`: p_fake of the untouched images. In their own row, `flipped` is None.
    """
    fake = p_fake >= threshold

    def right(mask):
        return [
            intervals.share(fake[mask & (labels == i)] == i, groups[mask & (labels == i)])
            for i in (0, 1)
        ]

    real, generated = right(np.ones(len(labels), bool))
    flips = fake != (untouched >= threshold)
    return {
        "panel": panel,
        "level": level,
        "n": len(labels),
        "accuracy_real": real,
        "accuracy_fake": generated,
        "balanced_accuracy": metrics.of_both(real, generated),
        "auc": metrics.auc(labels, p_fake, groups),
        "known": metrics.of_both(*right(known)),
        "unseen": metrics.of_both(*right(~known)),
        "flipped": None if p_fake is untouched else intervals.share(flips, groups),
    }


def distorted(detector, data_dir, columns, groups, most):
    """-> ({robustness, arms}, row numbers, probabilities float64 [rows, 1 + CONDITIONS]).

    Both tables hold rows of `condition`, with the untouched images first, and so do the
    probabilities. `most`: the largest number of images to distort.
    """
    strata = zip(columns["labels"].tolist(), columns["sources"].tolist(), strict=True)
    rows = draw_evenly(list(strata), most)
    columns = {name: columns[name][rows] for name in ("paths", "labels", "sha256", "sources")}
    changes = [(change, change) for _, _, change in CONDITIONS] + [arm[1:] for arm in ARMS]
    remedy = "--robustness_images takes fewer"
    announce(detector, len(rows) * (1 + len(changes)), "distorting", remedy)
    p_fake = changed(detector, data_dir, columns, changes)
    labels, untouched = columns["labels"].astype(int), p_fake[:, 0]
    known = report.known_rows(detector.model, columns["sources"])
    names = [("untouched", ""), *((panel, level) for panel, level, _ in CONDITIONS)]
    arms = [("files", "as they are"), *(("files", name) for name, _, _ in ARMS)]

    def row(name, k):
        p, threshold = p_fake[:, k] if k else untouched, detector.model["threshold"]
        return condition(*name, labels, p, untouched, threshold, groups[rows], known)

    tables = {
        "robustness": [row(name, k) for k, name in enumerate(names)],
        "arms": [row(arms[0], 0)]
        + [row(name, k) for k, name in enumerate(arms[1:], start=len(names))],
    }
    return tables, rows, p_fake[:, : len(names)]


# ---- contact sheets ----


def contact_sheet(data_dir, columns, entries, path, caption="{label}, {p_fake:.3f}", side=150):
    """Write a PNG of images, reals above and fakes below; nothing without images.

    Each image stands under its caption and the end of its path. An entry has `path`, `label` and
    the fields of the caption.
    """
    if not entries:
        return
    hashes = dict(zip(columns["paths"].tolist(), columns["sha256"].tolist(), strict=True))
    of_class = [[row for row in entries if row["label"] == name] for name in CLASSES]
    sheet = Image.new("RGB", (max(map(len, of_class)) * side, 2 * (side + 28)), "white")
    for line, images in enumerate(of_class):
        for column, row in enumerate(images):
            picture = read_picture(data_dir, row["path"], hashes[row["path"]])
            picture.thumbnail((side - 4, side - 4))
            cell = Image.new("RGB", (side, side + 28), "white")  # cuts a long name off
            cell.paste(picture, (2, 27))
            text = f"{caption.format(**row)}\n{printable(row['path'])[-24:]}"
            ImageDraw.Draw(cell).text((2, 0), text, "black")
            sheet.paste(cell, (column * side, line * (side + 28)))
    with atomic_write(path) as file:
        sheet.save(file, "PNG")
