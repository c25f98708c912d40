"""Promotion by the paired comparison: better, worse, too few images, and golden.py's check.

The registry is a file. test_registry.py tests a server.
"""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from live import Live
from made_up import write_features
from standins import make_models, tinted

import golden
import registry
from detector.base.errors import UsageError
from detector.model.file import load_model
from detector.registry import champion as records
from detector.registry import store

pytestmark = [  # MLflow starts slowly, and calls functions that SQLAlchemy deprecates
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
]


@pytest.fixture
def server():
    """None is needed here."""
    return SimpleNamespace(address="")


@pytest.fixture(autouse=True)
def here(address, monkeypatch, tmp_path):
    """The registry is a file in a folder of this test's own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/here/mlflow.db")


@pytest.fixture
def run(capsys):
    """Function: run('promote', 'v1.1.0', ...) on model d -> (exit code, stdout, stderr)."""

    def call(command, *words):
        capsys.readouterr()
        code = registry.main([command, "d", *map(str, words)])
        return code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def champion(run):
    """Function: register model files, the first of them as champion -> its number."""

    def call(*paths):
        for path in paths:
            run("register", path)
        run("promote", "1", "--force", "a start")

    return call


def number():
    return records.champion_number(store.connect(), "d")


def noisy(model, amount, seed=0):
    """The model's coefficients with noise: it ranks images worse, by `amount` of their size."""
    coef = model["coef"]
    noise = np.random.default_rng(seed).normal(0, np.abs(coef).max(), len(coef))
    return coef + amount * noise


# ---- the three outcomes ----


def test_a_better_version_is_promoted_and_a_worse_one_refused(run, champion, place, variant):
    poor = variant("v0.1.0", coef=noisy(load_model(place / "good.joblib"), 1.5))
    champion(poor, place / "good.joblib")
    golden_file = "--golden", place / "golden.npz"
    code, out, err = run("promote", "v1.0.0", *golden_file)
    assert code == 0 and number() == "2", err
    assert "v1.0.0 (number 2, commit 0123456789ab) is champion, better than d v0.1.0" in out
    code, out, err = run("promote", "v0.1.0", *golden_file)
    assert (code, out, number()) == (1, "", "2")
    line = r"d v0\.1\.0 \(.*\) is worse than the champion, d v1\.0\.0 \(.*\): .* changes by -0\."
    assert re.search(line, err), err
    last = err.splitlines()[-1]
    assert "d v0.1.0" in last and "is not promoted (--force WHY promotes it all the same)" in last


