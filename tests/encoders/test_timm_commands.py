"""A tower of timm goes through every command and the service, with its real weights of ImageNet."""

import importlib.util
import json

import numpy as np
import pytest
from commands import OPENAI_CACHE
from live import Live

from detector.encoders import runtime

pytestmark = pytest.mark.long
NAME = "timm:tf_efficientnet_lite0.in1k"


@pytest.fixture(scope="module")
def weights():
    path = OPENAI_CACHE / "lite0.safetensors"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in {OPENAI_CACHE}: make test converts it")
    return path


@pytest.fixture
def run(script):
    def call(*words, **env):
        result = script(*words, **env)
        assert result.returncode in (0, 1), result.stderr
        return result.stdout

    return call


@pytest.fixture
def model(run, weights, make_folder, tmp_path):
    """Folder with f.npz and model.joblib of the tower, and data/."""
    counts = {"train/real": 40, "train/fake": 40, "test/real": 15, "test/fake": 15}
    make_folder(tmp_path / "data", counts)
    files = ("--data_dir", "data", "--output_file", "f.npz")
    run("extract_features.py", *files, "--clip_model", f"{NAME}@{weights}", "--layers", "multi")
    run(
        "train_model.py",
        "--features_file",
        "f.npz",
        "--model_version",
        "v1.0.0",
        CODE_COMMIT="c" * 40,
    )
    return tmp_path


def test_the_commands_and_the_service_agree_on_a_verdict(run, model, photos):
    photo = photos["coffee.png"]
    line = json.loads(
        run("classify.py", "--image_path", photo, "--model_path", "model.joblib", "--json")
    )
    server = Live(model, MODEL_PATH=str(model / "model.joblib"), EXPLAIN="1")
    try:
        response = server.post(photo.read_bytes())
        assert response.status_code == 200, response.text
        assert response.json()["classification"] == line["classification"]
        assert response.json()["confidence"] == pytest.approx(line["confidence"], abs=1e-3)
    finally:
        assert server.stop() == 0
    run(
        "classify.py", "--image_path", photo, "--model_path", "model.joblib", "--explain", "map.png"
    )
    assert (model / "map.png").stat().st_size > 10_000


def test_ray_writes_the_same_features(run, model):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    from detector.features.file import load_features

    encoder = runtime.find_encoder(layers="2,3,4,final")
    words = ("--data_dir", "data", "--output_file", "f.parquet", "--ray", "local")
    run("extract_features.py", *words, "--clip_model", encoder)
    ours, ray = (load_features(model / name) for name in ("f.npz", "f.parquet"))
    order = np.argsort(ray["paths"]), np.argsort(ours["paths"])
    assert (ray["paths"][order[0]] == ours["paths"][order[1]]).all()
    assert np.allclose(ray["features"][order[0]], ours["features"][order[1]], atol=1e-3)


def test_the_registry_and_the_evaluation_take_the_model(run, model):
    text = run("evaluate.py", "--model_path", "model.joblib", "--features_file", "f.npz")
    assert f"'{NAME}@lite0.safetensors 2,3,4,final'" in text
    run("registry.py", "register", "tower", "model.joblib")
    run("registry.py", "promote", "tower", "v1.0.0", "--force", "the first")
    assert "v1.0.0" in run("registry.py", "pull", "tower@champion", "--out", "pulled.joblib")
    assert (model / "pulled.joblib").read_bytes() == (model / "model.joblib").read_bytes()
