"""Hostile uploads: huge forms, torn forms, wrong names, and one file of each kind.

test_hostile_http.py has hostile HTTP. The other files of this folder test all hostile files at the
decoder.
"""

import base64
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from crafted import BOMBS, POLYGLOTS
from engines import client_on, upload
from live import assert_error
from patience import PATIENCE
from written import FILES, encode, picture

from detector.service import upload as reading
from detector.service.upload import FIELD_BYTES, Part

pytestmark = pytest.mark.usefixtures("compiled_once")

LIMIT = 10_485_760
PATHS = ("/classify", "/classify/batch")
VERDICT = ["classification", "confidence"]


@pytest.fixture(scope="module")
def client(compiled_once):
    return client_on()


def part(name, body, *headers, filename=None):
    """One part of a form, as bytes."""
    named = f'form-data; name="{name}"' + ("" if filename is None else f'; filename="{filename}"')
    lines = [f"Content-Disposition: {named}", *headers]
    return b"--x\r\n" + "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body + b"\r\n"


def form(client, *parts, path="/classify"):
    return client.post(
        path, data=b"".join(parts) + b"--x--\r\n", content_type="multipart/form-data; boundary=x"
    )


def file(body, *headers, filename="a.jpg"):
    return part("image", body, *headers, filename=filename)


def photo():
    return FILES["JPEG"]()


# ---- huge and torn forms ----


@pytest.mark.parametrize("path", PATHS)
def test_an_upload_may_have_ten_mebibytes_and_no_byte_more(client, path):
    frame = len(file(b"") + b"--x--\r\n")
    assert form(client, file(bytes(LIMIT - frame)), path=path).status_code == (
        415 if path == "/classify" else 200
    )
    assert_error(form(client, file(bytes(LIMIT - frame + 1)), path=path), 413, "10,485,760 bytes")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [18, 1000, 100_000])
def test_the_first_part_too_many_is_413_and_the_last_that_is_read(client, monkeypatch, path, count):
    made = []
    monkeypatch.setattr(reading, "Part", lambda event: made.append(event) or Part(event))
    assert_error(form(client, *[file(b"")] * count, path=path), 413, "more than 16 images")
    fields = [part(f"n{i}", b"") for i in range(count)]
    assert_error(form(client, *fields, path=path), 413, "more than 17 fields")
    assert len(made) == 2 * 18


@pytest.mark.parametrize(
    "size, status", [(FIELD_BYTES - 100, 200), (FIELD_BYTES + 100, 413), (9_000_000, 413)]
)
def test_a_text_field_has_a_limit_of_bytes(client, size, status):
    for parts in (
        [part("note", b"a" * size), file(photo())],
        [file(photo()), part("note", b"a" * size)],
    ):
        response = form(client, *parts)
        assert response.status_code == status
        assert status == 200 or "500,000 bytes" in response.json["error"]


def test_a_form_of_another_kind_is_no_upload(client):
    for data, kind in (
        (b"image=" + b"a" * 9_000_000, "text/plain"),
        (b"<image/>", "text/xml"),
        (photo(), "image/jpeg"),
        (b"image=" + photo().hex().encode(), "application/x-www-form-urlencoded"),
        (photo(), None),
        (file(photo()) + b"--x--\r\n", "multipart/mixed; boundary=x"),
    ):
        named = repr(kind.split(";")[0]) if kind else "without a Content-Type"
        response = client.post("/classify", data=data, content_type=kind)
        assert_error(response, 400, "'image'", named)


@pytest.mark.parametrize(
    "headers",
    [[f"X-{i}: 1" for i in range(10_000)], ["X: " + "a" * 1_000_000], ["X" * 100_000], [": : :"]],
    ids=["ten thousand", "one of a megabyte", "no colon", "nothing but colons"],
)
def test_headers_of_a_part_may_be_anything(client, headers):
    assert form(client, file(photo(), *headers)).status_code in (200, 400, 413)


TORN = {
    "nothing": b"",
    "a boundary": b"--x",
    "a line": b"--x\r\n",
    "an empty part": b"--x\r\n\r\n",
    "its end": b"--x--",
    "empty lines": b"\r\n" * 100_000,
    "boundaries": b"--x\r\n" * 100_000,
    "a torn file": file(photo())[:-400],
    "another boundary": file(photo()).replace(b"--x", b"--y"),
    "hyphens": b"-" * 100_000,
    "a torn header": b'--x\r\nContent-Disposition: form-data; name="image',
}


@pytest.mark.parametrize("body", TORN.values(), ids=TORN)
def test_a_torn_form_is_400(client, body):
    kind = "multipart/form-data; boundary=x"
    assert_error(client.post("/classify", data=body, content_type=kind), 400)


def test_a_form_inside_a_form_is_no_picture(client):
    inner = part("image", photo(), filename="a.jpg") + b"--x--\r\n"
    outer = inner.replace(b"--x", b"--y")
    assert_error(form(client, file(outer, "Content-Type: multipart/mixed; boundary=y")), 415)


