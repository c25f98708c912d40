"""The service: documented JSON for verdicts and errors, settings that are refused in one line, nothing on disk."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flask
import numpy as np
import pytest
import requests
from commands import ROOT, assert_one_line_error
from live import DEMO, Live, assert_error, post, ready_client, wait_for, wait_until_ready
from made_up import BASELINE, NOTICE, baseline_for, other_encoder
from patience import PATIENCE
from PIL import Image

from detector import verdict
from detector.base.errors import EncoderError, UsageError
from detector.images import decoding
from detector.service import app, settings
from detector.service import settings as service_settings

NAMES = ("china.jpg", "coffee.png", "camera.png", "rocket.jpg", "astronaut.png")


@pytest.fixture(scope="module")
def client():
    return ready_client()


@pytest.fixture(scope="module")
def data(photos):
    """Bytes of the photographs, {name: bytes}."""
    return {name: path.read_bytes() for name, path in photos.items()}


# ---- verdicts ----


@pytest.mark.parametrize("name", NAMES)
def test_the_verdict_is_that_of_classify_py_in_the_documented_json(
    client, script, photos, data, name
):
    response = post(client, data[name])
    assert response.status_code == 200 and response.headers["Content-Type"] == "application/json"
    assert list(response.json) == ["classification", "confidence"]
    printed = script(
        "classify.py", "--image_path", photos[name], "--model_path", BASELINE, "--json"
    ).stdout
    assert response.json == json.loads(printed)


def test_a_demonstration_says_so_in_a_header_and_the_json_stays_as_documented(client, data):
    assert post(client, data["china.jpg"]).headers["X-Model-Notice"] == NOTICE


def test_a_model_without_a_notice_needs_no_permission_and_shows_none(data, tmp_path, client):
    other_encoder()
    other = ready_client(MODEL_PATH=baseline_for(tmp_path / "other.joblib"), ALLOW_DEMO_MODEL="0")
    response = post(other, data["china.jpg"])
    assert (
        "X-Model-Notice" not in response.headers
        and response.json == post(client, data["china.jpg"]).json
    )


def test_health_and_readiness_are_answered(client):
    assert (client.get("/healthz").json, client.get("/readyz").json) == (
        {"status": "ok"},
        {"status": "ready"},
    )


# ---- errors of a request ----


@pytest.mark.parametrize(
    "body, content_type, arrived",
    [
        ({}, "multipart/form-data", "the form is empty"),
        ({"image": "text, no file"}, "multipart/form-data", "13 bytes of text"),
        (b"", None, "no body"),
        (b'{"image": "..."}', "application/json", "'application/json'"),
        (b"\xff\xd8\xff", "image/jpeg", "'image/jpeg'"),
        (b"no boundary", "multipart/form-data", "without its boundary"),
        (b"--x\r\n", "multipart/form-data; boundary=x", "do not end"),
    ],
    ids=["no field", "text", "no body", "json", "bare image", "no boundary", "torn"],
)
def test_a_request_without_a_file_in_the_field_image_is_400(client, body, content_type, arrived):
    assert_error(
        client.post("/classify", data=body, content_type=content_type),
        400,
        arrived,
        "'image'",
        "curl -F image=@FILE",
    )


def test_a_file_in_another_field_is_400(client, data):
    assert_error(
        post(client, data["china.jpg"], field="file"),
        400,
        "no field 'image', only 'file'",
        "curl -F image=@FILE",
    )


def test_a_repeated_field_is_400(client, data):
    assert_error(
        post(client, data["china.jpg"], data["coffee.png"]),
        400,
        "2 fields 'image'",
        "/classify/batch",
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"%PDF-1.7 ...", b"<svg xmlns='http://www.w3.org/2000/svg'/>"],
    ids=["empty", "text", "pdf", "svg"],
)
def test_what_is_no_image_is_415(client, content):
    assert_error(post(client, content), 415, "JPEG")


@pytest.mark.parametrize(
    "name, kept", [("china.jpg", 0.5), ("coffee.png", 0.5), ("china.jpg", 0.001)]
)
def test_a_truncated_image_is_422(client, data, name, kept):
    assert_error(post(client, data[name][: int(kept * len(data[name]))]), 422)


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("get", "/classify", "POST"),
        ("put", "/classify", "POST"),
        ("delete", "/readyz", "GET"),
        ("post", "/healthz", "GET"),
    ],
)
def test_another_method_is_405_and_says_which_is_allowed(client, method, path, allowed):
    response = getattr(client, method)(path)
    assert_error(response, 405, allowed)
    assert allowed in response.headers["Allow"]


@pytest.mark.parametrize("path", ["/nowhere", "/classify/", "/static/x.css", "/../app.py"])
def test_an_unknown_path_is_404(client, path):
    assert_error(client.get(path), 404)


@pytest.fixture(scope="module")
def limited():
    return ready_client(MAX_UPLOAD_BYTES="20000", MAX_PIXELS="10000")


def png(width, height):
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_image_up_to_the_limit_of_pixels_is_taken_and_above_it_is_413(limited):
    assert post(limited, png(100, 100)).status_code == 200
    assert_error(post(limited, png(100, 101)), 413, "100 x 101", "10,000")


def test_a_body_above_the_limit_of_bytes_is_413(limited, data):
    sent = len(
        requests.Request("POST", "http://x", files=[("image", ("0.bin", data["china.jpg"]))])
        .prepare()
        .body
    )
    assert_error(
        post(limited, data["china.jpg"]), 413, f"of {sent:,} bytes", "the 20,000 bytes allowed"
    )


def test_a_body_of_unstated_length_is_cut_off_at_the_same_limit(limited):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        + bytes(50_000)
        + b"\r\n--x--\r\n"
    )
    response = limited.post(
        "/classify",
        input_stream=io.BytesIO(body),
        content_type="multipart/form-data; boundary=x",
        environ_overrides={"wsgi.input_terminated": True},
    )
    assert_error(response, 413, "20,000 bytes")


def test_a_bomb_is_refused_from_its_header_before_decoding(client, monkeypatch):
    def never(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(decoding, "load_rgb", never)
    assert_error(post(client, png(20_000, 20_000)), 413, "50,000,000")


def test_our_own_bug_is_500_and_tells_the_client_nothing(client, data, monkeypatch):
    def broken(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(verdict.Detector, "pixels", broken)
    response = post(client, data["china.jpg"])
    assert_error(response, 500, "internal error")
    assert "secret" not in response.text


def test_an_error_does_not_stop_the_service(client, data):
    before = post(client, data["china.jpg"]).json
    for content in (b"hello", data["china.jpg"][:1000], b""):
        assert post(client, content).status_code >= 400
    assert post(client, data["china.jpg"]).json == before


# ---- loading ----


def test_while_the_model_loads_it_is_alive_but_not_ready(monkeypatch, data):
    may_load, load = threading.Event(), verdict.Detector.__init__

    def slow(self, *args, **options):
        assert may_load.wait(PATIENCE)
        load(self, *args, **options)

    monkeypatch.setattr(verdict.Detector, "__init__", slow)
    client = app.create_app(DEMO).test_client()
    assert client.get("/healthz").status_code == 200
    for response in (client.get("/readyz"), post(client, data["china.jpg"])):
        assert_error(response, 503, "still loading")
    may_load.set()
    wait_until_ready(lambda: client.get("/readyz").status_code)
    assert post(client, data["china.jpg"]).status_code == 200


def test_where_the_model_cannot_be_loaded_the_log_says_why_and_it_never_is_ready(
    monkeypatch, data, caplog
):
    def broken(self, *_, **__):
        raise EncoderError("the weights are gone")

    monkeypatch.setattr(verdict.Detector, "__init__", broken)
    client = app.create_app(DEMO).test_client()
    wait_for(lambda: "cannot be loaded" in client.get("/readyz").text)
    for response in (client.get("/readyz"), post(client, data["china.jpg"])):
        assert_error(response, 503, "cannot be loaded", "log") and "weights" not in response.text
    (failed,) = (record for record in caplog.records if record.msg == "load_failed")
    assert "the weights are gone" in failed.fields["message"]


# ---- nothing on disk ----

WRITES = []  # paths opened for writing while this is watched
WATCHED = threading.local()


def note_writes(event, arguments):
    if (
        event == "open"
        and getattr(WATCHED, "on", False)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        WRITES.append(arguments[0])


@pytest.fixture(scope="module")
def watch():
    """Function: call something -> the paths that Python opened for writing meanwhile. An audit hook stays for good."""
    sys.addaudithook(note_writes)

    def run(function, *args):
        WRITES.clear()
        WATCHED.on = True
        try:
            function(*args)
        finally:
            WATCHED.on = False
        return list(WRITES)

    return run


def megabytes():
    """A PNG of noise, 2.7 MB: beyond the size from which uploads usually go to a temporary file."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 900, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def test_an_upload_never_touches_the_disk(client, watch):
    upload = megabytes()
    assert len(upload) > 1_000_000
    assert watch(lambda: post(client, upload)) == []
    assert post(client, upload).status_code == 200


