"""What users said of verdicts, joined to the verdicts in the service's own log: how right it is in production.

    kubectl logs deploy/detector | python evaluate.py --feedback -
    python evaluate.py --feedback detector.log.1 detector.log

A `feedback` line names the request of a `verdict` line. Files are read twice, line by line, and only requests that have
feedback are kept; what can be read only once (a pipe) is copied to a temporary file first (TMPDIR says where).
"""

import json
import shutil
import sys
import tempfile
from collections import Counter, namedtuple
from contextlib import ExitStack

import numpy as np

from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.evaluation import metrics

LINE_BYTES = (
    1 << 20
)  # the service's are below 1,000; a longer one is none of its lines, and read in pieces
READING = """How to read this: feedback is what users chose to report, not a random sample of what was asked. Verdicts that look
wrong tend to be reported more often than others, and users may be wrong themselves; the intervals know of neither. A
fall from one version to the next is a reason to look. What all images get is measured on a labelled set of one's own:
evaluate.py --data_dir, and golden.py for the service as it runs."""

Joined = namedtuple("Joined", "label classification version sha256")


# ---- logs ----


def open_log(path, stack):
    """A log that can be read twice: the file, or of stdin and other pipes a copy. Raises UsageError."""
    try:
        log = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
        if log.seekable():
            return log
        copy = stack.enter_context(tempfile.TemporaryFile())
        shutil.copyfileobj(log, copy)
        return copy
    except OSError as error:
        raise UsageError(
            f"--feedback {path}: cannot be read ({error.strerror}); name logs of the service, or -"
            " for stdin"
        ) from None


def lines_of(logs):
    """Every line of the open logs, from their beginnings, in pieces of at most LINE_BYTES."""
    for log in logs:
        log.seek(0)
        yield from iter(lambda: log.readline(LINE_BYTES), b"")


def parse(line):
    """One line -> its JSON object, or None. Whatever stands before the first '{' is the prefix of `kubectl logs --prefix`,
    of a container runtime or of a log shipper."""
    start = line.find(b"{")
    try:
        return json.loads(line[start:]) if start >= 0 else None
    except (ValueError, RecursionError):  # torn, or another program's
        return None


def texts(event, *names):
    """Those fields of an event where all of them are text, else None: nothing to join or to count by."""
    values = [event.get(name) for name in names]
    return values if all(isinstance(value, str) and value for value in values) else None


# ---- the join ----


def read_feedback(logs, counts):
    """First pass -> {request id: label}. Of several for one request the last one counts, by its time: the logs of several
    pods come in no order."""
    last, said = {}, {}
    for line in lines_of(logs):
        event = parse(line) if b'"feedback"' in line else None
        if event is None or event.get("event") != "feedback":
            continue
        found = texts(event, "request_id", "label", "time")
        if found is None or found[1] not in CLASSES:
            counts["damaged"] += 1
            continue
        request_id, label, time = found
        counts["feedback"] += 1
        said.setdefault(request_id, set()).add(label)
        if request_id not in last or time >= last[request_id][0]:
            last[request_id] = time, label
    counts["contradicted"] = sum(len(labels) > 1 for labels in said.values())
    return {request_id: label for request_id, (_, label) in last.items()}


def read_verdicts(logs, labels, counts):
    """Second pass -> [Joined] of the requests in `labels`. One that several verdicts bear (clients may choose
    their ids) could mean any of them and is left out; the same line twice, from logs that overlap, is one verdict.
    """
    first, ambiguous = {}, set()
    for line in lines_of(logs):
        event = parse(line)
        if event is None:
            counts["skipped"] += bool(line.strip())
            continue
        if event.get("event") != "verdict":
            continue
        found = texts(event, "request_id", "classification", "model_version", "sha256", "time")
        if found is None or found[1] not in CLASSES:
            counts["damaged"] += 1
            continue
        request_id, *verdict, time = found
        counts["verdicts"] += 1
        if request_id not in labels:
            counts["without_feedback"] += 1
            continue
        if first.setdefault(request_id, (verdict, time)) != (verdict, time):
            ambiguous.add(request_id)
    counts["ambiguous"], counts["without_verdict"] = len(ambiguous), len(labels) - len(first)
    return [
        Joined(labels[name], *verdict)
        for name, (verdict, _) in first.items()
        if name not in ambiguous
    ]


