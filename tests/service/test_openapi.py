"""The OpenAPI document: valid, complete, and in line with the app's responses and limits."""

import io

import pytest
from engines import BEARER, client_on, engine_of, picture, upload
from openapi_document import (
    DOCUMENT,
    OPERATIONS,
    assert_as_documented,
    documented,
    examples,
    faults,
    resolve,
)
from openapi_spec_validator import OpenAPIV31SpecValidator

from detector.images import decoding, formats
from detector.service import app
from detector.service.settings import SETTINGS
from detector.service.upload import FIELD_BYTES

pytestmark = pytest.mark.usefixtures("compiled_once")

VERDICTS = ("/classify", "/classify/batch")
UPLOADS = (*VERDICTS, "/explain")
EXAMPLES = list(examples(DOCUMENT))
FORM = "multipart/form-data; boundary=x"


@pytest.fixture(scope="module")
def client(compiled_once):
    return client_on(MAX_UPLOAD_BYTES="20000")


@pytest.fixture(scope="module")
def keyed(api_keys, compiled_once):
    return client_on(API_KEYS_FILE=api_keys, MAX_UPLOAD_BYTES="20000")


# ---- the document ----


def test_it_is_valid_openapi_3_1():
    assert list(OpenAPIV31SpecValidator(DOCUMENT).iter_errors()) == []
    assert DOCUMENT["openapi"].startswith("3.1.")


def test_the_service_serves_it(client):
    assert client.get("/openapi.json").json == DOCUMENT


