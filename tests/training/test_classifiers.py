"""Classifiers: weights, folds, search, calibration, and learning of signal but not of noise."""

import importlib.util
import os
import platform
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import sklearn
from commands import ROOT
from made_up import (
    build,
    make_columns,
    training_arguments,
    training_rows,
    with_views,
    write_features,
)
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.evaluation import metrics
from detector.model.score import p_fake_of, probability
from detector.model.threshold import verdict
from detector.training import classifiers, recipe
from detector.training.classifiers import (
    GRIDS,
    balanced_weights,
    capped,
    fit_sigmoid,
    fold_rows,
    out_of_fold,
    row_weights,
    search_rows,
)
from detector.training.rows import Rows, choose_rows

# ---- weights ----


def spy(monkeypatch, name):
    """Mocks that call the function `name` of classifiers, there and in recipe -> the two mocks."""
    spies = [Mock(wraps=getattr(classifiers, name)) for _ in range(2)]
    for module, mock in zip((classifiers, recipe), spies, strict=True):
        monkeypatch.setattr(module, name, mock)
    return spies


def test_without_sources_only_the_classes_are_balanced():
    labels = np.array([0] * 30 + [1] * 150)
    weights = balanced_weights(labels)
    assert weights[labels == 0].sum() == pytest.approx(weights[labels == 1].sum())
    assert weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(row_weights(labels, np.full(180, "")), weights)


def random_sources(seed):
    """Labels, sources: sources of very different sizes, and a name that both classes share."""
    rng, labels, names = np.random.default_rng(seed), [], []
    for label in (0, 1):
        for name in ["both", *(f"{label} {i}" for i in range(seed))]:
            size = int(np.exp(rng.uniform(0, 7)))
            labels += [label] * size
            names += [name] * size
    order = rng.permutation(len(labels))
    return np.array(labels)[order], np.array(names)[order]


@pytest.mark.parametrize("seed", range(1, 9))
def test_weights_are_even_over_classes_and_no_source_dominates_its_class(seed):
    labels, sources = random_sources(seed)
    weights = row_weights(labels, sources)
    assert weights.mean() == pytest.approx(1) and (weights > 0).all()
    for own in (labels == 0, labels == 1):
        names, source, counts = np.unique(sources[own], return_inverse=True, return_counts=True)
        share = np.bincount(source, weights[own]) / (len(labels) / 2)
        cut = capped(counts, 1.5 / len(names)) if len(names) > 1 else counts
        np.testing.assert_allclose(share, cut / cut.sum())


@pytest.mark.parametrize(
    "counts, expected",
    [
        ([10, 10, 80], [10, 10, 20]),
        ([5, 95], [5, 15]),
        ([50, 50], [50, 50]),
        ([40, 60], [40, 60]),
        ([1, 1, 1, 1000, 2000], [1, 1, 1, 2.25, 2.25]),
    ],
    ids=str,
)
def test_the_largest_sources_are_cut_to_one_and_a_half_times_their_even_share(counts, expected):
    np.testing.assert_allclose(capped(np.array(counts), 1.5 / len(counts)), expected, rtol=1e-9)


def test_images_without_a_source_count_one_by_one():
    labels = np.repeat([0, 1], [100, 100])
    sources = np.array(["camera"] * 95 + [""] * 5 + ["a"] * 95 + ["b"] * 5)
    weights = row_weights(labels, sources)
    assert np.ptp(weights[labels == 0]) == 0 and np.ptp(weights[labels == 1]) > 0


def test_every_fit_has_the_weights_of_its_rows(monkeypatch):
    columns = make_columns()
    columns["sources"] = np.array((["a"] * 54 + ["b"] * 6) * 2)
    columns["features"][:, 5] = np.arange(120)  # the row's number
    expected = row_weights(columns["labels"], columns["sources"])
    spies = spy(monkeypatch, "fit")
    build(columns, "linear-svm")
    calls = [call.args for mock in spies for call in mock.call_args_list]
    assert len(calls) == 5 * 5 + 5 + 1 and np.ptp(expected) > 0
    for _, features, _, weight, *_ in calls:
        assert np.array_equal(weight, expected[features[:, 5].astype(int)])


