"""A folder of images: what is in it. Labels, splits and sources come from folder names.

    entries = list_images("data")             # sorted, each (path, label, split, source)
"""
import os
from collections import namedtuple

import numpy as np

from common import CLASSES, SPLITS, UsageError, need_folder, say

LABELS = {**dict.fromkeys("real 0_real nature natural human photo photos".split(), 0),
          **dict.fromkeys("fake 1_fake ai generated synthetic ai_generated".split(), 1)}
SEEN = "seen"  # split of the images that the encoder itself was trained on: good for nothing any more

# Of each file: what a leak probe needs. Sizes as in the header (before EXIF rotation), bytes of the whole file.
FACTS = np.dtype([("width", np.int32), ("height", np.int32), ("bytes", np.int64), ("format", "U8"),
                  ("quant_mean", np.float32), ("quant_hash", np.uint32), ("blockiness", np.float32),
                  ("density", np.float32)])
COLUMNS = ("features", "labels", "paths", "splits", "sources", "sha256", "view", "facts", "thumb")
IMAGE = ("sha256", "view", "labels")  # rows that agree in these are one image, or one copy of it
Entry = namedtuple("Entry", "path label split source")


def describe(path, split_names=SPLITS, unlabelled=False):
    """Relative path 'test/progan/cat/0_real/1.png' -> Entry(path, label 0 | 1 | -1, split 'test', source 'progan/cat').

    The split is the first of `split_names` above the label; all other folders are the source; `unlabelled` takes no
    folder for a label. Raises UsageError where two folders name different labels.
    """
    folders = path.split("/")[:-1]
    named = {i: LABELS[f.lower()] for i, f in enumerate(folders) if f.lower() in LABELS and not unlabelled}
    if len(set(named.values())) > 1:
        both = "' and '".join(folders[i] for i in named)
        raise UsageError(f"{path}: the folders '{both}' name both labels; rename one of them")
    above = folders[:min(named, default=len(folders))]
    split = next((i for i, f in enumerate(above) if f.lower() in split_names), None)
    source = "/".join(f for i, f in enumerate(folders) if i not in named and i != split)
    return Entry(path, min(named.values(), default=-1), "" if split is None else folders[split].lower(), source)


def list_files(data_dir):
    """Sorted paths of all files below `data_dir`, relative and '/'-separated; names that start with a dot left out."""
    need_folder(data_dir)
    paths, walked = [], set()
    for folder, folders, files in os.walk(data_dir, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [f for f in folders if not f.startswith(".")] if real not in walked else []
        if real in walked:  # links that lead back
            continue
        walked.add(real)
        below = os.path.relpath(folder, data_dir).replace(os.sep, "/")
        paths += [f if below == "." else f"{below}/{f}" for f in files if not f.startswith(".")]
    return sorted(paths)


def list_images(data_dir, split_names=SPLITS, unlabelled=False, paths=None):
    """Folder (or its files' `paths`, where they are known) -> sorted list of Entry. Files outside any label folder are left out,
    unless `unlabelled`.

    Raises UsageError where the folder is empty, holds no label or only one class.
    """
    paths = list_files(data_dir) if paths is None else paths
    if not paths:
        raise UsageError(f"--data_dir {data_dir}: the folder is empty")
    entries = [describe(path, split_names, unlabelled) for path in paths]
    if unlabelled:
        return entries
    labelled = [e for e in entries if e.label >= 0]
    if not labelled:
        raise UsageError(f"--data_dir {data_dir}: no folder below it names a label; expected real/ and fake/ "
                         f"(or {', '.join(LABELS)}); extract_features.py takes any folder with --unlabelled")
    if len({e.label for e in labelled}) == 1:
        raise UsageError(f"--data_dir {data_dir}: only one class is there ('{CLASSES[labelled[0].label]}'); "
                         "a detector needs both (extract_features.py takes any folder with --unlabelled)")
    return labelled


def count_cells(columns):
    """Images by split and class, degraded copies left out: {'test/real': 4, ...}."""
    whole = columns["view"] == 0
    counts = {f"{s or 'no split'}/{CLASSES[label] if label >= 0 else 'unlabelled'}":
              int((whole & (columns["splits"] == s) & (columns["labels"] == label)).sum())
              for s in np.unique(columns["splits"]) for label in np.unique(columns["labels"])}
    return {cell: n for cell, n in counts.items() if n}


def draw_evenly(cells, most, seed=0):
    """At most `most` row numbers, sorted, of cell names [n]: one of every cell, then a second of every cell, and so on."""
    order = np.random.default_rng(seed).permutation(len(cells))
    turn, rank = {}, np.empty(len(cells), int)
    for i in order:
        rank[i] = turn[cells[i]] = turn.get(cells[i], -1) + 1
    return np.sort(order[np.argsort(rank[order], kind="stable")][:most])


def join_columns(several):
    """Rows of several column sets one below the other; text columns as wide as the longest needs."""
    return {name: np.concatenate([columns[name] for columns in several]) for name in COLUMNS}


# ---- distinct images ----

def number_rows(columns, by):
    """A number for each row, int [n], the same where all of the named columns agree."""
    several = [np.unique(columns[name], return_inverse=True)[1] for name in by]
    return np.unique(np.stack(several), axis=1, return_inverse=True)[1].reshape(-1)


def distinct(columns, rows, by=IMAGE):
    """Row numbers [n] -> those of them that repeat no earlier row. How many repeat one is told.

    The same image again is no further evidence: intervals and counts rest on distinct images. An
    image under both labels is no repeat but a contradiction, and stays.
    """
    given = {name: columns[name][rows] for name in by}
    first = np.sort(np.unique(number_rows(given, by), return_index=True)[1])
    if repeats := len(rows) - len(first):
        say(f"{repeats} rows repeat an image that is there already: dropped")
    return rows[first]


def without_repeats(columns):
    """Columns -> the same without repeats. An image in two splits stays in both, for the audit."""
    rows = distinct(columns, np.arange(len(columns["labels"])), (*IMAGE, "splits"))
    return {name: values if name == "meta" else values[rows] for name, values in columns.items()}
