"""evaluate.py --feedback: the lines of a log that are joined, counted and measured."""

import gzip
import json
import os
import re
import threading
import time
import tracemalloc
from collections import Counter

import pytest
from commands import ROOT, assert_one_line_error
from live import Live
from made_up import BASELINE
from patience import PATIENCE

from detector.base import files
from detector.base.errors import UsageError
from detector.base.files import sha256
from detector.evaluation import feedback
from detector.evaluation.intervals import share, words
from detector.evaluation.metrics import of_both

CLOCK = iter(range(10**9))


def stamp(second=None):
    second = next(CLOCK) if second is None else second
    return time.strftime("2026-03-%dT%H:%M:%S.000Z", time.gmtime(second))


def verdict(request_id, classification="real", version="v1.0.0", sha256=None):
    return {
        "time": stamp(),
        "level": "info",
        "event": "verdict",
        "request_id": request_id,
        "classification": classification,
        "confidence": 0.9,
        "sha256": sha256 or files.sha256(request_id.encode()),
        "model_version": version,
    }


def label(request_id, label, second=None):
    return {
        "time": stamp(second),
        "level": "info",
        "event": "feedback",
        "request_id": request_id,
        "label": label,
        "key": "team",
    }


def request(request_id):
    return {
        "time": stamp(),
        "level": "info",
        "event": "request",
        "request_id": request_id,
        "route": "/classify",
        "status": 200,
    }


@pytest.fixture
def log(tmp_path):
    """Function: events or raw lines -> a log file of them."""

    def write(*events, name="log"):
        lines = (e if isinstance(e, str) else json.dumps(e) for e in events)
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        return tmp_path / name

    return write


@pytest.fixture
def run(capsys):
    """Function: evaluate.py --feedback in this process -> ({row of the table: words}, stdout)."""
    import evaluate

    def call(*paths):
        assert evaluate.main(["--feedback", *map(str, paths)]) == 0
        out = capsys.readouterr().out
        rows = re.findall(r"^ *(all|v\S+) +(\d.*)$", out, re.MULTILINE)
        return {name: text.split() for name, text in rows}, out

    return call


def mixed():
    """Twelve verdicts of two versions, each followed by its feedback."""
    pairs = {"v1.0.0": "RR RR RF RF FF FF FF", "v2.0.0": "RR RF FR FF FF"}  # label, verdict
    events, names = [], {"R": "real", "F": "fake"}
    for version, text in pairs.items():
        for i, (right, classified) in enumerate(text.split()):
            request_id = f"{version}-{i}"
            events.append(verdict(request_id, names[classified], version))
            events += [request(request_id), label(request_id, names[right])]
    return events


# ---- metrics ----


def test_accuracies_are_measured_overall_and_for_each_version(run, log):
    rows, out = run(log(*mixed()))
    assert list(rows) == ["all", "v1.0.0", "v2.0.0"]
    for name, real, fake in (
        ("all", [1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 1, 1]),
        ("v1.0.0", [1, 1, 0, 0], [1, 1, 1]),
        ("v2.0.0", [1, 0], [0, 1, 1]),
    ):
        reals, fakes = (share([bool(x) for x in right]) for right in (real, fake))
        expected = [share([bool(x) for x in real + fake]), reals, fakes, of_both(reals, fakes)]
        n = len(real + fake)
        assert rows[name] == f"{n} {n} {' '.join(map(words, expected))}".split()
    assert "not a random sample" in out and "12 verdicts, feedback on 100.0%, none on 0\n" in out
    assert len(out.splitlines()) == 5 + len(feedback.READING.splitlines())  # no remarks


def test_one_class_alone_has_no_balanced_accuracy(run, log):
    rows, _ = run(log(verdict("a"), label("a", "real"), verdict("b"), label("b", "real")))
    assert rows["all"] == "2 2 1.00 [0.34, 1.00] 1.00 [0.34, 1.00] n/a n/a".split()


