"""gunicorn's settings, each with its reason. gunicorn reads this file from the folder it is started in."""
import json
import os
import resource
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from selectors import EVENT_READ

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: its threads would fight with OpenVINO's for the processors

from gunicorn.glogging import Logger  # noqa: E402
from gunicorn.http.errors import (ConfigurationProblem, ExpectationFailed, InvalidResponseHeader,  # noqa: E402
                                  InvalidResponseHeaderName, LimitRequestHeaders, LimitRequestLine, ParseException,
                                  UnsupportedTransferCoding)
from gunicorn.util import write_nonblock  # noqa: E402
from gunicorn.workers.gthread import TConn, ThreadWorker  # noqa: E402

from common import DetectorError, UsageError  # noqa: E402
from engine import check, slots_of  # noqa: E402
from settings import read_settings  # noqa: E402
from telemetry import LOGGING, say_event  # noqa: E402


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
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UsageError(f"HOST={host} PORT={port}: cannot listen there ({error.strerror}); set another address or port") from None


class QuietLogger(Logger):
    """With a `logconfig_dict` gunicorn puts together a line for each request, a tenth of a millisecond, for nobody."""

    def access(self, *_):
        pass


FIRST_BYTE_S = 5  # for a new connection that has sent nothing
ANSWER_S = 60     # beyond the deadline of its body, for the queue, the verdicts of a batch and a client that reads slowly
OURS = ConfigurationProblem, InvalidResponseHeader, InvalidResponseHeaderName  # our mistakes, though gunicorn derives them so
MALFORMED = {ExpectationFailed: "417 Expectation Failed", LimitRequestHeaders: "431 Request Header Fields Too Large",
             LimitRequestLine: "414 URI Too Long", UnsupportedTransferCoding: "501 Not Implemented"}


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
        conn.sock.setblocking(False)  # as gunicorn itself does after five seconds of a thread's waiting
        conn.timeout = time.monotonic() + FIRST_BYTE_S
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def handle(self, conn):
        self.deadlines[conn] = time.monotonic() + settings["BODY_TIMEOUT_S"], None
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
        say_event("malformed", level="warning", kind=type(exc).__name__, address=addr and addr[0], status=int(status[:3]))
        body = json.dumps({"error": f"the request is malformed: {type(exc).__name__}"}) + "\n"
        with suppress(OSError):  # gone by itself
            write_nonblock(client, (f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\n"
                                    f"Content-Length: {len(body)}\r\n\r\n{body}").encode())

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
                    conn.sock.shutdown(socket.SHUT_RDWR if now > deadline + ANSWER_S else socket.SHUT_RD)


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


# ---- a new model without a new process ----
# gunicorn's own SIGHUP starts a second worker, and one that does not boot ends the master. So the master passes the
# signal on, and the worker loads the file in a thread (engine.py).

def when_ready(server):
    signal.signal(signal.SIGHUP, lambda *_: server.kill_workers(signal.SIGHUP))


def post_fork(server, worker):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])  # kept until there is a handler: unhandled, it would kill


def post_worker_init(worker):
    signal.signal(signal.SIGHUP, lambda *_: worker.wsgi.extensions["engine"].reload())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])


def most_connections():
    """Open connections that the limit on open files allows, which is raised first: out of files, gunicorn's worker ends."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < 2048:
        limit = min(2048, most) if most != resource.RLIM_INFINITY else 2048
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    return max(50, min(1000, limit - 100))  # a hundred for all else that is open


settings = load_settings()
bind = f"[{settings['HOST'].strip('[]')}]:{settings['PORT']}"  # the brackets are for IPv6
workers = 1                              # one model in memory; a forward pass takes all processors already
worker_class = Worker
# those at work, those that may wait for them, and some for all else: a full queue must not make /healthz wait
threads = slots_of(settings) + settings["QUEUE_LIMIT"] + settings["SPARE_THREADS"]
worker_connections = most_connections()  # open ones, more are not accepted; those that are silent cost no thread
keepalive = 75                           # seconds between requests; longer than the 60 after which nginx closes an idle one
preload_app = False                      # OpenVINO's threads do not survive a fork
timeout = 60                             # a worker silent for so long is replaced
graceful_timeout = 30                    # in-flight requests may finish; below Kubernetes' grace period
control_socket_disable = True            # it would need a writable home
# the heartbeat file: writable where the root is read-only, and never waits for a disk
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None
forwarder_headers = ""                   # no header may move a request to another path: nothing here depends on where it is mounted
logconfig_dict = LOGGING                 # every line one JSON object on stderr
logger_class = QuietLogger               # the app's own lines say more than an access log
