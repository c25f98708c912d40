"""The live service when things go wrong around it: signals, a killed worker, a model file replaced, slow clients, no disk."""
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from PIL import Image

from common import sha256
from conftest import ROOT
from live import DEMO, Live, assert_error
from made_up import BASELINE
from model import load_model, save_model

pytestmark = pytest.mark.slow


@pytest.fixture
def serve(tmp_path):
    """Function: settings -> the live service, on a copy of the shipped model that a test may replace."""
    started = []

    def start(**settings):
        shutil.copy(BASELINE, tmp_path / "model.joblib")
        started.append(Live(tmp_path, MODEL_PATH="model.joblib", **settings))
        return started[-1]
    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def photo(photos):
    return photos["china.jpg"].read_bytes()


@pytest.fixture(scope="module")
def large():
    """A PNG of 36 megapixels and 100 kB: most of a second of decoding, time enough for something to happen."""
    buffer = io.BytesIO()
    Image.new("RGB", (6000, 6000), "navy").save(buffer, "PNG")
    return buffer.getvalue()


def metric(server, name):
    """Value of the first series of that name, 0 where there is none."""
    text = server.session.get(f"{server.url}/metrics", timeout=10).text
    found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def wait_for(what, seconds=30):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def events(server, name):
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def worker_of(server):
    pid = server.process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def another(path, version, source=BASELINE):
    """The shipped model under another version."""
    model = load_model(source)
    del model["sha256"]
    save_model(path, {**model, "versions": {**model["versions"], "model": version}})


# ---- signals ----

def test_on_sigterm_what_is_in_flight_is_answered_new_connections_are_refused_and_it_ends_with_0(serve, large):
    server = serve()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(requests.post, f"{server.url}/classify", files={"image": large}, timeout=60) for _ in range(2)]
        wait_for(lambda: metric(server, "detector_slots_busy") > 0)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{server.url}/healthz", timeout=5)
        assert [answer.result().status_code for answer in answers] == [200, 200]
    assert server.process.wait(40) == 0


def test_a_worker_that_is_killed_is_replaced_and_ready_again(serve, photo):
    server = serve()
    before, verdict = worker_of(server), server.post(photo).json()
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: server.status() == 200 and worker_of(server) != before)
    assert server.post(photo).json() == verdict


def test_a_killed_worker_comes_back_unready_but_alive_where_the_file_is_broken_meanwhile(serve, tmp_path):
    server = serve()
    (tmp_path / "model.joblib").write_bytes(b"broken")
    os.kill(worker_of(server), signal.SIGKILL)
    wait_for(lambda: server.status() == 503)
    assert_error(server.session.get(f"{server.url}/readyz", timeout=10), 503, "cannot be loaded", "not a model file")
    assert server.session.get(f"{server.url}/healthz", timeout=10).status_code == 200
    shutil.copy(BASELINE, tmp_path / "model.joblib")
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: server.status() == 200)


# ---- a model file that is replaced ----

def test_sighup_swaps_the_model_without_losing_a_request(serve, photo, tmp_path):
    server, stop, seen = serve(), threading.Event(), []

    def ask():
        with requests.Session() as session:
            while not stop.is_set():
                answer = session.post(f"{server.url}/classify", files={"image": photo}, timeout=60)
                seen.append((answer.status_code, answer.headers.get("X-Model-Version")))
    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        for version in ("v1.0.0", "v1.1.0", "v1.2.0"):
            another(tmp_path / "model.joblib", version)
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda: (200, version) in seen)
    finally:
        stop.set()
        for asker in askers:
            asker.join()
    assert {status for status, _ in seen} == {200}
    assert sorted({version for _, version in seen}) == ["v0.0.0-dev", "v1.0.0", "v1.1.0", "v1.2.0"]
    assert metric(server, 'detector_reloads_total{result="ok"}') == 3


@pytest.mark.parametrize("content", [b"", b"broken", None], ids=["empty", "no model", "gone"])
def test_a_broken_file_leaves_the_old_model_serving_and_says_so(serve, photo, tmp_path, content):
    server = serve()
    verdict = server.post(photo).json()
    (tmp_path / "model.joblib").unlink() if content is None else (tmp_path / "model.joblib").write_bytes(content)
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: metric(server, 'detector_reloads_total{result="failed"}') == 1)
    assert (server.status(), server.post(photo).json()) == (200, verdict)
    assert events(server, "load_failed")[0]["old_model_serves"] is True
    assert server.process.poll() is None


def test_a_pinned_model_is_replaced_only_together_with_its_pin(serve, photo, tmp_path):
    (tmp_path / "pin").write_text(sha256(BASELINE.read_bytes()) + "  model.joblib\n")
    server = serve(MODEL_SHA256_FILE="pin")
    another(tmp_path / "model.joblib", "v9.9.9")
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: metric(server, 'detector_reloads_total{result="failed"}') == 1)
    assert server.post(photo).headers["X-Model-Version"] == "v0.0.0-dev"
    (tmp_path / "pin").write_text(sha256((tmp_path / "model.joblib").read_bytes()) + "\n")
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: metric(server, 'detector_reloads_total{result="ok"}') == 1)
    assert server.post(photo).headers["X-Model-Version"] == "v9.9.9"


