"""What operators see: one JSON object a line whatever happens, the metrics of the contract, and who serves."""

import datetime
import json
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from engines import counted, detector_of, give, serve
from made_up import BASELINE
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from detector.base.project import HERE
from detector.service import telemetry
from detector.service.telemetry import JsonFormatter, Telemetry, say_event

METRICS = {  # name: type
    "requests": "counter",
    "request_seconds": "histogram",
    "stage_seconds": "histogram",
    "queue_depth": "gauge",
    "slots": "gauge",
    "slots_busy": "gauge",
    "rejections": "counter",
    "image_errors": "counter",
    "verdicts": "counter",
    "uncertain": "counter",
    "confidence": "histogram",
    "scores": "counter",
    "reference_share": "gauge",
    "feature_distance": "gauge",
    "model_info": "gauge",
    "reloads": "counter",
    "ready": "gauge",
    "feedback": "counter",
}


# ---- lines ----


def line_of(caplog):
    """The last record as a line -> its JSON."""
    text = JsonFormatter().format(caplog.records[-1])
    assert len(text.splitlines()) == 1 and text.isascii()
    return json.loads(text)


@pytest.fixture(autouse=True)
def everything_is_logged(caplog):
    caplog.set_level("INFO")


def test_an_event_is_one_line_with_time_level_and_its_fields_in_order(caplog):
    say_event("verdict", request_id="a", confidence=0.5, key=None, uncertain=True)
    line = line_of(caplog)
    assert list(line) == ["time", "level", "event", "request_id", "confidence", "key", "uncertain"]
    assert list(line.values())[1:] == ["info", "verdict", "a", 0.5, None, True]


def test_the_time_is_utc_in_milliseconds(caplog):
    before = datetime.datetime.now(datetime.UTC)
    say_event("x")
    stamp = line_of(caplog)["time"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)
    said = datetime.datetime.fromisoformat(stamp)
    assert (
        before - datetime.timedelta(milliseconds=1) <= said <= datetime.datetime.now(datetime.UTC)
    )
    record = caplog.records[-1]
    record.created, record.msecs = 1_700_000_000.007, 7.0
    assert line_of(caplog)["time"] == "2023-11-14T22:13:20.007Z"


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_the_level_is_told_in_small_letters(caplog, level):
    say_event("x", level=level)
    assert line_of(caplog)["level"] == level and caplog.records[-1].levelno == getattr(
        logging, level.upper()
    )


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines",
        "\r\n",
        "\u2028 \u0085 \x00 \x1b[31m",
        '"quoted" {"event": "forged"}',
        "\ud800",
        "日本",
    ],
)
def test_no_text_breaks_a_line_or_forges_another(caplog, text):
    say_event("x", message=text)
    assert line_of(caplog)["message"] == text
    theirs = logging.makeLogRecord({"name": "gunicorn.other", "msg": "%s", "args": (text,)})
    assert line_of(SimpleNamespace(records=[theirs]))["message"] == text


def test_what_json_does_not_know_is_told_as_text(caplog):
    say_event("x", path=BASELINE, error=ValueError("no"))
    line = line_of(caplog)
    assert (line["path"], line["error"]) == (str(BASELINE), "no")


def test_an_exception_stays_on_its_line_with_the_traceback(caplog):
    try:
        raise RuntimeError("a\nb")
    except RuntimeError:
        say_event("bug", level="error", exc_info=True, message="RuntimeError")
    line = line_of(caplog)
    assert (
        line["event"] == "bug"
        and line["traceback"].startswith("Traceback")
        and line["traceback"].endswith("RuntimeError: a\nb")
    )
    say_event("x")
    assert "traceback" not in line_of(caplog)


def test_lines_of_others_stand_under_the_name_of_their_package(caplog):
    logging.getLogger("gunicorn.made.up").info("Listening at %s (%d)", "here", 7)
    line = line_of(caplog)
    assert list(line) == ["time", "level", "event", "message"]
    assert (line["event"], line["message"], line["level"]) == (
        "gunicorn",
        "Listening at here (7)",
        "info",
    )