def test_too_few_images_promote_nothing_and_say_how_many_are_needed(run, champion, place, tmp_path):
    champion(place / "good.joblib", place / "better.joblib")
    few = write_features(tmp_path / "few.npz", seed=9, real=20, fake=20, splits=False)
    code, out, err = run("promote", "v1.1.0", "--golden", few)
    assert (code, out, number()) == (1, "", "1")
    needed = int(re.search(r"too few images to tell, about (\d+) are needed", err)[1])
    assert needed > 40
    enough = {"real": needed // 2 + 1, "fake": needed // 2 + 1, "splits": False}
    enough = write_features(tmp_path / "enough.npz", seed=9, **enough)
    code, out, _ = run("promote", "v1.1.0", "--golden", enough)
    assert (code, number()) == (0, "2") and "is champion, no worse than d v1.0.0" in out


def test_a_version_worse_on_every_metric_is_not_promoted_as_no_worse(
    run, champion, place, variant, tmp_path
):
    """AUC 0.88 and 0.82 on 120 images: each lies inside the other's interval."""
    model = load_model(place / "good.joblib")
    candidate = variant("v1.5.0", coef=noisy(model, 0.5))
    champion(place / "good.joblib", candidate)
    few = write_features(tmp_path / "few.npz", seed=9, real=60, fake=60, gap=1.7, splits=False)
    code, out, err = run("promote", "v1.5.0", "--golden", few, "--margin", "0.03")
    assert (code, out, number()) == (1, "", "1"), err
    assert "is worse than" in err or "too few images to tell" in err


def test_a_wider_margin_promotes_what_is_worse_within_it_and_says_so(
    run, champion, place, variant, tmp_path
):
    model = load_model(place / "good.joblib")
    champion(place / "good.joblib", variant("v1.5.0", coef=noisy(model, 1.0)))
    many = write_features(tmp_path / "many.npz", seed=9, real=3000, fake=3000, splits=False)
    code, _, err = run("promote", "v1.5.0", "--golden", many, "--margin", "0.001")
    assert code == 1 and "is worse than the champion" in err
    code, out, err = run("promote", "v1.5.0", "--golden", many, "--margin", "0.2")
    assert code == 0 and "is champion, worse, but within the margin, than d v1.0.0" in out, err


@pytest.mark.parametrize("margin", ["0", "-0.1", "1", "nan"])
def test_a_margin_that_is_no_share_is_refused(run, margin):
    with pytest.raises(UsageError, match=f"--margin {margin}: must lie between 0 and 1"):
        run("promote", "v1.0.0", "--golden", "golden.npz", "--margin", margin)


def test_versions_of_two_encoders_need_a_folder(run, champion, place, variant):
    encoder = {**load_model(place / "good.joblib")["encoder"], "identity": "cd" * 32}
    champion(place / "good.joblib", variant("v1.5.0", encoder=encoder))
    words = "golden.npz: the versions have two encoders, and a features file fits one: name the"
    with pytest.raises(UsageError, match=words):
        run("promote", "v1.5.0", "--golden", place / "golden.npz")


def test_an_error_names_the_version_and_not_its_file(run, champion, place, variant, tmp_path):
    champion(variant("v1.5.0", crops=2), place / "good.joblib")
    (tmp_path / "f").mkdir()
    for label in ("real", "fake"):
        (tmp_path / "f" / label).mkdir()
        (tmp_path / "f" / label / "a.jpg").write_bytes(b"")
    with pytest.raises(Exception, match=r"^d v1\.5\.0 \(number 1, commit 0123456789ab\) was") as e:
        run("promote", "v1.0.0", "--golden", tmp_path / "f")
    assert "model.joblib" not in str(e.value)


# ---- golden.py on the same images ----


def with_floor(model, floor):
    overall = {"balanced_accuracy": {"value": 0.99, "interval": [floor, 1.0], "n": 40}}
    return {**model["metrics"], "overall": overall}


def test_a_version_below_its_floor_is_refused_unless_the_champion_is_too(
    run, champion, place, variant
):
    model = load_model(place / "good.joblib")
    high = variant("v1.5.0", metrics=with_floor(model, 0.999))
    higher = variant("v1.6.0", metrics=with_floor(model, 0.9999))
    champion(place / "good.joblib", high, higher)
    golden_file = "--golden", place / "golden.npz"
    code, out, err = run("promote", "v1.5.0", *golden_file)
    assert (code, out, number()) == (1, "", "1")
    assert "is no worse than the champion" in err and "is below the floor 0.999" in err
    run("promote", "v1.5.0", "--force", "the floor is of another test")
    code, out, err = run("promote", "v1.6.0", *golden_file)
    assert (code, number()) == (0, "3")
    assert "; so is the champion, on the same images" in err


def test_a_first_version_below_its_floor_is_refused(run, place, variant):
    model = load_model(place / "good.joblib")
    run("register", variant("v1.5.0", metrics=with_floor(model, 0.999)))
    code, out, err = run("promote", "v1.5.0", "--golden", place / "golden.npz")
    assert (code, out, number()) == (1, "", None) and "is below the floor 0.999" in err


@pytest.fixture(scope="module")
def pictures(make_folder, tmp_path_factory):
    """Golden images that trained no model, and models of the small encoder with reports."""
    place = make_models(tmp_path_factory.mktemp("pictures"), make_folder)
    counts = {"real": 60, "fake": 60}
    tinted(make_folder(place / "golden", counts, seed=5))
    for name in ("good", "worse", "untested"):
        model = load_model(place / f"{name}.joblib")
        report = {
            "model_version": model["versions"]["model"],
            "code": model["versions"]["code"],
            "training_data": {"sha256": model["training_data"]["sha256"]},
            "threshold": model["threshold"],
            "split": "made up",
            **dict.fromkeys(("known", "unseen", "degraded")),
            "overall": load_model(place / "good.joblib")["metrics"]["overall"],
        }
        (place / f"{name}_report").mkdir()
        (place / f"{name}_report" / "metrics.json").write_text(json.dumps(report))
    return place


def test_golden_and_promote_say_the_same_of_the_same_folder(
    run, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name, version, promoted in (("good", "v1.0.0", 0), ("worse", "v1.1.0", 1)):
        run("register", pictures / f"{name}.joblib", "--allow_dirty")
        code, _, err = run("promote", version, "--golden", pictures / "golden")
        (tmp_path / name).mkdir()
        live = Live(tmp_path / name, MODEL_PATH=str(pictures / f"{name}.joblib"))
        try:
            red = golden.main(["--url", live.url, "--data_dir", str(pictures / "golden")])
            out = capsys.readouterr().out
        finally:
            assert live.stop() == 0
        assert code == red == promoted, err
        rows = [
            next(line.split() for line in text.splitlines() if line.startswith(f"{version} "))
            for text in (out, err)
        ]
        assert rows[0] == rows[1]  # of the same table


def test_a_golden_folder_with_an_image_that_cannot_be_read_is_refused(run, pictures, tmp_path):
    broken = shutil.copytree(pictures / "golden", tmp_path / "broken")
    (broken / "real/000.jpg").write_bytes((broken / "real/000.jpg").read_bytes()[:400])
    run("register", pictures / "good.joblib", "--allow_dirty")
    with pytest.raises(UsageError, match="broken: holds images that cannot be read .*mend or"):
        run("promote", "v1.0.0", "--golden", broken)
    assert number() is None


def test_a_golden_folder_with_a_picture_under_both_labels_is_refused(run, pictures, tmp_path):
    both = shutil.copytree(pictures / "golden", tmp_path / "both")
    shutil.copy(both / "real/001.jpg", both / "fake/x.jpg")
    run("register", pictures / "good.joblib", "--allow_dirty")
    words = "--golden .*both: fake/x.jpg and real/001.jpg are one picture under both labels"
    with pytest.raises(UsageError, match=words):
        run("promote", "v1.0.0", "--golden", both)
    assert number() is None


def test_a_version_without_test_metrics_has_no_floor(run, pictures):
    run("register", pictures / "untested.joblib", "--allow_dirty")
    code, out, _ = run("promote", "v0.9.0", "--golden", pictures / "golden")
    assert code == 0 and "is champion, the first" in out


# ---- the list ----


def figures(run):
    """The list's lines by version."""
    lines = run("list")[1].splitlines()[2:]
    return {line.split()[0]: line for line in lines}


def with_test_set(path, digest):
    """Give the report of a model file another hash of its test images; None removes it."""
    file = path.with_name(f"{path.stem}_report") / "metrics.json"
    report = json.loads(file.read_text())
    del report["test_images"]
    file.write_text(json.dumps(report | ({"test_images": digest} if digest else {})))
    return path


def test_the_list_names_each_test_set_and_marks_what_cannot_be_compared(
    run, champion, place, variant
):
    other = with_test_set(variant("v1.5.0"), "f" * 64)
    unknown = with_test_set(variant("v1.6.0"), None)
    champion(place / "good.joblib", place / "better.joblib", other, unknown)
    lines = figures(run)
    digest = json.loads((place / "good_report/metrics.json").read_text())["test_images"][:8]
    assert all(f"  {digest} (40 images)  " in lines[version] for version in ("v1.0.0", "v1.1.0"))
    assert "  ffffffff (40 images)  " in lines["v1.5.0"]
    assert "  unknown (40 images)  " in lines["v1.6.0"]
    marks = {version: "not comparable with v1.0.0" in line for version, line in lines.items()}
    assert marks == {"v1.0.0": False, "v1.1.0": False, "v1.5.0": True, "v1.6.0": True}
    run("promote", "v1.5.0", "--force", "the mark follows the champion")
    lines = figures(run)
    marks = {version: "not comparable with v1.5.0" in line for version, line in lines.items()}
    assert marks == {"v1.0.0": True, "v1.1.0": True, "v1.5.0": False, "v1.6.0": True}


def test_without_a_champion_the_newest_version_is_the_one_to_compare_with(run, place, variant):
    run("register", place / "good.joblib")
    run("register", with_test_set(variant("v1.5.0"), "f" * 64))
    lines = figures(run)
    assert lines["v1.0.0"].endswith("not comparable with v1.5.0")
    assert "not comparable" not in lines["v1.5.0"]
