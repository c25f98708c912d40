"""Features made up with numpy, for tests that need a features file or a model but no images."""
import json
import os
import shutil
from argparse import Namespace

import numpy as np

import common
import encoders
import train_model
from dataset import COLUMNS, FACTS
from model import load_model, save_model
from training_rows import Rows

ENCODER = {"name": "made-up", "identity": "ab" * 32, "layers": "final", "dim": 6}
BASELINE = common.HERE / "models" / "baseline.joblib"
DIM = encoders.read_manifest(encoders.SHIPPED)["dim"]


def make_columns(real=60, fake=60, gap=3.0, dim=6, seed=0, splits=True):
    """Columns of a features file: two normal classes whose means lie `gap` deviations apart, no two images alike.

    `splits`: the first two thirds of each class stand under train/, the rest under test/; else no split anywhere.
    """
    rng, n = np.random.default_rng(seed), real + fake
    labels = np.repeat(np.int8([0, 1]), [real, fake])
    features = rng.normal(size=(n, dim)).astype(np.float32)
    features[:, 0] += gap * labels
    place = np.concatenate([np.arange(count) / count for count in (real, fake)])
    facts = np.zeros(n, FACTS)
    facts["width"], facts["height"], facts["bytes"], facts["format"] = 640, 480, 50_000, "JPEG"
    facts["density"] = 0.2
    return {"features": features, "labels": labels, "facts": facts, "view": np.zeros(n, np.int8),
            "paths": np.array([f"{seed}/{i:05d}.jpg" for i in range(n)]),
            "splits": (np.where(place < 2 / 3, "train", "test") if splits else np.full(n, "")).astype("U8"),
            "sources": np.full(n, "", "U20"),
            "sha256": np.array([common.sha256(f"{seed} {i}".encode()) for i in range(n)]),
            "thumb": rng.integers(0, 256, (n, 64)).astype(np.uint8)}


def write_features(path, columns=None, encoder=ENCODER, **arguments):
    """Columns (made with `arguments` where none are given) -> features file; its path."""
    columns = make_columns(**arguments) if columns is None else columns
    meta = np.array(json.dumps({"encoder": encoder}))
    np.savez(path, meta=meta, **{name: columns[name] for name in COLUMNS})
    return path


def training_arguments(**changes):
    """What train_model.parse_args gives without flags."""
    return Namespace(**{**vars(train_model.parse_args(["--features_file", __file__])), **changes})


def with_views(columns, views, noise=0.1, seed=0):
    """Each image of the columns followed by `views` degraded copies: the same bytes and facts, features a little off."""
    rows = np.repeat(np.arange(len(columns["labels"])), 1 + views)
    many = {name: column[rows] for name, column in columns.items()}
    many["view"] = np.tile(np.arange(1 + views, dtype=np.int8), len(columns["labels"]))
    shift = np.random.default_rng(seed).normal(0, noise, many["features"].shape) * (many["view"] > 0)[:, None]
    return many | {"features": (many["features"] + shift).astype(np.float32)}


def training_rows(columns):
    """All rows to train on, each image (with its copies) a group of its own."""
    groups = np.unique(columns["sha256"], return_inverse=True)[1]
    return Rows(columns, np.arange(len(columns["labels"])), groups, groups)


def build(columns, kind="svm", seed=0, **changes):
    """Train on all rows -> the model, as train_model.py would save it."""
    args, rows = training_arguments(seed=seed, classifier=kind, **changes), training_rows(columns)
    model = train_model.set_threshold(train_model.build(kind, rows, seed), args.max_fpr)
    return {**model, **train_model.describe_training(train_model.training_data(rows), ENCODER, args), "metrics": {}}


def other_encoder(name="other", identity="cd" * 32, **changes):
    """The shipped encoder under another name and identity in the cache, without its notice. -> its folder"""
    folder = encoders.cache_dir() / "encoders" / name
    shutil.copytree(encoders.SHIPPED, folder)
    manifest = {**encoders.read_manifest(folder), "name": name, "identity": identity, **changes}
    manifest.pop("notice", None)
    (folder / "encoder.json").write_text(json.dumps(manifest))
    return folder


def baseline_for(path, name="other", identity="cd" * 32):
    """The shipped model, said to be trained on another encoder -> its path."""
    model = load_model(BASELINE)
    del model["sha256"]
    save_model(path, {**model, "encoder": {**model["encoder"], "name": name, "identity": identity}})
    return path


class Planted:
    """An object whose unpickling creates a file: what an attacker would put into a model file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)
