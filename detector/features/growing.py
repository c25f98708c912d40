"""Compare a features file with its changed folder: which rows stay, and which images are new.

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


# ---- the earlier file ----


def set_aside(path, why):
    """Rename the file or folder of another run and report it. Never overwrites anything."""
    number = 1
    while (aside := Path(f"{path}.old-{number}")).exists():
        number += 1
    os.replace(path, aside)
    say(f"{path} {why}: set aside as {aside}")


def earlier_rows(output, key, data_dir, prune, listed=None):
    """Rows of an earlier run that stay -> (columns, `digests_of` the whole earlier file).

    Rows stay if their files have the same bytes, cannot be read now or, unless `prune`, are gone.
    (None, {}) if there are none. A file that cannot be extended is set aside. `listed`: the paths
    of a table. A file that it does not list counts as gone.
    """
    if not output.is_file():
        return None, {}
    columns, fates, reason = read_earlier(output, key, data_dir, listed)
    if reason:
        set_aside(output, reason)
        return None, {}
    keep = np.isin(fates, ["same", "unread"] if prune else ["same", "unread", "gone"])
    say(f"{output}: {int(keep.sum())} rows stay unchanged")
    if unread := fates.count("unread"):
        say(f"{unread} of these rows belong to files that cannot be read now")
    files = "deleted files" if listed is None else "files that the table does not list"
    if gone := fates.count("gone"):
        say(
            f"{gone} rows of {files} are dropped"
            if prune
            else f"{gone} of these rows belong to {files}; --prune drops them"
        )
    return {name: columns[name][keep] for name in COLUMNS}, digests_of(columns)


def read_earlier(output, key, data_dir, listed):
    """-> (columns, fate of each row, ''), or (None, None, reason why the file is set aside)."""
    try:
        columns = load_features(output)
    except UsageError:
        return None, None, "cannot be read"
    if columns["meta"].get("key") != key:
        return None, None, "was made with other flags, another encoder or precision"
    fates = compare(columns, data_dir, listed)
    # the same names with all bytes changed are another folder, too
    if not {"same", "unread"} & set(fates):
        return None, None, "has none of the images of this folder"
    return columns, fates, ""


def compare(columns, data_dir, listed=None):
    """Fate of each row's file: list of 'same', 'changed' (other bytes), 'gone' or 'unread'."""
    from tqdm import tqdm

    @functools.cache  # the views of an image share a file
    def fate(path, digest):
        if listed is not None and path not in listed:
            return "gone"
        try:
            return "same" if sha256(Path(data_dir, path).read_bytes()) == digest else "changed"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return "gone"
        except OSError:  # no permission, or a network drive that does not respond
            return "unread"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        fates = pool.map(fate, columns["paths"], columns["sha256"])
        return list(tqdm(fates, total=len(columns["paths"]), desc="comparing", unit="image"))


def digests_of(columns):
    """{path: SHA-256} as plain strings, because numpy's strings of 48,000 files take 40 MB."""
    return dict(zip(columns["paths"].tolist(), columns["sha256"].tolist(), strict=True))


# ---- new images ----


def whats_new(before, columns):
    """`digests_of` the earlier file, columns now -> dict of counts, sources and look-alikes.

    Counts images, not their degraded copies.
    """
    images = rows_of(columns, columns["view"] == 0)
    now = digests_of(images)
    vacated = {digest for path, digest in before.items() if now.get(path) != digest}

    def fate(path, digest):
        if path in before:
            return "same" if before[path] == digest else "changed"
        return "moved" if digest in vacated else "new"

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


def look_alikes(new, old):
    """Pairs [path of a new image, path of an old one], one for each new image.

    -> {'alike': pairs, 'other label': those of them with contradicting labels}.
    """
    index = {}
    for j, digest in enumerate(old["sha256"].tolist()):
        index.setdefault(digest, []).append(j)
    # equal bytes count for flat images, too, which have no usable thumbnail
    same = [
        (i, j) for i, digest in enumerate(new["sha256"].tolist()) for j in index.get(digest, ())
    ]
    pairs = np.concatenate(
        [pairs_between(new["thumb"], old["thumb"]), np.array(same, int).reshape(-1, 2)]
    )
    labels = np.stack([new["labels"][pairs[:, 0]], old["labels"][pairs[:, 1]]])
    other = (labels[0] != labels[1]) & (labels.min(axis=0) >= 0)

    def paths_of(pairs):
        first = pairs[np.unique(pairs[:, 0], return_index=True)[1]]
        return [[str(new["paths"][i]), str(old["paths"][j])] for i, j in first]

    return {"alike": paths_of(pairs), "other label": paths_of(pairs[other])}


def words(news):
    """Result of `whats_new` -> lines of a report; none if nothing is new."""
    cells = ", ".join(f"{cell} {n}" for cell, n in news["cells"].items())
    counts = [f"new images: {news['images']} ({cells})"] if news["images"] else []
    counts += [f"{name}: {news[name]}" for name in ("changed", "moved") if news[name]]
    lines = ["; ".join(counts)]
    for kind in ("known sources", "new sources"):
        shown = [f"{source} {n}" for source, n in news[kind].items()]
        more = f" and {len(shown) - SHOWN_SOURCES} more" if len(shown) > SHOWN_SOURCES else ""
        lines.append(f"from {kind}: {', '.join(shown[:SHOWN_SOURCES])}{more}" if shown else "")
    for kind, title in (
        ("alike", "new images that look like an earlier image"),
        ("other label", "warning: new images that look like an earlier image of the other label"),
    ):
        pairs = "; ".join(" and ".join(pair) for pair in news[kind][:SHOWN_PAIRS])
        lines.append(f"{title}: {len(news[kind])}, such as {pairs}" if pairs else "")
    return [line for line in lines if line]
