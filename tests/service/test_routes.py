"""The routes beyond the documented verdict: batches, details, request ids, the model's own page, metrics and lines in the log."""

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

from detector.base.files import sha256
from detector.evaluation import metrics
from detector.model.file import load_model
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


@pytest.fixture(scope="module")
def client(compiled_once):
    return client_on()


@pytest.fixture(autouse=True)
def everything_is_logged(caplog):
    caplog.set_level("INFO")


def engine_of(client):
    return client.application.extensions["engine"]


# ---- batches ----


def test_a_batch_is_answered_in_order_each_image_as_if_it_were_alone(client, photos):
    images = [path.read_bytes() for path in photos.values()]
    response = upload(client, BATCH, *images)
    assert response.status_code == 200 and list(response.json) == ["results"]
    alone = [upload(client, VERDICT, data).json for data in images]
    assert all(
        list(result) == ["classification", "confidence"] for result in response.json["results"]
    )
    assert [result["classification"] for result in response.json["results"]] == [
        one["classification"] for one in alone
    ]
    assert [result["confidence"] for result in response.json["results"]] == pytest.approx(
        [one["confidence"] for one in alone], abs=1.01e-4
    )
    assert (
        len({one["confidence"] for one in alone}) == len(images) > 4
    )  # more than one forward pass, and a mix-up would show


def test_in_a_batch_what_is_no_image_is_told_in_its_place(client):
    results = upload(client, BATCH, b"hello", picture(1), picture(2)[:-500], b"", picture(3)).json[
        "results"
    ]
    assert [list(result) for result in results] == [
        ["error"],
        ["classification", "confidence"],
        ["error"],
        ["error"],
        ["classification", "confidence"],
    ]
    for place in (0, 2, 3):
        assert (
            results[place]["error"]
            == upload(client, VERDICT, (b"hello", None, picture(2)[:-500], b"")[place]).json[
                "error"
            ]
        )
    assert results[4]["confidence"] == pytest.approx(
        upload(client, VERDICT, picture(3)).json["confidence"], abs=1.01e-4
    )


def test_a_batch_of_nothing_but_errors_is_answered_all_the_same(client):
    response = upload(client, BATCH, b"hello", b"")
    assert (
        response.status_code == 200
        and [list(result) for result in response.json["results"]] == [["error"]] * 2
    )


@pytest.fixture(scope="module")
def of_three(compiled_once):
    return client_on(BATCH_LIMIT="3")


def test_a_batch_without_an_image_is_400_and_says_what_arrived(of_three):
    assert_error(
        upload(of_three, BATCH),
        400,
        "no field 'image', only 'text'",
        "curl -F image=@FILE URL/classify/batch",
    )
    assert_error(
        upload(of_three, BATCH, picture(), field="file"), 400, "no field 'image', only 'file'"
    )


@pytest.mark.parametrize("count", [1, 3])
def test_up_to_the_limit_of_images_all_are_answered(of_three, count):
    assert len(upload(of_three, BATCH, *map(picture, range(count))).json["results"]) == count


@pytest.mark.parametrize("count", [4, 5, 40])
def test_above_it_the_batch_is_413_and_says_how_many_are_taken(of_three, count):
    assert_error(upload(of_three, BATCH, *map(picture, range(count))), 413, "3 ")
    assert "image" in upload(of_three, BATCH, *map(picture, range(count))).json["error"]


def test_sixteen_are_taken_unless_another_limit_is_set(client):
    assert len(upload(client, BATCH, *[b"x"] * 16).json["results"]) == 16
    assert_error(upload(client, BATCH, *[b"x"] * 17), 413, "16")


# ---- details ----


@pytest.mark.parametrize("path, more", [(VERDICT, ["timings"]), (BATCH, [])])
def test_with_details_the_documented_keys_come_first_and_what_stands_behind_them_follows(
    client, path, more
):
    body = upload(client, f"{path}?details=1", picture()).json
    found = body if path == VERDICT else body["results"][0]
    plain = upload(client, VERDICT, picture()).json
    assert list(found) == ["classification", "confidence", *DETAILS, *more]
    assert {name: found[name] for name in plain} == plain
    for name, kind in DETAILS.items():
        assert isinstance(found[name], kind)
    assert (found["model_version"], found["threshold"]) == (
        "v0.0.0-dev",
        0.5,
    ) and "demonstration" in found["notice"]
    assert found["confidence"] == pytest.approx(
        max(found["p_fake"], 1 - found["p_fake"]), abs=1.01e-4
    )


