"""Fixtures of the tests of the registry: a live MLflow server, and models to register."""

import json
import os
import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest
import requests
from commands import ROOT
from live import free_port
from made_up import COMMIT, ENCODER, write_features
from patience import PATIENCE
from threadpoolctl import threadpool_limits

import train_model
from detector.model.file import load_model, save_model
from detector.training import classifiers, recipe

MLFLOW = ROOT / ".venv-mlflow" / "bin" / "mlflow"


GOLDEN = {"seed": 9, "splits": False, "real": 80, "fake": 80}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A live MLflow server -> its address and the folder of its artifacts."""
    if not MLFLOW.is_file():
        pytest.skip("mlflow's server is not installed: make .venv-mlflow/.ready")
    place, port = tmp_path_factory.mktemp("server"), free_port()
    command = [
        MLFLOW,
        "server",
        "--port",
        port,
        "--workers",
        1,
        "--backend-store-uri",
        f"sqlite:///{place}/mlflow.db",
        "--artifacts-destination",
        place / "artifacts",
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "HOME": str(place)}
    with open(place / "log", "w") as log:
        process = subprocess.Popen(
            list(map(str, command)), cwd=place, env=environment, stdout=log, stderr=log
        )
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    while True:
        try:
            if requests.get(f"{address}/health", timeout=1).ok:
                break
        except requests.RequestException:
            assert process.poll() is None and time.monotonic() < deadline, (
                place / "log"
            ).read_text()[-2000:]
        time.sleep(0.2)
    yield SimpleNamespace(address=address, artifacts=place / "artifacts")
    process.terminate()
    process.wait(PATIENCE)


@pytest.fixture(autouse=True)
def address(server, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, each with its report, and golden.npz, whose images trained none of them.

    good is trained, the others are made of it: better is no worse, worse turns every verdict round, dev has no version, dirty
    is of uncommitted code.
    """
    folder = tmp_path_factory.mktemp("models")
    write_features(folder / "golden.npz", **GOLDEN)
    write_features(folder / "other.npz", encoder={**ENCODER, "identity": "cd" * 32}, **GOLDEN)
    write_features(folder / "good.npz")
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1):
        patch.setattr(recipe, "code_commit", lambda: COMMIT)
        patch.setattr(recipe, "search", lambda kind, *_: classifiers.GRIDS[kind][0])
        train_model.main(
            [
                "--features_file",
                str(folder / "good.npz"),
                "--model_output_path",
                str(folder / "good.joblib"),
                "--model_version",
                "v1.0.0",
                "--classifier",
                "linear-svm",
            ]
        )
    for name, version, commit in (
        ("better", "v1.1.0", COMMIT),
        ("worse", "v1.2.0", COMMIT),
        ("dev", "v0.0.0-dev", COMMIT),
        ("dirty", "v1.3.0", f"{COMMIT}-dirty"),
        ("odd", "1.4", COMMIT),
    ):
        model = load_model(folder / "good.joblib")
        sign = -1 if name == "worse" else 1
        save_model(
            folder / f"{name}.joblib",
            {
                **model,
                "coef": sign * model["coef"],
                "intercept": sign * model["intercept"],
                "versions": {**model["versions"], "model": version, "code": commit},
            },
        )
        shutil.copytree(folder / "good_report", folder / f"{name}_report")
        report = json.loads((folder / "good_report" / "metrics.json").read_text())
        (folder / f"{name}_report" / "metrics.json").write_text(
            json.dumps({**report, "model_version": version, "code": commit})
        )
    return folder
