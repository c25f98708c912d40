"""Uploads made to do harm: forms without measure, files that lie, bombs, torn and mixed files. Each gets a fitting answer.

(On the wire: test_hostile_http.py. What a bomb costs: test_bombs.py. Made-up input without end: test_fuzz.py.)
"""

import base64
import json
import os
import re
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from crafted import BOMBS, POLYGLOTS, bmp, gif, grid, png, tiff
from engines import client_on, upload
from live import Live, assert_error
from patience import PATIENCE, costs_at_most
from test_decoding import FILES, picture, saved

from detector.service.upload import FIELD_BYTES

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


# ---- forms without measure ----


@pytest.mark.parametrize("path", PATHS)
def test_ten_mebibytes_are_taken_and_one_byte_more_is_not(client, path):
    frame = len(file(b"") + b"--x--\r\n")
    assert form(client, file(bytes(LIMIT - frame)), path=path).status_code == (
        415 if path == "/classify" else 200
    )
    assert_error(form(client, file(bytes(LIMIT - frame + 1)), path=path), 413, "10,485,760 bytes")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [18, 1000, 100_000])
def test_more_parts_than_a_batch_may_have_are_413_at_once(client, path, count):
    with costs_at_most(16):
        assert_error(form(client, *[file(b"")] * count, path=path), 413, "more than 16 images")
        assert_error(form(client, *[part(f"n{i}", b"") for i in range(count)], path=path), 413)


@pytest.mark.parametrize(
    "size, status", [(FIELD_BYTES - 100, 200), (FIELD_BYTES + 100, 413), (9_000_000, 413)]
)
def test_a_text_field_may_be_so_long_and_no_longer(client, size, status):
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
        assert_error(
            client.post("/classify", data=data, content_type=kind),
            400,
            "'image'",
            repr(kind.split(";")[0]) if kind else "without a Content-Type",
        )


@pytest.mark.parametrize(
    "headers",
    [[f"X-{i}: 1" for i in range(10_000)], ["X: " + "a" * 1_000_000], ["X" * 100_000], [": : :"]],
    ids=["ten thousand", "one of a megabyte", "no colon", "nothing but colons"],
)
def test_headers_of_a_part_may_be_anything(client, headers):
    assert form(client, file(photo(), *headers)).status_code in (200, 400, 413)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x",
        b"--x\r\n",
        b"--x\r\n\r\n",
        b"--x--",
        b"\r\n" * 100_000,
        b"--x\r\n" * 100_000,
        file(photo())[:-400],
        file(photo()).replace(b"--x", b"--y"),
        b"-" * 100_000,
        b'--x\r\nContent-Disposition: form-data; name="image',
    ],
    ids=[
        "nothing",
        "a boundary",
        "a line",
        "an empty part",
        "its end",
        "empty lines",
        "boundaries",
        "a torn file",
        "another boundary",
        "hyphens",
        "a torn header",
    ],
)
def test_a_form_that_is_torn_is_400(client, body):
    assert_error(
        client.post("/classify", data=body, content_type="multipart/form-data; boundary=x"), 400
    )


def test_a_form_inside_a_form_is_no_picture(client):
    inner = part("image", photo(), filename="a.jpg") + b"--x--\r\n"
    outer = inner.replace(b"--x", b"--y")
    assert_error(form(client, file(outer, "Content-Type: multipart/mixed; boundary=y")), 415)


@pytest.mark.parametrize("coding", ["base64", "quoted-printable", "gzip"])
def test_a_coded_file_is_taken_as_it_is_and_not_decoded(client, coding):
    assert_error(
        form(client, file(base64.b64encode(photo()), f"Content-Transfer-Encoding: {coding}")), 415
    )


def test_a_file_without_a_name_is_a_file(client):
    assert (
        form(client, file(photo(), filename="")).status_code
        == form(client, file(photo())).status_code
        == 200
    )


# ---- the content decides ----


