"""Encoders of timm: its pixels bit for bit, its features, its layers, and what is refused."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import timm_small
from commands import ROOT, assert_one_line_error
from made_up import write_features
from PIL import Image
from small_clip import centred_cosines, crops

from detector.base.errors import EncoderError
from detector.encoders import prepare, runtime, timm_towers
from detector.encoders.layers import canonical
from detector.images import preprocessing

LITE0 = "tf_efficientnet_lite0.in1k"
ENCODERS = ROOT / "docs" / "encoders.md"


@pytest.fixture(scope="module")
def towers(photos, tmp_path_factory):
    """Function: name of a tower -> (weights, pixels float32 [16, 3, r, r]); made once."""
    place, made = tmp_path_factory.mktemp("towers"), {}

    def make(name):
        if name not in made:
            pixels = timm_small.pixels_of(crops(photos), name)
            path = timm_small.save_random(name, place / f"{name}.safetensors", pixels)
            made[name] = path, pixels
        return made[name]

    return make


@pytest.fixture
def lite0(towers):
    """CLIP_MODEL of an EfficientNet-Lite0 with random weights."""
    return f"timm:{LITE0}@{towers(LITE0)[0]}"


# ---- pixels ----

SIZES = [(1, 1), (301, 240), (240, 301), (64, 1000), (999, 65), (225, 224), (224, 224), (500, 500)]


def noise(size):
    rng = np.random.default_rng(list(size))
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def differing(image, transform):
    """Number of values in which ours differ from `timm.data.create_transform`'s."""
    from timm.data import create_transform

    settings = transform._asdict()
    share, side = settings.pop("crop_share"), settings.pop("resolution")
    theirs = create_transform(input_size=(3, side, side), crop_pct=share, **settings)
    ours = preprocessing.preprocess(image, transform)
    assert ours.dtype == np.float32 and ours.shape == (3, side, side)
    return int((ours != theirs(image).numpy()).sum())


@pytest.mark.parametrize("share", [1.0, 0.95, 0.9, 0.875])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_the_pixels_are_those_of_timm_bit_for_bit(mode, filter, share):
    for resolution in (224, 378):
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        transform = preprocessing.Transform(resolution, mean, std, filter, share, mode)
        assert [differing(noise(size), transform) for size in SIZES] == [0] * len(SIZES)


@pytest.mark.parametrize("change", [{"crop_share": 0.9}, {"crop_mode": "squash"}])
def test_the_comparison_of_pixels_detects_a_planted_fault(change, monkeypatch):
    right, transform = preprocessing.preprocess, preprocessing.clip_transform(224)
    monkeypatch.setattr(
        preprocessing, "preprocess", lambda image, how: right(image, how._replace(**change))
    )
    assert differing(noise((301, 240)), transform) > 0


@pytest.mark.parametrize(
    "name, resolution, share, mode",
    [
        ("vit_pe_core_large_patch14_336.fb", 336, 1.0, "center"),
        ("vit_large_patch16_dinov3.lvd1689m", 256, 1.0, "center"),
        ("vit_so400m_patch14_siglip_378.v2_webli", 378, 0.9, "center"),
        ("vit_base_patch16_clip_quickgelu_224.openai", 224, 0.9, "center"),
        ("convnext_tiny.fb_in22k_ft_in1k_384", 384, 1.0, "squash"),
    ],
)
def test_the_transform_is_the_one_that_timm_states(name, resolution, share, mode):
    config = timm_towers.config_of(name)
    transform = timm_towers.transform_of(f"timm:{name}", config, {})
    assert transform == timm_small.transform_of(name)
    assert (transform.resolution, transform.crop_share, transform.crop_mode) == (
        resolution,
        share,
        mode,
    )
    asked = {"crop_share": 0.8, "crop_mode": "squash"}
    changed = timm_towers.transform_of(f"timm:{name}", config, asked)
    assert changed == transform._replace(**asked)


# ---- features ----


