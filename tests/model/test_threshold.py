"""The threshold and the 'uncertain' band: their guarantees, and models where they were edited."""

import numpy as np
import pytest
from made_up import build, make_columns
from scipy.stats import beta

from detector.model.file import load_model, save_model
from detector.model.threshold import (
    choose_band,
    choose_threshold,
    outside,
    stale_threshold,
    verdict,
)
from detector.training.recipe import BAND_ERROR, set_threshold


def overlapping(real, fake, seed, digits=17):
    """Labels and probabilities of two classes that overlap. Few digits give ties."""
    rng = np.random.default_rng(seed)
    p_fake = np.concatenate([rng.beta(2, 4, real), rng.beta(4, 2, fake)]).round(digits)
    order = rng.permutation(real + fake)
    return np.repeat([0, 1], [real, fake])[order], p_fake[order]


# ---- the threshold ----


def test_without_a_rate_the_threshold_is_one_half():
    labels, p_fake = overlapping(50, 50, 0)
    assert choose_threshold(p_fake, labels) == 0.5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "digits", [17, 2, 1, 0], ids=["no ties", "few ties", "many ties", "zeros and ones"]
)
@pytest.mark.parametrize("max_fpr", [1e-6, 0.005, 0.01, 0.05, 1 / 3, 0.5, 0.9, 0.995, 0.999])
def test_the_threshold_is_the_lowest_that_keeps_the_rate(max_fpr, digits, seed):
    labels, p_fake = overlapping(200, 30, seed, digits)
    real = p_fake[labels == 0]
    threshold = choose_threshold(p_fake, labels, max_fpr)
    assert (real >= threshold).mean() <= max_fpr
    below = real[real < threshold].max()
    assert (real >= below).mean() > max_fpr
    above = real[real >= threshold].min(initial=1)
    assert threshold == pytest.approx((below + above) / 2, abs=1e-12)


@pytest.mark.parametrize("allowed", range(1, 100))
def test_a_rate_that_the_reals_can_reach_is_reached_exactly(allowed):
    labels, p_fake = overlapping(100, 10, allowed)
    threshold = choose_threshold(p_fake, labels, allowed / 100)
    assert (p_fake[labels == 0] >= threshold).sum() == allowed


@pytest.mark.parametrize(
    "real",
    [[1.0, 1.0, 0.2], [0.5, np.nextafter(0.5, 1), 0.1], [1 - 2**-53, 1.0, 0.3], [0.0, 0.0, 0.0]],
    ids=["all at 1", "adjacent numbers", "adjacent to 1", "all alike"],
)
@pytest.mark.parametrize("max_fpr", [0.01, 0.34])
def test_the_rate_holds_without_a_number_halfway(real, max_fpr):
    p_fake, labels = np.array([*real, 0.9]), np.array([0, 0, 0, 1])
    assert (np.array(real) >= choose_threshold(p_fake, labels, max_fpr)).mean() <= max_fpr


def test_fakes_do_not_influence_the_threshold_for_a_rate():
    labels, p_fake = overlapping(100, 100, 0)
    of_reals = choose_threshold(p_fake[labels == 0], labels[labels == 0], 0.1)
    assert choose_threshold(p_fake, labels, 0.1) == of_reals


# ---- the band ----


@pytest.mark.parametrize(
    "real, fake, error", [(49, 99, 0.1), (99, 49, 0.1), (30, 200, 0.12), (60, 20, 0.05)]
)
def test_the_band_keeps_its_error_on_new_images_of_the_same_kind(real, fake, error):
    draws = [overlapping(real, fake, seed) for seed in range(1500)]
    bands = np.array([choose_band(p_fake, labels, 0.5, error) for labels, p_fake in draws])
    for n, held in ((real, beta.cdf(bands[:, 1], 2, 4)), (fake, beta.sf(bands[:, 0], 4, 2))):
        # this share of exchangeable images, for any distribution of the classes
        share = np.ceil((n + 1) * (1 - error)) / (n + 1)
        tolerance = 4 * held.std() / np.sqrt(len(held)) + 1e-9
        assert held.mean() == pytest.approx(share, abs=tolerance) and share >= 1 - error


def test_with_too_few_images_for_the_error_every_verdict_is_uncertain():
    labels, p_fake = overlapping(8, 8, 0)
    assert choose_band(p_fake, labels, 0.5, 0.1).tolist() == [0, 1]
    assert 0 < choose_band(*overlapping(9, 9, 0)[::-1], 0.5, 0.1)[0]


@pytest.mark.parametrize("apart", [False, True], ids=["overlapping", "apart"])
@pytest.mark.parametrize("threshold", [0.001, 0.3, 0.5, 0.7, 0.999])
def test_a_verdict_outside_the_band_never_contradicts_the_threshold(threshold, apart):
    labels, p_fake = overlapping(100, 100, 1)
    if apart:
        p_fake = 0.5 + (labels - 0.5) * (0.2 + 0.8 * p_fake)
    band = choose_band(p_fake, labels, threshold, BAND_ERROR)
    assert band[0] <= threshold <= band[1] and (band.dtype, band.shape) == (np.float64, (2,))
    assert not outside(threshold, band)
    edges = [band, np.nextafter(band, 2), np.nextafter(band, -1)]
    for p in np.concatenate([np.linspace(0, 1, 1001), *edges]):
        if outside(p, band):
            assert verdict({"threshold": threshold}, p)[0] == ("fake" if p > band[1] else "real")


# ---- edited by hand ----


@pytest.fixture(scope="module")
def model():
    return build(make_columns(gap=1.5))


RATES = pytest.mark.parametrize("max_fpr", [None, 0.05], ids=["one half", "a rate"])


@RATES
def test_a_fresh_model_is_not_stale_before_and_after_saving(model, tmp_path, max_fpr):
    fresh = set_threshold(model, max_fpr)
    save_model(tmp_path / "m.joblib", fresh)
    assert stale_threshold(fresh) is None
    assert stale_threshold(load_model(tmp_path / "m.joblib")) is None


@RATES
@pytest.mark.parametrize(
    "change, named",
    [
        (lambda m: {"threshold": m["threshold"] + 1e-4}, "threshold"),
        (lambda m: {"threshold": m["threshold"] - 1e-4}, "threshold"),
        (lambda m: {"threshold_rule": {**m["threshold_rule"], "max_fpr": 0.2}}, "threshold"),
        (lambda m: {"calibrator": m["calibrator"] * 1.5}, ""),
        (lambda m: {"band": m["band"] + [-1e-4, 0]}, "band"),
        (lambda m: {"band": m["band"] + [0, 1e-4]}, "band"),
        (lambda m: {"threshold_rule": {**m["threshold_rule"], "band_error": 0.3}}, "band"),
        (
            lambda m: {"out_of_fold": {**m["out_of_fold"], "scores": -m["out_of_fold"]["scores"]}},
            "",
        ),
    ],
    ids=[
        "threshold up",
        "threshold down",
        "another rate",
        "another sigmoid",
        "band lower",
        "band higher",
        "another error",
        "other scores",
    ],
)
def test_an_edit_of_the_threshold_or_the_band_is_reported(model, max_fpr, change, named):
    fresh = set_threshold(model, max_fpr)
    message = stale_threshold({**fresh, **change(fresh)})
    assert f"its {named}" in message and "its own scores and rule give" in message
    assert len(message.splitlines()) == 1
