"""The other routes and features: batches, details, request ids, /model, metrics and log lines."""

import io
import json
import re
import time

import numpy as np
import pytest
from engines import (
    client_on,
    contrary,
    counted,
    engine_of,
    held,
    lines,
    model_file,
    picture,
    reload,
    upload,
    versions,
)
from live import assert_error
from made_up import BASELINE, baseline_for, other_encoder
from PIL import Image, PngImagePlugin
from prometheus_client.parser import text_string_to_metric_families

from detector.base.errors import UsageError
from detector.base.files import sha256
from detector.evaluation import intervals, metrics
from detector.model.file import load_model
from detector.service.settings import read_settings
from detector.verdict import Detector

pytestmark = pytest.mark.usefixtures("compiled_once")

VERDICT, BATCH = "/classify", "/classify/batch"
DETAILS = {
    "p_fake": float,
    "threshold": float,
    "uncertain": bool,
    "reason": (str, type(None)),
    "model_version": str,
    "notice": str,
    "provenance": dict,
}
TIMINGS = ["wait_s", "read_s", "decode_s", "encode_s", "classify_s"]


# ---- batches ----


def test_a_batch_gets_the_verdicts_of_single_images_in_order(client, photos):
    images = [path.read_bytes() for path in photos.values()]
    response = upload(client, BATCH, *images)
    assert response.status_code == 200 and list(response.json) == ["results"]
    alone = [upload(client, VERDICT, data).json for data in images]
    for result, verdict in zip(response.json["results"], alone, strict=True):
        assert list(result) == ["classification", "confidence"]
        assert result["classification"] == verdict["classification"]
        assert result["confidence"] == pytest.approx(verdict["confidence"], abs=1.01e-4)
    # More images than in a forward pass. Verdicts must differ, or a mix-up would pass.
    assert len({verdict["confidence"] for verdict in alone}) == len(images) > 4


def test_a_batch_without_a_good_image_is_200(client):
    response = upload(client, BATCH, b"hello", b"")
    assert response.status_code == 200
    assert [list(result) for result in response.json["results"]] == [["error"]] * 2


@pytest.fixture(scope="module")
def of_three(compiled_once):
    return client_on(BATCH_LIMIT="3")


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_up_to_the_limit_is_accepted(of_three, count):
    assert len(upload(of_three, BATCH, *map(picture, range(count))).json["results"]) == count


@pytest.mark.parametrize("count", [4, 5, 40])
def test_a_batch_above_the_limit_is_413(of_three, count):
    assert_error(upload(of_three, BATCH, *map(picture, range(count))), 413, "3 ", "image")


def test_the_limit_is_16_by_default(client):
    assert len(upload(client, BATCH, *[b"x"] * 16).json["results"]) == 16
    assert_error(upload(client, BATCH, *[b"x"] * 17), 413, "16")


# ---- details ----


@pytest.mark.parametrize("path, more", [(VERDICT, ["timings"]), (BATCH, [])])
def test_details_follow_the_documented_keys(client, path, more):
    body = upload(client, f"{path}?details=1", picture()).json
    verdict = body if path == VERDICT else body["results"][0]
    plain = upload(client, VERDICT, picture()).json
    assert list(verdict) == ["classification", "confidence", *DETAILS, *more]
    assert {name: verdict[name] for name in plain} == plain
    for name, kind in DETAILS.items():
        assert isinstance(verdict[name], kind)
    assert (verdict["model_version"], verdict["threshold"]) == ("v0.0.0-dev", 0.5)
    assert "demonstration" in verdict["notice"]
    p_fake = verdict["p_fake"]
    assert verdict["confidence"] == pytest.approx(max(p_fake, 1 - p_fake), abs=1.01e-4)


