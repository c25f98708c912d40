"""More than can be worked on: a bounded wait, then 503 that says when to come again, while everything else is answered."""

import io
import threading
import time
from types import SimpleNamespace

import pytest
from engines import client_on, counted, held, keys_file, lines, picture, until, upload
from live import DEMO, assert_error
from patience import PATIENCE

from detector.service import app
from detector.verdict import Detector

pytestmark = pytest.mark.usefixtures("compiled_once")

PATHS = ["/classify", "/classify/batch"]


def engine_of(client):
    return client.application.extensions["engine"]


def another(client):
    """A client of the same service for another thread."""
    return client.application.test_client()


@pytest.fixture
def client(compiled_once):
    return client_on(SLOTS="1", QUEUE_LIMIT="0", QUEUE_TIMEOUT_S="7")


@pytest.fixture
def busy(client, monkeypatch):
    """The one slot is taken for as long as the test runs."""
    answers = []
    with held(
        monkeypatch,
        engine_of(client).telemetry,
        lambda: answers.append(upload(another(client), "/classify", picture())),
    ):
        yield client
    assert answers[0].status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_while_the_slot_is_taken_and_none_may_wait_it_says_503_at_once_and_when_to_come_again(
    busy, path
):
    before = counted(engine_of(busy).telemetry, "rejections_total", reason="queue_full")
    response = upload(busy, path, picture())
    assert_error(response, 503, "busy", "try again later")
    assert response.headers["Retry-After"] == "7"
    assert counted(engine_of(busy).telemetry, "rejections_total", reason="queue_full") == before + 1
    assert (
        counted(engine_of(busy).telemetry, "slots_busy") == 1
        and counted(engine_of(busy).telemetry, "queue_depth") == 0
    )


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/model", "/"])
def test_meanwhile_everything_that_needs_no_slot_is_answered(busy, path):
    assert busy.get(path).status_code == 200  # while the slot is taken: it would wait for ever


def test_a_stranger_learns_that_a_token_is_needed_and_not_how_busy_it_is(
    compiled_once, monkeypatch, tmp_path
):
    client = client_on(
        SLOTS="1", QUEUE_LIMIT="0", API_KEYS_FILE=keys_file(tmp_path / "keys", ann="1")
    )
    known = {"Authorization": "Bearer 1"}
    with held(
        monkeypatch,
        engine_of(client).telemetry,
        lambda: upload(another(client), "/classify", picture(), headers=known),
    ):
        assert upload(client, "/classify", picture()).status_code == 401
        assert upload(client, "/classify", picture(), headers=known).status_code == 503


class Body(io.BytesIO):
    """A request's body that knows how much of it was read."""

    taken = 0

    def read(self, *size):
        data = super().read(*size)
        self.taken += len(data)
        return data

    def readinto(self, buffer):
        taken = super().readinto(buffer)
        self.taken += taken
        return taken


@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_the_body_of_a_request_that_is_turned_away_is_read_so_that_its_sender_gets_the_answer(
    busy, size
):
    body = Body(bytes(size))
    response = busy.post(
        "/classify",
        input_stream=body,
        content_length=size,
        content_type="multipart/form-data; boundary=x",
    )
    assert response.status_code == 503 and body.taken == size


@pytest.mark.parametrize("path", ["/classify", "/nowhere"])
def test_a_body_far_above_the_limit_is_not_read_to_its_end(busy, path):
    body = Body(bytes(40_000_000))
    response = busy.post(
        path,
        input_stream=body,
        content_length=40_000_000,
        content_type="multipart/form-data; boundary=x",
    )
    assert (
        response.status_code == (503 if path in PATHS else 404)
        and 20_000_000 < body.taken < 23_000_000
    )


def test_what_is_turned_away_is_counted_like_all_else_and_a_line_a_second_tells_of_all_of_it(
    busy, caplog, monkeypatch
):
    caplog.set_level("INFO")
    telemetry, clock = engine_of(busy).telemetry, [100.0]
    monkeypatch.setattr(
        "detector.service.telemetry.time",
        SimpleNamespace(monotonic=lambda: clock[0], strftime=time.strftime, gmtime=time.gmtime),
    )
    for total in range(1, 6):
        response = upload(busy, "/classify", picture(), headers={"X-Request-ID": f"mine-{total}"})
        assert (response.status_code, response.headers["X-Request-ID"]) == (503, f"mine-{total}")
    assert counted(telemetry, "requests_total", route="/classify", status="503") == 5
    assert counted(telemetry, "request_seconds_count", route="/classify", status="503") == 5
    assert [line["total"] for line in lines(caplog, "turned_away")] == [1] and not lines(
        caplog, "request"
    )
    clock[0] += 1
    upload(busy, "/classify", picture())
    assert [(line["reason"], line["total"]) for line in lines(caplog, "turned_away")] == [
        ("queue_full", 1),
        ("queue_full", 6),
    ]


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "a\n{}"])
def test_a_request_id_that_is_none_is_replaced_there_too(busy, sent):
    body = picture()
    environ = {"HTTP_X_REQUEST_ID": sent}
    response = busy.post(
        "/classify",
        data=body,
        content_type="multipart/form-data; boundary=x",
        environ_overrides=environ,
    )
    assert response.status_code == 503 and len(response.headers["X-Request-ID"]) == 32


