"""The model file: one plain dict of arrays, strings and numbers. numpy alone reads and scores it.

    model = load_model("model.joblib")
    scores = decision(model, features)    # float32 [n, d] or, with crops, [n, 1 + crops, d]
    p_fake = probability(model, scores)   # float64 [n], calibrated at equal shares of both classes
    classification, confidence = verdict(model, p_fake[0])

The threshold and the 'uncertain' band follow from the out-of-fold scores that the file holds.
`joblib.load` also reads the file, but runs the code in a planted file. `load_model` refuses
everything that is not plain data.
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
# First bytes of other files. A model begins with b"\x80", as does every pickle from protocol 2 on.
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
# What each kind of classifier needs in addition.
LINEAR = {"coef": ("f", 1)}
CLASSIFIERS = {
    "svm": {"support_vectors": ("f", 2), "dual_coef": ("f", 1), "gamma": float},
    "linear-svm": LINEAR,
    "logistic": LINEAR,
    "mlp": {"hidden_weights": ("f", 2), "hidden_bias": ("f", 1), "output_weights": ("f", 1)},
}


class NotAModel(ModelError):
    """`save_model` did not write the file."""


def plain_dtype(name, *_):
    """numpy's own type of that name. A state set by the file could make it read any memory."""
    if name not in ("f4", "f8", "i1", "i8"):
        raise ModelError(f"it holds an array of type {name!r}")
    return np.dtype(name)


class PlainUnpickler(pickle.Unpickler):
    """Knows only the two names that a numpy array needs, so no code of the file can run."""

    def find_class(self, module, name):
        if (module, name) == ("numpy", "dtype"):
            return plain_dtype
        if module in ("numpy._core.numeric", "numpy.core.numeric") and name == "_frombuffer":
            return lambda buffer, dtype, shape, order: np.frombuffer(buffer, dtype).reshape(
                shape, order=order
            )
        raise NotAModel(
            f"it holds {f'{module}.{name}'!r}, which is not plain data and may be planted"
        )


def report_folder(path):
    """Model file -> the folder of the report that train_model.py writes with it, as text."""
    return f"{str(path).removesuffix('.joblib')}_report"


def save_model(path, model):
    """Model dict -> file, whole or not at all -> its bytes.

    Pickle protocol 5 keeps arrays as plain buffers.
    """
    check(model)
    stored = {name: value for name, value in model.items() if name not in DERIVED}
    data = pickle.dumps(stored, protocol=5)
    with atomic_write(path) as file:
        file.write(data)
    return data


def golden_floor(model):
    """Lower end of the interval of the balanced accuracy on the model's test images, or None."""
    whole = model["metrics"].get("overall") or {}
    return (whole.get("balanced_accuracy", {}).get("interval") or [None])[0]


def load_model(path, public_key=None):
    """File -> model dict with the DERIVED fields. Raises ModelError that states what is wrong.

    `public_key` (default: MODEL_PUBLIC_KEY) is a file with the key that must have signed the model.
    The signature is checked first.
    """
    if os.path.isdir(path):
        raise ModelError(
            f"{path} is not a model file: it is a folder; name a file from train_model.py"
        )
    data, public_key = read_bytes(path), public_key or os.environ.get("MODEL_PUBLIC_KEY")
    if public_key:
        check_signature(path, data, public_key)
    try:
        model = PlainUnpickler(io.BytesIO(data)).load()
        check(model)
    except NotAModel as error:
        raise ModelError(f"{path} is not a model file: {error}; {REMEDY}") from None
    except ModelError as error:
        raise ModelError(f"{path} is refused: {error}; {REMEDY}") from None
    except Exception:  # a damaged or crafted pickle raises almost anything
        raise ModelError(f"{path} is not a model file: {describe_bytes(data)}; {REMEDY}") from None
    if model["classifier"] == "svm":
        model["squares"] = squares_of(model)
    return model | {"sha256": sha256(data)}


def trained_on(model, hashes):
    """SHA-256 of images as text [n] -> bool [n]: has the image trained the model?"""
    numbers = [int(digest[:16], 16) - 2**63 for digest in hashes]
    return np.isin(np.array(numbers, np.int64), model["training_data"]["images"])


def describe_bytes(data):
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
    """Check that every field is there, of its type, finite and of a fitting size.

    Raises ModelError.
    """
    if not isinstance(model, dict) or "format" not in model:
        raise NotAModel("it holds something else")
    classifier, crops = model.get("classifier"), model.get("crops", 0)
    need(model["format"] == FORMAT, f"its format is {model['format']!r}, this code reads {FORMAT}")
    need(
        classifier in CLASSIFIERS,
        f"its classifier is {classifier!r}, this code knows {', '.join(CLASSIFIERS)}",
    )
    for name, kind in {**FIELDS, **CLASSIFIERS[classifier]}.items():
        need(
            is_of_kind(model.get(name), kind),
            f"its field '{name}' is missing, of the wrong type, or not finite",
        )
    check_origin(model)
    check_headers(model)
    need(sizes_fit(model), "the sizes of its arrays do not fit together")
    need(
        type(crops) is int and 0 <= crops <= MAX_CROPS,
        f"its number of crops is not a whole number from 0 to {MAX_CROPS}",
    )
    need(
        all(isinstance(model["encoder"].get(name), str) for name in ("name", "identity", "layers")),
        "it does not state which encoder it was trained on",
    )


def need(condition, words):
    if not condition:
        raise ModelError(words)


def is_of_kind(value, kind):
    """Does a value fit its entry in FIELDS or CLASSIFIERS, with finite numbers only?"""
    if not isinstance(kind, tuple):
        return type(value) is kind and not (kind is float and not np.isfinite(value))
    return (
        isinstance(value, np.ndarray)
        and (value.dtype.kind, value.ndim) == kind
        and np.isfinite(value).all()
    )


def check_origin(model):
    """Raises ModelError unless threshold rule and training data are complete."""
    rule, data = model["threshold_rule"], model["training_data"]
    need(
        isinstance(rule.get("band_error"), float)
        and isinstance(rule.get("max_fpr", 0), (float, int, type(None))),
        "its field 'threshold_rule' does not state how the threshold and the band were chosen",
    )
    need(
        isinstance(data.get("sources"), list) and isinstance(data.get("images"), np.ndarray),
        "its field 'training_data' does not list the sources and images it was trained on",
    )


def check_headers(model):
    """Raises ModelError unless version and notice fit into an HTTP header."""
    version, notice = model["versions"].get("model"), model.get("notice", "-")
    need(
        isinstance(version, str) and VERSION.fullmatch(version),
        f"its version {version!r} is not 1 to 64 plain characters, for an HTTP header",
    )
    need(
        isinstance(notice, str) and NOTICE.fullmatch(notice),
        "its notice is not 1 to 200 plain characters, for an HTTP header",
    )


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
