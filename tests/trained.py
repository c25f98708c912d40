"""For the tests of train_model.py: one training in this process, or as a command, and what it wrote."""

import json

import pytest
import sklearn.ensemble  # noqa: F401  loaded here, so that the limit below reaches its threads
from made_up import write_features
from threadpoolctl import threadpool_limits

import train_model
from detector.model.file import load_model
from detector.training import classifiers, recipe


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Function: columns or features files, and flags -> (model, metrics.json, stdout, stderr) of one training."""
    monkeypatch.setattr(recipe, "code_commit", lambda: "0123abc")

    def run(*data, name="model", **flags):
        files = [
            write_features(tmp_path / f"{name}{i}.npz", part) if isinstance(part, dict) else part
            for i, part in enumerate(data)
        ]
        output = tmp_path / f"{name}.joblib"
        given = [
            word
            for flag, value in flags.items()
            for word in (f"--{flag}", *([] if value is True else [str(value)]))
        ]
        with threadpool_limits(
            1
        ):  # so small a training is nothing but threads that wait for each other
            train_model.main(
                ["--features_file", *map(str, files), "--model_output_path", str(output), *given]
            )
        captured = capsys.readouterr()
        return (
            load_model(output),
            json.loads((tmp_path / f"{name}_report" / "metrics.json").read_text()),
            captured.out,
            captured.err,
        )

    return run


@pytest.fixture
def command(script, tmp_path):
    """Function: train_model.py as a process on a features file, into tmp_path / 'out.joblib'."""

    def run(*flags, features=None, **env):
        return script(
            "train_model.py",
            "--features_file",
            *(features or [write_features(tmp_path / "f.npz")]),
            "--model_output_path",
            tmp_path / "out.joblib",
            *flags,
            **{"OMP_NUM_THREADS": "1", **env},
        )

    return run


@pytest.fixture
def quick(monkeypatch):
    """The search takes the first point of the grid: for tests that are not about what it finds."""
    monkeypatch.setattr(recipe, "search", lambda kind, *_: classifiers.GRIDS[kind][0])
