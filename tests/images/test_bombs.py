"""What a crafted file costs: it is refused before memory is taken and before time is spent, whatever its header says."""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from commands import ROOT
from crafted import BOMBS, LONG, POLYGLOTS, grid, listed, png, segments, tiff
from patience import PATIENCE
from PIL import Image
from test_decoding import FILES, chunk, picture, saved

from detector.base.errors import BrokenImage, ImageError
from detector.images import decoding, pixels

WATCH = """
import json, resource, sys
sys.path.append("tests")
from patience import additions
from detector.base.errors import ImageError
from detector.images import decoding
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # a guard that fails must not take the machine with it
decoding.decode_image(open(sys.argv[1], "rb").read())
unit = 1 if sys.platform == "darwin" else 1024
for path in sys.argv[1:]:
    data, before = open(path, "rb").read(), resource.getrusage(resource.RUSAGE_SELF)
    try:
        decoding.decode_image(data, 50_000_000)
        status = 200
    except ImageError as error:
        status = error.status
    after = resource.getrusage(resource.RUSAGE_SELF)
    cost = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / additions()
    print(json.dumps([status, cost, (after.ru_maxrss - before.ru_maxrss) * unit / 1e6]), flush=True)
"""


def watch(folder, files):
    """{name: bytes} -> {name: (status, processor time in million additions, megabytes that the peak of memory grew by)}, in one process."""
    files = {"an ordinary JPEG": FILES["JPEG"](), **files}
    paths = [folder / str(i) for i in range(len(files))]
    for path, data in zip(paths, files.values()):
        path.write_bytes(data)
    ran = subprocess.run(
        [sys.executable, "-c", WATCH, *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (ran.returncode, ran.stderr) == (0, "")  # libtiff would say a thousand things there
    return dict(zip(files, map(json.loads, ran.stdout.splitlines())))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return watch(
        tmp_path_factory.mktemp("bombs"), {what: make()[1] for what, make in BOMBS.items()}
    )


@pytest.mark.parametrize("what", BOMBS)
def test_a_bomb_costs_neither_memory_nor_time(found, what):
    status, additions, megabytes = found[what]
    assert status == BOMBS[what]()[0]
    assert additions < 30 and megabytes < 40, (additions, megabytes)


@pytest.mark.parametrize("what", POLYGLOTS)
def test_of_a_file_that_is_two_things_only_the_picture_counts_and_only_where_it_comes_first(what):
    status, make = POLYGLOTS[what]
    if status == 200:
        assert decoding.decode_image(make()).size == (60, 44)
    else:
        with pytest.raises(ImageError) as error:
            decoding.decode_image(make())
        assert error.value.status == status


# ---- the largest images that are taken ----


def large_png(kind, bits, *chunks, side=4000):
    row = b"\0" + bytes(i % 251 for i in range(side * bits // 8))
    depth = 16 if kind == 0 and bits == 16 else 8
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, kind, 0, 0, 0))
        + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(row * side, 1))
        + chunk(b"IEND", b"")
    )


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


def test_of_a_large_image_only_the_pixels_and_their_rgb_are_ever_in_memory(tmp_path):
    """Four bytes a pixel each. Whole copies in between would be another four, or sixteen for 16 bits."""
    for name, make in LARGE.items():
        status, _, megabytes = watch(tmp_path, {name: make()})[name]
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
    monkeypatch.setattr(decoding, "STRIP_PIXELS", 60 * 7)
    assert (np.asarray(pixels.to_rgb(image)) == np.asarray(whole)).all() and len(
        np.unique(whole)
    ) > 1


# ---- what real files have, and the limits must let pass ----


def test_a_photograph_with_a_film_behind_it_is_taken(photos):
    """As telephones write them. In 25 MB of a film the two bytes that begin a scan come by chance."""
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
def test_a_long_header_is_taken(data):
    assert decoding.decode_image(data()).size == (60, 44)


def pieces(data):
    """The compressed pixels of a PNG of ours, byte by byte."""
    start = data.index(b"IDAT") - 4
    body = data[start + 8 : start + 8 + struct.unpack(">I", data[start : start + 4])[0]]
    return [body[i : i + 1] for i in range(len(body))]


def planes():
    """A TIFF of four planes that lie one after the other, each in strips of one row."""
    where = {
        273: (LONG, 256, struct.pack("<256I", *range(4000, 4000 + 64 * 256, 64))),
        279: listed(64, 256),
    }
    tags = (
        grid(64, 64, 1, t278=1, t284=2)
        | {258: (3, 4, struct.pack("<4H", 8, 8, 8, 8)), 262: 5, 277: 4}
        | where
    )
    return tiff(tags, bytes(range(256)) * 64, 4000)


def one_tile():
    body = zlib.compress(bytes(256 * 256))
    return tiff(grid(64, 64, 8, t322=256, t323=256, t324=2000, t325=len(body)), body)


def big_endian():
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: 8, 279: 64}
    lines = b"".join(struct.pack(">HHII", tag, LONG, 1, value) for tag, value in tags.items())
    return (b"MM\0*" + struct.pack(">IH", 8, len(tags)) + lines).ljust(200, b"\0") + bytes(
        range(64)
    )


TIFFS = {
    "of separate planes": planes,
    "of one tile larger than the picture": one_tile,
    "with a row a strip": lambda: saved(
        picture(), "TIFF", compression="tiff_lzw", tiffinfo={278: 1}
    ),
    "with 64-bit offsets": lambda: saved(picture(), "TIFF", big_tiff=True),
    "of big-endian numbers": big_endian,
}


@pytest.mark.parametrize("kind", TIFFS)
def test_an_honest_tiff_is_taken(kind):
    assert decoding.decode_image(TIFFS[kind]()).size in ((64, 64), (60, 44), (8, 8))


def test_a_header_is_counted_while_it_is_opened_and_not_afterwards(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_HEADER_READS", 3)
    header = decoding.Header(b"0123456789")
    assert [header.read(1), header.read(2), header.read()] == [b"0", b"12", b"3456789"]
    with pytest.raises(BrokenImage, match="too many parts"):
        header.read(1)
    del header.read
    assert header.seek(9) == 9 and header.read(1) == b"9" and isinstance(header, io.BytesIO)
