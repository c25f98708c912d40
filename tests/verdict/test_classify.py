"""classify.py as users run it: its output, its errors, and the packages it does without."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small
from commands import ROOT, assert_one_line_error
from made_up import BASELINE, NOTICE, baseline_for, other_encoder

from detector.images import provenance
from detector.model.file import load_model, save_model
from detector.verdict import SHIPPED_MODEL, answer

LINE = r"(real|fake) \(confidence [01]\.\d\d(, uncertain)?\)"
OFFLINE = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def trained(make_folder, tmp_path_factory):
    """A model that the other two commands train here: crops against crops with swapped channels."""
    folder = tmp_path_factory.mktemp("trained")
    counts = {"train/real": 60, "train/fake": 60, "test/real": 30, "test/fake": 30}
    make_folder(folder / "data", counts)
    env = {**os.environ, "CLIP_MODEL": str(small.CHECKPOINT), "OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": env, "check": True, "capture_output": True, "timeout": 200}
    for name, *args in (("extract_features.py", "--data_dir", "data"), ("train_model.py",)):
        subprocess.run([sys.executable, ROOT / name, *args], **options)
    return folder / "model.joblib"


@pytest.fixture
def classify(script):
    """Function: classify.py on the given paths, with the small model by default."""

    def run(*paths, model=BASELINE, flags=(), **options):
        given = ["--model_path", model] if model else []
        return script("classify.py", "--image_path", *paths, *given, *flags, **options)

    return run


PLACES = {"a.png": "coffee.png", "b.jpg": "china.jpg", "below/c.jpg": "rocket.jpg"}


@pytest.fixture
def folder(photos, tmp_path):
    """A folder with three photographs. One of them is in a subfolder."""
    (tmp_path / "images" / "below").mkdir(parents=True)
    for place, photo in PLACES.items():
        shutil.copy(photos[photo], tmp_path / "images" / place)
    return tmp_path / "images"


def assert_done(result, code=0):
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


def objects(result, code=0):
    """The JSON objects of a command's output, one a line."""
    return [json.loads(line) for line in assert_done(result, code).splitlines()]


# ---- output ----


@pytest.mark.parametrize("model", ["baseline", "trained"])
def test_one_image_gives_one_line(request, classify, photos, model):
    model = BASELINE if model == "baseline" else request.getfixturevalue("trained")
    for photo in (photos["coffee.png"], photos["camera.png"]):  # in colour and in grey
        assert re.fullmatch(LINE + "\n", assert_done(classify(photo, model=model)))


def test_json_has_exactly_the_two_documented_keys(classify, photos):
    (verdict,) = objects(classify(photos["china.jpg"], flags=["--json"]))
    assert list(verdict) == ["classification", "confidence"]
    assert verdict["classification"] in ("real", "fake") and 0.5 <= verdict["confidence"] <= 1
    assert len(str(verdict["confidence"]).split(".")[1]) <= 4


def test_the_line_and_the_json_agree(classify, photos):
    (verdict,) = objects(classify(photos["china.jpg"], flags=["--json"]))
    line = f"{verdict['classification']} (confidence {verdict['confidence']:.2f})\n"
    assert assert_done(classify(photos["china.jpg"])).replace(", uncertain", "") == line


def test_several_images_give_a_line_each_with_its_path_in_order(classify, photos):
    paths = [str(photos[name]) for name in ("rocket.jpg", "coffee.png", "astronaut.png")]
    lines = assert_done(classify(*paths)).splitlines()
    assert [line.split(": ")[0] for line in lines] == paths
    assert all(re.fullmatch(LINE, line.split(": ")[1]) for line in lines)


def test_a_folder_gives_all_its_images_sorted(classify, folder):
    lines = assert_done(classify(folder)).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{folder}/{name}" for name in PLACES]


def test_several_images_as_json_give_an_object_a_line_with_the_path(classify, folder):
    (folder / "broken.jpg").write_bytes(b"not an image")
    rows = objects(classify(folder, flags=["--json"]), code=1)
    paths = [row.pop("path").removeprefix(f"{folder}/") for row in rows]
    assert paths == [*PLACES, "broken.jpg"]
    assert [list(row) for row in rows] == [["classification", "confidence"]] * 3 + [["error"]]


