"""evaluate.py: what it leaves out, what it measures on pictures, what it says of a model that is not what it claims."""

import csv
import json
import shutil

import numpy as np
import pytest
import small
from commands import ROOT, assert_one_line_error
from made_up import BASELINE, DIM, ENCODER, build, make_columns, with_views, write_features
from PIL import Image

import evaluate
from detector.base import errors
from detector.base.files import sha256
from detector.evaluation import assess, baseline, pictures
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
    """Features and a model of the folder's train split, evaluated on its pictures: (folder of it all, report, stdout)."""
    import contextlib
    import io
    import os

    import extract_features
    import train_model

    place = tmp_path_factory.mktemp("evaluated")
    os.environ["CLIP_MODEL"] = str(small.CHECKPOINT)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        extract_features.main(["--data_dir", str(folder), "--output_file", str(place / "f.npz")])
        train_model.main(
            [
                "--features_file",
                str(place / "f.npz"),
                "--model_output_path",
                str(place / "m.joblib"),
            ]
        )
        code = evaluate.main(
            [
                "--model_path",
                str(place / "m.joblib"),
                "--data_dir",
                str(folder),
                "--report_dir",
                str(place / "out"),
            ]
        )
    assert code == 0
    return place, json.loads((place / "out" / "metrics.json").read_text()), out.getvalue()


@pytest.fixture
def run(tmp_path, capsys):
    """Function: evaluate.py in this process -> (exit code, metrics.json, stdout, stderr)."""

    def call(*words):
        code = evaluate.main([*map(str, words), "--report_dir", str(tmp_path / "out")])
        captured = capsys.readouterr()
        return (
            code,
            json.loads((tmp_path / "out" / "metrics.json").read_text()),
            captured.out,
            captured.err,
        )

    return call


@pytest.fixture
def made(tmp_path):
    """A model of made-up features, saved, and the features of other images of the same kind."""
    model = build(make_columns(seed=1))
    save_model(tmp_path / "m.joblib", model)
    return (
        model,
        tmp_path / "m.joblib",
        write_features(tmp_path / "f.npz", make_columns(seed=2, splits=False)),
    )


def test_images_that_trained_the_model_are_left_out_by_their_bytes(evaluated):
    _, report, _ = evaluated
    assert (
        report["overall"]["n"] == 30 and report["known"]["n"] == 20 and report["unseen"]["n"] == 10
    )


def test_a_renamed_training_image_is_still_left_out(evaluated, folder, run, tmp_path):
    place, _, _ = evaluated
    shutil.copytree(folder / "test", tmp_path / "more" / "test")
    shutil.copy(
        folder / "train" / "real" / "a" / "000.jpg",
        tmp_path / "more" / "test" / "real" / "new" / "another.jpg",
    )
    _, report, _, err = run(
        "--model_path",
        place / "m.joblib",
        "--data_dir",
        tmp_path / "more",
        "--robustness_images",
        1,
    )
    assert report["overall"]["n"] == 30 and "left out: 1 images that trained the model" in err


def test_images_that_the_encoder_has_seen_are_left_out(capsys):
    columns = make_columns(real=10, fake=10)
    columns["splits"][:3] = "seen"
    model = {"training_data": {"images": np.array([], np.int64)}}
    kept, left = assess.split_rows(columns, model, [columns["sha256"][5][:16]])
    assert (
        left.tolist() == [0, 1, 2, 5]
        and len(kept) == 16
        and "4 images that trained its encoder" in capsys.readouterr().err
    )


def test_the_files_are_held_against_the_detector_on_the_same_images():
    columns = make_columns()
    held = columns["splits"] == "test"
    model = build({name: values[~held] for name, values in columns.items()}, "logistic")
    *_, found = assess.assess_all(model, columns, np.flatnonzero(held), np.array([], int))
    assert found["audit"]["detector"] == {"on_test": found["overall"]["auc"]}


