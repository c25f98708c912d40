"""evaluate.py: images left out, measures on images, warnings, comparison with a baseline."""

import csv
import json
import re
import shutil
from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest
import small
from commands import ROOT, assert_one_line_error
from made_up import BASELINE, DIM, ENCODER, build, make_columns, with_views, write_features
from PIL import Image

import evaluate
from detector.base import errors
from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.base.files import only_writer, sha256
from detector.evaluation import assess, audit, baseline, pictures
from detector.images.distort import ARMS, CONDITIONS
from detector.model.file import load_model, save_model
from detector.model.score import probability
from detector.model.threshold import choose_band
from detector.training.recipe import BAND_ERROR

COUNTS = {f"train/{label}/{source}": 12 for label in ("real", "fake") for source in ("a", "b")} | {
    f"test/{label}/{source}": 5 for label in ("real", "fake") for source in ("a", "b", "new")
}


@pytest.fixture(scope="module")
def folder(make_folder, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"), COUNTS)


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
    """A model of the folder's train split, evaluated on its images -> (place of it all, report)."""
    import extract_features
    import train_model

    place = tmp_path_factory.mktemp("evaluated")
    features, model, out = (str(place / name) for name in ("f.npz", "m.joblib", "out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_MODEL", str(small.CHECKPOINT))
        extract_features.main(["--data_dir", str(folder), "--output_file", features])
        train_model.main(["--features_file", features, "--model_output_path", model])
        flags = ["--model_path", model, "--data_dir", str(folder), "--report_dir", out]
        assert evaluate.main(flags) == 0
    return place, json.loads((place / "out" / "metrics.json").read_text())


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Function: flags of evaluate.py, in this process -> (exit code, metrics.json, stdout, stderr).

    The report goes to tmp_path / 'out'. It has no probes, which take most of the time.
    """
    monkeypatch.setattr(audit, "probe_all", lambda *_: [])
    monkeypatch.setattr(assess, "cross_validated_leak", lambda *_: None)

    def call(**flags):
        words = []
        for name, value in flags.items():
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            words += [f"--{name}", *map(str, values)]
        code = evaluate.main([*words, "--report_dir", str(tmp_path / "out")])
        report = json.loads((tmp_path / "out" / "metrics.json").read_text())
        return code, report, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A model of made-up features, evaluated on other images of the same kind.

    -> (model, its flags, its bytes before the evaluation, metrics.json, stdout)
    """
    place, model = tmp_path_factory.mktemp("fresh"), build(make_columns(seed=1))
    save_model(place / "m.joblib", model)
    saved = (place / "m.joblib").read_bytes()
    features = write_features(place / "f.npz", make_columns(seed=2, splits=False))
    flags = {"model_path": place / "m.joblib", "features_file": features}
    text, *_ = assess.evaluate(**flags, report_dir=place / "out")
    return model, flags, saved, json.loads((place / "out" / "metrics.json").read_text()), text


@pytest.fixture
def flags(fresh):
    return fresh[1]


@pytest.fixture
def before(fresh, tmp_path):
    """metrics.json of the evaluation of `fresh`, to compare with."""
    (tmp_path / "before.json").write_text(json.dumps(fresh[3]))
    return tmp_path / "before.json"


def test_a_second_evaluation_into_one_folder_is_refused_before_its_work(
    flags, tmp_path, run, monkeypatch
):
    monkeypatch.setattr(assess, "evaluate", lambda **_: pytest.fail("it worked all the same"))
    lock = only_writer(tmp_path / "out" / "metrics.json", "")
    with lock, pytest.raises(errors.UsageError, match="is writing it"):
        run(**flags)


def test_images_that_trained_the_model_are_left_out_also_under_another_name(
    evaluated, folder, run, tmp_path
):
    place, report = evaluated
    counts = [report[part]["n"] for part in ("overall", "known", "unseen")]
    assert counts == [30, 20, 10]
    more = shutil.copytree(folder / "test", tmp_path / "more" / "test")
    shutil.copy(folder / "train/real/a/000.jpg", more / "real/new/another.jpg")
    (more / "real/a/000.jpg").write_bytes((more / "real/a/000.jpg").read_bytes()[:400])
    code, report, _, err = run(
        model_path=place / "m.joblib", data_dir=more.parent, robustness_images=1
    )
    assert "left out: 1 images that trained the model" in err
    # An unreadable image is reported and counted in the exit code.
    assert code == 1 and "left out test/real/a/000.jpg" in err and report["overall"]["n"] == 29


def test_images_that_the_encoder_has_seen_are_left_out(capsys):
    columns = make_columns(real=10, fake=10)
    columns["splits"][:3] = "seen"
    model = {"training_data": {"images": np.array([], np.int64)}}
    kept, left = assess.split_rows(columns, model, [columns["sha256"][5][:16]])
    assert left.tolist() == [0, 1, 2, 5] and len(kept) == 16
    assert "4 images that trained its encoder" in capsys.readouterr().err


def test_the_files_are_held_against_the_detector_on_the_same_images():
    columns = make_columns()
    held = columns["splits"] == "test"
    model = build({name: values[~held] for name, values in columns.items()}, "logistic")
    *_, found = assess.assess_all(model, columns, np.flatnonzero(held), np.array([], int))
    assert found["audit"]["detector"] == {"on_test": found["overall"]["auc"]}


def test_training_images_in_a_features_file_are_left_out_and_copies_count_apart(tmp_path, run):
    columns = with_views(make_columns(), 1)
    whole, held = columns["view"] == 0, columns["splits"] == "test"
    save_model(tmp_path / "m.joblib", build({name: v[~held] for name, v in columns.items()}))
    features = write_features(tmp_path / "f.npz", columns)
    _, report, _, err = run(model_path=tmp_path / "m.joblib", features_file=features)
    assert report["overall"]["n"] == (whole & held).sum()
    assert report["degraded"]["n"] == (~whole & held).sum()
    assert f"left out: {(whole & ~held).sum()} images that trained the model" in err


def test_images_and_their_features_give_the_same_metrics(evaluated, run):
    place, report = evaluated
    _, again, out, _ = run(model_path=place / "m.joblib", features_file=place / "f.npz")
    assert again["scores"]["p_fake"] == pytest.approx(report["scores"]["p_fake"], abs=1e-4)
    assert again["overall"]["confusion"] == report["overall"]["confusion"]
    assert "robustness" not in again and "not measured" in out
    assert all(what in out for what in again["not_measured"])


def test_every_distortion_and_every_way_of_saving_alike_is_measured(evaluated):
    place, report = evaluated
    assert [(r["panel"], r["level"]) for r in report["robustness"][1:]] == [
        (panel, level) for panel, level, _ in CONDITIONS
    ]
    assert [r["level"] for r in report["arms"]] == ["as they are", *(name for name, _, _ in ARMS)]
    with open(place / "out" / "robustness.csv") as file:
        assert len(list(csv.DictReader(file))) == 1 + len(CONDITIONS)


def test_the_same_pixels_in_another_file_flip_no_verdict(evaluated):
    _, report = evaluated
    png = next(r for r in report["arms"] if r["level"] == "both as PNG")
    assert png["flipped"]["value"] == 0 and png["auc"] == report["arms"][0]["auc"]


def test_a_flip_is_counted_against_the_untouched_verdict():
    labels, untouched = np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.4, 0.9])
    fixed = ("blur", "", labels), (untouched, 0.5, np.arange(4), np.arange(4) < 3)
    row = pictures.condition(*fixed[0], np.array([0.6, 0.1, 0.4, 0.9]), *fixed[1])
    assert row["flipped"]["value"] == 0.5 and row["balanced_accuracy"]["value"] == 0.5
    assert pictures.condition(*fixed[0], untouched, *fixed[1])["flipped"] is None


