"""Join and count the columns of a features file, and drop repeated rows."""

import numpy as np

from detector.base.console import say
from detector.base.constants import CLASSES

SEEN = "seen"  # split of the images that trained the encoder itself; unusable for a classifier
COLUMNS = (
    *("features", "labels", "paths", "splits", "sources", "groups", "sha256", "view", "facts"),
    "thumb",
)
IMAGE = ("sha256", "view", "labels")  # rows equal in these are the same image or the same copy


def count_cells(columns):
    """Images by split and class, without degraded copies: {'test/real': 4, ...}."""
    whole = columns["view"] == 0
    counts = {
        f"{s or 'no split'}/{CLASSES[label] if label >= 0 else 'unlabelled'}": int(
            (whole & (columns["splits"] == s) & (columns["labels"] == label)).sum()
        )
        for s in np.unique(columns["splits"])
        for label in np.unique(columns["labels"])
    }
    return {cell: n for cell, n in counts.items() if n}


def join_columns(several):
    """Concatenate column sets. Text columns become as wide as their longest text."""
    return {name: np.concatenate([columns[name] for columns in several]) for name in COLUMNS}


# ---- distinct images ----


def number_rows(columns, by):
    """A number for each row, int [n]; rows equal in all columns `by` have the same number."""
    several = [np.unique(columns[name], return_inverse=True)[1] for name in by]
    return np.unique(np.stack(several), axis=1, return_inverse=True)[1].reshape(-1)


def distinct(columns, rows, by=IMAGE):
    """Row numbers [n] -> those that repeat no earlier row. Reports the number of repeats.

    A repeated image is no further evidence, so intervals and counts need distinct images. An image
    under both labels is a contradiction and stays.
    """
    given = {name: columns[name][rows] for name in by}
    first = np.sort(np.unique(number_rows(given, by), return_index=True)[1])
    if repeats := len(rows) - len(first):
        say(f"{repeats} rows repeat an earlier image and are dropped")
    return rows[first]


def without_repeats(columns):
    """Columns -> columns without repeats. An image in two splits stays in both, for the audit."""
    rows = distinct(columns, np.arange(len(columns["labels"])), (*IMAGE, "splits"))
    return {name: values if name == "meta" else values[rows] for name, values in columns.items()}
