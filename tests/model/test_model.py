"""The model file: numpy scores equal scikit-learn's, and planted code never runs."""

import io
import pickle
import subprocess
import sys
from contextlib import suppress

import joblib
import numpy as np
import pytest
from commands import ROOT
from made_up import BASELINE, Planted, build, make_columns
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from detector.base.errors import ModelError, UsageError
from detector.features.file import load_features
from detector.model.file import CLASSIFIERS, FIELDS, load_model, save_model
from detector.model.score import DERIVED, decision, probability
from detector.model.threshold import verdict
from detector.training.classifiers import balanced_weights, fit, svc

# Of each kind: a point of its grid, and scikit-learn's estimator for that point and `dim` features.
KINDS = {
    "svm": ({"C": 3, "gamma": 0.3}, lambda dim: svc()(C=3, gamma=0.3 / dim)),
    "linear-svm": (
        {"C": 0.1},
        lambda dim: LinearSVC(C=0.1, dual="auto", max_iter=5000, random_state=0),
    ),
    "logistic": ({"C": 0.1}, lambda dim: LogisticRegression(C=0.1, max_iter=2000)),
    "mlp": ({"alpha": 1}, lambda dim: MLPClassifier((64,), alpha=1, max_iter=40, random_state=0)),
}
KIND_FIELDS = set().union(*CLASSIFIERS.values())


@pytest.fixture(scope="module")
def model():
    return build(make_columns(gap=1.5))


@pytest.fixture(scope="module")
def of_kind(model):
    """Function: the model with another kind of classifier in it."""
    columns = make_columns(gap=1.5)
    labels = columns["labels"].astype(int)
    common_part = {name: value for name, value in model.items() if name not in KIND_FIELDS}

    def make(kind):
        weight = balanced_weights(labels)
        return common_part | fit(kind, columns["features"], labels, weight, 0, **KINDS[kind][0])

    return make


@pytest.fixture
def saved(model, tmp_path):
    """Function: model, changes (None removes a field) -> file, written without any check."""

    def save(model=model, **changes):
        path = tmp_path / "model.joblib"
        fields = {k: v for k, v in {**model, **changes}.items() if v is not None}
        path.write_bytes(pickle.dumps(fields, protocol=5))
        return path

    return save


def refusal(path):
    """The error that refuses the file: a single line that names the file and the remedy."""
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert str(path) in message and len(message.splitlines()) == 1
    assert "train it again with train_model.py" in message
    return message


# ---- the same scores as scikit-learn ----


def far_off_centre():
    """Means twenty deviations from 0, the hardest case for float32."""
    columns = make_columns(gap=1.0, dim=20)
    means = np.linspace(-6, 6, 20, dtype=np.float32)
    columns["features"] = columns["features"] * np.float32(0.3) + means
    return columns


def shipped_features():
    columns = load_features(ROOT / "models" / "features.npz")
    rows = np.flatnonzero(columns["labels"] >= 0)[::8]
    return {name: column[rows] for name, column in columns.items() if name != "meta"}


DATA = {
    "separable": make_columns,
    "noise": lambda: make_columns(gap=0),
    "1 to 5": lambda: make_columns(real=40, fake=200, gap=1),
    "far off centre": far_off_centre,
    "the shipped features": shipped_features,
}


def raw_scores(pipeline, rows):
    """Decision values of a fitted pipeline; a network's are its outputs before the sigmoid."""
    network = pipeline[-1]
    if not isinstance(network, MLPClassifier):
        return pipeline.decision_function(rows)
    network.out_activation_ = "identity"
    return pipeline.predict_proba(rows)[:, 1]


# the recipe has a fixed number of iterations
@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_numpy_gives_the_decision_values_of_scikit_learns_pipeline(data, kind):
    columns, (point, estimator) = data(), KINDS[kind]
    features, labels = columns["features"], columns["labels"].astype(int)
    weight = balanced_weights(labels)
    model = fit(kind, features, labels, weight, 0, **point)
    pipeline = make_pipeline(StandardScaler(), estimator(features.shape[1]))
    pipeline.fit(features, labels, **{f"{pipeline.steps[-1][0]}__sample_weight": weight})
    new = features + np.float32(0.1)  # rows outside the training
    for rows in (features, new, new[:1]):
        theirs = raw_scores(pipeline, rows.astype(float))  # less exact than ours in float32
        atol = 2e-5 if kind == "svm" else 1e-4
        np.testing.assert_allclose(decision(model, rows), theirs, atol=atol, rtol=0)
    assert np.ptp(decision(model, features)) > 0.1  # the scores differ


