"""gunicorn's thread worker, hardened against clients that are slow on purpose.

`load_settings` checks everything that can be checked before the worker starts.
"""

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
    """The settings, checked. A bad setting ends the start with one line and exit code 2.

    The worker would end with a traceback and exit code 3.
    """
    try:
        settings = read_settings()
        check_address(settings["HOST"], settings["PORT"])
        check(settings)
        return settings
    except DetectorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check_address(host, port):
    """Raises UsageError where nobody can listen.

    gunicorn would try for five seconds and name no setting.
    """
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
    """Writes no access log.

    With a `logconfig_dict` gunicorn formats a line for each request, 0.1 ms, that nobody reads.
    """

    def access(self, *_):
        pass


FIRST_BYTE_S = 5  # for a new connection that has sent nothing
ANSWER_S = 60  # after the deadline of the body: queue, verdicts of a batch, a slow reader
# Subclasses of ParseException in gunicorn, although they are our mistakes.
OURS = (ConfigurationProblem, InvalidResponseHeader, InvalidResponseHeaderName)
MALFORMED = {
    ExpectationFailed: "417 Expectation Failed",
    LimitRequestHeaders: "431 Request Header Fields Too Large",
    LimitRequestLine: "414 URI Too Long",
    UnsupportedTransferCoding: "501 Not Implemented",
}


class Worker(ThreadWorker):
    """gthread, hardened against clients that are slow on purpose.

    A silent connection holds no thread. A request that has not arrived by its deadline is cut off.
    No client can block the main loop.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # {connection: (deadline of its request, the request once its headers have arrived)}
        # Threads write it, and the main loop reads it.
        self.deadlines = {}

    def enqueue_req(self, conn):
        if conn.initialized or conn.data_ready:
            return super().enqueue_req(conn)
        # gunicorn itself does this after a thread has waited for five seconds.
        conn.sock.setblocking(False)
        conn.timeout = time.monotonic() + FIRST_BYTE_S
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def handle(self, conn):
        limit = self.wsgi.extensions["engine"].settings["BODY_TIMEOUT_S"]
        self.deadlines[conn] = time.monotonic() + limit, None
        try:
            return super().handle(conn)
        finally:
            self.deadlines.pop(conn, None)

    def handle_request(self, req, conn):
        self.deadlines[conn] = self.deadlines[conn][0], req
        return super().handle_request(req, conn)

    def handle_error(self, req, client, addr, exc):
        """Refuse a request that cannot be parsed.

        gunicorn would write the malformed bytes, perhaps a token, into its log and its response.
        """
        if not isinstance(exc, ParseException) or isinstance(exc, OURS):
            return super().handle_error(req, client, addr, exc)
        kind = type(exc).__name__
        status = MALFORMED.get(type(exc), "400 Bad Request")
        code = int(status[:3])
        self.wsgi.extensions["telemetry"].requests.labels("other", code).inc()
        address = addr and addr[0]
        say_event("malformed", level="warning", kind=kind, address=address, status=code)
        body = json.dumps({"error": f"the request is malformed: {kind}"}) + "\n"
        response = (
            f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        )
        with suppress(OSError):  # the client has gone
            write_nonblock(client, response.encode())

    def notify(self):
        """Cut off late requests. The main loop calls this at least once a second.

        At first only reading is cut off, so that a response can still be sent. A client that does
        not read the response is cut off after ANSWER_S.
        """
        super().notify()
        now = time.monotonic()
        for conn, (deadline, req) in list(self.deadlines.items()):
            deaf = now > deadline + ANSWER_S
            if deaf or now > deadline and not (req and arrived(req)):
                if req:
                    req.force_close()  # later bytes of its body are no request
                with suppress(OSError):
                    conn.sock.shutdown(socket.SHUT_RDWR if deaf else socket.SHUT_RD)


def arrived(req):
    """Has its body been read to the end?

    Of gunicorn's two readers one counts down `length`, the other drops its `parser`.
    """
    reader = req.body.reader
    return getattr(reader, "length", None) == 0 or getattr(reader, "parser", reader) is None


def close_now(conn, graceful=False):
    """Close a connection without waiting for its client.

    gunicorn's own graceful close waits in the main loop, for up to two seconds, until the client
    closes. A client that does not close would stop all others. This reads the bytes that have
    arrived already, so that the client gets an end after its response and not a reset.
    """
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
    """How many connections the limit on open files allows. The limit is raised first.

    gunicorn's worker ends when it runs out of files.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < 2048:
        limit = min(2048, most) if most != resource.RLIM_INFINITY else 2048
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    return max(50, min(1000, limit - 100))  # 100 are for other open files
