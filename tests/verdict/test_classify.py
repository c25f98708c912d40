"""classify.py as users run it: what it prints, what it refuses, and what it does without."""

import json
import os
import re
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

LINE = r"(real|fake) \(confidence [01]\.\d\d\)"
OFFLINE = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def trained(make_folder, tmp_path_factory):
    """A model trained here by the two commands before this one: real crops against crops with their channels swapped."""
    folder = tmp_path_factory.mktemp("trained")
    make_folder(
        folder / "data", {"train/real": 60, "train/fake": 60, "test/real": 30, "test/fake": 30}
    )
    for name, *args in (("extract_features.py", "--data_dir", "data"), ("train_model.py",)):
        env = {**os.environ, "CLIP_MODEL": str(small.CHECKPOINT), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, ROOT / name, *args],
            cwd=folder,
            env=env,
            check=True,
            capture_output=True,
            timeout=200,
        )
    return folder / "model.joblib"


@pytest.fixture
def classify(script):
    """Function: classify.py on the given paths, with the small model where no other is named."""

    def run(*paths, model=BASELINE, flags=(), **options):
        given = ["--model_path", model] if model else []
        return script("classify.py", "--image_path", *paths, *given, *flags, **options)

    return run


@pytest.fixture
def folder(photos, tmp_path):
    """Function: name -> folder with three photographs, one of them in a folder below."""

    def make(name="images"):
        (tmp_path / name / "below").mkdir(parents=True)
        for place, photo in (
            ("a.png", "coffee.png"),
            ("b.jpg", "china.jpg"),
            ("below/c.jpg", "rocket.jpg"),
        ):
            (tmp_path / name / place).write_bytes(photos[photo].read_bytes())
        return tmp_path / name

    return make


def assert_done(result, code=0):
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


# ---- what it prints ----


@pytest.mark.parametrize("model", ["baseline", "trained"])
def test_one_image_gives_one_line(request, classify, photos, model):
    model = BASELINE if model == "baseline" else request.getfixturevalue("trained")
    for photo in (photos["coffee.png"], photos["camera.png"]):  # in colour and in grey
        assert re.fullmatch(LINE + "\n", assert_done(classify(photo, model=model)))


def test_json_has_exactly_the_two_documented_keys(classify, photos):
    printed = assert_done(classify(photos["china.jpg"], flags=["--json"]))
    found = json.loads(printed)
    assert list(found) == ["classification", "confidence"] and printed.count("\n") == 1
    assert found["classification"] in ("real", "fake") and 0.5 <= found["confidence"] <= 1
    assert len(str(found["confidence"]).split(".")[1]) <= 4


def test_the_line_and_the_json_say_the_same(classify, photos):
    found = json.loads(assert_done(classify(photos["china.jpg"], flags=["--json"])))
    line = f"{found['classification']} (confidence {found['confidence']:.2f})\n"
    assert assert_done(classify(photos["china.jpg"])) == line


def test_several_images_give_a_line_each_with_its_path_in_the_order_given(classify, photos):
    paths = [str(photos[name]) for name in ("rocket.jpg", "coffee.png", "astronaut.png")]
    lines = assert_done(classify(*paths)).splitlines()
    assert [line.split(": ")[0] for line in lines] == paths
    assert all(re.fullmatch(LINE, line.split(": ")[1]) for line in lines)


def test_a_folder_gives_all_its_images_sorted(classify, folder):
    images = folder()
    lines = assert_done(classify(images)).splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"{images}/{name}" for name in ("a.png", "b.jpg", "below/c.jpg")
    ]


def test_several_as_json_give_one_object_a_line_with_the_path(classify, folder):
    images = folder()
    (images / "broken.jpg").write_bytes(b"not an image")
    rows = [
        json.loads(line)
        for line in assert_done(classify(images, flags=["--json"]), code=1).splitlines()
    ]
    assert [row.pop("path").removeprefix(f"{images}/") for row in rows] == [
        "a.png",
        "b.jpg",
        "below/c.jpg",
        "broken.jpg",
    ]
    assert [list(row) for row in rows] == [["classification", "confidence"]] * 3 + [["error"]]


