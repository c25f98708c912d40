"""Calls of several threads share a pass of the encoder, and each gets its own rows."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
from engines import until
from patience import PATIENCE

from detector.service.together import TOGETHER, Together


class Held:
    """A function of rows that notes the size of each pass. A pass lasts until `go` is set."""

    def __init__(self):
        self.sizes, self.begun, self.go = [], Event(), Event()

    def __call__(self, rows):
        self.sizes.append(len(rows))
        self.begun.set()
        assert self.go.wait(PATIENCE)
        if (rows < 0).any():
            raise ValueError("a negative row")
        return rows * 2


def rows(*values):
    return np.array(values, float)[:, None]


def waiting(together, pool, held, calls):
    """Start a pass with a single call and let `calls` wait for it -> their futures in order."""
    first = pool.submit(together, rows(1))
    assert held.begun.wait(PATIENCE)
    futures = [first]
    for number, call in enumerate(calls, 1):
        futures.append(pool.submit(together, call))
        until(lambda number=number: len(together._waiting) == number)
    return futures


@pytest.fixture
def pool():
    with ThreadPoolExecutor(20) as pool:
        yield pool


@pytest.mark.parametrize(
    "calls, sizes",
    [
        ([], [1]),
        ([1], [1, 1]),
        ([1, 1, 1, 1], [1, 4]),
        ([1] * 9, [1, 4, 4, 1]),
        ([3, 2, 2, 1], [1, 3, 4, 1]),
        ([16, 1], [1, 16, 1]),
        ([1, 16], [1, 1, 16]),
    ],
)
def test_waiting_calls_share_passes_in_the_order_in_which_they_came(pool, calls, sizes):
    held = Held()
    together = Together(held)
    given = [rows(*range(10 * i, 10 * i + n)) for i, n in enumerate(calls)]
    futures = waiting(together, pool, held, given)
    held.go.set()
    for call, future in zip([rows(1), *given], futures, strict=True):
        result, waited = future.result(PATIENCE)
        assert (result == call * 2).all() and waited >= 0
    assert held.sizes == sizes and max(n for n in sizes if n != 16) <= TOGETHER


def test_calls_take_turns_where_a_run_has_one_row_at_most(pool):
    held = Held()
    futures = waiting(Together(held, 1), pool, held, [rows(1), rows(2), rows(3, 4)])
    held.go.set()
    for future in futures:
        future.result(PATIENCE)
    assert held.sizes == [1, 1, 1, 2]


def test_a_single_call_starts_at_once():
    held = Held()
    held.go.set()
    result, waited = Together(held)(rows(1, 2))
    assert result.tolist() == [[2], [4]] and held.sizes == [2] and waited < 5


def test_an_error_reaches_all_calls_of_its_pass_and_no_others(pool):
    held = Held()
    together = Together(held)
    first, *others, last = waiting(
        together, pool, held, [rows(5), rows(-1), rows(6), rows(7), rows(8)]
    )
    held.go.set()
    assert first.result(PATIENCE)[0] == 2 and last.result(PATIENCE)[0] == 16
    for future in others:
        with pytest.raises(ValueError, match="a negative row"):
            future.result(PATIENCE)


def test_many_threads_get_their_own_rows(pool):
    together = Together(lambda rows: rows * 2)
    values = np.random.default_rng(0).random((500, 3))
    results = [rows for rows, _ in pool.map(lambda value: together(value[None]), values)]
    assert (np.concatenate(results) == values * 2).all()
