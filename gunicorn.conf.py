"""gunicorn's settings, each with its reason. gunicorn reads this file from the folder it is started in."""

import os
import signal

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # before numpy: its threads would fight with OpenVINO's for the processors

from detector.service.engine import slots_of  # noqa: E402
from detector.service.telemetry import LOGGING  # noqa: E402
from detector.service.worker import QuietLogger, Worker, load_settings, most_connections  # noqa: E402

# ---- a new model without a new process ----
# gunicorn's own SIGHUP starts a second worker, and one that does not boot ends the master. So the master passes the
# signal on, and the worker loads the file in a thread (detector/service/engine.py).


def when_ready(server):
    signal.signal(signal.SIGHUP, lambda *_: server.kill_workers(signal.SIGHUP))


def post_fork(server, worker):
    signal.pthread_sigmask(
        signal.SIG_BLOCK, [signal.SIGHUP]
    )  # kept until there is a handler: unhandled, it would kill


def post_worker_init(worker):
    signal.signal(signal.SIGHUP, lambda *_: worker.wsgi.extensions["engine"].reload())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])


settings = load_settings()
bind = f"[{settings['HOST'].strip('[]')}]:{settings['PORT']}"  # the brackets are for IPv6
workers = 1  # one model in memory; a forward pass takes all processors already
worker_class = Worker
# those at work, those that may wait for them, and some for all else: a full queue must not make /healthz wait
threads = slots_of(settings) + settings["QUEUE_LIMIT"] + settings["SPARE_THREADS"]
worker_connections = (
    most_connections()
)  # open ones, more are not accepted; those that are silent cost no thread
keepalive = 75  # seconds between requests; longer than the 60 after which nginx closes an idle one
preload_app = False  # OpenVINO's threads do not survive a fork
timeout = 60  # a worker silent for so long is replaced
graceful_timeout = 30  # in-flight requests may finish; below Kubernetes' grace period
control_socket_disable = True  # it would need a writable home
# the heartbeat file: writable where the root is read-only, and never waits for a disk
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None
forwarder_headers = (  # no header may move a request to another path: nothing here depends on where it is mounted
    ""
)
logconfig_dict = LOGGING  # every line one JSON object on stderr
logger_class = QuietLogger  # the app's own lines say more than an access log
