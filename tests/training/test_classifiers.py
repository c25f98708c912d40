"""Classifiers: weights, folds, search, sigmoid; and that what is fitted learns what is there, and no more."""

import importlib.util
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT
from made_up import (
    build,
    make_columns,
    training_arguments,
    training_rows,
    with_views,
    write_features,
)
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC, LinearSVC

from detector.base.errors import UsageError
from detector.evaluation import metrics
from detector.model.score import decision, probability
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


def test_without_sources_weights_are_those_of_balanced_classes():
    labels = np.array([0] * 30 + [1] * 150)
    weights = balanced_weights(labels)
    assert weights[labels == 0].sum() == pytest.approx(
        weights[labels == 1].sum()
    ) and weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(row_weights(labels, np.full(180, "")), weights)


def random_sources(seed):
    """Labels, sources: a few sources a class, of very different sizes; one name stands in both classes."""
    rng = np.random.default_rng(seed)
    counts = [
        (label, name, n)
        for label in (0, 1)
        for name, n in zip(
            ["both", *(f"{label} {i}" for i in range(seed))],
            np.exp(rng.uniform(0, 7, seed + 1)).astype(int),
        )
    ]
    labels, names = (np.repeat([c[i] for c in counts], [n for *_, n in counts]) for i in (0, 1))
    order = rng.permutation(len(labels))
    return labels[order], names[order]


@pytest.mark.parametrize("seed", range(1, 9))
def test_weights_are_even_over_classes_and_no_source_dominates_its_own(seed):
    labels, sources = random_sources(seed)
    weights = row_weights(labels, sources)
    assert weights.mean() == pytest.approx(1) and (weights > 0).all()
    for label in (0, 1):
        own = labels == label
        names, source, counts = np.unique(sources[own], return_inverse=True, return_counts=True)
        of_source, of_image = (
            np.bincount(source, weights[own]),
            np.bincount(source, weights[own]) / counts,
        )
        assert of_source.sum() == pytest.approx(len(labels) / 2)
        most = 1.5 / len(names) * of_source.sum()
        assert of_source.max() <= most * (1 + 1e-9) or len(names) == 1
        small = of_image >= of_image.max() * (1 - 1e-9)
        if (
            not small.all()
        ):  # the largest are cut, to the same weight and no further than they must be
            assert counts[small].max() <= counts[~small].min()
            np.testing.assert_allclose(of_source[~small], most, rtol=1e-6)


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
    columns["features"][:, 5] = np.arange(120)  # tells which row it is
    expected, fit, seen = row_weights(columns["labels"], columns["sources"]), classifiers.fit, []

    def spy(kind, features, labels, weight, *rest, **point):
        seen.append(np.array_equal(weight, expected[features[:, 5].astype(int)]))
        return fit(kind, features, labels, weight, *rest, **point)

    for module in (classifiers, recipe):
        monkeypatch.setattr(module, "fit", spy)
    build(columns, "linear-svm")
    assert len(seen) == 5 * 5 + 5 + 1 and all(seen) and np.ptp(expected) > 0


# ---- folds and search ----


def test_fold_rows_refuses_fewer_groups_than_folds():
    labels = np.repeat([0, 1], 50)
    with pytest.raises(UsageError, match="only 4 groups of real images for 5 folds"):
        fold_rows(labels, np.concatenate([np.arange(50) % 4, 10 + np.arange(50)]), 0)


