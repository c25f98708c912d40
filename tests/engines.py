"""What tests of the service share: pictures made up, models that differ, an engine without HTTP, log lines, metrics."""

import hashlib
import io
import json
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import requests
from live import DEMO, ready_client
from made_up import BASELINE
from patience import PATIENCE
from PIL import Image

from detector.model.file import load_model, save_model
from detector.service.engine import Engine, named
from detector.service.settings import read_settings
from detector.service.telemetry import JsonFormatter, Telemetry
from detector.verdict import Detector


def until(condition):
    """Wait for what another thread does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.002)


@contextmanager
def meanwhile(work, *args):
    """Run it in another thread; yields that thread, and waits for its end."""
    thread = Thread(target=work, args=args, daemon=True)
    thread.start()
    yield thread
    thread.join(PATIENCE)
    assert not thread.is_alive()


def picture(seed=0, width=40, height=30):
    """PNG bytes of noise; another one for each seed."""
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


def contrary(path, name):
    """The small model under another version, with every answer the other way round."""
    return model_file(path, calibrator=-load_model(BASELINE)["calibrator"], **versions(name))


def engine_on(**settings):
    """An engine once its first attempt to load is over; by default on the small model."""
    engine = Engine(
        read_settings({**DEMO, **{name: str(value) for name, value in settings.items()}}),
        Telemetry(),
    )
    until(lambda: engine.detector or engine.error)
    return engine


def client_on(**settings):
    """A test client of a service on the small model, once its model serves."""
    return ready_client(**settings)


def counted(telemetry, name, **labels):
    """A metric's value; 0 where there is none yet."""
    return (
        telemetry.registry.get_sample_value(
            f"detector_{name}", {k: str(v) for k, v in labels.items()}
        )
        or 0
    )


def reload(engine):
    """Ask for it and wait for its end -> 'ok' or 'failed'."""

    def done():
        return {
            result: counted(engine.telemetry, "reloads_total", result=result)
            for result in ("ok", "failed")
        }

    before = done()
    engine.reload()
    until(lambda: done() != before)
    (result,) = (name for name, value in done().items() if value != before[name])
    assert sum(done().values()) == sum(before.values()) + 1
    return result


def detector_of(name="v1", path=BASELINE, **changes):
    """A detector as far as telemetry looks at one: no encoder behind it."""
    encoder = SimpleNamespace(name="small", identity="ab", precision="float32")
    model = {**load_model(path), **versions(name), **changes}
    return SimpleNamespace(model=model, encoder=encoder)


def serve(telemetry, detector):
    """It serves from now on, as far as telemetry knows."""
    telemetry.serve(detector, named(detector))
    return detector


def give(telemetry, detector, score=0.0, classification="real", uncertain=False, row=None):
    """Count a made-up verdict of its."""
    telemetry.verdict(
        detector,
        {"classification": classification, "confidence": 0.7, "uncertain": uncertain},
        score,
        detector.model["center"].astype("f4") if row is None else row,
    )


def lines(caplog, event=None):
    """What this test logged, each line as JSON gives it back; only those of one event where it is named."""
    found = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    return [line for line in found if event in (None, line["event"])]


def upload(client, path, *images, headers=None, field="image"):
    """Multipart post of these bytes to any path."""
    files = [(field, (f"{i}.bin", data)) for i, data in enumerate(images)]
    ready = requests.Request(
        "POST", "http://x", files=files or [("text", (None, "no file"))]
    ).prepare()
    return client.post(
        path,
        data=ready.body,
        headers={**(headers or {}), "Content-Type": ready.headers["Content-Type"]},
    )


@contextmanager
def held(monkeypatch, telemetry, work):
    """`work()`, called in another thread, stands still in the middle of an image while the body runs; then it goes on."""
    go_on, there, pixels = Event(), Event(), Detector.pixels

    def slow(self, image):
        there.set()
        assert go_on.wait(PATIENCE)
        return pixels(self, image)

    monkeypatch.setattr(Detector, "pixels", slow)
    with meanwhile(work):
        try:
            assert there.wait(PATIENCE) and counted(telemetry, "slots_busy")
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
