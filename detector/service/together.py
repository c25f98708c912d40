"""Calls of several threads share a run of one function: how uploads that wait for the encoder share a forward pass.

encode = Together(encoder.encode)
features, waited = encode(pixels)       # float32 [n, 3, r, r] -> float32 [n, d], seconds until its pass began
"""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

TOGETHER = (
    4  # images in a shared pass: 8 gain 4% over 4 (a small network) and hold up the first of them
)


class Together:
    """The function runs once at a time, in a thread of its own; rows that wait meanwhile go together into its next run,
    first come, first served, at most TOGETHER of them (more only where one call brings more)."""

    def __init__(self, function):
        self._function, self._waiting, self._thread = function, deque(), ThreadPoolExecutor(1)

    def __call__(self, rows):
        """rows [n, ...] -> (the function's [n, ...], seconds waited before it began); raises what the function raises."""
        called, result = time.perf_counter(), Future()
        self._waiting.append((rows, result))
        self._thread.submit(
            self._run
        )  # one for each call; finds nothing where an earlier one took its rows along
        found, began = result.result()
        return found, began - called

    def _run(self):
        taken, n = [], 0
        while self._waiting and (not taken or n + len(self._waiting[0][0]) <= TOGETHER):
            taken.append(self._waiting.popleft())
            n += len(taken[-1][0])
        if not taken:
            return
        began = time.perf_counter()
        try:
            found = self._function(np.concatenate([rows for rows, _ in taken]))
        except Exception as error:
            for _, result in taken:
                result.set_exception(error)
            return
        for rows, result in taken:
            result.set_result((found[: len(rows)], began))
            found = found[len(rows) :]
