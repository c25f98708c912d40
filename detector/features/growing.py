"""A features file whose folder has changed since: which of its rows still stand, and what is new.

old, before = earlier_rows(output, key, data_dir, prune=False)
for line in words(whats_new(before, columns)):
    say(line)
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from detector.base.console import say
from detector.base.errors import UsageError
from detector.base.files import sha256
from detector.features.columns import COLUMNS, count_cells
from detector.features.file import load_features
from detector.images.facts import pairs_between

SHOWN_SOURCES = 10
SHOWN_PAIRS = 3


# ---- what was there ----


def set_aside(path, why):
    """Rename what other flags, another encoder or another folder left, and say so; nothing is ever overwritten."""
    number = 1
    while (aside := Path(f"{path}.old-{number}")).exists():
        number += 1
    os.replace(path, aside)
    say(f"{path} {why}: set aside as {aside}")


def earlier_rows(output, key, data_dir, prune):
    """Rows of an earlier run whose files have the same bytes, cannot be read now or, unless `prune`, are gone. -> (columns, digests_of all of it)

    (None, {}) where there are none; a file that cannot be gone on with is set aside.
    """
    if not output.is_file():
        return None, {}
    columns, fates, why = read_earlier(output, key, data_dir)
    if why:
        set_aside(output, why)
        return None, {}
    keep = np.isin(fates, ["same", "unread"] if prune else ["same", "unread", "gone"])
    say(f"{output} is there: {int(keep.sum())} of its rows stay as they are")
    if unread := fates.count("unread"):
        say(f"{unread} of them are of files that cannot be read now")
    if gone := fates.count("gone"):
        say(
            f"{gone} rows are of files that are no longer there: dropped"
            if prune
            else (
                f"{gone} of them are of files that are no longer there; extract again with --prune"
                " to drop them"
            )
        )
    return {name: columns[name][keep] for name in COLUMNS}, digests_of(columns)


def read_earlier(output, key, data_dir):
    """-> (columns, fate of each row, ''), or (None, None, why the file cannot be gone on with)."""
    try:
        columns = load_features(output)
    except UsageError:
        return None, None, "cannot be read"
    if columns["meta"].get("key") != key:
        return None, None, "was made with other flags, another encoder or precision"
    fates = compare(columns, data_dir)
    if not {"same", "unread"} & set(
        fates
    ):  # the same names with other bytes in all of them are another folder too
        return None, None, "holds none of the images of this folder"
    return columns, fates, ""


def compare(columns, data_dir):
    """What became of the file of each row: list of 'same', 'changed' (other bytes), 'gone' or 'unread' (nobody can say)."""
    from tqdm import tqdm

    @functools.cache  # views of an image are rows of one file
    def fate(path, digest):
        try:
            return "same" if sha256(Path(data_dir, path).read_bytes()) == digest else "changed"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return "gone"
        except OSError:  # no permission, or a network drive that does not answer
            return "unread"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(
            tqdm(
                pool.map(fate, columns["paths"], columns["sha256"]),
                total=len(columns["paths"]),
                desc="comparing",
                unit="image",
            )
        )


def digests_of(columns):
    """{path: SHA-256}; plain strings, since numpy's of 48,000 files take 40 MB."""
    return dict(zip(columns["paths"].tolist(), columns["sha256"].tolist()))


# ---- what is new ----


def whats_new(before, columns):
    """`digests_of` the file as it was, and its columns now -> dict: images, changed, moved, cells, sources, look-alikes.

    Degraded copies count as one with their image.
    """
    images = rows_of(columns, columns["view"] == 0)
    now = digests_of(images)
    left = {
        digest for path, digest in before.items() if now.get(path) != digest
    }  # bytes that are not where they were

    def fate(path, digest):
        if path in before:
            return "same" if before[path] == digest else "changed"
        return "moved" if digest in left else "new"

    fates = np.array([fate(*item) for item in now.items()])
    new, known = rows_of(images, fates == "new"), set(images["sources"][fates != "new"])
    sources, numbers = np.unique(new["sources"][new["sources"] != ""], return_counts=True)
    largest = [(str(sources[i]), int(numbers[i])) for i in np.argsort(-numbers, kind="stable")]
    return {
        "images": len(new["paths"]),
        **{name: int((fates == name).sum()) for name in ("changed", "moved")},
        "cells": count_cells(new),
        "known sources": {s: n for s, n in largest if s in known},
        "new sources": {s: n for s, n in largest if s not in known},
        **look_alikes(new, rows_of(images, fates == "same")),
    }


def rows_of(columns, mask):
    return {name: columns[name][mask] for name in COLUMNS if name != "features"}


def look_alikes(new, there):
    """Pairs [path of a new image, path of one that was there], one for each new image: 'alike', and of these 'other label'."""
    place = {}
    for j, digest in enumerate(there["sha256"].tolist()):
        place.setdefault(digest, []).append(j)
    same = [
        (i, j) for i, digest in enumerate(new["sha256"].tolist()) for j in place.get(digest, ())
    ]  # flat ones, too
    pairs = np.concatenate(
        [pairs_between(new["thumb"], there["thumb"]), np.array(same, int).reshape(-1, 2)]
    )
    labels = np.stack([new["labels"][pairs[:, 0]], there["labels"][pairs[:, 1]]])
    other = (labels[0] != labels[1]) & (labels.min(axis=0) >= 0)

    def named(pairs):
        first = pairs[np.unique(pairs[:, 0], return_index=True)[1]]
        return [[str(new["paths"][i]), str(there["paths"][j])] for i, j in first]

    return {"alike": named(pairs), "other label": named(pairs[other])}


def words(found):
    """What `whats_new` found -> lines; none where nothing is new."""
    cells = ", ".join(f"{cell} {n}" for cell, n in found["cells"].items())
    counts = [f"new images: {found['images']} ({cells})"] if found["images"] else []
    lines = [
        "; ".join(
            counts + [f"{name}: {found[name]}" for name in ("changed", "moved") if found[name]]
        )
    ]
    for kind in ("known sources", "new sources"):
        shown = [f"{source} {n}" for source, n in found[kind].items()]
        more = f" and {len(shown) - SHOWN_SOURCES} more" if len(shown) > SHOWN_SOURCES else ""
        lines.append(f"from {kind}: {', '.join(shown[:SHOWN_SOURCES])}{more}" if shown else "")
    for kind, told in (
        ("alike", "new images that look like one that was there"),
        ("other label", "warning: of these, under the other label"),
    ):
        pairs = "; ".join(" and ".join(pair) for pair in found[kind][:SHOWN_PAIRS])
        lines.append(f"{told}: {len(found[kind])}, such as {pairs}" if pairs else "")
    return [line for line in lines if line]
