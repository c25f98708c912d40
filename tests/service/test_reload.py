"""SIGHUP: a good model replaces the old model without losing a request; a bad model does not."""

import copy
import subprocess
import sys
import threading

import pytest
import small
from engines import (
    contrary,
    counted,
    engine_on,
    keys_file,
    lines,
    meanwhile,
    model_file,
    picture,
    reload,
    until,
    versions,
)
from made_up import BASELINE, DIM, Planted, baseline_for, other_encoder
from patience import PATIENCE

from detector.base.errors import ModelError
from detector.base.files import sha256
from detector.base.project import HERE
from detector.encoders.runtime import Encoder
from detector.model.file import load_model
from detector.service import engine as service_engine
from detector.service.engine import Busy
from detector.verdict import Detector

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture
def path(tmp_path):
    """The model file in service."""
    return model_file(tmp_path / "m.joblib")


@pytest.fixture
def engine(path, caplog):
    engine = engine_on(MODEL_PATH=path)
    caplog.clear()
    return engine


def version(detector):
    return detector.model["versions"]["model"]


def shown(engine):
    """Versions in detector_model_info."""
    return [
        sample.labels["version"]
        for family in engine.telemetry.registry.collect()
        if family.name == "detector_model_info"
        for sample in family.samples
    ]


# ---- a good model ----


def test_a_good_new_file_takes_over(engine, path, caplog):
    old = engine.detector
    model_file(path, **versions("v2"))
    assert reload(engine) == "ok"
    assert engine.detector is engine.ready() is not old and version(engine.detector) == "v2"
    assert engine.detector.model["sha256"] == sha256(path.read_bytes()) and shown(engine) == ["v2"]
    assert engine.detector.encoder is old.encoder  # not loaded again
    (line,) = lines(caplog, "ready")
    assert (line["level"], line["version"]) == ("info", "v2")
    assert line["sha256"] == engine.detector.model["sha256"]
    assert line["seconds"] >= 0 and lines(caplog, "load_failed") == []


def test_the_same_file_changes_nothing_and_keeps_the_drift(engine, path, caplog):
    old, drift = engine.detector, engine.telemetry.drift
    engine.judge(old, [picture()])
    assert reload(engine) == "ok"
    assert engine.detector is old and engine.telemetry.drift is drift and drift.seen == 1
    (line,) = lines(caplog, "unchanged")
    assert line["sha256"] == old.model["sha256"] and lines(caplog, "ready") == []


def test_an_encoder_in_service_is_checked_and_not_warmed_again(engine, path, monkeypatch):
    passes, encode = [], Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, pixels: passes.append(len(pixels)) or encode(self, pixels)
    )
    model_file(path, **versions("v2"))
    assert reload(engine) == "ok" and passes == [1]


def test_the_service_does_not_prepare_a_missing_encoder(engine, path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "detector.encoders.prepare", None)  # an import would fail
    baseline_for(path, name="ViT-B/32")
    assert reload(engine) == "failed"
    (line,) = lines(caplog, "load_failed")
    assert "prepare_clip.py --clip_model ViT-B/32" in line["message"]


def test_the_log_names_a_demonstration(engine, path, caplog):
    model_file(path, **versions("v2"))
    reload(engine)
    (line,) = lines(caplog, "demonstration")
    assert line["level"] == "warning" and "not a detector to rely on" in line["message"]
    caplog.clear()
    other_encoder()
    baseline_for(path)
    reload(engine)
    assert lines(caplog, "demonstration") == []
    assert lines(caplog, "ready")[0]["demonstration"] == "false"


def test_a_request_keeps_the_model_that_it_began_with(engine, path):
    began, telemetry = engine.ready(), engine.telemetry
    (before,) = engine.judge(began, [picture()])[1]
    contrary(path, "v2")
    reload(engine)
    (after,) = engine.judge(began, [picture()])[1]
    for name in ("classification", "p_fake"):
        assert after[name] == before[name]
    name = {"classification": before["classification"]}
    assert counted(telemetry, "verdicts_total", model_version=version(began), **name) == 2
    assert counted(telemetry, "verdicts_total", model_version="v2", **name) == 0
    assert telemetry.drift.seen == 0  # the drift is that of the new model
    scores = [counted(telemetry, "scores_total", model_version="v2", bin=i) for i in range(10)]
    assert sum(scores) == 0


