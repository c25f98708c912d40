"""The model file: one plain dict of arrays, strings and numbers. Saved, read, scored with numpy alone.

    model = load_model("model.joblib")
    scores = decision(model, features)              # float32 [n, d], with crops [n, 1 + crops, d] -> float64 [n]
    p_fake = probability(model, scores)             # float64 [n], calibrated at equal shares of both classes
    classification, confidence = verdict(model, p_fake[0])

The threshold, and the band in which the answer is 'uncertain', follow from the out-of-fold scores that the file holds.
`joblib.load` reads the file too, but runs whatever a planted one says; `load_model` refuses everything that is not
plain data.
"""

import io
import os
import pickle

import numpy as np

from detector.base.constants import MAX_CROPS, NOTICE, VERSION
from detector.base.errors import ModelError
from detector.base.files import atomic_write, read_bytes, sha256
from detector.model.score import DERIVED, squares_of
from detector.model.signature import check_signature

FORMAT = 3
REMEDY = "train it again with train_model.py"
# What else a file may be, by its first bytes: a model begins as every pickle of protocol 2 and later does.
KINDS = {
    b"\x80": "it is cut off or damaged",
    b"PK": "it is a zip archive, as .npz and .pt files are",
    b"version https://git-lfs": "it is a Git LFS pointer (git lfs pull brings the file)",
}
# What a model must hold. Arrays as (dtype kind, number of dimensions).
FIELDS = {
    "format": int,
    "classifier": str,
    "center": ("f", 1),
    "scale": ("f", 1),
    "intercept": float,
    "means": ("f", 2),
    "calibrator": ("f", 1),
    "threshold": float,
    "threshold_rule": dict,
    "band": ("f", 1),
    "encoder": dict,
    "versions": dict,
    "training_data": dict,
    "out_of_fold": dict,
    "metrics": dict,
}
# And what its kind of classifier needs beside that.
LINEAR = {"coef": ("f", 1)}
CLASSIFIERS = {
    "svm": {"support_vectors": ("f", 2), "dual_coef": ("f", 1), "gamma": float},
    "linear-svm": LINEAR,
    "logistic": LINEAR,
    "mlp": {"hidden_weights": ("f", 2), "hidden_bias": ("f", 1), "output_weights": ("f", 1)},
}


class NotAModel(ModelError):
    """The file is none that `save_model` wrote."""


def plain_dtype(name, *_):
    """numpy's own type of that name. The file may not bring the state of one: crafted states read foreign memory."""
    if name not in ("f4", "f8", "i1", "i8"):
        raise ModelError(f"it holds an array of type {name!r}")
    return np.dtype(name)


class PlainUnpickler(pickle.Unpickler):
    """Knows the two names that a numpy array needs and no others, so nothing in the file can be called."""

    def find_class(self, module, name):
        if (module, name) == ("numpy", "dtype"):
            return plain_dtype
        if module in ("numpy._core.numeric", "numpy.core.numeric") and name == "_frombuffer":
            return lambda buffer, dtype, shape, order: np.frombuffer(buffer, dtype).reshape(
                shape, order=order
            )
        raise NotAModel(
            f"it holds {f'{module}.{name}'!r}, which is not plain data, and may be planted"
        )


def save_model(path, model):
    """Model dict -> file, whole or not at all. Pickle protocol 5 keeps arrays as plain buffers."""
    check(model)
    stored = {name: value for name, value in model.items() if name not in DERIVED}
    with atomic_write(path) as file:
        file.write(pickle.dumps(stored, protocol=5))