def test_a_probability_rises_with_the_score_and_never_overflows(model):
    p = probability(model, [-1e300, -1e6, -1, 0, 1, 1e6, 1e300])
    assert (np.diff(p) >= 0).all() and p[0] == 0 and p[-1] == 1


@pytest.mark.parametrize(
    "p_fake, threshold, expected",
    [
        (0.9, 0.5, ("fake", 0.9)),
        (0.1, 0.5, ("real", 0.9)),
        (0.5, 0.5, ("fake", 0.5)),
        (0.49996, 0.5, ("real", 0.5)),
        (0.4, 0.3, ("fake", 0.4)),
        (0.6, 0.7, ("real", 0.4)),
        (1.0, 0.5, ("fake", 1.0)),
        (1 / 3, 0.5, ("real", 0.6667)),
    ],
)
def test_a_verdict_is_the_class_and_its_probability_to_four_places(
    model, p_fake, threshold, expected
):
    assert verdict({**model, "threshold": threshold}, np.float64(p_fake)) == expected
    assert [type(v) for v in verdict(model, np.float64(p_fake))] == [str, float]


# ---- the file ----


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    same_type = type(a) is type(b) and getattr(a, "dtype", None) == getattr(b, "dtype", None)
    return same_type and np.array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads_unchanged(of_kind, tmp_path, kind):
    model = of_kind(kind)
    save_model(tmp_path / "model.joblib", model)
    back = load_model(tmp_path / "model.joblib")
    assert len(back["sha256"]) == 64
    assert equal({name: value for name, value in back.items() if name not in DERIVED}, model)
    features = make_columns(seed=2)["features"]
    assert np.array_equal(decision(back, features), decision(model, features))


def test_joblib_also_reads_the_file(model, tmp_path):
    save_model(tmp_path / "model.joblib", model)
    assert equal(joblib.load(tmp_path / "model.joblib"), model)


def test_an_invalid_model_is_not_saved(model, tmp_path):
    with pytest.raises(ModelError, match="gamma"):
        save_model(tmp_path / "model.joblib", {**model, "gamma": float("nan")})
    assert not (tmp_path / "model.joblib").exists()


def test_classifying_imports_no_sklearn_no_torch_no_joblib():
    code = (
        "import sys, numpy as np; from detector.model import file, score, threshold;"
        " model = file.load_model(sys.argv[1]);"
        " features = np.zeros((2, len(model['center'])), np.float32);"
        " threshold.verdict(model, score.p_fake_of(model, features)[0]); print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, BASELINE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"sklearn", "torch", "joblib", "scipy", "openvino"} & set(result.stdout.split())


# ---- refusals ----


PLANTS = {
    "alone": lambda model, bomb: bomb,
    "beside the fields": lambda model, bomb: {**model, "more": bomb},
    "deep in a field": lambda model, bomb: {**model, "versions": ["deep", {"in": (1, bomb)}]},
    "in an object array": lambda model, bomb: {**model, "center": np.array([bomb], object)},
    "as a key": lambda model, bomb: {**model, "metrics": {(bomb,): 1}},
}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_a_planted_pickle_is_refused_and_never_runs(model, tmp_path, plant, protocol):
    marker = tmp_path / "ran"
    data = pickle.dumps(plant(model, Planted(marker)), protocol=protocol)
    with suppress(TypeError):  # None, the payload's result, may not fit into its place
        pickle.loads(data)
    assert marker.exists()  # the payload works
    marker.rmdir()
    (tmp_path / "model.joblib").write_bytes(data)
    assert "may be planted" in refusal(tmp_path / "model.joblib")
    assert not marker.exists()


@pytest.mark.parametrize("compress", [0, 3], ids=["plain", "compressed"])
@pytest.mark.parametrize("plant", ["alone", "beside the fields", "in an object array"])
def test_a_planted_joblib_file_is_refused_and_never_runs(model, tmp_path, plant, compress):
    marker, path = tmp_path / "ran", tmp_path / "model.joblib"
    joblib.dump(PLANTS[plant](model, Planted(marker)), path, compress=compress)
    refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins\neval",
        "builtins\nexec",
        "numpy\nload",
        "numpy._core.multiarray\n_reconstruct",
        "os\nsystem",
        "model\nload_model",
    ],
)
def test_only_the_two_names_of_an_array_are_looked_up(tmp_path, name):
    (tmp_path / "model.joblib").write_bytes(b"c" + name.encode() + b"\n(S'1'\ntR.")
    assert repr(name.replace("\n", ".")) in refusal(tmp_path / "model.joblib")