def test_the_timings_are_seconds_of_each_stage(client):
    data, started = picture(0, 600, 400), time.perf_counter()
    timings = upload(client, f"{VERDICT}?details=1", data).json["timings"]
    assert list(timings) == TIMINGS and all(
        isinstance(value, float) and value >= 0 for value in timings.values()
    )
    assert (
        sum(timings.values()) <= time.perf_counter() - started + 5e-4
    )  # each is rounded to a ten thousandth
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
def test_without_them_the_json_is_the_documented_one(client, query):
    assert list(upload(client, f"{VERDICT}{query}", picture()).json) == [
        "classification",
        "confidence",
    ]


@pytest.mark.parametrize("value", ["1", "true", "yes", "True", "YES"])
def test_details_may_be_asked_for_in_several_words(client, value):
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
def test_details_of_another_value_and_slips_of_the_word_are_400(client, path, query, words):
    response = upload(client, f"{path}?{query}", picture())
    assert_error(response, 400, *words)
    assert len(response.text) < 200


@pytest.mark.parametrize("band, uncertain", [([0.0, 1.0], True), ([0.5, 0.5], False)])
def test_an_uncertain_verdict_has_a_reason_and_a_certain_one_has_none(tmp_path, band, uncertain):
    client = client_on(MODEL_PATH=str(model_file(tmp_path / "m.joblib", band=np.array(band))))
    found = upload(client, f"{VERDICT}?details=1", picture()).json
    assert found["uncertain"] is uncertain
    assert ("between 0.00 and 1.00" in found["reason"]) if uncertain else (found["reason"] is None)


def test_a_model_that_is_no_demonstration_has_no_notice_anywhere(tmp_path):
    other_encoder()
    model = load_model(BASELINE)
    path = baseline_for(tmp_path / "m.joblib")
    client = client_on(MODEL_PATH=str(path), ALLOW_DEMO_MODEL="0")
    response = upload(client, f"{BATCH}?details=1", picture())
    assert "notice" not in response.json["results"][0] and "X-Model-Notice" not in response.headers
    described = client.get("/model").json
    assert (
        "notice" not in described
        and described["encoder"]["name"] == "other"
        and described["sha256"] != model["sha256"]
    )


@pytest.mark.parametrize("path", [VERDICT, BATCH])
def test_the_model_that_answered_stands_in_the_headers(client, path):
    headers = upload(client, path, picture()).headers
    assert (
        headers["X-Model-Version"] == "v0.0.0-dev" and "demonstration" in headers["X-Model-Notice"]
    )


def test_a_request_in_work_while_the_model_is_swapped_names_the_model_that_answered_it(
    tmp_path, monkeypatch
):
    path = contrary(tmp_path / "m.joblib", "v1")
    client, answers = client_on(MODEL_PATH=str(path)), []
    engine = engine_of(client)
    expected = upload(client, VERDICT, picture()).json
    pixels = Detector.pixels
    with held(
        monkeypatch, engine.telemetry, lambda: answers.append(upload(client, VERDICT, picture()))
    ):
        monkeypatch.setattr(Detector, "pixels", pixels)  # the new model may prove itself meanwhile
        model_file(path, **versions("v2"))
        assert reload(engine) == "ok"
        assert (
            client.application.test_client().get("/model").json["version"] == "v2" and answers == []
        )
    (answer,) = answers
    assert (answer.headers["X-Model-Version"], answer.json) == ("v1", expected)


# ---- ids and headers ----


@pytest.mark.parametrize("sent", ["a", "req-1.2_X", "x" * 64])
def test_a_request_id_that_is_fit_comes_back(client, sent):
    for response in (
        client.get("/healthz", headers={"X-Request-ID": sent}),
        client.get("/nowhere", headers={"X-Request-ID": sent}),
    ):
        assert response.headers["X-Request-ID"] == sent


