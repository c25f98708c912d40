"""linear-svm on more rows than memory holds: Parquet data sets, read several times, in pieces.

    part, training_data = build(files, numbers, columns, rows, train, test, groups, seed)

A sample of the rows is in memory (features.load_rows). It says what is searched, calibrated and tested, as if it were all; the
other rows train beside it, but never a classifier that is to judge a sampled row of their own source, or one that looks like
them: each of FOLDS classifiers goes without its share, out of which come the out-of-fold scores, and one has all.
"""
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from detector.base.console import say
from detector.base.files import sha256
from detector.features import storage
from detector.images.facts import pairs_between
from detector.model.score import decision
from detector.training.classifiers import (
    FOLDS,
    calibrated,
    fold_rows,
    plain_arrays,
    row_weights,
    search,
)

KIND = "linear-svm"
PASSES = 3       # over all rows; the weights' mean over the second and third is the result
STEP = 0.03      # of the descent, over the number of features (rows have about that squared length); benchmarks/cluster.md
POOL = 131_072   # rows that wait to be drawn: a part is of one class and source, and the descent follows what it saw last
PIECE = 16_384   # rows of a step
SURVEYED = ("features", "labels", "splits", "sources", "view", "sha256", "thumb")
ALL, OUT = 127, -1  # roles beside the fold numbers: every classifier is trained on the row, none is


# ---- which classifier may see which row ----

class Sample:
    """The sampled rows: where they lie in the files, and what each of them asks of rows like it."""

    def __init__(self, numbers, columns, train, test, groups, seed):
        self.numbers, self.thumb, self.digest = numbers, columns["thumb"], columns["sha256"]
        self.folds = fold_rows(columns["labels"][train].astype(int), groups[train], seed)
        self.splits = set(columns["splits"][train].tolist())
        own = not self.splits.isdisjoint(columns["splits"][test].tolist())  # a split of our own: what is like a test row is out
        self.splits |= set(columns["splits"][test].tolist()) if own else set()
        self.role = np.full(len(groups), ALL, np.int8)  # of rows that neither train nor test: nothing is asked
        for fold, (_, held) in enumerate(self.folds):
            self.role[train[held]] = fold
        self.is_test = np.isin(np.arange(len(groups)), test)
        self.role[test] = OUT if own else ALL
        used = np.concatenate([train, test]) if own else train
        used = used[columns["sources"][used] != ""]
        named = dict(zip(columns["sources"][used].tolist(), self.role[used].tolist()))
        in_one_group = len(set(zip(columns["sources"][used].tolist(), groups[used].tolist()))) == len(named)
        self.role_of_source = named if in_one_group else {}
        self.role_of_digest = dict(zip(self.digest.tolist(), self.role.tolist()))

    def roles(self, part, start):
        """Columns of a part, whose first row has the number `start` -> (role of each row, int8; how many train though they look like
        a test row)."""
        n = len(part["labels"])
        asked = np.full((4, n), ALL, np.int8)
        i, j = pairs_between(part["thumb"], self.thumb).T
        np.minimum.at(asked[0], i, self.role[j])
        np.maximum.at(asked[1], i, np.where(self.role[j] == ALL, -128, self.role[j]))
        asked[1][asked[0] == ALL] = ALL
        asked[2] = [self.role_of_source.get(source, ALL) for source in part["sources"].tolist()]
        asked[3] = [self.role_of_digest.get(digest, ALL) for digest in part["sha256"].tolist()]
        lowest = asked.min(axis=0)
        role = np.where((asked == ALL) | (asked == lowest), lowest, OUT).min(axis=0)  # what two folds claim is in none
        own = np.arange(start, start + n)
        place = np.minimum(np.searchsorted(self.numbers, own), len(self.numbers) - 1)
        sampled = self.numbers[place] == own
        role[sampled] = self.role[place[sampled]]
        role[sampled & self.is_test[place]] = OUT
        role[(part["labels"] < 0) | ~np.isin(part["splits"], list(self.splits))] = OUT
        return role, len(np.unique(i[self.is_test[j] & (role[i] != OUT)]))


# ---- passes over the files ----

