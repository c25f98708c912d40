"""--layers: features from another depth of the tower are what hooks on CLIP's own modules see, on every path; the encoder's
identity, the model and what classifies follow."""

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
    """One for all of them: an encoder is prepared once."""
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
def seen_by_hooks(kind, tower, pixels):
    """{block number, 'penultimate' or 'final': what CLIP's own forward pass has there, float32 [n, width]}"""
    seen, hooks = {}, []
    blocks = (
        tower.transformer.resblocks
        if kind == "vit"
        else [getattr(tower, f"layer{i}") for i in (1, 2, 3, 4)]
    )
    for number, block in enumerate(blocks, 1):
        hooks.append(
            block.register_forward_hook(
                lambda module, given, out, number=number: seen.update({number: out})
            )
        )
    if kind == "vit":
        hooks.append(
            tower.ln_post.register_forward_hook(
                lambda module, given, out: seen.update(penultimate=out)
            )
        )
    seen["final"] = tower(torch.from_numpy(pixels))
    for hook in hooks:
        hook.remove()
    for number in range(1, len(blocks) + 1):
        seen[number] = (
            seen[number][0] if kind == "vit" else seen[number].mean((2, 3))
        )  # [tokens, n, width]: the class token
    if (
        kind == "resnet"
    ):  # final = penultimate @ weight.T + bias, which only an exact penultimate undoes
        weight, bias = tower.attnpool.c_proj.weight.detach(), tower.attnpool.c_proj.bias.detach()
        seen["penultimate"] = lambda features: torch.from_numpy(features) @ weight.T + bias
    return seen


def assert_as_hooks_see(kind, tower, asked, features, pixels):
    seen = seen_by_hooks(kind, tower, pixels)
    if asked == "penultimate" and kind == "resnet":
        features, expected = seen["penultimate"](features).numpy(), seen["final"].numpy()
    elif asked == "penultimate":
        expected = seen["penultimate"].numpy()
    else:
        names = layers.canonical(asked, weights.architecture(small_clip.arrays_of(tower))).split(
            ","
        )
        parts = [seen[name if name == "final" else int(name)] for name in names]
        expected = torch.cat([part / part.norm(dim=1, keepdim=True) for part in parts], 1).numpy()
    assert features.shape == expected.shape
    assert small_clip.centred_cosines(features, expected).min() >= 0.99999
    assert np.linalg.norm(features) == pytest.approx(np.linalg.norm(expected), rel=1e-3)


@pytest.mark.parametrize("number", range(3))
def test_openvino_gives_what_hooks_on_clips_own_modules_see(case, number, clip_cache):
    kind, tower, path, pixels = case
    asked = ASKED[kind][number]
    folder = prepare.ensure_encoder(str(path), layers=asked)
    encoder = runtime.Encoder(folder, "cpu", "float32")
    features = encoder.encode(pixels)
    assert features.shape[1] == encoder.dim == WIDTH[kind].get(asked, encoder.dim)
    assert_as_hooks_see(kind, tower, asked, features, pixels)
    assert (
        len(encoder.manifest["golden"]) == encoder.dim
        and encoder.name == f"small {encoder.manifest['layers']}"
    )
    assert runtime.clip_model_of(encoder.manifest) == "small"


@pytest.mark.parametrize("asked", ["final", *ASKED["vit"]])
def test_the_numpy_form_of_a_vit_gives_the_same(asked, photos):
    """The golden picture's features are its work: a service compares OpenVINO with them at its start."""
    images = small_clip.crops(photos)
    tower = small_clip.small_vit(images)
    arrays, pixels = (
        small_clip.arrays_of(tower),
        small_clip.pixels_of(images, tower.input_resolution),
    )
    arch = weights.architecture(arrays)
    features = vit.numpy_forward(arrays, arch, layers.canonical(asked, arch), pixels)
    assert features.dtype == np.float32
    if asked == "final":
        assert (
            small_clip.centred_cosines(
                features, tower(torch.from_numpy(pixels)).detach().numpy()
            ).min()
            > 0.99999
        )
    else:
        assert_as_hooks_see("vit", tower, asked, features, pixels)


