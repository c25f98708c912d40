"""The service under test: Flask's test client with a model, and the service as a process."""

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
# For gunicorn on a machine that is slow to start and to stop.
PATIENT = f"--timeout {PATIENCE} --graceful-timeout {PATIENCE}"


def assert_error(response, status, *words):
    """The shape of every error: {"error": a line with `words`}. For Flask's client and requests."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    body = json.loads(response.text)
    assert list(body) == ["error"] and isinstance(body["error"], str)
    assert len(body["error"].splitlines()) == 1 and "Traceback" not in body["error"]
    for word in words:
        assert word in body["error"]


def wait_for(condition):
    """Wait for something that another thread or process does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.005)


def ready_client(**settings):
    """A test client of a service on the small model, once its model serves."""
    client = app.create_app({**DEMO, **settings}).test_client()
    wait_for(lambda: client.get("/readyz").status_code == 200)
    return client


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Live:
    """The service as a process, started from another folder than the project's."""

    def __init__(self, folder, **settings):
        port = settings.get("PORT") or free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "log"
        defaults = {**DEMO, "GUNICORN_CMD_ARGS": PATIENT, "PORT": str(port)}
        env, command = {**os.environ, **defaults, **settings}, [sys.executable, ROOT / "app.py"]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=env)
        self.session = requests.Session()
        self.session.trust_env = False  # no proxy of the host
        wait_for(lambda: self.status() == 200)

    def get(self, path):
        return self.session.get(self.url + path, timeout=PATIENCE)

    def status(self):
        """Status of /readyz, or None before the service listens."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.get("/readyz").status_code
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
    pattern = rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$"
    match = re.search(pattern, server.get("/metrics").text, re.MULTILINE)
    return float(match[1]) if match else 0.0
