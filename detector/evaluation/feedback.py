"""Join users' feedback with the verdicts in the service's log, and measure their accuracy.

    kubectl logs deploy/detector | python evaluate.py --feedback -
    python evaluate.py --feedback detector.log.1 detector.log

A `feedback` line names the request of a `verdict` line. Files are read twice, line by line. Only
requests with feedback are kept in memory. A pipe can be read only once, so it is copied to a
temporary file first (TMPDIR sets its place).
"""

import json
import shutil
import sys
import tempfile
from collections import Counter, namedtuple
from contextlib import ExitStack
from functools import partial

import numpy as np

from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.evaluation import intervals, metrics

# The service's lines are below 1,000 bytes. Longer lines of others are read in pieces.
LINE_BYTES = 1 << 20
READING = """How to read this: users choose what they report, so feedback is not a random sample
of all verdicts. Users report wrong verdicts more often than right ones, and they may be wrong
themselves. The intervals ignore both. If accuracy falls from one version to the next, look for the
reason. Measure the accuracy on all images with a labelled set of your own: evaluate.py --data_dir,
and golden.py for the running service."""

Joined = namedtuple("Joined", "label classification version sha256")


# ---- logs ----


def open_log(path, stack, flag="--feedback"):
    """A log that can be read twice: the file, or a copy of a pipe. Raises UsageError."""
    try:
        log = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
        if log.seekable():
            return log
        copy = stack.enter_context(tempfile.TemporaryFile())
        shutil.copyfileobj(log, copy)
        return copy
    except OSError as error:
        raise UsageError(
            f"{flag} {path}: cannot be read ({error.strerror}); name logs of the service, or -"
            " for stdin"
        ) from None


def lines_of(logs):
    """Yield every line of the open logs from the start, in pieces of at most LINE_BYTES."""
    for log in logs:
        log.seek(0)
        yield from iter(partial(log.readline, LINE_BYTES), b"")


def parse(line):
    """One line -> its JSON object, or None.

    Text before the first '{' is a prefix of `kubectl logs`, a container runtime or a log shipper.
    """
    start = line.find(b"{")
    try:
        return json.loads(line[start:]) if start >= 0 else None
    except (ValueError, RecursionError):  # cut off, or of another program
        return None


# ---- the join ----


def fields_of(event, name, counts, *fields):
    """The `fields` of an event `name`, all non-empty text; None for other and damaged events.

    The second field must be one of CLASSES.
    """
    if event is None or event.get("event") != name:
        return None
    values = [event.get(field) for field in fields]
    if not all(isinstance(value, str) and value for value in values) or values[1] not in CLASSES:
        counts["damaged"] += 1
        return None
    counts[name] += 1
    return values


def read_feedback(logs, counts):
    """First pass -> {request id: label}.

    The latest feedback of a request counts. The order of lines does not matter, because logs of
    several pods come in no order.
    """
    last, labels = {}, {}
    for line in lines_of(logs):
        event = parse(line) if b'"feedback"' in line else None
        if values := fields_of(event, "feedback", counts, "request_id", "label", "time"):
            request_id, label, time = values
            labels.setdefault(request_id, set()).add(label)
            if request_id not in last or time >= last[request_id][0]:
                last[request_id] = time, label
    counts["contradicted"] = sum(len(given) > 1 for given in labels.values())
    return {request_id: label for request_id, (_, label) in last.items()}


def read_verdicts(logs, labels, counts):
    """Second pass -> [Joined] of the requests in `labels`.

    Clients may choose request ids. An id with several verdicts is ambiguous and left out. A line
    that several logs repeat is one verdict.
    """
    first, ambiguous = {}, set()
    fields = ("request_id", "classification", "model_version", "sha256", "time")
    for line in lines_of(logs):
        event = parse(line)
        counts["skipped"] += event is None and bool(line.strip())
        values = fields_of(event, "verdict", counts, *fields)
        if values is None:
            continue
        request_id, *verdict = values
        if request_id not in labels:
            counts["without_feedback"] += 1
        elif first.setdefault(request_id, verdict) != verdict:
            ambiguous.add(request_id)
    counts["ambiguous"], counts["without_verdict"] = len(ambiguous), len(labels) - len(first)
    return [
        Joined(labels[name], *verdict[:-1])
        for name, verdict in first.items()
        if name not in ambiguous
    ]