@pytest.mark.long
@pytest.mark.parametrize("family", timm_small.FAMILIES)
def test_the_features_of_each_family_are_those_of_timm(family, towers):
    name = timm_small.FAMILIES[family]
    path, pixels = towers(name)
    expected = timm_small.outputs_by_hooks(timm_small.reference(name, path), pixels)
    expected = {key: value.numpy() for key, value in expected.items()}
    depth = len(expected) - 1
    for layers in ("final", "penultimate", f"1,{depth}", "multi"):
        folder = prepare.ensure_encoder(f"timm:{name}@{path}", layers=layers)
        runtime.Encoder(folder, "cpu", "float32")  # compiles; the next takes it from the cache
        encoder = runtime.Encoder(folder, "cpu", "float32")
        stated = json.loads(json.dumps(timm_small.transform_of(name)))
        assert list(encoder.transform) == stated
        parts = [expected[part] for part in parts_of(layers, depth)]
        if layers not in ("final", "penultimate"):
            parts = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
        wanted = np.concatenate(parts, 1)
        for batch in (1, 3, 8) if layers == "multi" else (8,):
            starts = range(0, len(pixels), batch)
            ours = np.concatenate([encoder.encode(pixels[i : i + batch]) for i in starts])
            assert centred_cosines(ours, wanted).min() >= 0.99999


def parts_of(layers, depth):
    if layers == "penultimate":
        return [str(depth)]
    return canonical(layers, {"layers": depth}).split(",")


FAULTS = {
    "swapped channels": lambda pixels: pixels[:, ::-1].copy(),
    "a pixel's shift": lambda pixels: np.roll(pixels, 1, axis=3),
    "two images exchanged": lambda pixels: pixels[[1, 0, *range(2, 16)]],
}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", timm_small.FAMILIES)
def test_the_comparison_of_features_detects_a_planted_fault(family, fault, towers):
    path, pixels = towers(name := timm_small.FAMILIES[family])
    tower = timm_small.reference(name, path)
    both = pixels, FAULTS[fault](pixels)
    right, wrong = (timm_small.outputs_by_hooks(tower, x)["final"].numpy() for x in both)
    assert centred_cosines(wrong, right).min() < 0.9999


@pytest.mark.parametrize("fault", ["registers", "mean of patches"])
def test_the_comparison_of_features_detects_another_token(fault, towers):
    name = timm_small.FAMILIES["class token and registers"]
    path, pixels = towers(name)
    tower = timm_small.reference(name, path)
    seen = {}
    tower.blocks[2].register_forward_hook(lambda *args: seen.update(x=args[2]))
    right = timm_small.outputs_by_hooks(tower, pixels)["3"].numpy()
    wrong = seen["x"][:, 1] if fault == "registers" else seen["x"][:, 5:].mean(1)
    assert centred_cosines(wrong.numpy(), right).max() < 0.999


def test_the_torch_path_gives_the_features_of_openvino(lite0, towers):
    """As on CUDA, but on the CPU."""
    folder = prepare.ensure_encoder(lite0, layers="multi")
    pixels = towers(LITE0)[1]
    ours = runtime.Encoder(folder, "cpu", "float32").encode(pixels)
    manifest, weights = runtime.read_manifest(folder), folder / "vision.safetensors"
    for precision, least in (("float32", 0.99999), ("float16", 0.99)):
        forward, _ = runtime.torch_forward(weights, manifest, "cpu", precision)
        assert centred_cosines(forward(pixels), ours).min() >= least


# ---- identity ----


def test_the_crop_is_part_of_the_identity_and_of_the_name(lite0, script):
    flags = ("--clip_model", lite0)
    folders = [
        script("prepare_clip.py", *flags, *more).stdout.strip()
        for more in ((), ("--crop_share", "1.0"), ("--crop_mode", "squash"), ())
    ]
    manifests = [runtime.read_manifest(folder) for folder in folders]
    assert folders[3] == folders[0] and len({m["identity"] for m in manifests}) == 3
    assert [m["name"].removeprefix(f"timm:{LITE0}@{LITE0}.safetensors") for m in manifests] == [
        "",
        " --crop_share 1.0",
        " --crop_mode squash",
        "",
    ]
    assert [m["transform"]["crop_share"] for m in manifests[:2]] == [0.875, 1.0]
    assert manifests[2]["transform"]["crop_mode"] == "squash"


def test_a_prepared_folder_serves_as_clip_model(lite0, script, make_folder, tmp_path):
    prepared = script("prepare_clip.py", "--clip_model", lite0, "--crop_share", "1.0")
    data = make_folder(tmp_path / "data", {"train/real": 6, "train/fake": 6})
    output, flags = tmp_path / "f.npz", ("--clip_model", prepared.stdout.strip())
    result = script("extract_features.py", "--data_dir", data, "--output_file", output, *flags)
    assert result.returncode == 0, result.stderr
    with np.load(output) as features:
        encoder = json.loads(str(features["meta"]))["encoder"]
    assert encoder["name"].endswith("--crop_share 1.0")
    wrong = script("extract_features.py", "--data_dir", data, *flags, "--layers", "2")
    assert_one_line_error(wrong, "--layers 2", "leave out --layers")