@pytest.mark.parametrize("sent", [None, "", "x" * 65, "a b", "a/b", "<b>", "ä", '"', "a\tb", "a,b"])
def test_any_other_is_replaced_by_a_new_one(client, sent):
    ids = {
        client.get("/healthz", headers={} if sent is None else {"X-Request-ID": sent}).headers[
            "X-Request-ID"
        ]
        for _ in range(3)
    }
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
def test_every_answer_has_an_id_and_may_not_be_taken_for_another_type(client, method, path):
    headers = getattr(client, method)(path).headers
    assert headers["X-Request-ID"] and headers["X-Content-Type-Options"] == "nosniff"


# ---- the model ----


def test_the_model_is_described_as_its_file_has_it(client):
    model = load_model(BASELINE)
    found, data = client.get("/model").json, model["training_data"]
    assert list(found) == [
        "version",
        "commit",
        "sha256",
        "encoder",
        "training_data",
        "threshold",
        "threshold_rule",
        "band",
        "metrics",
        "golden_floor",
        "notice",
    ]
    assert found["sha256"] == sha256(BASELINE.read_bytes())
    assert (found["version"], found["commit"]) == (
        model["versions"]["model"],
        model["versions"]["code"],
    )
    assert found["encoder"] == {
        "name": "small",
        "identity": model["encoder"]["identity"],
        "precision": "float32",
    }
    assert found["training_data"] == {
        "sha256": data["sha256"],
        "real": data["real"],
        "fake": data["fake"],
        "sources": len(data["sources"]),
    }
    assert (found["threshold"], found["threshold_rule"], found["band"]) == (
        model["threshold"],
        model["threshold_rule"],
        list(model["band"]),
    )
    assert found["metrics"] == model["metrics"] and found["notice"] == model["notice"]


def test_the_golden_floor_is_the_lower_end_of_the_stored_balanced_accuracy(client):
    overall = load_model(BASELINE)["metrics"]["overall"]
    floor = client.get("/model").json["golden_floor"]
    assert floor == overall["balanced_accuracy"]["interval"][0]
    assert 0.5 < floor < overall["balanced_accuracy"]["value"]


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"overall": None},
        {"overall": {"n": 3}},
        {"overall": {"balanced_accuracy": metrics.of_both(metrics.share([]), metrics.share([]))}},
    ],
    ids=["no metrics", "no test images", "another figure", "a class without images"],
)
def test_without_a_stored_accuracy_there_is_no_floor(tmp_path, stored):
    client = client_on(MODEL_PATH=str(model_file(tmp_path / "m.joblib", metrics=stored)))
    response = client.get("/model")
    assert (
        response.status_code == 200
        and response.json["golden_floor"] is None
        and response.json["metrics"] == stored
    )


# ---- lines ----

FACTS = {"format", "width", "height", "bytes", "sha256"}
STAGES = {"wait_s", "decode_s", "encode_s", "classify_s"}
HEAD = {"time", "level", "event", "request_id", "key"}