def test_a_folder_with_a_single_image_gives_its_path(classify, photos, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(photos["rocket.jpg"], tmp_path / "one" / "x.jpg")
    assert re.fullmatch(f"{tmp_path}/one/x.jpg: {LINE}\n", assert_done(classify(tmp_path / "one")))


def test_the_bytes_of_an_image_may_come_on_stdin(classify, photos):
    result = classify("-", stdin=photos["china.jpg"].read_bytes())
    assert result.returncode == 0
    assert result.stdout.decode() == assert_done(classify(photos["china.jpg"]))


def test_names_with_spaces_and_other_scripts_are_accepted(classify, photos, tmp_path):
    names = ["my photo", "фото.jpg", "写真.gif", "100%.jpg", "-dash.jpg"]
    for name in names:
        shutil.copy(photos["rocket.jpg"], tmp_path / name)
    paths = [str(tmp_path / name) for name in names]
    lines = assert_done(classify(*paths)).splitlines()
    assert [re.fullmatch(f"(.*): {LINE}", line)[1] for line in lines] == paths


def test_help_fits_one_screen(script):
    lines = assert_done(script("classify.py", "--help", COLUMNS="80")).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80


# ---- details ----

DETAILS = ["p_fake", "threshold", "uncertain", "reason", "model_version", "notice", "provenance"]


@pytest.fixture
def moved(tmp_path):
    """Function: changes -> the small model with these changes, as v7.0.0 without its notice."""

    def save(**changes):
        model = load_model(BASELINE)
        del model["notice"]
        changes["versions"] = {**model["versions"], "model": "v7.0.0"}
        save_model(tmp_path / "moved.joblib", model | changes)
        return tmp_path / "moved.joblib"

    return save


def test_details_explain_the_verdict(classify, photos):
    model, photo = load_model(BASELINE), photos["china.jpg"]
    (plain,) = objects(classify(photo, flags=["--json"]))
    (detailed,) = objects(classify(photo, flags=["--json", "--details"]))
    assert list(detailed) == ["classification", "confidence", *DETAILS]
    assert {name: detailed[name] for name in plain} == plain
    p_fake, low, high = detailed["p_fake"], *model["band"]
    confidence = p_fake if detailed["classification"] == "fake" else 1 - p_fake
    assert detailed["confidence"] == pytest.approx(confidence, abs=1e-9)
    assert detailed["threshold"] == round(model["threshold"], 4)
    assert detailed["model_version"] == model["versions"]["model"]
    assert detailed["uncertain"] == bool(low <= p_fake <= high) and detailed["notice"] == NOTICE


def test_the_line_with_details_agrees_with_the_json(classify, photos, moved):
    model, photo = moved(), photos["china.jpg"]
    (verdict,) = objects(classify(photo, model=model, flags=["--json", "--details"]))
    line = assert_done(classify(photo, model=model)).rstrip("\n")
    assert re.fullmatch(LINE, line)
    assert "notice" not in verdict and verdict["model_version"] == "v7.0.0"
    values = verdict | {"provenance": provenance.in_words(verdict["provenance"])}
    shown = [name for name in DETAILS if values.get(name) is not None]
    expected = line + "".join(f"; {name} {values[name]}" for name in shown) + "\n"
    assert assert_done(classify(photo, model=model, flags=["--details"])) == expected


def test_each_of_several_images_has_details_and_errors_do_not(classify, folder):
    (folder / "broken.jpg").write_bytes(b"not an image")
    rows = objects(classify(folder, flags=["--json", "--details"]), code=1)
    keys = ["path", "classification", "confidence", *DETAILS]
    assert [list(row) for row in rows] == [keys] * 3 + [["path", "error"]]
    lines = assert_done(classify(folder, flags=["--details"]), code=1).splitlines()
    shown = [line.split("; ")[1] for line in lines]
    assert shown == [f"p_fake {row['p_fake']}" for row in rows[:3]]


@pytest.mark.parametrize(
    "band, uncertain", [([0.0, 1.0], True), ([0.9999, 1.0], False), ([0.0, 0.0001], False)], ids=str
)
def test_a_verdict_in_the_band_is_uncertain_but_the_same(classify, photos, moved, band, uncertain):
    photo, model = photos["china.jpg"], moved(band=np.array(band))
    (verdict,) = objects(classify(photo, model=model, flags=["--json", "--details"]))
    assert verdict["uncertain"] is uncertain and 0.01 < verdict["p_fake"] < 0.99
    (plain,) = objects(classify(photo, flags=["--json"]))
    assert verdict["classification"] == plain["classification"]
    assert (", uncertain)" in assert_done(classify(photo, model=model))) is uncertain


@pytest.mark.parametrize(
    "review, decision", [("0.99 1", "pass"), ("0 1", "review"), ("0 0", "reject")]
)
def test_two_thresholds_give_a_decision(classify, photos, review, decision):
    flags = ["--json", "--review", *review.split()]
    (verdict,) = objects(classify(photos["china.jpg"], flags=flags))
    assert verdict["decision"] == decision
    assert verdict.keys() - {"decision"} == {"classification", "confidence", *DETAILS}


def test_thresholds_of_a_decision_in_the_wrong_order_are_a_one_line_error(classify, photos):
    result = classify(photos["china.jpg"], flags=["--review", "0.8", "0.2"])
    assert_one_line_error(result, "--review 0.8 0.2: must be two probabilities, the lower first")


# ---- which model ----


def test_the_default_model_is_the_shipped_baseline(classify, photos, openai):
    result = classify(photos["china.jpg"], model=None)
    assert assert_done(result) == assert_done(classify(photos["china.jpg"], model=SHIPPED_MODEL))
    assert "model: the shipped baseline" in result.stderr


def test_model_joblib_in_this_folder_comes_before_the_baseline(classify, photos, tmp_path, trained):
    shutil.copy(trained, tmp_path / "model.joblib")
    result = classify(photos["china.jpg"], model=None, flags=["--json"])
    expected = classify(photos["china.jpg"], model=trained, flags=["--json"])
    assert assert_done(result) == assert_done(expected)
    assert "model: model.joblib" in result.stderr


def test_with_a_model_path_stderr_has_the_notice_but_no_choice(classify, photos):
    result = classify(photos["china.jpg"])
    assert "model:" not in result.stderr
    assert f"note: {NOTICE}" in result.stderr and NOTICE not in result.stdout


def test_the_test_images_get_the_probabilities_of_the_training_report(classify, trained):
    report = json.loads((trained.parent / "model_report" / "metrics.json").read_text())
    test = trained.parent / "data" / "test"  # sorted by path, as the features are
    rows = objects(classify(test, model=trained, flags=["--json", "--details"]))
    p_fake = [row["p_fake"] for row in rows]
    assert len(rows) == 60 and p_fake == pytest.approx(report["scores"]["p_fake"], abs=0.002)


# ---- which encoder ----


def test_the_models_identity_selects_the_encoder_of_the_cache(classify, photos, tmp_path):
    other_encoder()
    model = baseline_for(tmp_path / "other.joblib")
    result = classify(photos["china.jpg"], model=model)
    assert assert_done(result) == assert_done(classify(photos["china.jpg"]))
    assert "note:" not in result.stderr  # the model has no notice


def test_a_missing_encoder_is_one_line_that_names_the_command(classify, photos, tmp_path):
    model = baseline_for(tmp_path / "other.joblib", name="mine")
    result = classify(photos["china.jpg"], model=model)
    cache = tmp_path / "home" / ".clip"
    assert_one_line_error(result, "mine", "cdcdcdcdcdcd", cache, "prepare_clip.py")


@pytest.mark.parametrize("in_cache", [True, False])
def test_a_model_of_an_int8_encoder_is_one_line(classify, photos, tmp_path, in_cache):
    """Earlier versions made int8 encoders."""
    if in_cache:
        other_encoder("mine int8", precision="int8")
    model = baseline_for(tmp_path / "old.joblib", name="mine int8")
    result = classify(photos["china.jpg"], model=model)
    words = "int8 is no longer supported: extract features with 'mine' and train again"
    assert_one_line_error(result, model, "'mine int8'", words)


@pytest.mark.parametrize("setting", ["ViT-L/14", "nonsense", "small", ""])
def test_clip_model_has_no_effect(classify, photos, setting):
    result = classify(photos["china.jpg"], CLIP_MODEL=setting)
    assert assert_done(result) == assert_done(classify(photos["china.jpg"]))


# ---- packages ----


@pytest.fixture
def without(tmp_path):
    """Function: packages -> environment in which their import fails and is reported on stderr."""

    def environment(*packages):
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(
            "import sys\n"
            "class Refuse:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name in {packages!r}:\n"
            "            print('IMPORTED', name, file=sys.stderr)\n"
            "            raise ImportError(f'{name} is not here')\n"
            "sys.meta_path.insert(0, Refuse())\n"
        )
        return {"PYTHONPATH": str(tmp_path / "site")}

    return environment


@pytest.mark.parametrize("place", ["b.jpg", "."], ids=["one image", "a folder"])
def test_neither_torch_nor_sklearn_nor_joblib_is_imported(classify, folder, without, place):
    blocked = without("torch", "torchvision", "sklearn", "joblib", "clip", "scipy", "matplotlib")
    result = classify(folder / place, **blocked)
    assert_done(result)
    assert "IMPORTED" not in result.stderr


def test_the_fixture_above_blocks_an_import(without):
    command, env = [sys.executable, "-c", "import sklearn"], {**os.environ, **without("sklearn")}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 1 and "IMPORTED sklearn" in result.stderr


@pytest.mark.parametrize(
    "name, words, imported",
    [
        ("RN50", ["torch", "pip install -r requirements.txt"], True),
        ("ViT-L/14", ["cannot download", "--weights"], False),
    ],
)
def test_a_missing_encoder_that_cannot_be_made_is_one_line_with_the_remedy(
    classify, photos, tmp_path, without, name, words, imported
):
    model = baseline_for(tmp_path / "m.joblib", name=name)
    result = classify(photos["china.jpg"], model=model, **without("torch"), **OFFLINE)
    assert_one_line_error(result, name, *words)
    assert ("IMPORTED" in result.stderr) == imported


# ---- refusals ----


@pytest.fixture
def spoilt(photos, tmp_path):
    """Function: kind -> a file that cannot be classified."""

    def make(kind, name="x.jpg"):
        data = b"hello" if kind == "text" else photos["china.jpg"].read_bytes()
        length = {"text": 5, "empty": 0, "truncated": len(data) // 2, "header only": 100}[kind]
        (tmp_path / name).write_bytes(data[:length])
        return tmp_path / name

    return make


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "header only"])
def test_a_single_bad_image_is_one_line_and_exit_code_1(classify, spoilt, kind):
    path = spoilt(kind)
    result = classify(path, flags=["--json"])
    assert_one_line_error(result, path, code=1)
    assert result.stdout == ""


