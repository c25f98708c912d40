"""API keys: routes that need a token, routes that stay open, log lines; and feedback."""

import hashlib
import json

import pytest
from engines import BEARER, OTHER, TOKEN, counted, engine_of, lines, picture, upload
from live import assert_error

from detector.base.errors import UsageError
from detector.service.settings import read_keys

pytestmark = pytest.mark.usefixtures("compiled_once")

OPEN = ["/", "/healthz", "/readyz", "/metrics", "/openapi.json"]
CLOSED = [
    ("post", "/classify"),
    ("post", "/classify/batch"),
    ("post", "/explain"),
    ("post", "/feedback"),
    ("get", "/model"),
]


def digest(token):
    return hashlib.sha256(token.encode()).hexdigest()


def count(keyed, name, **labels):
    return counted(engine_of(keyed).telemetry, name, **labels)


# ---- tokens ----

REFUSED = {
    "none": None,
    "empty": "",
    "no token": "Bearer",
    "an empty token": "Bearer ",
    "a wrong token": "Bearer nonsense",
    "another scheme": f"Basic {TOKEN}",
    "no scheme": TOKEN,
    "the hash": f"Bearer {digest(TOKEN)}",
    "too short": f"Bearer {TOKEN[:-1]}",
    "too long": f"Bearer {TOKEN}x",
    "in capitals": f"Bearer {TOKEN.upper()}",
    "two": f"Bearer {TOKEN} {OTHER}",
    "the name": "Bearer ann",
    "not ASCII": "Bearer \u00e4\u00f6",
}


@pytest.mark.parametrize("authorization", REFUSED.values(), ids=REFUSED)
def test_without_a_known_token_the_response_is_401(keyed, authorization, caplog):
    before = count(keyed, "rejections_total", reason="unauthorized")
    for method, path in CLOSED:
        headers = {} if authorization is None else {"Authorization": authorization}
        response = keyed.open(path, method=method.upper(), headers=headers)
        assert_error(response, 401, "Authorization: Bearer TOKEN")
        assert response.headers["WWW-Authenticate"] == "Bearer" and response.headers["X-Request-ID"]
    assert count(keyed, "rejections_total", reason="unauthorized") == before + len(CLOSED)
    assert [(line["event"], line["status"], line["key"]) for line in lines(caplog)] == [
        ("request", 401, None)
    ] * len(CLOSED)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
@pytest.mark.parametrize("name, token", [("ann", TOKEN), ("ben", OTHER)])
def test_with_a_known_token_the_log_names_its_key(keyed, caplog, scheme, name, token):
    headers = {"Authorization": f"{scheme} {token}"}
    assert upload(keyed, "/classify", picture(), headers=headers).status_code == 200
    events = [(line["event"], line["key"]) for line in lines(caplog)]
    assert events == [("verdict", name), ("request", name)]
    caplog.clear()
    assert upload(keyed, "/classify/batch", b"hello", headers=headers).status_code == 200
    events = [(line["event"], line["key"]) for line in lines(caplog)]
    assert events == [("image_error", name), ("request", name)]
    assert keyed.get("/model", headers=headers).json["version"] == "v0.0.0-dev"


@pytest.mark.parametrize("path", OPEN)
def test_the_page_the_probes_and_the_document_stay_open(keyed, client, path):
    assert keyed.get(path).status_code == client.get(path).status_code != 401


@pytest.mark.parametrize(
    "path", ["/nowhere", "/classify/", "/healthz/", "/Model", "/metrics/x", "/static/index.html"]
)
def test_unknown_paths_need_a_token_too(keyed, path):
    assert_error(keyed.get(path), 401)


def test_an_upload_without_a_token_is_neither_read_nor_queued(keyed):
    def counts():
        return [count(keyed, "stage_seconds_count", stage=stage) for stage in ("wait", "read")]

    before = counts()
    assert upload(keyed, "/classify", picture()).status_code == 401
    assert counts() == before


def test_no_token_and_no_hash_is_in_the_log_or_a_response(keyed, caplog):
    texts = [
        upload(keyed, "/classify", picture(), headers=BEARER).text,
        keyed.get("/model", headers=BEARER).text,
        keyed.get("/model", headers={"Authorization": f"Basic {TOKEN}"}).text,
        keyed.get("/metrics").text,
        keyed.get("/model", headers={"Authorization": f"Bearer {TOKEN} "}).text,
    ]
    written = json.dumps(lines(caplog)) + "".join(texts)
    assert TOKEN not in written and digest(TOKEN) not in written and len(lines(caplog)) == 5


# ---- the file ----


def test_a_file_of_names_hashes_and_comments_is_read(tmp_path):
    (tmp_path / "keys").write_text(
        f"# ours\n\nann {digest('1')}  # until May\n  ben\t{digest('2').upper()}\r\n"
    )
    assert read_keys(tmp_path / "keys") == {
        name: hashlib.sha256(token).digest() for name, token in (("ann", b"1"), ("ben", b"2"))
    }
    assert read_keys("") == {}


