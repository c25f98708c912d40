"""What golden.py is tested on: good and bad models, a service that misbehaves, a Pushgateway."""

import contextlib
import http.server
import io
import json
import shutil
import subprocess
import threading
import time

import pytest
import requests
import small
from live import free_port
from made_up import build
from patience import PATIENCE
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from detector.base.constants import CLASSES
from detector.evaluation.metrics import measure
from detector.features.columns import COLUMNS
from detector.features.file import load_features
from detector.model.file import save_model
from detector.model.score import decision, probability

MODEL = (200, {}, {"version": "v1", "sha256": "0", "golden_floor": 0.5})
REAL = (200, {"X-Model-Version": "v1"}, {"classification": "real", "confidence": 0.9})


def tinted(folder):
    """The folder with its fakes tinted, so that the small encoder separates 9 of 10."""
    for path in folder.rglob("fake/*.jpg"):
        with Image.open(path) as image:
            Image.blend(image, Image.new("RGB", image.size, "magenta"), 0.3).save(path)
    return folder


def extracted(folder, path):
    """Features of a folder by the small encoder -> their columns."""
    import extract_features

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv("CLIP_MODEL", str(small.CHECKPOINT))
        extract_features.main(["--data_dir", str(folder), "--output_file", str(path)])
    return load_features(path)


def make_models(place, make_folder):
    """Write three models into a folder: 'good', 'worse' and 'untested' -> the folder.

    'worse' inverts every verdict of 'good', but states the same test metrics. 'untested' states
    none.
    """
    counts = {f"{split}/{c}": n for split, n in (("train", 40), ("test", 20)) for c in CLASSES}
    columns = extracted(tinted(make_folder(place / "data", counts)), place / "f.npz")
    train, test = (
        {name: columns[name][columns["splits"] == split] for name in COLUMNS}
        for split in ("train", "test")
    )
    model = build(train)
    p_fake = probability(model, decision(model, test["features"]))
    overall = measure(test["labels"], p_fake, model["threshold"], test["sha256"])
    model |= {"encoder": columns["meta"]["encoder"], "metrics": {"overall": overall}}
    inverted = {"dual_coef": -model["dual_coef"], "intercept": -model["intercept"]}
    for name, version, changes in (
        ("good", "v1.0.0", {}),
        ("worse", "v1.1.0", inverted),
        ("untested", "v0.9.0", {"metrics": {}}),
    ):
        versions = {**model["versions"], "model": version}
        save_model(place / f"{name}.joblib", {**model, **changes, "versions": versions})
    return place


class Stub(http.server.ThreadingHTTPServer):
    """A server that sends what `answer(path, number of the request to the path)` returns.

    That is (status, headers, body), or None to cut the connection. `asked`: {path: the headers of
    all its requests}.
    """

    def __init__(self, answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def reply(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked = self.server.asked.setdefault(self.path, [])
                asked.append(self.headers)
                if (response := answer(self.path, len(asked))) is None:
                    return
                status, headers, body = response
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            do_GET = do_POST = reply

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.url = {}, f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


@contextlib.contextmanager
def pushgateway(folder):
    """Debian's Pushgateway -> its URL. Skips the test where it is not installed."""
    if (program := shutil.which("prometheus-pushgateway")) is None:
        pytest.skip(
            "prometheus-pushgateway is not installed: apt-get install prometheus-pushgateway"
        )
    address = f"127.0.0.1:{free_port()}"
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            # Debian's Pushgateway would keep the metrics of an earlier run.
            [program, f"--web.listen-address={address}", "--persistence.file="],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not is_ready(f"http://{address}/-/ready"):
            running = process.poll() is None and time.monotonic() < deadline
            assert running, (folder / "log").read_text()
            time.sleep(0.05)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(PATIENCE)


def is_ready(url):
    """Does the server return 200? Without a proxy."""
    with requests.Session() as session:
        session.trust_env = False
        try:
            return session.get(url, timeout=5).ok
        except requests.RequestException:
            return False


def pushed(gateway):
    """{(metric, model version): value} of the golden job."""
    with requests.get(f"{gateway}/metrics", timeout=PATIENCE) as response:
        families = list(text_string_to_metric_families(response.text))
    return {
        (sample.name, sample.labels["model_version"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("detector_") and sample.labels["job"] == "detector-golden"
    }
