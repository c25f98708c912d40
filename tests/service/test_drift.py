"""Drift: near 0 for images like the training images, in any mix, and above 0 for other images."""

import numpy as np
import pytest
from engines import counted, detector_of, give, serve
from made_up import SHIPPED

from detector.model.file import load_model
from detector.model.score import decision
from detector.service.telemetry import BINS, WINDOW, Drift, Telemetry

MODEL = load_model(SHIPPED)
DIM = len(MODEL["center"])
WHOLE = MODEL["out_of_fold"]["view"] == 0
SCORES = MODEL["out_of_fold"]["scores"][WHOLE].astype(float)


@pytest.fixture(scope="module")
def rows():
    """Features of the shipped model's training images, {label: float32 [n, d]}."""
    stored = np.load(SHIPPED.parent / "features.npz")
    mask = np.isin(stored["splits"], ["train", "extra"]) & (stored["view"] == 0)
    return {label: stored["features"][mask & (stored["labels"] == label)] for label in (0, 1)}


def drawn(rows, share_fake, count, seed):
    """Random rows with that share of fake rows."""
    rng = np.random.default_rng(seed)
    fake = rng.permutation(count) < round(share_fake * count)
    return np.stack([rng.choice(rows[int(label)]) for label in fake])


def distance(features, model=MODEL):
    drift = Drift(model)
    for row in features:
        drift.add(row)
    return drift.distance()


# ---- scores ----


def test_the_reference_shares_are_tenths_and_sum_to_1():
    reference = Drift(MODEL).reference
    assert len(reference) == BINS == 10 and reference.sum() == pytest.approx(1)
    assert np.abs(reference - 0.1).max() < 0.005


def test_the_models_own_scores_give_the_reference():
    drift = Drift(MODEL)
    bins = [drift.bin(score) for score in SCORES]
    assert np.bincount(bins, minlength=BINS) / len(bins) == pytest.approx(drift.reference, abs=0)
    assert [bins[i] for i in (SCORES.argmin(), SCORES.argmax())] == [0, 9]
    assert [drift.bin(score) for score in (-1e9, 1e9)] == [0, 9]
    assert list(np.array(bins)[np.argsort(SCORES)]) == sorted(bins)


def test_tied_scores_are_counted_as_in_the_reference():
    scores = np.array([0.0] * 90 + [1.0] * 10)
    drift = Drift({**MODEL, "out_of_fold": {"scores": scores, "view": np.zeros(100, np.int8)}})
    bins = [drift.bin(score) for score in scores]
    assert drift.reference.sum() == pytest.approx(1)
    assert np.bincount(bins, minlength=BINS) / 100 == pytest.approx(drift.reference, abs=0)


def test_degraded_copies_are_left_out_of_the_reference():
    scores, view = np.concatenate([SCORES, SCORES + 100]), np.repeat(np.int8([0, 1]), len(SCORES))
    drift = Drift({**MODEL, "out_of_fold": {"scores": scores, "view": view}})
    assert drift.edges == pytest.approx(Drift(MODEL).edges)
    assert drift.reference == pytest.approx(Drift(MODEL).reference)


def psi(telemetry, version="v1"):
    """Population stability index from the metrics."""
    live, expected = (
        np.array([counted(telemetry, name, model_version=version, bin=i) for i in range(BINS)])
        for name in ("scores_total", "reference_share")
    )
    live = np.maximum(live / live.sum(), 1e-4)
    return float(((live - expected) * np.log(live / expected)).sum())


@pytest.mark.parametrize(
    "shift, low, high",
    [(0.0, 0, 0.05), (1.0, 0.25, 99), (-1.0, 0.25, 99)],
    ids=["none", "to fake", "to real"],
)
def test_the_stability_index_is_small_until_scores_shift(shift, low, high):
    telemetry = Telemetry()
    detector = serve(telemetry, detector_of("v1", SHIPPED))
    for score in np.random.default_rng(0).choice(SCORES, 1000):
        give(telemetry, detector, score + shift * SCORES.std())
    assert low <= psi(telemetry) < high


