"""What operators see: a JSON object in each log line, the documented metrics, and the model."""

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
from detector.service.telemetry import SECONDS, WINDOW, JsonFormatter, Telemetry, say_event

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
    "decisions": "counter",
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
    """The last record, formatted as a line -> its JSON."""
    text = JsonFormatter().format(caplog.records[-1])
    assert len(text.splitlines()) == 1 and text.isascii()
    return json.loads(text)


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
    logged = datetime.datetime.fromisoformat(stamp)
    after = datetime.datetime.now(datetime.UTC)
    assert before - datetime.timedelta(milliseconds=1) <= logged <= after
    record = caplog.records[-1]
    record.created, record.msecs = 1_700_000_000.007, 7.0
    assert line_of(caplog)["time"] == "2023-11-14T22:13:20.007Z"


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_the_level_is_in_lower_case(caplog, level):
    say_event("x", level=level)
    assert line_of(caplog)["level"] == level
    assert caplog.records[-1].levelno == getattr(logging, level.upper())


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


def test_values_that_json_does_not_know_become_text(caplog):
    say_event("x", path=BASELINE, error=ValueError("no"))
    line = line_of(caplog)
    assert (line["path"], line["error"]) == (str(BASELINE), "no")


def test_an_exception_stays_on_its_line_with_the_traceback(caplog):
    try:
        raise RuntimeError("a\nb")
    except RuntimeError:
        say_event("bug", level="error", exc_info=True, message="RuntimeError")
    line = line_of(caplog)
    assert line["event"] == "bug" and line["traceback"].startswith("Traceback")
    assert line["traceback"].endswith("RuntimeError: a\nb")
    say_event("x")
    assert "traceback" not in line_of(caplog)


def test_lines_of_other_packages_have_the_package_as_event(caplog):
    logging.getLogger("gunicorn.made.up").info("Listening at %s (%d)", "here", 7)
    line = line_of(caplog)
    assert list(line) == ["time", "level", "event", "message"]
    assert (line["event"], line["level"]) == ("gunicorn", "info")
    assert line["message"] == "Listening at here (7)"


def test_with_gunicorns_set_up_each_line_from_info_is_once_on_stderr():
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
    events = [json.loads(line)["event"] for line in result.stderr.splitlines()]
    assert events == ["verdict", "gunicorn", "werkzeug"] and result.stdout == ""


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


def scores(telemetry, version):
    """Verdicts of a version in all bins."""
    return sum(counted(telemetry, "scores_total", model_version=version, bin=i) for i in range(10))


def test_the_metrics_are_the_documented_ones():
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
def test_requests_in_alerts_exist_from_the_first_scrape(route, status):
    labels = {"route": route, "status": status}
    assert Telemetry().registry.get_sample_value("detector_requests_total", labels) == 0


@pytest.mark.parametrize(
    "name, labels",
    [
        ("request_seconds", {"route": "/classify", "status": "200"}),
        ("stage_seconds", {"stage": "decode"}),
    ],
)
def test_seconds_are_counted_in_buckets_from_5_ms_to_30_s(name, labels):
    telemetry = Telemetry()
    getattr(telemetry, name).labels(**labels).observe(0.02)
    bounds = [s["le"] for s in series(telemetry, f"{name}_bucket") if {**s, **labels} == s]
    assert list(map(float, bounds)) == [*SECONDS, float("inf")]
    assert (SECONDS[0], SECONDS[-1]) == (0.005, 30)
    assert counted(telemetry, f"{name}_bucket", le="0.01", **labels) == 0
    assert counted(telemetry, f"{name}_bucket", le="0.025", **labels) == 1


def test_the_slots_are_read_at_each_scrape():
    telemetry, slots = Telemetry(), SimpleNamespace(count=3, busy=2, waiting=7)
    telemetry.watch(slots)
    names = ("slots", "slots_busy", "queue_depth")
    assert [counted(telemetry, name) for name in names] == [3, 2, 7]
    slots.busy, slots.waiting = 0, 1
    assert [counted(telemetry, name) for name in names] == [3, 0, 1]