def test_the_timings_are_seconds_of_each_stage(client):
    data, started = picture(0, 600, 400), time.perf_counter()
    timings = upload(client, f"{VERDICT}?details=1", data).json["timings"]
    whole = time.perf_counter() - started
    assert list(timings) == TIMINGS
    assert all(isinstance(value, float) and value >= 0 for value in timings.values())
    assert sum(timings.values()) <= whole + 5e-4  # each is rounded to four places
    assert timings["encode_s"] > 0 and timings["decode_s"] > 0


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?details=0",
        "?details=false",
        "?details=No",
        "?_=1",
        "?verbose=1",
        "?details=0&details=no",
    ],
)
def test_without_details_the_json_has_the_two_documented_keys(client, query):
    keys = list(upload(client, f"{VERDICT}{query}", picture()).json)
    assert keys == ["classification", "confidence"]


@pytest.mark.parametrize("value", ["1", "true", "yes", "True", "YES"])
def test_details_has_several_words_for_yes(client, value):
    assert "p_fake" in upload(client, f"{VERDICT}?details={value}", picture()).json


@pytest.mark.parametrize("path", [VERDICT, BATCH])
@pytest.mark.parametrize(
    "query, words",
    [
        ("details=maybe", ["details='maybe'", "details=1"]),
        ("details=", ["details=''", "details=1"]),
        ("details", ["details=''"]),
        ("details=2", ["'2'"]),
        ("details=1&details=0", ["'1', '0'"]),
        ("details=%ff%0a", ["details='"]),
        ("details=" + "a" * 5000, ["a" * 20]),
        ("detail=1", ["'detail'", "did you mean details=1?"]),
        ("Details=1", ["'Details'"]),
        ("details[]=1", ["'details[]'"]),
    ],
)
def test_other_values_and_typing_errors_of_details_are_400(client, path, query, words):
    response = upload(client, f"{path}?{query}", picture())
    assert_error(response, 400, *words)
    assert len(response.text) < 200


@pytest.mark.parametrize("band, uncertain", [([0.0, 1.0], True), ([0.5, 0.5], False)])
def test_only_an_uncertain_verdict_has_a_reason(tmp_path, band, uncertain):
    client = client_on(MODEL_PATH=str(model_file(tmp_path / "m.joblib", band=np.array(band))))
    verdict = upload(client, f"{VERDICT}?details=1", picture()).json
    assert verdict["uncertain"] is uncertain
    reason = verdict["reason"]
    assert "between 0.00 and 1.00" in reason if uncertain else reason is None


@pytest.mark.parametrize(
    "review, decision", [((0.99, 1), "pass"), ((0, 1), "review"), ((0, 0), "reject"), (None, None)]
)
def test_two_thresholds_give_a_decision(caplog, review, decision):
    low, high = map(str, review or ("", ""))
    client = client_on(REVIEW_LOW=low, REVIEW_HIGH=high)
    data = picture()
    answer = upload(client, VERDICT + "?details=1", data).json
    logged = lines(caplog, "verdict")[-1]
    (batched,) = upload(client, BATCH + "?details=1", data).json["results"]
    for facts in (answer, logged, batched):
        assert facts.get("decision") == decision
    assert list(upload(client, VERDICT, data).json) == ["classification", "confidence"]
    labels = {"model_version": answer["model_version"], "decision": decision}
    assert counted(engine_of(client).telemetry, "decisions_total", **labels) == (
        3 if decision else 0
    )


