"""Unusual uploads: clear forms are accepted, and an error names what arrived and what to send."""

import base64
import gzip
import io
import json

import pytest
from engines import BEARER, counted, engine_of, lines, picture
from live import assert_error

from detector.service.upload import FIELD_BYTES, Decoder

pytestmark = pytest.mark.usefixtures("compiled_once")

PATHS = ("/classify", "/classify/batch")
FORM = "multipart/form-data; boundary=x"
END = b"--x--\r\n"
PICTURE = picture()
LARGE = picture(0, 600, 420)  # 750 kB, more than any other field may have


def part(body, name=b'name="image"', filename=None, *headers):
    file = b"" if filename is None else b'; filename="%s"' % filename
    first = b"Content-Disposition: form-data; " + name + file
    return b"--x\r\n" + b"\r\n".join([first, *headers]) + b"\r\n\r\n" + body + b"\r\n"


def post(client, body, path="/classify"):
    return client.post(path, data=body, content_type=FORM)


def verdict_of(client, body, path="/classify"):
    response = post(client, body, path)
    assert response.status_code == 200, response.text
    return response.json if path == "/classify" else response.json["results"]


# ---- accepted ----


@pytest.mark.parametrize("data", [PICTURE, LARGE], ids=["small", "large"])
def test_an_image_without_a_file_name_is_an_image(client, data):
    for path, count in (("/classify", 1), ("/classify/batch", 3)):
        named = part(data, filename=b"a.png") * count + END
        assert verdict_of(client, part(data) * count + END, path) == verdict_of(client, named, path)


def test_an_image_without_a_file_name_has_the_limit_of_every_body(client):
    response = post(client, part(bytes(11_000_000)) + END)
    assert_error(response, 413, "of 11,000,", "10,485,760 bytes")


@pytest.mark.parametrize(
    "form",
    [
        part(PICTURE, filename=b"M\xfcller.png"),
        part(PICTURE, filename="Мама.png".encode("cp1251")),
        part(PICTURE, filename=b"a" * 5000),
        part(PICTURE, b"name=image", b"a"),
        part(PICTURE, b"name=\"image\"; filename*=utf-8''%d0%9c"),
        part(PICTURE, b'name="image"', b"a", b"Content-Type: image/png; charset=utf-16"),
        part(
            PICTURE,
            b'name="image"',
            b"a",
            b"Content-Transfer-Encoding: binary",
            b"Content-Length: 3",
        ),
        b"a preamble\r\n" + part(PICTURE, filename=b"a"),
        part(b"my note", b'name="note"') + part(PICTURE, filename=b"a"),
        part(PICTURE, b'name="file"', b"a") + part(PICTURE, filename=b"a"),
        part(LARGE, b'name="file"', b"a") + part(PICTURE, filename=b"a"),
    ],
    ids=[
        "latin-1",
        "cp1251",
        "long",
        "no quotes",
        "encoded",
        "charset",
        "a length that lies",
        "preamble",
        "note",
        "two files",
        "a large file",
    ],
)
def test_names_types_and_other_parts_do_not_matter(client, form):
    assert verdict_of(client, form + END) == verdict_of(client, part(PICTURE, filename=b"a") + END)


@pytest.mark.parametrize("boundary", ["x", '"x"', "x; charset=utf-8", "x ; foo=bar"])
def test_the_boundary_may_be_written_in_several_ways(client, boundary):
    sent = client.post(
        "/classify",
        data=part(PICTURE, filename=b"a") + END,
        content_type=f"Multipart/Form-Data; boundary={boundary}",
    )
    assert sent.status_code == 200


def test_a_chunked_form_is_a_form(client):
    sent = client.post(
        "/classify",
        input_stream=io.BytesIO(part(LARGE) + END),
        content_type=FORM,
        headers={"Transfer-Encoding": "chunked"},
        environ_overrides={"wsgi.input_terminated": True},
    )
    assert sent.json == verdict_of(client, part(LARGE) + END)


# ---- refused ----

