"""evaluate.py --feedback: which lines of a log are joined, what is counted instead, and how what is joined is measured."""

import gzip
import json
import os
import re
import threading
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
from detector.evaluation.metrics import of_both, share, words

CLOCK = iter(range(10**9))


def stamp(second=None):
    second = next(CLOCK) if second is None else second
    return f"2026-03-{second // 86400 + 1:02d}T{second // 3600 % 24:02d}:{second // 60 % 60:02d}:{second % 60:02d}.000Z"


def verdict(request_id, said="real", version="v1.0.0", sha256=None):
    return {
        "time": stamp(),
        "level": "info",
        "event": "verdict",
        "request_id": request_id,
        "classification": said,
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
    """Function: events (or lines as they are) -> a log file with them."""

    def write(*events, name="log"):
        (tmp_path / name).write_text(
            "".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in events)
        )
        return tmp_path / name

    return write


@pytest.fixture
def run(capsys):
    """Function: evaluate.py --feedback in this process -> {row of the table: the words after it}, all that was printed."""
    import evaluate

    def call(*paths):
        assert evaluate.main(["--feedback", *map(str, paths)]) == 0
        out = capsys.readouterr().out
        return {
            found[1]: found[2].split()
            for found in re.finditer(r"^ *(all|v\S+) +(\d.*)$", out, re.MULTILINE)
        }, out

    return call


def mixed():
    """Twelve verdicts of two versions with feedback, one after each."""
    said = {"v1.0.0": "RR RR RF RF FF FF FF", "v2.0.0": "RR RF FR FF FF"}  # label, verdict
    events = []
    for version, pairs in said.items():
        for i, (right, answer) in enumerate(pairs.split()):
            names = {"R": "real", "F": "fake"}
            events += [
                verdict(f"{version}-{i}", names[answer], version),
                request(f"{version}-{i}"),
                label(f"{version}-{i}", names[right]),
            ]
    return events


# ---- what is measured ----


def test_accuracy_recalls_and_balanced_accuracy_overall_and_for_each_version(run, log):
    found, out = run(log(*mixed()))
    assert list(found) == ["all", "v1.0.0", "v2.0.0"]
    for name, real, fake in (
        ("all", [1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 1, 1]),
        ("v1.0.0", [1, 1, 0, 0], [1, 1, 1]),
        ("v2.0.0", [1, 0], [0, 1, 1]),
    ):
        reals, fakes = (share([bool(x) for x in right]) for right in (real, fake))
        expected = [share([bool(x) for x in real + fake]), reals, fakes, of_both(reals, fakes)]
        assert (
            found[name]
            == f"{len(real + fake)} {len(real + fake)} {' '.join(map(words, expected))}".split()
        )
    assert "not a random sample" in out and "12 verdicts, feedback on 100.0%, none on 0\n" in out
    assert len(out.splitlines()) == 5 + len(feedback.READING.splitlines())  # nothing to remark on


def test_one_class_alone_has_no_balanced_accuracy(run, log):
    found, _ = run(log(verdict("a"), label("a", "real"), verdict("b"), label("b", "real")))
    assert found["all"] == "2 2 1.00 [0.34, 1.00] 1.00 [0.34, 1.00] n/a n/a".split()


def test_copies_of_one_image_are_one_group(run, log):
    """A hundred reports of one image say as much as one."""
    events = [
        e for i in range(10) for e in (verdict(f"r{i}", sha256=f"r{i}"), label(f"r{i}", "real"))
    ]
    copies = [
        e for i in range(100) for e in (verdict(f"c{i}", sha256="r0"), label(f"c{i}", "real"))
    ]
    few, many = run(log(*events))[0]["all"], run(log(*events, *copies))[0]["all"]
    assert few[:2] == ["10", "10"] and many[:2] == ["110", "10"] and few[2:] == many[2:]


# ---- what is joined ----


def test_the_last_of_several_counts_by_its_time_and_contradictions_are_said(run, log):
    first = log(
        verdict("a"),
        verdict("b", "fake"),
        label("a", "real", 50),
        label("b", "fake", 10),
        label("b", "fake", 11),
        name="one",
    )
    second = log(
        label("a", "fake", 40), name="two"
    )  # the log of another pod: read later, said earlier
    for order in ((first, second), (second, first)):
        found, out = run(*order)
        assert (
            found["all"][2] == "1.00"
            and "1 requests with contradicting feedback: the last one counts" in out
        )
    assert run(first, log(label("a", "fake", 60), name="three"))[0]["all"][2] == "0.50"


def test_a_verdict_may_stand_after_its_feedback_and_in_another_log(run, log):
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
    found, out = run(log(*mixed(), one, {**one, **again}, label("x", "real")))
    assert (
        found["all"][0] == "12"
        and "1 requests left out: several verdicts have their ids" in out
    )


def test_a_request_id_that_returns_to_its_first_verdict_stays_left_out(run, log):
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
    found, out = run(log(*events))
    assert (
        found["all"][0] == "1"
        and "1 requests with feedback whose verdict is not in these logs" in out
    )


