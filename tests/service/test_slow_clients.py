"""Clients that are slow on purpose: cut off in time, and nobody else waits for them."""

import os
import re
import select
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import requests
from commands import ROOT
from engines import picture
from live import DEMO, PATIENT, free_port, metric, wait_for
from patience import PATIENCE

pytestmark = pytest.mark.slow

HEAD = (
    b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
)


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def answer_of(connection):
    """One answer, head and JSON, or what comes before the connection ends."""
    answer = b""
    while not answer.endswith(b"}\n") and (part := connection.recv(65536)):
        answer += part
    return answer


def test_a_body_that_trickles_in_is_cut_off_with_408_and_the_others_are_served(serve):
    server = serve(BODY_TIMEOUT_S="2")
    with connect(server) as slow:
        slow.sendall(HEAD)
        while not select.select([slow], [], [], 0.1)[0]:  # until there is an answer
            slow.sendall(b"x")
        assert server.post(picture()).status_code == 200
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
    assert metric(server, 'detector_rejections_total{reason="slow_body"}') == 1


def test_a_body_whose_client_goes_is_not_told_to_be_late(serve):
    with connect(serve()) as gone:
        gone.sendall(HEAD)
        gone.shutdown(socket.SHUT_WR)
        assert b"the connection ended before the body" in answer_of(gone)


def test_what_comes_of_a_body_after_it_was_cut_off_is_no_request(serve):
    server = serve(BODY_TIMEOUT_S="1")
    with connect(server) as slow:
        slow.sendall(HEAD)
        answer = answer_of(slow)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"\r\nConnection: close\r\n" in answer
        with suppress(OSError):
            slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert slow.recv(4096) == b""


def test_a_chunked_body_that_stops_is_cut_off_as_well(serve):
    server = serve(BODY_TIMEOUT_S="1")
    with connect(server) as slow:
        slow.sendall(
            HEAD.replace(b"Content-Length: 100000", b"Transfer-Encoding: chunked") + b"100\r\nabc"
        )
        assert slow.recv(4096).startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 400 "))


def test_headers_that_never_end_are_cut_off_as_well(serve):
    server = serve(BODY_TIMEOUT_S="1")
    with connect(server) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        assert slow.recv(4096) == b""


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
    ids=["close", "HTTP/1.0", "nonsense"],
)
def test_clients_that_do_not_close_after_their_answer_make_nobody_wait(serve, head):
    server = serve()
    lingering = [connect(server) for _ in range(60)]
    try:
        for one in lingering:
            one.sendall(head)
        # gunicorn by itself waits two seconds for each, one after the other
        assert server.session.get(f"{server.url}/healthz", timeout=60).status_code == 200
        assert all(re.match(rb"HTTP/1\.[01] (200|400) ", one.recv(4096)) for one in lingering)
    finally:
        for one in lingering:
            one.close()


def test_a_request_that_has_arrived_and_takes_long_keeps_its_connection(held):
    """A body that begins when the request is in work already, and does not arrive, is cut off later than the request would be."""
    server, stand_still = held(BODY_TIMEOUT_S="2")
    ready = requests.Request("POST", server.url, files={"image": picture()}).prepare()
    with connect(server) as long, connect(server) as later:
        with stand_still:
            long.sendall(
                "POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type:"
                f" {ready.headers['Content-Type']}\r\nContent-Length: {len(ready.body)}\r\n\r\n".encode()
                + ready.body
            )
            wait_for(lambda: metric(server, "detector_slots_busy") == 1)
            later.sendall(HEAD)
            assert answer_of(later).startswith(b"HTTP/1.1 408 ")
            assert not select.select([long], [], [], 0)[0], "neither answered nor closed"
        assert answer_of(long).startswith(b"HTTP/1.1 200 ")
        long.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer_of(long).startswith(b"HTTP/1.1 200 ")


def test_clients_that_never_read_their_answers_are_cut_off(tmp_path):
    patch = (
        "from detector.service import worker\nassert worker.ANSWER_S == 60\nworker.ANSWER_S = 4\n"
    )
    (tmp_path / "conf.py").write_text(patch + (ROOT / "gunicorn.conf.py").read_text())
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "-c", tmp_path / "conf.py", "app:create_app()"],
        cwd=ROOT,
        env={
            **os.environ,
            **DEMO,
            "GUNICORN_CMD_ARGS": PATIENT,
            "PORT": str(port),
            "SLOTS": "1",
            "QUEUE_LIMIT": "0",
            "SPARE_THREADS": "1",
            "BODY_TIMEOUT_S": "1",
        },
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: answers(port))
        with deaf_client(port), deaf_client(port):  # one for each thread
            wait_for(lambda: not answers(port, seconds=0.5))
            wait_for(lambda: all(answers(port, seconds=2) for _ in range(10)))
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0


def answers(port, seconds=5):
    with suppress(requests.RequestException):
        return requests.get(f"http://127.0.0.1:{port}/healthz", timeout=seconds).status_code == 200


def deaf_client(port):
    """A connection full of requests whose answers nobody reads."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.connect(("127.0.0.1", port))
    one.setblocking(False)
    with suppress(BlockingIOError):
        one.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 50_000)
    return one


def test_connections_that_send_nothing_cost_no_thread(serve):
    server = serve(QUEUE_LIMIT="0", SPARE_THREADS="1", SLOTS="1")
    silent = [connect(server) for _ in range(100)]
    try:
        # each of them would hold a thread for FIRST_BYTE_S, and there are two: 250 seconds
        assert server.session.get(f"{server.url}/healthz", timeout=60).status_code == 200
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
