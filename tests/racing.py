"""Processes that wait, warm, for commands of registry.py and begin them at the same moment.

A command that moves the champion waits again after it has read the history. So there is always a
race and a loser, however slow the machine is. Their clocks stand still, so that two events of one
kind differ in nothing that their makers chose.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

from commands import ROOT

from detector.registry import champion, store

CHILD = """
import contextlib, io, json, os, sys
sys.path.insert(0, sys.argv[1])
import datetime
import mlflow.entities, sqlalchemy
import registry
from detector.base.errors import UsageError
from detector.registry import champion, versions


class StoppedClock(datetime.datetime):
    @classmethod
    def now(cls, zone=None):
        return cls(2026, 1, 1, tzinfo=zone)


champion.datetime = StoppedClock


def wait():
    print("waiting", file=sys.__stdout__, flush=True)
    sys.stdin.readline()


def move_together(*args, move=versions.move, **known):
    wait()
    move(*args, **known)


versions.move = move_together
for line in sys.stdin:
    words, folder, os.environ["MLFLOW_TRACKING_URI"] = json.loads(line)
    os.chdir(folder)
    if words[0] == "register":
        wait()
    text, code = io.StringIO(), 0
    with contextlib.redirect_stdout(text):
        try:
            code = registry.main(words) or 0
        except UsageError as error:
            print(error)
            code = 2
    print(json.dumps([code, text.getvalue()]), flush=True)
"""


@contextmanager
def racers(count=2, **env):
    """Function: race(folder, ['register', ...], ['register', ...]) -> [(exit code, text), ...]."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(ROOT)],
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]

    def race(folder, *commands):
        address = os.environ["MLFLOW_TRACKING_URI"]
        for process, words in zip(processes, commands, strict=True):
            process.stdin.write(json.dumps([list(map(str, words)), str(folder), address]) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "waiting\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return [tuple(json.loads(process.stdout.readline())) for process in processes]

    try:
        yield race
    finally:
        for process in processes:
            process.stdin.close()
            process.wait(60)
            process.stdout.close()


def one_of_two_is_registered(race, twins, folder, name):
    results = sorted(race(folder, *(["register", name, path] for path in twins)))
    assert [code for code, _ in results] == [0, 2], results
    assert f"'{name}' has a v1.1.0 of another file" in results[1][1]
    client = store.connect()
    (version,) = client.search_model_versions(f"name='{name}'")
    experiment = client.get_experiment_by_name(name).experiment_id
    assert [run.info.run_id for run in client.search_runs([experiment])] == [version.run_id]


def one_of_two_is_promoted(race, folder, name):
    promotions = (["promote", name, version, "--force", "x"] for version in ("v1.1.0", "v1.2.0"))
    results = sorted(race(folder, *promotions))
    assert [code for code, _ in results] == [0, 2], results
    assert "was moved meanwhile" in results[1][1]
    client = store.connect()
    history = champion.events(client, name)
    assert len(history) == 2 and history[1]["version"] in results[0][1]
    assert champion.champion_number(client, name) == history[1]["number"]
    results = sorted(race(folder, ["rollback", name], ["rollback", name]))
    assert [code for code, _ in results] == [0, 2], results
    assert champion.champion_number(client, name) == history[0]["number"] == "1"
