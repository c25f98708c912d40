"""The service under test: Flask's test client with a model loaded, and the service as a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import requests
from commands import ROOT
from made_up import BASELINE
from patience import PATIENCE

from detector.service import app

DEMO = {"MODEL_PATH": str(BASELINE), "ALLOW_DEMO_MODEL": "1"}
PATIENT = (  # of gunicorn: a machine may be slow to start and to stop
    f"--timeout {PATIENCE} --graceful-timeout {PATIENCE}"
)
# The service's own gunicorn.conf.py, and images that wait for the lock on a file before they are made the encoder's input.


def assert_error(response, status, *words):
    """The one shape of every error, of flask's test client and of requests alike: {"error": one line that says `words`}."""
    body = json.loads(response.text)
    assert (response.status_code, response.headers["Content-Type"]) == (
        status,
        "application/json",
    ), response.text
    assert list(body) == ["error"] and isinstance(body["error"], str)
    assert (
        body["error"] and len(body["error"].splitlines()) == 1 and "Traceback" not in body["error"]
    )
    for word in words:
        assert word in body["error"]


def wait_until_ready(ask):
    """Call `ask()` for the status of /readyz until it is 200."""
    deadline = time.monotonic() + PATIENCE
    while (status := ask()) != 200:
        assert time.monotonic() < deadline, f"/readyz answers {status}"
        time.sleep(0.05)


def ready_client(**settings):
    client = app.create_app({**DEMO, **settings}).test_client()
    wait_until_ready(lambda: client.get("/readyz").status_code)
    return client


def post(client, *images, field="image"):
    """Multipart upload of these bytes, each under `field`. (The test client would build it in a temporary file.)"""
    files = [(field, (f"{i}.bin", data)) for i, data in enumerate(images)]
    ready = requests.Request("POST", "http://x", files=files).prepare()
    return client.post("/classify", data=ready.body, content_type=ready.headers["Content-Type"])


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Live:
    """The service as a process of its own, started from another folder than the project's."""

    def __init__(self, folder, **settings):
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "app.py"],
                cwd=folder,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    **DEMO,
                    "GUNICORN_CMD_ARGS": PATIENT,
                    "PORT": str(port),
                    **settings,
                },
            )
        self.session = requests.Session()
        self.session.trust_env = False  # no proxy of the host
        wait_until_ready(self.status)

    def status(self):
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.session.get(f"{self.url}/readyz", timeout=PATIENCE).status_code
        except requests.ConnectionError:
            return None

    def post(self, image):
        return self.session.post(f"{self.url}/classify", files={"image": image}, timeout=PATIENCE)

    def stop(self):
        self.session.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()


def metric(server, name):
    """Value of the first series of that name, 0 where there is none."""
    text = server.session.get(f"{server.url}/metrics", timeout=PATIENCE).text
    found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def wait_for(what):
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)