def test_images_of_known_sources_stay_below_the_alerts():
    """The index is above 0, because the reference is out of fold, with held-out sources."""
    stored, telemetry = np.load(SHIPPED.parent / "features.npz"), Telemetry()
    detector = serve(telemetry, detector_of("v1", SHIPPED))
    test = stored["features"][(stored["splits"] == "test") & (stored["view"] == 0)]
    for score, row in zip(decision(MODEL, test), test, strict=True):
        give(telemetry, detector, score, row=row)
    assert psi(telemetry) < 0.25
    assert counted(telemetry, "feature_distance", model_version="v1") < 0.27


# ---- features ----


@pytest.mark.parametrize("share_fake", [0.1, 0.5, 0.9, 0.0, 1.0])
def test_rows_like_the_training_classes_have_no_distance_in_any_mix(rows, share_fake):
    assert max(distance(drawn(rows, share_fake, 2 * WINDOW, seed)) for seed in range(5)) < 0.1


@pytest.mark.parametrize("share_fake", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("signs", ["all up", "some up, some down"])
def test_rows_shifted_by_a_deviation_have_a_distance_of_about_1(rows, share_fake, signs):
    sign = np.ones(DIM) if signs == "all up" else np.random.default_rng(1).choice([-1, 1], DIM)
    moved = drawn(rows, share_fake, 2 * WINDOW, 0) + (sign * MODEL["scale"]).astype("f4")
    assert distance(moved) == pytest.approx(1, abs=0.15)


def test_rows_beyond_the_mean_of_a_class_have_a_distance_too(rows):
    between = MODEL["means"][1] - MODEL["means"][0]  # in training deviations
    size = float(np.sqrt((between**2).mean()))
    for label, side in ((0, -1), (1, 1)):
        moved = drawn(rows, label, 2 * WINDOW, 0) + (side * 2 * between * MODEL["scale"]).astype(
            "f4"
        )
        assert distance(moved) == pytest.approx(2 * size, rel=0.1)


def test_the_distance_follows_new_images_and_forgets_old_ones(rows):
    shift = MODEL["scale"].astype("f4")
    drift = Drift(MODEL)
    for row in drawn(rows, 0.5, 3 * WINDOW, 0):
        drift.add(row)
    distances = [drift.distance()]
    for number, row in enumerate(drawn(rows, 0.5, 6 * WINDOW, 1)):
        drift.add(row + shift * (number < 3 * WINDOW))
        if number + 1 in (173, 3 * WINDOW, 6 * WINDOW):
            distances.append(drift.distance())
    before, half, most, after = distances
    assert before < 0.1 and after < 0.15
    assert half == pytest.approx(0.5, abs=0.1)  # half of the weight lies on the last 173 images
    assert most == pytest.approx(0.95, abs=0.1)


def white(count, seed, d=64):
    """Model and rows: two classes differ by two deviations in one feature, the rest is noise."""
    rng = np.random.default_rng(seed)
    means = np.zeros((2, d))
    means[:, 0] = -1, 1
    model = {**MODEL, "center": np.zeros(d), "scale": np.ones(d), "means": means}
    return model, rng.normal(size=(count, d)).astype("f4")


@pytest.mark.parametrize("count", [1, 2, 5, 20, 100, 1000])
def test_the_distance_of_few_images_by_chance_is_subtracted(count):
    distances = [distance(*reversed(white(count, seed))) for seed in range(20)]
    chance = 1 / np.sqrt(min(count, 2 * WINDOW))
    assert np.square(distances).mean() < 0.25 * chance**2  # chance squared without subtraction


def test_the_subtracted_noise_is_the_variance_of_the_weighted_mean():
    model, _ = white(0, 0)
    for count in (1, 10, 100, 1000):
        drift, weights = Drift(model), np.ones(0)
        for seen in range(1, count + 1):
            weight = max(1 / seen, 1 / WINDOW)
            weights = np.append(weights * (1 - weight), weight)
            drift.add(np.zeros(64, "f4"))
        assert weights.sum() == pytest.approx(1)
        assert drift.noise == pytest.approx((weights**2).sum())


def test_the_distance_is_0_before_the_first_image_and_reading_changes_nothing(rows):
    drift = Drift(MODEL)
    assert drift.distance() == 0.0
    drift.add(rows[0][0] + 1)
    assert drift.distance() == drift.distance() > 0 and drift.seen == 1


def test_classes_with_equal_means_cause_no_division_by_zero():
    model, rows = white(600, 0)
    model["means"] = np.zeros_like(model["means"])
    assert distance(rows, model) < 0.1 and distance(rows + 1, model) == pytest.approx(1, abs=0.1)