def test_a_verdict_is_one_line_with_the_picture_the_answer_and_the_model(client, caplog, photos):
    data = photos["china.jpg"].read_bytes()
    answer = upload(client, f"{VERDICT}?details=1", data, headers={"X-Request-ID": "abc"}).json
    (line,) = lines(caplog, "verdict")
    assert set(line) == HEAD | FACTS | STAGES | {
        "classification",
        "confidence",
        "p_fake",
        "uncertain",
        "model_version",
        "model_sha256",
    }
    assert {
        name: line[name]
        for name in ("classification", "confidence", "p_fake", "uncertain", "model_version")
    } == {
        name: answer[name]
        for name in ("classification", "confidence", "p_fake", "uncertain", "model_version")
    }
    assert {
        name: line[name]
        for name in (
            "sha256",
            "bytes",
            "format",
            "width",
            "height",
            "key",
            "request_id",
            "model_sha256",
            "level",
        )
    } == {
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
    assert all(isinstance(line[name], float) and line[name] >= 0 for name in STAGES)


@pytest.mark.parametrize(
    "data, status",
    [(b"hello", 415), (picture()[:-500], 422), (picture(0, 2010, 10), 413)],
    ids=["text", "torn", "long"],
)
def test_an_image_without_a_verdict_is_one_line_that_says_why(client, caplog, data, status):
    before = counted(engine_of(client).telemetry, "image_errors_total", status=status)
    answer = upload(client, VERDICT, data, headers={"X-Request-ID": "abc"})
    assert answer.status_code == status
    (line,) = lines(caplog, "image_error")
    assert (
        HEAD | {"sha256", "bytes", "status", "error"}
        <= set(line)
        <= HEAD | FACTS | {"status", "error"}
    )
    assert (line["status"], line["error"], line["request_id"]) == (
        status,
        answer.json["error"],
        "abc",
    )
    assert (line["sha256"], line["bytes"]) == (sha256(data), len(data)) and lines(
        caplog, "verdict"
    ) == []
    assert counted(engine_of(client).telemetry, "image_errors_total", status=status) == before + 1


def test_in_a_batch_each_image_has_a_line_under_the_requests_id_and_its_number(client, caplog):
    images = [picture(1), b"hello", picture(2)]
    upload(client, BATCH, *images, headers={"X-Request-ID": "abc"})
    found = [line for line in lines(caplog) if line["event"] in ("verdict", "image_error")]
    assert [(line["event"], line["request_id"]) for line in found] == [
        ("verdict", "abc.0"),
        ("image_error", "abc.1"),
        ("verdict", "abc.2"),
    ]
    assert [line["sha256"] for line in found] == [sha256(data) for data in images]
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
def test_a_request_is_one_line_and_one_count(client, caplog, method, path, route, status):
    telemetry = engine_of(client).telemetry
    before = [
        counted(telemetry, "requests_total", route=route, status=status),
        counted(telemetry, "request_seconds_count", route=route, status=status),
    ]
    started = time.perf_counter()
    response = getattr(client, method)(path, headers={"X-Request-ID": "abc"})
    whole, (line,) = time.perf_counter() - started, lines(caplog)
    assert set(line) == HEAD | {"method", "route", "status", "seconds", "read_s"} | (
        {"error"} if status >= 400 else set()
    )
    assert [line[name] for name in ("event", "request_id", "method", "route", "status", "key")] == [
        "request",
        "abc",
        method.upper(),
        route,
        response.status_code,
        None,
    ]
    assert response.status_code == status and 0 <= line["seconds"] <= whole + 1e-4
    assert line.get("error") == (response.json["error"] if status >= 400 else None)
    assert (line["read_s"] is None) == (path != VERDICT or method != "post")
    after = [
        counted(telemetry, "requests_total", route=route, status=status),
        counted(telemetry, "request_seconds_count", route=route, status=status),
    ]
    assert after == [count + 1 for count in before]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_probes_are_counted_and_not_logged_while_they_succeed(client, caplog, path):
    client.get(path)
    assert (
        lines(caplog) == []
        and counted(engine_of(client).telemetry, "requests_total", route=path, status=200) >= 1
    )
    client.post(path)
    (line,) = lines(caplog)
    assert (line["status"], line["method"]) == (405, "POST")


def test_neither_the_picture_nor_its_name_comes_into_the_log(client, caplog):
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


def test_after_some_traffic_the_metrics_have_the_labels_of_the_contract(client):
    upload(client, VERDICT, b"hello")
    upload(client, BATCH, *map(picture, range(6)))
    response = client.get("/metrics")
    assert response.status_code == 200 and response.headers["Content-Type"].startswith("text/plain")
    seen = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            seen.setdefault(family.name.removeprefix("detector_"), set()).update(
                set(sample.labels) - {"le"}
            )
            if family.name == "detector_stage_seconds":
                assert sample.labels["stage"] in (
                    "wait",
                    "turn",
                    "read",
                    "decode",
                    "encode",
                    "classify",
                )
    assert all(
        labels == LABELS.get(name, set())
        for name, labels in seen.items()
        if f"detector_{name}" in response.text
    )
    assert {
        "requests",
        "request_seconds",
        "stage_seconds",
        "image_errors",
        "verdicts",
        "scores",
    } <= set(seen)


@pytest.mark.parametrize("stage", ["wait", "turn", "read", "decode", "encode", "classify"])
def test_each_stage_of_a_verdict_is_timed(client, stage):
    before = counted(engine_of(client).telemetry, "stage_seconds_count", stage=stage)
    upload(client, VERDICT, picture())
    assert counted(engine_of(client).telemetry, "stage_seconds_count", stage=stage) == before + 1
