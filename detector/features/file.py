"""Read features files: an .npz of extract_features.py, or the Parquet data set of its --ray.

columns = load_features("features.npz")  # dict of arrays (columns.COLUMNS), and "meta" as a dict
columns, total = load_rows(files, 100_000)  # at most 100,000 rows of several FeaturesFiles
"""

import json
import os
import zipfile
import zlib

import numpy as np

from detector.base.addresses import is_remote
from detector.base.console import need_features
from detector.base.errors import UsageError
from detector.features import storage
from detector.features.columns import (
    COLUMNS,
    IMAGE,
    distinct,
    join_columns,
    number_rows,
    without_repeats,
)
from detector.images.facts import FACTS
from detector.images.folders import draw_evenly

DRAWN_BY = ("labels", "splits", "sources", "view")  # columns that decide which rows are drawn
LIGHT = (*DRAWN_BY, "sha256")


class FeaturesFile:
    """A features file of either kind: its `meta`, its number of `rows`, its columns in parts.

    `crops`: number of crops wanted of each image, see `take_crops`; None keeps the features as
    stored. Raises UsageError.
    """

    def __init__(self, path, crops=None):
        need_features(path)
        self.path, self.crops, self.whole = path, crops, None
        if is_remote(path) or os.path.isdir(path):
            self.meta = storage.read_meta(path)
            self.rows = storage.count_rows(path, self.meta["parts"])
        else:
            self.whole = check_columns(path, load_npz(path))
            self.meta, self.rows = self.whole["meta"], len(self.whole["labels"])
        if (crops or 0) > crops_of(self.meta):
            raise UsageError(
                f"--features_file {path}: holds {crops_of(self.meta)} crops of an image, {crops} "
                f"are needed: extract again with --crops {crops}"
            )

    def parts(self, wanted=COLUMNS):
        """Yield the wanted columns of each part. An .npz is one part."""
        if self.whole:
            parts = [{name: self.whole[name] for name in wanted}]
        else:
            parts = storage.iterate_parts(self.path, self.meta["parts"], wanted)
        for part in parts:
            if "features" in wanted and not self.whole:
                check_columns(self.path, part)
            if "features" in wanted and self.crops is not None:
                part["features"] = take_crops(part["features"], crops_of(self.meta), self.crops)
            yield part


def crops_of(meta):
    """Number of crops per image in a features file, without the whole image."""
    return meta.get("key", {}).get("crops", 0)


def take_crops(features, stored, wanted):
    """Features with `stored` crops, float32 [n, (1 + stored) * d] -> [n, d] or [n, 1 + wanted, d].

    The result has two dimensions if no crops are wanted.
    """
    width = features.shape[1] // (1 + stored)  # -1 would be ambiguous for no rows
    pieces = features.reshape(len(features), 1 + stored, width)
    return pieces[:, : 1 + wanted] if wanted else pieces[:, 0]


def load_features(path):
    """Features file -> dict of its columns (see COLUMNS; n rows each) and 'meta', parsed.

    Raises UsageError.
    """
    file = FeaturesFile(path)
    return join_columns(list(file.parts())) | {"meta": file.meta}


def load_npz(path):
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            # files of earlier versions have no groups
            groups = {} if "groups" in file else {"groups": np.full(len(file["labels"]), "")}
            columns = groups | {n: file[n] for n in (*COLUMNS, "meta") if n not in groups}
        return columns | {"meta": json.loads(str(columns["meta"]))}
    except KeyError as error:
        raise UsageError(
            f"--features_file {path}: column {error} is missing; extract again"
        ) from None
    # TypeError: a .npy file
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # numpy's message recommends an unsafe way to load it
        why = "it is of another kind" if "pickle" in str(error) else error
        raise UsageError(
            f"--features_file {path} is not a features file ({why}); extract again"
        ) from None