def test_images_that_trained_the_model_are_left_out_of_a_features_file_and_copies_count_apart(
    tmp_path, run
):
    columns = with_views(make_columns(), 1)
    whole, held = columns["view"] == 0, columns["splits"] == "test"
    model = build({name: values[~held] for name, values in columns.items()})
    save_model(tmp_path / "m.joblib", model)
    features = write_features(tmp_path / "f.npz", columns)
    _, report, _, err = run("--model_path", tmp_path / "m.joblib", "--features_file", features)
    assert (
        report["overall"]["n"] == (whole & held).sum()
        and report["degraded"]["n"] == (~whole & held).sum()
    )
    assert f"left out: {(whole & ~held).sum()} images that trained the model" in err


def test_pictures_and_their_features_give_the_same_metrics(evaluated, run):
    place, report, _ = evaluated
    _, again, out, _ = run("--model_path", place / "m.joblib", "--features_file", place / "f.npz")
    assert again["scores"]["p_fake"] == pytest.approx(report["scores"]["p_fake"], abs=1e-4)
    assert again["overall"]["confusion"] == report["overall"]["confusion"]
    assert (
        "robustness" not in again
        and "not measured" in out
        and all(what in out for what in again["not_measured"])
    )


def test_every_distortion_and_every_way_of_saving_alike_is_measured(evaluated):
    place, report, _ = evaluated
    assert [(r["panel"], r["level"]) for r in report["robustness"][1:]] == [
        (panel, level) for panel, level, _ in CONDITIONS
    ]
    assert [r["level"] for r in report["arms"]] == ["as they are", *(name for name, _, _ in ARMS)]
    with open(place / "out" / "robustness.csv") as file:
        assert len(list(csv.DictReader(file))) == 1 + len(CONDITIONS)


def test_the_same_pixels_in_another_file_flip_no_verdict(evaluated):
    _, report, _ = evaluated
    png = next(r for r in report["arms"] if r["level"] == "both as PNG")
    assert png["flipped"]["value"] == 0 and png["auc"] == report["arms"][0]["auc"]


def test_a_flip_is_counted_against_the_untouched_verdict():
    labels, untouched = np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.4, 0.9])
    row = pictures.condition(
        "blur",
        "",
        labels,
        np.array([0.6, 0.1, 0.4, 0.9]),
        untouched,
        0.5,
        np.arange(4),
        np.array([True, True, True, False]),
    )
    assert row["flipped"]["value"] == 0.5 and row["balanced_accuracy"]["value"] == 0.5
    assert (
        pictures.condition(
            "", "", labels, untouched, untouched, 0.5, np.arange(4), np.ones(4, bool)
        )["flipped"]
        is None
    )


def test_the_contact_sheet_shows_the_most_confidently_wrong(evaluated):
    place, report, _ = evaluated
    of_class = {
        name: [h["p_fake"] for h in report["hardest"] if h["label"] == name]
        for name in ("real", "fake")
    }
    assert of_class["real"] == sorted(of_class["real"], reverse=True) and of_class[
        "fake"
    ] == sorted(of_class["fake"])
    assert all(p >= 0.5 for p in of_class["real"]) and all(p < 0.5 for p in of_class["fake"])
    with Image.open(place / "out" / "hardest.png") as sheet:
        assert sheet.height > 300


def test_a_model_without_a_mistake_has_no_contact_sheet(folder, tmp_path):
    pictures.contact_sheet(folder, {}, [], tmp_path / "hardest.png")
    assert not (tmp_path / "hardest.png").exists()


def test_a_test_image_that_is_a_copy_of_a_training_image_is_told(made, run, tmp_path):
    _, model, _ = made
    trained, other = make_columns(seed=1), make_columns(seed=2, splits=False)
    other["thumb"][:40] = trained["thumb"][:40]  # the same pictures in other files
    columns = {name: np.concatenate([trained[name], other[name]]) for name in trained}
    _, report, _, _ = run(
        "--model_path", model, "--features_file", write_features(tmp_path / "g.npz", columns)
    )
    assert (
        report["overall"]["n"] == 120 and report["audit"]["twins"]["test_with_twin_in_train"] == 40
    )


