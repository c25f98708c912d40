"""What an evaluation needs pictures for: features of a folder, distortions, the hardest images."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from detector.base import files
from detector.base.console import printable, say
from detector.base.constants import CLASSES, MAX_PIXELS
from detector.base.errors import UsageError
from detector.base.files import atomic_write, read_bytes
from detector.evaluation import metrics, report
from detector.features.extraction import encode_ahead, join_parts, labels_of
from detector.features.file import take_crops
from detector.images import decoding
from detector.images.distort import ARMS, CONDITIONS, manageable
from detector.images.folders import draw_evenly, list_images

BATCH = 16


# ---- images ----


def encode_folder(detector, data_dir):
    """Folder -> (columns as in a features file, number of files that cannot be read; each of those is told)."""
    from tqdm import tqdm

    entries, parts = list_images(data_dir), []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(entries), desc="encoding", unit="image") as progress,
    ):
        for part in encode_ahead(
            data_dir, entries, detector.encoder, BATCH, pool, MAX_PIXELS, crops=detector.crops
        ):
            parts.append(part)
            progress.update(min(BATCH, len(entries) - progress.n))
    columns, bad = join_parts(parts)
    columns["features"] = take_crops(columns["features"], detector.crops, detector.crops)
    for path, why, _ in bad:
        say(f"left out {printable(path)}: {why}")
    return columns | labels_of(columns, entries, detector.encoder), sum(
        is_image for _, _, is_image in bad
    )


# ---- what needs pictures ----


def read_picture(data_dir, path, sha256):
    """The picture of a row, decoded; UsageError where its file is no longer the one that was encoded."""
    data = read_bytes(Path(data_dir, path))
    if files.sha256(data) != sha256:
        raise UsageError(
            f"--data_dir {data_dir}: '{path}' is not the file that was encoded; extract again"
        )
    return decoding.decode_image(data)


def changed(detector, data_dir, columns, changes):
    """Probability of fake of each image under each change, float64 [images, 1 + changes], untouched first; `changes`: (for
    reals, for fakes)."""
    from tqdm import tqdm

    paths, labels = columns["paths"], columns["labels"]

    def pixels(i):
        image = read_picture(data_dir, paths[i], columns["sha256"][i])
        base = manageable(image)
        return np.stack(
            [
                detector.pixels(image),
                *(detector.pixels(change[labels[i]](base)) for change in changes),
            ]
        )

    found = np.empty((len(paths), 1 + len(changes)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = [pool.submit(pixels, i) for i in range(min(2, len(paths)))]
        for i in tqdm(range(len(paths)), desc="distorting", unit="image"):
            rows = ahead.pop(0).result()
            if i + 2 < len(paths):
                ahead.append(pool.submit(pixels, i + 2))
            found[i] = np.concatenate(
                [detector.p_fake(rows[k : k + BATCH]) for k in range(0, len(rows), BATCH)]
            )
    return found


def condition(panel, level, labels, p_fake, untouched, threshold, groups, known):
    """One row of the tables of distortions and arms; `flipped` is None for the untouched images themselves."""
    fake, flips = p_fake >= threshold, (p_fake >= threshold) != (untouched >= threshold)

    def right(mask):
        return [
            metrics.share(fake[mask & (labels == i)] == i, groups[mask & (labels == i)])
            for i in (0, 1)
        ]

    real, generated = right(np.ones(len(labels), bool))
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
        "flipped": None if p_fake is untouched else metrics.share(flips, groups),
    }


def distorted(detector, data_dir, columns, groups, most):
    """-> {robustness, arms}: rows of `condition`, the untouched images first in both."""
    rows = draw_evenly(list(zip(columns["labels"].tolist(), columns["sources"].tolist())), most)
    labels, threshold = columns["labels"][rows].astype(int), detector.model["threshold"]
    changes = [(change, change) for _, _, change in CONDITIONS] + [arm[1:] for arm in ARMS]
    p_fake = changed(
        detector,
        data_dir,
        {name: columns[name][rows] for name in ("paths", "labels", "sha256")},
        changes,
    )
    untouched, known = p_fake[:, 0], report.known_rows(detector.model, columns["sources"][rows])
    names = [("untouched", ""), *((panel, level) for panel, level, _ in CONDITIONS)]
    arms = [0, *range(len(names), p_fake.shape[1])]

    def table(names, chosen):
        return [
            condition(
                *name,
                labels,
                p_fake[:, k] if k else untouched,
                untouched,
                threshold,
                groups[rows],
                known,
            )
            for name, k in zip(names, chosen)
        ]

    return {
        "robustness": table(names, range(len(names))),
        "arms": table([("files", "as they are"), *(("files", name) for name, _, _ in ARMS)], arms),
    }


def contact_sheet(data_dir, columns, found, path, side=150):
    """PNG of the hardest images, reals above, fakes below, each under its probability of fake; none where there are none."""
    from PIL import Image, ImageDraw

    if not found:
        return
    of_class = [[h for h in found if h["label"] == name] for name in CLASSES]
    sheet = Image.new("RGB", (max(map(len, of_class)) * side, 2 * (side + 14)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, images in enumerate(of_class):
        for column, h in enumerate(images):
            picture = read_picture(
                data_dir, h["path"], columns["sha256"][columns["paths"] == h["path"]][0]
            )
            picture.thumbnail((side - 4, side - 4))
            sheet.paste(picture, (column * side + 2, row * (side + 14) + 13))
            pen.text(
                (column * side + 2, row * (side + 14)),
                f"{h['label']}, {h['p_fake']:.3f}",
                fill="black",
            )
    with atomic_write(path) as file:
        sheet.save(file, "PNG")
