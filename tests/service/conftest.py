"""Fixtures of the tests of the service."""

import fcntl
from contextlib import contextmanager

import pytest
from commands import ROOT
from engines import OTHER, TOKEN, client_on, keys_file
from live import PATIENT

# The service's own gunicorn.conf.py, with two additions. Images wait before decoding for the lock
# on the file `gate`. Every request that gets a thread adds a byte to the file `begun`.
HELD = """
exec(compile(open({conf!r}).read(), {conf!r}, "exec"))
import fcntl
original = post_worker_init

def pre_request(worker, request):
    with open({begun!r}, "a") as begun:
        begun.write("x")

def post_worker_init(worker):
    original(worker)
    from detector.verdict import Detector
    pixels = Detector.pixels

    def wait(self, image):
        with open({gate!r}) as gate:
            fcntl.flock(gate, fcntl.LOCK_SH)
        return pixels(self, image)
    Detector.pixels = wait
"""


@pytest.fixture
def held(serve, tmp_path):
    """Function: settings -> (the live service, a context in which all decoding stands still).

    `held.begun()` counts the requests that have a thread.
    """
    gate, begun, conf = (tmp_path / name for name in ("gate", "begun", "held.conf.py"))
    gate.touch()
    begun.touch()
    original = str(ROOT / "gunicorn.conf.py")
    conf.write_text(HELD.format(conf=original, gate=str(gate), begun=str(begun)))

    @contextmanager
    def stand_still():
        with open(gate) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def start(**settings):
        server = serve(GUNICORN_CMD_ARGS=f"{PATIENT} --config {conf}", **settings)
        return server, stand_still()

    start.begun = lambda: begun.stat().st_size
    return start


@pytest.fixture(autouse=True)
def everything_is_logged(caplog):
    caplog.set_level("INFO")


@pytest.fixture(scope="module")
def client(compiled_once):
    """A test client of a service without API keys."""
    return client_on()


@pytest.fixture(scope="module")
def api_keys(tmp_path_factory):
    """API_KEYS_FILE with the keys of ann (TOKEN) and ben (OTHER)."""
    return keys_file(tmp_path_factory.mktemp("keys") / "keys", ann=TOKEN, ben=OTHER)


@pytest.fixture(scope="module")
def keyed(api_keys, compiled_once):
    """A test client of a service with API keys."""
    return client_on(API_KEYS_FILE=api_keys)


@pytest.fixture(scope="module")
def photo(photos):
    return photos["china.jpg"].read_bytes()
