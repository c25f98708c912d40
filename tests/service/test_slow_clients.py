"""Clients that are slow on purpose are cut off in time, and nobody waits for them."""

import os
import re
import select
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress

import pytest
import requests
from commands import ROOT
from engines import picture
from live import DEMO, PATIENT, free_port, metric, wait_for
from patience import PATIENCE

from detector.service.settings import SPARE_THREADS

pytestmark = pytest.mark.slow

TWO_THREADS = f"{PATIENT} --threads 2"
HEAD = (
    b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
)


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


@contextmanager
def connections(server, count):
    with ExitStack() as stack:
        yield [stack.enter_context(connect(server)) for _ in range(count)]


def response_of(connection):
    """A whole response, or the bytes before the connection ends."""
    response = b""
    while not response.endswith(b"}\n") and (part := connection.recv(65536)):
        response += part
    return response


def test_a_trickling_body_is_cut_off_with_408_and_others_are_served(serve):
    server = serve(BODY_TIMEOUT_S="2")
    with connect(server) as slow:
        slow.sendall(HEAD)
        while not select.select([slow], [], [], 0.1)[0]:  # until there is a response
            slow.sendall(b"x")
        assert server.post(picture()).status_code == 200
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
    assert metric(server, 'detector_rejections_total{reason="slow_body"}') == 1


def test_the_error_of_a_client_that_disconnects_does_not_mention_time(serve):
    with connect(serve()) as gone:
        gone.sendall(HEAD)
        gone.shutdown(socket.SHUT_WR)
        assert b"the connection ended before the body" in response_of(gone)


def test_bytes_of_a_body_that_was_cut_off_are_no_request(serve):
    server = serve(BODY_TIMEOUT_S="1")
    with connect(server) as slow:
        slow.sendall(HEAD)
        response = response_of(slow)
        assert response.startswith(b"HTTP/1.1 408 ") and b"\r\nConnection: close\r\n" in response
        with suppress(OSError):
            slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert slow.recv(4096) == b""


def test_a_chunked_body_that_stops_is_cut_off(serve):
    server = serve(BODY_TIMEOUT_S="1")
    with connect(server) as slow:
        chunked = HEAD.replace(b"Content-Length: 100000", b"Transfer-Encoding: chunked")
        slow.sendall(chunked + b"100\r\nabc")
        assert slow.recv(4096).startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 400 "))


def test_headers_that_never_end_are_cut_off(serve):
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
def test_clients_that_do_not_close_after_their_response_delay_nobody(serve, head):
    server = serve()
    with connections(server, 60) as lingering:
        for connection in lingering:
            connection.sendall(head)
        # gunicorn by itself waits two seconds for each connection, one after the other
        assert server.session.get(f"{server.url}/healthz", timeout=60).status_code == 200
        for connection in lingering:
            assert re.match(rb"HTTP/1\.[01] (200|400) ", connection.recv(4096))


def test_a_request_that_has_arrived_and_takes_long_keeps_its_connection(held):
    """The deadline of a second request, whose body does not arrive, ends after the first's."""
    server, stand_still = held(BODY_TIMEOUT_S="2")
    ready = requests.Request("POST", server.url, files={"image": picture()}).prepare()
    with connect(server) as long, connect(server) as later:
        with stand_still:
            head = (
                "POST /classify HTTP/1.1\r\nHost: x\r\n"
                f"Content-Type: {ready.headers['Content-Type']}\r\n"
                f"Content-Length: {len(ready.body)}\r\n\r\n"
            )
            long.sendall(head.encode() + ready.body)
            wait_for(lambda: metric(server, "detector_slots_busy") == 1)
            later.sendall(HEAD)
            assert response_of(later).startswith(b"HTTP/1.1 408 ")
            assert not select.select([long], [], [], 0)[0], "neither a response nor an end"
        assert response_of(long).startswith(b"HTTP/1.1 200 ")
        long.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert response_of(long).startswith(b"HTTP/1.1 200 ")


def test_clients_that_never_read_their_responses_are_cut_off(tmp_path):
    patch = (
        "from detector.service import worker\nassert worker.ANSWER_S == 60\nworker.ANSWER_S = 4\n"
    )
    (tmp_path / "conf.py").write_text(patch + (ROOT / "gunicorn.conf.py").read_text())
    port = free_port()
    settings = {"GUNICORN_CMD_ARGS": TWO_THREADS, "PORT": str(port), "BODY_TIMEOUT_S": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "-c", tmp_path / "conf.py", "app:create_app()"],
        cwd=ROOT,
        env={**os.environ, **DEMO, **settings},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: is_healthy(port))
        with deaf_client(port), deaf_client(port):  # a client for each thread
            # Below the five seconds in which the clients hold the threads.
            wait_for(lambda: not is_healthy(port, seconds=2))
            wait_for(lambda: all(is_healthy(port, seconds=2) for _ in range(10)))
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0


def is_healthy(port, seconds=5):
    with suppress(requests.RequestException):
        return requests.get(f"http://127.0.0.1:{port}/healthz", timeout=seconds).status_code == 200


def deaf_client(port):
    """A connection full of requests whose responses nobody reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.setblocking(False)
    with suppress(BlockingIOError):
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 50_000)
    return client


def test_silent_connections_hold_no_thread(serve):
    server = serve(GUNICORN_CMD_ARGS=TWO_THREADS)
    with connections(server, 100):
        # With a thread for FIRST_BYTE_S each, they would hold two threads for 250 seconds.
        assert server.session.get(f"{server.url}/healthz", timeout=60).status_code == 200


def test_as_many_slow_bodies_as_spare_threads_leave_room_for_verdicts(held, photo):
    server, _ = held(SLOTS="1", QUEUE_LIMIT="1")
    before = held.begun()
    with connections(server, SPARE_THREADS) as slow:
        for connection in slow:
            connection.sendall(HEAD)
        wait_for(lambda: held.begun() == before + SPARE_THREADS)
        assert server.post(photo).status_code == 200
