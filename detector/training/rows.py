"""Which rows of the features files train a classifier, which test it, and which form a group.

files, encoder = open_files(["features.npz", "more.parquet"], crops=0)
train, test, groups, twins, words = choose_rows(columns, args, seed)
"""

from collections import namedtuple

import numpy as np

from detector.base.console import say
from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.evaluation.rules import MIN_IMAGES
from detector.features.columns import COLUMNS, distinct
from detector.features.file import load_rows, open_files
from detector.training.classifiers import fold_rows, row_weights

# Largest cluster of twins, as a share of the data, and the size up to which any cluster is
# accepted. A larger cluster means copies of a few pictures, or chains of similar pictures. Groups
# then mean nothing.
MAX_CLUSTER, SMALL_CLUSTER = 0.05, 50
# Splits that --resplit divides anew. It leaves external, extra and seen images out.
POOL = ("train", "val", "test", "")


def group_rows(columns):
    """Columns -> (groups, twins, words) of `facts.make_groups`; a named group counts as twins.

    Raises UsageError if a single picture is more than MAX_CLUSTER of the data.
    """
    from detector.images.facts import make_groups, merge_named, twin_clusters

    cluster = twin_clusters(columns["thumb"], columns["sha256"])
    whole = columns["view"] == 0
    largest = int(np.bincount(cluster[whole]).argmax())
    n = int((cluster[whole] == largest).sum())
    if n > max(SMALL_CLUSTER, MAX_CLUSTER * whole.sum()):
        raise UsageError(
            f"{n} of {whole.sum()} images look like the same picture"
            f" ({', '.join(columns['paths'][whole & (cluster == largest)][:3])}, ...): remove the"
            " copies, then extract again"
        )
    groups, kind = make_groups(columns, cluster)
    return groups, merge_named(cluster, columns["groups"]), kind


def choose_rows(columns, args, seed):
    """Columns and flags -> (train rows, test rows, groups, twins, words on the choice).

    Rows are row numbers. Groups and twins are of all rows, -1 for unused rows. Raises UsageError.
    """
    splits, labelled = columns["splits"], columns["labels"] >= 0
    wanted = args.train_splits.split(",")
    check_splits(splits[labelled], args.train_splits)
    in_train, in_test = labelled & np.isin(splits, wanted), labelled & (splits == "test")
    own = args.resplit or not in_train.any() or not in_test.any() or "test" in wanted
    if args.resplit or not in_train.any():
        in_train = labelled & np.isin(splits, (*POOL, *wanted))
    masks = (in_train,) if own else (in_train, in_test)
    parts = [distinct(columns, np.flatnonzero(mask)) for mask in masks]
    check_classes(columns, parts[0], "to train on")
    used = np.sort(np.concatenate(parts))  # the sources of other rows must not count
    groups, twins = np.full((2, len(labelled)), -1)
    groups[used], twins[used], kind = group_rows({name: columns[name][used] for name in COLUMNS})
    if not own:
        return *parts, groups, twins, f"the folders' split; folds by {kind}"
    (rows,) = parts
    train, test = fold_rows(columns["labels"][rows], groups[rows], seed)[0]
    words = f"our own split by {kind}, a fifth for testing; folds the same way"
    return rows[train], rows[test], groups, twins, words


def check_splits(splits, train_splits):
    """Raises UsageError if --train_splits names a split that has no labelled image.

    The default is exempt: without a split of that name the rows are split here.
    """
    missing = sorted(set(train_splits.split(",")) - set(splits))
    if missing and train_splits != "train":
        raise UsageError(
            f"--train_splits {train_splits}: no labelled images in '{missing[0]}' (splits there:"
            f" {split_names(splits)})"
        )


def check_classes(columns, rows, what):
    """Raises UsageError for fewer than MIN_IMAGES of a class among the rows, without copies."""
    rows = rows[columns["view"][rows] == 0]
    for label, name in enumerate(CLASSES):
        n = int((columns["labels"][rows] == label).sum())
        if n < MIN_IMAGES:
            raise UsageError(
                f"{n} {name} images {what}; at least {MIN_IMAGES} are needed: add some, or name"
                f" other splits with --train_splits (there: {split_names(columns['splits'])})"
            )


def split_names(splits):
    return ", ".join(filter(None, sorted(set(splits)))) or "none"


class Rows:
    """The training rows: features, labels, weight, group, twins and image of each."""

    def __init__(self, columns, train, groups, twins):
        self.columns = {name: columns[name][train] for name in COLUMNS}
        self.features, self.labels = self.columns["features"], self.columns["labels"].astype(int)
        self.whole = self.columns["view"] == 0
        self.groups, self.twins = groups[train], twins[train]
        self.images = np.unique(self.columns["sha256"], return_inverse=True)[1]
        self.weight = row_weights(self.labels, self.columns["sources"])


# `split`: words on how train and test were chosen; `rows`: the training rows, as `Rows`
Data = namedtuple("Data", "encoder columns train test groups twins split rows")


def read_data(args):
    """The flags of train_model.py -> Data. Raises UsageError."""
    files, encoder = open_files(args.features_file, args.crops)
    columns, total = load_rows(files, args.max_rows, args.seed)
    train, test, groups, twins, split = choose_rows(columns, args, args.seed)
    if total > len(columns["labels"]):
        split += f"; {len(columns['labels'])} of {total} rows, a draw even over class and source"
    rows = Rows(columns, train, groups, twins)
    return Data(encoder, columns, train, test, groups, twins, split, rows)


def say_rows(data, args):
    """Log which rows train, test or are left out."""
    whole, tested = data.rows.whole, data.columns["view"][data.test] == 0
    copies = "" if whole.all() else f", and {(~whole).sum()} degraded copies"
    say(f"{whole.sum()} images to train{copies}, {tested.sum()} to test ({data.split})")
    if rest := left_out(data.columns, np.concatenate([data.train, data.test])):
        say(f"left out: {rest}")
    if args.crops:
        say(
            f"each verdict will take {1 + args.crops} forward passes: the whole image and"
            f" {args.crops} crops of it"
        )


def left_out(columns, used):
    """Splits that neither train nor test, with their numbers of rows: '830 external' or ''."""
    splits, counts = np.unique(np.delete(columns["splits"], used), return_counts=True)
    pairs = zip(splits, counts, strict=True)
    return ", ".join(f"{count} {split or 'without split'}" for split, count in pairs)