def test_a_planted_name_cannot_break_the_error_into_two_lines(tmp_path):
    names = (b"os\nerror: all is well", b"system")
    pushed = b"".join(b"\x8c" + bytes([len(name)]) + name for name in names)
    (tmp_path / "model.joblib").write_bytes(b"\x80\x04" + pushed + b"\x93.")
    refusal(tmp_path / "model.joblib")


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, features=np.zeros((2, 3)))
    return buffer.getvalue()


def dumped(estimator, compress=0):
    buffer = io.BytesIO()
    joblib.dump(estimator, buffer, compress=compress)
    return buffer.getvalue()


OTHER_FILES = {
    "text": (b"hello\n", "it is text"),
    "a page": (b"<html>404</html>", "it is text"),
    "empty": (b"", "it is empty"),
    "an npz": (npz(), "zip archive, as .npz"),
    "an estimator": (dumped(LinearSVC()), "sklearn.svm._classes.LinearSVC"),
    "a pipeline": (dumped(make_pipeline(StandardScaler(), LinearSVC())), "sklearn"),
    "a compressed estimator": (dumped(LinearSVC(), 3), "of another kind"),
    "a truncated model": (BASELINE.read_bytes()[:-100], "cut off"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "of another kind"),
    "zeros": (bytes(1000), "of another kind"),
    "a list": (pickle.dumps([1]), "something else"),
    "a number": (pickle.dumps(1), "something else"),
    "an empty dict": (pickle.dumps({}), "something else"),
}