def test_a_fresh_folder_with_its_own_train_and_test_is_no_leak(made, run, tmp_path):
    _, model, _ = made
    columns = make_columns(seed=2)
    columns["thumb"][80:] = columns["thumb"][:40]
    _, report, _, _ = run(
        "--model_path", model, "--features_file", write_features(tmp_path / "g.npz", columns)
    )
    assert (
        report["overall"]["n"] == 120 and report["audit"]["twins"]["test_with_twin_in_train"] == 0
    )


def test_images_without_a_source_are_neither_known_nor_unseen(made, run):
    _, model, features = made
    _, report, out, _ = run("--model_path", model, "--features_file", features)
    assert report["known"] is None and report["unseen"] is None and "images, all:" in out


def test_a_fresh_model_is_not_warned_of(made, run):
    _, model, features = made
    assert run("--model_path", model, "--features_file", features)[1]["warnings"] == []


def test_a_threshold_that_does_not_follow_from_the_stored_scores_is_said(made, run, tmp_path):
    model, _, features = made
    save_model(tmp_path / "moved.joblib", {**model, "threshold": 0.4})
    _, report, out, _ = run("--model_path", tmp_path / "moved.joblib", "--features_file", features)
    assert (
        "threshold is 0.4, its own scores and rule give 0.5" in out and len(report["warnings"]) == 1
    )


@pytest.mark.long
def test_a_model_with_doubled_logits_is_said_to_be_too_sure(run, tmp_path):
    train, test = (
        make_columns(real=300, fake=300, gap=1.5, seed=seed, splits=False) for seed in (1, 2)
    )
    model = build(train)
    doubled = {**model, "calibrator": model["calibrator"] * 2}
    stored = doubled["out_of_fold"]
    doubled["band"] = choose_band(
        probability(doubled, stored["scores"].astype(float)), stored["labels"], 0.5, BAND_ERROR
    )
    features = write_features(tmp_path / "f.npz", test)
    for name, which, expected in (("honest", model, 0), ("doubled", doubled, 1)):
        save_model(tmp_path / f"{name}.joblib", which)
        report = run("--model_path", tmp_path / f"{name}.joblib", "--features_file", features)[1]
        assert len(report["warnings"]) == expected, (
            name,
            report["warnings"],
            report["calibration"],
        )
    assert "too sure" in report["warnings"][0]


def test_nothing_is_written_into_the_model(made, run):
    _, model, features = made
    before = model.read_bytes()
    run("--model_path", model, "--features_file", features)
    assert model.read_bytes() == before


def test_the_same_model_has_nothing_worse_than_its_own_baseline(made, run, tmp_path):
    _, model, features = made
    run("--model_path", model, "--features_file", features)
    shutil.copy(tmp_path / "out" / "metrics.json", tmp_path / "before.json")
    code, _, out, _ = run(
        "--model_path", model, "--features_file", features, "--baseline", tmp_path / "before.json"
    )
    assert code == 0 and "every metric lies in the interval" in out


def test_what_got_worse_than_the_baseline_is_named_with_exit_code_1(made, run, tmp_path):
    model, path, features = made
    run("--model_path", path, "--features_file", features)
    shutil.copy(tmp_path / "out" / "metrics.json", tmp_path / "before.json")
    columns = make_columns(seed=3)
    columns["features"][:, 0] = np.random.default_rng(0).normal(
        size=len(columns["labels"])
    )  # nothing to learn from
    save_model(tmp_path / "worse.joblib", build(columns))
    code, _, out, err = run(
        "--model_path",
        tmp_path / "worse.joblib",
        "--features_file",
        features,
        "--baseline",
        tmp_path / "before.json",
    )
    assert code == 1 and "AUC (overall)" in err and "worse" in out


def test_a_baseline_is_never_overwritten_by_the_report_that_is_held_against_it(
    made, script, run, tmp_path
):
    _, model, features = made
    run("--model_path", model, "--features_file", features)
    before = (tmp_path / "out" / "metrics.json").read_bytes()
    result = script(
        "evaluate.py",
        "--model_path",
        model,
        "--features_file",
        features,
        "--report_dir",
        "out",
        "--baseline",
        tmp_path / "out" / "metrics.json",
    )
    assert_one_line_error(result, "--baseline", "would be overwritten")
    assert (tmp_path / "out" / "metrics.json").read_bytes() == before