def test_as_gunicorn_sets_it_up_everything_from_info_comes_once_on_stderr():
    code = """if True:
        import logging.config
        from detector.service import telemetry
        logging.config.dictConfig(telemetry.LOGGING)
        telemetry.say_event("verdict", a=1)
        logging.getLogger("gunicorn.error").info("booting")
        logging.getLogger("werkzeug").warning("a\\nb")
        logging.getLogger("other").debug("never")"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=300
    )
    found = [json.loads(line) for line in result.stderr.splitlines()]
    assert [line["event"] for line in found] == [
        "verdict",
        "gunicorn",
        "werkzeug",
    ] and result.stdout == ""


# ---- metrics ----


def series(telemetry, name):
    """[labels] of a metric."""
    text = generate_latest(telemetry.registry).decode()
    return [
        sample.labels
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"detector_{name}"
    ]


def test_there_are_the_metrics_of_the_contract_and_no_others():
    text = generate_latest(Telemetry().registry).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    ours = {
        name.removeprefix("detector_"): family.type
        for name, family in families.items()
        if name.startswith("detector_")
    }
    assert ours == METRICS
    assert all(family.documentation for family in families.values())
    assert {
        "process_resident_memory_bytes",
        "process_cpu_seconds",
        "python_info",
        "python_gc_collections",
    } <= set(families)
    assert "_created" not in text


@pytest.mark.parametrize("route", ["/classify", "/classify/batch"])
@pytest.mark.parametrize("status", ["200", "500", "503"])
def test_what_alerts_compare_is_there_before_it_first_happens(route, status):
    assert (
        Telemetry().registry.get_sample_value(
            "detector_requests_total", {"route": route, "status": status}
        )
        == 0
    )


def test_seconds_are_counted_in_buckets_from_5_ms_to_30_s():
    telemetry = Telemetry()
    telemetry.request_seconds.labels("/classify", 200).observe(0.02)
    for name, labels in (
        ("request_seconds", {"route": "/classify", "status": "200"}),
        ("stage_seconds", {"stage": "decode"}),
    ):
        telemetry.stage_seconds.labels("decode").observe(0.02)
        bounds = [s["le"] for s in series(telemetry, f"{name}_bucket") if {**s, **labels} == s]
        assert [float(bound) for bound in bounds] == [
            0.005,
            0.01,
            0.025,
            0.05,
            0.1,
            0.25,
            0.5,
            1,
            2.5,
            5,
            10,
            30,
            float("inf"),
        ]
        assert (
            counted(telemetry, f"{name}_bucket", le="0.01", **labels)
            == 0
            < counted(telemetry, f"{name}_bucket", le="0.025", **labels)
        )


def test_the_slots_are_read_when_they_are_asked_for():
    telemetry, slots = Telemetry(), SimpleNamespace(count=3, busy=2, waiting=7)
    telemetry.watch(slots)
    assert [counted(telemetry, name) for name in ("slots", "slots_busy", "queue_depth")] == [
        3,
        2,
        7,
    ]
    slots.busy, slots.waiting = 0, 1
    assert [counted(telemetry, name) for name in ("slots", "slots_busy", "queue_depth")] == [
        3,
        0,
        1,
    ]


def test_ready_is_0_until_a_model_serves():
    telemetry = Telemetry()
    assert telemetry.registry.get_sample_value("detector_ready") == 0
    serve(telemetry, detector_of())
    assert telemetry.registry.get_sample_value("detector_ready") == 1


def test_who_serves_is_told_in_labels():
    telemetry, detector = Telemetry(), detector_of("v1")
    serve(telemetry, detector)
    (labels,) = series(telemetry, "model_info")
    assert labels == {
        "version": "v1",
        "commit": detector.model["versions"]["code"],
        "sha256": detector.model["sha256"],
        "encoder": "small",
        "identity": "ab",
        "precision": "float32",
        "demonstration": "true",
    }
    assert counted(telemetry, "model_info", **labels) == 1


def test_verdicts_are_counted_by_version_and_answer():
    telemetry = Telemetry()
    detector = serve(telemetry, detector_of())
    for classification, uncertain in (("real", False), ("fake", True), ("fake", False)):
        give(telemetry, detector, classification=classification, uncertain=uncertain)
    assert [
        counted(telemetry, "verdicts_total", model_version="v1", classification=name)
        for name in ("real", "fake")
    ] == [1, 2]
    assert counted(telemetry, "uncertain_total", model_version="v1") == 1
    assert counted(telemetry, "confidence_count") == 3 and counted(
        telemetry, "confidence_sum"
    ) == pytest.approx(2.1)
    assert (
        sum(counted(telemetry, "scores_total", model_version="v1", bin=i) for i in range(10)) == 3
    )


def test_all_ten_bins_are_there_before_the_first_verdict():
    telemetry = Telemetry()
    serve(telemetry, detector_of())
    for name in ("scores_total", "reference_share"):
        assert sorted(s["bin"] for s in series(telemetry, name)) == list("0123456789")
    assert (
        telemetry.registry.get_sample_value("detector_feature_distance", {"model_version": "v1"})
        == 0
    )


@pytest.mark.parametrize(
    "name, label, values",
    [
        ("stage_seconds_count", "stage", ["wait", "turn", "read", "decode", "encode", "classify"]),
        ("reloads_total", "result", ["ok", "failed"]),
        (
            "rejections_total",
            "reason",
            ["queue_full", "queue_timeout", "not_ready", "unauthorized", "slow_body"],
        ),
    ],
)
def test_what_alarms_look_at_is_there_from_the_first_scrape(name, label, values):
    telemetry = Telemetry()
    assert [
        telemetry.registry.get_sample_value(f"detector_{name}", {label: value}) for value in values
    ] == [0] * len(values)
    assert sorted(found[label] for found in series(telemetry, name)) == sorted(values)


def test_when_another_version_serves_nothing_of_the_old_one_stands_there_as_if_it_did():
    telemetry = Telemetry()
    old = serve(telemetry, detector_of("v1"))
    give(telemetry, old, row=(old.model["center"] + 5 * old.model["scale"]).astype("f4"))
    assert counted(telemetry, "feature_distance", model_version="v1") > 1
    serve(telemetry, detector_of("v2"))
    assert {s["version"] for s in series(telemetry, "model_info")} == {"v2"}
    for name in ("reference_share", "feature_distance"):
        assert {s["model_version"] for s in series(telemetry, name)} == {"v2"}
    assert counted(telemetry, "feature_distance", model_version="v2") == 0  # measured anew
    assert (
        counted(telemetry, "verdicts_total", model_version="v1", classification="real") == 1
    )  # what was counted stays


def test_a_verdict_of_the_model_before_is_counted_as_its_own_and_moves_no_measure_of_the_new_one():
    telemetry = Telemetry()
    old = serve(telemetry, detector_of("v1"))
    new = serve(telemetry, detector_of("v2"))
    give(telemetry, old, classification="fake")
    assert counted(telemetry, "verdicts_total", model_version="v1", classification="fake") == 1
    assert (
        sum(
            counted(telemetry, "scores_total", model_version=name, bin=i)
            for name in ("v1", "v2")
            for i in range(10)
        )
        == 0
    )
    assert telemetry.drift.seen == 0
    give(telemetry, new)
    assert telemetry.drift.seen == 1


def test_two_telemetries_share_nothing():
    one, other = Telemetry(), Telemetry()
    one.reloads.labels("ok").inc()
    assert counted(other, "reloads_total", result="ok") == 0


def test_the_comment_about_the_window_says_what_it_does():
    (words,) = re.findall(
        r"^WINDOW = \d+ +# .*half of its weight lies on the last (\d+)",
        (HERE / "detector" / "service" / "telemetry.py").read_text(),
        re.MULTILINE,
    )
    weights = [
        (1 / telemetry.WINDOW) * (1 - 1 / telemetry.WINDOW) ** age
        for age in range(20 * telemetry.WINDOW)
    ]
    assert sum(weights[: int(words)]) == pytest.approx(0.5, abs=0.002)