@pytest.mark.parametrize(
    "low, high, words",
    [
        ("0.6", "0.4", "REVIEW_LOW, REVIEW_HIGH 0.6 0.4: must be two probabilities, the lower"),
        ("0.2", "", "REVIEW_LOW=0.2, REVIEW_HIGH=: must be two probabilities, or both empty"),
        ("0.2", "1.2", "0.2 1.2"),
        ("nan", "1", "nan 1"),
        ("low", "high", "REVIEW_LOW=low"),
    ],
)
def test_unfit_thresholds_of_a_decision_are_refused_at_the_start(low, high, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        read_settings({"REVIEW_LOW": low, "REVIEW_HIGH": high})


def test_a_model_without_a_notice_shows_none(tmp_path):
    other_encoder()
    path = baseline_for(tmp_path / "m.joblib")
    client = client_on(MODEL_PATH=str(path), ALLOW_DEMO_MODEL="0")
    response = upload(client, f"{BATCH}?details=1", picture())
    assert "notice" not in response.json["results"][0] and "X-Model-Notice" not in response.headers
    described = client.get("/model").json
    assert "notice" not in described and described["encoder"]["name"] == "other"
    assert described["sha256"] != load_model(BASELINE)["sha256"]


@pytest.mark.parametrize("path", [VERDICT, BATCH])
def test_the_headers_name_the_model(client, path):
    headers = upload(client, path, picture()).headers
    assert headers["X-Model-Version"] == "v0.0.0-dev"
    assert "demonstration" in headers["X-Model-Notice"]


def test_a_request_in_work_during_a_swap_names_the_old_model(tmp_path, monkeypatch):
    path = contrary(tmp_path / "m.joblib", "v1")
    client, responses = client_on(MODEL_PATH=str(path)), []
    engine = engine_of(client)
    expected = upload(client, VERDICT, picture()).json
    pixels = Detector.pixels

    def work():
        responses.append(upload(client, VERDICT, picture()))

    with held(monkeypatch, engine.telemetry, work):
        monkeypatch.setattr(Detector, "pixels", pixels)  # for the check of the new model
        model_file(path, **versions("v2"))
        assert reload(engine) == "ok"
        assert client.application.test_client().get("/model").json["version"] == "v2"
        assert responses == []
    (response,) = responses
    assert (response.headers["X-Model-Version"], response.json) == ("v1", expected)


# ---- ids and headers ----


@pytest.mark.parametrize("sent", ["a", "req-1.2_X", "x" * 64])
def test_a_fit_request_id_is_returned(client, sent):
    for path in ("/healthz", "/nowhere"):
        response = client.get(path, headers={"X-Request-ID": sent})
        assert response.headers["X-Request-ID"] == sent


@pytest.mark.parametrize("sent", [None, "", "x" * 65, "a b", "a/b", "<b>", "ä", '"', "a\tb", "a,b"])
def test_an_unfit_request_id_is_replaced(client, sent):
    headers = {} if sent is None else {"X-Request-ID": sent}
    ids = {client.get("/healthz", headers=headers).headers["X-Request-ID"] for _ in range(3)}
    assert len(ids) == 3 and all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


@pytest.mark.parametrize(
    "method, path",
    [
        ("get", "/"),
        ("get", "/model"),
        ("get", "/metrics"),
        ("get", "/nowhere"),
        ("put", VERDICT),
        ("post", VERDICT),
        ("post", BATCH),
        ("post", "/feedback"),
    ],
)
def test_every_response_has_a_request_id_and_nosniff(client, method, path):
    headers = client.open(path, method=method).headers
    assert headers["X-Request-ID"] and headers["X-Content-Type-Options"] == "nosniff"


# ---- the model ----


def test_the_model_is_described_as_in_its_file(client):
    model = load_model(BASELINE)
    data = model["training_data"]
    expected = {
        "version": model["versions"]["model"],
        "commit": model["versions"]["code"],
        "sha256": sha256(BASELINE.read_bytes()),
        "encoder": {
            "name": "small",
            "identity": model["encoder"]["identity"],
            "precision": "float32",
        },
        "training_data": {
            "sha256": data["sha256"],
            "real": data["real"],
            "fake": data["fake"],
            "sources": len(data["sources"]),
        },
        "threshold": model["threshold"],
        "threshold_rule": model["threshold_rule"],
        "band": list(model["band"]),
        "metrics": model["metrics"],
        "golden_floor": model["metrics"]["overall"]["balanced_accuracy"]["interval"][0],
        "notice": model["notice"],
    }
    described = client.get("/model").json
    assert described == expected and list(described) == list(expected)


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"overall": None},
        {"overall": {"n": 3}},
        {
            "overall": {
                "balanced_accuracy": metrics.of_both(intervals.share([]), intervals.share([]))
            }
        },
    ],
    ids=["no metrics", "no test images", "another figure", "a class without images"],
)
def test_without_a_stored_accuracy_there_is_no_floor(tmp_path, stored):
    client = client_on(MODEL_PATH=str(model_file(tmp_path / "m.joblib", metrics=stored)))
    response = client.get("/model")
    assert response.status_code == 200
    assert response.json["golden_floor"] is None and response.json["metrics"] == stored