def test_while_a_new_model_loads_the_old_model_serves(engine, path, monkeypatch):
    load, may, began = service_engine.load_detector, threading.Event(), threading.Event()

    def slow(*args):
        began.set()
        assert may.wait(PATIENCE)
        return load(*args)

    monkeypatch.setattr(service_engine, "load_detector", slow)
    old = engine.detector
    model_file(path, **versions("v2"))
    with meanwhile(reload, engine):
        assert began.wait(PATIENCE)
        assert engine.ready() is old and "classification" in engine.judge(old, [picture()])[1][0]
        may.set()
    assert engine.detector is not old


def test_reloads_requested_during_a_load_become_one_more_load(engine, path, monkeypatch):
    load, may, seen = service_engine.load_detector, threading.Event(), []

    def slow(*args):
        seen.append(load_model(path)["versions"]["model"])
        assert may.wait(PATIENCE)
        return load(*args)

    monkeypatch.setattr(service_engine, "load_detector", slow)
    engine.reload()
    until(lambda: len(seen) == 1)
    model_file(path, **versions("v2"))
    for _ in range(3):
        engine.reload()
    may.set()
    until(lambda: counted(engine.telemetry, "reloads_total", result="ok") >= 2)
    assert len(seen) + engine._asked.qsize() == 2  # no request is left in the queue
    assert seen[1] == version(engine.detector) == "v2"


# ---- a bad model ----


def torn(path, tmp_path):
    path.write_bytes(path.read_bytes()[:-1000])


def planted(path, tmp_path):
    import pickle

    path.write_bytes(pickle.dumps(Planted(tmp_path / "marker")))


BROKEN = {
    "text": (lambda path, _: path.write_text("hello"), "is not a model file: it is text"),
    "torn": (torn, "is not a model file: it is cut off or damaged"),
    "empty": (lambda path, _: path.write_bytes(b""), "is not a model file: it is empty"),
    "missing": (lambda path, _: path.unlink(), "no such file"),
    "planted": (planted, "may be planted"),
    "old": (lambda path, _: model_file_of_format_1(path), "its format is 1"),
    "of another encoder": (lambda path, _: baseline_for(path, name="mine"), "prepare_clip.py"),
    "of a damaged encoder": (
        lambda path, _: other_encoder(golden=[0.5] * DIM) and baseline_for(path),
        "cannot be trusted",
    ),
    "of an encoder with a short record": (
        lambda path, _: other_encoder(golden=[1.0]) and baseline_for(path),
        "",
    ),
    "without scores": (lambda path, _: model_file(path, out_of_fold={}), ""),
}


def model_file_of_format_1(path):
    import pickle

    path.write_bytes(pickle.dumps({**load_model(BASELINE), "format": 1}, protocol=5))


def assert_the_old_model_serves(engine, old, caplog, *words):
    assert engine.detector is engine.ready() is old and shown(engine) == [version(old)]
    (line,) = lines(caplog, "load_failed")
    assert line["level"] == "error" and line["old_model_serves"] is True
    assert len(line["message"].splitlines()) == 1
    assert all(word in line["message"] for word in ("the model cannot be loaded", *words))
    assert lines(caplog, "ready") == [] and counted(engine.telemetry, "ready") == 1


@pytest.mark.parametrize("spoil, word", BROKEN.values(), ids=BROKEN)
def test_with_a_bad_file_the_old_model_serves_and_the_log_has_the_reason(
    engine, path, tmp_path, caplog, spoil, word
):
    old = engine.detector
    spoil(path, tmp_path)
    assert reload(engine) == "failed"
    assert_the_old_model_serves(engine, old, caplog, word)
    assert not (tmp_path / "marker").exists()
    model_file(path, **versions("v2"))
    assert reload(engine) == "ok" and version(engine.detector) == "v2" and engine.error is None