def test_when_the_slot_is_free_again_so_is_the_service(client, monkeypatch):
    with held(
        monkeypatch,
        engine_of(client).telemetry,
        lambda: upload(another(client), "/classify", picture()),
    ):
        assert upload(client, "/classify", picture()).status_code == 503
    assert upload(client, "/classify", picture()).status_code == 200
    assert counted(engine_of(client).telemetry, "slots_busy") == 0


@pytest.mark.parametrize("path", PATHS)
def test_a_wait_that_finds_no_slot_ends_with_503_after_the_timeout(
    compiled_once, monkeypatch, path
):
    client = client_on(SLOTS="1", QUEUE_LIMIT="1", QUEUE_TIMEOUT_S="1")
    telemetry = engine_of(client).telemetry
    with held(monkeypatch, telemetry, lambda: upload(another(client), "/classify", picture())):
        started = time.monotonic()
        answer = upload(client, path, picture())
        assert time.monotonic() - started > 0.9
    assert_error(answer, 503, "no turn came within 1 s")
    assert (
        answer.headers["Retry-After"] == "1"
        and counted(telemetry, "rejections_total", reason="queue_timeout") == 1
    )
    assert counted(telemetry, "queue_depth") == 0


@pytest.mark.parametrize("path", PATHS)
def test_where_as_many_wait_as_may_one_more_is_turned_away(compiled_once, monkeypatch, path):
    client, answers = client_on(SLOTS="1", QUEUE_LIMIT="1", QUEUE_TIMEOUT_S=str(PATIENCE)), []
    telemetry = engine_of(client).telemetry
    waiter = threading.Thread(target=lambda: answers.append(upload(client, path, picture())))
    with held(monkeypatch, telemetry, lambda: upload(another(client), "/classify", picture())):
        waiter.start()
        until(lambda: counted(telemetry, "queue_depth") == 1)
        assert_error(upload(another(client), path, picture()), 503, "busy")
        assert counted(telemetry, "rejections_total", reason="queue_full") == 1 and answers == []
    waiter.join(PATIENCE)
    assert answers[0].status_code == 200 and counted(telemetry, "queue_depth") == 0


def test_one_that_waits_gets_its_verdict_and_is_told_how_long_it_took(
    compiled_once, monkeypatch, caplog
):
    caplog.set_level("INFO")
    client, answers = client_on(SLOTS="1", QUEUE_LIMIT="1", QUEUE_TIMEOUT_S=str(PATIENCE)), []
    second = threading.Thread(
        target=lambda: answers.append(
            upload(client, "/classify?details=1", picture(), headers={"X-Request-ID": "2"})
        )
    )
    with held(
        monkeypatch,
        engine_of(client).telemetry,
        lambda: upload(another(client), "/classify", picture()),
    ):
        second.start()
        until(lambda: counted(engine_of(client).telemetry, "queue_depth") == 1)
        time.sleep(0.1)
    second.join(PATIENCE)
    (line,) = (line for line in lines(caplog, "verdict") if line["request_id"] == "2")
    assert (
        answers[0].status_code == 200
        and 0.1 <= answers[0].json["timings"]["wait_s"] == line["wait_s"]
    )


def test_every_503_says_when_to_come_again_while_the_model_loads_too(monkeypatch):
    may_load, load = threading.Event(), Detector.__init__

    def slow(self, *args, **options):
        assert may_load.wait(PATIENCE)
        load(self, *args, **options)

    monkeypatch.setattr(Detector, "__init__", slow)
    client = app.create_app({**DEMO, "QUEUE_TIMEOUT_S": "3"}).test_client()
    body = Body(bytes(200_000))
    turned_away = [
        client.get("/readyz"),
        client.get("/model"),
        upload(client, "/classify", picture()),
        upload(client, "/classify/batch"),
        client.post("/classify", input_stream=body, content_length=200_000),
    ]
    assert client.get("/healthz").status_code == client.get("/").status_code == 200
    may_load.set()
    for response in turned_away:
        assert_error(response, 503, "still loading")
        assert response.headers["Retry-After"] == "3" and response.headers["X-Request-ID"]
    # a probe that finds it unready is no request turned away
    assert (
        counted(engine_of(client).telemetry, "rejections_total", reason="not_ready") == 4
        and body.taken == 200_000
    )
    until(lambda: client.get("/readyz").status_code == 200)