def survey(files, sample):
    """One pass: -> (scaler fitted on all rows that train, dict of what is known of every row, its place: list of (file, part, start))."""
    from sklearn.preprocessing import StandardScaler
    from tqdm import tqdm
    scaler, found, places, start, alike, codes = StandardScaler(), [], [], 0, 0, {"": 0}
    parts = [(file.path, name) for file in files for name in file.meta["parts"]]
    repeats = ~np.concatenate([file.distinct for file in files])
    for (path, name), part in tqdm(zip(parts, storage.read_ahead(lambda place: storage.read_part(*place, SURVEYED), parts)),
                                   total=len(parts), desc="looking at all rows", unit="part"):
        role, twins = sample.roles(part, start)
        role[repeats[start:start + len(role)]] = OUT
        if (role != OUT).any():
            scaler.partial_fit(part["features"][role != OUT])
        found.append({"role": role, "labels": part["labels"], "whole": part["view"] == 0,
                      "source": np.array([codes.setdefault(s, len(codes)) for s in part["sources"].tolist()], np.int32),
                      "digest": np.array([int(digest[:16], 16) - 2 ** 63 for digest in part["sha256"].tolist()], np.int64)})
        places.append((path, name, start))
        start, alike = start + len(role), alike + twins
    if alike:
        say(f"LEAK  {alike} of the rows to train on show the picture of one of the sampled test images")
    return scaler, {name: np.concatenate([piece[name] for piece in found]) for name in found[0]} | {"sources": sorted(set(codes) - {""})}, places


def pieces(places, rng):
    """Pieces of all rows in a drawn order: (their features, their numbers). Parts in a drawn order fill a pool, of whose rows half
    are drawn when it is full."""
    order = [places[i] for i in rng.permutation(len(places))]
    waiting, count = [], 0
    for (_, _, start), part in zip(order, storage.read_ahead(lambda place: storage.read_part(*place[:2], ["features"]), order)):
        waiting.append((part["features"], np.arange(start, start + len(part["features"]))))
        count += len(part["features"])
        last = start == order[-1][2]
        if count >= POOL or last:
            features, numbers = (np.concatenate(several) for several in zip(*waiting))
            mixed = rng.permutation(count)
            drawn, rest = np.split(mixed, [count if last else count // 2])
            waiting, count = [(features[rest], numbers[rest])], len(rest)
            for piece in np.split(drawn, range(PIECE, len(drawn), PIECE)):
                yield features[piece], numbers[piece]


def descend(places, rows, scaler, C, seed):
    """-> FOLDS + 1 classifiers, averaged stochastic gradient descent on LinearSVC's loss; the last has seen every row."""
    from sklearn.linear_model import SGDClassifier
    from tqdm import tqdm
    trains = rows["role"] != OUT
    weight = np.zeros(len(trains))
    weight[trains] = row_weights(rows["labels"][trains].astype(int), rows["source"][trains], unnamed=0)
    n, rng = int(trains.sum()), np.random.default_rng(seed)
    found = [SGDClassifier(loss="squared_hinge", alpha=1 / (C * n), learning_rate="constant", eta0=STEP / scaler.n_features_in_, average=n,
                           random_state=seed) for _ in range(FOLDS + 1)]
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=PASSES * len(trains), desc=f"training, {KIND}", unit="row", unit_scale=True) as progress:
        for _ in range(PASSES):
            for features, numbers in pieces(places, rng):
                x, role, y, w = scaler.transform(features), rows["role"][numbers], rows["labels"][numbers], weight[numbers]

                def step(fold):
                    mine = (role != OUT) & (role != fold)
                    if mine.any():
                        found[fold].partial_fit(x[mine], y[mine], classes=[0, 1], sample_weight=w[mine])
                list(pool.map(step, range(FOLDS + 1)))
                progress.update(len(numbers))
    return found


def build(files, numbers, columns, own, train, test, groups, seed):
    """Parquet files, the numbers and columns of a sample of their rows, `own` (the Rows that train among these)
    -> (the classifier's part of the model, as train.build's, what the model says of its training data)."""
    sample = Sample(numbers, columns, train, test, groups, seed)
    scaler, rows, places = survey(files, sample)
    point = search(KIND, own.features, own.labels, own.weight, own.groups, own.images, seed)
    found = [{"classifier": KIND, **plain_arrays(KIND, scaler, fitted)} for fitted in descend(places, rows, scaler, point["C"], seed)]
    scores = np.empty(len(own.labels))
    for fold, (_, held) in enumerate(sample.folds):
        scores[held] = decision(found[fold], own.features[held])
    return calibrated(found[-1], point, scores, own), training_data(rows, int(own.columns["view"].max()))


def training_data(rows, views):
    """As train.training_data has it; the hash is of the images' first 64 bits and labels, in order."""
    trains = rows["role"] != OUT
    whole = trains & rows["whole"]
    order = np.lexsort((rows["labels"][whole], rows["digest"][whole]))
    digest = rows["digest"][whole][order].tobytes() + rows["labels"][whole][order].tobytes()
    return {"sha256": sha256(digest), "real": int((rows["labels"][whole] == 0).sum()), "fake": int((rows["labels"][whole] == 1).sum()),
            "views": views, "sources": rows["sources"], "images": np.unique(rows["digest"][trains])}