def test_ready_is_0_until_a_model_serves():
    telemetry = Telemetry()
    assert telemetry.registry.get_sample_value("detector_ready") == 0
    serve(telemetry, detector_of())
    assert telemetry.registry.get_sample_value("detector_ready") == 1


def test_model_info_names_the_model_in_its_labels():
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


def test_verdicts_are_counted_by_version_and_class():
    telemetry = Telemetry()
    detector = serve(telemetry, detector_of())
    for classification, uncertain in (("real", False), ("fake", True), ("fake", False)):
        give(telemetry, detector, classification=classification, uncertain=uncertain)
    for name, count in (("real", 1), ("fake", 2)):
        labels = {"model_version": "v1", "classification": name}
        assert counted(telemetry, "verdicts_total", **labels) == count
    assert counted(telemetry, "uncertain_total", model_version="v1") == 1
    assert counted(telemetry, "confidence_count") == 3
    assert counted(telemetry, "confidence_sum") == pytest.approx(2.1)
    assert scores(telemetry, "v1") == 3


def test_decisions_are_counted_by_version():
    telemetry = Telemetry()
    detector = serve(telemetry, detector_of())
    for decision in ("review", "reject", "review"):
        give(telemetry, detector, decision=decision)
    for decision, count in (("review", 2), ("reject", 1)):
        labels = {"model_version": "v1", "decision": decision}
        assert counted(telemetry, "decisions_total", **labels) == count


def test_all_ten_bins_exist_before_the_first_verdict():
    telemetry = Telemetry()
    serve(telemetry, detector_of())
    for name in ("scores_total", "reference_share"):
        assert sorted(s["bin"] for s in series(telemetry, name)) == list("0123456789")
    labels = {"model_version": "v1"}
    assert telemetry.registry.get_sample_value("detector_feature_distance", labels) == 0


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
def test_series_in_alerts_exist_from_the_first_scrape(name, label, values):
    telemetry = Telemetry()
    for value in values:
        assert telemetry.registry.get_sample_value(f"detector_{name}", {label: value}) == 0
    assert sorted(labels[label] for labels in series(telemetry, name)) == sorted(values)


def test_series_of_an_old_version_end_when_another_version_serves():
    telemetry = Telemetry()
    old = serve(telemetry, detector_of("v1"))
    give(telemetry, old, row=(old.model["center"] + 5 * old.model["scale"]).astype("f4"))
    assert counted(telemetry, "feature_distance", model_version="v1") > 1
    serve(telemetry, detector_of("v2"))
    assert {s["version"] for s in series(telemetry, "model_info")} == {"v2"}
    for name in ("reference_share", "feature_distance"):
        assert {s["model_version"] for s in series(telemetry, name)} == {"v2"}
    assert (
        counted(telemetry, "feature_distance", model_version="v2") == 0
    )  # the measurement restarts
    # Counters of the old version stay.
    assert counted(telemetry, "verdicts_total", model_version="v1", classification="real") == 1


def test_a_late_verdict_of_the_old_model_does_not_move_the_drift_of_the_new_model():
    telemetry = Telemetry()
    old = serve(telemetry, detector_of("v1"))
    new = serve(telemetry, detector_of("v2"))
    give(telemetry, old, classification="fake")
    assert counted(telemetry, "verdicts_total", model_version="v1", classification="fake") == 1
    assert scores(telemetry, "v1") == scores(telemetry, "v2") == 0
    assert telemetry.drift.seen == 0
    give(telemetry, new)
    assert telemetry.drift.seen == 1


def test_the_comment_on_the_window_is_correct():
    (words,) = re.findall(
        r"^WINDOW = \d+ +# .*half of its weight lies on the last (\d+)",
        (HERE / "detector" / "service" / "telemetry.py").read_text(),
        re.MULTILINE,
    )
    weights = [(1 / WINDOW) * (1 - 1 / WINDOW) ** age for age in range(20 * WINDOW)]
    assert sum(weights[: int(words)]) == pytest.approx(0.5, abs=0.002)
