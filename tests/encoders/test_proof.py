"""Checks before a model serves: the pinned hash, the golden picture, and unusable settings.

Also tests the number of processors that a container may use.
"""

import copy
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from engines import model_file
from live import DEMO
from made_up import BASELINE, baseline_for, other_encoder

from detector.base.errors import DetectorError, EncoderError, ModelError, UsageError
from detector.base.files import sha256
from detector.base.project import HERE
from detector.encoders import runtime
from detector.encoders.runtime import Encoder, processors
from detector.images import preprocessing
from detector.model.score import decision
from detector.service.engine import check, check_pin, load_detector, prove, read_model
from detector.service.settings import read_settings
from detector.service.together import TOGETHER

pytestmark = pytest.mark.usefixtures("compiled_once")

HASH = "0123456789abcdef" * 4


# ---- the golden picture ----


@pytest.fixture(scope="module")
def loaded():
    return load_detector(read_settings(DEMO))


@pytest.fixture
def pair(loaded):
    """The small model and encoder, with their own golden features to damage."""
    detector = copy.copy(loaded)
    detector.encoder = copy.copy(loaded.encoder)
    detector.encoder.manifest = {**loaded.encoder.manifest}
    return detector


def test_an_undamaged_model_and_encoder_pass(pair):
    prove(pair)