# ---- lines ----

FACTS = {"format", "width", "height", "bytes", "sha256"}
STAGES = {"wait_s", "decode_s", "encode_s", "classify_s"}
HEAD = {"time", "level", "event", "request_id", "key"}


def test_the_line_of_a_verdict_has_the_image_the_verdict_and_the_model(client, caplog, photos):
    data = photos["china.jpg"].read_bytes()
    headers = {"X-Request-ID": "abc"}
    answer = upload(client, f"{VERDICT}?details=1", data, headers=headers).json
    (line,) = lines(caplog, "verdict")
    shown = {"classification", "confidence", "p_fake", "uncertain", "model_version"}
    assert set(line) == HEAD | FACTS | STAGES | shown | {"model_sha256"}
    assert {name: line[name] for name in shown} == {name: answer[name] for name in shown}
    expected = {
        "sha256": sha256(data),
        "bytes": len(data),
        "format": "JPEG",
        "width": 640,
        "height": 427,
        "key": None,
        "request_id": "abc",
        "model_sha256": load_model(BASELINE)["sha256"],
        "level": "info",
    }
    assert {name: line[name] for name in expected} == expected
    assert all(isinstance(line[name], float) and line[name] >= 0 for name in STAGES)


@pytest.mark.parametrize(
    "data, status",
    [(b"hello", 415), (picture()[:-500], 422), (picture(0, 2010, 10), 413)],
    ids=["text", "torn", "long"],
)
def test_the_line_of_an_image_without_a_verdict_has_its_error(client, caplog, data, status):
    before = counted(engine_of(client).telemetry, "image_errors_total", status=status)
    response = upload(client, VERDICT, data, headers={"X-Request-ID": "abc"})
    assert response.status_code == status
    (line,) = lines(caplog, "image_error")
    required = HEAD | {"sha256", "bytes", "status", "error"}
    assert required <= set(line) <= required | FACTS
    assert (line["status"], line["request_id"]) == (status, "abc")
    assert line["error"] == response.json["error"]
    assert (line["sha256"], line["bytes"]) == (sha256(data), len(data))
    assert lines(caplog, "verdict") == []
    assert counted(engine_of(client).telemetry, "image_errors_total", status=status) == before + 1


def test_each_image_of_a_batch_has_a_line_with_its_number(client, caplog):
    images = [picture(1), b"hello", picture(2)]
    upload(client, BATCH, *images, headers={"X-Request-ID": "abc"})
    logged = [line for line in lines(caplog) if line["event"] in ("verdict", "image_error")]
    assert [(line["event"], line["request_id"]) for line in logged] == [
        ("verdict", "abc.0"),
        ("image_error", "abc.1"),
        ("verdict", "abc.2"),
    ]
    assert [line["sha256"] for line in logged] == [sha256(data) for data in images]
    (line,) = lines(caplog, "request")
    assert (line["request_id"], line["route"], line["status"]) == ("abc", BATCH, 200)