def test_its_operations_are_the_routes(client):
    """HEAD and OPTIONS exist for every route, as its introduction says."""
    routes = {
        (method.lower(), rule.rule)
        for rule in client.application.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert routes == set(OPERATIONS)
    for method in ("`HEAD`", "`OPTIONS`"):
        assert method in DOCUMENT["info"]["description"]


def test_it_documents_which_routes_need_a_token():
    security = {path: operation["security"] for (_, path), operation in OPERATIONS.items()}
    assert {path for path, schemes in security.items() if schemes == []} == set(app.OPEN)
    assert {path for path, schemes in security.items() if schemes == [{"token": []}]} == {
        "/feedback"
    }


@pytest.mark.parametrize("where, schema, value", EXAMPLES, ids=[where for where, _, _ in EXAMPLES])
def test_every_example_fits_its_schema(where, schema, value):
    assert faults(schema, value) == []


def test_every_json_body_and_every_error_has_an_example():
    bodies = [
        resolve(response)
        for operation in OPERATIONS.values()
        for response in operation["responses"].values()
    ]
    for body in bodies:
        content = body["content"].get("application/json")
        if content and "OpenAPI" not in body["description"]:
            assert {"example", "examples"} & set(content), body["description"]


def test_the_introduction_lists_the_limits_with_settings_and_defaults():
    words = DOCUMENT["info"]["description"]
    for name in (
        "MAX_UPLOAD_BYTES",
        "MAX_PIXELS",
        "BATCH_LIMIT",
        "BODY_TIMEOUT_S",
        "QUEUE_LIMIT",
        "QUEUE_TIMEOUT_S",
    ):
        assert f"(`{name}`, {int(SETTINGS[name][0]):,})" in words
    for limit in (f"{FIELD_BYTES:,} bytes", f"{decoding.MAX_ASPECT} times the other"):
        assert limit in words
    for name in formats.FORMATS:
        assert name.lower() in words.lower()


def test_it_explains_confidence():
    words = DOCUMENT["components"]["schemas"]["Confidence"]["description"]
    assert "Calibrated probability of the returned class, at equal shares of both" in words
    assert "below 0.5" in words


# ---- the two shapes of a verdict ----

PLAIN = {"classification": "real", "confidence": 0.95}


def verdict_schema():
    return documented("post", "/classify", 200)["content"]["application/json"]["schema"]


def test_a_plain_verdict_has_exactly_two_keys():
    assert faults(verdict_schema(), PLAIN) == []
    for wrong in (
        {**PLAIN, "note": 1},
        {**PLAIN, "p_fake": 0.05},
        {"classification": "real"},
        {"confidence": 0.95},
        {},
        [PLAIN],
        {**PLAIN, "classification": "unknown"},
        {**PLAIN, "confidence": 1.2},
        {**PLAIN, "confidence": "0.95"},
        {**PLAIN, "error": "both"},
    ):
        assert faults(verdict_schema(), wrong), wrong


def test_a_detailed_verdict_has_all_of_its_keys():
    content = documented("post", "/classify", 200)["content"]["application/json"]
    whole = content["examples"]["details"]["value"]
    assert faults(verdict_schema(), whole) == []
    for missing in whole:
        rest = {name: value for name, value in whole.items() if name != missing}
        assert faults(verdict_schema(), rest), missing
    assert faults(verdict_schema(), {**whole, "more": 1})


# ---- responses ----


def broken(*_, **__):
    raise RuntimeError("secret")


def short(client, path, headers):
    """Send a body that ends before its stated length, as a slow body does."""
    return client.post(
        path,
        input_stream=io.BytesIO(b"--x\r\n"),
        headers=headers,
        environ_overrides={"CONTENT_LENGTH": "500"},
        content_type="application/json" if path == "/feedback" else FORM,
    )


def failing(client, monkeypatch, method, path):
    """A response of the route with a bug in it."""
    endpoint, _ = client.application.url_map.bind("").match(path, method=method.upper())
    monkeypatch.setitem(client.application.view_functions, endpoint, broken)
    return client.open(path, method=method.upper())


def unready(client, monkeypatch, method, path):
    monkeypatch.setattr(engine_of(client), "detector", None)
    return client.open(path, method=method.upper())


def ask(client, keyed, monkeypatch, method, path, status):
    """A response with this status."""
    if status in (500, 503):
        return (failing if status == 500 else unready)(client, monkeypatch, method, path)
    if status == 401:
        return keyed.open(path, method=method.upper())
    if status == 408:
        return short(keyed, path, BEARER)
    if status == 413:
        kind = "application/json" if path == "/feedback" else FORM
        return keyed.post(path, data=bytes(30_000), headers=BEARER, content_type=kind)
    if status == 415 and path != "/classify":
        return keyed.post(path, data=b"x", headers={**BEARER, "Content-Encoding": "gzip"})
    if path in UPLOADS:
        image = {200: picture(), 415: b"hello", 422: picture()[:-500]}.get(status)
        return upload(client, path, *([] if image is None else [image]))
    if path == "/feedback" and status != 403:
        return keyed.post(
            path,
            json={"request_id": "a.0", "label": "fake" if status == 200 else "maybe"},
            headers=BEARER,
        )
    return client.open(
        path,
        method=method.upper(),
        json={"request_id": "a", "label": "fake"} if status == 403 else None,
    )


@pytest.mark.parametrize(
    "method, path, status",
    [
        (method, path, int(status))
        for (method, path), operation in OPERATIONS.items()
        for status in operation["responses"]
    ],
)
def test_each_documented_status_has_the_documented_response(
    client, keyed, monkeypatch, method, path, status
):
    response = ask(client, keyed, monkeypatch, method, path, status)
    assert response.status_code == status, response.text
    assert_as_documented(response, documented(method, path, status))


@pytest.mark.parametrize("query", ["", "?details=1"])
@pytest.mark.parametrize("path", VERDICTS)
def test_verdicts_with_and_without_details_are_as_documented(client, path, query):
    response = upload(client, path + query, picture())
    assert_as_documented(response, documented("post", path, 200))
    first = response.json["results"][0] if "results" in response.json else response.json
    assert (len(first) > 2) == bool(query)


def test_a_batch_with_errors_in_it_is_as_documented(client):
    response = upload(
        client, "/classify/batch?details=1", picture(), b"hello", picture()[:-500], b""
    )
    assert_as_documented(response, documented("post", "/classify/batch", 200))
    assert ["error" in result for result in response.json["results"]] == [False, True, True, True]


@pytest.mark.parametrize(
    "method, path, name",
    [
        ("get", "/nowhere", "NotFound"),
        ("post", "/openapi.json/", "NotFound"),
        *[("delete", path, "MethodNotAllowed") for path in DOCUMENT["paths"]],
    ],
)
def test_unknown_paths_and_other_methods_are_as_documented(client, method, path, name):
    response = client.open(path, method=method.upper())
    assert response.status_code == {"NotFound": 404, "MethodNotAllowed": 405}[name]
    assert_as_documented(response, DOCUMENT["components"]["responses"][name])


def test_it_lists_every_status_of_the_app():
    statuses = {
        int(status) for operation in OPERATIONS.values() for status in operation["responses"]
    } | {404, 405}
    assert statuses == {200, 400, 401, 403, 404, 405, 408, 413, 415, 422, 500, 503}
