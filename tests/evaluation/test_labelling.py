"""The loop from uploads to labels: draw, label in a real browser, measure, extract."""

import csv
import json
import shutil
import time

import numpy as np
import pytest
import small
from commands import assert_one_line_error
from patience import PATIENCE

import evaluate
import extract_features
import train_model
from detector.base.files import sha256
from detector.evaluation import assess, audit
from detector.features.file import load_features
from detector.model.file import load_model, trained_on

COUNTS = {f"train/{label}": 30 for label in ("real", "fake")}
UPLOADS = {"real/a": 14, "fake/b": 6}


@pytest.fixture(scope="module")
def place(make_folder, tmp_path_factory):
    """A folder with a model, and `uploads` whose folders tell the labels to this test alone."""
    place = tmp_path_factory.mktemp("loop")
    make_folder(place / "data", COUNTS)
    make_folder(place / "uploads", UPLOADS, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_MODEL", str(small.CHECKPOINT))
        features = str(place / "f.npz")
        extract_features.main(["--data_dir", str(place / "data"), "--output_file", features])
        model = str(place / "m.joblib")
        train_model.main(["--features_file", features, "--model_output_path", model])
    return place


@pytest.fixture
def draw(script, place, tmp_path):
    """Function: flags -> draw_sample.py as a process; it writes tmp_path / 'to_label'."""

    def run(*flags, number=12):
        given = ["--data_dir", place / "uploads", "--model_path", place / "m.joblib"]
        output = ["--output_dir", tmp_path / "to_label", "--number", str(number)]
        return script("draw_sample.py", *given, *output, *flags)

    return run


@pytest.fixture
def page(browser, draw, tmp_path):
    """The page of a draw, opened from its file."""
    result = draw()
    assert result.returncode == 0, result.stderr
    assert "12 of 20 different images of 20" in result.stdout
    context = browser.new_context(accept_downloads=True)
    page = context.new_page()
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto((tmp_path / "to_label" / "index.html").as_uri())
    yield page
    context.close()


def truth(path):
    return "fake" if "fake" in path else "real"


def images_of(page):
    return json.loads(page.locator("#images").text_content())


def saved(page, path):
    with page.expect_download() as download:
        page.get_by_role("button", name="Save labels.csv").click()
    download.value.save_as(path)
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def label_all(page, wrong=()):
    page.locator("body").click()
    for number, image in enumerate(images_of(page)):
        word = "u" if number in wrong else truth(image["path"])[0]
        page.keyboard.press(word)


def test_a_person_labels_by_keyboard_and_saves_a_table(page, tmp_path):
    images = images_of(page)
    assert page.get_by_role("status").inner_text() == "Image 1 of 12, 0 labelled"
    page.get_by_label("Your name").fill('Ann "A", B')
    label_all(page, wrong=[2])
    assert page.get_by_role("status").inner_text().endswith("12 labelled")
    rows = saved(page, tmp_path / "labels.csv")
    assert [row["path"] for row in rows] == [image["path"] for image in images]
    assert {row["who"] for row in rows} == {'Ann "A", B'}
    assert rows[2]["label"] == "cannot tell"
    assert all(row["label"] == truth(row["path"]) for i, row in enumerate(rows) if i != 2)
    assert all(0 < float(row["probability"]) <= 1 and row["images"] == "1" for row in rows)
    assert all(float(row["seconds"]) >= 0 for row in rows)


def test_labels_survive_a_reload_and_can_be_corrected(page, tmp_path):
    page.locator("body").click()
    for key in ("f", "f", "ArrowLeft", "ArrowLeft", "r"):
        page.keyboard.press(key)
    ends = time.monotonic() + PATIENCE
    page.reload()
    while page.get_by_role("status").inner_text() != "Image 3 of 12, 2 labelled":
        assert time.monotonic() < ends
        page.reload()  # the browser may store a little later than the page asks for
    assert [row["label"] for row in saved(page, tmp_path / "l.csv")] == ["real", "fake"]


def test_a_name_is_typed_without_labelling(page):
    page.get_by_label("Your name").press_sequentially("Fred U. R")
    assert page.get_by_role("status").inner_text() == "Image 1 of 12, 0 labelled"


def test_nothing_on_the_page_tells_a_score_or_a_folder_and_nothing_is_fetched(page, tmp_path):
    shown = page.locator("main").inner_text()
    assert "fake/" not in shown and "0." not in shown
    assert {url.split(":")[0] for url in page.requests} == {"file"}
    names = {path.name for path in (tmp_path / "to_label").glob("*.jpg")}
    assert names == {f"{number:05d}.jpg" for number in range(1, 13)}
    order = [truth(image["path"]) for image in images_of(page)]
    assert order != sorted(order) and order != sorted(order, reverse=True)


@pytest.fixture
def labels(page, tmp_path):
    """labels.csv of all twelve images, with the right labels."""
    label_all(page)
    saved(page, tmp_path / "labels.csv")
    return tmp_path / "labels.csv"


def rewritten(labels, path, changes):
    """A copy of the table with some rows changed; `changes`: {number of a row: its new cells}."""
    with open(labels, newline="") as file:
        rows = list(csv.DictReader(file))
    for number, cells in changes.items():
        rows[number].update(cells)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def measure(place, tmp_path, monkeypatch, capsys):
    """Function: tables of labels -> (metrics.json, stdout, stderr) of evaluate.py."""
    monkeypatch.setattr(audit, "probe_all", lambda *_: [])
    monkeypatch.setattr(assess, "cross_validated_leak", lambda *_: None)

    def run(*labels):
        flags = ["--data_dir", str(place / "uploads"), "--labels_file", *map(str, labels)]
        flags += ["--model_path", str(place / "m.joblib"), "--report_dir", str(tmp_path / "out")]
        evaluate.main([*flags, "--robustness_images", "2"])
        report = json.loads((tmp_path / "out" / "metrics.json").read_text())
        return report, *capsys.readouterr()

    return run


def test_labels_of_a_draw_measure_the_whole_folder(labels, measure, tmp_path):
    report, out, _ = measure(labels)
    assert "the whole folder, estimated from 12 labels (" in out
    figures = report["whole_folder"]
    low, high = figures["prevalence"]["interval"]
    assert low < 0.3 < high
    with open(labels, newline="") as file:
        rows = list(csv.DictReader(file))
    weights = np.array([1 / float(row["probability"]) for row in rows])
    fakes = np.array([row["label"] == "fake" for row in rows])
    assert figures["prevalence"]["value"] == pytest.approx((weights * fakes).sum() / weights.sum())
    assert "The whole folder" in (tmp_path / "out" / "report.html").read_text()


def test_images_that_nobody_can_tell_are_left_out_and_counted(labels, measure, tmp_path):
    some = rewritten(labels, tmp_path / "some.csv", {0: {"label": "cannot tell"}})
    report, _, err = measure(some)
    assert report["overall"]["n"] == 11
    assert f"left out: 1 images of {some} that its author cannot tell" in err


def test_two_people_agree_so_far_and_disputed_images_are_left_out(labels, measure, tmp_path):
    doubts = {"label": "cannot tell"}
    second = rewritten(labels, tmp_path / "second.csv", {3: doubts, 7: doubts})
    report, _, err = measure(labels, second)
    assert report["overall"]["n"] == 10
    assert "two people agree on 10 of 12 images, Cohen's kappa 0." in err


def test_a_table_without_its_probabilities_is_refused(labels, place, script, tmp_path):
    bad = rewritten(labels, tmp_path / "bad.csv", {4: {"probability": ""}})
    flags = ["--data_dir", place / "uploads", "--model_path", place / "m.joblib"]
    result = script("evaluate.py", *flags, "--labels_file", bad)
    assert_one_line_error(result, "bad.csv", "no probability of its draw")


def test_part_of_the_labels_is_kept_for_test_and_stays_there(
    labels, place, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("CLIP_MODEL", str(small.CHECKPOINT))
    flags = ["--data_dir", str(place / "uploads"), "--labels_file", str(labels)]
    flags += ["--output_file", str(tmp_path / "f.npz"), "--keep_for_test", "0.5"]
    splits = []
    for _ in range(2):
        assert extract_features.main(flags) == 0
        columns = load_features(tmp_path / "f.npz")
        splits.append(dict(zip(columns["paths"], columns["splits"], strict=True)))
    assert set(splits[0].values()) == {"test", "train"} and splits[0] == splits[1]
    kept = list(splits[0].values()).count("test")
    said = f"kept for test: {kept} of 12 labelled images; the others train"
    assert capsys.readouterr().err.count(said) == 2


# ---- draws ----


def test_only_images_with_a_verdict_in_the_log_are_drawn(draw, place, tmp_path):
    files = sorted((place / "uploads").rglob("*.*"))[:5]
    events = [{"event": "verdict", "sha256": sha256(path.read_bytes())} for path in files]
    (tmp_path / "service.log").write_text("\n".join(map(json.dumps, [{"event": "x"}, *events])))
    result = draw("--log", tmp_path / "service.log", number=3)
    assert "3 of 5 different images of 5" in result.stdout, result.stderr
    (tmp_path / "to_label" / "index.html").unlink()
    (tmp_path / "service.log").write_text("")
    result = draw("--log", tmp_path / "service.log")
    assert_one_line_error(result, "--log", "no file of", "has a verdict there")


def test_tables_of_three_people_are_refused(place, script):
    flags = ["--data_dir", place / "uploads", "--model_path", place / "m.joblib"]
    result = script("evaluate.py", *flags, "--labels_file", "a.csv", "b.csv", "c.csv")
    assert_one_line_error(result, "--labels_file a.csv b.csv c.csv: takes the tables of one or two")


def test_a_folder_whose_images_all_trained_the_model_is_refused(draw, place, tmp_path):
    model = load_model(place / "m.joblib")
    (tmp_path / "seen").mkdir()
    for number, path in enumerate((place / "data").rglob("*.jpg")):
        if trained_on(model, [sha256(path.read_bytes())]).all():
            shutil.copy(path, tmp_path / "seen" / f"{number}.jpg")
    result = draw("--data_dir", tmp_path / "seen")
    assert_one_line_error(result, f"--data_dir {tmp_path / 'seen'}: no readable image is left")
    assert not list((tmp_path / "to_label").glob("*.jpg"))


def test_a_second_draw_into_one_folder_is_refused(draw, tmp_path):
    assert draw().returncode == 0
    assert_one_line_error(draw(), "to_label: holds a draw already; name another")


@pytest.mark.parametrize("flag, value", [("--number", "1"), ("--seed", "-1")])
def test_unfit_numbers_are_a_one_line_error(draw, flag, value):
    assert_one_line_error(draw(flag, value), f"{flag} {value}: must be at least")
