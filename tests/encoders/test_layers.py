"""--layers: features of other layers match hooks on CLIP's own modules, on every path.

The encoder's identity, the model and the classification follow the layers.
"""

import numpy as np
import pytest
import small_clip
import torch
from commands import assert_one_line_error

from detector.base.errors import EncoderError
from detector.encoders import layers, prepare, runtime, vit, weights
from detector.features.file import load_features

pytestmark = pytest.mark.usefixtures("one_thread")

ASKED = {"vit": ["penultimate", "multi", "2"], "resnet": ["penultimate", "multi", "1,3"]}
WIDTH = {
    "vit": {"penultimate": 128, "multi": 32 + 2 * 128},
    "resnet": {"penultimate": 1024, "multi": 32 + 128 + 256 + 512},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def clip_cache(cache, monkeypatch):
    """All tests share a cache, so each encoder is prepared once."""
    monkeypatch.setenv("CLIP_CACHE", str(cache))
    return cache


@pytest.fixture(scope="module", params=small_clip.SMALL)
def case(request, photos, tmp_path_factory):
    """(kind, tower, checkpoint, pixels) of a small tower with random weights."""
    images = small_clip.crops(photos)
    tower = small_clip.SMALL[request.param](images)
    path = small_clip.save_state_dict(tower, tmp_path_factory.mktemp("clip") / "small.pt")
    return request.param, tower, path, small_clip.pixels_of(images, tower.input_resolution)


@torch.inference_mode()
def assert_as_hooks_see(kind, tower, asked, features, pixels):
    """Compare features with what hooks on CLIP's own modules saw in its forward pass."""
    seen = small_clip.outputs_by_hooks(tower, pixels)
    if asked == "penultimate" and kind == "resnet":
        # no hook sees it, but only an exact penultimate layer projects to the final one
        features = tower.attnpool.c_proj(torch.from_numpy(features)).numpy()
        expected = seen["final"].numpy()
    elif asked in ("final", "penultimate"):
        expected = seen[asked].numpy()
    else:
        names = layers.canonical(asked, weights.architecture(small_clip.arrays_of(tower)))
        expected = small_clip.joined(seen, names.split(","))
    assert features.shape == expected.shape
    assert small_clip.centred_cosines(features, expected).min() >= 0.99999
    assert np.linalg.norm(features) == pytest.approx(np.linalg.norm(expected), rel=1e-3)


@pytest.mark.parametrize("number", range(3))
def test_openvino_matches_hooks_on_clips_modules(case, number, clip_cache):
    kind, tower, path, pixels = case
    asked = ASKED[kind][number]
    folder = prepare.ensure_encoder(str(path), layers=asked)
    encoder = runtime.Encoder(folder, "cpu", "float32")
    features = encoder.encode(pixels)
    assert features.shape[1] == encoder.dim == WIDTH[kind].get(asked, encoder.dim)
    assert_as_hooks_see(kind, tower, asked, features, pixels)
    assert len(encoder.manifest["golden"]) == encoder.dim
    assert encoder.name == f"small {encoder.manifest['layers']}"
    assert runtime.clip_model_of(encoder.manifest) == "small"


@pytest.mark.parametrize("asked", ["final", *ASKED["vit"]])
def test_the_numpy_vit_matches_hooks_on_clips_modules(asked, photos):
    """It computes the golden picture's features, a service's reference at its start."""
    images = small_clip.crops(photos)
    tower = small_clip.small_vit(images)
    arrays, pixels = small_clip.arrays_of(tower), small_clip.pixels_of(images, 64)
    arch = weights.architecture(arrays)
    features = vit.numpy_forward(arrays, arch, layers.canonical(asked, arch), pixels)
    assert features.dtype == np.float32
    assert_as_hooks_see("vit", tower, asked, features, pixels)


def test_the_last_block_multiplies_the_class_token_alone(photos):
    arrays = small_clip.arrays_of(small_clip.small_vit(small_clip.crops(photos)))
    model = vit.openvino_model(arrays, weights.architecture(arrays), "final")
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    assert kinds.count("Convolution") == 1 + 4 + 1  # of the patches, and of all tokens
    assert kinds.count("MatMul") == 3 + 1  # of the class token, the last is the projection


@pytest.mark.parametrize("number", range(3))
def test_the_cuda_path_matches_hooks_on_clips_modules(case, number, clip_cache):
    """Runs in torch, here on the CPU."""
    kind, tower, path, pixels = case
    asked = ASKED[kind][number]
    folder = prepare.ensure_encoder(str(path), layers=asked)
    forward, _ = runtime.torch_forward(
        folder / "vision.safetensors", runtime.read_manifest(folder), "cpu", "float32"
    )
    assert_as_hooks_see(kind, tower, asked, forward(pixels), pixels)


def test_each_choice_of_layers_is_a_separate_encoder_prepared_once(case, clip_cache):
    kind, _, path, _ = case
    choices = ["final", *ASKED[kind]]
    folders = {asked: prepare.ensure_encoder(str(path), layers=asked) for asked in choices}
    manifests = {asked: runtime.read_manifest(folder) for asked, folder in folders.items()}
    identities = {manifest["identity"] for manifest in manifests.values()}
    assert len(identities) == len(set(folders.values())) == len(choices)
    times = [folder.stat().st_mtime_ns for folder in folders.values()]
    assert {asked: prepare.ensure_encoder(str(path), layers=asked) for asked in choices} == folders
    assert [folder.stat().st_mtime_ns for folder in folders.values()] == times
    # the same blocks by number are the same encoder
    multi = manifests["multi"]["layers"]
    assert prepare.ensure_encoder(str(path), layers=multi) == folders["multi"]


@pytest.mark.parametrize(
    "depth, blocks", [(24, "8,14,20,final"), (12, "4,7,10,final"), ([3, 4, 6, 3], "1,2,3,final")]
)
def test_multi_takes_blocks_by_relative_depth(depth, blocks):
    assert layers.canonical("multi", {"layers": depth}) == blocks


def test_blocks_are_sorted_and_deduplicated():
    assert layers.canonical("7,3,3", {"layers": 12}) == "3,7"
    assert layers.canonical("10,1,final", {"layers": 12}) == "1,10,final"


@pytest.mark.parametrize("asked", ["0", "25", "3,25,final"])
def test_a_missing_block_is_a_one_line_error(asked):
    with pytest.raises(EncoderError, match=rf"--layers {asked}: this encoder has blocks 1 to 24"):
        layers.canonical(asked, {"layers": 24})


@pytest.mark.parametrize("asked", ["last", "1,,2", "final,3"])
def test_an_invalid_layer_is_a_one_line_error(script, asked):
    done = script("extract_features.py", "--data_dir", ".", f"--layers={asked}")
    assert_one_line_error(
        done, f"--layers '{asked}': name final, penultimate, multi or numbers of blocks"
    )


@pytest.mark.long
def test_training_and_classifying_follow_the_layers(
    script, tmp_path, photos, make_folder, clip_cache
):
    """A model with a missing encoder names the command that prepares it again."""
    tower = small_clip.small_vit(small_clip.crops(photos))
    small_clip.save_state_dict(tower, tmp_path / "small.pt")
    folders = ("train/real", "train/fake", "test/real", "test/fake")
    make_folder(tmp_path / "data", dict.fromkeys(folders, 30))
    picture = tmp_path / "data/train/real/000.jpg"
    for command in (
        "extract_features.py --data_dir data --clip_model small.pt --layers multi",
        "train_model.py --classifier linear-svm",
        f"classify.py --image_path {picture} --model_path model.joblib --details",
    ):
        done = script(*command.split())
        assert done.returncode == 0, done.stderr
    features = load_features(tmp_path / "features.npz")
    assert features["features"].shape[1] == 32 + 2 * 128
    assert features["meta"]["encoder"]["layers"] == "1,2,final"
    for folder in (clip_cache / "encoders").glob("*"):
        if runtime.read_manifest(folder)["layers"] == "1,2,final":
            (folder / "encoder.json").unlink()
    done = script("classify.py", "--image_path", str(picture), "--model_path", "model.joblib")
    assert_one_line_error(
        done, "prepare_clip.py --clip_model with its checkpoint --layers 1,2,final"
    )
