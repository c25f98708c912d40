"""gunicorn's settings, each with its reason.

gunicorn reads this file from the folder it is started in.
"""

import os
import signal

# Before numpy is imported: OpenBLAS's threads would compete with OpenVINO's for the processors.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from detector.service.engine import slot_count
from detector.service.settings import SPARE_THREADS
from detector.service.telemetry import LOGGING
from detector.service.worker import QuietLogger, Worker, load_settings, most_connections

# ---- a new model without a new process ----
# gunicorn's own SIGHUP starts a second worker, and a worker that does not boot ends the master.
# So the master passes the signal on, and the worker loads the file in a thread: Engine.reload.


def when_ready(server):
    signal.signal(signal.SIGHUP, lambda *_: server.kill_workers(signal.SIGHUP))


def post_fork(server, worker):
    # Blocked until there is a handler, because an unhandled SIGHUP would kill the worker.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])


def post_worker_init(worker):
    # The app has read it. gunicorn itself would send 500 to a probe, whose path has no prefix.
    os.environ.pop("SCRIPT_NAME", None)
    signal.signal(signal.SIGHUP, lambda *_: worker.wsgi.extensions["engine"].reload())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])


settings = load_settings()
bind = f"[{settings['HOST'].strip('[]')}]:{settings['PORT']}"  # the brackets are for IPv6
workers = 1  # one model in memory; a forward pass takes all processors already
worker_class = Worker
# Spare threads keep /healthz fast while the slots and the queue are full.
threads = slot_count(settings) + settings["QUEUE_LIMIT"] + SPARE_THREADS
worker_connections = most_connections()  # more are not accepted; a silent one holds no thread
keepalive = 75  # seconds between requests; nginx closes an idle connection after 60
preload_app = False  # OpenVINO's threads do not survive a fork
timeout = 60  # seconds after which a silent worker is replaced
graceful_timeout = 30  # in-flight requests may finish; below Kubernetes' grace period
control_socket_disable = True  # it would need a writable home
# The heartbeat file: writable under a read-only root, and never delayed by a disk.
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None
forwarder_headers = ""  # no header may move a request to another path
logconfig_dict = LOGGING  # every line is one JSON object on stderr
logger_class = QuietLogger  # the app's own lines hold more than an access log