def join(logs, counts):
    return read_verdicts(logs, read_feedback(logs, counts), counts)


# ---- what it says ----


def measure(rows):
    """[Joined] -> [accuracy, reals right, fakes right, balanced accuracy], each {'value', 'interval', 'n'}; copies of one
    image are one group."""
    labels, groups = np.array([row.label for row in rows]), np.array([row.sha256 for row in rows])
    right = labels == np.array([row.classification for row in rows])
    real, fake = (metrics.share(right[labels == name], groups[labels == name]) for name in CLASSES)
    return [metrics.share(right, groups), real, fake, metrics.of_both(real, fake)]


def table(rows):
    """A line for all verdicts, then one for each model version."""
    versions = {"all": rows}
    for version in sorted({row.version for row in rows}):
        versions[f"  {version}"] = [row for row in rows if row.version == version]
    width = max(map(len, [*versions, "version"]))
    head = "  ".join(
        f"{name:18}" for name in ("accuracy", "reals right", "fakes right", "balanced accuracy")
    )
    lines = [f"{'version':{width}}  verdicts  images  {head}".rstrip()]
    for name, own in versions.items():
        shares = "  ".join(f"{metrics.words(share):18}" for share in measure(own)).rstrip()
        lines.append(
            f"{name:{width}}  {len(own):8}  {len({row.sha256 for row in own}):6}  {shares}"
        )
    return "\n".join(lines)


def disputed(rows):
    """Number of images that users reported under both labels, in requests of their own."""
    said = {(row.sha256, row.label) for row in rows}
    return len(said) - len({sha256 for sha256, _ in said})


def remarks(counts, rows):
    """What was counted and not used, or used with doubt, a line each; nothing where there was none."""
    told = (
        (
            "ambiguous",
            "requests left out: their ids stand on more than one verdict (clients chose them)",
        ),
        ("without_verdict", "requests with feedback whose verdict is not in these logs"),
        ("contradicted", "requests with contradicting feedback: the last one counts"),
        ("disputed", "images reported as real in one request and as fake in another"),
        ("skipped", "lines skipped: torn, or not JSON"),
        (
            "damaged",
            "feedback or verdict lines skipped: a field is missing or not what it should be",
        ),
    )
    counts["disputed"] = disputed(rows)
    return [f"{counts[name]:,} {words}" for name, words in told if counts[name]]


def tell_feedback(args):
    """evaluate.py --feedback LOG...: prints, loads no model and writes no report. Raises UsageError."""
    given = [
        f"--{name}"
        for name in ("data_dir", "features_file", "model_path", "baseline")
        if getattr(args, name)
    ]
    if given:
        raise UsageError(
            f"--feedback goes without {', '.join(given)}: logs hold the verdicts already, no model"
            " is run"
        )
    counts = Counter()
    with ExitStack() as stack:
        rows = join([open_log(path, stack) for path in dict.fromkeys(args.feedback)], counts)
    if not rows:
        raise UsageError(
            f"--feedback {' '.join(args.feedback)}: no feedback line has its verdict line there"
            f" ({counts['feedback']:,} and {counts['verdicts']:,}; {counts['ambiguous']:,}"
            f" ambiguous, {counts['skipped']:,} lines that are not JSON): name logs of the service"
            " that hold both"
        )
    share = 1 - counts["without_feedback"] / counts["verdicts"]
    print(
        f"accuracy in production, as reported: {counts['verdicts']:,} verdicts, feedback on"
        f" {share:.1%}, none on {counts['without_feedback']:,}"
    )
    print(table(rows))
    print(*remarks(counts, rows), READING, sep="\n")
    return 0
