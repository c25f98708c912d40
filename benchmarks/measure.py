"""Whole processes in turns, and how the tables say it: for the benchmarks beside this file."""

import os
import statistics
import subprocess
import time


def run(name, command, **env):
    """A process of its own -> (seconds, peak MB). One that fails ends the benchmark with what it said."""
    started = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed: {said.decode()}")
    return time.perf_counter() - started, used.ru_maxrss / 1000


def in_turns(commands, runs, **env):
    """{name: command} -> {name: [(seconds, peak MB)]}: one run of each that does not count, then A B A B ..., since the
    machine's mood changes."""
    found = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, command in commands.items():
            measured = run(name, command, **env)
            if turn:
                found[name].append(measured)
    return found


def spread(values, digits=2):
    """'median (lowest to highest)'."""
    return (
        f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to"
        f" {max(values):.{digits}f})"
    )


def ratios(values, others, digits=1):
    """Pair by pair, since both of a pair met the same machine: 'median (lowest to highest)' of value / other."""
    return spread([value / other for value, other in zip(values, others)], digits)