def test_copies_of_one_image_are_one_group(run, log):
    """A hundred reports of one image count as one."""
    events = [
        e for i in range(10) for e in (verdict(f"r{i}", sha256=f"r{i}"), label(f"r{i}", "real"))
    ]
    copies = [
        e for i in range(100) for e in (verdict(f"c{i}", sha256="r0"), label(f"c{i}", "real"))
    ]
    few, many = run(log(*events))[0]["all"], run(log(*events, *copies))[0]["all"]
    assert few[:2] == ["10", "10"] and many[:2] == ["110", "10"] and few[2:] == many[2:]


# ---- the join ----


def test_the_latest_feedback_counts_and_contradictions_are_reported(run, log):
    first = log(
        verdict("a"),
        verdict("b", "fake"),
        label("a", "real", 50),
        label("b", "fake", 10),
        label("b", "fake", 11),
        name="one",
    )
    second = log(label("a", "fake", 40), name="two")  # the log of another pod: earlier feedback
    for order in ((first, second), (second, first)):
        rows, out = run(*order)
        assert rows["all"][2] == "1.00"
        assert "1 requests with contradicting feedback: the last one counts" in out
    assert run(first, log(label("a", "fake", 60), name="three"))[0]["all"][2] == "0.50"


def test_a_verdict_may_follow_its_feedback_or_be_in_another_log(run, log):
    first, second = (
        log(label("a", "real"), verdict("b", "fake"), name="1"),
        log(label("b", "real"), verdict("a"), name="2"),
    )
    assert run(first, second)[0]["all"][2] == "0.50"


@pytest.mark.parametrize(
    "again",
    [
        {"classification": "fake"},
        {"model_version": "v2.0.0"},
        {"sha256": "other"},
        {"time": stamp(99)},
    ],
    ids=["verdict", "version", "image", "time"],
)
def test_a_request_id_of_several_verdicts_is_left_out_and_counted(run, log, again):
    one = verdict("x")
    rows, out = run(log(*mixed(), one, {**one, **again}, label("x", "real")))
    assert rows["all"][0] == "12"
    assert "1 requests left out: several verdicts have their ids" in out


def test_an_ambiguous_request_id_stays_left_out_when_its_first_verdict_returns(run, log):
    one = verdict("x")
    assert (
        run(log(*mixed(), one, verdict("x", "fake"), one, label("x", "real")))[0]["all"][0] == "12"
    )


def test_logs_that_overlap_count_their_lines_once(run, log):
    events = mixed()
    whole, part = log(*events, name="whole"), log(*events[10:], name="part")
    assert run(whole, part)[0] == run(whole)[0] and run(whole, whole) == run(whole)
    assert "left out" not in run(whole, part)[1]


def test_the_images_of_a_batch_are_joined_by_their_own_ids(run, log):
    events = [verdict("b.0"), verdict("b.1", "fake"), label("b.1", "fake"), label("b", "real")]
    rows, out = run(log(*events))
    assert (
        rows["all"][0] == "1"
        and "1 requests with feedback whose verdict is not in these logs" in out
    )


def test_verdicts_without_feedback_and_feedback_without_verdict_are_counted(run, log):
    rows, out = run(
        log(
            *mixed(),
            *(verdict(f"q{i}") for i in range(36)),
            label("rotated", "real"),
            label("away", "fake"),
        )
    )
    assert rows["all"][0] == "12" and "48 verdicts, feedback on 25.0%, none on 36\n" in out
    assert "2 requests with feedback whose verdict is not in these logs" in out


def test_an_image_under_both_labels_is_counted(run, log):
    events = [
        verdict("a", sha256="s"),
        verdict("b", sha256="s"),
        label("a", "real"),
        label("b", "fake"),
    ]
    assert "1 images reported as real in one request and as fake in another" in run(log(*events))[1]
    assert "reported as real" not in run(log(*events[:3]))[1]


