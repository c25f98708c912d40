"""Versions in a registry, on a live MLflow server: registered, promoted only when no worse, rolled back, pulled as they were."""

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import assert_one_line_error
from live import free_port
from made_up import COMMIT
from racing import one_of_two_is_promoted, one_of_two_is_registered, racers

import registry
from detector.base.errors import UsageError
from detector.model.file import load_model, save_model
from detector.model.signature import signature_path
from detector.registry import champion as records
from detector.registry import store

pytestmark = pytest.mark.long  # MLflow takes its time to start


@pytest.fixture
def run(request, place, capsys):
    """Function: run('register', 'good') -> (exit code, stdout) of a command on a registered model of this test's own.

    Words that name a file of `place` become its path.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", request.node.name)[:64]

    def call(command, *words, name=name):
        paths = [
            (
                str(place / f"{w}.joblib")
                if (place / f"{w}.joblib").is_file()
                else str(place / w)
                if (place / w).is_file()
                else w
            )
            for w in words
        ]
        capsys.readouterr()
        code = registry.main(
            [
                command,
                *([f"{name}@{words[0]}", *paths[1:]] if command == "pull" else [name, *paths]),
            ]
        )
        return code or 0, capsys.readouterr().out

    call.name = name
    return call


def champion(run):
    return records.champion_number(store.connect(), run.name)


def refused(run, *words, says):
    with pytest.raises(UsageError) as error:
        run(*words)
    assert len(str(error.value).splitlines()) == 1 and re.search(says, str(error.value)), (
        error.value
    )


# ---- the life of a model ----


def test_a_model_is_registered_promoted_beaten_refused_forced_rolled_back_and_pulled(
    run, place, capsys
):
    assert run("register", "good") == (0, f"{run.name} v1.0.0 (number 1, commit {COMMIT[:12]})\n")
    assert run("promote", "v1.0.0", "--golden", "golden.npz")[1].endswith(
        "is champion, the first\n"
    )
    run("register", "better")
    run("register", "worse")
    code, said = run("promote", "v1.1.0", "--golden", "golden.npz")
    assert code == 0 and f"is champion, no worse than {run.name} v1.0.0" in said
    assert run("promote", "v1.2.0", "--golden", "golden.npz") == (1, "")
    assert champion(run) == "2"
    code, said = run("promote", "v1.2.0", "--force", "the others are withdrawn")
    assert (
        code == 0
        and "forced by" in said
        and "the others are withdrawn" in said
        and champion(run) == "3"
    )
    assert run("rollback")[1].startswith(f"{run.name} v1.1.0") and champion(run) == "2"
    assert run("rollback")[1].startswith(f"{run.name} v1.0.0") and champion(run) == "1"
    refused(run, "rollback", says="has had no champion before this one")
    run("promote", "3", "--force", "by number")
    assert run("rollback")[1].startswith(f"{run.name} v1.0.0")

    events = records.events(store.connect(), run.name)
    assert [(e["action"], e["version"]) for e in events] == [
        ("promote", "v1.0.0"),
        ("promote", "v1.1.0"),
        ("promote", "v1.2.0"),
        ("rollback", "v1.1.0"),
        ("rollback", "v1.0.0"),
        ("promote", "v1.2.0"),
        ("rollback", "v1.0.0"),
    ]
    assert (
        all(e["by"] == records.who() for e in events)
        and events[2]["forced"] == "the others are withdrawn"
    )
    assert events[1]["checked"].endswith("golden.npz") and "forced" not in events[1]

    for ref, name in (("champion", "good"), ("v1.1.0", "better"), ("3", "worse")):
        run("pull", ref, "--out", "pulled.joblib")
        assert Path("pulled.joblib").read_bytes() == (place / f"{name}.joblib").read_bytes()
        load_model("pulled.joblib")


def test_list_shows_versions_figures_commits_and_the_champion(run, place):
    for name in ("good", "better"):
        run("register", name)
    run("register", "dirty", "--allow_dirty")
    run("promote", "v1.1.0", "--force", "a list needs one")
    lines = run("list")[1].splitlines()
    assert lines[0] == run.name and lines[1].split() == [
        "version",
        "number",
        "commit",
        "balanced",
        "accuracy",
        "AUC",
        "registered",
    ]
    auc = json.loads((place / "better_report" / "metrics.json").read_text())["overall"]["auc"]
    words = [line.split() for line in lines[2:]]
    assert [w[:3] for w in words] == [
        ["v1.0.0", "1", COMMIT[:12]],
        ["v1.1.0", "2", COMMIT[:12]],
        ["v1.3.0", "3", COMMIT[:12]],
    ]
    assert f"{auc['value']:.3f} [{auc['interval'][0]:.3f}, {auc['interval'][1]:.3f}]" in lines[3]
    assert [line.endswith("champion") for line in lines[2:]] == [False, True, False] and lines[
        4
    ].endswith("uncommitted code")


def test_models_that_others_keep_in_the_same_registry_are_passed_over(run, capsys):
    store.connect().create_registered_model(f"others-{run.name}"[:64])
    run("register", "good")
    capsys.readouterr()
    assert not registry.main(["list"])
    assert (
        run.name in (listed := capsys.readouterr().out.splitlines())
        and f"others-{run.name}"[:64] not in listed
    )


def test_a_version_carries_what_its_file_and_report_say(run, place):
    run("register", "good")
    client = store.connect()
    (version,) = records.versions(client, run.name)
    model, found = (
        load_model(place / "good.joblib"),
        json.loads((place / "good_report" / "metrics.json").read_text()),
    )
    assert (
        version.tags.items()
        >= {
            "version": "v1.0.0",
            "commit": COMMIT,
            "sha256": model["sha256"],
            "training_data": model["training_data"]["sha256"],
            "registered_by": records.who(),
        }.items()
    )
    data = client.get_run(version.run_id).data
    assert (
        data.params.items()
        >= {
            "classifier": "linear-svm",
            "encoder": "made-up",
            "split": found["split"],
            "real": "40",
            "fake": "40",
            **{k: str(v) for k, v in model["hyperparameters"].items()},
        }.items()
    )
    assert data.metrics["overall.auc"] == pytest.approx(found["overall"]["auc"]["value"])
    assert data.metrics["overall.auc.low"] == pytest.approx(found["overall"]["auc"]["interval"][0])
    stored = {file.path for file in client.list_artifacts(version.run_id, "report")}
    assert stored == {f"report/{path.name}" for path in (place / "good_report").iterdir()}
    assert {"report/MODEL_CARD.md", "report/metrics.json", "report/report.html"} < stored and any(
        p.endswith(".png") for p in stored
    )
    assert [file.path for file in client.list_artifacts(version.run_id, "model")] == [
        "model/model.joblib"
    ]


# ---- what is refused ----


def test_a_model_of_uncommitted_code_is_registered_only_on_request_and_that_is_recorded(run):
    refused(
        run,
        "register",
        "dirty",
        says=(
            "uncommitted code .*-dirty.*: commit and train again, or register it with --allow_dirty"
        ),
    )
    run("register", "dirty", "--allow_dirty")
    (version,) = records.versions(store.connect(), run.name)
    assert (
        version.tags["dirty"] == f"allowed by {records.who()}"
        and version.tags["commit"] == f"{COMMIT}-dirty"
    )


def test_a_version_that_is_not_semantic_is_refused(run):
    refused(run, "register", "odd", says="is version '1.4': train it with --model_version v1.2.0")


@pytest.mark.parametrize(
    "way", [["--golden", "golden.npz"], ["--force", "because"]], ids=["checked", "forced"]
)
def test_a_version_of_no_name_is_never_promoted(run, way):
    run("register", "dev")
    refused(
        run,
        "promote",
        "v0.0.0-dev",
        *way,
        says="no version of its own: train with --model_version v1.0.0",
    )
    assert champion(run) is None


def test_a_version_belongs_to_one_file(run, place, tmp_path):
    run("register", "good")
    assert run("register", "good")[1].endswith("is registered already\n")
    shutil.copytree(place / "better_report", tmp_path / "twin_report")
    model = (place / "better.joblib").read_bytes().replace(b"v1.1.0", b"v1.0.0")
    (tmp_path / "twin.joblib").write_bytes(model)
    report = tmp_path / "twin_report" / "metrics.json"
    report.write_text(report.read_text().replace("v1.1.0", "v1.0.0"))
    refused(
        run,
        "register",
        str(tmp_path / "twin.joblib"),
        says="has a v1.0.0 of another file: train with another --model_version",
    )
    assert len(records.versions(store.connect(), run.name)) == 1


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda folder: shutil.rmtree(folder), "cannot be read: train the model again"),
        (lambda folder: (folder / "metrics.json").write_text("{"), "cannot be read"),
        (
            lambda folder: (folder / "metrics.json").write_text(
                (folder / "metrics.json").read_text().replace(COMMIT, "f" * 40)
            ),
            "report of another model",
        ),
    ],
    ids=["none", "torn", "another model's"],
)
def test_a_model_without_its_own_report_is_refused(run, place, tmp_path, spoil, says):
    shutil.copy(place / "good.joblib", tmp_path / "m.joblib")
    shutil.copytree(place / "good_report", tmp_path / "m_report")
    spoil(tmp_path / "m_report")
    refused(run, "register", str(tmp_path / "m.joblib"), says=says)


def test_a_champion_is_compared_on_images_of_its_own_encoder_that_are_there(run, place, tmp_path):
    for name in ("good", "better"):
        run("register", name)
    run("promote", "v1.0.0", "--golden", "golden.npz")
    refused(
        run, "promote", "v1.1.0", "--golden", "other.npz", says="other.npz is of encoder 'made-up'"
    )
    refused(run, "promote", "v1.1.0", "--golden", "nowhere.npz", says="nowhere.npz: no such file")
    refused(run, "promote", "v1.1.0", says="--golden, or say why not with --force")
    refused(run, "promote", "v1.0.0", "--golden", "golden.npz", says="is the champion already")
    refused(
        run,
        "promote",
        "v7.0.0",
        "--golden",
        "golden.npz",
        says="has no version v7.0.0: it has v1.0.0, v1.1.0",
    )
    assert champion(run) == "1"


def test_a_file_that_was_changed_in_the_registry_is_not_pulled(run, server, tmp_path):
    run("register", "good")
    (version,) = records.versions(store.connect(), run.name)
    (stored,) = server.artifacts.rglob(f"{version.run_id}/artifacts/model/model.joblib")
    stored.write_bytes(stored.read_bytes().replace(b"v1.0.0", b"v9.0.0"))
    (tmp_path / "model.joblib").write_bytes(b"as it was")
    refused(
        run, "pull", "v1.0.0", says="is not the one that was registered .SHA-256 .*do not use it"
    )
    assert (tmp_path / "model.joblib").read_bytes() == b"as it was"


def test_a_signature_travels_with_its_model_and_an_old_one_does_not_stay(run, place, tmp_path):
    shutil.copy(place / "good.joblib", tmp_path / "signed.joblib")
    shutil.copytree(place / "good_report", tmp_path / "signed_report")
    signature_path(tmp_path / "signed.joblib").write_text("a signature\n")
    run("register", str(tmp_path / "signed.joblib"))
    run("register", "better")
    run("pull", "v1.0.0", "--out", "out.joblib")
    assert (tmp_path / "out.joblib.sig").read_text() == "a signature\n"
    run("pull", "v1.1.0", "--out", "out.joblib")
    assert not (tmp_path / "out.joblib.sig").exists()


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
def test_what_is_not_there_is_named(words, says):
    with pytest.raises(UsageError, match=says):
        registry.main(words)


def test_on_a_server_too_one_of_two_at_once_is_refused_and_leaves_nothing(run, place, tmp_path):
    for model in ("good", "better", "worse"):
        run("register", model)
    run("promote", "v1.0.0", "--force", "a start")
    twins = [tmp_path / "a.joblib", tmp_path / "b.joblib"]
    for path in twins:
        model = load_model(place / "better.joblib")
        del model["sha256"]
        save_model(
            path, {**model, "threshold_rule": {**model["threshold_rule"], "note": path.stem}}
        )
        shutil.copytree(place / "better_report", path.with_name(f"{path.stem}_report"))
    with racers() as race:
        one_of_two_is_promoted(race, tmp_path, run.name)
        for attempt in range(2):
            one_of_two_is_registered(race, twins, tmp_path, f"twins{attempt}")


def test_a_server_that_does_not_answer_is_told_in_one_line(script, tmp_path):
    done = script(
        "registry.py",
        "list",
        MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )
    assert_one_line_error(done, "http://127.0.0.1", "is MLFLOW_TRACKING_URI right?")


def test_without_a_server_the_registry_is_a_file_in_this_folder(script, place, tmp_path):
    environment = {"MLFLOW_TRACKING_URI": ""}
    done = script("registry.py", "register", "detector", place / "good.joblib", **environment)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"detector v1.0.0 (number 1, commit {COMMIT[:12]})\n",
        "",
    )
    assert (tmp_path / "mlflow.db").is_file()
    golden = "--golden", place / "golden.npz"
    assert (
        script(
            "registry.py", "register", "detector", place / "worse.joblib", **environment
        ).returncode
        == 0
    )
    assert (
        script("registry.py", "promote", "detector", "v1.0.0", *golden, **environment).returncode
        == 0
    )
    assert_one_line_error(
        script("registry.py", "promote", "detector", "1", *golden, **environment),
        "is the champion already",
    )
    done = script("registry.py", "promote", "detector", "v1.2.0", *golden, **environment)
    assert (
        done.returncode == 1
        and "v1.2.0 (number 2, commit 0123456789ab) is worse than the champion" in done.stderr
    )
    assert "champion" in script("registry.py", "list", **environment).stdout.splitlines()[2]
    done = script(
        "registry.py", "pull", "detector@champion", "--out", "pulled.joblib", **environment
    )
    assert (
        done.returncode == 0
        and (tmp_path / "pulled.joblib").read_bytes() == (place / "good.joblib").read_bytes()
    )
