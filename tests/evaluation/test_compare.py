"""compare.py: two encoders on one folder, features files, the report, the images left out."""

import csv
import json
import shutil

import numpy as np
import pytest
import small
from commands import assert_one_line_error
from made_up import build, make_columns, write_features
from PIL import Image

import compare
import extract_features
from detector.base import errors
from detector.base.files import only_writer
from detector.evaluation import comparison, metrics, pictures
from detector.features.columns import COLUMNS
from detector.features.file import load_features
from detector.images.distort import CONDITIONS
from detector.model.file import save_model
from detector.model.score import p_fake_of

COUNTS = {f"train/{label}/{source}": 12 for label in ("real", "fake") for source in ("a", "b")} | {
    f"test/{label}/{source}": 10 for label in ("real", "fake") for source in ("a", "b")
}
METRICS = ["balanced accuracy", "AUC", "log-loss", "calibration error"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of this file's own, for the encoder of another layer."""
    cache = tmp_path_factory.mktemp("cache")
    small.link_encoder(cache)
    return cache


@pytest.fixture(autouse=True)
def clip_cache(cache, clean_environment, monkeypatch):
    monkeypatch.setenv("CLIP_CACHE", str(cache))


@pytest.fixture(scope="module")
def folder(make_folder, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures"), COUNTS)


@pytest.fixture(scope="module")
def place(folder, cache, tmp_path_factory):
    """A folder with a.joblib of the small encoder, b.joblib of its last but one layer, features."""
    place = tmp_path_factory.mktemp("models")
    for name, layers in (("a", "final"), ("b", "penultimate")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CLIP_MODEL", str(small.CHECKPOINT))
            patch.setenv("CLIP_CACHE", str(cache))
            files = ["--data_dir", str(folder), "--output_file", str(place / f"{name}.npz")]
            extract_features.main([*files, "--layers", layers])
        columns = load_features(place / f"{name}.npz")
        train = {key: columns[key][columns["splits"] == "train"] for key in COLUMNS}
        encoder = {"encoder": columns["meta"]["encoder"]}
        # b learnt from a few images only
        few = train if name == "a" else {key: train[key][::4] for key in COLUMNS}
        model = build(few) | encoder
        model["training_data"]["images"] = build(train)["training_data"]["images"]
        save_model(place / f"{name}.joblib", model)
    return place


@pytest.fixture
def run(place, tmp_path, capsys):
    """Function: flags of compare.py, in this process -> (exit code, the report, stdout, stderr)."""

    def call(*flags, a=place / "a.joblib", b=place / "b.joblib"):
        code = compare.main(
            [str(a), str(b), *map(str, flags), "--report_dir", str(tmp_path / "out")]
        )
        return (
            code,
            json.loads((tmp_path / "out/comparison.json").read_text()),
            *capsys.readouterr(),
        )

    return call


@pytest.fixture(scope="module")
def compared(folder, place, cache, tmp_path_factory):
    """Both models on the folder -> (report folder, comparison.json, text)."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_CACHE", str(cache))
        models = [str(place / name) for name in ("a.joblib", "b.joblib")]
        text, unreadable = comparison.compare(models, str(folder), report_dir=str(out))
    assert unreadable == 0
    return out, json.loads((out / "comparison.json").read_text()), text


# ---- two encoders on a folder ----


def test_models_of_two_encoders_are_measured_on_the_images_that_trained_neither(compared, place):
    _, report, _ = compared
    assert report["a"]["encoder"] != report["b"]["encoder"]
    whole = report["rows"][: len(METRICS)]
    assert [(row["images"], row["metric"], row["n"]) for row in whole] == [
        ("all", name, 40) for name in METRICS
    ]
    for name in "ab":
        columns = load_features(place / f"{name}.npz")
        test = columns["splits"] == "test"
        model = comparison.load_model(place / f"{name}.joblib")
        p_fake = p_fake_of(model, columns["features"][test])
        own = metrics.measure(columns["labels"][test], p_fake, model["threshold"], np.arange(40))
        expected = [own[key]["value"] for key in ("balanced_accuracy", *comparison.paired.DRAWN)]
        assert [row[name] for row in whole] == pytest.approx(expected, abs=1e-3)


def test_each_source_and_the_social_media_chain_have_rows(compared):
    _, report, text = compared
    assert sorted((row["images"], row["n"]) for row in report["sources"]) == [("a", 20), ("b", 20)]
    social = report["rows"][len(METRICS) :]
    assert [(row["images"], row["metric"]) for row in social] == [
        ("social media", name) for name in METRICS
    ]
    assert social[1]["a"] != report["rows"][1]["a"]
    assert all(f"\n{name}: only a is right on " in text for name in ("all", "social media"))
    assert sum((panel, level) == comparison.SOCIAL for panel, level, _ in CONDITIONS) == 1


def test_the_report_holds_the_table_the_verdict_and_the_sheet(compared, place):
    out, report, text = compared
    with open(out / "comparison.csv") as file:
        rows = list(csv.DictReader(file))
    expected = [row["images"] for row in report["rows"] + report["sources"]]
    assert [row["images"] for row in rows] == expected
    assert {"difference", "difference_low", "difference_high", "p"} <= rows[0].keys()
    page = (out / "comparison.html").read_text()
    assert report["sentence"] in text and "data:image/png;base64," in page
    assert "src=" not in page.replace('src="data:', "")  # nothing is loaded from elsewhere
    assert all(image["path"] in page for image in report["disagreements"])


def test_the_sheet_shows_the_images_with_two_verdicts(compared, place, folder):
    out, report, _ = compared
    images = report["disagreements"]
    thresholds = [report[name]["threshold"] for name in "ab"]
    assert images and all(
        (image["a"] >= thresholds[0]) != (image["b"] >= thresholds[1]) for image in images
    )
    assert all(
        image["label"] in image["path"] and (folder / image["path"]).is_file() for image in images
    )
    for label in ("real", "fake"):
        gaps = [abs(image["a"] - image["b"]) for image in images if image["label"] == label]
        assert gaps == sorted(gaps, reverse=True)
    with Image.open(out / "disagreements.png") as sheet:
        assert sheet.width >= 150 and len(sheet.convert("L").getcolors(256)) > 50


def test_features_of_both_encoders_give_the_same_figures_and_name_what_is_left_out(
    compared, place, run
):
    code, report, out, _ = run("--features_files", place / "a.npz", place / "b.npz")
    assert code == 0 and "not measured without pictures (use --data_dir): the social-media" in out
    for row, other in zip(report["rows"], compared[1]["rows"], strict=False):
        assert (row["metric"], row["n"]) == (other["metric"], other["n"])
        assert [row["a"], row["b"]] == pytest.approx([other["a"], other["b"]], abs=1e-3)


def test_a_report_without_pictures_replaces_an_older_sheet(place, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/disagreements.png").write_bytes(b"old")
    run("--features_files", place / "a.npz", place / "b.npz")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["comparison.csv", "comparison.html", "comparison.json"]


def test_the_order_of_the_models_flips_the_differences(compared, place, run):
    files = place / "b.npz", place / "a.npz"
    _, report, _, _ = run("--features_files", *files, a=place / "b.joblib", b=place / "a.joblib")
    for row, other in zip(report["rows"], compared[1]["rows"], strict=False):
        assert row["difference"]["value"] == pytest.approx(-other["difference"]["value"], abs=1e-3)
        assert row["only_a"] == other["only_b"]


def test_one_encoder_reads_a_folder_once(place, folder, run, tmp_path, monkeypatch):
    model = comparison.load_model(place / "a.joblib")
    del model["sha256"]
    save_model(tmp_path / "c.joblib", {**model, "threshold": 0.4})
    encode, calls = pictures.encode_folder, []
    monkeypatch.setattr(
        comparison.assess, "encode_folder", lambda *args: (calls.append(args), encode(*args))[1]
    )
    monkeypatch.setattr(
        pictures, "changed", lambda _, __, drawn, ___: np.full((len(drawn["labels"]), 2), 0.5)
    )
    code, report, _, _ = run("--data_dir", folder, b=tmp_path / "c.joblib")
    assert code == 0 and len(calls) == 1 and report["rows"][1]["difference"]["value"] == 0


def test_an_image_that_cannot_be_read_is_exit_code_1(place, folder, run, tmp_path, monkeypatch):
    broken = shutil.copytree(folder / "test", tmp_path / "test")
    (broken / "real/a/000.jpg").write_bytes((broken / "real/a/000.jpg").read_bytes()[:400])
    code, report, _, err = run("--data_dir", broken)
    assert code == 1 and report["rows"][0]["n"] == 39 and "left out real/a/000.jpg" in err


def test_minutes_under_the_social_media_chain_are_announced(
    place, folder, run, capsys, monkeypatch
):
    announced = []
    monkeypatch.setattr(pictures, "announce", lambda _, *args: announced.append(args[:2]))
    run("--data_dir", folder / "test")
    encoding, chain = (40, "encoding"), (80, "the social-media chain")
    assert announced == [encoding, encoding, chain, chain]


# ---- the images of both ----


def test_images_of_one_side_alone_are_counted_and_left_out(tmp_path, capsys):
    columns = make_columns(splits=False)
    part = {name: values[5:] for name, values in columns.items()}
    models = [build(make_columns(seed=seed)) for seed in (1, 3)]
    judged = [
        comparison.Judged(model, None, own, p_fake_of(model, own["features"]))
        for model, own in zip(models, (columns, part), strict=True)
    ]
    images = comparison.pair(judged)
    assert sorted(images.columns["paths"]) == sorted(part["paths"])
    order = np.argsort(images.columns["paths"])  # that of the columns
    assert images.p_fake[0, order].tolist() == judged[0].p_fake[5:].tolist()
    assert images.p_fake[1, order].tolist() == judged[1].p_fake.tolist()
    assert (
        "left out: 5 images that only one of the models can be judged on" in capsys.readouterr().err
    )


def test_images_that_trained_either_model_are_left_out(tmp_path, capsys):
    trained = make_columns(seed=1), make_columns(seed=3)
    fresh = make_columns(seed=2, splits=False)
    both = {name: np.concatenate([*(one[name] for one in (*trained, fresh))]) for name in fresh}
    paths = [tmp_path / "a.joblib", tmp_path / "b.joblib"]
    for path, columns in zip(paths, trained, strict=True):
        save_model(path, build(columns))
    features = str(write_features(tmp_path / "f.npz", both))
    judged, _ = comparison.judge_images(paths, features_files=[features] * 2)
    images = comparison.pair(judged)
    assert sorted(images.columns["sha256"]) == sorted(fresh["sha256"])
    assert capsys.readouterr().err.count("left out: 120 images that trained the model") == 2


# ---- errors ----


def test_an_input_that_cannot_be_used_is_one_line(place, folder, tmp_path, run):
    a, b, f = place / "a.joblib", place / "b.joblib", place / "a.npz"
    shutil.copy(a, tmp_path / "copy.joblib")
    shutil.copytree(folder / "test/real/a", tmp_path / "unlabelled/pictures")
    trained, unlabelled = folder / "train", tmp_path / "unlabelled"
    for one, other, flags, says in (
        ("no.joblib", b, ["--data_dir", folder], "cannot read no.joblib"),
        (a, tmp_path / "copy.joblib", ["--data_dir", folder], "copy.joblib are the same model"),
        (a, b, ["--data_dir", "nowhere"], "--data_dir nowhere: no such folder"),
        (a, b, ["--data_dir", unlabelled], "no folder below it names a label"),
        (a, b, ["--data_dir", trained], "trained neither the model nor its encoder"),
        (a, b, ["--features_files", f, "no.npz"], "no.npz: no such file"),
        (a, b, ["--features_files", f, f], "a.npz is of encoder .*: extract with that encoder"),
    ):
        with pytest.raises(errors.DetectorError, match=says) as error:
            run(*flags, a=one, b=other)
        assert len(str(error.value).splitlines()) == 1
        assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_missing_model_ends_the_command_with_one_line(script):
    result = script("compare.py", "no.joblib", "b.joblib", "--features_files", "a", "b")
    assert_one_line_error(result, "cannot read no.joblib")


def test_images_of_one_class_are_refused(tmp_path):
    paths = [tmp_path / "a.joblib", tmp_path / "b.joblib"]
    for seed, path in enumerate(paths, 5):
        save_model(path, build(make_columns(seed=seed)))
    features = str(write_features(tmp_path / "f.npz", real=30, fake=0, splits=False))
    judged, _ = comparison.judge_images(paths, features_files=[features] * 2)
    with pytest.raises(errors.UsageError, match="30 images are left .* not of both classes"):
        comparison.pair(judged)


def test_a_second_comparison_into_one_folder_is_refused(place, run, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "compare", lambda **_: pytest.fail("it worked all the same"))
    lock = only_writer(tmp_path / "out" / "comparison.json", "")
    with lock, pytest.raises(errors.UsageError, match="is writing it"):
        run("--features_files", place / "a.npz", place / "b.npz")


@pytest.mark.parametrize(
    "flags", [[], ["--data_dir", "d", "--features_files", "a", "b"], ["--features_files", "a"]]
)
def test_images_are_named_in_one_way(script, flags):
    result = script("compare.py", "a.joblib", "b.joblib", *flags)
    assert result.returncode == 2 and "usage: compare.py" in result.stderr
