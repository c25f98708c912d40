"""int8 is another encoder, calibrated and tested on labelled images, or refused with figures."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small
import small_clip
from commands import ROOT, assert_one_line_error
from PIL import Image

from detector.base.errors import EncoderError, UsageError
from detector.encoders import closeness, prepare, quantize, runtime
from detector.features.file import load_features
from detector.images import decoding, preprocessing

pytestmark = pytest.mark.slow


def reds_and_blues(folder):
    """80 images of two colours, because random weights separate little but colours."""
    rng = np.random.default_rng(0)
    for label, tint in (("real", (1, 0.3, 0.3)), ("fake", (0.3, 0.3, 1))):
        (folder / label).mkdir(parents=True)
        for i in range(40):
            blocks = np.kron(rng.integers(60, 256, (4, 4, 1)) * tint, np.ones((32, 32, 1)))
            Image.fromarray(blocks.astype(np.uint8)).save(folder / label / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def int8_run(tmp_path_factory):
    """-> (folder of images, cache, checkpoint, CompletedProcess of the command)."""
    place = tmp_path_factory.mktemp("int8")
    data = reds_and_blues(place / "data")
    checkpoint = small_clip.save_state_dict(mild_vit(), place / "mild.pt")
    flags = f"--clip_model {checkpoint} --precision int8 --data_dir {data} --limit 80"
    result = subprocess.run(
        [sys.executable, ROOT / "prepare_clip.py", *flags.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "CLIP_CACHE": str(place / "cache")},
        timeout=600,
    )
    return data, place / "cache", checkpoint, result


def mild_vit():
    """Torch's initial weights, because int8 can follow their weak attention."""
    import torch

    torch.manual_seed(0)
    return small_clip.rounded(small_clip.clip.model.VisionTransformer(64, 16, 128, 2, 2, 32))


@pytest.mark.long
def test_int8_is_another_encoder_and_reports_its_closeness(int8_run, monkeypatch):
    _, cache, checkpoint, result = int8_run
    assert result.returncode == 0, result.stderr
    monkeypatch.setenv("CLIP_CACHE", str(cache))
    folder = prepare.ensure_encoder(str(checkpoint), "int8")
    float_folder = prepare.ensure_encoder(str(checkpoint))
    assert str(folder) == result.stdout.strip() and "test images" in result.stderr
    plain, int8 = runtime.read_manifest(float_folder), runtime.read_manifest(folder)
    assert int8["name"] == "mild int8"
    assert int8["identity"] != plain["identity"] and int8["dim"] == plain["dim"]
    encoder = runtime.Encoder(folder)
    assert encoder.precision == "int8"
    image = decoding.decode_image(runtime.golden_image())
    pixels = preprocessing.preprocess(image, encoder.transform)[None]
    np.testing.assert_allclose(encoder.encode(pixels)[0], int8["golden"], rtol=1e-4, atol=1e-4)
    size, float_size = ((f / "encoder.bin").stat().st_size for f in (folder, float_folder))
    assert size < 0.7 * float_size


@pytest.mark.long
def test_int8_features_name_their_encoder_and_are_close(int8_run, script, tmp_path):
    data, cache, checkpoint, _ = int8_run
    files = {}
    for precision in ("float32", "int8"):
        flags = f"--data_dir {data} --output_file {precision}.npz --precision {precision}"
        settings = {"CLIP_MODEL": str(checkpoint), "CLIP_CACHE": str(cache)}
        result = script("extract_features.py", *flags.split(), **settings)
        assert result.returncode == 0, result.stderr
        files[precision] = load_features(tmp_path / f"{precision}.npz")
    assert files["int8"]["meta"]["encoder"]["name"] == "mild int8"
    assert files["int8"]["meta"]["key"]["precision"] == "int8"
    cosine = closeness.cosines(files["float32"]["features"], files["int8"]["features"])
    assert 0.99 <= cosine.mean() < 1
    result = script("train_model.py", "--features_file", "float32.npz", "int8.npz")
    assert_one_line_error(result, "was made by 'mild'", "by 'mild int8'")


