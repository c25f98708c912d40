"""What golden.py is tried on: models that keep their promise or do not, a service that misbehaves, an installed Pushgateway."""

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
    """The folder, its fakes tinted: what even the small encoder sees in nine of ten."""
    for path in folder.rglob("fake/*.jpg"):
        with Image.open(path) as image:
            Image.blend(image, Image.new("RGB", image.size, "magenta"), 0.3).save(path)
    return folder


def make_models(place, make_folder):
    """The folder with three models in it: one as good as it says, the same with every verdict turned round, the same without
    test metrics."""
    import extract_features

    tinted(
        make_folder(
            place / "data",
            {
                f"{split}/{label}": n
                for split, n in (("train", 40), ("test", 20))
                for label in CLASSES
            },
        )
    )
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv("CLIP_MODEL", str(small.CHECKPOINT))
        extract_features.main(
            ["--data_dir", str(place / "data"), "--output_file", str(place / "f.npz")]
        )
    columns = load_features(place / "f.npz")
    train, test = (
        {name: columns[name][columns["splits"] == split] for name in COLUMNS}
        for split in ("train", "test")
    )
    model = build(train)
    overall = measure(
        test["labels"],
        probability(model, decision(model, test["features"])),
        model["threshold"],
        test["sha256"],
    )
    model |= {"encoder": columns["meta"]["encoder"], "metrics": {"overall": overall}}
    turned = {"dual_coef": -model["dual_coef"], "intercept": -model["intercept"]}
    for name, version, changes in (
        ("good", "v1.0.0", {}),
        ("worse", "v1.1.0", turned),
        ("untested", "v0.9.0", {"metrics": {}}),
    ):
        save_model(
            place / f"{name}.joblib",
            {**model, **changes, "versions": {**model["versions"], "model": version}},
        )
    return place


class Stub(http.server.ThreadingHTTPServer):
    """Answers what `answer(path, number of the request to it)` gives: (status, headers, body), or None for a connection cut
    off. `asked`: the headers of all requests to a path."""

    def __init__(self, answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def reply(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked = self.server.asked.setdefault(self.path, [])
                asked.append(self.headers)
                if (found := answer(self.path, len(asked))) is None:
                    return
                status, headers, body = found
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
    """A Pushgateway as Debian installs it -> its URL; the test is skipped where there is none."""
    if (program := shutil.which("prometheus-pushgateway")) is None:
        pytest.skip(
            "prometheus-pushgateway is not installed: apt-get install prometheus-pushgateway"
        )
    address = f"127.0.0.1:{free_port()}"
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [program, f"--web.listen-address={address}"], stdout=log, stderr=log
        )
    try:
        deadline, session = time.monotonic() + PATIENCE, requests.Session()
        session.trust_env = False
        with session:
            while True:
                with contextlib.suppress(requests.RequestException):
                    if session.get(f"http://{address}/-/ready", timeout=5).ok:
                        break
                assert process.poll() is None and time.monotonic() < deadline, (
                    folder / "log"
                ).read_text()
                time.sleep(0.05)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(PATIENCE)


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
