"""Measuring in turns and printing tables, for the benchmarks beside this file."""

import statistics
import subprocess
import sys
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
STARTER = """
import os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), time.perf_counter() - started, usage.ru_maxrss / 1000)
"""


def machine():
    """For example '2 processors with AVX2, AVX512, VNNI, AVX512-BF16, no AMX', of Linux alone."""
    has = Path("/proc/cpuinfo").read_text().split()
    flags = (name if flag in has else f"no {name}" for name, flag in FLAGS.items())
    return f"{processors()} processors with {', '.join(flags)}"


def run(command, good=(0,)):
    """Run a process -> (seconds, peak MB). Another exit code than `good` ends the benchmark.

    A small process starts it, because a child's peak memory includes what its parent held.
    """
    starter = [sys.executable, "-S", "-c", STARTER, *map(str, command)]
    done = subprocess.run(starter, capture_output=True, text=True)
    code, seconds, megabytes = map(float, done.stdout.split())
    if code not in good:
        raise SystemExit(f"{' '.join(map(str, command))} failed: {done.stderr}")
    return seconds, megabytes


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