def load_model(path, public_key=None):
    """File -> model dict with what is DERIVED from it. Raises ModelError that says what is wrong with it.

    `public_key` (by default MODEL_PUBLIC_KEY): file of the key whose signature must lie beside it, looked at first.
    """
    if os.path.isdir(path):
        raise ModelError(
            f"{path} is not a model file: it is a folder; name a file from train_model.py"
        )
    data, public_key = read_bytes(path), public_key or os.environ.get("MODEL_PUBLIC_KEY")
    if public_key:
        try:
            check_signature(path, data, public_key)
        except ModelError as error:
            raise ModelError(
                f"{path} is refused: {error}; sign it with train_model.py --sign, or pull it again"
            ) from None
    try:
        model = PlainUnpickler(io.BytesIO(data)).load()
        check(model)
    except NotAModel as error:
        raise ModelError(f"{path} is not a model file: {error}; {REMEDY}") from None
    except ModelError as error:
        raise ModelError(f"{path} is refused: {error}; {REMEDY}") from None
    except (
        Exception
    ):  # a torn or crafted pickle raises almost anything, and its words tell a user nothing
        raise ModelError(f"{path} is not a model file: {kind_of(data)}; {REMEDY}") from None
    return (
        model
        | {"sha256": sha256(data)}
        | ({"squares": squares_of(model)} if model["classifier"] == "svm" else {})
    )


def kind_of(data):
    """What the bytes of a file that is no model seem to be, in words."""
    if not data:
        return "it is empty"
    for start, words in KINDS.items():
        if data.startswith(start):
            return words
    return "it is text" if is_text(data) else "it is of another kind"


def is_text(data):
    try:
        return "\0" not in data.decode()
    except UnicodeDecodeError:
        return False


def check(model):
    """Every field there, of its type, finite, and of sizes that fit together. Raises ModelError."""
    if not isinstance(model, dict) or "format" not in model:
        raise NotAModel("it holds something else")
    if model["format"] != FORMAT:
        raise ModelError(f"its format is {model['format']!r}, this code reads {FORMAT}")
    if model.get("classifier") not in CLASSIFIERS:
        raise ModelError(
            f"its classifier is {model.get('classifier')!r}, this code knows"
            f" {', '.join(CLASSIFIERS)}"
        )
    for name, kind in {**FIELDS, **CLASSIFIERS[model["classifier"]]}.items():
        value = model.get(name)
        if isinstance(kind, tuple):
            good = (
                isinstance(value, np.ndarray)
                and (value.dtype.kind, value.ndim) == kind
                and np.isfinite(value).all()
            )
        else:
            good = type(value) is kind and not (kind is float and not np.isfinite(value))
        if not good:
            raise ModelError(f"its field '{name}' is missing or not what it should be")
    rule, data = model["threshold_rule"], model["training_data"]
    if not isinstance(rule.get("band_error"), float) or not isinstance(
        rule.get("max_fpr", 0), (float, int, type(None))
    ):
        raise ModelError(
            "its field 'threshold_rule' does not say how the threshold and the band were chosen"
        )
    if not isinstance(data.get("sources"), list) or not isinstance(data.get("images"), np.ndarray):
        raise ModelError(
            "its field 'training_data' does not say which sources and images it was trained on"
        )
    version = model["versions"].get("model")
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        raise ModelError(
            f"its version {version!r} is not of up to 64 plain characters, for a header of HTTP"
        )
    notice = model.get("notice", "-")
    if not isinstance(notice, str) or not NOTICE.fullmatch(notice):
        raise ModelError("its notice is not of up to 200 plain characters, for a header of HTTP")
    if not sizes_fit(model):
        raise ModelError("the sizes of its arrays do not fit together")
    if type(model.get("crops", 0)) is not int or not 0 <= model.get("crops", 0) <= MAX_CROPS:
        raise ModelError("its number of crops is not what it should be")
    if not all(
        isinstance(model["encoder"].get(name), str) for name in ("name", "identity", "layers")
    ):
        raise ModelError("it does not say which encoder it was trained on")


def sizes_fit(model):
    d, kind = len(model["center"]), model["classifier"]
    if (
        len(model["scale"]) != d
        or model["means"].shape != (2, d)
        or len(model["calibrator"]) != 2
        or len(model["band"]) != 2
    ):
        return False
    if kind == "svm":
        return model["support_vectors"].shape == (len(model["dual_coef"]), d)
    if kind == "mlp":
        return (
            model["hidden_weights"].shape
            == (d, len(model["hidden_bias"]))
            == (d, len(model["output_weights"]))
        )
    return len(model["coef"]) == d
