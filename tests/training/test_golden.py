"""The golden set: the shipped model on its features, the shipped encoder on photographs.

With IMAGES_DIR, the folder of development images, also from pictures to features.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from make_golden import GOLDEN, features_of

from detector.encoders.runtime import has_bfloat16
from detector.evaluation.intervals import words
from detector.evaluation.metrics import measure
from detector.features.file import load_features
from detector.images import samples
from detector.images.decoding import decode_image
from detector.images.distort import degrade, manageable, view_rng
from detector.model.file import load_model
from detector.model.score import p_fake_of
from detector.model.threshold import outside
from detector.verdict import SHIPPED_MODEL

pytestmark = pytest.mark.golden
FEATURES = ROOT / "models" / "features.npz"
RECORDED = ROOT / "models" / "evaluation" / "metrics.json"
# Least AUC, and least lower end of its interval, of a model that ships. These intervals are over
# images. The intervals of the model card are over sources and wider.
FLOOR = {"test": (0.96, 0.94), "external": (0.89, 0.85)}


@pytest.fixture(scope="module")
def columns():
    return load_features(FEATURES)


@pytest.fixture(scope="module")
def baseline():
    return load_model(SHIPPED_MODEL)


def metrics_of(model, columns, split):
    rows = (columns["splits"] == split) & (columns["view"] == 0)
    p_fake, labels = p_fake_of(model, columns["features"][rows]), columns["labels"][rows]
    return measure(labels.astype(int), p_fake, model["threshold"], np.arange(len(labels)))


def centred_cosines(a, b):
    """Cosine of each row of a and b, float [n, d], after the means of b are taken away."""
    a, b = a - b.mean(0), b - b.mean(0)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("split", FLOOR)
def test_the_shipped_model_is_above_its_floor(baseline, columns, split):
    auc = metrics_of(baseline, columns, split)["auc"]
    assert auc["value"] >= FLOOR[split][0] and auc["interval"][0] > FLOOR[split][1], auc


@pytest.fixture
def recipe(script, tmp_path):
    """Function: features file -> the shipped training and its evaluation against RECORDED."""

    def run(features):
        flags = ["--train_splits", "train,extra", "--classifier", "logistic"]
        trained = script("train_model.py", "--features_file", features, *flags)
        assert trained.returncode == 0, trained.stderr
        flags = ["--model_path", "model.joblib", "--baseline", RECORDED]
        return script("evaluate.py", "--features_file", FEATURES, *flags)

    return run


@pytest.mark.long
def test_the_shipped_recipe_stays_in_every_recorded_interval(recipe, baseline, columns, tmp_path):
    result = recipe(FEATURES)
    output = result.stdout + result.stderr
    assert result.returncode == 0 and "every metric lies in the interval" in output, output
    again = load_model(tmp_path / "model.joblib")
    p_shipped, p_again = (p_fake_of(model, columns["features"]) for model in (baseline, again))
    assert np.abs(p_shipped - p_again).max() < 0.01
    for name in ("sha256", "real", "fake", "views", "sources"):
        assert again["training_data"][name] == baseline["training_data"][name]


@pytest.mark.long
def test_a_worse_recipe_is_reported(recipe, tmp_path):
    with np.load(FEATURES) as file:
        broken = dict(file)
    # as if rows and files were mixed up
    broken["features"] = np.random.default_rng(0).permutation(broken["features"])
    np.savez(tmp_path / "broken.npz", **broken)
    result = recipe(tmp_path / "broken.npz")
    assert result.returncode == 1, result.stdout
    assert "worse than the baseline: " in result.stderr and "AUC" in result.stderr


@pytest.mark.long
def test_the_shipped_evaluation_is_that_of_the_shipped_model(script, tmp_path):
    result = script("evaluate.py", "--features_file", FEATURES)
    assert result.returncode == 0, result.stderr
    paths = tmp_path / "evaluation" / "metrics.json", RECORDED
    now, recorded = (json.loads(path.read_text()) for path in paths)
    assert now["scores"]["p_fake"] == pytest.approx(recorded["scores"]["p_fake"], abs=1e-5)
    for part in ("known", "unseen"):
        assert now[part]["confusion"] == recorded[part]["confusion"]
        assert now[part]["auc"]["value"] == pytest.approx(recorded[part]["auc"]["value"], abs=1e-6)


@pytest.mark.long
def test_the_tables_of_threshold_md_are_those_of_the_shipped_model(script, tmp_path):
    limits = "--suggest_review", "--max_false_reject", 0.005, "--max_missed", 0.2
    result = script("evaluate.py", "--features_file", FEATURES, "--prevalence", 0.01, *limits)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    expected = set()
    for row in report["operating"]:
        if row["images"] == "sources never seen" and row["rule"] not in ("FPR 0.02", "FPR 0.1"):
            shares = words(row["false_positives"], 3), words(row["caught"], 3)
            a_day = f"{row['alarms']['value']:.0f}, {row['false_alarms']['value']:.0f}"
            cells = f"{row['rule']}: from {row['threshold']:.3f}", *shares, words(row["precision"])
            expected.add(f"| {' | '.join([*cells, a_day])} |")
    review = report["review"]
    for row in review["rows"]:
        shares = words(row["passed_fakes"], 3), words(row["rejected_reals"], 3)
        expected.add(f"| {' | '.join([row['images'], words(row['queue'], 0), *shares])} |")
    documented = re.sub(r", \d+ reals and \d+ fakes", "", (ROOT / "docs/threshold.md").read_text())
    assert len(expected) == 6 and expected <= set(documented.splitlines()), expected
    assert f"it proposes {review['low']:.4f} and {review['high']:.4f}:" in documented


def test_the_model_was_trained_on_train_and_extra_without_sources_of_external(baseline, columns):
    trained, data = np.isin(columns["splits"], ["train", "extra"]), baseline["training_data"]
    numbers = np.array([int(digest[:16], 16) - 2**63 for digest in columns["sha256"]])
    assert set(data["images"].tolist()) == set(numbers[trained].tolist())
    assert not np.isin(numbers[~trained], data["images"]).any()
    assert not np.isin(columns["sources"][columns["splits"] == "external"], data["sources"]).any()


def test_the_encoder_gives_the_stored_features_of_installed_photographs(openai):
    golden, photos = np.load(GOLDEN), samples.installed_photos()
    names = [path.name for path in photos]
    assert names == list(golden["names"])
    images = [decode_image(path.read_bytes()) for path in photos]
    cosines = centred_cosines(features_of(images), golden["features"])
    assert cosines.min() >= 0.99999, dict(zip(names, cosines.round(6), strict=True))


def test_at_most_two_of_the_installed_photographs_are_called_fake(baseline):
    """Uses stored features. The test above holds them equal to the encoder's."""
    golden = np.load(GOLDEN)
    fake = p_fake_of(baseline, golden["features"]) >= baseline["threshold"]
    assert len(fake) == 14 and fake.sum() <= 2, golden["names"][fake]