def test_a_model_that_is_not_the_pinned_one_does_not_start(script, tmp_path):
    (tmp_path / "pin").write_text("0" * 64)
    result = script("app.py", cwd=tmp_path, MODEL_SHA256_FILE="pin", **DEMO)
    assert result.returncode == 2 and "MODEL_SHA256_FILE" in result.stderr and len(result.stderr.splitlines()) == 1


# ---- load ----

def test_beyond_the_queue_it_says_503_and_when_to_come_again_and_stays_healthy(serve, large):
    server = serve(SLOTS="1", QUEUE_LIMIT="2")
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(requests.post, f"{server.url}/classify", files={"image": large}, timeout=60) for _ in range(12)]
        wait_for(lambda: metric(server, "detector_slots_busy") == 1)
        assert server.session.get(f"{server.url}/healthz", timeout=1).status_code == 200
        answers = [answer.result() for answer in answers]
    turned_away = [answer for answer in answers if answer.status_code != 200]
    for answer in turned_away:
        assert_error(answer, 503, "busy")
        assert answer.headers["Retry-After"] == "5"
    assert 3 <= 12 - len(turned_away) < 12
    assert metric(server, 'detector_rejections_total{reason="queue_full"}') == len(turned_away)


def test_a_wait_has_an_end(serve, large):
    server = serve(SLOTS="1", QUEUE_LIMIT="20", QUEUE_TIMEOUT_S="1")
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: requests.post(f"{server.url}/classify", files={"image": large}, timeout=60), range(12)))
    assert {answer.status_code for answer in answers} == {200, 503}
    assert metric(server, 'detector_rejections_total{reason="queue_timeout"}') == sum(a.status_code == 503 for a in answers)


# ---- slow clients ----

HEAD = (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n")


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_a_body_that_trickles_in_is_cut_off_with_408_and_the_others_are_served(serve, photo):
    server = serve(BODY_TIMEOUT_S="1")
    with connect(server) as slow:
        slow.sendall(HEAD)
        for _ in range(20):
            try:
                slow.sendall(b"x")
            except OSError:
                break
            time.sleep(0.1)
        assert server.post(photo).status_code == 200
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
    assert metric(server, 'detector_rejections_total{reason="slow_body"}') == 1


def test_a_chunked_body_that_stops_is_cut_off_as_well(serve):
    server = serve(BODY_TIMEOUT_S="1")
    with connect(server) as slow:
        slow.sendall(HEAD.replace(b"Content-Length: 100000", b"Transfer-Encoding: chunked") + b"100\r\nabc")
        assert slow.recv(4096).startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 400 "))


def test_headers_that_never_end_are_cut_off_as_well(serve):
    server = serve(BODY_TIMEOUT_S="1")
    with connect(server) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        assert slow.recv(4096) == b""


@pytest.mark.parametrize("head", [b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"GET /healthz HTTP/1.0\r\n\r\n",
                                  b"nonsense\r\n\r\n"], ids=["close", "HTTP/1.0", "nonsense"])
def test_clients_that_do_not_close_after_their_answer_make_nobody_wait(serve, head):
    server = serve()
    lingering = [connect(server) for _ in range(20)]
    try:
        for one in lingering:
            one.sendall(head)
        started = time.monotonic()
        assert server.session.get(f"{server.url}/healthz", timeout=10).status_code == 200 and time.monotonic() - started < 1
        assert all(re.match(rb"HTTP/1\.[01] (200|400) ", one.recv(4096)) for one in lingering)
    finally:
        for one in lingering:
            one.close()


def test_connections_that_send_nothing_cost_no_thread(serve):
    server = serve(QUEUE_LIMIT="0", SPARE_THREADS="1", SLOTS="1")
    silent = [connect(server) for _ in range(50)]
    try:
        assert server.session.get(f"{server.url}/healthz", timeout=2).status_code == 200
    finally:
        for one in silent:
            one.close()


def test_as_many_slow_bodies_as_there_are_spare_threads_leave_room_for_verdicts(serve, photo):
    server = serve(SPARE_THREADS="4", SLOTS="1", QUEUE_LIMIT="1")
    slow = [connect(server) for _ in range(4)]
    try:
        for one in slow:
            one.sendall(HEAD)
        time.sleep(0.3)
        assert server.post(photo).status_code == 200
    finally:
        for one in slow:
            one.close()


# ---- nothing to write to ----

READ_ONLY = """
set -e
mount --bind / /
while read -r _ place kind options _; do
    case "$place" in /proc*|/sys*|/dev|/dev/*) ;; *) mount -o remount,ro,bind "$place" 2>/dev/null || true ;; esac
done < /proc/self/mounts
if touch "$1/probe" 2>/dev/null || touch /tmp/probe 2>/dev/null; then echo writable >&2; exit 9; fi
cd "$1"; shift
exec "$@"
"""


def test_it_runs_with_a_read_only_file_system(tmp_path, photo, monkeypatch):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a read-only view of the file system needs root (unshare --mount)")
    plain = subprocess.Popen

    def popen(command, cwd, **options):
        return plain(["unshare", "--mount", "bash", "-c", READ_ONLY, "bash", str(cwd), *map(str, command)], cwd=ROOT, **options)
    monkeypatch.setattr(subprocess, "Popen", popen)
    server = Live(tmp_path)
    monkeypatch.undo()
    try:
        assert server.post(photo).status_code == 200
        assert server.post(b"no image").status_code == 415
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
