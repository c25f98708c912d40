"""train_model.py --export_sklearn: a Pipeline with the model's scores, of trusted types only."""

import sys

import numpy as np
import pytest
import skops.io
from commands import assert_one_line_error
from made_up import build, make_columns
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from detector.base.errors import UsageError
from detector.model.score import decision
from detector.training import classifiers, export

ESTIMATORS = {
    "svm": SVC,
    "linear-svm": LinearSVC,
    "logistic": LogisticRegression,
    "mlp": MLPClassifier,
}
NEW = make_columns(seed=2)["features"]


def read(path):
    """Load a file as skops does by default, with trust in no type."""
    assert skops.io.get_untrusted_types(file=path) == []
    return skops.io.load(path)


def decision_values(pipeline, features):
    """Decision values; a network's are the log odds of its probabilities."""
    if not isinstance(pipeline[-1], MLPClassifier):
        return pipeline.decision_function(features)
    p_real, p_fake = pipeline.predict_proba(features).T
    return np.log(p_fake / p_real)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_exported_pipeline_gives_the_models_scores(train, tmp_path, kind):
    model, *_ = train(make_columns(gap=1), classifier=kind, export_sklearn=tmp_path / "model.skops")
    pipeline = read(tmp_path / "model.skops")
    types = [type(pipeline), *(type(step) for step in pipeline)]
    assert types == [Pipeline, StandardScaler, ESTIMATORS[kind]]
    scores, atol = decision(model, NEW), 5e-5 if kind == "svm" else 1e-5
    np.testing.assert_allclose(decision_values(pipeline, NEW), scores, atol=atol, rtol=0)
    assert np.ptp(scores) > 0.1 and np.array_equal(pipeline.predict(NEW), scores > 0)
    for name in ("C", "alpha"):
        assert getattr(pipeline[-1], name, None) == model["hyperparameters"].get(name)


@pytest.mark.parametrize("kind", ["linear-svm", "logistic", "mlp"])
def test_the_exported_parameters_are_those_of_the_training(kind):
    columns, seed = make_columns(gap=1), 5
    model = build(columns, kind, seed)
    expected = classifiers.estimator(kind, 6, seed, **model["hyperparameters"])
    assert export.pipeline(model, seed)[-1].get_params() == expected.get_params()


def test_an_exported_svm_has_the_attributes_of_scikit_learns(monkeypatch):
    columns = make_columns(gap=1)
    exported = export.pipeline(build(columns), 0)[-1]
    monkeypatch.setattr(classifiers, "svc", lambda: SVC)
    model = build(columns)
    labels = columns["labels"].astype(int)
    weight = classifiers.row_weights(labels, columns["sources"])
    rows = StandardScaler().fit_transform(columns["features"])
    fitted = SVC(C=model["hyperparameters"]["C"], gamma=model["gamma"])
    fitted.fit(rows, labels, sample_weight=weight)
    unused = {"class_weight_", "_num_iter", "n_iter_", "_effective_probability"}
    # the results of two solvers differ by their tolerance
    for ours, atol in ((exported, 1e-2), (export.pipeline(model, 0)[-1], 1e-6)):
        assert type(ours) is SVC and ours.get_params() == fitted.get_params()
        assert set(vars(fitted)) - set(vars(ours)) <= unused
        for name in ("support_vectors_", "n_support_", "dual_coef_", "intercept_", "classes_"):
            np.testing.assert_allclose(
                getattr(ours, name), getattr(fitted, name), atol=atol, rtol=0, err_msg=name
            )


def test_without_the_flag_nothing_is_exported_and_skops_is_not_imported(command, tmp_path):
    result = command(PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0 and not list(tmp_path.glob("*.skops"))
    assert "| detector.training.export" in result.stderr.replace("  ", "")
    assert "skops" not in result.stderr


# ---- refusals, before the training ----


def test_without_skops_the_error_says_how_to_install_it(monkeypatch, train, tmp_path):
    monkeypatch.setitem(sys.modules, "skops", None)
    message = "--export_sklearn .*a.skops: needs skops, .*pip install -r requirements.txt"
    with pytest.raises(UsageError, match=message):
        train(make_columns(), export_sklearn=tmp_path / "a.skops")
    assert not (tmp_path / "model.joblib").exists()


@pytest.mark.parametrize(
    "place, words",
    [
        ("/proc/nowhere/a.skops", "cannot be written"),
        ("", "is a folder; name a file in it"),
        ("out.joblib", "is the model file's place; name another"),
    ],
)
def test_a_place_that_cannot_be_written_is_a_one_line_error(command, tmp_path, place, words):
    result = command("--export_sklearn", tmp_path / place)
    assert_one_line_error(result, f"--export_sklearn {tmp_path / place}", words)
    assert "images to train" not in result.stderr and not (tmp_path / "out.joblib").exists()
