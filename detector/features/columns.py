"""The columns of a features file: joined, counted, and freed of repeats."""

import numpy as np

from detector.base.console import say
from detector.base.constants import CLASSES

SEEN = (  # split of the images that the encoder itself was trained on: good for nothing any more
    "seen"
)
COLUMNS = ("features", "labels", "paths", "splits", "sources", "sha256", "view", "facts", "thumb")
IMAGE = ("sha256", "view", "labels")  # rows that agree in these are one image, or one copy of it


def count_cells(columns):
    """Images by split and class, degraded copies left out: {'test/real': 4, ...}."""
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