def test_verdicts_without_feedback_and_feedback_without_verdict_are_counted(run, log):
    found, out = run(
        log(
            *mixed(),
            *(verdict(f"q{i}") for i in range(36)),
            label("rotated", "real"),
            label("away", "fake"),
        )
    )
    assert found["all"][0] == "12" and "48 verdicts, feedback on 25.0%, none on 36\n" in out
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


def test_torn_lines_and_those_of_others_are_skipped_and_counted(run, log):
    events = mixed()
    torn = [
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
    found, out = run(log(*events[:9], *torn, *events[9:]))
    assert found == run(log(*events))[0] and "7 lines skipped: cut off, or not JSON" in out


def test_bytes_that_are_no_text_are_skipped(run, log, tmp_path):
    whole = log(*mixed())
    (tmp_path / "bad").write_bytes(
        b'{"event": "feedback", "request_id": "\xff"}\n' + whole.read_bytes() + b'{"event": "verd'
    )
    found, out = run(tmp_path / "bad")
    assert found == run(whole)[0] and "2 lines skipped" in out


@pytest.mark.parametrize(
    "prefix",
    ["[pod/detector-6d5/detector] ", "2026-03-01T00:00:00.000000000Z stderr F ", "detector-1  | "],
)
def test_what_stands_before_the_json_does_not_matter(run, log, prefix):
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
def test_lines_without_what_they_should_hold_are_skipped_and_counted(run, log, damaged):
    events = mixed()
    found, out = run(log(*events, damaged))
    assert found == run(log(*events))[0] and "1 feedback or verdict lines skipped" in out


def test_other_events_that_speak_of_feedback_are_none(run, log):
    events = mixed()
    other = {**label("v1.0.0-0", "fake"), "event": "other", "feedback": True}
    assert run(log(*events, other, {**request("x"), "route": "feedback"})) == run(log(*events))


# ---- how it is read ----


def test_from_stdin_and_from_a_pipe_it_says_the_same_as_from_a_file(run, script, log, tmp_path):
    path = log(*mixed())
    expected = run(path)[1]
    assert script("evaluate.py", "--feedback", "-", stdin=path.read_text()).stdout == expected
    os.mkfifo(tmp_path / "pipe")  # as bash's <(kubectl logs ...) is
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(path.read_bytes()))
    writer.start()
    assert run(tmp_path / "pipe")[1] == expected
    writer.join()


def test_memory_does_not_grow_with_the_verdicts_that_nobody_spoke_of(tmp_path):
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

    assert (
        peak(20000) < peak(200) + 100_000
    )  # bytes; kept, 20,000 verdicts would take some 8 million


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
    assert (
        result.returncode == 0
        and result.stderr == ""
        and [p.name for p in (tmp_path / "run").iterdir()] == ["model.joblib"]
    )


# ---- what a user can get wrong ----


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--data_dir", "data"], ["--feedback", "--data_dir"]),
        (["--features_file", "f.npz"], ["--feedback", "--features_file"]),
        (
            ["--model_path", BASELINE, "--baseline", "m.json"],
            ["--feedback", "--model_path, --baseline"],
        ),
    ],
)
def test_flags_that_need_a_model_do_not_go_with_it(log, flags, said):
    import evaluate

    with pytest.raises(UsageError) as error:
        evaluate.main(["--feedback", str(log(*mixed())), *map(str, flags)])
    assert all(word in str(error.value) for word in said)


def test_a_log_that_cannot_be_read_is_told_in_one_line(script, log, tmp_path):
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
def test_logs_in_which_nothing_is_joined_are_refused(run, log, events):
    with pytest.raises(
        UsageError, match=r"--feedback \S+log: no feedback line has its verdict line there"
    ):
        run(log(*events))


def test_a_packed_log_is_refused_and_not_misread(run, tmp_path):
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
        answers = [live.post(photos[name].read_bytes()) for name in names]
        batch = live.session.post(
            f"{live.url}/classify/batch",
            timeout=PATIENCE,
            headers={"X-Request-ID": "both"},
            files=[("image", photos[name].read_bytes()) for name in ("chelsea.png", "china.jpg")],
        )
        said = [
            (answer.headers["X-Request-ID"], answer.json()["classification"])
            for answer in answers[:2]
        ]
        said += [
            (f"both.{i}", one["classification"]) for i, one in enumerate(batch.json()["results"])
        ]
        for i, (request_id, classification) in enumerate(said):
            right = (
                classification if i else {"real": "fake", "fake": "real"}[classification]
            )  # the first one was wrong
            sent = live.session.post(
                f"{live.url}/feedback",
                json={"request_id": request_id, "label": right},
                timeout=PATIENCE,
            )
            assert sent.json() == {"status": "noted"}
    finally:
        live.stop()
    found, out = run(live.log)
    assert found["all"][:3] == ["4", "3", "0.75"] and found["v0.0.0-dev"] == found["all"]
    assert (
        "5 verdicts, feedback on 80.0%, none on 1\n" in out
        and "skipped" not in out
        and "left out" not in out
    )


def test_it_is_named_in_the_help(script):
    assert (
        "--feedback LOG" in script("evaluate.py", "--help").stdout
        and "evaluate.py --feedback -" in (ROOT / "evaluate.py").read_text()
    )