def test_bad_bytes_on_stdin_are_one_line_and_exit_code_1(classify):
    assert_one_line_error(classify("-", stdin=b"hello"), "not an image format", code=1)


def test_an_image_of_too_many_pixels_is_refused_with_its_size(classify, photos):
    result = classify(photos["china.jpg"], flags=["--max_pixels", "1000"])
    assert_one_line_error(result, "640 x 427", "1,000", code=1)


def test_bad_images_among_others_are_reported_with_exit_code_1(classify, spoilt, photos):
    good, bad, missing = photos["china.jpg"], spoilt("truncated"), spoilt("text", "y.png")
    result = classify(bad, good, missing)
    assert re.fullmatch(f"{good}: {LINE}\n", assert_done(result, code=1))
    assert f"{bad}: error: " in result.stderr and f"{missing}: error: " in result.stderr
    assert "2 of 3 images could not be read" in result.stderr


def test_each_of_several_bad_images_has_its_error(classify, spoilt):
    result = classify(spoilt("text"), spoilt("empty", "y.png"))
    assert assert_done(result, code=1) == "" and result.stderr.count(": error: ") == 2


@pytest.mark.parametrize(
    "path, words",
    [("nowhere.jpg", ["nowhere.jpg", "no such file"]), ("empty", ["empty", "the folder is empty"])],
)
def test_a_missing_or_empty_path_is_one_line(classify, photos, tmp_path, path, words):
    (tmp_path / "empty").mkdir()
    for paths in ([path], [photos["china.jpg"], path]):
        assert_one_line_error(classify(*paths), "--image_path", *words)


@pytest.mark.parametrize(
    "content, words",
    [(None, ["no such file", "train_model.py"]), (b"hello", ["not a model file"])],
    ids=["missing", "text"],
)
def test_a_bad_model_is_one_line(classify, photos, tmp_path, content, words):
    path = tmp_path / "m.joblib"
    if content:
        path.write_bytes(content)
    assert_one_line_error(classify(photos["china.jpg"], model=path), path, *words)


def test_a_planted_model_is_refused_before_it_runs(classify, photos, tmp_path):
    (tmp_path / "m.joblib").write_bytes(b"cos\nmkdir\n(S'ran'\ntR.")
    result = classify(photos["china.jpg"], model="m.joblib")
    assert_one_line_error(result, "m.joblib", "may be planted")
    assert not (tmp_path / "ran").exists()


def test_without_an_image_the_usage_is_shown(script):
    result = script("classify.py")
    assert result.returncode == 2 and "--image_path" in result.stderr


def test_the_answer_is_the_documented_json():
    assert json.dumps(answer("real", 0.95)) == '{"classification": "real", "confidence": 0.95}'
