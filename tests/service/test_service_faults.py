"""Faults around the live service: signals, a killed worker, a new model file, load, no disk."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from commands import ROOT, assert_one_line_error
from engines import meanwhile, model_file, picture, versions
from live import DEMO, Live, assert_error, free_port, metric, wait_for
from made_up import BASELINE, baseline_for, other_encoder
from patience import PATIENCE

from detector.base.files import sha256

pytestmark = pytest.mark.slow


def events(server, name):
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def worker_of(server):
    pid = server.process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


# ---- signals ----


def send(pool, server, count):
    """Concurrent uploads -> the futures of their responses."""
    url, options = f"{server.url}/classify", {"files": {"image": picture()}, "timeout": PATIENCE}
    return [pool.submit(requests.post, url, **options) for _ in range(count)]


def takes_new_connections(server):
    try:
        return requests.get(f"{server.url}/healthz", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def test_on_sigterm_requests_in_flight_finish_and_new_connections_do_not(held):
    server, stand_still = held(SLOTS="2")
    with ThreadPoolExecutor(2) as pool:
        with stand_still:
            responses = send(pool, server, 2)
            wait_for(lambda: metric(server, "detector_slots_busy") == 2)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: "Handling signal: term" in server.log.read_text())
            wait_for(lambda: not takes_new_connections(server))
            assert not any(response.done() for response in responses)
        assert [response.result().status_code for response in responses] == [200, 200]
    assert server.process.wait(PATIENCE) == 0


def test_a_killed_worker_is_replaced(serve, photo):
    server = serve()
    before, verdict = worker_of(server), server.post(photo).json()
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: server.status() == 200 and worker_of(server) != before)
    assert server.post(photo).json() == verdict


def test_a_killed_worker_returns_alive_and_not_ready_with_a_broken_file(serve, tmp_path):
    server = serve()
    (tmp_path / "model.joblib").write_bytes(b"broken")
    os.kill(worker_of(server), signal.SIGKILL)
    # The status is also 503 while the model loads.
    wait_for(lambda: server.status() == 503 and events(server, "load_failed"))
    assert_error(server.get("/readyz"), 503, "cannot be loaded")
    assert "not a model file" in events(server, "load_failed")[-1]["message"]
    assert server.get("/healthz").status_code == 200
    shutil.copy(BASELINE, tmp_path / "model.joblib")
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: server.status() == 200)


# ---- a new model file ----


def test_sighup_swaps_the_model_without_losing_a_request(serve, photo, tmp_path):
    server, stop, seen = serve(), threading.Event(), []

    def upload_until_stop():
        with requests.Session() as session:
            while not stop.is_set():
                files = {"image": photo}
                response = session.post(f"{server.url}/classify", files=files, timeout=PATIENCE)
                seen.append((response.status_code, response.headers.get("X-Model-Version")))

    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(meanwhile(upload_until_stop))
        stack.callback(stop.set)
        for version in ("v1.0.0", "v1.1.0", "v1.2.0"):
            model_file(tmp_path / "model.joblib", **versions(version))
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda version=version: (200, version) in seen)
    assert {status for status, _ in seen} == {200}
    assert sorted({version for _, version in seen}) == ["v0.0.0-dev", "v1.0.0", "v1.1.0", "v1.2.0"]
    assert metric(server, 'detector_reloads_total{result="ok"}') == 3


def test_a_pinned_model_is_replaced_only_together_with_its_pin(serve, photo, tmp_path):
    (tmp_path / "pin").write_text(sha256(BASELINE.read_bytes()) + "  model.joblib\n")
    server = serve(MODEL_SHA256_FILE="pin")
    model_file(tmp_path / "model.joblib", **versions("v9.9.9"))
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: metric(server, 'detector_reloads_total{result="failed"}') == 1)
    assert server.post(photo).headers["X-Model-Version"] == "v0.0.0-dev"
    (tmp_path / "pin").write_text(sha256((tmp_path / "model.joblib").read_bytes()) + "\n")
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: metric(server, 'detector_reloads_total{result="ok"}') == 1)
    assert server.post(photo).headers["X-Model-Version"] == "v9.9.9"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"HOST": "nosuchhost.invalid"}, "HOST=nosuchhost.invalid PORT="),
        ({"HOST": "203.0.113.1"}, "HOST=203.0.113.1 PORT="),
        ({"HOST": "localhost:80"}, "HOST=localhost:80 PORT="),
        ({"SLOTS": "99999999"}, "SLOTS=99999999, QUEUE_LIMIT=16"),
        ({"API_KEYS_FILE": "nowhere"}, "API_KEYS_FILE: cannot read"),
        ({"MODEL_SHA256_FILE": "nowhere"}, "MODEL_SHA256_FILE: cannot read"),
        ({"MODEL_PATH": "nowhere"}, "models/baseline.joblib"),
    ],
    ids=str,
)
def test_an_unusable_setting_ends_the_start_in_one_line(script, settings, words):
    assert_one_line_error(script("app.py", **{**DEMO, "PORT": str(free_port()), **settings}), words)


def test_a_used_port_ends_the_start_in_one_line(script):
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        result = script("app.py", **DEMO, PORT=port)
        assert_one_line_error(result, f"PORT={port}: cannot listen there", "set another")


def test_a_relative_clip_cache_is_below_the_folder_of_the_start(tmp_path, photo):
    other_encoder()
    model = baseline_for(tmp_path / "other.joblib")
    server = Live(tmp_path, MODEL_PATH=model.name, CLIP_CACHE="home/.clip")
    try:
        assert server.post(photo).status_code == 200
    finally:
        assert server.stop() == 0


def test_it_listens_on_ipv6_as_well(tmp_path):
    server = Live(tmp_path, HOST="::")  # on most systems this includes IPv4
    try:
        url = server.url.replace("127.0.0.1", "[::1]") + "/healthz"
        assert requests.get(url, timeout=PATIENCE).status_code == 200
    finally:
        assert server.stop() == 0


# ---- load ----


def test_beyond_the_queue_uploads_get_503_with_retry_after_and_healthz_is_ok(held):
    server, stand_still = held(SLOTS="1", QUEUE_LIMIT="2", QUEUE_TIMEOUT_S=str(PATIENCE))
    with ThreadPoolExecutor(12) as pool:
        with stand_still:
            futures = send(pool, server, 12)
            wait_for(lambda: metric(server, 'detector_rejections_total{reason="queue_full"}') == 9)
            assert metric(server, "detector_slots_busy") == 1
            assert metric(server, "detector_queue_depth") == 2
            assert server.get("/healthz").status_code == 200
        responses = [future.result() for future in futures]
    refused = [response for response in responses if response.status_code != 200]
    for response in refused:
        assert_error(response, 503, "busy")
        assert response.headers["Retry-After"] == str(PATIENCE)
    assert len(refused) == 9


@pytest.fixture
def wrapped(tmp_path, monkeypatch):
    """Function: command of a shell -> the live service, started by that command."""
    plain = subprocess.Popen

    def start(*shell):
        def popen(command, cwd, **options):
            return plain([*shell, "bash", str(cwd), *map(str, command)], cwd=ROOT, **options)

        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", popen)
            return Live(tmp_path)

    return start


@pytest.mark.long
def test_more_connections_than_open_files_end_no_worker(wrapped, photo):
    server = wrapped("bash", "-c", 'ulimit -n 160; cd "$1"; shift; exec "$@"')
    address, worker = ("127.0.0.1", int(server.url.rsplit(":")[-1])), worker_of(server)
    silent = [socket.create_connection(address) for _ in range(200)]
    try:
        files = {"image": photo}
        response = requests.post(f"{server.url}/classify", files=files, timeout=PATIENCE)
        assert response.status_code == 200
        assert worker_of(server) == worker
    finally:
        for connection in silent:
            connection.close()
        assert server.stop() == 0


# ---- nothing to write to ----

READ_ONLY = """
set -e
mount --bind / /
while read -r _ place kind options _; do
    case "$place" in
        /proc*|/sys*|/dev|/dev/*) ;;
        *) mount -o remount,ro,bind "$place" 2>/dev/null || true ;;
    esac
done < /proc/self/mounts
if touch "$1/probe" 2>/dev/null || touch /tmp/probe 2>/dev/null; then echo writable >&2; exit 9; fi
cd "$1"; shift
exec "$@"
"""


def test_it_runs_with_a_read_only_file_system(wrapped, photo):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a read-only view of the file system needs root (unshare --mount)")
    server = wrapped("unshare", "--mount", "bash", "-c", READ_ONLY)
    try:
        assert server.post(photo).status_code == 200
        assert server.post(b"no image").status_code == 415
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
