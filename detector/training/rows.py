"""Which rows of the features files train a classifier, which test it, and which of them belong together.

files, encoder = open_files(["features.npz", "more.parquet"], crops=0)
train, test, groups, twins, words = choose_rows(columns, args, seed)
"""

from collections import namedtuple

import numpy as np

from detector.base.console import say
from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.evaluation.probes import MIN_IMAGES
from detector.features.columns import COLUMNS, distinct
from detector.features.file import load_rows, open_files
from detector.training.classifiers import fold_rows, row_weights

MAX_CLUSTER = 0.05  # share of the data in one cluster of twins (if above 50 images) that stops everything: either the
# data are copies of a few pictures, or something chains them, and groups mean nothing
POOL = (
    "train",
    "val",
    "test",
    "",
)  # what --resplit divides anew; external, extra and seen images stay out of it


def group_rows(columns):
    """`facts.make_groups`; UsageError where one picture is more than MAX_CLUSTER of the data. -> (groups, twins, words)"""
    from detector.images.facts import make_groups, twin_clusters

    cluster = twin_clusters(columns["thumb"], columns["sha256"])
    whole = columns["view"] == 0
    largest = int(np.bincount(cluster[whole]).argmax())
    n = int((cluster[whole] == largest).sum())
    if n > max(50, MAX_CLUSTER * whole.sum()):
        raise UsageError(
            f"{n} of {whole.sum()} images look like one and the same picture"
            f" ({', '.join(columns['paths'][whole & (cluster == largest)][:3])}, ...): remove the"
            " copies, then extract again"
        )
    groups, kind = make_groups(columns, cluster)
    return groups, cluster, kind


def choose_rows(columns, args, seed):
    """-> (train row numbers, test row numbers, groups and twins of all rows, words on how they were chosen)."""
    labelled = columns["labels"] >= 0
    splits, wanted = columns["splits"], args.train_splits.split(",")
    missing = sorted(set(wanted) - set(splits[labelled]))
    if (
        missing and args.train_splits != "train"
    ):  # without a split called so the default means our own
        raise UsageError(
            f"--train_splits {args.train_splits}: no labelled images in '{missing[0]}' "
            f"(splits there: {', '.join(filter(None, sorted(set(splits[labelled])))) or 'none'})"
        )
    in_train = labelled & np.isin(splits, wanted)
    in_test = labelled & (splits == "test")
    own = args.resplit or not in_train.any() or not in_test.any() or "test" in wanted
    pool = labelled & (
        np.isin(splits, (*POOL, *wanted)) if args.resplit or not in_train.any() else in_train
    )
    parts = [
        distinct(columns, np.flatnonzero(rows))
        for rows in ((pool,) if own else (in_train, in_test))
    ]
    check_classes(columns, parts[0], "to train on")
    used = np.sort(np.concatenate(parts))  # others' sources must not count
    groups, twins = np.full((2, len(labelled)), -1)
    groups[used], twins[used], kind = group_rows({name: columns[name][used] for name in COLUMNS})
    if not own:
        return *parts, groups, twins, f"the folders' split; folds by {kind}"
    (rows,) = parts
    train, test = fold_rows(columns["labels"][rows], groups[rows], seed)[0]
    return (
        rows[train],
        rows[test],
        groups,
        twins,
        f"our own split by {kind}, a fifth for testing; folds the same way",
    )


def check_classes(columns, rows, what):
    """Raises UsageError where the row numbers hold fewer than MIN_IMAGES of a class, copies not counted."""
    rows = rows[columns["view"][rows] == 0]
    for label, name in enumerate(CLASSES):
        n = int((columns["labels"][rows] == label).sum())
        if n < MIN_IMAGES:
            raise UsageError(
                f"{n} {name} images {what}; at least {MIN_IMAGES} are needed: add some, or name"
                " other splits with --train_splits (there:"
                f" {', '.join(filter(None, sorted(set(columns['splits'])))) or 'none'})"
            )


class Rows:
    """The training rows as the fitting takes them: features, labels, weight, group, twins and image of each."""

    def __init__(self, columns, train, groups, twins):
        self.columns = {name: columns[name][train] for name in COLUMNS}
        self.features, self.labels = self.columns["features"], self.columns["labels"].astype(int)
        self.whole = self.columns["view"] == 0
        self.groups, self.twins = groups[train], twins[train]
        self.images = np.unique(self.columns["sha256"], return_inverse=True)[1]
        self.weight = row_weights(self.labels, self.columns["sources"])


# `split`: words on how train and test were chosen; `rows`: those that train, as `Rows`
Data = namedtuple("Data", "encoder columns train test groups twins split rows")


def read_data(args):
    """The flags of train_model.py -> Data. Raises UsageError."""
    files, encoder = open_files(args.features_file, args.crops)
    columns, total = load_rows(files, args.max_rows, args.seed)
    train, test, groups, twins, split = choose_rows(columns, args, args.seed)
    if total > len(columns["labels"]):
        split += f"; {len(columns['labels'])} of {total} rows, a draw even over class and source"
    return Data(
        encoder, columns, train, test, groups, twins, split, Rows(columns, train, groups, twins)
    )


def say_rows(data, args):
    """Which rows train, which test, which are left out; warns where the reals are too few for --max_fpr."""
    whole = data.columns["view"] == 0
    copies = (
        f", and {(~whole[data.train]).sum()} degraded copies" if not whole[data.train].all() else ""
    )
    say(
        f"{whole[data.train].sum()} images to train{copies}, {whole[data.test].sum()} to test"
        f" ({data.split})"
    )
    if rest := left_out(data.columns, np.concatenate([data.train, data.test])):
        say(f"left out: {rest}")
    if args.crops:
        say(
            f"each verdict will take {1 + args.crops} forward passes: the whole image and"
            f" {args.crops} crops of it"
        )
    warn_of_few_reals(args.max_fpr, data.rows)


def left_out(columns, used):
    """Splits that neither trained nor tested, with their numbers: '830 external' or ''."""
    splits, n = np.unique(np.delete(columns["splits"], used), return_counts=True)
    return ", ".join(f"{k} {s or 'without split'}" for s, k in zip(splits, n))


def warn_of_few_reals(max_fpr, rows):
    """Warns where the training reals are too few to certify the rate."""
    if max_fpr is None:
        return
    n = int((rows.whole & (rows.labels == 0)).sum())
    if (
        n < 3 / max_fpr
    ):  # the rule of three: with fewer, even no false alarm at all leaves the rate open
        say(
            f"warning: {n} real training images are too few to certify a rate of {max_fpr:g}: it"
            f" takes {int(np.ceil(3 / max_fpr))}"
        )
