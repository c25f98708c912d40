"""int8: another encoder, made on labelled images of one's own and proved on others, or refused with the figures."""

import os
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
    """80 pictures whose classes no rounding can confuse: random weights see colours, but little else."""
    rng = np.random.default_rng(0)
    for label, tint in (("real", (1, 0.3, 0.3)), ("fake", (0.3, 0.3, 1))):
        (folder / label).mkdir(parents=True)
        for i in range(40):
            blocks = np.kron(rng.integers(60, 256, (4, 4, 1)) * tint, np.ones((32, 32, 1)))
            Image.fromarray(blocks.astype(np.uint8)).save(folder / label / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """-> (folder of images, cache, checkpoint, what the command said)."""
    place = tmp_path_factory.mktemp("int8")
    data = reds_and_blues(place / "data")
    checkpoint = small_clip.save_state_dict(mild_vit(), place / "mild.pt")
    result = subprocess.run(
        [
            sys.executable,
            str(ROOT / "prepare_clip.py"),
            "--clip_model",
            str(checkpoint),
            "--precision",
            "int8",
            "--data_dir",
            str(data),
            "--limit",
            "80",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "CLIP_CACHE": str(place / "cache")},
        timeout=600,
    )
    return data, place / "cache", checkpoint, result


def mild_vit():
    """As torch initialises it, with a little more contrast: attention that int8 can follow."""
    import torch

    torch.manual_seed(0)
    return small_clip.rounded(small_clip.clip.model.VisionTransformer(64, 16, 128, 2, 2, 32))


@pytest.mark.long
def test_int8_is_another_encoder_and_reports_its_closeness(made, monkeypatch):
    data, cache, checkpoint, result = made
    assert result.returncode == 0, result.stderr
    monkeypatch.setenv("CLIP_CACHE", str(cache))
    folder = prepare.ensure_encoder(str(checkpoint), "int8")
    assert str(folder) == result.stdout.strip() and "test images" in result.stderr
    plain, int8 = (
        runtime.read_manifest(f) for f in (prepare.ensure_encoder(str(checkpoint)), folder)
    )
    assert (
        int8["identity"] != plain["identity"]
        and int8["name"] == "mild int8"
        and int8["dim"] == plain["dim"]
    )
    encoder = runtime.Encoder(folder)
    assert encoder.precision == "int8"
    pixels = preprocessing.preprocess(
        decoding.decode_image(runtime.golden_image()), encoder.resolution
    )[None]
    np.testing.assert_allclose(encoder.encode(pixels)[0], int8["golden"], rtol=1e-4, atol=1e-4)
    assert (folder / "encoder.bin").stat().st_size < 0.7 * (
        prepare.ensure_encoder(str(checkpoint)) / "encoder.bin"
    ).stat().st_size


@pytest.mark.long
def test_int8_features_name_their_encoder_and_are_close(made, script, tmp_path):
    data, cache, checkpoint, _ = made
    found = {}
    for precision in ("float32", "int8"):
        result = script(
            "extract_features.py",
            "--data_dir",
            data,
            "--output_file",
            f"{precision}.npz",
            "--precision",
            precision,
            CLIP_MODEL=str(checkpoint),
            CLIP_CACHE=str(cache),
        )
        assert result.returncode == 0, result.stderr
        found[precision] = load_features(tmp_path / f"{precision}.npz")
    assert (
        found["int8"]["meta"]["encoder"]["name"] == "mild int8"
        and found["int8"]["meta"]["key"]["precision"] == "int8"
    )
    cosine = closeness.cosines(found["float32"]["features"], found["int8"]["features"])
    assert 0.99 <= cosine.mean() < 1
    result = script("train_model.py", "--features_file", "float32.npz", "int8.npz")
    assert_one_line_error(result, "was made by 'mild'", "by 'mild int8'")


def test_a_missing_int8_form_names_the_command(script, tmp_path):
    checkpoint = tmp_path / "mine.pt"
    checkpoint.write_bytes(b"weights")
    with pytest.raises(
        EncoderError,
        match=(
            f"run python prepare_clip.py --clip_model {checkpoint} --precision int8 --data_dir DIR"
        ),
    ):
        prepare.ensure_encoder(str(checkpoint), "int8")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"cosine": 0.98}, "cosine to float32 0.9800"),
        ({"agreement": 0.985}, "98.5% of the verdicts"),
    ],
)
def test_int8_that_is_not_close_is_refused_with_figures_and_not_kept(
    tmp_path, monkeypatch, change, said
):
    tried = []

    def copied(folder, scratch, *_):
        tried.append(folder)
        for name in ("encoder.xml", "encoder.bin"):
            (scratch / name).write_bytes((folder / name).read_bytes())

    for name in ("plain", "accuracy_controlled"):
        monkeypatch.setattr(quantize, name, copied)
    monkeypatch.setattr(
        quantize, "closeness", lambda *_: {"cosine": 1.0, "lowest": 0.9, "agreement": 1.0, **change}
    )
    side = runtime.read_manifest(small.ENCODER)["resolution"]
    with pytest.raises(EncoderError, match=f"int8 is refused.*{said}.*on 2 test images") as error:
        pixels = np.zeros((4, 3, side, side), np.float32)
        quantize.quantize(small.ENCODER, pixels, np.array([0, 1, 0, 1]))
    assert "\n" not in str(error.value) and len(tried) == 2
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
    turned[:40, 0] = 4 - turned[:40, 0]  # a fifth of the images change sides
    found = quantize.closeness(reference, turned, labels)
    assert (
        found["agreement"] == pytest.approx(0.8, abs=0.04)
        and found["lowest"] < 0.9 < found["cosine"] < 1
    )


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


def test_too_few_int8_images_are_refused(make_folder, tmp_path):
    with pytest.raises(UsageError, match="14 images can be read; int8 needs at least 40"):
        quantize.read_images(make_folder(tmp_path / "data", {"real": 10, "fake": 4}), 400, 64)