@pytest.mark.parametrize(
    "method, path, route, status",
    [
        ("post", VERDICT, VERDICT, 400),
        ("get", "/nowhere", "other", 404),
        ("get", VERDICT, "other", 405),
        ("get", "/model", "/model", 200),
    ],
)
def test_a_request_has_a_line_and_is_counted(client, caplog, method, path, route, status):
    def counts():
        return [
            counted(engine_of(client).telemetry, name, route=route, status=status)
            for name in ("requests_total", "request_seconds_count")
        ]

    before = counts()
    started = time.perf_counter()
    response = client.open(path, method=method, headers={"X-Request-ID": "abc"})
    whole, (line,) = time.perf_counter() - started, lines(caplog)
    assert set(line) == HEAD | {"method", "route", "status", "seconds", "read_s"} | (
        {"error"} if status >= 400 else set()
    )
    assert (line["event"], line["request_id"], line["key"]) == ("request", "abc", None)
    assert (line["method"], line["route"]) == (method.upper(), route)
    assert line["status"] == response.status_code == status
    assert 0 <= line["seconds"] <= whole + 1e-4
    assert line.get("error") == (response.json["error"] if status >= 400 else None)
    assert (line["read_s"] is None) == (path != VERDICT or method != "post")
    assert counts() == [count + 1 for count in before]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_probes_are_counted_and_logged_only_when_they_fail(client, caplog, path):
    client.get(path)
    assert lines(caplog) == []
    assert counted(engine_of(client).telemetry, "requests_total", route=path, status=200) >= 1
    client.post(path)
    (line,) = lines(caplog)
    assert (line["status"], line["method"]) == (405, "POST")


def test_neither_the_image_nor_its_name_is_in_the_log(client, caplog):
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("Comment", "SECRET-IN-THE-FILE")
    Image.new("RGB", (50, 50)).save(buffer, "PNG", pnginfo=info)
    for data in (buffer.getvalue(), buffer.getvalue()[:-30], b"SECRET-IN-THE-FILE"):
        body = (
            b'--x\r\nContent-Disposition: form-data; name="image";'
            b' filename="SECRET-NAME.png"\r\n\r\n' + data + b"\r\n--x--\r\n"
        )
        client.post(
            f"{VERDICT}?token=SECRET-QUERY",
            data=body,
            content_type="multipart/form-data; boundary=x",
        )
    assert len(lines(caplog)) == 6 and "SECRET" not in json.dumps(lines(caplog))
    assert max(len(json.dumps(line)) for line in lines(caplog)) < 1000


# ---- metrics ----

TELEMETRY_STAGES = ("wait", "turn", "read", "decode", "encode", "classify")
LABELS = {
    "requests": {"route", "status"},
    "request_seconds": {"route", "status"},
    "stage_seconds": {"stage"},
    "rejections": {"reason"},
    "image_errors": {"status"},
    "verdicts": {"model_version", "classification"},
    "uncertain": {"model_version"},
    "scores": {"model_version", "bin"},
    "reference_share": {"model_version", "bin"},
    "feature_distance": {"model_version"},
    "model_info": {
        "version",
        "commit",
        "sha256",
        "encoder",
        "identity",
        "precision",
        "demonstration",
    },
    "reloads": {"result"},
}


def test_the_metrics_have_the_documented_labels(client):
    upload(client, VERDICT, b"hello")
    upload(client, BATCH, *map(picture, range(6)))
    response = client.get("/metrics")
    assert response.status_code == 200 and response.headers["Content-Type"].startswith("text/plain")
    labels, stages = {}, set()
    for family in text_string_to_metric_families(response.text):
        name = family.name.removeprefix("detector_")
        for sample in family.samples:
            labels.setdefault(name, set()).update(set(sample.labels) - {"le"})
            stages |= {sample.labels["stage"]} if name == "stage_seconds" else set()
    assert stages == set(TELEMETRY_STAGES)
    for name, seen in labels.items():
        if f"detector_{name}" in response.text:
            assert seen == LABELS.get(name, set())
    assert {"requests", "request_seconds", "image_errors", "verdicts", "scores"} <= set(labels)


@pytest.mark.parametrize("stage", TELEMETRY_STAGES)
def test_each_stage_of_a_verdict_is_timed(client, stage):
    before = counted(engine_of(client).telemetry, "stage_seconds_count", stage=stage)
    upload(client, VERDICT, picture())
    assert counted(engine_of(client).telemetry, "stage_seconds_count", stage=stage) == before + 1