@pytest.mark.parametrize(
    "name",
    [
        "photo.png",
        "photo.exe",
        "photo.jpg.php",
        "../../etc/passwd",
        "",
        "a\\b",
        "a" * 3000,
        "\u202egpj.exe",
    ],
)
@pytest.mark.parametrize(
    "kind", ["image/png", "text/html", "application/x-msdownload", "nonsense", ""]
)
def test_a_jpeg_is_a_jpeg_whatever_it_is_called(client, name, kind):
    assert (
        form(client, file(photo(), f"Content-Type: {kind}", filename=name)).json
        == form(client, file(photo())).json
    )


OTHERS = {
    "text": b"no picture",
    "a page": b"<html></html>",
    "an icon": b"\0\0\1\0\1\0" + bytes(60),
    "PPM": b"P6 1 1 255 abc",
    "Photoshop": b"8BPS\0\1" + bytes(40),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(90),
    "DDS": b"DDS " + bytes(124),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "FITS": b"SIMPLE  = T",
    "a script": b"#!/bin/sh\n",
    "ELF": b"\x7fELF",
    "a program": b"MZ" + bytes(99),
    "a byte order mark": b"\xef\xbb\xbf",
}


@pytest.mark.parametrize("what", OTHERS)
def test_nothing_else_is_a_jpeg_whatever_it_is_called(client, what):
    assert_error(
        form(client, file(OTHERS[what], "Content-Type: image/jpeg", filename="photo.jpg")),
        415,
        "JPEG, PNG",
    )


def test_no_address_is_ever_fetched(client):
    """A server waits for a call that must not come."""
    with socket.create_server(("127.0.0.1", 0)) as waiting:
        waiting.setblocking(False)
        address = f"http://127.0.0.1:{waiting.getsockname()[1]}/photo.jpg"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{address}"/></svg>'
        xmp = saved(
            picture(),
            "JPEG",
            xmp=f'<x:xmpmeta xmlns:x="{address}"><a href="{address}"/></x:xmpmeta>'.encode(),
        )
        asked = [
            form(client, part("image", address.encode())),
            form(client, file(address.encode())),
            form(client, file(svg.encode())),
            form(client, file(xmp)),
            form(client, file(photo(), f"Content-Location: {address}", filename=address)),
            client.post(f"/classify?image={address}&url={address}"),
            client.post("/classify", json={"image": address}),
            client.post(
                "/classify",
                data={"url": address, "image_url": address},
                headers={"Referer": address},
            ),
        ]
        assert [response.status_code for response in asked] == [
            400,
            415,
            415,
            200,
            200,
            400,
            400,
            400,
        ]
        with pytest.raises(BlockingIOError):
            waiting.accept()


# ---- files ----


@pytest.mark.parametrize("what", BOMBS)
def test_a_bomb_gets_its_answer_at_once(client, what):
    status, data = BOMBS[what]()
    with costs_at_most(45):
        response = upload(client, "/classify", data)
    assert (
        response.status_code == status if status == 200 else assert_error(response, status) is None
    )


@pytest.mark.parametrize("what", POLYGLOTS)
def test_a_file_that_is_two_things_gets_the_answer_of_its_first_bytes(client, what):
    status, make = POLYGLOTS[what]
    response = upload(client, "/classify", make())
    assert response.status_code == status and list(response.json) == (
        VERDICT if status == 200 else ["error"]
    )
    assert response.headers["X-Content-Type-Options"] == "nosniff" and "script" not in response.text


def animation(kind, first):
    return saved(
        first,
        kind,
        save_all=True,
        append_images=[picture("L").convert("RGB"), first.rotate(180)],
        duration=100,
        **({"lossless": True} if kind == "WEBP" else {}),
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_of_an_animation_the_first_picture_is_judged(client, kind):
    first = picture().quantize(60).convert("RGB")
    still = upload(client, "/classify", saved(first, "PNG")).json
    assert upload(client, "/classify", animation(kind, first)).json == still
    assert (
        upload(client, "/classify", animation(kind, first.rotate(90))).json != still
    )  # and not just any


NOTHING = {
    "no bytes": b"",
    "a PNG of no width": png(size=(0, 44)),
    "a PNG of no size": png(size=(0, 0)),
    "a GIF of no size": gif((0, 0)),
    "a BMP of no width": bmp(0, 44),
    "a BMP of no height": bmp(60, 0),
    "a TIFF of no size": tiff(grid(0, 0, 1, t273=2000), b""),
    "a GIF without a picture": b"GIF89a" + struct.pack("<HHBBB", 60, 44, 0, 0, 0) + b";",
    "a PNG without pixels": png()[:33],
    "a JPEG without pixels": b"\xff\xd8\xff\xd9",
    "a WebP of nothing": b"RIFF\4\0\0\0WEBP",
}


@pytest.mark.parametrize("what", NOTHING)
def test_a_picture_of_nothing_is_an_error(client, what):
    assert_error(upload(client, "/classify", NOTHING[what]), 415 if what == "no bytes" else 422)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.85])
