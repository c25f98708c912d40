"""Features made with numpy, for tests that need a features file or a model but no images."""

import json
import os
import shutil
from argparse import Namespace

import numpy as np
import small
from PIL import Image

import train_model
from detector.base.files import sha256
from detector.base.project import HERE
from detector.encoders import runtime
from detector.evaluation import metrics
from detector.features.columns import COLUMNS
from detector.images import preprocessing, samples
from detector.images.facts import FACTS
from detector.model.file import load_model, save_model
from detector.model.score import p_fake_of
from detector.training import recipe
from detector.training.classifiers import calibrated, fit, fold_rows, out_of_fold
from detector.training.rows import Rows

ENCODER = {"name": "made-up", "identity": "ab" * 32, "layers": "final", "dim": 6}
COMMIT = "0123456789abcdef" * 2 + "01234567"
# trained on crops of photographs and on the same crops with red and blue swapped
BASELINE = small.FOLDER / "small.joblib"
SHIPPED = HERE / "models" / "baseline.joblib"
NOTICE = "this model is a demonstration on random weights: not a detector to rely on"
DIM = small.ARCH["output_dim"]


def make_columns(real=60, fake=60, gap=3.0, dim=6, seed=0, splits=True):
    """Columns of a features file: two normal classes with means `gap` deviations apart.

    No two images are alike. With `splits`, the first two thirds of each class are in train, the
    rest in test.
    """
    rng, n = np.random.default_rng(seed), real + fake
    labels = np.repeat(np.int8([0, 1]), [real, fake])
    features = rng.normal(size=(n, dim)).astype(np.float32)
    features[:, 0] += gap * labels
    place = np.concatenate([np.arange(count) / count for count in (real, fake)])
    facts = np.zeros(n, FACTS)
    facts["width"], facts["height"], facts["bytes"], facts["format"] = 640, 480, 50_000, "JPEG"
    facts["density"] = 0.2
    return {
        "features": features,
        "labels": labels,
        "facts": facts,
        "view": np.zeros(n, np.int8),
        "paths": np.array([f"{seed}/{i:05d}.jpg" for i in range(n)]),
        "splits": (
            (np.where(place < 2 / 3, "train", "test") if splits else np.full(n, "")).astype("U8")
        ),
        "sources": np.full(n, "", "U20"),
        "groups": np.full(n, "", "U20"),
        "sha256": np.array([sha256(f"{seed} {i}".encode()) for i in range(n)]),
        "thumb": rng.integers(0, 256, (n, 64)).astype(np.uint8),
    }


def write_features(path, columns=None, encoder=ENCODER, **arguments):
    """Columns, by default from make_columns(**arguments) -> path of their features file."""
    columns = make_columns(**arguments) if columns is None else columns
    meta = np.array(json.dumps({"encoder": encoder}))
    np.savez(path, meta=meta, **{name: columns[name] for name in COLUMNS})
    return path


def training_arguments(**changes):
    """The flags of train_model.py, with these changes of the defaults."""
    defaults = vars(train_model.parse_args(["--features_file", __file__]))
    return Namespace(**defaults | changes)


def with_views(columns, views, noise=0.1, seed=0):
    """Each image followed by `views` degraded copies: other features, the same bytes and facts."""
    rows = np.repeat(np.arange(len(columns["labels"])), 1 + views)
    many = {name: column[rows] for name, column in columns.items()}
    many["view"] = np.tile(np.arange(1 + views, dtype=np.int8), len(columns["labels"]))
    shift = np.random.default_rng(seed).normal(0, noise, many["features"].shape)
    shift *= (many["view"] > 0)[:, None]
    return many | {"features": (many["features"] + shift).astype(np.float32)}


def training_rows(columns):
    """All rows, to train on. Each image and its copies are a group."""
    groups = np.unique(columns["sha256"], return_inverse=True)[1]
    return Rows(columns, np.arange(len(columns["labels"])), groups, groups)


def build(columns, kind="svm", seed=0, **changes):
    """Train on all rows -> the model, as train_model.py saves it."""
    args, rows = training_arguments(seed=seed, classifier=kind, **changes), training_rows(columns)
    model = recipe.set_threshold(recipe.build(kind, rows, seed), args.max_fpr)
    origin = recipe.describe_training(recipe.training_data(rows), ENCODER, args)
    return model | origin | {"metrics": {}}


def other_encoder(name="other", identity="cd" * 32, **changes):
    """Put the small encoder under another name and identity into the cache -> its folder."""
    folder = runtime.cache_dir() / "encoders" / name
    shutil.copytree(small.ENCODER, folder)
    manifest = {**runtime.read_manifest(folder), "name": name, "identity": identity, **changes}
    (folder / "encoder.json").write_text(json.dumps(manifest))
    return folder


def baseline_for(path, name="other", identity="cd" * 32):
    """Save the small model for another encoder and without its notice -> its path."""
    model = load_model(BASELINE)
    del model["notice"]
    model["encoder"] |= {"name": name, "identity": identity}
    save_model(path, model)
    return path


def colour_photos():
    """Yield the installed photographs in colour. In grey photographs red equals blue."""
    for path in samples.installed_photos():
        with Image.open(path) as photo:
            if photo.mode == "RGB":
                yield photo.copy()


def crop_features(number):
    """Features float32 [2 n, DIM] of n crops of photographs, then with red and blue swapped."""
    rng, crops = np.random.default_rng(0), []
    photos = list(colour_photos())
    for i in range(number):
        photo, side = photos[i % len(photos)], int(rng.integers(80, 200))
        left, top = rng.integers(photo.width - side), rng.integers(photo.height - side)
        crops.append(photo.crop((left, top, left + side, top + side)))
    crops += [Image.merge("RGB", crop.split()[::-1]) for crop in crops]
    transform = preprocessing.clip_transform(small.ARCH["input_resolution"])
    return runtime.Encoder(small.ENCODER, "cpu").encode(
        np.stack([preprocessing.preprocess(crop, transform) for crop in crops])
    )


def write_baseline(number=100):
    """Write the model BASELINE. Its metrics are of the training images and mean nothing."""
    columns = make_columns(number, number, dim=DIM, splits=False)
    columns["features"] = crop_features(number)
    columns["sources"][:] = np.where(columns["labels"] == 1, "swapped", "photographs")
    args, rows = training_arguments(notice=NOTICE), training_rows(columns)
    point = {"C": 10.0, "gamma": 0.3}
    pairs = np.tile(np.arange(number), 2)  # a crop and its swapped copy are in the same fold
    folds = fold_rows(rows.labels, pairs, 0)
    data = "svm", rows.features, rows.labels, rows.weight
    scores = out_of_fold(*data, folds, 0, **point)
    model = calibrated(fit(*data, 0, **point), point, scores, rows)
    model = recipe.set_threshold(model, None)
    manifest = runtime.read_manifest(small.ENCODER)
    encoder = {name: manifest[name] for name in ("name", "identity", "layers", "dim")}
    model |= recipe.describe_training(recipe.training_data(rows), encoder, args)
    p_fake = p_fake_of(model, columns["features"])
    overall = metrics.measure(rows.labels, p_fake, model["threshold"], columns["sha256"])
    save_model(BASELINE, model | {"metrics": {"overall": overall}})


class Planted:
    """An object whose unpickling creates a folder, as planted code in a model file could."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


write_baseline()