@pytest.mark.parametrize("data, words", OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_refusal_names_the_kind_of_the_other_file(tmp_path, data, words):
    (tmp_path / "model.joblib").write_bytes(data)
    message = refusal(tmp_path / "model.joblib").replace(str(tmp_path), "")
    assert "is not a model file: " in message and words in message
    assert "Error" not in message and "pickle" not in message


def test_a_folder_is_refused_as_a_folder(tmp_path):
    with pytest.raises(ModelError, match="is not a model file: it is a folder; name a file from"):
        load_model(tmp_path)


@pytest.mark.parametrize("kept", [0.001, 0.01, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_refused(saved, kept):
    path = saved()
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    refusal(path)


@pytest.mark.parametrize("number", [0, 1, 2, 4, "3", 1.5])
def test_another_format_is_refused_by_its_number(saved, number):
    assert f"its format is {number!r}, this code reads 3" in refusal(saved(format=number))


@pytest.mark.parametrize("kind", ["forest", "SVM", None, 5], ids=str)
def test_an_unknown_classifier_is_refused_with_the_known_ones(saved, kind):
    message = refusal(saved(classifier=kind))
    assert f"its classifier is {kind!r}" in message and "svm, linear-svm, logistic, mlp" in message


# (kind of classifier, field, its type); the common fields are tried on an SVM
TYPES = [("svm", name, type_) for name, type_ in FIELDS.items()]
TYPES += [(kind, name, type_) for kind in KINDS for name, type_ in CLASSIFIERS[kind].items()]
ARRAYS = [(kind, name) for kind, name, type_ in TYPES if isinstance(type_, tuple)]
NAMED = [(kind, name) for kind, name, _ in TYPES if name not in ("format", "classifier")]


@pytest.mark.parametrize("kind, field", NAMED)
def test_a_missing_field_is_named(of_kind, saved, kind, field):
    assert f"'{field}'" in refusal(saved(of_kind(kind), **{field: None}))


@pytest.mark.parametrize("kind, field", ARRAYS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_array_with_a_nan_is_refused_by_name(of_kind, saved, kind, field, value):
    model = of_kind(kind)
    array = model[field].copy()
    array.flat[-1] = value
    assert f"'{field}'" in refusal(saved(model, **{field: array}))


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": float("nan")},
        {"intercept": float("inf")},
        {"threshold": "0.5"},
        {"gamma": 1},
        {"center": [0.0] * 6},
        {"dual_coef": np.zeros((3, 1))},
        {"scale": np.ones(6, int)},
        {"encoder": "mine"},
        {"threshold_rule": "0.5"},
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_is_named(saved, changes):
    assert f"'{next(iter(changes))}'" in refusal(saved(**changes))


@pytest.mark.parametrize("kind, field", ARRAYS)
@pytest.mark.parametrize("more", [-1, 1])
def test_arrays_that_do_not_fit_together_are_refused(of_kind, saved, kind, field, more):
    model = of_kind(kind)
    for axis in range(model[field].ndim):
        shape = np.array(model[field].shape)
        shape[axis] += more
        path = saved(model, **{field: np.resize(model[field], shape)})
        assert "do not fit together" in refusal(path)


def test_a_network_with_its_weights_on_their_side_is_refused(of_kind, saved):
    model = of_kind("mlp")
    assert "do not fit together" in refusal(saved(model, hidden_weights=model["hidden_weights"].T))


@pytest.mark.parametrize("version", ["v1 – test", "", "a b", "a" * 65, None, 1.5])
def test_a_version_that_no_header_can_hold_is_refused(saved, version):
    assert "its version" in refusal(saved(versions={"model": version}))


@pytest.mark.parametrize("notice", ["not for use – yet", "", "two\nlines", "a" * 201, 1.5])
def test_a_notice_that_no_header_can_hold_is_refused(saved, notice):
    assert "its notice" in refusal(saved(notice=notice))


def test_a_notice_is_optional_and_kept(saved):
    assert load_model(saved(notice="not for use"))["notice"] == "not for use"
    assert "notice" not in load_model(saved())


@pytest.mark.parametrize(
    "encoder",
    [
        {},
        {"name": "mine"},
        {"identity": "ab"},
        {"name": "mine", "identity": 5},
        {"name": "mine", "identity": "ab"},
    ],
    ids=str,
)
def test_a_model_without_its_full_encoder_entry_is_refused(saved, encoder):
    assert "which encoder" in refusal(saved(encoder=encoder))


@pytest.mark.parametrize("shape", [(3, 5), (3, 7), (6,), (0, 5)])
def test_features_of_another_width_are_refused_with_both_widths(model, shape):
    with pytest.raises(ModelError) as caught:
        decision(model, np.zeros(shape, np.float32))
    for words in (str(list(shape)), "[n, 6]", "made-up"):
        assert words in str(caught.value)


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load_model(tmp_path / "nowhere.joblib")


def dtype_with_state(code, state):
    """A pickle that sets the state of numpy's type `code`, as only a crafted file does."""

    class Crafted:
        def __reduce__(self):
            return np.dtype, (code, False, True), state

    return Crafted()


@pytest.mark.parametrize(
    "code, state",
    [
        # bytes of the file become object pointers
        ("O", (3, "|", None, None, None, -1, -1, 0)),
        # an element claims to be 800 MB
        ("f8", (3, "<", ("<f8", (10**8,)), None, None, 8, 8, 0)),
    ],
    ids=["object pointers", "oversized element"],
)
def test_a_type_with_a_set_state_is_refused_before_memory_is_read(code, state, tmp_path):
    class Array:
        def __reduce__(self):
            arguments = (b"\1" * 64, dtype_with_state(code, state), (8,), "C")
            return np._core.numeric._frombuffer, arguments

    (tmp_path / "model.joblib").write_bytes(pickle.dumps({"format": Array()}, protocol=5))
    with pytest.raises(ModelError, match="refused|not a model file"):
        load_model(tmp_path / "model.joblib")
