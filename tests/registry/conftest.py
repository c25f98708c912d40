"""Fixtures of the tests of the registry: a live MLflow server, and models to register."""

import json
import os
import shutil
import subprocess
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import requests
from commands import ROOT
from live import free_port
from made_up import COMMIT, ENCODER, write_features
from patience import PATIENCE
from racing import racers
from threadpoolctl import threadpool_limits

import registry
import train_model
from detector.model.file import load_model, save_model
from detector.training import classifiers, recipe

MLFLOW = ROOT / ".venv-mlflow" / "bin" / "mlflow"
GOLDEN = {"seed": 9, "splits": False, "real": 80, "fake": 80}


def start_server(place, port):
    options = {
        "port": port,
        "workers": 1,
        "backend-store-uri": f"sqlite:///{place}/mlflow.db",
        "artifacts-destination": place / "artifacts",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "HOME": str(place)}
    with open(place / "log", "w") as log:
        return subprocess.Popen(
            [MLFLOW, "server", *words], cwd=place, env=environment, stdout=log, stderr=log
        )


def wait_until_healthy(process, address, log):
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(requests.RequestException):
            if requests.get(f"{address}/health", timeout=1).ok:
                return
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A live MLflow server -> its address and the folder of its artifacts."""
    if not MLFLOW.is_file():
        pytest.skip("mlflow's server is not installed: make .venv-mlflow/.ready")
    place, port = tmp_path_factory.mktemp("server"), free_port()
    process, address = start_server(place, port), f"http://127.0.0.1:{port}"
    wait_until_healthy(process, address, place / "log")
    yield SimpleNamespace(address=address, artifacts=place / "artifacts")
    process.terminate()
    process.wait(PATIENCE)


@pytest.fixture(autouse=True)
def address(server, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.chdir(tmp_path)


def train(features, output):
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1):
        patch.setattr(recipe, "code_commit", lambda: COMMIT)
        patch.setattr(recipe, "search", lambda kind, *_: classifiers.GRIDS[kind][0])
        files = ["--features_file", str(features), "--model_output_path", str(output)]
        train_model.main([*files, "--model_version", "v1.0.0", "--classifier", "linear-svm"])


def vary(folder, name, version, commit, sign=1, **changes):
    """Save good.joblib and its report under another name, version, commit and sign of verdicts.

    `changes`: of the model, but not of the report.
    """
    model = load_model(folder / "good.joblib")
    changes = {
        "coef": sign * model["coef"],
        "intercept": sign * model["intercept"],
        "versions": {**model["versions"], "model": version, "code": commit},
        **changes,
    }
    save_model(folder / f"{name}.joblib", {**model, **changes})
    shutil.copytree(folder / "good_report", folder / f"{name}_report")
    report = folder / f"{name}_report" / "metrics.json"
    metrics = json.loads(report.read_text())
    report.write_text(json.dumps({**metrics, "model_version": version, "code": commit}))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, their reports, and golden.npz, whose images trained none of them.

    good is trained, the others are variants of it: better is no worse, worse inverts every
    verdict, dev has no version, dirty is of uncommitted code, odd has a version of another form.
    """
    folder = tmp_path_factory.mktemp("models")
    write_features(folder / "golden.npz", **GOLDEN)
    write_features(folder / "other.npz", encoder={**ENCODER, "identity": "cd" * 32}, **GOLDEN)
    train(write_features(folder / "good.npz"), folder / "good.joblib")
    vary(folder, "better", "v1.1.0", COMMIT)
    vary(folder, "worse", "v1.2.0", COMMIT, sign=-1)
    vary(folder, "dev", "v0.0.0-dev", COMMIT)
    vary(folder, "dirty", "v1.3.0", f"{COMMIT}-dirty")
    vary(folder, "odd", "1.4", COMMIT)
    return folder


@pytest.fixture
def variant(place, tmp_path):
    """Function: variant('v1.5.0', coef=...) -> path of a model that varies good.joblib."""
    shutil.copy(place / "good.joblib", tmp_path)
    shutil.copytree(place / "good_report", tmp_path / "good_report")

    def make(version, **changes):
        vary(tmp_path, version, version, COMMIT, **changes)
        return tmp_path / f"{version}.joblib"

    return make


@pytest.fixture
def twins(place, tmp_path):
    """Two different files that both say v1.1.0."""
    paths = [tmp_path / "a.joblib", tmp_path / "b.joblib"]
    for path in paths:
        model = load_model(place / "better.joblib")
        del model["sha256"]
        rule = {**model["threshold_rule"], "note": path.stem}
        save_model(path, {**model, "threshold_rule": rule})
        shutil.copytree(place / "better_report", path.with_name(f"{path.stem}_report"))
    return paths


@pytest.fixture
def register_three(place):
    """Function: register good, better and worse under a name, and make v1.0.0 the champion."""

    def register(name):
        for model in ("good", "better", "worse"):
            registry.main(["register", name, str(place / f"{model}.joblib")])
        registry.main(["promote", name, "v1.0.0", "--force", "a start"])

    return register


@pytest.fixture(scope="module")
def race():
    with racers() as call:
        yield call