DAMAGE = {
    "negated": lambda row: -row,
    "in another order": lambda row: row[::-1],
    "not a number": lambda row: row * np.nan,
    "all zero": lambda row: row * 0,
    "infinite": lambda row: row * np.inf,
    "without signs": lambda row: np.abs(row),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of division by zero and nan
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_is_refused(pair, name):
    golden = np.array(pair.encoder.manifest["golden"])
    pair.encoder.manifest["golden"] = DAMAGE[name](golden).tolist()
    with pytest.raises(EncoderError, match="cannot be trusted; prepare the encoder again"):
        prove(pair)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_machine_that_computes_wrong_features_is_refused(pair, monkeypatch, name):
    encode = Encoder.encode
    monkeypatch.setattr(
        Encoder,
        "encode",
        lambda self, pixels: np.stack([DAMAGE[name](row) for row in encode(self, pixels)]),
    )
    with pytest.raises(EncoderError, match="cannot be trusted"):
        prove(pair)


def test_other_preprocessing_is_refused(pair, monkeypatch):
    preprocess = preprocessing.preprocess

    def upside_down(image, transform):
        return preprocess(image, transform)[:, ::-1].copy()

    monkeypatch.setattr(preprocessing, "preprocess", upside_down)
    with pytest.raises(EncoderError, match="cannot be trusted"):
        prove(pair)


def test_turned_features_are_refused_even_with_the_same_probability(pair):
    pair.model = {**pair.model, "calibrator": np.zeros(2)}
    golden = np.array(pair.encoder.manifest["golden"])
    noise = np.random.default_rng(0).normal(size=golden.shape)
    noise -= golden * (noise @ golden) / (golden @ golden)
    noise *= np.linalg.norm(golden) / np.linalg.norm(noise)
    pair.encoder.manifest["golden"] = (golden + np.tan(0.1) * noise).tolist()  # cosine 0.995
    prove(pair)
    pair.encoder.manifest["golden"] = (golden + np.tan(0.2) * noise).tolist()
    with pytest.raises(EncoderError, match=r"cosine 0\.98"):
        prove(pair)


def test_another_probability_is_refused_even_with_close_features(pair):
    golden, slope = np.float32(pair.encoder.manifest["golden"]), pair.model["calibrator"][0]
    pair.encoder.manifest["golden"] = (golden * 1.02).tolist()  # longer, in the same direction
    prove(pair)
    (score,) = decision(pair.model, golden[None])
    pair.model = {**pair.model, "calibrator": np.array([1000 * slope, -1000 * slope * score])}
    with pytest.raises(EncoderError, match=r"cosine 1\.0000"):
        prove(pair)


@pytest.mark.parametrize("golden", [None, []])
def test_an_encoder_without_golden_features_names_the_remedy(tmp_path, golden):
    other_encoder(golden=golden)
    path = baseline_for(tmp_path / "m.joblib")
    remedy = "remove its folder in .*encoders and run prepare_clip.py"
    with pytest.raises(EncoderError, match=f"'other' has no golden features: {remedy}"):
        load_detector(read_settings({"MODEL_PATH": str(path)}))


def test_an_encoder_with_swapped_weights_does_not_serve(tmp_path):
    folder = other_encoder()
    settings = read_settings({"MODEL_PATH": str(baseline_for(tmp_path / "m.joblib"))})
    load_detector(settings)
    weights = bytearray((folder / "encoder.bin").read_bytes())
    graph = (folder / "encoder.xml").read_text()
    places = re.findall(r'element_type="f16"[^>]* offset="(\d+)" size="(\d+)"', graph)
    for size, start in sorted({(int(size), int(offset)) for offset, size in places})[-2:]:
        np.random.default_rng(0).shuffle(np.frombuffer(weights, np.float16, size // 2, start))
    (folder / "encoder.bin").unlink()  # OpenVINO maps the old file into memory
    (folder / "encoder.bin").write_bytes(weights)
    with pytest.raises(EncoderError, match="cannot be trusted"):
        load_detector(settings)


# ---- loading ----


@pytest.fixture
def sizes(monkeypatch):
    """Numbers of images in the forward passes."""
    sizes, encode = [], Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, pixels: sizes.append(len(pixels)) or encode(self, pixels)
    )
    return sizes


def test_a_pass_of_one_image_is_warm_before_the_first_request(sizes):
    load_detector(read_settings(DEMO))
    assert set(sizes) == {1}


def test_every_shared_batch_size_is_warm_before_the_first_request(sizes, monkeypatch):
    forward = runtime.openvino_forward
    monkeypatch.setattr(runtime, "openvino_forward", lambda *args: (*forward(*args)[:2], False))
    load_detector(read_settings(DEMO))
    assert set(sizes) == set(range(1, TOGETHER + 1))


def test_only_a_model_on_the_same_encoder_reuses_it(loaded, tmp_path):
    other_encoder()
    changed = model_file(tmp_path / "m.joblib", intercept=0.25)
    same = load_detector(read_settings({**DEMO, "MODEL_PATH": str(changed)}), loaded)
    assert same.encoder is loaded.encoder and same.model["intercept"] == 0.25
    moved = baseline_for(tmp_path / "other.joblib")
    other = load_detector(read_settings({"MODEL_PATH": str(moved)}), loaded)
    assert other.encoder is not loaded.encoder and other.encoder.name == "other"


def test_a_reused_encoder_is_checked_again_with_the_new_model(pair, tmp_path):
    pair.encoder.manifest["golden"] = (-np.array(pair.encoder.manifest["golden"])).tolist()
    changed = model_file(tmp_path / "m.joblib", intercept=0.25)
    with pytest.raises(EncoderError, match="cannot be trusted"):
        load_detector(read_settings({**DEMO, "MODEL_PATH": str(changed)}), pair)


@pytest.mark.parametrize("slots", ["0", "1"])
def test_a_forward_pass_uses_all_allowed_processors(monkeypatch, slots):
    used, forward = [], runtime.openvino_forward
    monkeypatch.setattr(runtime, "processors", lambda: 3)
    monkeypatch.setattr(
        runtime, "openvino_forward", lambda *args: used.append(args[2]) or forward(*args)
    )
    load_detector(read_settings({**DEMO, "SLOTS": slots}))
    assert used == [3]


# ---- the pinned hash ----


@pytest.mark.parametrize(
    "text",
    [
        HASH,
        f"{HASH}\n",
        HASH.upper(),
        f"{HASH}  model.joblib\n",
        f"{HASH} *model.joblib\n",
        f"\n  {HASH}\n",
    ],
    ids=["bare", "a line", "upper case", "sha256sum", "sha256sum -b", "indented"],
)
def test_the_right_hash_is_accepted_in_every_format(tmp_path, text):
    (tmp_path / "pin").write_text(text)
    check_pin(tmp_path / "pin", HASH, "m.joblib")


@pytest.mark.parametrize(
    "content, shown",
    [
        (HASH[::-1].encode(), HASH[::-1]),
        (b"", "nothing"),
        (b" \n", "nothing"),
        (HASH[:63].encode(), HASH[:63]),
        (f"{HASH}0".encode(), HASH),
        (f"model.joblib {HASH}".encode(), "model.joblib"),
        (b"\xff\xfe" * 200, "\ufffd" * 64),
    ],
    ids=["another", "empty", "blank", "too short", "too long", "the name first", "binary"],
)
def test_another_hash_is_refused_with_both_files_named(tmp_path, content, shown):
    (tmp_path / "pin").write_bytes(content)
    with pytest.raises(ModelError) as error:
        check_pin(tmp_path / "pin", HASH, "m.joblib")
    message = str(error.value)
    for word in (
        "MODEL_PATH=m.joblib",
        HASH,
        f"MODEL_SHA256_FILE={tmp_path / 'pin'}",
        f"says {shown}:",
    ):
        assert word in message
    assert len(message.splitlines()) == 1


def test_a_missing_hash_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot read .*nowhere"):
        check_pin(tmp_path / "nowhere", HASH, "m.joblib")


def test_the_pin_is_the_hash_of_the_whole_model_file(tmp_path):
    pin, path = tmp_path / "pin", model_file(tmp_path / "m.joblib")
    settings = read_settings({**DEMO, "MODEL_PATH": str(path), "MODEL_SHA256_FILE": str(pin)})
    pin.write_text(
        subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    )
    assert read_model(settings)["sha256"] == sha256(path.read_bytes())
    model_file(path, intercept=0.0)
    # the hash is checked before the content
    for changed in (settings, {**settings, "ALLOW_DEMO_MODEL": False}):
        with pytest.raises(ModelError, match="put the right pair in place"):
            read_model(changed)


# ---- before the start ----


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "MODEL_PATH is not set.*train_model.py"),
        ({"MODEL_PATH": "nowhere"}, "MODEL_PATH=nowhere: no such file"),
        ({"MODEL_PATH": str(BASELINE)}, "demonstration.*ALLOW_DEMO_MODEL=1"),
        ({**DEMO, "API_KEYS_FILE": "nowhere"}, "cannot read nowhere"),
        ({**DEMO, "MODEL_SHA256_FILE": str(HERE / "LICENSE")}, "has the SHA-256 [0-9a-f]{64}"),
    ],
    ids=["no model", "missing", "demonstration", "keys", "another hash"],
)
def test_an_unusable_setting_is_refused_before_the_start(settings, words):
    with pytest.raises(DetectorError, match=words):
        check(read_settings(settings))