def test_cut_off_lines_and_lines_of_others_are_skipped_and_counted(run, log):
    events = mixed()
    others = [
        json.dumps(verdict("t"))[:60],
        "Traceback (most recent call last):",
        "",
        "   ",
        "[1, 2]",
        "{" * 100_000,
        '{"a":' * 100_000,
        '{"event": "verdict"} and more',
        "\x00\x01",
    ]
    rows, out = run(log(*events[:9], *others, *events[9:]))
    assert rows == run(log(*events))[0] and "7 lines skipped: cut off, or not JSON" in out


def test_bytes_that_are_not_utf_8_are_skipped(run, log, tmp_path):
    whole = log(*mixed())
    (tmp_path / "bad").write_bytes(
        b'{"event": "feedback", "request_id": "\xff"}\n' + whole.read_bytes() + b'{"event": "verd'
    )
    rows, out = run(tmp_path / "bad")
    assert rows == run(whole)[0] and "2 lines skipped" in out


@pytest.mark.parametrize(
    "prefix",
    ["[pod/detector-6d5/detector] ", "2026-03-01T00:00:00.000000000Z stderr F ", "detector-1  | "],
)
def test_a_prefix_before_the_json_does_not_matter(run, log, prefix):
    events = mixed()
    assert run(log(*(prefix + json.dumps(e) for e in events)))[0] == run(log(*events))[0]


@pytest.mark.parametrize(
    "damaged",
    [
        {"event": "feedback", "request_id": "v1.0.0-0"},
        {"event": "verdict"},
        *(
            {**label("v1.0.0-0", "fake"), **change}
            for change in (
                {"label": "cat"},
                {"label": None},
                {"label": ["fake"]},
                {"request_id": 3},
                {"time": 5},
            )
        ),
        *(
            {**verdict("v1.0.0-0"), **change}
            for change in (
                {"classification": "cat"},
                {"request_id": {}},
                {"model_version": None},
                {"sha256": 0},
            )
        ),
    ],
)
def test_lines_with_missing_or_wrong_fields_are_skipped_and_counted(run, log, damaged):
    events = mixed()
    rows, out = run(log(*events, damaged))
    assert rows == run(log(*events))[0] and "1 feedback or verdict lines skipped" in out


def test_other_events_that_mention_feedback_are_ignored(run, log):
    events = mixed()
    other = {**label("v1.0.0-0", "fake"), "event": "other", "feedback": True}
    assert run(log(*events, other, {**request("x"), "route": "feedback"})) == run(log(*events))


# ---- reading ----


def test_stdin_and_a_pipe_give_the_same_as_a_file(run, script, log, tmp_path):
    path = log(*mixed())
    expected = run(path)[1]
    assert script("evaluate.py", "--feedback", "-", stdin=path.read_text()).stdout == expected
    os.mkfifo(tmp_path / "pipe")  # as bash's <(kubectl logs ...) is
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(path.read_bytes()))
    writer.start()
    assert run(tmp_path / "pipe")[1] == expected
    writer.join()


def test_memory_does_not_grow_with_verdicts_without_feedback(tmp_path):
    def peak(n):
        with open(tmp_path / "log", "w") as file:
            file.write("".join(json.dumps(e) + "\n" for e in mixed()))
            for i in range(n):
                file.write(json.dumps(verdict(f"q{i}")) + "\n")
        tracemalloc.start()
        with open(tmp_path / "log", "rb") as file:
            counts = Counter()
            assert len(feedback.join([file], counts)) == 12 and counts["without_feedback"] == n
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    # In bytes. 20,000 verdicts would take some 8 million.
    assert peak(20000) < peak(200) + 100_000


def test_an_endless_line_is_read_in_pieces(tmp_path):
    line = b"x" * (3 * feedback.LINE_BYTES) + b"\n"
    (tmp_path / "log").write_bytes(line + json.dumps(verdict("a")).encode())
    with open(tmp_path / "log", "rb") as file:
        pieces = list(feedback.lines_of([file]))
    assert b"".join(pieces[:-1]) == line and max(map(len, pieces)) == feedback.LINE_BYTES


