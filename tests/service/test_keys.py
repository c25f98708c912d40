"""API keys: who may ask, what stays open, what the log says of them; and feedback, which needs one."""

import hashlib
import json

import pytest
from engines import client_on, counted, keys_file, lines, picture, upload
from live import assert_error

from detector.base.errors import UsageError
from detector.service.settings import read_keys

pytestmark = pytest.mark.usefixtures("compiled_once")

TOKEN, OTHER = "correct-horse-battery", "staple-staple-staple"
OPEN = ["/", "/healthz", "/readyz", "/metrics", "/openapi.json"]
CLOSED = [
    ("post", "/classify"),
    ("post", "/classify/batch"),
    ("post", "/feedback"),
    ("get", "/model"),
]
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def client(tmp_path_factory, compiled_once):
    return client_on(
        API_KEYS_FILE=keys_file(tmp_path_factory.mktemp("keys") / "keys", ann=TOKEN, ben=OTHER)
    )


@pytest.fixture(scope="module")
def without(compiled_once):
    return client_on()


@pytest.fixture(autouse=True)
def everything_is_logged(caplog):
    caplog.set_level("INFO")


def count(client, name, **labels):
    return counted(client.application.extensions["telemetry"], name, **labels)


# ---- who may ask ----

REFUSED = {
    "none": None,
    "empty": "",
    "no token": "Bearer",
    "an empty token": "Bearer ",
    "a wrong token": "Bearer nonsense",
    "another scheme": f"Basic {TOKEN}",
    "no scheme": TOKEN,
    "the hash": f"Bearer {hashlib.sha256(TOKEN.encode()).hexdigest()}",
    "too short": f"Bearer {TOKEN[:-1]}",
    "too long": f"Bearer {TOKEN}x",
    "in capitals": f"Bearer {TOKEN.upper()}",
    "two": f"Bearer {TOKEN} {OTHER}",
    "the name": "Bearer ann",
    "not ASCII": "Bearer \u00e4\u00f6",
}


@pytest.mark.parametrize("authorization", REFUSED.values(), ids=REFUSED)
def test_without_the_right_token_it_is_401_and_says_what_to_send(client, authorization, caplog):
    before = count(client, "rejections_total", reason="unauthorized")
    for method, path in CLOSED:
        response = getattr(client, method)(
            path, headers={} if authorization is None else {"Authorization": authorization}
        )
        assert_error(response, 401, "Authorization: Bearer TOKEN")
        assert response.headers["WWW-Authenticate"] == "Bearer" and response.headers["X-Request-ID"]
    assert count(client, "rejections_total", reason="unauthorized") == before + len(CLOSED)
    assert [(line["event"], line["status"], line["key"]) for line in lines(caplog)] == [
        ("request", 401, None)
    ] * len(CLOSED)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
@pytest.mark.parametrize("name, token", [("ann", TOKEN), ("ben", OTHER)])
def test_with_the_right_token_it_answers_and_the_log_knows_whose_it_was(
    client, caplog, scheme, name, token
):
    headers = {"Authorization": f"{scheme} {token}"}
    assert upload(client, "/classify", picture(), headers=headers).status_code == 200
    assert [(line["event"], line["key"]) for line in lines(caplog)] == [
        ("verdict", name),
        ("request", name),
    ]
    caplog.clear()
    assert upload(client, "/classify/batch", b"hello", headers=headers).status_code == 200
    assert [(line["event"], line["key"]) for line in lines(caplog)] == [
        ("image_error", name),
        ("request", name),
    ]
    assert client.get("/model", headers=headers).json["version"] == "v0.0.0-dev"


@pytest.mark.parametrize("path", OPEN)
def test_some_routes_stay_open(client, without, path):
    assert client.get(path).status_code == without.get(path).status_code != 401


@pytest.mark.parametrize(
    "path", ["/nowhere", "/classify/", "/healthz/", "/Model", "/metrics/x", "/static/index.html"]
)
def test_everything_else_is_closed_even_where_there_is_nothing(client, path):
    assert_error(client.get(path), 401)


def test_without_keys_everything_is_open(without):
    assert (
        without.get("/model").status_code
        == upload(without, "/classify", picture()).status_code
        == 200
    )


def test_what_is_refused_is_not_worked_on(client, caplog):
    before = (
        count(client, "stage_seconds_count", stage="wait"),
        count(client, "stage_seconds_count", stage="read"),
    )
    assert upload(client, "/classify", picture()).status_code == 401
    assert before == (
        count(client, "stage_seconds_count", stage="wait"),
        count(client, "stage_seconds_count", stage="read"),
    )


def test_neither_tokens_nor_their_hashes_come_into_the_log_or_an_answer(client, caplog):
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    texts = [
        upload(client, "/classify", picture(), headers=BEARER).text,
        client.get("/model", headers=BEARER).text,
        client.get("/model", headers={"Authorization": f"Basic {TOKEN}"}).text,
        client.get("/metrics").text,
        client.get("/model", headers={"Authorization": f"Bearer {TOKEN} "}).text,
    ]
    said = json.dumps(lines(caplog)) + "".join(texts)
    assert TOKEN not in said and digest not in said and len(lines(caplog)) == 5