@pytest.mark.parametrize(
    "line",
    [
        "ann",
        digest("1"),
        f"ann {digest('1')[:-2]}",
        f"ann {digest('1')}00",
        "ann " + "g" * 64,
        f"ann {digest('1')} x",
        f"ben {digest('1')}",
    ],
    ids=["no hash", "no name", "short", "long", "no hex", "three words", "a name twice"],
)
def test_a_line_that_is_no_key_is_refused_with_its_number(tmp_path, line):
    (tmp_path / "keys").write_text(f"# ours\nben {digest('2')}\n{line}\n")
    fault = "(is not 'name sha256-of-token'|repeats the name)"
    with pytest.raises(UsageError, match=f"API_KEYS_FILE=.*keys: line 3 {fault}") as error:
        read_keys(tmp_path / "keys")
    assert digest("1") not in str(error.value)


@pytest.mark.parametrize("content", ["", "# none\n\n"])
def test_a_file_without_a_key_is_refused(tmp_path, content):
    (tmp_path / "keys").write_text(content)
    with pytest.raises(UsageError, match="holds no key"):
        read_keys(tmp_path / "keys")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot read .*nowhere"):
        read_keys(tmp_path / "nowhere")


# ---- feedback ----

GOOD = {"request_id": "abc", "label": "fake"}


def test_feedback_is_logged_and_counted(keyed, caplog):
    for label, request_id in (
        ("real", "a"),
        ("fake", "x" * 64),
        ("fake", "abc.15"),
        ("real", "x" * 64 + ".15"),
    ):
        caplog.clear()
        before = count(keyed, "feedback_total", label=label)
        response = keyed.post(
            "/feedback", json={"request_id": request_id, "label": label}, headers=BEARER
        )
        assert (response.status_code, response.json) == (200, {"status": "noted"})
        (line,) = lines(caplog, "feedback")
        assert set(line) == {"time", "level", "event", "request_id", "label", "key"}
        assert (line["request_id"], line["label"], line["key"]) == (request_id, label, "ann")
        assert [line["event"] for line in lines(caplog)] == ["feedback", "request"]
        assert count(keyed, "feedback_total", label=label) == before + 1


def test_feedback_without_keys_is_403_and_names_the_setting(client, caplog):
    assert_error(client.post("/feedback", json=GOOD), 403, "API_KEYS_FILE")
    assert_error(client.post("/feedback", json=GOOD, headers=BEARER), 403, "API_KEYS_FILE")
    assert lines(caplog, "feedback") == []


JSON = "application/json"
SHAPE, LABEL, ID = "other keys", "neither 'real' nor 'fake'", "the request_id is not of 1 to 72"
BAD = {
    "empty": ("", JSON, "no JSON object"),
    "no json": ("label=fake", JSON, "no JSON object"),
    "a list": ("[]", JSON, "no JSON object"),
    "a text": ('"fake"', JSON, "no JSON object"),
    "null": ("null", JSON, "no JSON object"),
    "not UTF-8": (b'{"request_id": "\xff", "label": "fake"}', JSON, "no JSON object"),
    "a depth without end": ("[" * 1900, JSON, "no JSON object"),
    "no type": (json.dumps(GOOD), None, "without a Content-Type"),
    "urlencoded": ("label=fake", "application/x-www-form-urlencoded", "urlencoded'"),
    "no label": ('{"request_id": "a"}', JSON, SHAPE),
    "no id": ('{"label": "fake"}', JSON, SHAPE),
    "another key": ('{"request_id": "a", "label": "fake", "x": 1}', JSON, SHAPE),
    "another label": ('{"request_id": "a", "label": "Fake"}', JSON, LABEL),
    "a label that is a number": ('{"request_id": "a", "label": 1}', JSON, LABEL),
    "a label that is a list": ('{"request_id": "a", "label": ["fake"]}', JSON, LABEL),
    "an id that is a number": ('{"request_id": 1, "label": "fake"}', JSON, ID),
    "an empty id": ('{"request_id": "", "label": "fake"}', JSON, ID),
    "an id too long": (json.dumps({"request_id": "x" * 73, "label": "fake"}), JSON, ID),
    "an id with a line end": ('{"request_id": "a\\n", "label": "fake"}', JSON, ID),
    "an id with markup": ('{"request_id": "<b>", "label": "fake"}', JSON, ID),
}


@pytest.mark.parametrize("body, kind, fault", BAD.values(), ids=BAD)
def test_bad_feedback_is_400_and_leaves_no_line(keyed, caplog, body, kind, fault):
    response = keyed.post("/feedback", data=body, content_type=kind, headers=BEARER)
    assert_error(response, 400, fault, "send Content-Type: application/json", '"request_id"')
    assert lines(caplog, "feedback") == []


def test_large_feedback_is_413_before_it_is_parsed(keyed):
    response = keyed.post("/feedback", data="[" * 100_000, content_type=JSON, headers=BEARER)
    assert_error(response, 413, "2,000 bytes")
