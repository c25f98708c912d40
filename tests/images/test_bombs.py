"""Costs of crafted files: they take neither memory nor time, whatever their headers declare."""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from commands import ROOT
from crafted import BOMBS, LONG, POLYGLOTS, grid, listed, segments, tiff
from patience import PATIENCE
from PIL import Image
from written import FILES, chunk, picture, png, png_of

from detector.base.errors import BrokenImage, ImageError
from detector.images import decoding, pixels

WATCH = r"""
import json, re, resource, sys, time
sys.path.append("tests")
from patience import additions
from detector.base.errors import ImageError
from detector.images import decoding
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # if a check fails, spare the machine

def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])  # kB

def decode(data):
    started = time.process_time()
    try:
        decoding.decode_image(data, 50_000_000)
        status, message = 200, ""
    except ImageError as error:
        status, message = error.status, str(error)
    return status, message, (time.process_time() - started) / additions()

decode(open(sys.argv[1], "rb").read())
for path in sys.argv[1:]:
    data = open(path, "rb").read()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew; that of getrusage starts at the parent's
    held = peak()
    status, message, cost = decode(data)
    megabytes = (peak() - held) * 1024 / 1e6
    cost = min(cost, decode(data)[2])  # other processes only add to it
    print(json.dumps([status, message, cost, megabytes]), flush=True)
"""