@pytest.mark.parametrize("coding", ["base64", "quoted-printable", "gzip"])
def test_the_transfer_encoding_of_a_part_is_not_decoded(client, coding):
    coded = file(base64.b64encode(photo()), f"Content-Transfer-Encoding: {coding}")
    assert_error(form(client, coded), 415)


# ---- the content decides ----


NAMES = ("photo.png", "photo.exe", "photo.jpg.php", "../../etc/passwd", "", "a\\b", "a" * 3000)
KINDS = ("image/png", "text/html", "application/x-msdownload", "nonsense", "")


@pytest.mark.parametrize(
    "name, kind",
    [*((name, "image/png") for name in (*NAMES, "\u202egpj.exe")), *(("a.jpg", k) for k in KINDS)],
)
def test_a_jpeg_is_a_jpeg_whatever_its_name_and_type(client, name, kind):
    response = form(client, file(photo(), f"Content-Type: {kind}", filename=name))
    assert response.status_code == 200 and response.json == form(client, file(photo())).json


def test_a_text_is_no_jpeg_whatever_its_name_and_type(client):
    text = file(b"no picture", "Content-Type: image/jpeg", filename="photo.jpg")
    assert_error(form(client, text), 415, "JPEG, PNG")


def test_no_address_is_ever_fetched(client):
    """A server waits for a request that must not come."""
    with socket.create_server(("127.0.0.1", 0)) as waiting:
        waiting.setblocking(False)
        address = f"http://127.0.0.1:{waiting.getsockname()[1]}/photo.jpg"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{address}"/></svg>'
        xmp = encode(
            picture(),
            "JPEG",
            xmp=f'<x:xmpmeta xmlns:x="{address}"><a href="{address}"/></x:xmpmeta>'.encode(),
        )
        responses = [
            form(client, part("image", address.encode())),
            form(client, file(address.encode())),
            form(client, file(svg.encode())),
            form(client, file(xmp)),
            form(client, file(photo(), f"Content-Location: {address}", filename=address)),
            client.post(f"/classify?image={address}&url={address}"),
            client.post("/classify", json={"image": address}),
            client.post("/classify", data={"url": address}, headers={"Referer": address}),
        ]
        statuses = [response.status_code for response in responses]
        assert statuses == [400, 415, 415, 200, 200, 400, 400, 400]
        with pytest.raises(BlockingIOError):
            waiting.accept()


# ---- files ----


@pytest.mark.parametrize(
    "name",
    [
        "a PNG of 40,000 x 40,000 pixels",
        "a TIFF of two million strips",
        "a PNG comment that unpacks to 100 MB",
    ],
)
def test_a_bomb_of_each_kind_gets_its_status(client, name):
    status, data = BOMBS[name]()
    response = upload(client, "/classify", data)
    assert response.status_code == status
    assert list(response.json) == (VERDICT if status == 200 else ["error"])


@pytest.mark.parametrize(
    "name",
    ["a PNG that is a page too", "an SVG that includes a file", "a script that starts like a GIF"],
)
def test_a_file_of_two_formats_gets_the_status_of_its_first_bytes(client, name):
    status, make = POLYGLOTS[name]
    response = upload(client, "/classify", make())
    assert response.status_code == status
    assert list(response.json) == (VERDICT if status == 200 else ["error"])
    assert response.headers["X-Content-Type-Options"] == "nosniff" and "script" not in response.text


# ---- all bombs at once ----

# By default glibc keeps 150 to 290 MB of what was freed: in an arena for each thread, and because
# the freed blocks raise its thresholds.
RETURNS_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}


def resident(live):
    """Megabytes that the service holds."""
    text = live.session.get(f"{live.url}/metrics", timeout=PATIENCE).text
    (size,) = re.findall(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
    return float(size) / 1e6


def peak(live):
    """Megabytes that the worker has held at most."""
    pid = live.process.pid
    worker = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    (size,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{worker}/status").read_text())
    return int(size) / 1e3


def post_all(live, files):
    """Eight uploads at a time -> {name: HTTP status}. The service stays healthy meanwhile."""
    with ThreadPoolExecutor(8) as pool:
        waiting = {name: pool.submit(live.post, data) for name, (_, data) in files.items()}
        while not all(future.done() for future in waiting.values()):
            assert live.session.get(f"{live.url}/healthz", timeout=PATIENCE).status_code == 200
            time.sleep(0.02)
    return {name: future.result().status_code for name, future in waiting.items()}


@pytest.mark.long
def test_the_live_service_responds_to_all_bombs_at_once_and_frees_their_memory(serve, photos):
    """A bomb that explodes exceeds the memory limit, and so do three rounds of kept uploads."""
    live, china = serve(**RETURNS_MEMORY), photos["china.jpg"].read_bytes()
    first = [live.post(china).json() for _ in range(20)][0]
    before, files = resident(live), {name: make() for name, make in BOMBS.items()}
    assert 3 * sum(len(data) for _, data in files.values()) / 1e6 > 300
    for _ in range(3):
        assert post_all(live, files) == {name: status for name, (status, _) in files.items()}
    assert live.post(china).json() == first
    assert resident(live) - before < 250 and peak(live) - before < 350
    for line in live.log.read_text().splitlines():
        json.loads(line)  # libtiff would write other lines between