def test_the_watch_above_does_see_what_flask_does_by_itself(watch):
    app = flask.Flask("plain")
    app.post("/classify")(lambda: str(len(flask.request.files)))
    assert watch(lambda: post(app.test_client(), megabytes())) != []


# ---- settings ----


@pytest.mark.parametrize(
    "name, value",
    [
        (n, v)
        for n in ("PORT", "SLOTS", "MAX_PIXELS", "ALLOW_DEMO_MODEL")
        for v in ("eighty", "-1", "1.5", "²")
    ]
    + [("PORT", "70000"), ("BATCH_LIMIT", "0")],
)
def test_a_bad_number_is_refused_by_name_and_value(name, value):
    with pytest.raises(UsageError, match=f"{name}={value}: must be"):
        settings.read_settings({name: value})


def test_the_environment_counts_and_an_empty_setting_is_none(monkeypatch):
    monkeypatch.setenv("PORT", "1234")
    monkeypatch.setenv("HOST", "")
    settings = service_settings.read_settings()
    assert (settings["PORT"], settings["HOST"]) == (1234, "127.0.0.1")
    assert service_settings.read_settings({"PORT": 99})["PORT"] == 99


def test_help_lists_every_setting_with_its_default(script):
    result = script("app.py", "--help", MODEL_PATH="")
    assert result.returncode == 0, result.stderr
    for name, (default, text) in settings.SETTINGS.items():
        line = next(line for line in result.stdout.splitlines() if line.split()[:1] == [name])
        assert text in line and (f"(default: {default})" in line or not default)
    assert all(len(line) <= 120 for line in result.stdout.splitlines())