WHOLE = part(PICTURE, filename=b"a")
REFUSED = {
    "no body": (b"", None, "no body"),
    "a form of no bytes": (b"", FORM, "no body"),
    "no type": (PICTURE, None, "without a Content-Type"),
    "a raw image": (PICTURE, "image/jpeg", "'image/jpeg'"),
    "bytes": (PICTURE, "application/octet-stream", "'application/octet-stream'"),
    "JSON": (b'{"image": "iVBORw0KGgo="}', "application/json", "'application/json'"),
    "text": (b"image", "text/plain; charset=x", "'text/plain'"),
    "urlencoded": (
        b"image=%40photo.jpg",
        "application/x-www-form-urlencoded",
        "'application/x-www-form-urlencoded'",
    ),
    "another multipart": (WHOLE + END, "multipart/mixed; boundary=x", "'multipart/mixed'"),
    "a long type": (b"a", "a" * 5000 + "/b", "'aaa"),
    "no boundary": (
        WHOLE + END,
        "multipart/form-data",
        "without its boundary: leave the Content-Type to the client",
    ),
    "an empty boundary": (WHOLE + END, "multipart/form-data; boundary=", "without its boundary"),
    "another boundary": (WHOLE + END, "multipart/form-data; boundary=y", "not in the body"),
    "a foreign boundary": (
        WHOLE + END,
        'multipart/form-data; boundary="\u00fc"',
        "not in the body",
    ),
    "a raw image as a form": (LARGE, FORM, "not in the body"),
    "no closing boundary": (WHOLE, FORM, "without its closing boundary"),
    "cut off in the image": (WHOLE[:-500], FORM, "without its closing boundary"),
    "cut off in the headers": (
        b'--x\r\nContent-Disposition: form-data; name="im',
        FORM,
        "do not end",
    ),
    "headers without end": (b"--x\r\n" + b"A: b\r\n" * 200_000, FORM, "too long"),
    "no disposition": (b"--x\r\nA: b\r\n\r\nabc\r\n" + END, FORM, "no Content-Disposition"),
    "an empty form": (END, FORM, "the form is empty"),
    "another field": (part(PICTURE, b'name="file"', b"a") + END, FORM, "only 'file'"),
    "other fields": (
        part(PICTURE, b'name="images[]"', b"a") + part(b"a", b'name="Image"') + END,
        FORM,
        "only 'Image', 'images[]'",
    ),
    "a long name": (
        part(PICTURE, b'name="' + b"n" * 5000 + b'"', b"a") + END,
        FORM,
        "only one with another name",
    ),
    "no name": (part(PICTURE, b"", b"a") + END, FORM, "only one with another name"),
    "curl without @": (part(b"photo.jpg") + END, FORM, "9 bytes of text"),
    "a data URL": (part(b"data:image/png;base64,iVBORw0") + END, FORM, "29 bytes of text"),
    "no file chosen": (part(b"", filename=b"") + END, FORM, "is empty"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body, kind, arrived", REFUSED.values(), ids=REFUSED)
def test_the_error_names_what_arrived_and_what_to_send(client, caplog, path, body, kind, arrived):
    telemetry = engine_of(client).telemetry
    before = counted(telemetry, "requests_total", route=path, status=400)
    response = client.post(
        path, input_stream=io.BytesIO(body), content_length=len(body), content_type=kind
    )
    assert_error(response, 400, arrived, f"curl -F image=@FILE URL{path}")
    assert len(response.text) < 300
    assert counted(telemetry, "requests_total", route=path, status=400) == before + 1
    (line,) = lines(caplog)
    assert (line["event"], line["status"]) == ("request", 400)
    assert line["error"] == response.json["error"]


def test_of_headers_without_end_no_more_is_kept_than_a_field_may_have(client, monkeypatch):
    receive, kept = Decoder.receive_data, []

    def count(decoder, data):
        receive(decoder, data)
        kept.append(len(decoder.buffer))

    monkeypatch.setattr(Decoder, "receive_data", count)
    body = b"--x\r\n" + b"A: b\r\n" * 500_000
    assert_error(post(client, body), 400, "too long")
    assert FIELD_BYTES < max(kept) <= FIELD_BYTES + (1 << 16)


def test_a_file_of_text_is_no_image_and_no_missing_file(client):
    assert_error(post(client, part(b"hello", filename=b"a.txt") + END), 415, "not an image")


@pytest.mark.parametrize("start", [b"", b"data:image/png;base64,"], ids=["bare", "data URL"])
def test_a_file_of_base64_is_named_with_what_to_send(client, start):
    body = part(start + base64.b64encode(PICTURE), filename=b"a.png") + END
    assert_error(post(client, body), 415, "base64 text of an image", "decode it", "send the bytes")


@pytest.mark.parametrize("text", ["photo.jpg", "SECRET"])
def test_the_text_of_a_field_is_not_repeated(client, text):
    assert text not in post(client, part(text.encode()) + END).text


@pytest.mark.parametrize(
    "path, count, status, words",
    [
        ("/classify", 2, 400, "2 fields 'image', expected 1: send several to /classify/batch"),
        ("/classify", 17, 400, "17 fields 'image'"),
        ("/classify", 18, 413, "more than 16 images"),
        ("/classify/batch", 17, 413, "17 images, at most 16"),
        ("/classify/batch", 18, 413, "more than 16 images"),
    ],
)
def test_the_error_names_the_number_of_images(client, path, count, status, words):
    assert_error(post(client, WHOLE * count + END, path), status, words)


def test_too_many_fields_are_413(client):
    notes = b"".join(part(b"a", b'name="n%d"' % i) for i in range(17))
    assert_error(post(client, notes + WHOLE + END), 413, "more than 17 fields")


def test_a_large_text_field_is_413_with_its_name_and_the_limit(client):
    body = part(b"a" * 600_000, b'name="note"') + WHOLE + END
    assert_error(post(client, body), 413, "'note'", "500,000 bytes")


@pytest.mark.parametrize("path", [*PATHS, "/feedback"])
@pytest.mark.parametrize(
    "coding, status",
    [
        ("gzip", 415),
        ("br", 415),
        ("GZIP, gzip", 415),
        ("x" * 5000, 415),
        ("identity", None),
        ("", None),
    ],
)
def test_a_compressed_body_is_415(keyed, path, coding, status):
    feedback = json.dumps({"request_id": "a", "label": "fake"}).encode()
    body, kind = (feedback, "application/json") if path == "/feedback" else (WHOLE + END, FORM)
    sent = keyed.post(
        path,
        data=gzip.compress(body) if status else body,
        content_type=kind,
        headers={"Content-Encoding": coding, **BEARER},
    )
    if status is None:
        assert sent.status_code == 200
    else:
        assert_error(sent, status, "Content-Encoding", "uncompressed")