def test_a_prepared_folder_of_another_cache_is_refused(lite0, script, tmp_path):
    prepared = script("prepare_clip.py", "--clip_model", lite0, CLIP_CACHE=str(tmp_path / "other"))
    result = script("prepare_clip.py", "--clip_model", prepared.stdout.strip())
    assert_one_line_error(result, tmp_path / "other", "is no encoder of the cache")


# ---- what the user reads ----


def test_licence_and_notes_are_printed_once(lite0, script):
    first, second = (script("prepare_clip.py", "--clip_model", lite0) for _ in range(2))
    assert first.stderr.count("timm states the licence apache-2.0") == 1
    assert second.returncode == 0 and second.stderr == ""
    assert first.stdout == second.stdout


def test_the_notes_of_timm_are_printed(script, tmp_path):
    name = "cspnext_tiny.rsb_a1_in1k"
    path = timm_small.save_random(
        name, tmp_path / "weights.safetensors", np.ones((2, 3, 64, 64), np.float32)
    )
    result = script("prepare_clip.py", "--clip_model", f"timm:{name}@{path}")
    for note in timm_towers.config_of(name).notes:
        assert f"timm:{name}@{path}: {note}\n" in result.stderr


@pytest.mark.parametrize(
    "name, words",
    [
        ("apache-2.0", "the licence apache-2.0"),
        ("cc-by-nc-4.0", "which is non-commercial: ask before you deploy"),
        ("fair-noncommercial-research-license", "non-commercial"),
        ("dinov3-license", "dinov3-license: read it before you deploy"),
        (None, "unknown: read it"),
    ],
)
def test_a_licence_that_restricts_is_pointed_out(name, words):
    assert words in timm_towers.licence(name)


def test_the_documented_licences_are_those_that_timm_states():
    rows = re.findall(r"^\| .* \| `timm:(\S+)` \| (.*) \|$", ENCODERS.read_text(), re.MULTILINE)
    names = {"Apache-2.0": "apache-2.0", "DINOv3": "dinov3-license", "CC-BY-NC-4.0": "cc-by-nc-4.0"}
    assert len(rows) >= 7
    for tower, words in rows:
        stated = timm_towers.config_of(tower).license
        assert stated == next(name for start, name in names.items() if words.startswith(start))
        advice = timm_towers.licence(stated).partition(": ")[2]
        assert advice in words