def test_a_model_with_another_hash_than_the_pin_is_refused(path, tmp_path, caplog):
    pin = tmp_path / "pin"
    pin.write_text(sha256(path.read_bytes()))
    engine = engine_on(MODEL_PATH=path, MODEL_SHA256_FILE=pin)
    caplog.clear()
    old = engine.detector
    model_file(path, **versions("v2"))
    assert reload(engine) == "failed"
    assert_the_old_model_serves(engine, old, caplog, "MODEL_SHA256_FILE", old.model["sha256"])
    pin.write_text(sha256(path.read_bytes()))
    assert reload(engine) == "ok" and version(engine.detector) == "v2"


def test_a_demonstration_does_not_take_over_without_permission(path, caplog):
    other_encoder()
    engine = engine_on(MODEL_PATH=baseline_for(path), ALLOW_DEMO_MODEL=0)
    caplog.clear()
    old = engine.detector
    model_file(path)
    assert reload(engine) == "failed"
    assert_the_old_model_serves(engine, old, caplog, "ALLOW_DEMO_MODEL=1")


@pytest.mark.parametrize(
    "error, traced", [(ModelError("mend it"), False), (RuntimeError("our bug"), True)]
)
def test_only_a_bug_has_a_traceback_in_the_log(engine, path, caplog, monkeypatch, error, traced):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(Detector, "__init__", broken)
    old = engine.detector
    model_file(path, **versions("v2"))
    assert reload(engine) == "failed"
    assert_the_old_model_serves(engine, old, caplog, str(error))
    assert ("traceback" in lines(caplog, "load_failed")[0]) == traced


# ---- before the first model ----


def test_after_a_bad_first_file_a_reload_can_load_a_good_file(tmp_path, caplog):
    path = tmp_path / "m.joblib"
    path.write_text("hello")
    engine = engine_on(MODEL_PATH=path)
    with pytest.raises(Busy, match="cannot be loaded: the service's log says why") as error:
        engine.ready()
    assert error.value.reason == engine.refusal().reason == "not_ready"
    assert str(error.value) == str(engine.refusal())
    (line,) = lines(caplog, "load_failed")
    assert "m.joblib is not a model file" in line["message"]
    assert line["old_model_serves"] is False
    assert counted(engine.telemetry, "ready") == 0 and shown(engine) == []
    model_file(path)
    assert reload(engine) == "ok"
    assert engine.ready() is engine.detector and counted(engine.telemetry, "ready") == 1


def test_the_first_load_does_not_count_as_a_reload(engine):
    for result in ("ok", "failed"):
        assert counted(engine.telemetry, "reloads_total", result=result) == 0


# ---- keys ----


def test_keys_are_read_again_with_the_model(path, tmp_path):
    file = keys_file(tmp_path / "keys", ann="1")
    engine = engine_on(MODEL_PATH=path, API_KEYS_FILE=file)
    keys_file(tmp_path / "keys", ann="1", ben="2")
    assert list(engine.keys) == ["ann"]
    assert reload(engine) == "ok" and list(engine.keys) == ["ann", "ben"]


@pytest.mark.parametrize(
    "content",
    ["ann nothex\n", "", "# ann\n", None],
    ids=["not a hash", "empty", "comments", "missing"],
)
def test_with_bad_keys_the_old_keys_stay_and_the_model_is_read(path, tmp_path, caplog, content):
    file = tmp_path / "keys"
    engine = engine_on(MODEL_PATH=path, API_KEYS_FILE=keys_file(file, ann="1"))
    old = copy.copy(engine.keys)
    file.unlink() if content is None else file.write_text(content)
    model_file(path, **versions("v2"))
    assert reload(engine) == "failed"
    assert engine.keys == old and version(engine.detector) == "v2"
    (line,) = lines(caplog, "load_failed")
    assert "the old keys stay" in line["message"] and line["level"] == "error"


TWO_ENCODERS = """
import os, signal, sys
from detector.encoders.runtime import Encoder
signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
first, second = Encoder(sys.argv[1]), Encoder(sys.argv[1])
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_are_handled_after_two_encoders_were_deleted():
    """OpenVINO's plugin gives a thread a stack for signals.

    After the end of a second plugin the thread kept a stack that no longer existed, and the next
    signal ended the process.
    """
    done = subprocess.run(
        [sys.executable, "-c", TWO_ENCODERS, small.ENCODER],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
