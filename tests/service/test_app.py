"""The service: documented JSON for verdicts and errors, bad settings, nothing on disk."""

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
import pytest
from commands import ROOT, assert_one_line_error
from engines import picture, upload
from live import DEMO, Live, assert_error, ready_client
from made_up import BASELINE, baseline_for
from patience import PATIENCE
from PIL import Image

from detector import verdict
from detector.base.errors import UsageError
from detector.images import decoding
from detector.service import settings

NAMES = ("china.jpg", "coffee.png", "camera.png", "rocket.jpg", "astronaut.png")


def post(client, *images, field="image"):
    return upload(client, "/classify", *images, field=field)


@pytest.fixture(scope="module")
def data(photos):
    """Bytes of the photographs, {name: bytes}."""
    return {name: path.read_bytes() for name, path in photos.items()}


# ---- verdicts ----


@pytest.mark.parametrize("name", NAMES)
def test_the_verdict_is_that_of_classify_py(client, script, photos, data, name):
    response = post(client, data[name])
    assert response.status_code == 200 and response.headers["Content-Type"] == "application/json"
    assert list(response.json) == ["classification", "confidence"]
    printed = script(
        "classify.py", "--image_path", photos[name], "--model_path", BASELINE, "--json"
    ).stdout
    assert response.json == json.loads(printed)


# ---- errors of a request (of a form: test_upload.py) ----


@pytest.mark.parametrize("content", [b"", b"hello", b"%PDF-1.7 ..."], ids=["empty", "text", "pdf"])
def test_a_file_that_is_no_image_is_415(client, content):
    assert_error(post(client, content), 415, "JPEG")


@pytest.mark.parametrize("kept", [0.5, 0.001])
def test_a_truncated_image_is_422(client, data, kept):
    image = data["china.jpg"]
    assert_error(post(client, image[: int(kept * len(image))]), 422)


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("get", "/classify", "POST"),
        ("put", "/classify", "POST"),
        ("delete", "/readyz", "GET"),
        ("post", "/healthz", "GET"),
    ],
)
def test_another_method_is_405_and_names_the_allowed_methods(client, method, path, allowed):
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


def test_an_image_above_the_limit_of_pixels_is_413(limited):
    assert post(limited, png(100, 100)).status_code == 200
    assert_error(post(limited, png(100, 101)), 413, "100 x 101", "10,000")


def test_a_body_above_the_limit_of_bytes_is_413(limited, data):
    response = post(limited, data["china.jpg"])
    sent = response.request.content_length
    assert sent > len(data["china.jpg"])
    assert_error(response, 413, f"of {sent:,} bytes", "the 20,000 bytes allowed")


def test_a_body_of_unknown_length_has_the_same_limit(limited):
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


def test_a_bomb_is_refused_before_decoding(client, monkeypatch):
    def never(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(decoding, "load_rgb", never)
    assert_error(post(client, png(20_000, 20_000)), 413, "50,000,000")


def test_a_bug_is_500_without_details(client, data, monkeypatch):
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


# ---- nothing on disk ----

WRITES = []  # paths that a watched thread opened for writing
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
    """Function: call a function -> the paths that Python opened for writing meanwhile.

    Python cannot remove an audit hook.
    """
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


# 2.7 MB of noise. Flask writes uploads of this size to a temporary file.
LARGE = picture(0, 900, 1000)


def test_an_upload_never_touches_the_disk(client, watch):
    assert watch(lambda: post(client, LARGE)) == []
    assert post(client, LARGE).status_code == 200


def test_the_watch_sees_the_temporary_file_of_flask(watch):
    app = flask.Flask("plain")
    app.post("/classify")(lambda: str(len(flask.request.files)))
    assert watch(lambda: post(app.test_client(), LARGE)) != []


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


def test_settings_come_from_the_environment_and_an_empty_one_is_the_default(monkeypatch):
    monkeypatch.setenv("PORT", "1234")
    monkeypatch.setenv("HOST", "")
    values = settings.read_settings()
    assert (values["PORT"], values["HOST"]) == (1234, "127.0.0.1")
    assert settings.read_settings({"PORT": 99})["PORT"] == 99


def test_help_lists_every_setting_with_its_default(script):
    result = script("app.py", "--help", MODEL_PATH="")
    assert result.returncode == 0, result.stderr
    for name, (default, text) in settings.SETTINGS.items():
        line = next(line for line in result.stdout.splitlines() if line.split()[:1] == [name])
        assert text in line and (f"(default: {default})" in line or not default)
    assert all(len(line) <= 120 for line in result.stdout.splitlines())


@pytest.fixture(params=["python app.py", "gunicorn"])
def start(request, script):
    """Function: settings -> CompletedProcess of a start that must fail, in each of the two ways."""

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
        ({**DEMO, "CORS_ORIGINS": "app.example"}, ["CORS_ORIGINS: app.example", "https://"]),
        ({**DEMO, "SCRIPT_NAME": "detector"}, ["SCRIPT_NAME=detector", "such as /detector"]),
    ],
    ids=[
        "no model",
        "missing",
        "a folder",
        "not a model",
        "demonstration",
        "port of letters",
        "port too high",
        "an origin without a scheme",
        "a prefix without a slash",
    ],
)
def test_a_bad_setting_ends_the_start(start, settings, words):
    assert_one_line_error(start(**settings), *words)


def test_a_missing_encoder_ends_the_start(start, tmp_path):
    path = str(baseline_for(tmp_path / "m.joblib", name="mine"))
    assert_one_line_error(start(MODEL_PATH=path), "'mine'", "prepare_clip.py")


# ---- a live service ----


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    server = Live(tmp_path_factory.mktemp("live"))
    yield server
    server.stop()


def test_the_live_service_gives_the_verdicts_of_the_test_client(live, client, data):
    for name in NAMES:
        response = live.post(data[name])
        assert (response.status_code, response.json()) == (200, post(client, data[name]).json)
        assert response.headers["X-Model-Notice"]


@pytest.mark.parametrize(
    "status, image",
    [(415, b"hello"), (422, b"\xff\xd8\xff\xe0"), (413, bytes(11_000_000))],
    ids=["text", "truncated", "too many bytes"],
)
def test_errors_of_the_live_service_have_the_documented_shape(live, status, image):
    assert_error(live.post(image), status)


def test_unknown_paths_and_methods_of_the_live_service_have_it_too(live):
    assert_error(live.get("/nowhere"), 404)
    assert_error(live.get("/classify"), 405)


def test_concurrent_requests_get_the_same_verdicts_as_single_requests(live, data):
    names = NAMES * 4
    alone = {name: live.post(data[name]).json() for name in NAMES}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda name: live.post(data[name]).json(), names))
    assert together == [alone[name] for name in names]
    # Verdicts must differ, or a mix-up would pass.
    assert len({verdict["confidence"] for verdict in alone.values()}) > 1


def test_a_client_that_disconnects_does_no_harm(live, data):
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as gone:
        gone.sendall(
            b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
    assert live.post(data["china.jpg"]).status_code == 200


def test_sigterm_gives_exit_code_0_and_a_relative_model_path_works(tmp_path):
    (tmp_path / "mine.joblib").write_bytes(BASELINE.read_bytes())
    server = Live(tmp_path, MODEL_PATH="mine.joblib")
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text() and "[ERROR]" not in server.log.read_text()