# ---- folds and search ----


def test_fold_rows_refuses_fewer_groups_than_folds():
    labels = np.repeat([0, 1], 50)
    with pytest.raises(UsageError, match="only 4 groups of real images for 5 folds"):
        fold_rows(labels, np.concatenate([np.arange(50) % 4, 10 + np.arange(50)]), 0)


def test_search_and_calibration_keep_groups_whole_and_use_other_folds(monkeypatch):
    columns = with_views(make_columns(), 3, noise=0)
    columns["features"][:, 4] = np.repeat(np.arange(120), 4)  # the image's number
    columns["features"][:, 5] = columns["view"]
    spies = spy(monkeypatch, "out_of_fold")
    twins = np.repeat(np.arange(60), 8)  # two images each
    recipe.build("linear-svm", Rows(columns, np.arange(480), twins, twins), 0)

    searches, calibrations = (mock.call_args_list for mock in spies)
    assert (len(searches), len(calibrations)) == (len(GRIDS["linear-svm"]), 1)
    for calls, n in ((searches, 120), (calibrations, 480)):  # the search sees one view of an image
        for _, features, _, _, folds, _ in (call.args for call in calls):
            image = features[:, 4]
            assert (len(features), len(set(image))) == (n, 120)
            for train, test in folds:
                assert not set(image[train] // 2) & set(image[test] // 2)
    assert set(searches[0].args[1][:, 5]) == {0, 1, 2, 3}  # any view, not only the untouched image
    tested = []
    for call in (searches[0], calibrations[0]):
        _, features, _, _, folds, _ = call.args
        tested.append([set(features[test, 4]) for _, test in folds])
    assert tested[0] != tested[1]


@pytest.mark.parametrize(
    "real, fake, expected",
    [
        (100, 100, (100, 100)),
        (30, 1000, (30, 270)),
        (1000, 30, (270, 30)),
        (1000, 1000, (150, 150)),
        (140, 1000, (140, 160)),
    ],
)
def test_of_many_images_300_are_searched_with_the_whole_rarer_class(real, fake, expected):
    labels, images = np.repeat([0, 1], [real, fake]), np.arange(real + fake).repeat(2) + 7
    arguments = labels.repeat(2), images, images, 0, 300
    rows = search_rows(*arguments)
    assert np.array_equal(rows, search_rows(*arguments))
    rows //= 2
    assert np.bincount(labels[rows]).tolist() == list(expected)
    assert len(set(rows)) == sum(expected)
    if max(real, fake) == 1000:  # drawn from all, not the first images
        assert max(rows[labels[rows] == int(fake == 1000)]) > (real if fake == 1000 else 0) + 700


@pytest.mark.parametrize(
    "images, rungs",
    [
        (399, [(20, 399)]),
        (400, [(20, 100), (7, 200), (3, 400)]),
        (900, [(20, 100), (7, 200), (3, 400)]),
    ],
)
def test_a_search_on_many_images_halves(monkeypatch, images, rungs):
    monkeypatch.setattr(classifiers, "SEARCH_ROWS", 400)
    columns = make_columns(real=images // 2, fake=images - images // 2, gap=1.5)
    mock, _ = spy(monkeypatch, "out_of_fold")
    n, labels = np.arange(images), columns["labels"].astype(int)
    best = classifiers.search("svm", columns["features"], labels, np.ones(images), n, n, 0)
    rows = [len(call.args[1]) for call in mock.call_args_list]
    assert rows == [most for points, most in rungs for _ in range(points)]
    last = [call.kwargs for call in mock.call_args_list[-rungs[-1][0] :]]
    assert best in last and all(last.count(point) == 1 for point in last)


BOTH_SOLVERS = """
import numpy as np
from sklearnex.svm import SVC as fast
from sklearn.svm import SVC
from detector.training import classifiers
from made_up import make_columns
from detector.model.score import decision
assert classifiers.svc() is fast
columns = make_columns(real=400, fake=200, gap=1.5)
new = make_columns(real=1000, fake=1000, gap=1.5, seed=1)["features"]
labels, scores = columns["labels"].astype(int), []
weight = classifiers.balanced_weights(labels)
for solver in (fast, SVC):
    classifiers.svc = lambda: solver
    model = classifiers.fit("svm", columns["features"], labels, weight, 0, C=3, gamma=1)
    scores.append(decision(model, new))
a, b = scores
print(np.abs(a - b).max(), np.ptp(b), ((a > 0) != (b > 0)).sum())
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="scikit-learn-intelex: this processor has no build of it"
)
def test_scikit_learn_intelex_gives_the_verdicts_of_scikit_learns_svm():
    if importlib.util.find_spec("sklearnex") is None:
        pytest.skip("scikit-learn-intelex is not installed: pip install -r requirements.txt")
    # in a process of its own, because it does not load after OpenVINO's threads
    done = subprocess.run(
        [sys.executable, "-c", BOTH_SOLVERS],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr
    difference, spread, flips = map(float, done.stdout.split())
    assert difference < 2e-3 < 1 < spread and flips == 0  # both solvers stop at a tolerance of 1e-3


# ---- calibration ----

ESTIMATORS = {
    "svm": lambda C, gamma: SVC(C=C, gamma=gamma / 6),
    "logistic": lambda C: LogisticRegression(C=C, max_iter=2000),
    "linear-svm": lambda C: LinearSVC(C=C, dual="auto", max_iter=5000, random_state=0),
}


def calibrated_by_sklearn(estimator, features, labels, folds):
    """CalibratedClassifierCV with balanced weights, which metadata routing brings to the SVM."""
    with sklearn.config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(
            StandardScaler().set_fit_request(sample_weight=False),
            estimator.set_fit_request(sample_weight=True),
        )
        calibrated = CalibratedClassifierCV(pipeline, method="sigmoid", ensemble=False, cv=folds)
        return calibrated.fit(features, labels, sample_weight=balanced_weights(labels))


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.parametrize("real, fake", [(100, 100), (100, 300), (77, 123), (41, 203)])
@pytest.mark.parametrize("gap", [0.7, 2.0], ids=["overlapping", "apart"])
def test_probabilities_are_those_of_calibrated_classifier_cv(monkeypatch, kind, real, fake, gap):
    monkeypatch.setattr(classifiers, "svc", lambda: SVC)  # the same solver on both sides
    columns = make_columns(real=real, fake=fake, gap=gap)
    features, labels = columns["features"], columns["labels"].astype(int)
    model = build(columns, kind)
    folds = fold_rows(labels, training_rows(columns).groups, 0)
    estimator = ESTIMATORS[kind](**model["hyperparameters"])
    theirs = calibrated_by_sklearn(estimator, features, labels, folds)
    (sigmoid,) = theirs.calibrated_classifiers_[0].calibrators
    # scikit-learn computes the logistic regression and its sigmoid in the features' float32
    atol = 2e-4 if kind == "logistic" else 1e-5
    expected = [sigmoid.a_, sigmoid.b_]
    np.testing.assert_allclose(model["calibrator"], expected, rtol=10 * atol, atol=atol)

    new = make_columns(seed=1, gap=gap)["features"]
    ours = p_fake_of(model, new)
    np.testing.assert_allclose(ours, theirs.predict_proba(new)[:, 1], atol=atol)
    assert [verdict(model, p)[0] for p in ours] == [CLASSES[i] for i in theirs.predict(new)]


def true_probability(columns, gap):
    """Of two normal classes `gap` apart, at equal shares."""
    return 1 / (1 + np.exp(-gap * (columns["features"][:, 0].astype(float) - gap / 2)))


@pytest.mark.parametrize(
    "real, fake", [(1000, 1000), (1500, 300), (300, 1500)], ids=["equal", "5 to 1", "1 to 5"]
)
def test_probabilities_hold_at_equal_shares_whatever_the_shares_in_training(real, fake):
    gap, columns = 1.5, make_columns(real=real, fake=fake, gap=1.5, dim=4)
    features, labels = columns["features"], columns["labels"].astype(int)
    weights, folds = balanced_weights(labels), fold_rows(labels, np.arange(real + fake), 0)
    scores = out_of_fold("svm", features, labels, weights, folds, 0, C=1, gamma=0.2)
    p_fake = probability({"calibrator": fit_sigmoid(scores, labels)}, scores)

    assert abs(p_fake - true_probability(columns, gap)).mean() < 0.05
    assert np.average(p_fake, weights=weights) == pytest.approx(0.5, abs=0.01)
    error = 0
    for rows in np.array_split(np.argsort(p_fake), 10):
        error += abs(((p_fake - labels) * weights)[rows].sum()) / weights.sum()
    assert error < 0.04


def test_a_model_trained_on_five_fakes_per_real_favours_neither_class():
    model = build(make_columns(real=60, fake=300, gap=1.5))
    labels, p_fake = held_out(make_columns(real=2000, fake=2000, gap=1.5, seed=1), model)
    on_reals, on_fakes = (((p_fake >= 0.5) == labels)[labels == label].mean() for label in (0, 1))
    assert p_fake.mean() == pytest.approx(0.5, abs=0.05)
    assert on_reals == pytest.approx(on_fakes, abs=0.1)


# ---- signal and noise ----


def held_out(columns, model):
    """-> (labels, probabilities of fake) of new rows."""
    return columns["labels"].astype(int), p_fake_of(model, columns["features"])


@pytest.mark.parametrize("kind", GRIDS)
def test_classes_that_differ_are_told_apart(kind):
    model = build(make_columns(real=200, fake=200, gap=6), kind)
    labels, p_fake = held_out(make_columns(gap=6, seed=1), model)
    assert roc_auc_score(labels, p_fake) > 0.99 and ((p_fake >= 0.5) == labels).mean() > 0.95


@pytest.mark.parametrize(
    "kind, better", [("svm", True), ("mlp", True), ("linear-svm", False), ("logistic", False)]
)
def test_only_kinds_with_a_curved_border_learn_one(kind, better):
    columns, new = (make_columns(real=200, fake=200, gap=0, seed=seed) for seed in (0, 1))
    for c in (columns, new):
        c["labels"] = (c["features"][:, 0] * c["features"][:, 1] > 0).astype(np.int8)
    auc = roc_auc_score(*held_out(new, build(columns, kind)))
    assert auc > 0.8 if better else abs(auc - 0.5) < 0.15


@pytest.mark.parametrize("seed", range(4))
def test_on_noise_the_interval_of_the_auc_contains_one_half(seed):
    model = build(make_columns(gap=0, seed=seed))
    labels, p_fake = held_out(make_columns(real=150, fake=150, gap=0, seed=100 + seed), model)
    low, high = metrics.auc(labels, p_fake, np.arange(300))["interval"]
    assert low < 0.5 < high


def test_on_noise_the_out_of_fold_scores_are_chance():
    # C and gamma are fixed, because the best of twenty points would be a little above chance
    values, weight = [], np.ones(120)
    for seed in range(20):
        columns = make_columns(gap=0, seed=seed)
        features, labels = columns["features"], columns["labels"].astype(int)
        folds = fold_rows(labels, np.arange(120), 0)
        scores = out_of_fold("svm", features, labels, weight, folds, 0, C=3, gamma=0.3)
        values.append(roc_auc_score(labels, scores))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - 0.5) < 2.5 * error < 0.08


def grouped(seed):
    """80 places with five similar pictures each, and a random label for each place."""
    rng, place = np.random.default_rng(seed), np.repeat(np.arange(80), 5)
    columns = make_columns(real=200, fake=200, splits=False)
    features = rng.normal(size=(80, 6))[place] + 0.05 * rng.normal(size=(400, 6))
    columns["features"] = features.astype(np.float32)
    columns["labels"] = rng.permutation(np.repeat(np.int8([0, 1]), 40))[place]
    columns["sources"] = np.array([f"place {i}" for i in place])
    return columns


@pytest.mark.parametrize("seed", [0, 1])
def test_random_labels_of_whole_groups_give_chance(seed):
    columns = grouped(seed)
    rows, test, groups, _, words = choose_rows(columns, training_arguments(), 0)
    assert "our own split by sources" in words
    model = recipe.build("svm", Rows(columns, rows, groups, groups), 0)
    scores = model["out_of_fold"]
    # 1.0 if groups were on both sides of a fold
    assert abs(roc_auc_score(scores["labels"], scores["scores"]) - 0.5) < 0.15
    labels, p_fake = held_out({name: column[test] for name, column in columns.items()}, model)
    low, high = metrics.auc(labels, p_fake, groups[test])["interval"]
    slack = (high - low) / 2  # a 95% interval misses 1 in 20 times, twice as wide almost never
    assert low - slack < 0.5 < high + slack


def test_the_search_draws_from_every_small_group():
    sizes = [2000, 6, 6, 6, 6]
    groups, labels = np.repeat(np.arange(10), 2 * sizes), np.repeat([0, 1], sum(sizes))
    rows = search_rows(labels, groups, np.arange(len(labels)), 0, 100)
    assert np.bincount(groups[rows]).tolist() == 2 * [26, 6, 6, 6, 6]


@pytest.mark.parametrize("gigabytes, cache_mb", [(64, 4000), (8, 2000), (2, 500)])
def test_the_kernel_cache_takes_at_most_a_quarter_of_the_memory(monkeypatch, gigabytes, cache_mb):
    pages = {"SC_PHYS_PAGES": gigabytes * 1_000_000, "SC_PAGE_SIZE": 1000}
    monkeypatch.setattr("os.sysconf", pages.get)
    assert classifiers.kernel_cache_mb() == cache_mb
    assert classifiers.estimator("svm", 8, 0).cache_size == cache_mb


def test_scores_worse_than_chance_do_not_reverse_the_verdicts():
    """Such scores occur out of fold on a few groups. The probabilities keep their order."""
    labels = np.repeat([0, 1], 50)
    scores = np.random.default_rng(0).normal(size=100) - labels
    p_fake = probability({"calibrator": fit_sigmoid(scores, labels)}, scores)
    assert (np.argsort(p_fake) == np.argsort(scores)).all() and np.abs(p_fake - 0.5).max() < 0.01


# ---- threads ----

TRAINED_BY_EVERY_KIND = """
import sys
import train_model
from detector.training import recipe
from detector.training.classifiers import GRIDS
for kind in GRIDS:
    recipe.search = lambda kind, *_: GRIDS[kind][0]
    output = f"{sys.argv[2]}-{kind}.joblib"
    train_model.main(
        ["--features_file", sys.argv[1], "--classifier", kind, "--model_output_path", output])
"""


@pytest.mark.long
def test_the_number_of_threads_does_not_change_a_byte_of_the_model(tmp_path):
    features = write_features(tmp_path / "f.npz", real=150, fake=150, dim=512)
    for number in "123":
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        limits = dict.fromkeys(names, number)
        done = subprocess.run(
            [sys.executable, "-c", TRAINED_BY_EVERY_KIND, features, tmp_path / number],
            cwd=ROOT,
            env={**os.environ, **limits},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
    for kind in GRIDS:
        files = [tmp_path / f"{number}-{kind}.joblib" for number in "123"]
        assert len({path.read_bytes() for path in files}) == 1, kind