def test_the_search_sees_one_view_of_each_image_and_no_fold_a_group_on_both_sides(monkeypatch):
    columns = with_views(make_columns(), 3, noise=0)
    columns["features"][:, 4], columns["features"][:, 5] = (
        np.repeat(np.arange(120), 4),
        columns["view"],
    )
    seen = {"search": [], "calibration": []}

    def spy(what):
        def run(kind, features, labels, weight, folds, seed, **point):
            seen[what].append((features, folds))
            return out_of_fold(kind, features, labels, weight, folds, seed, **point)

        return run

    monkeypatch.setattr(classifiers, "out_of_fold", spy("search"))
    monkeypatch.setattr(recipe, "out_of_fold", spy("calibration"))
    twins = np.repeat(np.arange(60), 8)  # two images each
    recipe.build("linear-svm", Rows(columns, np.arange(480), twins, twins), 0)

    assert len(seen["search"]) == len(GRIDS["linear-svm"]) and len(seen["calibration"]) == 1
    for what, n in (("search", 120), ("calibration", 480)):
        for features, folds in seen[what]:
            image = features[:, 4]
            assert (len(features), len(set(image))) == (n, 120)
            assert all(
                not set(image[fit_on] // 2) & set(image[scored] // 2) for fit_on, scored in folds
            )
    assert set(seen["search"][0][0][:, 5]) == {
        0,
        1,
        2,
        3,
    }  # whichever comes, not always the image as it is
    folds = [
        [set(features[scored, 4]) for _, scored in folds] for (features, folds), *_ in seen.values()
    ]
    assert folds[0] != folds[1]  # the folds that chose do not calibrate


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
def test_of_many_images_three_hundred_are_searched_the_rarer_class_whole(real, fake, expected):
    labels, images = np.repeat([0, 1], [real, fake]), np.arange(real + fake) + 7
    rows = search_rows(np.repeat(labels, 2), np.repeat(images, 2), np.repeat(images, 2), 0, 300)
    assert np.bincount(labels[rows // 2]).tolist() == list(expected) and len(set(rows // 2)) == sum(
        expected
    )
    assert np.array_equal(
        rows, search_rows(np.repeat(labels, 2), np.repeat(images, 2), np.repeat(images, 2), 0, 300)
    )
    if max(real, fake) == 1000:  # drawn, not the first that come
        assert (
            max(rows[labels[rows // 2] == int(fake == 1000)] // 2)
            > (real if fake == 1000 else 0) + 700
        )


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
    columns, tried = make_columns(real=images // 2, fake=images - images // 2, gap=1.5), []

    def spy(kind, features, labels, weight, folds, seed, **point):
        tried.append((tuple(point.values()), len(labels)))
        return out_of_fold(kind, features, labels, weight, folds, seed, **point)

    monkeypatch.setattr(classifiers, "out_of_fold", spy)
    n = np.arange(images)
    found = classifiers.search(
        "svm", columns["features"], columns["labels"].astype(int), np.ones(images), n, n, 0
    )
    assert [(sum(rows == most for _, rows in tried), most) for _, most in rungs] == rungs and len(
        tried
    ) == sum(n for n, _ in rungs)
    last = [point for point, rows in tried if rows == rungs[-1][1]]
    assert tuple(found.values()) in last and len(set(last)) == rungs[-1][0]


BOTH_SOLVERS = """
import numpy as np
from sklearnex.svm import SVC as fast
from sklearn.svm import SVC
from detector.training import classifiers
from made_up import make_columns
from detector.model.score import decision
assert classifiers.svc() is fast
columns, new = make_columns(real=400, fake=200, gap=1.5), make_columns(real=1000, fake=1000, gap=1.5, seed=1)["features"]
labels, found = columns["labels"].astype(int), []
for solver in (fast, SVC):
    classifiers.svc = lambda: solver
    weight = classifiers.balanced_weights(labels)
    found.append(decision(classifiers.fit("svm", columns["features"], labels, weight, 0, C=3, gamma=1), new))
print(np.abs(found[0] - found[1]).max(), np.ptp(found[1]), ((found[0] > 0) != (found[1] > 0)).sum())
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="scikit-learn-intelex: this processor has no build of it"
)
def test_scikit_learn_intelex_gives_the_verdicts_of_scikit_learns_own_svm():
    if importlib.util.find_spec("sklearnex") is None:
        pytest.skip("scikit-learn-intelex is not installed: pip install -r requirements.txt")
    # in a process of its own: it does not load where OpenVINO's threads are loaded already
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
    """CalibratedClassifierCV with the balanced weights, which reach the steps of a pipeline by metadata routing."""
    import sklearn
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

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
    theirs = calibrated_by_sklearn(
        ESTIMATORS[kind](**model["hyperparameters"]), features, labels, folds
    )
    (sigmoid,) = theirs.calibrated_classifiers_[0].calibrators
    rounding = (
        20 if kind == "logistic" else 1
    )  # scikit-learn computes that one in the features' float32, sigmoid and all
    np.testing.assert_allclose(
        model["calibrator"], [sigmoid.a_, sigmoid.b_], rtol=rounding * 1e-4, atol=rounding * 1e-5
    )

    new = make_columns(seed=1, gap=gap)["features"]
    ours = probability(model, decision(model, new))
    np.testing.assert_allclose(ours, theirs.predict_proba(new)[:, 1], atol=rounding * 1e-5)
    assert [verdict(model, p)[0] for p in ours] == [
        ("real", "fake")[i] for i in theirs.predict(new)
    ]


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
        stated, seen = (np.average(v[rows], weights=weights[rows]) for v in (p_fake, labels))
        error += abs(stated - seen) * weights[rows].sum() / weights.sum()
    assert error < 0.04


def test_a_model_trained_on_one_to_five_favours_neither_class():
    model = build(make_columns(real=60, fake=300, gap=1.5))
    labels, p_fake = held_out(make_columns(real=2000, fake=2000, gap=1.5, seed=1), model)
    found = metrics.measure(labels, p_fake, 0.5, np.arange(4000))
    assert p_fake.mean() == pytest.approx(0.5, abs=0.05)
    assert found["accuracy_real"]["value"] == pytest.approx(
        found["accuracy_fake"]["value"], abs=0.1
    )


# ---- it learns what is there, and no more ----


def held_out(columns, model):
    """-> (labels, probabilities of fake) of rows that the model has not seen."""
    return columns["labels"].astype(int), probability(model, decision(model, columns["features"]))


@pytest.mark.parametrize("kind", GRIDS)
def test_what_can_be_told_apart_is(kind):
    model = build(make_columns(real=200, fake=200, gap=6), kind)
    labels, p_fake = held_out(make_columns(gap=6, seed=1), model)
    assert roc_auc_score(labels, p_fake) > 0.99 and ((p_fake >= 0.5) == labels).mean() > 0.95


@pytest.mark.parametrize(
    "kind, better", [("svm", True), ("mlp", True), ("linear-svm", False), ("logistic", False)]
)
def test_a_bent_border_is_learnt_by_the_kinds_that_can_bend(kind, better):
    columns, new = (
        make_columns(real=200, fake=200, gap=0),
        make_columns(real=200, fake=200, gap=0, seed=1),
    )
    for c in (columns, new):
        c["labels"] = (c["features"][:, 0] * c["features"][:, 1] > 0).astype(np.int8)
    labels, p_fake = held_out(new, build(columns, kind))
    assert (
        roc_auc_score(labels, p_fake) > 0.8
        if better
        else abs(roc_auc_score(labels, p_fake) - 0.5) < 0.15
    )


@pytest.mark.parametrize("seed", range(4))
def test_on_noise_the_interval_of_the_auc_holds_one_half(seed):
    model = build(make_columns(gap=0, seed=seed))
    labels, p_fake = held_out(make_columns(real=150, fake=150, gap=0, seed=100 + seed), model)
    low, high = metrics.auc(labels, p_fake, np.arange(300))["interval"]
    assert low < 0.5 < high


def test_on_noise_the_out_of_fold_scores_are_chance():
    # C and gamma fixed: the best of twenty points would be a little above chance by the choice alone
    values = []
    for seed in range(20):
        columns = make_columns(gap=0, seed=seed)
        features, labels = columns["features"], columns["labels"].astype(int)
        folds = fold_rows(labels, np.arange(120), 0)
        values.append(
            roc_auc_score(
                labels, out_of_fold("svm", features, labels, np.ones(120), folds, 0, C=3, gamma=0.3)
            )
        )
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - 0.5) < 2.5 * error < 0.08


def grouped(seed):
    """80 places with five pictures each, nearly alike, and a label for each place that nothing in the pictures bears out."""
    rng, place = np.random.default_rng(seed), np.repeat(np.arange(80), 5)
    columns = make_columns(real=200, fake=200, splits=False)
    columns["features"] = (
        rng.normal(size=(80, 6))[place] + 0.05 * rng.normal(size=(400, 6))
    ).astype(np.float32)
    columns["labels"] = rng.permutation(np.repeat(np.int8([0, 1]), 40))[place]
    columns["sources"] = np.array([f"place {i}" for i in place])
    return columns


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_permuted_by_group_are_chance_for_who_cannot_remember_the_group(seed):
    columns = grouped(seed)
    rows, test, groups, _, how = choose_rows(columns, training_arguments(), 0)
    assert "our own split by sources" in how
    model = recipe.build("svm", Rows(columns, rows, groups, groups), 0)
    scores = model["out_of_fold"]
    assert (
        abs(roc_auc_score(scores["labels"], scores["scores"]) - 0.5) < 0.15
    )  # 1.0 where groups lie on both sides of a fold
    labels, p_fake = held_out({name: column[test] for name, column in columns.items()}, model)
    low, high = metrics.auc(labels, p_fake, groups[test])["interval"]
    slack = (
        high - low
    ) / 2  # a 95% interval misses one time in twenty; twice as wide, next to never
    assert low - slack < 0.5 < high + slack


def test_the_search_draws_from_every_group_however_small():
    sizes = [2000, 6, 6, 6, 6]
    groups, labels = (
        np.concatenate([np.repeat(np.arange(5) + 5 * label, sizes) for label in (0, 1)]),
        np.repeat([0, 1], sum(sizes)),
    )
    rows = search_rows(labels, groups, np.arange(len(labels)), 0, 100)
    assert np.bincount(groups[rows]).tolist() == 2 * [26, 6, 6, 6, 6]


@pytest.mark.parametrize("gigabytes, cache_mb", [(64, 4000), (8, 2000), (2, 500)])
def test_a_kernel_s_cache_takes_a_quarter_of_a_small_machine_s_memory(
    monkeypatch, gigabytes, cache_mb
):
    monkeypatch.setattr(
        "os.sysconf", {"SC_PHYS_PAGES": gigabytes * 1_000_000, "SC_PAGE_SIZE": 1000}.get
    )
    assert classifiers.kernel_cache_mb() == cache_mb
    assert classifiers.estimator("svm", 8, 0).cache_size == cache_mb


def test_scores_worse_than_chance_do_not_turn_the_verdicts_round():
    """As out of fold on a few groups: the order of the probabilities stays that of the scores, and none is sure."""
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
    train_model.main(["--features_file", sys.argv[1], "--classifier", kind, "--model_output_path", f"{sys.argv[2]}-{kind}.joblib"])
"""


@pytest.mark.long
def test_the_model_is_the_same_to_the_byte_for_any_number_of_threads(tmp_path):
    features = write_features(tmp_path / "f.npz", real=150, fake=150, dim=512)
    for number in "123":
        limits = {f"{library}_NUM_THREADS": number for library in ("OMP", "OPENBLAS", "MKL")}
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
        assert (
            len({(tmp_path / f"{number}-{kind}.joblib").read_bytes() for number in "123"}) == 1
        ), kind
