"""Measuring in turns and printing tables, for the benchmarks beside this file."""

import os
import statistics
import subprocess
import time
from pathlib import Path

from detector.encoders.runtime import processors

# what decides the speed of matrix products, and its name in /proc/cpuinfo
FLAGS = {
    "AVX2": "avx2",
    "AVX512": "avx512f",
    "VNNI": "avx512_vnni",
    "AVX512-BF16": "avx512_bf16",
    "AMX": "amx_tile",
}


def machine():
    """For example '2 processors with AVX2, AVX512, VNNI, AVX512-BF16, no AMX', of Linux alone."""
    has = Path("/proc/cpuinfo").read_text().split()
    flags = (name if flag in has else f"no {name}" for name, flag in FLAGS.items())
    return f"{processors()} processors with {', '.join(flags)}"


def run(command):
    """Run a process -> (seconds, peak MB). A failure ends the benchmark with its stderr."""
    started = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed: {errors.decode()}")
    return time.perf_counter() - started, usage.ru_maxrss / 1000


def in_turns(measures, runs):
    """{name: function} -> {name: [its results]}, in the order A B A B ...

    A machine's speed drifts, so turns are fairer than blocks. The first result does not count.
    """
    results = {name: [] for name in measures}
    for _ in range(runs + 1):
        for name, measure in measures.items():
            results[name].append(measure())
    return {name: values[1:] for name, values in results.items()}


def spread(values, digits=2):
    """'median (lowest to highest)'."""
    median, low, high = (
        f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{median} ({low} to {high})"


def ratios(values, others, digits=1):
    """'median (lowest to highest)' of value / other, pair by pair: both met the same machine."""
    return spread([value / other for value, other in zip(values, others, strict=True)], digits)


def row(*cells):
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def heading(*names):
    """Print the head of a Markdown table."""
    row(*names)
    print("|" + "---|" * len(names), flush=True)
