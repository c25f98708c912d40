"""Registered versions, the champion among them, and the history of the champion."""

import getpass
import json
import os
import socket
import uuid
from datetime import UTC, datetime

from detector.base.errors import UsageError
from detector.registry.store import mlflow_error

CHAMPION = "champion"  # the alias of the version in production


def registered(client, name):
    """All versions that `register` made, oldest first. The registry may hold models of others."""
    own = [
        version
        for version in client.search_model_versions(f"name='{name}'")
        if {"version", "commit", "sha256"} <= version.tags.keys()
    ]
    return sorted(own, key=lambda version: int(version.version))


def versions(client, name):
    """All versions, oldest first. Raises UsageError where no model has that name."""
    if own := registered(client, name):
        return own
    raise UsageError(f"no model '{name}' is registered: registry.py list names those that are")


def find(client, name, wanted):
    """The version 'champion', 'v1.2.0' (the newest of that name) or '3'. Raises UsageError."""
    own = versions(client, name)
    number = champion_number(client, name) if wanted == CHAMPION else wanted
    matching = [v for v in own if number in (number_of(v), v.tags["version"])]
    if matching:
        return matching[-1]
    present = f"it has {', '.join(v.tags['version'] for v in own)}"
    if wanted == CHAMPION:
        present = "it has no champion yet"
    raise UsageError(f"'{name}' has no version {wanted}: {present}")


def champion_number(client, name):
    """As text, or None."""
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    return number and str(number)


def number_of(version):
    return str(version.version)  # a server sends text, a file holds a number


def who():
    """'user@host' for the records."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container, where the user id has no name
        user = f"uid{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def title(version):
    name, commit = version.tags["version"], version.tags["commit"][:12]
    return f"{version.name} {name} (number {version.version}, commit {commit})"


# ---- the champion ----


def ledger(client, name):
    """ID of the run whose parameters hold the events. MLflow lets nobody overwrite a parameter."""
    return versions(client, name)[0].run_id


def events(client, name):
    """History of the champion, oldest first: dicts of action, number, version, by, at.

    Raises UsageError where no model has that name.
    """
    params = client.get_run(ledger(client, name)).data.params
    records = params | client.get_registered_model(name).tags
    return [json.loads(records[key]) for key in sorted(records) if key.startswith(f"{CHAMPION}.")]


def move(client, version, action, before, **details):
    """Record the event that follows `before`, then point the alias at that version.

    Raises UsageError where another process has written that event.
    """
    name, key = version.name, f"{CHAMPION}.{len(before):05d}"
    event = {
        "action": action,
        "number": number_of(version),
        "version": version.tags["version"],
        "by": who(),
        "at": datetime.now(UTC).isoformat(),
        "id": uuid.uuid4().hex,  # MLflow takes an equal value twice, and clocks may agree
        **details,
    }
    try:
        client.log_param(ledger(client, name), key, json.dumps(event))
    except mlflow_error():
        history = events(client, name)
        if len(history) == len(before):
            raise
        raise UsageError(
            f"the champion of '{name}' was moved meanwhile, to {history[-1]['version']} by "
            f"{history[-1]['by']}: see registry.py list, and run this again if you still want it"
        ) from None
    client.set_registered_model_tag(name, key, json.dumps(event))
    # Of two processes here, the last to look sets the alias to the last event.
    while champion_number(client, name) != (last := events(client, name)[-1]["number"]):
        client.set_registered_model_alias(name, CHAMPION, last)


def standing(history):
    """Numbers of the champions that no rollback removed, oldest first."""
    line = []
    for event in history:
        if event["action"] == "rollback":
            line = line[:-1]
        elif line[-1:] != [event["number"]]:  # a promotion is repeated where its alias was not set
            line.append(event["number"])
    return line
