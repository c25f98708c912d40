"""Overload: a limited wait, then 503 with Retry-After, while all other routes respond."""

import contextlib
import io
import threading
import time
from types import SimpleNamespace

import pytest
from engines import (
    BEARER,
    client_on,
    counted,
    engine_of,
    held,
    lines,
    meanwhile,
    picture,
    until,
    upload,
)
from live import DEMO, assert_error
from patience import PATIENCE

from detector.service import app
from detector.verdict import Detector

pytestmark = pytest.mark.usefixtures("compiled_once")

VERDICTS = ["/classify", "/classify/batch"]
PATHS = [*VERDICTS, "/explain"]


def rejected(client, reason):
    return counted(engine_of(client).telemetry, "rejections_total", reason=reason)


def waiting(client):
    return counted(engine_of(client).telemetry, "queue_depth")


def upload_held(client, monkeypatch, **options):
    """Context in which an upload of another client of this service holds a slot."""
    other = client.application.test_client()
    telemetry = engine_of(client).telemetry
    return held(monkeypatch, telemetry, lambda: upload(other, "/classify", picture(), **options))


@pytest.fixture
def client(compiled_once):
    return client_on(SLOTS="1", QUEUE_LIMIT="0", QUEUE_TIMEOUT_S="7")


@pytest.fixture
def busy(client, monkeypatch):
    """The single slot is taken while the test runs."""
    with upload_held(client, monkeypatch):
        yield client
    assert counted(engine_of(client).telemetry, "requests_total", route="/classify", status=200)


@pytest.mark.parametrize("path", PATHS)
def test_without_a_queue_a_busy_service_refuses_with_503_and_retry_after(busy, path):
    before = rejected(busy, "queue_full")
    response = upload(busy, path, picture())
    assert_error(response, 503, "busy", "try again later")
    assert response.headers["Retry-After"] == "7"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert rejected(busy, "queue_full") == before + 1
    assert counted(engine_of(busy).telemetry, "slots_busy") == 1 and waiting(busy) == 0


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/model", "/"])
def test_a_busy_service_responds_on_routes_that_need_no_slot(busy, path):
    assert busy.get(path).status_code == 200


def test_a_busy_service_sends_401_to_a_client_without_a_token(api_keys, monkeypatch):
    client = client_on(SLOTS="1", QUEUE_LIMIT="0", API_KEYS_FILE=api_keys)
    with upload_held(client, monkeypatch, headers=BEARER):
        assert upload(client, "/classify", picture()).status_code == 401
        assert upload(client, "/classify", picture(), headers=BEARER).status_code == 503


class Body(io.BytesIO):
    """A request's body that counts the bytes that were read."""

    taken = 0

    def read(self, *size):
        data = super().read(*size)
        self.taken += len(data)
        return data

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.taken += count
        return count


FORM = "multipart/form-data; boundary=x"


@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_the_body_of_a_refused_upload_is_read(busy, size):
    """Otherwise its client would see a broken connection instead of the response."""
    body = Body(bytes(size))
    response = busy.post("/classify", input_stream=body, content_length=size, content_type=FORM)
    assert response.status_code == 503 and body.taken == size


@pytest.mark.parametrize("path, status", [("/classify", 503), ("/nowhere", 404)])
def test_a_body_far_above_the_limit_is_not_read_to_its_end(busy, path, status):
    body = Body(bytes(40_000_000))
    response = busy.post(path, input_stream=body, content_length=40_000_000, content_type=FORM)
    assert response.status_code == status and 20_000_000 < body.taken < 23_000_000