if os.environ.get("IMAGES_DIR"):

    def image_of(columns, row):
        """The picture whose features are this row: an image of the folder or its degraded copy."""
        path = Path(os.environ["IMAGES_DIR"], columns["paths"][row])
        image, view = decode_image(path.read_bytes()), columns["view"][row]
        rng = view_rng(columns["sha256"][row], view)
        return degrade(manageable(image), rng) if view else image

    @pytest.mark.long
    @pytest.mark.parametrize("view", [0, 1])
    def test_from_pictures_to_the_shipped_features(columns, openai, view):
        """30 random images or copies, because all of them take an hour."""
        rows = np.random.default_rng(0).permutation(np.flatnonzero(columns["view"] == view))[:30]
        images = [image_of(columns, row) for row in rows]
        cosines = centred_cosines(features_of(images), columns["features"][rows])
        assert cosines.min() > 0.9999

    @pytest.mark.long
    def test_in_bfloat16_only_uncertain_verdicts_differ(baseline, columns, openai):
        """The 80 images whose scores are nearest to the threshold."""
        if not has_bfloat16():
            pytest.skip("this processor has no bfloat16")
        measured = np.flatnonzero(np.isin(columns["splits"], ["test", "external"]))
        p_fake = p_fake_of(baseline, columns["features"][measured])
        rows = measured[np.argsort(np.abs(p_fake - baseline["threshold"]))[:80]]
        images = [image_of(columns, row) for row in rows]
        low, exact = (
            p_fake_of(baseline, features_of(images, precision))
            for precision in ("bfloat16", "float32")
        )
        differ = (low >= baseline["threshold"]) != (exact >= baseline["threshold"])
        assert not outside(exact, baseline["band"])[differ].any()
        assert 0 < np.abs(low - exact).max() < 0.15