def test_no_model_is_loaded_and_no_report_written(script, log, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.joblib").write_text("no model")
    result = script("evaluate.py", "--feedback", log(*mixed()), cwd=tmp_path / "run")
    assert result.returncode == 0 and result.stderr == ""
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model.joblib"]


# ---- usage errors ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data_dir", "data"], ["--feedback", "--data_dir"]),
        (["--features_file", "f.npz"], ["--feedback", "--features_file"]),
        (
            ["--model_path", BASELINE, "--baseline", "m.json"],
            ["--feedback", "--model_path, --baseline"],
        ),
    ],
)
def test_flags_of_a_model_are_refused(log, flags, words):
    import evaluate

    with pytest.raises(UsageError) as error:
        evaluate.main(["--feedback", str(log(*mixed())), *map(str, flags)])
    assert all(word in str(error.value) for word in words)


def test_an_unreadable_log_is_a_one_line_error(script, log, tmp_path):
    good = log(*mixed())
    assert_one_line_error(
        script("evaluate.py", "--feedback", good, "gone.log"), "--feedback gone.log", "No such file"
    )
    assert_one_line_error(
        script("evaluate.py", "--feedback", good, tmp_path), f"--feedback {tmp_path}", "directory"
    )


@pytest.mark.parametrize(
    "events",
    [
        [],
        [verdict("a")],
        [label("a", "real")],
        [verdict("a"), label("b", "real")],
        [verdict("a"), verdict("a"), label("a", "real")],
        ["no log at all"],
    ],
)
def test_logs_without_a_joined_line_are_refused(run, log, events):
    with pytest.raises(
        UsageError, match=r"--feedback \S+log: no feedback line has its verdict line there"
    ):
        run(log(*events))


def test_a_compressed_log_is_refused_and_not_misread(run, tmp_path):
    (tmp_path / "log.gz").write_bytes(
        gzip.compress("".join(json.dumps(e) + "\n" for e in mixed()).encode())
    )
    with pytest.raises(UsageError, match="not JSON"):
        run(tmp_path / "log.gz")


# ---- the service's own log ----


def test_the_log_of_the_service_is_understood(run, photos, tmp_path):
    (tmp_path / "keys").write_text(f"team {sha256(b'token')}\n")
    live = Live(tmp_path, API_KEYS_FILE=str(tmp_path / "keys"))
    try:
        live.session.headers["Authorization"] = "Bearer token"
        names = ("china.jpg", "coffee.png", "rocket.jpg")
        single = [live.post(photos[name].read_bytes()) for name in names]
        batch = live.session.post(
            f"{live.url}/classify/batch",
            timeout=PATIENCE,
            headers={"X-Request-ID": "both"},
            files=[("image", photos[name].read_bytes()) for name in ("chelsea.png", "china.jpg")],
        )
        verdicts = {r.headers["X-Request-ID"]: r.json()["classification"] for r in single[:2]}
        for i, result in enumerate(batch.json()["results"]):
            verdicts[f"both.{i}"] = result["classification"]
        wrong = single[0].headers["X-Request-ID"]
        for request_id, classification in verdicts.items():
            other = {"real": "fake", "fake": "real"}[classification]
            feedback = {"request_id": request_id, "label": classification}
            feedback |= {"label": other} if request_id == wrong else {}
            sent = live.session.post(f"{live.url}/feedback", json=feedback, timeout=PATIENCE)
            assert sent.json() == {"status": "noted"}
    finally:
        live.stop()
    rows, out = run(live.log)
    assert rows["all"][:3] == ["4", "3", "0.75"] and rows["v0.0.0-dev"] == rows["all"]
    assert "5 verdicts, feedback on 80.0%, none on 1\n" in out
    assert "skipped" not in out and "left out" not in out


def test_the_help_and_the_docstring_name_it(script):
    assert "--feedback LOG" in script("evaluate.py", "--help").stdout
    assert "evaluate.py --feedback -" in (ROOT / "evaluate.py").read_text()