@pytest.mark.parametrize("number", range(3))
def test_the_path_that_cuda_takes_gives_the_same(case, number, clip_cache):
    """In torch, here on the processor."""
    kind, tower, path, pixels = case
    asked = ASKED[kind][number]
    folder = prepare.ensure_encoder(str(path), layers=asked)
    forward, _ = runtime.torch_forward(
        folder / "vision.safetensors", runtime.read_manifest(folder), "cpu", "float32"
    )
    assert_as_hooks_see(kind, tower, asked, forward(pixels), pixels)


def test_every_choice_of_layers_is_an_encoder_of_its_own_and_is_prepared_once(case, clip_cache):
    kind, _, path, _ = case
    folders = {
        asked: prepare.ensure_encoder(str(path), layers=asked) for asked in ["final", *ASKED[kind]]
    }
    manifests = [runtime.read_manifest(folder) for folder in folders.values()]
    assert (
        len({manifest["identity"] for manifest in manifests})
        == len(folders)
        == len(set(folders.values()))
    )
    changed = {folder: folder.stat().st_mtime_ns for folder in folders.values()}
    assert {asked: prepare.ensure_encoder(str(path), layers=asked) for asked in folders} == folders
    assert {folder: folder.stat().st_mtime_ns for folder in folders.values()} == changed
    multi = runtime.read_manifest(folders["multi"])["layers"]
    assert (
        prepare.ensure_encoder(str(path), layers=multi) == folders["multi"]
    )  # the blocks by number are the same encoder


@pytest.mark.parametrize(
    "depth, blocks", [(24, "8,14,20,final"), (12, "4,7,10,final"), ([3, 4, 6, 3], "1,2,3,final")]
)
def test_multi_takes_blocks_by_relative_depth(depth, blocks):
    assert layers.canonical("multi", {"layers": depth}) == blocks


def test_blocks_are_named_in_order_and_once():
    assert (
        layers.canonical("7,3,3", {"layers": 12}) == "3,7"
        and layers.canonical("10,1,final", {"layers": 12}) == "1,10,final"
    )


@pytest.mark.parametrize("asked", ["0", "25", "3,25,final"])
def test_a_block_that_is_not_there_is_one_line(asked):
    with pytest.raises(EncoderError, match=rf"--layers {asked}: this encoder has blocks 1 to 24"):
        layers.canonical(asked, {"layers": 24})


@pytest.mark.parametrize("asked", ["last", "1,,2", "final,3"])
def test_what_is_no_layer_is_one_line(script, asked):
    done = script("extract_features.py", "--data_dir", ".", f"--layers={asked}")
    assert_one_line_error(
        done, f"--layers '{asked}': name final, penultimate, multi or numbers of blocks"
    )


@pytest.mark.long
def test_training_and_classifying_follow_the_layers(
    script, tmp_path, photos, make_folder, clip_cache
):
    """And a model whose encoder is gone names the command that brings it back."""
    path = small_clip.save_state_dict(
        small_clip.small_vit(small_clip.crops(photos)), tmp_path / "small.pt"
    )
    make_folder(
        tmp_path / "data",
        {f"{split}/{label}": 30 for split in ("train", "test") for label in ("real", "fake")},
    )
    done = script(
        "extract_features.py", "--data_dir", "data", "--clip_model", "small.pt", "--layers", "multi"
    )
    assert done.returncode == 0, done.stderr
    features = load_features(tmp_path / "features.npz")
    assert (
        features["features"].shape[1] == 32 + 2 * 128
        and features["meta"]["encoder"]["layers"] == "1,2,final"
    )
    done = script("train_model.py", "--classifier", "linear-svm")
    assert done.returncode == 0, done.stderr
    picture = next((tmp_path / "data").rglob("*.jpg"))
    done = script(
        "classify.py", "--image_path", str(picture), "--model_path", "model.joblib", "--details"
    )
    assert done.returncode == 0, done.stderr
    for folder in (clip_cache / "encoders").glob("*"):
        if runtime.read_manifest(folder)["layers"] == "1,2,final":
            (folder / "encoder.json").unlink()
    done = script("classify.py", "--image_path", str(picture), "--model_path", "model.joblib")
    assert_one_line_error(
        done, "prepare_clip.py --clip_model with its checkpoint --layers 1,2,final"
    )