def test_the_contact_sheet_shows_the_most_confidently_wrong(evaluated):
    place, report = evaluated
    real, fake = (
        [row["p_fake"] for row in report["hardest"] if row["label"] == name] for name in CLASSES
    )
    assert real == sorted(real, reverse=True) and all(p >= 0.5 for p in real)
    assert fake == sorted(fake) and all(p < 0.5 for p in fake)
    with Image.open(place / "out" / "hardest.png") as sheet:
        assert sheet.height > 300


def test_every_image_is_in_predictions_csv_the_most_confidently_wrong_first(evaluated):
    place, report = evaluated
    with open(place / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == report["overall"]["n"]
    wrong = [float(r["p_fake"]) if r["label"] == "real" else 1 - float(r["p_fake"]) for r in rows]
    assert wrong == sorted(wrong, reverse=True)
    model = load_model(place / "m.joblib")
    for row in rows:
        p_fake = float(row["p_fake"])
        assert row["verdict"] == CLASSES[int(p_fake >= model["threshold"])]
        assert (row["uncertain"] == "yes") is bool(model["band"][0] <= p_fake <= model["band"][1])
        assert row["decision"] == "" and row["split"] == "test"
    flips = Counter(name for row in rows for name in row["flipped_by"].split("; ") if name)
    for row in report["robustness"][1:]:
        assert flips[f"{row['panel']} {row['level']}"] == round(row["flipped"]["value"] * row["n"])


def test_the_operating_table_has_untouched_and_resaved_images(evaluated):
    _, report = evaluated
    panel, level = CONDITIONS[assess.RESAVED][:2]
    images = {row["images"] for row in report["operating"]}
    parts = ("known sources", "sources never seen")
    assert images == {f"{part}{what}" for part in parts for what in ("", f", {panel} {level}")}
    assert len(report["operating"]) == 4 * 6 * 3


def test_a_review_queue_is_measured_and_a_pair_is_suggested(flags, run):
    _, report, out, _ = run(**flags, review=(0.2, 0.9), prevalence=0.02, uploads_per_day=300)
    assert (report["review"]["low"], report["review"]["high"]) == (0.2, 0.9)
    assert "pass below 0.2, reject from 0.9, of 300 uploads a day:" in out
    assert {row["prevalence"] for row in report["operating"]} == {0.02}
    limits = {"max_false_reject": 0.05, "max_missed": 0.1}
    _, report, _, err = run(**flags, suggest_review=True, **limits)
    low, high = report["review"]["low"], report["review"]["high"]
    assert f"suggested: --review {low:.4g} {high:.4g}" in err and low <= high


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"review": (0.9, 0.1)}, "--review 0.9 0.1"),
        ({"prevalence": 1.5}, "--prevalence 1.5: must be between 0 and 1"),
        ({"uploads_per_day": 0}, "--uploads_per_day 0: must be at least 1"),
        ({"suggest_review": True, "max_false_reject": 0}, "--max_false_reject 0"),
        (
            {"suggest_review": True, "max_missed": 0.001},
            "this model cannot have --max_false_reject 0.005 (60 images are too few, it takes 200)"
            " nor --max_missed 0.001 (60 images are too few, it takes 1000); name a larger share",
        ),
    ],
)
def test_unfit_flags_of_the_operating_table_are_refused(flags, run, bad, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        run(**flags, **bad)


def test_a_run_of_over_a_minute_says_so_before(monkeypatch, capsys):
    clock = iter(np.arange(0, 100, 0.1))
    monkeypatch.setattr(pictures.time, "perf_counter", lambda: next(clock))
    detector = Mock(pixels=lambda image: np.zeros((3, 2, 2), np.float32))
    pictures.announce(detector, 100, "distorting", "--robustness_images takes fewer")
    assert capsys.readouterr().err == ""
    pictures.announce(detector, 700, "encoding")
    assert capsys.readouterr().err == "encoding will take about 70 s (700 images)\n"
    pictures.announce(detector, 1210, "distorting", "--robustness_images takes fewer")
    assert capsys.readouterr().err == (
        "distorting will take about 2 minutes (1210 images); --robustness_images takes fewer\n"
    )


def test_a_model_without_a_mistake_has_no_contact_sheet(folder, tmp_path):
    pictures.contact_sheet(folder, {}, [], tmp_path / "hardest.png")
    assert not (tmp_path / "hardest.png").exists()


def test_an_image_that_is_a_duplicate_of_a_training_image_is_reported(flags, run, tmp_path):
    trained, other = make_columns(seed=1), make_columns(seed=2, splits=False)
    other["thumb"][:40] = trained["thumb"][:40]  # the same pictures in other files
    columns = {name: np.concatenate([trained[name], other[name]]) for name in trained}
    features = write_features(tmp_path / "g.npz", columns)
    report = run(**flags | {"features_file": features})[1]
    assert report["overall"]["n"] == 120
    assert report["audit"]["twins"]["test_with_twin_in_train"] == 40


def test_a_fresh_folder_with_its_own_train_and_test_is_no_leak(flags, run, tmp_path):
    columns = make_columns(seed=2)
    columns["thumb"][80:] = columns["thumb"][:40]
    features = write_features(tmp_path / "g.npz", columns)
    report = run(**flags | {"features_file": features})[1]
    assert report["overall"]["n"] == 120
    assert report["audit"]["twins"]["test_with_twin_in_train"] == 0


def test_a_fresh_model_has_no_warning_and_stays_as_it_is(fresh):
    _, flags, saved, report, text = fresh
    assert [row["what"] for row in report["audit"]["probes"]] == ["all file facts", "8x8 thumbnail"]
    assert report["leak"]["how"] == "cross-validated on these images"
    assert report["warnings"] == [] and flags["model_path"].read_bytes() == saved
    # Images without a source are neither known nor unseen.
    assert report["known"] is report["unseen"] is None and "images, all:" in text


def test_a_threshold_that_contradicts_the_stored_scores_is_a_warning(fresh, run, tmp_path):
    save_model(tmp_path / "moved.joblib", {**fresh[0], "threshold": 0.4})
    _, report, out, _ = run(**fresh[1] | {"model_path": tmp_path / "moved.joblib"})
    assert len(report["warnings"]) == 1
    assert "threshold is 0.4, its own scores and rule give 0.5" in out


@pytest.mark.long
def test_a_model_with_doubled_logits_is_called_overconfident(run, tmp_path):
    train, test = (
        make_columns(real=300, fake=300, gap=1.5, seed=seed, splits=False) for seed in (1, 2)
    )
    honest = build(train)
    doubled = {**honest, "calibrator": honest["calibrator"] * 2}
    stored = doubled["out_of_fold"]
    p_fake = probability(doubled, stored["scores"].astype(float))
    doubled["band"] = choose_band(p_fake, stored["labels"], 0.5, BAND_ERROR)
    features = write_features(tmp_path / "f.npz", test)
    for model, expected in ((honest, 0), (doubled, 1)):
        save_model(tmp_path / "m.joblib", model)
        report = run(model_path=tmp_path / "m.joblib", features_file=features)[1]
        assert len(report["warnings"]) == expected, report["calibration"]
    assert "overconfident" in report["warnings"][0]


# ---- an earlier evaluation ----


def test_the_same_model_has_nothing_worse_than_its_own_baseline(flags, run, before):
    code, _, out, _ = run(**flags, baseline=before)
    assert code == 0 and "every metric lies in the interval" in out


def test_metrics_worse_than_the_baseline_are_named_with_exit_code_1(flags, run, before, tmp_path):
    columns = make_columns(seed=3)
    noise = np.random.default_rng(0).normal(size=len(columns["labels"]))
    columns["features"][:, 0] = noise  # nothing to learn
    save_model(tmp_path / "worse.joblib", build(columns))
    code, _, out, err = run(**flags | {"model_path": tmp_path / "worse.joblib"}, baseline=before)
    assert code == 1 and "AUC (overall)" in err and "worse" in out


def test_a_baseline_is_never_overwritten_by_the_new_report(flags, run, before, tmp_path):
    (tmp_path / "out").mkdir()
    baseline = before.rename(tmp_path / "out" / "metrics.json")
    recorded = baseline.read_bytes()
    with pytest.raises(errors.UsageError, match="--baseline .* would be overwritten"):
        run(**flags, baseline=baseline)
    assert baseline.read_bytes() == recorded


def test_parts_of_other_images_are_not_compared(fresh):
    report = fresh[3]
    worse = report["overall"] | {"auc": {"value": 0.1, "interval": [0.0, 0.2], "n": 120}}
    now = report | {"known": worse, "data": report["data"] | {"known": "these"}}
    for images, parts in (("these", ["known"]), ("others", [])):  # a model that knows other sources
        other = report | {"known": report["overall"], "data": report["data"] | {"known": images}}
        assert [row[0] for row in baseline.compare(now, other)] == parts


@pytest.mark.parametrize(
    "damage",
    [
        lambda report: report["overall"]["auc"].update(interval="x"),
        lambda report: report["overall"].update(auc=None),
        lambda report: report.update(data=3),
    ],
    ids=["interval", "metric", "data"],
)
def test_a_damaged_baseline_is_refused_before_anything_is_written(
    flags, run, before, tmp_path, damage
):
    report = json.loads(before.read_text())
    damage(report)
    before.write_text(json.dumps(report))
    with pytest.raises(errors.UsageError, match="--baseline"):
        run(**flags, baseline=before)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_baseline_of_other_images_is_refused(flags, run, before, tmp_path):
    other = write_features(tmp_path / "g.npz", make_columns(seed=4, splits=False))
    with pytest.raises(errors.UsageError, match="other images"):
        run(**flags | {"features_file": other}, baseline=before)


# ---- usage errors ----


def test_an_image_that_changed_since_it_was_encoded_is_refused(folder, tmp_path):
    path = "test/real/a/000.jpg"
    assert pictures.read_picture(folder, path, sha256((folder / path).read_bytes())).mode == "RGB"
    with pytest.raises(errors.UsageError, match="not the file that was encoded"):
        pictures.read_picture(folder, path, "00")


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--data_dir", "--features_file"]),
        (["--features_file", "no.npz"], ["no.npz"]),
        (["--data_dir", "nowhere"], ["nowhere"]),
        (["--features_file", "FEATURES", "--baseline", "no.json"], ["no.json"]),
        (["--features_file", "FEATURES", "--baseline", ROOT / "README.md"], ["README.md"]),
        (["--features_file", "FEATURES", "--robustness_images", "0"], ["--robustness_images 0"]),
        (["--features_file", "FEATURES", "--data_dir", "tests"], ["is not there", "features.npz"]),
        (
            ["--features_file", "FEATURES", "--report_dir", "README.md"],
            ["--report_dir README.md", "name another place"],
        ),
        (
            ["--features_file", "FEATURES", "--report_dir", "README.md/below"],
            ["README.md/below", "name another place"],
        ),
    ],
)
def test_a_usage_error_is_one_line(script, tmp_path, flags, words):
    features = write_features(
        tmp_path / "features.npz", make_columns(dim=DIM), encoder=load_model(BASELINE)["encoder"]
    )
    flags = [features if flag == "FEATURES" else flag for flag in flags]
    assert_one_line_error(script("evaluate.py", "--model_path", BASELINE, *flags, cwd=ROOT), *words)


def test_features_of_another_encoder_are_refused(script, tmp_path):
    features = write_features(tmp_path / "f.npz", make_columns())
    result = script("evaluate.py", "--model_path", BASELINE, "--features_file", features)
    assert_one_line_error(result, ENCODER["name"], "small")


def test_an_evaluation_on_training_images_alone_is_refused(flags, run, tmp_path):
    features = write_features(tmp_path / "g.npz", make_columns(seed=1))
    with pytest.raises(errors.UsageError, match="trained neither"):
        run(**flags | {"features_file": features})
