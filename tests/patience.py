"""Time limits of tests, for machines of any speed."""

import time
from contextlib import contextmanager

PATIENCE = 600  # seconds; a test that passes never waits so long


def additions():
    """Processor time in seconds of a million additions on this machine, now."""
    started = time.process_time()
    sum(number for number in range(1_000_000))
    return time.process_time() - started


@contextmanager
def costs_at_most(million_additions):
    """Fails if the body takes more processor time than so many million additions in Python.

    The limit is at least four times what the body takes, because a busy machine doubles the time
    of work on memory. The fault that it guards against takes still more.
    """
    before, started = additions(), time.process_time()
    yield
    seconds = time.process_time() - started
    limit = million_additions * max(before, additions())
    assert seconds < limit, f"{seconds:.2f} s, at most {limit:.2f} s"