def hashes_of(logs):
    """Paths of logs -> SHA-256 of every image that got a verdict. Raises UsageError."""
    with ExitStack() as stack:
        opened = [open_log(path, stack, "--log") for path in logs]
        events = filter(None, map(parse, lines_of(opened)))
        return {event.get("sha256") for event in events if event["event"] == "verdict"}


def join(logs, counts):
    """Open logs -> [Joined]; `counts` gets the number of lines of each kind."""
    return read_verdicts(logs, read_feedback(logs, counts), counts)


# ---- in words ----


def measure(rows):
    """[Joined] -> [accuracy, accuracy on reals, on fakes, balanced accuracy].

    Each is {'value', 'interval', 'n'}. Copies of one image are one group.
    """
    labels, groups = np.array([row.label for row in rows]), np.array([row.sha256 for row in rows])
    right = labels == np.array([row.classification for row in rows])
    real, fake = (
        intervals.share(right[labels == name], groups[labels == name]) for name in CLASSES
    )
    return [intervals.share(right, groups), real, fake, metrics.of_both(real, fake)]


def table(rows):
    """A line for all verdicts, then a line for each model version."""
    versions = {"all": rows}
    for version in sorted({row.version for row in rows}):
        versions[f"  {version}"] = [row for row in rows if row.version == version]
    width = max(map(len, [*versions, "version"]))
    head = "  ".join(
        f"{name:18}" for name in ("accuracy", "reals right", "fakes right", "balanced accuracy")
    )
    lines = [f"{'version':{width}}  verdicts  images  {head}".rstrip()]
    for name, own in versions.items():
        shares = "  ".join(f"{intervals.words(share):18}" for share in measure(own)).rstrip()
        lines.append(
            f"{name:{width}}  {len(own):8}  {len({row.sha256 for row in own}):6}  {shares}"
        )
    return "\n".join(lines)


def disputed(rows):
    """Number of images that users reported under both labels, in different requests."""
    reported = {(row.sha256, row.label) for row in rows}
    return len(reported) - len({sha256 for sha256, _ in reported})


REMARKS = {
    "ambiguous": "requests left out: several verdicts have their ids (clients chose them)",
    "without_verdict": "requests with feedback whose verdict is not in these logs",
    "contradicted": "requests with contradicting feedback: the last one counts",
    "disputed": "images reported as real in one request and as fake in another",
    "skipped": "lines skipped: cut off, or not JSON",
    "damaged": "feedback or verdict lines skipped: a field is missing or has a wrong value",
}


def remarks(counts, rows):
    """A line for each kind of data that was left out or is doubtful."""
    counts["disputed"] = disputed(rows)
    return [f"{counts[name]:,} {words}" for name, words in REMARKS.items() if counts[name]]


def report_feedback(args):
    """evaluate.py --feedback: print the accuracy; no model, no report. Raises UsageError."""
    given = [
        f"--{name}"
        for name in ("data_dir", "features_file", "model_path", "baseline")
        if getattr(args, name)
    ]
    if given:
        raise UsageError(
            f"--feedback cannot be used with {', '.join(given)}: logs hold the verdicts, no model"
            " runs"
        )
    counts = Counter()
    with ExitStack() as stack:
        rows = join([open_log(path, stack) for path in dict.fromkeys(args.feedback)], counts)
    if not rows:
        raise UsageError(
            f"--feedback {' '.join(args.feedback)}: no feedback line has its verdict line there"
            f" ({counts['feedback']:,} and {counts['verdict']:,}; {counts['ambiguous']:,}"
            f" ambiguous, {counts['skipped']:,} lines that are not JSON): name logs of the service"
            " that hold both"
        )
    share = 1 - counts["without_feedback"] / counts["verdict"]
    print(
        f"accuracy in production, as reported: {counts['verdict']:,} verdicts, feedback on"
        f" {share:.1%}, none on {counts['without_feedback']:,}"
    )
    print(table(rows))
    print(*remarks(counts, rows), READING, sep="\n")
    return 0