def test_parts_that_hold_other_images_are_not_compared(made, run):
    _, model, features = made
    report = run("--model_path", model, "--features_file", features)[1]
    worse = report["overall"] | {"auc": {"value": 0.1, "interval": [0.0, 0.2], "n": 120}}
    now = report | {"known": worse, "data": report["data"] | {"known": "these"}}
    for images, parts in (("these", ["known"]), ("others", [])):  # a model that knows other sources
        before = report | {"known": report["overall"], "data": report["data"] | {"known": images}}
        assert [row[0] for row in baseline.compare(now, before)] == parts


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found["overall"]["auc"].update(interval="x"),
        lambda found: found["overall"].update(auc=None),
        lambda found: found.update(data=3),
    ],
    ids=["interval", "metric", "data"],
)
def test_a_damaged_baseline_is_refused_before_anything_is_written(
    made, script, run, tmp_path, damage
):
    _, model, features = made
    _, found, _, _ = run("--model_path", model, "--features_file", features)
    damage(found)
    (tmp_path / "before.json").write_text(json.dumps(found))
    result = script(
        "evaluate.py",
        "--model_path",
        model,
        "--features_file",
        features,
        "--report_dir",
        "new",
        "--baseline",
        "before.json",
    )
    assert_one_line_error(result, "--baseline")
    assert list((tmp_path / "new").glob("*")) == []


def test_a_picture_that_is_no_longer_the_one_encoded_is_refused(folder, tmp_path):
    path = "test/real/a/000.jpg"
    assert pictures.read_picture(folder, path, sha256((folder / path).read_bytes())).mode == "RGB"
    with pytest.raises(errors.UsageError, match="not the file that was encoded"):
        pictures.read_picture(folder, path, "00")


def test_a_baseline_of_other_images_is_refused(made, script, run, tmp_path):
    _, model, features = made
    run("--model_path", model, "--features_file", features)
    other = write_features(tmp_path / "g.npz", make_columns(seed=4, splits=False))
    result = script(
        "evaluate.py",
        "--model_path",
        model,
        "--features_file",
        other,
        "--baseline",
        tmp_path / "out" / "metrics.json",
    )
    assert_one_line_error(result, "other images")


def test_an_unreadable_picture_is_told_and_counted_in_the_exit_code(
    evaluated, folder, tmp_path, run
):
    place, _, _ = evaluated
    shutil.copytree(folder / "test", tmp_path / "torn" / "test")
    torn = tmp_path / "torn" / "test" / "real" / "a" / "000.jpg"
    torn.write_bytes(torn.read_bytes()[:400])
    code, report, _, err = run(
        "--model_path",
        place / "m.joblib",
        "--data_dir",
        tmp_path / "torn",
        "--robustness_images",
        1,
    )
    assert code == 1 and "left out test/real/a/000.jpg" in err and report["overall"]["n"] == 29


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
def test_what_a_user_can_get_wrong_is_told_in_one_line(script, tmp_path, flags, words):
    features = write_features(
        tmp_path / "features.npz", make_columns(dim=DIM), encoder=load_model(BASELINE)["encoder"]
    )
    flags = [features if flag == "FEATURES" else flag for flag in flags]
    assert_one_line_error(script("evaluate.py", "--model_path", BASELINE, *flags, cwd=ROOT), *words)


def test_features_of_another_encoder_are_refused(script, tmp_path):
    features = write_features(tmp_path / "f.npz", make_columns())
    result = script("evaluate.py", "--model_path", BASELINE, "--features_file", features)
    assert_one_line_error(result, ENCODER["name"], "small")


def test_an_evaluation_on_nothing_but_training_images_is_refused(script, tmp_path):
    columns = make_columns(seed=1)
    save_model(tmp_path / "m.joblib", build(columns))
    features = write_features(tmp_path / "f.npz", columns)
    assert_one_line_error(
        script("evaluate.py", "--model_path", tmp_path / "m.joblib", "--features_file", features),
        "trained neither",
    )