@pytest.mark.parametrize("path", PATHS)
def test_refused_uploads_are_counted_and_logged_once_a_second(busy, caplog, monkeypatch, path):
    telemetry, clock = engine_of(busy).telemetry, [100.0]
    monkeypatch.setattr(
        "detector.service.telemetry.time",
        SimpleNamespace(monotonic=lambda: clock[0], strftime=time.strftime, gmtime=time.gmtime),
    )
    for total in range(1, 6):
        response = upload(busy, path, picture(), headers={"X-Request-ID": f"mine-{total}"})
        assert (response.status_code, response.headers["X-Request-ID"]) == (503, f"mine-{total}")
    assert counted(telemetry, "requests_total", route=path, status="503") == 5
    assert counted(telemetry, "request_seconds_count", route=path, status="503") == 5
    assert [line["total"] for line in lines(caplog, "turned_away")] == [1]
    assert not lines(caplog, "request")
    clock[0] += 1
    upload(busy, path, picture())
    logged = [(line["reason"], line["total"]) for line in lines(caplog, "turned_away")]
    assert logged == [("queue_full", 1), ("queue_full", 6)]


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "a\n{}"])
def test_a_refused_upload_with_an_unfit_request_id_gets_a_new_id(busy, sent):
    environ = {"HTTP_X_REQUEST_ID": sent}
    response = busy.post("/classify", data=picture(), content_type=FORM, environ_overrides=environ)
    assert response.status_code == 503 and len(response.headers["X-Request-ID"]) == 32


def test_with_a_free_slot_the_service_gives_verdicts_again(client, monkeypatch):
    with upload_held(client, monkeypatch):
        assert upload(client, "/classify", picture()).status_code == 503
    assert upload(client, "/classify", picture()).status_code == 200
    assert counted(engine_of(client).telemetry, "slots_busy") == 0


@pytest.mark.parametrize("path", PATHS)
def test_a_wait_without_a_slot_ends_with_503_after_the_timeout(monkeypatch, path):
    client = client_on(SLOTS="1", QUEUE_LIMIT="1", QUEUE_TIMEOUT_S="1")
    with upload_held(client, monkeypatch):
        started = time.monotonic()
        response = upload(client, path, picture())
        assert time.monotonic() - started > 0.9
    assert_error(response, 503, "no turn came within 1 s")
    assert response.headers["Retry-After"] == "1"
    assert rejected(client, "queue_timeout") == 1 and waiting(client) == 0


@pytest.mark.parametrize("path", VERDICTS)
def test_with_a_full_queue_an_upload_is_refused_and_a_waiting_one_gets_its_verdict(
    monkeypatch, path, caplog
):
    client = client_on(SLOTS="1", QUEUE_LIMIT="1", QUEUE_TIMEOUT_S=str(PATIENCE))
    other, responses = client.application.test_client(), []

    def wait():
        headers = {"X-Request-ID": "2"}
        responses.append(upload(client, f"{path}?details=1", picture(), headers=headers))

    with contextlib.ExitStack() as stack:
        with upload_held(client, monkeypatch):
            stack.enter_context(meanwhile(wait))
            until(lambda: waiting(client) == 1)
            assert_error(upload(other, path, picture()), 503, "busy")
            assert rejected(client, "queue_full") == 1 and responses == []
            time.sleep(0.1)
    assert responses[0].status_code == 200 and waiting(client) == 0
    (line,) = (line for line in lines(caplog, "verdict") if line["request_id"] in ("2", "2.0"))
    assert line["wait_s"] >= 0.1
    if path == "/classify":
        assert responses[0].json["timings"]["wait_s"] == line["wait_s"]


def test_while_the_model_loads_every_503_has_retry_after(monkeypatch):
    may_load, load = threading.Event(), Detector.__init__

    def slow(self, *args, **options):
        assert may_load.wait(PATIENCE)
        load(self, *args, **options)

    monkeypatch.setattr(Detector, "__init__", slow)
    client = app.create_app({**DEMO, "QUEUE_TIMEOUT_S": "3"}).test_client()
    body = Body(bytes(200_000))
    refused = [
        client.get("/readyz"),
        client.get("/model"),
        upload(client, "/classify", picture()),
        upload(client, "/classify/batch"),
        client.post("/classify", input_stream=body, content_length=200_000),
    ]
    assert client.get("/healthz").status_code == client.get("/").status_code == 200
    may_load.set()
    for response in refused:
        assert_error(response, 503, "still loading")
        assert response.headers["Retry-After"] == "3" and response.headers["X-Request-ID"]
    assert rejected(client, "not_ready") == 4  # the probe does not count
    assert body.taken == 200_000
    until(lambda: client.get("/readyz").status_code == 200)
