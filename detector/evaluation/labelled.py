"""Labels that people gave to a draw of `draw_sample.py`, and what they say of the whole folder."""

import numpy as np

from detector.base.console import say
from detector.base.errors import UsageError
from detector.evaluation import intervals, sampling
from detector.images.labels_file import read_labels, read_rows


def read_labelled(labels_files, data_dir):
    """One table, or those of two people -> entries of the images. Says how far two agree.

    Images with two different labels are left out. Raises UsageError.
    """
    entries = {e.path: e for file in labels_files for e in read_labels(file, data_dir).entries}
    if len(labels_files) == 1:
        return list(entries.values())
    first, second = (
        {row.get("path"): row["label"].strip().lower() for _, row in read_rows(file)}
        for file in labels_files
    )
    both = sorted(first.keys() & second.keys())
    if not both:
        raise UsageError(f"--labels_file {' '.join(labels_files)}: the tables share no image")
    kappa = sampling.kappa([first[path] for path in both], [second[path] for path in both])
    disputed = [path for path in both if first[path] != second[path]]
    say(
        f"two people agree on {len(both) - len(disputed)} of {len(both)} images, Cohen's kappa"
        f" {intervals.words(kappa)}; the others are left out"
    )
    return [entry for path, entry in entries.items() if path not in disputed]


def whole_folder(labels_files, columns, fake):
    """Columns of the labelled images, their verdicts [n] -> `sampling.estimates`.

    None without tables, and for tables that no draw made. Raises UsageError where a row states no
    probability.
    """
    drawn = {row.get("path"): row for file in labels_files or () for _, row in read_rows(file)}
    if not any("probability" in row for row in drawn.values()):
        return None
    try:
        probability, images = np.array(
            [
                [float(drawn[path]["probability"]), float(drawn[path]["images"])]
                for path in columns["paths"]
            ]
        ).T
    except (KeyError, ValueError):
        probability = images = np.zeros(1)
    if not (probability.min() > 0 and probability.max() <= 1 and images.min() >= 1):
        raise UsageError(
            f"--labels_file {' '.join(labels_files)}: an image has no probability of its draw;"
            " give labels.csv as the page of draw_sample.py saved it"
        )
    return sampling.estimates(columns["labels"].astype(int), fake, probability, images)
