"""gunicorn's thread worker, made fit for clients that are slow on purpose, and what is checked before it starts."""

import json
import resource
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from selectors import EVENT_READ

from gunicorn.glogging import Logger
from gunicorn.http.errors import (
    ConfigurationProblem,
    ExpectationFailed,
    InvalidResponseHeader,
    InvalidResponseHeaderName,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
    UnsupportedTransferCoding,
)
from gunicorn.util import write_nonblock
from gunicorn.workers.gthread import TConn, ThreadWorker

from detector.base.errors import DetectorError, UsageError
from detector.service.engine import check
from detector.service.settings import read_settings
from detector.service.telemetry import say_event


def load_settings():
    """A bad setting ends the start in one line, exit code 2; left to the worker it would be a traceback and a 3."""
    try:
        settings = read_settings()
        check_address(settings["HOST"], settings["PORT"])
        check(settings)
        return settings
    except DetectorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check_address(host, port):
    """Raises UsageError where nobody can listen: gunicorn would try for five seconds and name no setting."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UsageError(
            f"HOST={host} PORT={port}: cannot listen there ({error.strerror}); set another address"
            " or port"
        ) from None


class QuietLogger(Logger):
    """With a `logconfig_dict` gunicorn puts together a line for each request, a tenth of a millisecond, for nobody."""

    def access(self, *_):
        pass


FIRST_BYTE_S = 5  # for a new connection that has sent nothing
ANSWER_S = 60  # beyond the deadline of its body, for the queue, the verdicts of a batch and a client that reads slowly
OURS = (
    ConfigurationProblem,
    InvalidResponseHeader,
    InvalidResponseHeaderName,
)  # our mistakes, though gunicorn derives them so
MALFORMED = {
    ExpectationFailed: "417 Expectation Failed",
    LimitRequestHeaders: "431 Request Header Fields Too Large",
    LimitRequestLine: "414 URI Too Long",
    UnsupportedTransferCoding: "501 Not Implemented",
}


class Worker(ThreadWorker):
    """gthread, for clients that are slow on purpose: one that has sent nothing costs no thread, a request that has not
    arrived by its deadline is cut off, and nobody makes the main loop wait."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # connection: (when its request must have arrived, it once its headers have); threads write, the main loop looks
        self.deadlines = {}

    def enqueue_req(self, conn):
        if conn.initialized or conn.data_ready:
            return super().enqueue_req(conn)
        conn.sock.setblocking(
            False
        )  # as gunicorn itself does after five seconds of a thread's waiting
        conn.timeout = time.monotonic() + FIRST_BYTE_S
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def handle(self, conn):
        self.deadlines[conn] = (
            time.monotonic() + self.wsgi.extensions["engine"].settings["BODY_TIMEOUT_S"],
            None,
        )
        try:
            return super().handle(conn)
        finally:
            self.deadlines.pop(conn, None)

    def handle_request(self, req, conn):
        self.deadlines[conn] = self.deadlines[conn][0], req
        return super().handle_request(req, conn)

    def handle_error(self, req, client, addr, exc):
        """gunicorn would write the bytes that it could not parse, a token perhaps, into its log and its answer."""
        if not isinstance(exc, ParseException) or isinstance(exc, OURS):
            return super().handle_error(req, client, addr, exc)
        status = MALFORMED.get(type(exc), "400 Bad Request")
        self.wsgi.extensions["telemetry"].requests.labels("other", int(status[:3])).inc()
        say_event(
            "malformed",
            level="warning",
            kind=type(exc).__name__,
            address=addr and addr[0],
            status=int(status[:3]),
        )
        body = json.dumps({"error": f"the request is malformed: {type(exc).__name__}"}) + "\n"
        with suppress(OSError):  # gone by itself
            write_nonblock(
                client,
                (
                    f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n{body}"
                ).encode(),
            )

    def notify(self):
        """Called by the main loop at least once a second. At first only reading is cut off, so that an answer can still be
        sent; a client that does not take it is cut off as well."""
        super().notify()
        now = time.monotonic()
        for conn, (deadline, req) in list(self.deadlines.items()):
            if now > deadline and not (req and arrived(req)) or now > deadline + ANSWER_S:
                if req:
                    req.force_close()  # what comes of its body later is no request
                with suppress(OSError):
                    conn.sock.shutdown(
                        socket.SHUT_RDWR if now > deadline + ANSWER_S else socket.SHUT_RD
                    )


def arrived(req):
    """Has its body been read to the end? Both of gunicorn's readers know: one counts down, the other drops its parser."""
    reader = req.body.reader
    return getattr(reader, "length", None) == 0 or getattr(reader, "parser", reader) is None


def close_now(conn, graceful=False):
    """gunicorn's own graceful close waits in the main loop, up to two seconds, for the client to close first: one client that
    does not would stop all others. Here what has come already is read, so that the answer is followed by an end and not
    by a reset, and that is all: bodies were read before the answer."""
    with suppress(OSError):
        conn.sock.setblocking(False)
        conn.sock.shutdown(socket.SHUT_WR)
        for _ in range(16):
            if not conn.sock.recv(65536):
                break
    with suppress(OSError):
        conn.sock.close()


TConn.close = close_now


def most_connections():
    """Open connections that the limit on open files allows, which is raised first: out of files, gunicorn's worker ends."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < 2048:
        limit = min(2048, most) if most != resource.RLIM_INFINITY else 2048
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    return max(50, min(1000, limit - 100))  # a hundred for all else that is open
