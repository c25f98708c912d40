"""Fixtures of the tests of the live service."""

import fcntl
from contextlib import contextmanager

import pytest
from commands import ROOT
from live import PATIENT

HELD = """
exec(compile(open({conf!r}).read(), {conf!r}, "exec"))
import fcntl
as_it_is = post_worker_init

def post_worker_init(worker):
    as_it_is(worker)
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
    """Function: settings -> (the live service, a context in which every image that it decodes stands still until the end)."""
    gate, conf = tmp_path / "gate", tmp_path / "held.conf.py"
    gate.touch()
    conf.write_text(HELD.format(conf=str(ROOT / "gunicorn.conf.py"), gate=str(gate)))

    @contextmanager
    def stand_still():
        with open(gate) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    return lambda **settings: (
        serve(GUNICORN_CMD_ARGS=f"{PATIENT} --config {conf}", **settings),
        stand_still(),
    )


@pytest.fixture(scope="module")
def photo(photos):
    return photos["china.jpg"].read_bytes()