def test_a_folder_with_one_image_is_answered_with_its_path(classify, photos, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.jpg").write_bytes(photos["rocket.jpg"].read_bytes())
    assert re.fullmatch(f"{tmp_path}/one/x.jpg: {LINE}\n", assert_done(classify(tmp_path / "one")))


def test_the_bytes_of_an_image_may_come_on_stdin(classify, photos):
    result = classify("-", stdin=photos["china.jpg"].read_bytes())
    assert result.returncode == 0 and result.stdout.decode() == assert_done(
        classify(photos["china.jpg"])
    )


def test_names_with_spaces_other_scripts_and_no_ending_are_taken(classify, photos, tmp_path):
    names = ["my photo", "фото.jpg", "写真.gif", "100%.jpg", "-dash.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(photos["rocket.jpg"].read_bytes())
    lines = assert_done(classify(*(tmp_path / name for name in names))).splitlines()
    assert [re.fullmatch(f"(.*): {LINE}", line)[1] for line in lines] == [
        str(tmp_path / name) for name in names
    ]


def test_help_fits_one_screen(script):
    lines = assert_done(script("classify.py", "--help", COLUMNS="80")).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80


# ---- details ----

DETAILS = ["p_fake", "threshold", "uncertain", "reason", "model_version", "notice", "provenance"]


@pytest.fixture
def moved(tmp_path):
    """Function: the small model with another threshold, band and name, and without its notice."""

    def save(**changes):
        model = {k: v for k, v in load_model(BASELINE).items() if k not in ("sha256", "notice")}
        save_model(
            tmp_path / "moved.joblib",
            {**model, "versions": {**model["versions"], "model": "v7.0.0"}, **changes},
        )
        return tmp_path / "moved.joblib"

    return save


def test_details_say_what_stands_behind_the_verdict(classify, photos):
    model, photo = load_model(BASELINE), photos["china.jpg"]
    plain, found = (
        json.loads(assert_done(classify(photo, flags=["--json", *more])))
        for more in ([], ["--details"])
    )
    assert list(plain) == ["classification", "confidence"] and list(found) == [*plain, *DETAILS]
    assert {name: found[name] for name in plain} == plain
    assert found["confidence"] == pytest.approx(
        found["p_fake"] if found["classification"] == "fake" else 1 - found["p_fake"], abs=1e-9
    )
    assert (
        found["threshold"] == round(model["threshold"], 4)
        and found["model_version"] == model["versions"]["model"]
    )
    assert found["uncertain"] == bool(model["band"][0] <= found["p_fake"] <= model["band"][1])
    assert found["notice"] == NOTICE


def test_the_line_with_details_says_the_same_as_the_json(classify, photos, moved):
    model, photo = moved(), photos["china.jpg"]
    found = json.loads(assert_done(classify(photo, model=model, flags=["--json", "--details"])))
    line = assert_done(classify(photo, model=model)).rstrip("\n")
    assert re.fullmatch(LINE, line)
    told = {
        **found,
        "notice": None,
        "provenance": provenance.in_words(found["provenance"]),
    }  # no notice here
    assert (
        assert_done(classify(photo, model=model, flags=["--details"]))
        == line
        + "".join(f"; {name} {told[name]}" for name in DETAILS if told[name] is not None)
        + "\n"
    )
    assert "notice" not in found and found["model_version"] == "v7.0.0"


def test_several_images_have_details_each_and_errors_stay_as_they_are(classify, folder):
    images = folder()
    (images / "broken.jpg").write_bytes(b"not an image")
    rows = [
        json.loads(line)
        for line in assert_done(
            classify(images, flags=["--json", "--details"]), code=1
        ).splitlines()
    ]
    assert [list(row) for row in rows] == [
        ["path", "classification", "confidence", *DETAILS]
    ] * 3 + [["path", "error"]]
    lines = assert_done(classify(images, flags=["--details"]), code=1).splitlines()
    assert [line.split("; ")[1] for line in lines] == [
        f"p_fake {row['p_fake']}" for row in rows[:3]
    ]


@pytest.mark.parametrize(
    "band, uncertain", [([0.0, 1.0], True), ([0.9999, 1.0], False), ([0.0, 0.0001], False)], ids=str
)
def test_uncertain_is_said_inside_the_band_and_changes_no_verdict(
    classify, photos, moved, band, uncertain
):
    given = {"model": moved(band=np.array(band)), "flags": ["--json", "--details"]}
    found = json.loads(assert_done(classify(photos["china.jpg"], **given)))
    assert found["uncertain"] is uncertain and 0.01 < found["p_fake"] < 0.99
    assert (
        found["classification"]
        == json.loads(assert_done(classify(photos["china.jpg"], flags=["--json"])))[
            "classification"
        ]
    )


# ---- which model ----


def test_without_a_model_path_the_shipped_baseline_answers_and_stderr_says_so(
    classify, photos, openai
):
    result = classify(photos["china.jpg"], model=None)
    assert assert_done(result) == assert_done(classify(photos["china.jpg"], model=SHIPPED_MODEL))
    assert "model: the shipped baseline" in result.stderr


def test_without_a_model_path_model_joblib_in_this_folder_comes_first(
    classify, photos, tmp_path, trained
):
    (tmp_path / "model.joblib").write_bytes(trained.read_bytes())
    result = classify(photos["china.jpg"], model=None, flags=["--json"])
    assert assert_done(result) == assert_done(
        classify(photos["china.jpg"], model=trained, flags=["--json"])
    )
    assert "model: model.joblib" in result.stderr


def test_with_a_model_path_nothing_is_said_about_the_choice(classify, photos):
    assert "model:" not in classify(photos["china.jpg"]).stderr


def test_a_demonstration_is_called_one_on_stderr_only(classify, photos):
    result = classify(photos["china.jpg"])
    assert f"note: {NOTICE}" in result.stderr and NOTICE not in result.stdout


def test_the_test_images_are_answered_as_the_training_measured_them(classify, trained):
    measured = json.loads((trained.parent / "model_report" / "metrics.json").read_text())["scores"][
        "p_fake"
    ]
    printed = assert_done(
        classify(trained.parent / "data" / "test", model=trained, flags=["--json"])
    )
    rows = [
        json.loads(line) for line in printed.splitlines()
    ]  # sorted by path, as the features are
    answered = [
        row["confidence"] if row["classification"] == "fake" else 1 - row["confidence"]
        for row in rows
    ]
    assert len(rows) == 60 and answered == pytest.approx(measured, abs=0.002)


# ---- which encoder ----


def test_the_encoder_is_found_in_the_cache_by_the_identity_that_the_model_names(
    classify, photos, tmp_path
):
    other_encoder()
    model = baseline_for(tmp_path / "other.joblib")
    result = classify(photos["china.jpg"], model=model)
    assert assert_done(result) == assert_done(classify(photos["china.jpg"]))
    assert "note:" not in result.stderr  # this one is no demonstration


def test_a_missing_encoder_is_one_line_that_names_the_command(classify, photos, tmp_path):
    result = classify(
        photos["china.jpg"], model=baseline_for(tmp_path / "other.joblib", name="mine")
    )
    cache = tmp_path / "home" / ".clip"
    assert_one_line_error(result, "mine", "cdcdcdcdcdcd", cache, "prepare_clip.py")


@pytest.mark.parametrize("setting", ["ViT-L/14", "nonsense", "small", ""])
def test_clip_model_plays_no_part(classify, photos, setting):
    assert assert_done(classify(photos["china.jpg"], CLIP_MODEL=setting)) == assert_done(
        classify(photos["china.jpg"])
    )


# ---- what it does without ----


@pytest.fixture
def without(tmp_path):
    """Function: environment in which importing any of these packages fails, and is told on stderr."""

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


@pytest.mark.parametrize("several", [False, True], ids=["one image", "a folder"])
def test_neither_torch_nor_sklearn_nor_joblib_is_imported(
    classify, folder, photos, without, several
):
    blocked = without("torch", "torchvision", "sklearn", "joblib", "clip", "scipy", "matplotlib")
    result = classify(folder() if several else photos["china.jpg"], **blocked)
    assert_done(result)
    assert "IMPORTED" not in result.stderr


def test_the_block_above_does_block(without):
    code = "import sklearn"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **without("sklearn")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "IMPORTED sklearn" in result.stderr


def test_a_missing_resnet_without_torch_is_one_line_that_says_what_to_install(
    classify, photos, tmp_path, without
):
    model = baseline_for(tmp_path / "m.joblib", name="RN50")
    result = classify(photos["china.jpg"], model=model, **without("torch"), **OFFLINE)
    assert_one_line_error(result, "RN50", "torch", "pip install -r requirements.txt")


def test_a_missing_vit_that_cannot_be_fetched_is_one_line_with_the_way_out(
    classify, photos, tmp_path, without
):
    model = baseline_for(tmp_path / "m.joblib", name="ViT-L/14")
    result = classify(photos["china.jpg"], model=model, **without("torch"), **OFFLINE)
    assert_one_line_error(result, "ViT-L/14", "cannot download", "--weights")
    assert "IMPORTED" not in result.stderr


# ---- refusals ----


@pytest.fixture
def spoilt(photos, tmp_path):
    """Function: kind -> a file that cannot be classified."""

    def make(kind, name="x.jpg"):
        data = photos["china.jpg"].read_bytes()
        content = {
            "text": b"hello",
            "empty": b"",
            "truncated": data[: len(data) // 2],
            "a header only": data[:100],
        }
        (tmp_path / name).write_bytes(content[kind])
        return tmp_path / name

    return make


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "a header only"])
def test_a_single_bad_image_is_one_line_and_exit_code_1(classify, spoilt, kind):
    path = spoilt(kind)
    result = classify(path, flags=["--json"])
    assert_one_line_error(result, path, code=1)
    assert result.stdout == ""


def test_bad_bytes_on_stdin_are_one_line_and_exit_code_1(classify):
    assert_one_line_error(classify("-", stdin=b"hello"), "not an image format", code=1)


def test_an_image_of_too_many_pixels_is_refused_with_its_size(classify, photos):
    assert_one_line_error(
        classify(photos["china.jpg"], flags=["--max_pixels", "1000"]), "640 x 427", "1,000", code=1
    )


def test_bad_images_among_others_are_told_and_the_exit_code_is_1(classify, spoilt, photos):
    good, bad, missing = photos["china.jpg"], spoilt("truncated"), spoilt("text", "y.png")
    result = classify(bad, good, missing)
    assert re.fullmatch(f"{good}: {LINE}\n", assert_done(result, code=1))
    assert f"{bad}: error: " in result.stderr and f"{missing}: error: " in result.stderr
    assert "2 of 3 images could not be read" in result.stderr


def test_only_bad_images_still_say_each_why(classify, spoilt):
    result = classify(spoilt("text"), spoilt("empty", "y.png"))
    assert assert_done(result, code=1) == "" and result.stderr.count(": error: ") == 2


@pytest.mark.parametrize(
    "path, words",
    [("nowhere.jpg", ["nowhere.jpg", "no such file"]), ("empty", ["empty", "the folder is empty"])],
)
def test_what_is_not_there_is_one_line(classify, photos, tmp_path, path, words):
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


def test_a_model_is_refused_before_it_runs_anything(classify, photos, tmp_path):
    (tmp_path / "m.joblib").write_bytes(b"cos\nmkdir\n(S'ran'\ntR.")
    assert_one_line_error(
        classify(photos["china.jpg"], model="m.joblib"), "m.joblib", "may be planted"
    )
    assert not (tmp_path / "ran").exists()


def test_without_an_image_the_usage_is_shown(script):
    result = script("classify.py")
    assert result.returncode == 2 and "--image_path" in result.stderr


def test_the_answer_is_the_documented_json():
    assert json.dumps(answer("real", 0.95)) == '{"classification": "real", "confidence": 0.95}'
