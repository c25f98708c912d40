"""The golden set: the shipped model on the shipped features, and the shipped encoder on installed photographs.

With IMAGES_DIR naming the folder of development images, also the whole way from pictures to metrics.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from make_golden import GOLDEN, features_of

from detector.evaluation.metrics import measure
from detector.features.file import load_features
from detector.images import samples
from detector.images.decoding import decode_image
from detector.model.file import load_model
from detector.model.score import decision, probability
from detector.verdict import SHIPPED_MODEL, Detector

pytestmark = pytest.mark.golden
# AUC and the lower end of its interval below which nothing ships.
# The intervals here are over images, as the floor was set; the card's are over sources, which are wider.
RECORDED = ROOT / "models" / "evaluation" / "metrics.json"
FLOOR = {"test": (0.96, 0.94), "external": (0.89, 0.85)}


@pytest.fixture(scope="module")
def columns():
    return load_features(ROOT / "models" / "features.npz")


@pytest.fixture(scope="module")
def baseline():
    return load_model(ROOT / "models" / "baseline.joblib")


def metrics_of(model, columns, split):
    rows = (columns["splits"] == split) & (columns["view"] == 0)
    p_fake = probability(model, decision(model, columns["features"][rows]))
    return measure(
        columns["labels"][rows].astype(int), p_fake, model["threshold"], np.arange(rows.sum())
    )


@pytest.mark.parametrize("split", FLOOR)
def test_the_shipped_model_clears_its_floor(baseline, columns, split):
    auc = metrics_of(baseline, columns, split)["auc"]
    assert auc["value"] >= FLOOR[split][0] and auc["interval"][0] > FLOOR[split][1], auc


@pytest.fixture
def recipe(script, tmp_path):
    """Function: features file -> train_model.py as it ships and evaluate.py against the recorded metrics, as processes."""

    def run(features):
        trained = script(
            "train_model.py",
            "--features_file",
            features,
            "--train_splits",
            "train,extra",
            "--classifier",
            "logistic",
        )
        assert trained.returncode == 0, trained.stderr
        return script(
            "evaluate.py",
            "--model_path",
            "model.joblib",
            "--features_file",
            ROOT / "models" / "features.npz",
            "--baseline",
            RECORDED,
        )

    return run


@pytest.mark.long
def test_the_shipped_recipe_leaves_no_recorded_interval(recipe, baseline, columns, tmp_path):
    """Train on the shipped features, evaluate: a metric that left its interval fails this, with the table in the message."""
    result = recipe(ROOT / "models" / "features.npz")
    assert result.returncode == 0 and "every metric lies in the interval" in result.stdout, (
        result.stdout + result.stderr
    )
    again = load_model(tmp_path / "model.joblib")
    p_shipped, p_again = (
        probability(m, decision(m, columns["features"])) for m in (baseline, again)
    )
    assert np.abs(p_shipped - p_again).max() < 0.01
    assert {**again["training_data"], "images": None} == {
        **baseline["training_data"],
        "images": None,
    }


@pytest.mark.long
def test_a_recipe_that_got_worse_is_caught_and_named(recipe, tmp_path):
    with np.load(ROOT / "models" / "features.npz") as file:
        broken = dict(file)
    broken["features"] = np.random.default_rng(0).permutation(
        broken["features"]
    )  # as if rows and files were mixed up
    np.savez(tmp_path / "broken.npz", **broken)
    result = recipe(tmp_path / "broken.npz")
    assert (
        result.returncode == 1
        and "worse than the baseline: " in result.stderr
        and "AUC" in result.stderr
    ), result.stdout


@pytest.mark.long
def test_the_shipped_evaluation_is_what_the_shipped_model_gives(script, tmp_path):
    result = script("evaluate.py", "--features_file", ROOT / "models" / "features.npz")
    assert result.returncode == 0, result.stderr
    now, recorded = (
        json.loads(path.read_text())
        for path in (tmp_path / "evaluation" / "metrics.json", RECORDED)
    )
    assert now["scores"]["p_fake"] == pytest.approx(recorded["scores"]["p_fake"], abs=1e-5)
    for part in ("known", "unseen"):
        assert now[part]["confusion"] == recorded[part]["confusion"]
        assert now[part]["auc"]["value"] == pytest.approx(recorded[part]["auc"]["value"], abs=1e-6)


def test_the_model_was_trained_on_train_and_extra_and_no_source_of_external_is_among_them(
    baseline, columns
):
    trained = np.isin(columns["splits"], ["train", "extra"])
    numbers = {int(digest[:16], 16) - 2**63 for digest in columns["sha256"][trained]}
    assert set(baseline["training_data"]["images"].tolist()) == numbers
    assert not numbers & {int(digest[:16], 16) - 2**63 for digest in columns["sha256"][~trained]}
    assert not set(baseline["training_data"]["sources"]) & set(
        columns["sources"][columns["splits"] == "external"]
    )


def test_the_encoder_sees_in_installed_photographs_what_was_stored(openai):
    golden, photos = np.load(GOLDEN), samples.installed_photos()
    assert [p.name for p in photos] == list(golden["names"])
    now, then = features_of(photos), golden["features"]
    now, then = now - then.mean(0), then - then.mean(0)
    cosine = (now * then).sum(1) / np.linalg.norm(now, axis=1) / np.linalg.norm(then, axis=1)
    assert cosine.min() >= 0.99999, dict(zip(golden["names"], cosine.round(6)))


def test_at_most_two_of_the_installed_photographs_are_called_fake(baseline):
    """On their stored features, which the test above holds equal to the encoder's."""
    golden = np.load(GOLDEN)
    fake = probability(baseline, decision(baseline, golden["features"])) >= baseline["threshold"]
    assert len(fake) == 14 and fake.sum() <= 2, golden["names"][fake]


if os.environ.get("IMAGES_DIR"):

    @pytest.mark.long
    def test_from_pictures_to_the_shipped_features(columns, openai):
        """A draw of them: all take an hour."""
        detector = Detector(SHIPPED_MODEL)
        rows = np.random.default_rng(0).permutation(len(columns["paths"]))[:60]
        pixels = [
            detector.pixels(
                decode_image(Path(os.environ["IMAGES_DIR"], columns["paths"][i]).read_bytes())
            )
            for i in rows
        ]
        fresh, stored = detector.encoder.encode(np.stack(pixels)), columns["features"][rows]
        fresh, stored = fresh - stored.mean(0), stored - stored.mean(0)
        cosine = (
            (fresh * stored).sum(1) / np.linalg.norm(fresh, axis=1) / np.linalg.norm(stored, axis=1)
        )
        assert cosine.min() > 0.9999