@pytest.fixture
def prepared(monkeypatch):
    """A fake prepare_clip.py that leaves the wanted encoder. Torch cannot be imported."""

    def run(command, **options):
        run.calls.append((command, options))
        if run.leaves:
            other_encoder(**run.leaves)
        return subprocess.CompletedProcess(command, run.code)

    run.code, run.leaves, run.calls = 0, {"name": "ViT-B-32", "identity": "ee" * 32}, []
    monkeypatch.setattr(subprocess, "run", run)
    for name in ("torch", "clip"):
        monkeypatch.setitem(sys.modules, name, None)
    return run


def wants(path, name="ViT-B/32"):
    return read_settings({"MODEL_PATH": str(baseline_for(path / "m.joblib", name, "ee" * 32))})


def test_a_missing_openai_encoder_is_prepared_by_another_process(prepared, tmp_path):
    check(wants(tmp_path))
    ((command, options),) = prepared.calls
    assert list(map(str, command)) == [
        sys.executable,
        str(HERE / "prepare_clip.py"),
        "--clip_model",
        "ViT-B/32",
        "--layers",
        "final",
    ]
    assert options["stdout"] is sys.stderr  # stdout is for this command's results
    check(wants(tmp_path))
    assert len(prepared.calls) == 1


def test_a_failed_preparation_ends_the_start_with_its_exit_code(prepared, tmp_path):
    prepared.code, prepared.leaves = 2, None
    with pytest.raises(SystemExit) as end:
        check(wants(tmp_path))
    assert end.value.code == 2


def test_another_missing_encoder_is_named_and_not_prepared(prepared, tmp_path):
    with pytest.raises(EncoderError, match="'mine'.*prepare_clip.py"):
        check(wants(tmp_path, name="mine"))
    assert prepared.calls == []


def test_the_check_loads_neither_openvino_nor_torch(tmp_path):
    other_encoder("ViT-B-32", "ee" * 32)
    wants(tmp_path)
    code = (
        "import sys; from detector.service import engine, settings; "
        "engine.check(settings.read_settings()); "
        "print({'torch', 'clip', 'openvino', 'sklearn'} & {*sys.modules})"
    )
    env = {**os.environ, "MODEL_PATH": str(tmp_path / "m.joblib")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, env=env, capture_output=True, text=True, timeout=300
    )
    assert (result.stdout, result.stderr) == ("set()\n", "")


# ---- processors ----


@pytest.mark.parametrize(
    "content, count",
    [
        (b"max 100000\n", 4),
        (b"150000 100000\n", 2),
        (b"50000 100000\n", 1),
        (b"100000 100000\n", 1),
        (b"100001 100000\n", 2),
        (b"400000 100000\n", 4),
        (b"6400000 100000\n", 4),
        (b"1000 100000", 1),
        (None, 4),
        (b"", 4),
        (b"many few\n", 4),
        (b"100000\n", 4),
        (b"1 2 3\n", 4),
        (b"\xff\xfe \xff\n", 4),
    ],
    ids=lambda value: value if isinstance(value, int) else repr(value),
)
def test_processors_follow_the_affinity_and_the_containers_limit(
    monkeypatch, tmp_path, content, count
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    if content is not None:
        (tmp_path / "cpu.max").write_bytes(content)
    assert processors(tmp_path) == count


def test_all_processors_count_if_the_affinity_is_unknown(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert processors(tmp_path) == 7