@pytest.mark.parametrize(
    "kind", [kind for kind in FILES if "animated" not in kind and "two" not in kind]
)
def test_a_torn_file_of_any_format_is_422(client, kind, share):
    data = FILES[kind]()
    assert_error(upload(client, "/classify", data[: max(16, int(share * len(data)))]), 422)


@pytest.mark.parametrize("kind", FILES)
def test_a_corrupt_file_of_any_format_gets_a_verdict_or_an_error_and_never_a_500(client, kind):
    data, rng = FILES[kind](), np.random.default_rng(0)
    found = set()
    for start in np.linspace(0, len(data) - 32, 12).astype(int):
        for filler in (bytes(32), b"\xff" * 32, rng.bytes(32)):
            response = upload(client, "/classify", data[:start] + filler + data[start + 32 :])
            assert response.status_code in (200, 413, 415, 422) and list(response.json) in (
                ["error"],
                VERDICT,
            )
            found.add(response.status_code)
    assert {415, 422} & found


if os.environ.get("FORMATS_DIR"):

    @pytest.mark.parametrize(
        "path",
        sorted(path for path in Path(os.environ["FORMATS_DIR"]).iterdir() if path.is_file()),
        ids=lambda path: path.name,
    )
    def test_each_of_a_folder_of_odd_files_gets_a_verdict_or_the_fitting_error(client, path):
        response = upload(client, "/classify", path.read_bytes())
        assert response.status_code in (200, 413, 415, 422)
        assert list(response.json) == (VERDICT if response.status_code == 200 else ["error"])


# ---- the live service, all at once ----


def resident(live):
    text = live.session.get(f"{live.url}/metrics", timeout=PATIENCE).text
    return (
        float(re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE).group(1))
        / 1e6
    )


def busiest(live):
    """Megabytes that the worker held at its worst."""
    pid = live.process.pid
    worker = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    return (
        int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{worker}/status").read_text()).group(1))
        / 1e3
    )


@pytest.mark.long
def test_the_live_service_answers_all_bombs_at_once_stays_healthy_and_forgets_them(
    tmp_path, photos
):
    """One upload of each, eight at a time, three times over. One bomb that goes off takes more than is allowed here for all;
    uploads that were kept would add up to it."""
    live, china = Live(tmp_path), photos["china.jpg"].read_bytes()
    try:
        first = [live.post(china).json() for _ in range(20)][0]
        before, files = resident(live), {what: make() for what, make in BOMBS.items()}
        assert 3 * sum(len(data) for _, data in files.values()) / 1e6 > 300
        for _ in range(3):
            with ThreadPoolExecutor(8) as pool:
                waiting = {what: pool.submit(live.post, data) for what, (_, data) in files.items()}
                while not all(future.done() for future in waiting.values()):
                    assert (
                        live.session.get(f"{live.url}/healthz", timeout=PATIENCE).status_code == 200
                    )
                    time.sleep(0.02)
            assert {what: future.result().status_code for what, future in waiting.items()} == {
                what: status for what, (status, _) in files.items()
            }
        assert live.post(china).json() == first
        assert resident(live) - before < 250 and busiest(live) - before < 350, (
            before,
            resident(live),
            busiest(live),
        )
        for line in live.log.read_text().splitlines():
            json.loads(line)  # libtiff writes where the log goes: nothing of it may come between
    finally:
        live.stop()