@pytest.mark.parametrize(
    "clip_model, words",
    [
        ("timm:convnext_atom", ["no tower of timm", "did you mean timm:convnext"]),
        ("timm:convnext_atto.d2_in2k", ["did you mean timm:convnext_atto.d2_in1k"]),
        (
            "timm:vit_base_patch16_clip_224.openai",
            ["another activation", "timm:vit_base_patch16_clip_quickgelu_224.openai"],
        ),
        ("timm:vit_base_patch16_sapiens2.fb", ["768 x 1024"]),
        ("timm:deepseek_vit_412m.deepseek_v4_1_flash", ["border", "--crop_mode center or squash"]),
        ("timm:convnext_atto.d2_in1k@missing.safetensors", ["cannot read missing.safetensors"]),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_in_one_line(clip_model, words, script):
    result = script("prepare_clip.py", "--clip_model", clip_model)
    assert_one_line_error(result, *words)


def test_every_clip_tower_without_quickgelu_has_its_remedy():
    import timm

    refused = 0
    for name in timm.list_pretrained():
        try:
            timm_towers.config_of(name)
        except EncoderError as error:
            refused += 1
            assert timm_towers.config_of(str(error).split("timm:")[-1]).notes, name
    assert refused >= 10


@pytest.mark.parametrize("content", ["of another tower", "not safetensors", "without a tensor"])
def test_a_file_with_other_weights_is_refused_in_one_line(content, towers, script, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "weights.safetensors"
    if content == "not safetensors":
        path.write_bytes(b"PK" * 100)
    else:
        arrays = load_file(towers(LITE0)[0])
        arrays.pop("conv_head.weight")
        save_file(arrays, path)
    name = "convnext_atto.d2_in1k" if content == "of another tower" else LITE0
    result = script("prepare_clip.py", "--clip_model", f"timm:{name}@{path}")
    assert_one_line_error(result, f"cannot load 'timm:{name}", "fetch model.safetensors")
    assert not list((tmp_path / "home/.clip/encoders").glob("timm*"))


def test_weights_that_float16_cannot_hold_are_refused(towers, script, tmp_path):
    from safetensors.torch import load_file, save_file

    arrays = load_file(towers(LITE0)[0])
    arrays["conv_head.weight"] = arrays["conv_head.weight"] + 1e6
    save_file(arrays, tmp_path / "large.safetensors")
    result = script("prepare_clip.py", "--clip_model", f"timm:{LITE0}@{tmp_path}/large.safetensors")
    assert_one_line_error(result, "conv_head.weight is not finite in float16")


def test_without_timm_the_error_names_the_requirements(lite0, script, tmp_path):
    (tmp_path / "timm.py").write_text("raise ImportError('No module named timm')")
    result = script("prepare_clip.py", "--clip_model", lite0, PYTHONPATH=str(tmp_path))
    assert_one_line_error(result, "pip install -r requirements/timm.txt")


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--crop_share", "0"), ["--crop_share 0: must be above 0 and at most 1"]),
        (("--crop_share", "0.9"), ["are for timm:NAME", "ViT-L/14"]),
    ],
)
def test_a_crop_that_cannot_be_is_refused(flags, words, script):
    assert_one_line_error(script("prepare_clip.py", *flags), *words)


def test_fine_tuning_a_tower_of_timm_is_refused(lite0, script, make_folder, tmp_path):
    data = make_folder(tmp_path / "data", {"train/real": 4, "train/fake": 4})
    result = script("finetune_clip.py", "--clip_model", lite0, "--data_dir", data)
    assert_one_line_error(result, "only CLIP can be fine-tuned")


def test_a_model_whose_encoder_is_missing_names_the_command(lite0, script, tmp_path, photos):
    manifest = runtime.read_manifest(prepare.ensure_encoder(lite0, crop={"crop_share": 0.9}))
    write_features(
        tmp_path / "f.npz", encoder={k: manifest[k] for k in ("name", "identity", "layers", "dim")}
    )
    assert script("train_model.py", "--features_file", tmp_path / "f.npz").returncode == 0
    env = {"CLIP_CACHE": str(tmp_path / "empty")}
    result = script(
        "classify.py", "--image_path", photos["coffee.png"], "--model_path", "model.joblib", **env
    )
    command = f"prepare_clip.py --clip_model timm:{LITE0}@{LITE0}.safetensors --crop_share 0.9"
    assert_one_line_error(result, command)


# ---- the hub ----


class Hub(BaseHTTPRequestHandler):
    """Stands in for Hugging Face's hub, which tests must not need: one file of one repository."""

    def do_HEAD(self):
        self.send_response(200 if self.path.endswith("/model.safetensors") else 404)
        size = len(self.server.data)
        for name, value in {
            "X-Repo-Commit": "c" * 40,
            "ETag": '"e"',
            "Content-Length": size,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()

    def do_GET(self):
        self.server.paths.append(self.path)
        self.do_HEAD()
        self.wfile.write(self.server.data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(towers):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.data, server.paths = towers(LITE0)[0].read_bytes(), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_weights_come_from_the_hub_once(hub, script, lite0):
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1"}
    folders = [script("prepare_clip.py", "--clip_model", f"timm:{LITE0}", **env) for _ in range(2)]
    assert [result.returncode for result in folders] == [0, 0], folders[0].stderr
    assert hub.paths == [f"/timm/{LITE0}/resolve/main/model.safetensors"]  # and no telemetry
    manifest = runtime.read_manifest(folders[0].stdout.strip())
    assert manifest["source"] == manifest["name"] == f"timm:{LITE0}"
    assert manifest["identity"] == runtime.read_manifest(prepare.ensure_encoder(lite0))["identity"]


def test_a_hub_that_cannot_be_reached_is_named_with_the_remedy(script):
    result = script("prepare_clip.py", "--clip_model", f"timm:{LITE0}", HF_HUB_OFFLINE="1")
    words = f"https://huggingface.co/timm/{LITE0}", f"--clip_model timm:{LITE0}@model.safetensors"
    assert_one_line_error(result, f"cannot load 'timm:{LITE0}'", *words)
