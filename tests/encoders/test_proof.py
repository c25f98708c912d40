"""Before a model serves: the file is the pinned one, the golden picture comes out as recorded, and a start that cannot work
ends in one line. And how many processors a container may use."""

import contextlib
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
    """The small model and encoder, with a record of their own to damage."""
    detector = copy.copy(loaded)
    detector.encoder = copy.copy(loaded.encoder)
    detector.encoder.manifest = {**loaded.encoder.manifest}
    return detector


def test_an_undamaged_pair_passes(pair):
    prove(pair)


DAMAGE = {
    "negated": lambda row: -row,
    "in another order": lambda row: row[::-1],
    "not a number": lambda row: row * np.nan,
    "all zero": lambda row: row * 0,
    "infinite": lambda row: row * np.inf,
    "without signs": lambda row: np.abs(row),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of dividing by zero and of nan
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_is_refused(pair, name):
    pair.encoder.manifest["golden"] = DAMAGE[name](
        np.array(pair.encoder.manifest["golden"])
    ).tolist()
    with pytest.raises(EncoderError, match="cannot be trusted; prepare the encoder again"):
        prove(pair)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_machine_that_computes_something_else_is_refused(pair, monkeypatch, name):
    encode = Encoder.encode
    monkeypatch.setattr(
        Encoder,
        "encode",
        lambda self, pixels: np.stack([DAMAGE[name](row) for row in encode(self, pixels)]),
    )
    with pytest.raises(EncoderError, match="cannot be trusted"):
        prove(pair)


def test_pixels_prepared_in_another_way_are_refused(pair, monkeypatch):
    preprocess = preprocessing.preprocess
    monkeypatch.setattr(
        preprocessing, "preprocess", lambda image, side: preprocess(image, side)[:, ::-1].copy()
    )  # upside down
    with pytest.raises(EncoderError, match="cannot be trusted"):
        prove(pair)


def test_features_may_not_point_elsewhere_even_where_the_probability_is_the_same(pair):
    pair.model = {**pair.model, "calibrator": np.zeros(2)}
    golden = np.array(pair.encoder.manifest["golden"])
    noise = np.random.default_rng(0).normal(size=golden.shape)
    noise -= golden * (noise @ golden) / (golden @ golden)
    noise *= np.linalg.norm(golden) / np.linalg.norm(noise)
    for angle, good in ((0.1, True), (0.2, False)):  # cosine 0.995, 0.98
        pair.encoder.manifest["golden"] = (golden + np.tan(angle) * noise).tolist()
        with (
            contextlib.nullcontext() if good else pytest.raises(EncoderError, match=r"cosine 0\.98")
        ):
            prove(pair)


def test_the_probability_may_not_differ_even_where_the_features_are_close(pair):
    golden, slope = np.float32(pair.encoder.manifest["golden"]), pair.model["calibrator"][0]
    pair.encoder.manifest["golden"] = (
        golden * 1.02
    ).tolist()  # a bit too long, in the right direction
    prove(pair)
    (score,) = decision(pair.model, golden[None])
    pair.model = {**pair.model, "calibrator": np.array([1000 * slope, -1000 * slope * score])}
    with pytest.raises(EncoderError, match=r"cosine 1\.0000"):
        prove(pair)


@pytest.mark.parametrize("golden", [None, []])
def test_an_encoder_without_golden_features_names_the_remedy(tmp_path, golden):
    other_encoder(golden=golden)
    path = baseline_for(tmp_path / "m.joblib")
    with pytest.raises(
        EncoderError,
        match=(
            "'other' has no golden features: remove its folder in .*encoders and run"
            " prepare_clip.py"
        ),
    ):
        load_detector(read_settings({"MODEL_PATH": str(path)}))


def test_an_encoder_whose_weights_were_swapped_does_not_serve_under_its_name(tmp_path):
    folder = other_encoder()
    settings = read_settings({"MODEL_PATH": str(baseline_for(tmp_path / "m.joblib"))})
    load_detector(settings)
    weights = bytearray((folder / "encoder.bin").read_bytes())
    graph = (folder / "encoder.xml").read_text()
    places = re.findall(r'element_type="f16"[^>]* offset="(\d+)" size="(\d+)"', graph)
    for size, start in sorted({(int(size), int(offset)) for offset, size in places})[-2:]:
        np.random.default_rng(0).shuffle(np.frombuffer(weights, np.float16, size // 2, start))
    (folder / "encoder.bin").unlink()  # OpenVINO has the old file mapped into memory
    (folder / "encoder.bin").write_bytes(weights)
    with pytest.raises(EncoderError, match="cannot be trusted"):
        load_detector(settings)


# ---- loading ----


@pytest.fixture
def sizes(monkeypatch):
    """Numbers of images in the forward passes run."""
    found, encode = [], Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, pixels: found.append(len(pixels)) or encode(self, pixels)
    )
    return found


def test_passes_of_every_size_that_uploads_share_are_warm_before_the_first_request(sizes):
    load_detector(read_settings(DEMO))
    assert set(sizes) == set(range(1, TOGETHER + 1))


def test_the_encoder_in_memory_is_used_again_for_another_model_on_it_and_only_then(
    loaded, tmp_path
):
    other_encoder()
    changed = model_file(tmp_path / "m.joblib", intercept=0.25)
    same = load_detector(read_settings({**DEMO, "MODEL_PATH": str(changed)}), loaded)
    assert same.encoder is loaded.encoder and same.model["intercept"] == 0.25
    moved = baseline_for(tmp_path / "other.joblib")
    other = load_detector(read_settings({"MODEL_PATH": str(moved)}), loaded)
    assert other.encoder is not loaded.encoder and other.encoder.name == "other"


def test_the_encoder_in_memory_has_to_prove_itself_again_with_the_new_model(pair, tmp_path):
    pair.encoder.manifest["golden"] = (-np.array(pair.encoder.manifest["golden"])).tolist()
    with pytest.raises(EncoderError, match="cannot be trusted"):
        load_detector(
            read_settings(
                {**DEMO, "MODEL_PATH": str(model_file(tmp_path / "m.joblib", intercept=0.25))}
            ),
            pair,
        )


@pytest.mark.parametrize("slots", ["0", "1"])
def test_a_forward_pass_takes_all_processors_allowed(monkeypatch, slots):
    asked, forward = [], runtime.openvino_forward
    monkeypatch.setattr(runtime, "processors", lambda: 3)
    monkeypatch.setattr(
        runtime, "openvino_forward", lambda *args: asked.append(args[2]) or forward(*args)
    )
    load_detector(read_settings({**DEMO, "SLOTS": slots}))
    assert asked == [3]


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
def test_the_right_hash_is_taken_in_every_form(tmp_path, text):
    (tmp_path / "pin").write_text(text)
    check_pin(tmp_path / "pin", HASH, "m.joblib")


@pytest.mark.parametrize(
    "content, says",
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
def test_any_other_is_refused_in_one_line_that_names_both_files(tmp_path, content, says):
    (tmp_path / "pin").write_bytes(content)
    with pytest.raises(ModelError) as error:
        check_pin(tmp_path / "pin", HASH, "m.joblib")
    message = str(error.value)
    for word in (
        "MODEL_PATH=m.joblib",
        HASH,
        f"MODEL_SHA256_FILE={tmp_path / 'pin'}",
        f"says {says}:",
    ):
        assert word in message
    assert len(message.splitlines()) == 1


def test_a_hash_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot read .*nowhere"):
        check_pin(tmp_path / "nowhere", HASH, "m.joblib")


def test_the_pin_is_that_of_the_whole_model_file(tmp_path):
    pin, path = tmp_path / "pin", model_file(tmp_path / "m.joblib")
    settings = read_settings({**DEMO, "MODEL_PATH": str(path), "MODEL_SHA256_FILE": str(pin)})
    pin.write_text(
        subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    )
    assert read_model(settings)["sha256"] == sha256(path.read_bytes())
    model_file(path, intercept=0.0)
    # told before what the file says of itself
    for asked in (settings, {**settings, "ALLOW_DEMO_MODEL": False}):
        with pytest.raises(ModelError, match="put the right pair in place"):
            read_model(asked)


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
def test_a_setting_that_cannot_work_is_told_before_the_start(settings, words):
    with pytest.raises(DetectorError, match=words):
        check(read_settings(settings))


@pytest.fixture
def prepared(monkeypatch):
    """prepare_clip.py as a process, made up: it leaves the encoder that the model wants. Torch cannot be imported here."""
    calls = []

    def run(command, **options):
        calls.append((command, options))
        if run.leaves:
            other_encoder(**run.leaves)
        return subprocess.CompletedProcess(command, run.code)

    run.code, run.leaves, run.calls = 0, {"name": "ViT-B-32", "identity": "ee" * 32}, calls
    monkeypatch.setattr(subprocess, "run", run)
    for name in ("torch", "clip"):
        monkeypatch.setitem(sys.modules, name, None)
    return run


def wants(path, name="ViT-B/32"):
    return read_settings({"MODEL_PATH": str(baseline_for(path / "m.joblib", name, "ee" * 32))})


def test_an_encoder_of_openais_that_is_missing_is_prepared_by_a_process_of_its_own(
    prepared, tmp_path
):
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
    assert options["stdout"] is sys.stderr  # results on stdout are not this command's
    check(wants(tmp_path))
    assert len(prepared.calls) == 1  # it is there now


def test_a_preparation_that_fails_ends_the_start_with_its_exit_code(prepared, tmp_path):
    prepared.code, prepared.leaves = 2, None
    with pytest.raises(SystemExit) as end:
        check(wants(tmp_path))
    assert end.value.code == 2


def test_another_encoder_that_is_missing_is_not_prepared_but_named(prepared, tmp_path):
    with pytest.raises(EncoderError, match="'mine'.*prepare_clip.py"):
        check(wants(tmp_path, name="mine"))
    assert prepared.calls == []


def test_the_check_loads_neither_openvino_nor_torch(tmp_path):
    other_encoder("ViT-B-32", "ee" * 32)
    wants(tmp_path)
    code = (
        "import sys; from detector.service import engine, settings;"
        " engine.check(settings.read_settings()); print({'torch', 'clip', 'openvino', 'sklearn'} &"
        " {*sys.modules})"
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
def test_processors_are_those_of_the_affinity_below_the_containers_limit(
    monkeypatch, tmp_path, content, count
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    if content is not None:
        (tmp_path / "cpu.max").write_bytes(content)
    assert processors(tmp_path) == count


def test_where_affinity_is_unknown_all_processors_count(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert processors(tmp_path) == 7