def check_columns(path, columns):
    """Check the columns and return them. Raises UsageError."""
    lengths = {len(columns[name]) for name in COLUMNS}
    if len(lengths) != 1 or columns["features"].ndim != 2:
        raise UsageError(
            f"--features_file {path}: the columns differ in length {sorted(lengths)}; extract again"
        )
    bad = ~np.isfinite(columns["features"]).all(axis=1)
    if bad.any():
        raise UsageError(
            f"--features_file {path}: {bad.sum()} rows hold NaN or infinite features (first: "
            f"{columns['paths'][bad][0]}); extract again"
        )
    if not np.isin(columns["labels"], (-1, 0, 1)).all():
        raise UsageError(f"--features_file {path}: labels other than -1, 0 and 1; extract again")
    if columns["facts"].dtype != FACTS:
        raise UsageError(f"--features_file {path}: its facts have another format; extract again")
    return columns


# ---- more rows than memory holds ----


def load_rows(files, most, seed=0):
    """FeaturesFiles -> (columns of at most `most` distinct rows, number of all distinct rows).

    `sample_rows` draws the rows if there are more.
    """
    if sum(file.rows for file in files) <= most:
        columns = without_repeats(join_columns([part for file in files for part in file.parts()]))
        return columns, len(columns["labels"])
    light = light_columns(files)
    rows = distinct(light, np.arange(len(light["labels"])), (*IMAGE, "splits"))
    total = len(rows)
    if total > most:
        _, first, image = np.unique(
            number_rows(light, ("sha256", "labels", "splits")),
            return_index=True,
            return_inverse=True,
        )
        # move an image's copies behind it, also from another file
        rows = rows[np.argsort(first[image[rows]], kind="stable")]
        rows = np.sort(rows[sample_rows(*(light[name][rows] for name in DRAWN_BY), most, seed)])
    kept, start = [], 0
    for part in (part for file in files for part in file.parts()):
        end = start + len(part["labels"])
        drawn = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
        kept.append({name: part[name][drawn] for name in COLUMNS})
        start = end
    return join_columns(kept), total


def light_columns(files):
    """The columns LIGHT of all rows, with the first 64 bits of each hash as int64."""
    parts = []
    for part in (part for file in files for part in file.parts(LIGHT)):
        # one part at a time, because the text of a hash takes 256 bytes
        bits = [int(digest[:16], 16) - 2**63 for digest in part["sha256"]]
        parts.append({**part, "sha256": np.array(bits, np.int64)})
    return {name: np.concatenate([part[name] for part in parts]) for name in LIGHT}


def sample_rows(labels, splits, sources, view, most, seed):
    """Numbers of at most `most` labelled rows, sorted. A drawn image keeps its copies.

    The copies follow their image. Each split keeps its share of the images. Within a split, the
    draw is as even over classes and sources as possible.
    """
    first = np.flatnonzero(view == 0)
    length = np.diff([*first, len(view)])
    images = np.flatnonzero(labels[first] >= 0)
    share = most / max(1, length[images].sum())
    drawn = []
    for split in np.unique(splits[first[images]]):
        own = images[splits[first[images]] == split]
        cells = list(zip(labels[first[own]].tolist(), sources[first[own]].tolist(), strict=True))
        drawn.append(own[draw_evenly(cells, int(share * len(own)), seed)])
    drawn = np.sort(np.concatenate(drawn))
    return np.concatenate(
        [np.arange(start, start + n) for start, n in zip(first[drawn], length[drawn], strict=True)]
    )


def open_files(paths, crops):
    """Paths -> (FeaturesFiles with this number of crops, `meta` entry of their encoder).

    Raises UsageError on mixed encoders.
    """
    files = [FeaturesFile(path, crops) for path in paths]
    for file in files:
        if "encoder" not in file.meta:
            raise UsageError(f"{file.path} does not name its encoder: extract again")
    first = files[0].meta["encoder"]
    for file in files:
        encoder = file.meta["encoder"]
        if encoder["identity"] != first["identity"]:
            raise UsageError(
                f"{paths[0]} was made by '{first['name']}' ({first['identity'][:12]}), {file.path} "
                f"by '{encoder['name']}' ({encoder['identity'][:12]}): extract both with one "
                "encoder"
            )
    return files, first
