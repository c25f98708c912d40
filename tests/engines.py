"""Shared by tests of the service: pictures, models, an engine without HTTP, log lines, metrics."""

import hashlib
import io
import json
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import requests
from live import DEMO, ready_client
from live import wait_for as until
from made_up import BASELINE
from patience import PATIENCE
from PIL import Image

from detector.model.file import load_model, save_model
from detector.service.engine import Engine, named
from detector.service.settings import read_settings
from detector.service.telemetry import JsonFormatter, Telemetry
from detector.verdict import Detector

TOKEN, OTHER = "correct-horse-battery", "staple-staple-staple"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
client_on = ready_client  # settings -> test client of a service on the small model


@contextmanager
def meanwhile(work, *args):
    """Run `work` in another thread during the body, then wait for its end."""
    thread = Thread(target=work, args=args, daemon=True)
    thread.start()
    yield
    thread.join(PATIENCE)
    assert not thread.is_alive()


def picture(seed=0, width=40, height=30):
    """PNG bytes of noise, different for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def model_file(path, **changes):
    """The small model with some of its fields changed -> its path."""
    model = load_model(BASELINE)
    del model["sha256"]
    save_model(path, {**model, **changes})
    return Path(path)


def versions(name):
    return {"versions": {**load_model(BASELINE)["versions"], "model": name}}


def engine_of(client):
    return client.application.extensions["engine"]


def contrary(path, name):
    """The small model under another version, with every verdict reversed."""
    return model_file(path, calibrator=-load_model(BASELINE)["calibrator"], **versions(name))


def engine_on(**settings):
    """An engine after its first attempt to load, by default on the small model."""
    settings = {name: str(value) for name, value in settings.items()}
    engine = Engine(read_settings({**DEMO, **settings}), Telemetry())
    until(lambda: engine.detector or engine.error)
    return engine


def counted(telemetry, name, **labels):
    """A metric's value, 0 where it does not exist yet."""
    labels = {label: str(value) for label, value in labels.items()}
    return telemetry.registry.get_sample_value(f"detector_{name}", labels) or 0


def reload(engine):
    """Reload and wait for the end -> 'ok' or 'failed'."""

    def count(result):
        return counted(engine.telemetry, "reloads_total", result=result)

    ok, failed = count("ok"), count("failed")
    engine.reload()
    until(lambda: count("ok") + count("failed") > ok + failed)
    assert count("ok") + count("failed") == ok + failed + 1
    return "ok" if count("ok") > ok else "failed"


def detector_of(name="v1", path=BASELINE, **changes):
    """A detector for telemetry, without an encoder."""
    encoder = SimpleNamespace(name="small", identity="ab", precision="float32")
    model = {**load_model(path), **versions(name), **changes}
    return SimpleNamespace(model=model, encoder=encoder)


def serve(telemetry, detector):
    """Tell telemetry that the detector serves."""
    telemetry.serve(detector, named(detector))
    return detector


def give(telemetry, detector, score=0.0, row=None, **facts):
    """Count a verdict of the detector."""
    telemetry.verdict(
        detector,
        {"classification": "real", "confidence": 0.7, "uncertain": False, **facts},
        score,
        detector.model["center"].astype("f4") if row is None else row,
    )


def lines(caplog, event=None):
    """Log lines of this test as JSON, all or those of one event."""
    logged = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    return [line for line in logged if event in (None, line["event"])]


def upload(client, path, *images, headers=None, field="image"):
    """Multipart POST of these bytes. (Flask's client would build the form in a temporary file.)"""
    files = [(field, (f"{i}.bin", data)) for i, data in enumerate(images)]
    files = files or [("text", (None, "no file"))]
    sent = requests.Request("POST", "http://x", files=files, headers=headers).prepare()
    headers = {**(headers or {}), "Content-Type": sent.headers["Content-Type"]}
    return client.post(path, data=sent.body, headers=headers)


@contextmanager
def held(monkeypatch, telemetry, work):
    """`work()` runs in another thread and stops in the middle of an image while the body runs."""
    go_on, started, pixels = Event(), Event(), Detector.pixels

    def slow(self, image):
        started.set()
        assert go_on.wait(PATIENCE)
        return pixels(self, image)

    monkeypatch.setattr(Detector, "pixels", slow)
    with meanwhile(work):
        try:
            assert started.wait(PATIENCE) and counted(telemetry, "slots_busy")
            yield
        finally:
            go_on.set()
    monkeypatch.setattr(Detector, "pixels", pixels)


def keys_file(path, **tokens):
    """API_KEYS_FILE for {name: token} -> its path, as text."""
    Path(path).write_text(
        "".join(
            f"{name} {hashlib.sha256(token.encode()).hexdigest()}\n"
            for name, token in tokens.items()
        )
    )
    return str(path)