# ---- the file ----


def digest(token):
    return hashlib.sha256(token.encode()).hexdigest()


def test_keys_are_names_and_hashes_with_comments_between(tmp_path):
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
def test_a_line_that_is_no_key_is_refused_by_its_number(tmp_path, line):
    (tmp_path / "keys").write_text(f"# ours\nben {digest('2')}\n{line}\n")
    with pytest.raises(
        UsageError,
        match=(
            "API_KEYS_FILE=.*keys: line 3 (is not 'name sha256-of-token'|repeats the name)"
        ),
    ) as error:
        read_keys(tmp_path / "keys")
    assert digest("1") not in str(error.value)


@pytest.mark.parametrize("content", ["", "# none\n\n"])
def test_a_file_without_a_key_is_refused_rather_than_opening_everything(tmp_path, content):
    (tmp_path / "keys").write_text(content)
    with pytest.raises(UsageError, match="holds no key"):
        read_keys(tmp_path / "keys")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot read .*nowhere"):
        read_keys(tmp_path / "nowhere")


# ---- feedback ----

GOOD = {"request_id": "abc", "label": "fake"}


def test_feedback_is_noted_in_one_line_and_counted(client, caplog):
    for label, request_id in (
        ("real", "a"),
        ("fake", "x" * 64),
        ("fake", "abc.15"),
        ("real", "x" * 64 + ".15"),
    ):
        caplog.clear()
        before = count(client, "feedback_total", label=label)
        response = client.post(
            "/feedback", json={"request_id": request_id, "label": label}, headers=BEARER
        )
        assert (response.status_code, response.json) == (200, {"status": "noted"})
        (line,) = lines(caplog, "feedback")
        assert set(line) == {"time", "level", "event", "request_id", "label", "key"}
        assert (line["request_id"], line["label"], line["key"]) == (request_id, label, "ann")
        assert [line["event"] for line in lines(caplog)] == ["feedback", "request"]
        assert count(client, "feedback_total", label=label) == before + 1


def test_the_ids_of_a_batch_can_be_used_for_feedback(client, caplog):
    answer = upload(
        client,
        "/classify/batch",
        picture(1),
        picture(2),
        headers={**BEARER, "X-Request-ID": "x" * 64},
    )
    ids = [line["request_id"] for line in lines(caplog, "verdict")]
    assert ids == [f"{answer.headers['X-Request-ID']}.{number}" for number in (0, 1)]
    for request_id in ids:
        assert (
            client.post(
                "/feedback", json={"request_id": request_id, "label": "real"}, headers=BEARER
            ).status_code
            == 200
        )


def test_feedback_without_keys_set_is_403_and_says_how_to_allow_it(without, caplog):
    assert_error(without.post("/feedback", json=GOOD), 403, "API_KEYS_FILE")
    assert_error(without.post("/feedback", json=GOOD, headers=BEARER), 403, "API_KEYS_FILE")
    assert lines(caplog, "feedback") == []


BAD = {
    "empty": "",
    "no json": "label=fake",
    "a list": "[]",
    "a text": '"fake"',
    "null": "null",
    "no label": '{"request_id": "a"}',
    "no id": '{"label": "fake"}',
    "another label": '{"request_id": "a", "label": "Fake"}',
    "a label that is a number": '{"request_id": "a", "label": 1}',
    "a label that is a list": '{"request_id": "a", "label": ["fake"]}',
    "more than is asked for": '{"request_id": "a", "label": "fake", "x": 1}',
    "an id that is a number": '{"request_id": 1, "label": "fake"}',
    "an empty id": '{"request_id": "", "label": "fake"}',
    "an id too long": json.dumps({"request_id": "x" * 73, "label": "fake"}),
    "an id with a line end": '{"request_id": "a\\n", "label": "fake"}',
    "an id with markup": '{"request_id": "<b>", "label": "fake"}',
    "not UTF-8": b'{"request_id": "\xff", "label": "fake"}',
    "a depth without end": "[" * 1900,
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_feedback_that_is_not_as_asked_for_is_400_and_leaves_no_line(client, caplog, body):
    response = client.post("/feedback", data=body, content_type="application/json", headers=BEARER)
    assert_error(response, 400, "request_id", "real", "fake")
    assert lines(caplog, "feedback") == []


def test_feedback_that_is_large_is_413_before_it_is_parsed(client):
    assert_error(
        client.post(
            "/feedback", data="[" * 100_000, content_type="application/json", headers=BEARER
        ),
        413,
        "2,000 bytes",
    )


def test_feedback_that_does_not_say_it_is_json_is_400(client):
    assert_error(
        client.post("/feedback", data=json.dumps(GOOD), headers=BEARER), 400, "application/json"
    )
