"""Versions in a registry on a live MLflow server: register, promote, roll back, pull, list."""

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import assert_one_line_error
from made_up import COMMIT
from racing import one_of_two_is_promoted, one_of_two_is_registered

import registry
from detector.base.errors import UsageError
from detector.model.file import load_model
from detector.model.signature import signature_path
from detector.registry import champion as records
from detector.registry import store

pytestmark = pytest.mark.long  # MLflow starts slowly


@pytest.fixture
def run(request, place, capsys):
    """Function: run('register', 'good') -> (exit code, stdout), on a name of this test's own.

    Words that name a file of `place` become its path.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", request.node.name)[:64]

    def path_of(word):
        files = [place / f"{word}.joblib", place / word]
        return next((str(file) for file in files if file.is_file()), word)

    def call(command, *words):
        if command == "pull":
            model, *words = f"{name}@{words[0]}", *words[1:]
        else:
            model = name
        capsys.readouterr()
        code = registry.main([command, model, *map(path_of, words)])
        return code or 0, capsys.readouterr().out

    call.name = name
    return call


def champion(run):
    return records.champion_number(store.connect(), run.name)


def version_of(run):
    """The only version."""
    (version,) = records.versions(store.connect(), run.name)
    return version


def refused(run, *words, says):
    with pytest.raises(UsageError) as error:
        run(*words)
    line = str(error.value)
    assert len(line.splitlines()) == 1 and re.search(says, line), line


# ---- the life of a model ----


def test_promote_takes_the_first_and_no_worse_and_refuses_a_worse_version(run):
    golden = ("--golden", "golden.npz")
    assert run("register", "good") == (0, f"{run.name} v1.0.0 (number 1, commit {COMMIT[:12]})\n")
    assert run("promote", "v1.0.0", *golden)[1].endswith("is champion, the first\n")
    run("register", "better")
    run("register", "worse")
    code, output = run("promote", "v1.1.0", *golden)
    assert code == 0 and f"is champion, no worse than {run.name} v1.0.0" in output
    assert run("promote", "v1.2.0", *golden) == (1, "")
    assert champion(run) == "2"
    code, output = run("promote", "v1.2.0", "--force", "the others are withdrawn")
    assert code == 0 and "forced by" in output and "the others are withdrawn" in output
    assert champion(run) == "3"
    checked, forced = records.events(store.connect(), run.name)[1:]
    assert checked["by"] == forced["by"] == records.who()
    assert checked["checked"].endswith("golden.npz") and "forced" not in checked
    assert forced["forced"] == "the others are withdrawn"


def test_rollback_goes_back_through_the_history_and_pull_writes_each_file(
    run, register_three, place
):
    register_three(run.name)
    run("promote", "v1.1.0", "--force", "x")
    run("promote", "v1.2.0", "--force", "x")
    for number in ("2", "1"):
        assert run("rollback")[1].startswith(f"{run.name} v1.{int(number) - 1}.0")
        assert champion(run) == number
    refused(run, "rollback", says="has had no champion before this one")
    run("promote", "3", "--force", "by number")
    assert run("rollback")[1].startswith(f"{run.name} v1.0.0")
    events = records.events(store.connect(), run.name)
    assert [(event["action"], event["version"]) for event in events] == [
        ("promote", "v1.0.0"),
        ("promote", "v1.1.0"),
        ("promote", "v1.2.0"),
        ("rollback", "v1.1.0"),
        ("rollback", "v1.0.0"),
        ("promote", "v1.2.0"),
        ("rollback", "v1.0.0"),
    ]
    for ref, name in (("champion", "good"), ("v1.1.0", "better"), ("3", "worse")):
        run("pull", ref, "--out", "pulled.joblib")
        assert Path("pulled.joblib").read_bytes() == (place / f"{name}.joblib").read_bytes()
        load_model("pulled.joblib")


def test_list_shows_versions_figures_commits_and_the_champion(run, place):
    for name in ("good", "better"):
        run("register", name)
    run("register", "dirty", "--allow_dirty")
    run("promote", "v1.1.0", "--force", "a list needs a champion")
    title, heading, *lines = run("list")[1].splitlines()
    columns = "version number commit balanced accuracy AUC test set registered"
    assert title == run.name and heading.split() == columns.split()
    auc = json.loads((place / "better_report" / "metrics.json").read_text())["overall"]["auc"]
    assert [line.split()[:3] for line in lines] == [
        [version, number, COMMIT[:12]]
        for version, number in (("v1.0.0", "1"), ("v1.1.0", "2"), ("v1.3.0", "3"))
    ]
    low, high = auc["interval"]
    assert f"{auc['value']:.3f} [{low:.3f}, {high:.3f}]" in lines[1]
    assert [line.endswith("champion") for line in lines] == [False, True, False]
    assert lines[2].endswith("uncommitted code")


def test_list_omits_models_that_register_did_not_make(run, capsys):
    other = f"others-{run.name}"[:64]
    store.connect().create_registered_model(other)
    run("register", "good")
    capsys.readouterr()
    assert not registry.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert run.name in lines and other not in lines


def test_a_version_stores_the_facts_of_its_file_and_report(run, place):
    run("register", "good")
    version = version_of(run)
    model = load_model(place / "good.joblib")
    report = json.loads((place / "good_report" / "metrics.json").read_text())
    tags = {
        "version": "v1.0.0",
        "commit": COMMIT,
        "sha256": model["sha256"],
        "training_data": model["training_data"]["sha256"],
        "registered_by": records.who(),
    }
    assert version.tags.items() >= tags.items()
    data = store.connect().get_run(version.run_id).data
    params = {
        "classifier": "linear-svm",
        "encoder": "made-up",
        "split": report["split"],
        "real": "40",
        "fake": "40",
        **{name: str(value) for name, value in model["hyperparameters"].items()},
    }
    assert data.params.items() >= params.items()
    auc = report["overall"]["auc"]
    assert data.metrics["overall.auc"] == pytest.approx(auc["value"])
    assert data.metrics["overall.auc.low"] == pytest.approx(auc["interval"][0])


def test_a_version_stores_its_model_file_and_the_whole_report(run, place):
    run("register", "good")
    client, run_id = store.connect(), version_of(run).run_id
    report = {file.path for file in client.list_artifacts(run_id, "report")}
    assert report == {f"report/{path.name}" for path in (place / "good_report").iterdir()}
    assert {"report/MODEL_CARD.md", "report/metrics.json", "report/report.html"} < report
    assert any(path.endswith(".png") for path in report)
    (model,) = client.list_artifacts(run_id, "model")
    assert model.path == "model/model.joblib"


# ---- what is refused ----


def test_a_model_of_uncommitted_code_needs_allow_dirty_which_is_recorded(run):
    remedy = "commit and train again, or register it with --allow_dirty"
    refused(run, "register", "dirty", says=f"uncommitted code .*-dirty.*: {remedy}")
    run("register", "dirty", "--allow_dirty")
    tags = version_of(run).tags
    assert tags["dirty"] == f"allowed by {records.who()}" and tags["commit"] == f"{COMMIT}-dirty"


def test_a_version_that_is_not_semantic_is_refused(run):
    refused(run, "register", "odd", says="is version '1.4': train it with --model_version v1.2.0")


@pytest.mark.parametrize(
    "way", [["--golden", "golden.npz"], ["--force", "because"]], ids=["checked", "forced"]
)
def test_a_model_without_a_version_is_never_promoted(run, way):
    run("register", "dev")
    remedy = "no version of its own: train with --model_version v1.0.0"
    refused(run, "promote", "v0.0.0-dev", *way, says=remedy)
    assert champion(run) is None


def test_a_version_belongs_to_one_file(run, twins):
    run("register", str(twins[0]))
    assert run("register", str(twins[0]))[1].endswith("is registered already\n")
    says = "has a v1.1.0 of another file: train with another --model_version"
    refused(run, "register", str(twins[1]), says=says)
    assert version_of(run)


def other_commit(folder):
    path = folder / "metrics.json"
    path.write_text(path.read_text().replace(COMMIT, "f" * 40))


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda folder: shutil.rmtree(folder), "cannot be read: train the model again"),
        (lambda folder: (folder / "metrics.json").write_text("{"), "cannot be read"),
        (other_commit, "report of another model"),
    ],
    ids=["none", "torn", "another model's"],
)
def test_a_model_without_its_own_report_is_refused(run, place, tmp_path, spoil, says):
    shutil.copy(place / "good.joblib", tmp_path / "m.joblib")
    shutil.copytree(place / "good_report", tmp_path / "m_report")
    spoil(tmp_path / "m_report")
    refused(run, "register", str(tmp_path / "m.joblib"), says=says)


def test_promote_refuses_a_comparison_that_cannot_be_made(run):
    for name in ("good", "better"):
        run("register", name)
    golden = ("--golden", "golden.npz")
    run("promote", "v1.0.0", *golden)
    for words, says in (
        (["v1.1.0", "--golden", "other.npz"], "other.npz is of encoder 'made-up'"),
        (["v1.1.0", "--golden", "nowhere.npz"], "nowhere.npz: no such file"),
        (["v1.1.0"], "--golden, or say why not with --force"),
        (["v1.0.0", *golden], "is the champion already"),
        (["v7.0.0", *golden], "has no version v7.0.0: it has v1.0.0, v1.1.0"),
    ):
        refused(run, "promote", *words, says=says)
    assert champion(run) == "1"


def test_a_file_that_was_changed_in_the_registry_is_not_pulled(run, server):
    run("register", "good")
    (stored,) = server.artifacts.rglob(f"{version_of(run).run_id}/artifacts/model/model.joblib")
    stored.write_bytes(stored.read_bytes().replace(b"v1.0.0", b"v9.0.0"))
    Path("model.joblib").write_bytes(b"as it was")
    says = "is not the one that was registered .SHA-256 .*do not use it"
    refused(run, "pull", "v1.0.0", says=says)
    assert Path("model.joblib").read_bytes() == b"as it was"


def test_pull_writes_the_signature_and_removes_an_old_one(run, place):
    shutil.copy(place / "good.joblib", "signed.joblib")
    shutil.copytree(place / "good_report", "signed_report")
    signature_path("signed.joblib").write_text("a signature\n")
    run("register", "signed.joblib")
    run("register", "better")
    run("pull", "v1.0.0", "--out", "out.joblib")
    assert Path("out.joblib.sig").read_text() == "a signature\n"
    run("pull", "v1.1.0", "--out", "out.joblib")
    assert not Path("out.joblib.sig").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        (["pull", "detector"], "name the version too, as in detector@champion"),
        (["pull", "detector@"], "name the version too"),
        (["list", "a/b"], "1 to 64 letters"),
        (["list", "nobody"], "no model 'nobody' is registered"),
        (["pull", "nobody@champion"], "no model 'nobody' is registered"),
        (["rollback", "nobody"], "no model 'nobody' is registered"),
        (["register", "x", "nowhere.joblib"], "cannot read nowhere.joblib"),
    ],
)
def test_a_missing_model_version_or_file_is_named(words, says):
    with pytest.raises(UsageError, match=says):
        registry.main(words)


def test_a_server_refuses_one_of_two_commands_at_once(run, register_three, race, twins, tmp_path):
    register_three(run.name)
    one_of_two_is_promoted(race, tmp_path, run.name)
    for attempt in range(2):
        one_of_two_is_registered(race, twins, tmp_path, f"twins{attempt}")


def test_without_a_server_the_registry_is_a_file_in_this_folder(script, place):
    def call(*words):
        return script("registry.py", *words, MLFLOW_TRACKING_URI="")

    done = call("register", "detector", place / "good.joblib")
    title = f"detector v1.0.0 (number 1, commit {COMMIT[:12]})\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, title, "")
    assert Path("mlflow.db").is_file()
    golden = ("--golden", place / "golden.npz")
    assert call("register", "detector", place / "worse.joblib").returncode == 0
    assert call("promote", "detector", "v1.0.0", *golden).returncode == 0
    assert_one_line_error(call("promote", "detector", "1", *golden), "is the champion already")
    done = call("promote", "detector", "v1.2.0", *golden)
    assert done.returncode == 1
    assert "v1.2.0 (number 2, commit 0123456789ab) is worse than the champion" in done.stderr
    assert "champion" in call("list").stdout.splitlines()[2]
    assert call("pull", "detector@champion", "--out", "pulled.joblib").returncode == 0
    assert Path("pulled.joblib").read_bytes() == (place / "good.joblib").read_bytes()
