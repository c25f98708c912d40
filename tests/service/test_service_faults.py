"""The live service when things go wrong around it: signals, a killed worker, a model file replaced, load, no disk."""

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
from engines import picture
from live import DEMO, Live, assert_error, free_port, metric, wait_for
from made_up import BASELINE, baseline_for, other_encoder
from patience import PATIENCE

from detector.base.files import sha256
from detector.model.file import load_model, save_model

pytestmark = pytest.mark.slow


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


def send(pool, server, count):
    """Uploads at the same time -> the futures of their answers."""
    return [
        pool.submit(
            requests.post, f"{server.url}/classify", files={"image": picture()}, timeout=PATIENCE
        )
        for _ in range(count)
    ]


def takes_new_connections(server):
    try:
        return requests.get(f"{server.url}/healthz", timeout=1).status_code == 200
    except requests.RequestException:
        return False


def test_on_sigterm_what_is_in_flight_is_answered_new_connections_are_not_and_it_ends_with_0(held):
    server, stand_still = held(SLOTS="2")
    with ThreadPoolExecutor(2) as pool:
        with stand_still:
            answers = send(pool, server, 2)
            wait_for(lambda: metric(server, "detector_slots_busy") == 2)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not takes_new_connections(server))
            assert not any(answer.done() for answer in answers)
        assert [answer.result().status_code for answer in answers] == [200, 200]
    assert server.process.wait(PATIENCE) == 0 and not takes_new_connections(server)


def test_a_worker_that_is_killed_is_replaced_and_ready_again(serve, photo):
    server = serve()
    before, verdict = worker_of(server), server.post(photo).json()
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: server.status() == 200 and worker_of(server) != before)
    assert server.post(photo).json() == verdict


def test_a_killed_worker_comes_back_unready_but_alive_where_the_file_is_broken_meanwhile(
    serve, tmp_path
):
    server = serve()
    (tmp_path / "model.joblib").write_bytes(b"broken")
    os.kill(worker_of(server), signal.SIGKILL)
    wait_for(
        lambda: server.status() == 503 and events(server, "load_failed")
    )  # 503 while it loads, too
    assert_error(
        server.session.get(f"{server.url}/readyz", timeout=PATIENCE), 503, "cannot be loaded"
    )
    assert "not a model file" in events(server, "load_failed")[-1]["message"]
    assert server.session.get(f"{server.url}/healthz", timeout=PATIENCE).status_code == 200
    shutil.copy(BASELINE, tmp_path / "model.joblib")
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: server.status() == 200)


# ---- a model file that is replaced ----


def test_sighup_swaps_the_model_without_losing_a_request(serve, photo, tmp_path):
    server, stop, seen = serve(), threading.Event(), []

    def ask():
        with requests.Session() as session:
            while not stop.is_set():
                answer = session.post(
                    f"{server.url}/classify", files={"image": photo}, timeout=PATIENCE
                )
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
    (
        (tmp_path / "model.joblib").unlink()
        if content is None
        else (tmp_path / "model.joblib").write_bytes(content)
    )
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
    assert (
        result.returncode == 2
        and "MODEL_SHA256_FILE" in result.stderr
        and len(result.stderr.splitlines()) == 1
    )


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
def test_a_setting_that_cannot_be_used_ends_the_start_in_one_line(script, settings, words):
    assert_one_line_error(script("app.py", **{**DEMO, "PORT": str(free_port()), **settings}), words)


def test_a_port_that_is_taken_is_told_at_once(script):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_one_line_error(
            script("app.py", **{**DEMO, "PORT": port}),
            f"PORT={port}: cannot listen there",
            "set another",
        )


def test_a_cache_of_encoders_is_found_from_the_folder_it_was_started_in(tmp_path, photo):
    other_encoder()
    model = baseline_for(tmp_path / "other.joblib")
    server = Live(tmp_path, MODEL_PATH=model.name, CLIP_CACHE="home/.clip")
    try:
        assert server.post(photo).status_code == 200
    finally:
        assert server.stop() == 0


def test_it_listens_on_ipv6_as_well(tmp_path):
    server = Live(tmp_path, HOST="::")  # and with it, as everywhere but on a few systems, on IPv4
    try:
        assert (
            requests.get(
                server.url.replace("127.0.0.1", "[::1]") + "/healthz", timeout=PATIENCE
            ).status_code
            == 200
        )
    finally:
        assert server.stop() == 0


# ---- load ----


def test_beyond_the_queue_it_says_503_and_when_to_come_again_and_stays_healthy(held):
    server, stand_still = held(SLOTS="1", QUEUE_LIMIT="2", QUEUE_TIMEOUT_S=str(PATIENCE))
    with ThreadPoolExecutor(12) as pool:
        with stand_still:
            answers = send(pool, server, 12)
            wait_for(lambda: metric(server, 'detector_rejections_total{reason="queue_full"}') == 9)
            assert (
                metric(server, "detector_slots_busy") == 1
                and metric(server, "detector_queue_depth") == 2
            )
            assert server.session.get(f"{server.url}/healthz", timeout=PATIENCE).status_code == 200
        answers = [answer.result() for answer in answers]
    turned_away = [answer for answer in answers if answer.status_code != 200]
    for answer in turned_away:
        assert_error(answer, 503, "busy")
        assert answer.headers["Retry-After"] == str(PATIENCE)
    assert len(turned_away) == 9


def test_a_wait_has_an_end(held):
    server, stand_still = held(SLOTS="1", QUEUE_LIMIT="20", QUEUE_TIMEOUT_S="1")
    with ThreadPoolExecutor(12) as pool:
        with stand_still:
            answers = send(pool, server, 12)
            wait_for(
                lambda: metric(server, 'detector_rejections_total{reason="queue_timeout"}') == 11
            )
        assert sorted(answer.result().status_code for answer in answers) == [200] + [503] * 11


@pytest.mark.long
def test_more_connections_than_there_may_be_open_files_end_no_worker(tmp_path, photo, monkeypatch):
    plain = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, **options: plain(
            ["bash", "-c", 'ulimit -n 160; exec "$@"', "bash", *map(str, command)], **options
        ),
    )
    server = Live(tmp_path)
    monkeypatch.undo()
    address, worker = ("127.0.0.1", int(server.url.rsplit(":")[-1])), worker_of(server)
    silent = [socket.create_connection(address) for _ in range(200)]
    try:
        assert (
            requests.post(
                f"{server.url}/classify", files={"image": photo}, timeout=PATIENCE
            ).status_code
            == 200
        )
        assert worker_of(server) == worker
    finally:
        for one in silent:
            one.close()
        assert server.stop() == 0


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
        return plain(
            ["unshare", "--mount", "bash", "-c", READ_ONLY, "bash", str(cwd), *map(str, command)],
            cwd=ROOT,
            **options,
        )

    monkeypatch.setattr(subprocess, "Popen", popen)
    server = Live(tmp_path)
    monkeypatch.undo()
    try:
        assert server.post(photo).status_code == 200
        assert server.post(b"no image").status_code == 415
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
