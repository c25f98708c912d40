"""Registered versions, which of them is the champion, and what happened to the champion."""

import getpass
import json
import os
import socket
from datetime import datetime, timezone

from detector.base.errors import UsageError
from detector.registry.store import exception

CHAMPION = "champion"  # the alias of the version in production


def registered(client, name):
    """All versions that `register` made, oldest first. The registry may hold models of others."""
    found = [
        v
        for v in client.search_model_versions(f"name='{name}'")
        if {"version", "commit", "sha256"} <= v.tags.keys()
    ]
    return sorted(found, key=lambda v: int(v.version))


def versions(client, name):
    """The same; UsageError where there is none of that name."""
    found = registered(client, name)
    if not found:
        raise UsageError(f"no model '{name}' is registered: registry.py list tells which are")
    return found


def find(client, name, wanted):
    """The version 'champion', 'v1.2.0' (the newest of that name) or '3'. Raises UsageError."""
    there = versions(client, name)
    number = champion_number(client, name) if wanted == CHAMPION else wanted
    found = [v for v in there if number in (number_of(v), v.tags["version"])]
    if not found:
        have = (
            "it has no champion yet"
            if wanted == CHAMPION
            else f"it has {', '.join(v.tags['version'] for v in there)}"
        )
        raise UsageError(f"'{name}' has no version {wanted}: {have}")
    return found[-1]


def champion_number(client, name):
    """As text, or None."""
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    return number and str(number)


def number_of(version):
    return str(version.version)  # a server sends text, a file holds a number


def who():
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container under a user id of no name
        user = f"uid{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def title(version):
    tags = version.tags
    return (
        f"{version.name} {tags['version']} (number {version.version}, commit {tags['commit'][:12]})"
    )


# ---- the champion ----


def ledger(client, name):
    """ID of the run whose parameters hold the events. MLflow lets nobody overwrite a parameter."""
    return registered(client, name)[0].run_id


def events(client, name):
    """What happened to the champion, oldest first: dicts of action, number, version, by, at."""
    held = client.get_run(ledger(client, name)).data.params | client.get_registered_model(name).tags
    return [json.loads(held[key]) for key in sorted(held) if key.startswith(f"{CHAMPION}.")]


def move(client, version, action, before, **known):
    """Record the event that follows `before`, then point the alias at that version.

    Raises UsageError where another process has written that event.
    """
    name, key = version.name, f"{CHAMPION}.{len(before):05d}"
    event = json.dumps(
        {
            "action": action,
            "number": number_of(version),
            "version": version.tags["version"],
            "by": who(),
            "at": datetime.now(timezone.utc).isoformat(),
            **known,
        }
    )
    try:
        client.log_param(ledger(client, name), key, event)
    except exception():
        now = events(client, name)
        if len(now) == len(before):
            raise
        raise UsageError(
            f"the champion of '{name}' was moved meanwhile, to {now[-1]['version']} by "
            f"{now[-1]['by']}: see "
            "registry.py list, and run this again if it is still wanted"
        ) from None
    client.set_registered_model_tag(name, key, event)
    while champion_number(client, name) != (
        last := events(client, name)[-1]["number"]
    ):  # whoever comes last sets the last
        client.set_registered_model_alias(name, CHAMPION, last)


def standing(history):
    """Numbers of the champions of which none was rolled back, oldest first."""
    line = []
    for event in history:
        if event["action"] == "rollback":
            line = line[:-1]
        elif line[-1:] != [event["number"]]:  # twice: at first its alias could not be set
            line.append(event["number"])
    return line