@pytest.fixture(params=["python app.py", "gunicorn"])
def start(request, script):
    """Function: start the service in both ways, in the project's folder -> CompletedProcess; for starts that must fail."""

    def run(**env):
        if request.param == "python app.py":
            return script("app.py", cwd=ROOT, **env)
        return subprocess.run(
            [Path(sys.executable).parent / "gunicorn", "app:create_app()"],
            cwd=ROOT,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    return run


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, ["MODEL_PATH is not set", "train_model.py"]),
        (
            {"MODEL_PATH": "nowhere.joblib"},
            ["MODEL_PATH=", "nowhere.joblib: no such file", "train_model.py"],
        ),
        ({"MODEL_PATH": "models"}, ["models is not a model file", "it is a folder"]),
        ({"MODEL_PATH": "pyproject.toml"}, ["pyproject.toml", "not a model file"]),
        ({"MODEL_PATH": str(BASELINE)}, ["demonstration", "ALLOW_DEMO_MODEL=1"]),
        ({**DEMO, "PORT": "eighty"}, ["PORT=eighty", "whole number"]),
        ({**DEMO, "PORT": "70000"}, ["PORT=70000", "65535"]),
    ],
    ids=[
        "no model",
        "missing",
        "a folder",
        "not a model",
        "demonstration",
        "port of letters",
        "port too high",
    ],
)
def test_it_does_not_start_on_a_bad_setting(start, settings, words):
    assert_one_line_error(start(**settings), *words)


def test_it_does_not_start_without_the_models_encoder(start, tmp_path):
    path = str(baseline_for(tmp_path / "m.joblib", name="mine"))
    assert_one_line_error(start(MODEL_PATH=path), "'mine'", "prepare_clip.py")


# ---- a live service ----


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    server = Live(tmp_path_factory.mktemp("live"))
    yield server
    server.stop()


def test_live_answers_are_those_of_the_test_client(live, client, data):
    for name in NAMES:
        response = live.post(data[name])
        assert (response.status_code, response.json()) == (200, post(client, data[name]).json)
        assert response.headers["X-Model-Notice"]


@pytest.mark.parametrize(
    "status, image",
    [(415, b"hello"), (422, b"\xff\xd8\xff\xe0"), (413, bytes(11_000_000))],
    ids=["text", "truncated", "too many bytes"],
)
def test_live_errors_have_the_one_shape(live, status, image):
    assert_error(live.post(image), status)


def test_live_unknown_paths_and_methods_have_it_too(live):
    assert_error(live.session.get(f"{live.url}/nowhere", timeout=PATIENCE), 404)
    assert_error(live.session.get(f"{live.url}/classify", timeout=PATIENCE), 405)


def test_requests_at_the_same_time_get_the_answers_that_they_get_alone(live, data):
    names = NAMES * 4
    alone = {name: live.post(data[name]).json() for name in NAMES}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda name: live.post(data[name]).json(), names))
    assert together == [alone[name] for name in names]
    assert (
        len({answer["confidence"] for answer in alone.values()}) > 1
    )  # so that a mix-up would show


def test_a_client_that_goes_away_does_no_harm(live, data):
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as gone:
        gone.sendall(
            b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
    assert live.post(data["china.jpg"]).status_code == 200


def test_sigterm_ends_it_with_exit_code_0_and_a_relative_model_path_is_that_of_the_users_folder(
    tmp_path,
):
    (tmp_path / "mine.joblib").write_bytes(BASELINE.read_bytes())
    server = Live(tmp_path, MODEL_PATH="mine.joblib")
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text() and "[ERROR]" not in server.log.read_text()
