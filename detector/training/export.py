"""A trained model as scikit-learn's own objects, for tools that load nothing else.

    python train_model.py --export_sklearn model.skops
    pipeline = skops.io.load("model.skops")     # without trusting any type
    pipeline.decision_function(features)        # equals score.decision; mlp: predict_proba only

The pipeline is rebuilt from the model's arrays, so that both always give the same scores.
scikit-learn-intelex fits an SVC that skops cannot store. Its arrays become scikit-learn's SVC here.
"""

import importlib.util

import numpy as np

from detector.base.errors import UsageError
from detector.base.files import atomic_write
from detector.training.classifiers import estimator


def need_skops(path):
    """Raises UsageError unless skops is installed."""
    if importlib.util.find_spec("skops") is None:
        raise UsageError(
            f"--export_sklearn {path}: needs skops, which is not installed: pip install -r"
            " requirements.txt"
        )


def write(path, model, seed):
    """Model dict and the seed of its training -> skops file, whole or not at all."""
    import skops.io

    with atomic_write(path) as file:
        file.write(skops.io.dumps(pipeline(model, seed)))


def pipeline(model, seed):
    """Model dict and the seed of its training -> fitted Pipeline(StandardScaler, classifier)."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kind, d = model["classifier"], len(model["center"])
    scaler = having(
        StandardScaler(), mean_=model["center"], scale_=model["scale"], n_features_in_=d
    )
    fill = {"svm": svm, "mlp": network}.get(kind, linear)
    classifier = fill(model, estimator(kind, d, seed, **model["hyperparameters"]))
    return make_pipeline(scaler, having(classifier, classes_=np.arange(2), n_features_in_=d))


def having(estimator, **fitted):
    """The estimator with the attributes that fitting would have set."""
    vars(estimator).update(fitted)
    return estimator


def linear(model, estimator):
    return having(estimator, coef_=model["coef"][None], intercept_=np.array([model["intercept"]]))


def network(model, estimator):
    from sklearn.preprocessing import LabelBinarizer

    return having(
        estimator,
        coefs_=[model["hidden_weights"], model["output_weights"][:, None]],
        intercepts_=[model["hidden_bias"], np.array([model["intercept"]])],
        n_layers_=3,
        n_outputs_=1,
        out_activation_="logistic",
        _label_binarizer=LabelBinarizer().fit([0, 1]),
    )


def svm(model, estimator):
    """scikit-learn's SVC, also for an `estimator` of scikit-learn-intelex.

    libsvm keeps the support vectors of 'real' first.
    """
    from sklearn.svm import SVC

    order = np.argsort(model["dual_coef"] > 0, kind="stable")
    dual, vectors = (model[name][order].astype(float) for name in ("dual_coef", "support_vectors"))
    intercept, none = np.array([model["intercept"]]), np.empty(0)
    return having(
        SVC(C=estimator.C, gamma=model["gamma"]),
        support_vectors_=vectors,
        dual_coef_=dual[None],
        intercept_=intercept,
        # scikit-learn only counts them. The model does not keep which training rows they were.
        support_=np.arange(len(order), dtype=np.int32),
        _n_support=np.bincount(dual > 0, minlength=2).astype(np.int32),
        _gamma=model["gamma"],
        _sparse=False,
        _dual_coef_=-dual[None],  # for two classes libsvm's signs are reversed
        _intercept_=-intercept,
        _probA=none,
        _probB=none,
        fit_status_=0,
        shape_fit_=vectors.shape,
    )
