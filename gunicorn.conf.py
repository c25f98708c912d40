"""gunicorn's settings, each with its reason. gunicorn reads this file from the folder it is started in."""
import logging
import os
import sys

from app import check, read_settings
from common import DetectorError

settings = {}


def load_settings():
    """A bad setting ends the start in one line, exit code 2; left to the worker it would be a traceback and a 3."""
    try:
        settings.update(read_settings())
        check(settings)
    except DetectorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


load_settings()
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")  # the app's own lines, to stderr
bind = f"{settings['HOST']}:{settings['PORT']}"
workers = 1                              # one model in memory; a forward pass takes all cores already
worker_class = "gthread"
threads = settings["HTTP_THREADS"]       # uploads wait in these, so that one slow client does not hold up the rest
preload_app = False                      # OpenVINO's threads do not survive a fork
timeout = 60                             # a worker silent for so long is replaced
graceful_timeout = 30                    # in-flight requests may finish; below Kubernetes' grace period
control_socket_disable = True            # it would need a writable home
# the heartbeat file: writable where the root is read-only, and never waits for a disk
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None
accesslog = "-"