def watch(folder, files):
    """{name: bytes} -> {name: (status, message, cost, megabytes)}, all decoded by one process.

    The cost is processor time in million additions. The megabytes are the growth of peak memory.
    """
    files = {"an ordinary JPEG": FILES["JPEG"](), **files}
    paths = [folder / str(i) for i in range(len(files))]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    command, options = [sys.executable, "-c", WATCH, *paths], {"capture_output": True, "text": True}
    process = subprocess.run(command, cwd=ROOT, timeout=PATIENCE, **options)
    assert (process.returncode, process.stderr) == (0, "")  # libtiff would write thousands of lines
    return dict(zip(files, map(json.loads, process.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    files = {name: make()[1] for name, make in BOMBS.items()}
    return watch(tmp_path_factory.mktemp("bombs"), files)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_neither_memory_nor_time(costs, name):
    status, message, additions, megabytes = costs[name]
    assert status == BOMBS[name]()[0] and (status != 413 or "pixels" in message)
    decoded = 49 if name == "half of a JPEG of 49 million pixels" else 0  # MB of grey
    assert additions < 30 and megabytes < 40 + decoded, (additions, megabytes)


@pytest.mark.parametrize("status, make", POLYGLOTS.values(), ids=POLYGLOTS)
def test_a_file_of_two_formats_is_a_picture_only_where_the_picture_comes_first(status, make):
    if status == 200:
        assert decoding.decode_image(make()).size == (60, 44)
    else:
        with pytest.raises(ImageError) as error:
            decoding.decode_image(make())
        assert error.value.status == status


# ---- large images ----


def large_png(colour, bits, *chunks, side=4000):
    row = b"\0" + bytes(i % 251 for i in range(side * bits // 8))
    depth = 16 if colour == 0 and bits == 16 else 8
    return png_of((side, side), depth, colour, row * side, *chunks, level=1)


LARGE = {
    "grey": lambda: large_png(0, 8),
    "grey of 16 bits": lambda: large_png(0, 16),
    "colour": lambda: large_png(2, 24),
    "colour with a transparent one": lambda: large_png(2, 24, chunk(b"tRNS", b"\0\1\0\2\0\3")),
    "grey with alpha": lambda: large_png(4, 16),
    "colour with alpha": lambda: large_png(6, 32),
    "a palette with alpha": lambda: large_png(
        3, 8, chunk(b"PLTE", bytes(768)), chunk(b"tRNS", bytes(range(256)))
    ),
}


def test_memory_holds_only_the_pixels_of_a_large_image_and_their_rgb(tmp_path):
    """Each takes four bytes a pixel. A whole copy would take four more, or sixteen for 16 bits."""
    for name, make in LARGE.items():
        status, *_, megabytes = watch(tmp_path, {name: make()})[name]
        assert status == 200 and megabytes < 10 * 16, (name, megabytes)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "I;16", "CMYK", "1", "a transparent colour"])
def test_an_image_converted_in_strips_is_the_image_converted_whole(kind, monkeypatch):
    image = picture("RGB" if "colour" in kind or kind == "I;16" else kind)
    if kind == "I;16":
        image = Image.fromarray(np.asarray(picture("L")).astype(np.uint16) * 211)
    elif "colour" in kind:
        image.info["transparency"] = image.getpixel((3, 3))
    elif kind in ("RGBA", "LA"):
        image.putalpha(picture("L").rotate(180))
    whole = pixels.to_rgb(image.copy())
    monkeypatch.setattr(pixels, "STRIP_PIXELS", 60 * 7)
    assert np.array_equal(pixels.to_rgb(image), whole) and len(np.unique(whole)) > 1


# ---- sound files within the limits ----


def test_a_photograph_with_a_film_behind_it_is_accepted(photos):
    """Telephones write such files. 25 MB of a film hold the two bytes of a scan by chance."""
    data = photos["rocket.jpg"].read_bytes() + np.random.default_rng(0).bytes(25_000_000)
    assert data.count(b"\xff\xda") > 200
    assert decoding.decode_image(data).size == (640, 427)


@pytest.mark.parametrize(
    "data",
    [
        lambda: segments(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000)),
        lambda: segments(0xE1, b"Exif\0\0" + bytes(60_000), 6_000_000),
        lambda: png(*[chunk(b"tEXt", b"Comment\0" + bytes([65 + i % 26])) for i in range(5000)]),
        lambda: (
            FILES["PNG"]()[:33]
            + b"".join(chunk(b"IDAT", part) for part in pieces(FILES["PNG"]()))
            + chunk(b"IEND", b"")
        ),
    ],
    ids=["large profile", "long EXIF", "five thousand comments", "pixels byte by byte"],
)
def test_a_long_header_is_accepted(data):
    assert decoding.decode_image(data()).size == (60, 44)


def pieces(data):
    """The compressed pixels of a PNG, byte by byte."""
    start = data.index(b"IDAT") - 4
    body = data[start + 8 : start + 8 + struct.unpack(">I", data[start : start + 4])[0]]
    return [body[i : i + 1] for i in range(len(body))]


def planes():
    """A TIFF of four planes, one after the other, in strips of one row."""
    where = {
        273: (LONG, 256, struct.pack("<256I", *range(4000, 4000 + 64 * 256, 64))),
        279: listed(64, 256),
    }
    inks = {258: (3, 4, struct.pack("<4H", 8, 8, 8, 8)), 262: 5, 277: 4}
    tags = grid(64, 64, 1, t278=1, t284=2) | inks | where
    return tiff(tags, bytes(range(256)) * 64, 4000)


def one_tile():
    body = zlib.compress(bytes(256 * 256))
    return tiff(grid(64, 64, 8, t322=256, t323=256, t324=2000, t325=len(body)), body)


@pytest.mark.parametrize("make", [planes, one_tile])
def test_a_tiff_of_planes_or_of_one_large_tile_is_accepted(make):
    assert decoding.decode_image(make()).size == (64, 64)


def test_reads_are_counted_while_the_header_is_opened_and_not_afterwards(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_HEADER_READS", 3)
    header = decoding.Header(b"0123456789")
    assert [header.read(1), header.read(2), header.read()] == [b"0", b"12", b"3456789"]
    with pytest.raises(BrokenImage, match="too many parts"):
        header.read(1)
    del header.read
    assert header.seek(9) == 9 and header.read(1) == b"9" and isinstance(header, io.BytesIO)