def test_a_missing_int8_form_names_the_command(script, tmp_path):
    checkpoint = tmp_path / "mine.pt"
    checkpoint.write_bytes(b"weights")
    command = f"python prepare_clip.py --clip_model {checkpoint} --precision int8 --data_dir DIR"
    with pytest.raises(EncoderError, match=f"run {command}"):
        prepare.ensure_encoder(str(checkpoint), "int8")


@pytest.mark.parametrize(
    "change, figure",
    [
        ({"cosine": 0.98}, "cosine to float32: mean 0.9800"),
        ({"agreement": 0.985}, "98.5% of the verdicts"),
    ],
)
def test_int8_that_is_not_close_is_refused_with_figures_and_not_kept(monkeypatch, change, figure):
    attempts = []

    def copied(folder, scratch, *_):
        attempts.append(folder)
        for name in ("encoder.xml", "encoder.bin"):
            (scratch / name).write_bytes((folder / name).read_bytes())

    for name in ("plain", "accuracy_controlled"):
        monkeypatch.setattr(quantize, name, copied)
    figures = {"cosine": 1.0, "lowest": 0.9, "agreement": 1.0, **change}
    monkeypatch.setattr(quantize, "closeness", lambda *_: figures)
    pixels = np.zeros((4, 3, 64, 64), np.float32)
    with pytest.raises(EncoderError, match=f"int8 is refused.*{figure}.*on 2 test images") as error:
        quantize.quantize(small.ENCODER, pixels, np.array([0, 1, 0, 1]))
    assert "\n" not in str(error.value) and len(attempts) == 2
    assert {p.name for p in runtime.cache_dir().iterdir()} <= {"compiled", "encoders"}
    assert [p.name for p in (runtime.cache_dir() / "encoders").iterdir()] == [small.ENCODER.name]


def test_closeness_measures_turned_features_and_verdicts():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    reference = rng.normal(size=(400, 16)).astype(np.float32)
    reference[:, 0] += 4 * labels
    same = quantize.closeness(reference, reference[200:], labels)
    assert same["cosine"] == pytest.approx(1) and same["agreement"] == 1
    turned = reference[200:].copy()
    turned[:40, 0] = 4 - turned[:40, 0]  # a fifth of the images change their class
    figures = quantize.closeness(reference, turned, labels)
    assert figures["agreement"] == pytest.approx(0.8, abs=0.04)
    assert figures["lowest"] < 0.9 < figures["cosine"] < 1


def test_missing_nncf_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(EncoderError, match="needs nncf .*: pip install -r requirements/int8.txt"):
        quantize.require_nncf()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--precision", "int8"], ["--precision int8", "--data_dir"]),
        (["--precision", "int8", "--data_dir", "nowhere"], ["--data_dir nowhere: no such folder"]),
        (
            ["--precision", "int8", "--data_dir", ".", "--limit", "10"],
            ["--limit 10", "at least 40"],
        ),
    ],
)
def test_wrong_int8_flags_are_one_line_errors(script, flags, words):
    result = script("prepare_clip.py", "--clip_model", small.CHECKPOINT, *flags)
    assert_one_line_error(result, *words)


def test_copies_of_an_image_count_once_for_int8(make_folder, tmp_path):
    folder = make_folder(tmp_path / "data", {"real": 1, "fake": 1})
    for label in ("real", "fake"):
        for i in range(1, 30):
            shutil.copy(folder / label / "000.jpg", folder / label / f"{i:03d}.jpg")
    with pytest.raises(UsageError, match="2 different images can be read"):
        quantize.read_images(folder, 400, preprocessing.clip_transform(64))


def test_too_few_int8_images_are_refused(make_folder, tmp_path):
    with pytest.raises(UsageError, match="14 different images can be read; int8 needs at least 40"):
        folder = make_folder(tmp_path / "data", {"real": 10, "fake": 4})
        quantize.read_images(folder, 400, preprocessing.clip_transform(64))
