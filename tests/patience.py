"""Time in tests: how long to wait for what must happen, and what work may cost, on a machine of any speed."""

import time
from contextlib import contextmanager

PATIENCE = 600  # seconds after which something hangs; no test that passes waits so long


def additions():
    """Seconds of processor time that a million additions take here and now: some hundredths."""
    started = time.process_time()
    sum(number for number in range(1_000_000))
    return time.process_time() - started


@contextmanager
def costs_at_most(million_additions):
    """The body takes no more processor time than so many million additions in Python: a limit that a slower machine shares."""
    before, started = additions(), time.process_time()
    yield
    seconds = time.process_time() - started
    limit = million_additions * max(before, additions())
    assert seconds < limit, f"{seconds:.2f} s, at most {limit:.2f} s"
