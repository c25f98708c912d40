"""Hostile files of at most 10 MB that ask for gigabytes, for hours, or for a wrong decoder.

status, data = BOMBS["a TIFF of one strip listed a hundred thousand times"]()
"""

import functools
import io
import struct
import zipfile
import zlib

import heif_boxes
from PIL import Image
from written import FILES, chunk, encode, picture, png

FULL = 9_900_000  # bytes that fit into an upload
LONG = 4  # TIFF's type of unsigned 32-bit numbers


# ---- parts ----


def segments(marker, body, size=FULL):
    """A JPEG with copies of one segment, up to this many bytes, in its header."""
    data = FILES["JPEG"]()
    segment = b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body
    return data[:2] + segment * (size // len(segment)) + data[2:]


def gif(size, frame=None, extra=b""):
    """A GIF of one colour with this logical screen and a frame, by default as large."""
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", *size, 0x80, 0, 0)
        + bytes(6)
        + extra
        + b","
        + struct.pack("<HHHHB", 0, 0, *(frame or size), 0)
        + b"\2\2\x44\1\0;"
    )


def tiff(tags, body, at=None):
    """A TIFF of {tag: value or (type, count, bytes)} with `body` at offset `at` (default 2,000)."""
    outside, entries, end = bytearray(), bytearray(), 14 + 12 * len(tags)
    for tag, value in sorted(tags.items()):
        number = value if isinstance(value, tuple) else (LONG, 1, struct.pack("<I", value))
        kind, count, stored = number
        entries += struct.pack("<HHI", tag, kind, count)
        entries += stored if len(stored) <= 4 else struct.pack("<I", end + len(outside))
        outside += stored if len(stored) > 4 else b""
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + bytes(entries) + bytes(4) + bytes(outside)
    assert len(head) <= (at or 2000)
    return head.ljust(at or 2000, b"\0") + body


def listed(number, times):
    return LONG, times, struct.pack("<I", number) * times


def grid(width, height, compression, bits=8, **more):
    tags = {256: width, 257: height, 258: bits, 259: compression, 262: 1, 277: 1}
    return tags | {int(tag[1:]): value for tag, value in more.items()}


def riff(*chunks):
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(part)) + part + b"\0" * (len(part) & 1)
        for name, part in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(width, height):
    """An animated WebP with this canvas and one frame of 16 x 16."""

    def numbers(*values):
        return b"".join(value.to_bytes(3, "little") for value in values)

    still = encode(Image.new("RGB", (16, 16)), "WEBP", lossless=True)
    return riff(
        (b"VP8X", b"\2\0\0\0" + numbers(width - 1, height - 1)),
        (b"ANIM", bytes(6)),
        (b"ANMF", bytes(6) + numbers(15, 15, 100) + b"\0" + still[12:]),
    )


def replaced(data, name, distance, patch):
    """The file with `patch` at this distance from the first `name`."""
    at = data.index(name) + distance
    return data[:at] + patch + data[at + len(patch) :]


def bmp(width, height, body=bytes(100), compression=0, bits=24):
    return (
        b"BM"
        + struct.pack("<IHHI", 54 + len(body), 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
        + body
    )


@functools.cache
def hundred_megabytes():
    return zlib.compress(bytes(100_000_000))


def hidden_tile():
    """Tile sides of 32,768, in a type of number that libtiff reads and Pillow ignores."""
    sides = {tag: (17, 1, struct.pack("<q", 32768)) for tag in (322, 323)}
    return tiff(
        grid(64, 64, 8, t324=2000, t325=len(hundred_megabytes())) | sides, hundred_megabytes()
    )


def tiles(width, height, tile, body):
    """A TIFF with all tiles in the same bytes."""
    count = -(-width // tile[0]) * -(-height // tile[1])
    at = 2000 + 8 * count
    where = {"t324": listed(at, count), "t325": listed(len(body), count)}
    return tiff(grid(width, height, 8, t322=tile[0], t323=tile[1], **where), body, at)


def strips(width, height, rows, count):
    """A TIFF of one bit a pixel with all strips in the same bytes."""
    at = 2000 + 4 * count
    return tiff(
        grid(width, height, 1, bits=1, t273=listed(at, count), t278=rows),
        bytes(width // 8 * rows),
        at,
    )


# ---- {name: function -> bytes} ----


def declared(width, height):
    """Files of each format that declare this size."""
    return {
        "PNG": lambda: png(size=(width, height)),
        "JPEG": lambda: replaced(
            FILES["JPEG"](), b"\xff\xc0", 5, struct.pack(">HH", height, width)
        ),
        "BMP": lambda: bmp(width, height),
        "GIF": lambda: gif((width, height)),
        "animated WebP": lambda: canvas(width, height),
        "HEIC": lambda: heif_boxes.heic(  # pi-heif itself accepts no more
            [(1, b"hvc1", b"")],
            [heif_boxes.coded_picture(picture())[1], heif_boxes.size(min(width, 32768), height)],
            {1: [1, 2]},
        ),
        "AVIF": lambda: replaced(  # libavif itself accepts no more
            FILES["AVIF"](), b"ispe", 8, struct.pack(">II", 16384, 16384)
        ),
        "WebP": lambda: riff(
            (b"VP8L", b"\x2f" + struct.pack("<I", 16382 | 16382 << 14) + bytes(100))
        ),
        "TIFF": lambda: tiff(
            grid(width, height, 1, t273=2000, t278=height, t279=width * height), bytes(100)
        ),
        "deflated TIFF": lambda: tiff(
            grid(width, height, 8, t273=2000, t279=99), zlib.compress(bytes(9999))
        ),
    }


TOO_LARGE = {
    **{
        f"a {name} of {side:,} x {side:,} pixels": make
        for side in (40_000, 14_000)
        for name, make in declared(side, side).items()
    },
    "a HEIC of 200 x 200 pixels in 256 tiles of 4 million": lambda: heif_boxes.tiled(
        Image.new("RGB", (2048, 2048), "red"), 16, 16, 200, 200
    ),
    "a GIF with a frame larger than its screen": lambda: gif((10, 10), (65000, 65000)),
    "a TIFF of 64 x 64 pixels in a tile of 65,536 x 65,536": lambda: tiff(
        grid(64, 64, 1, t322=65536, t323=65536, t324=2000, t325=4096), bytes(4096)
    ),
    "a TIFF of a thousand tiles, each far longer than the picture": lambda: tiles(
        20_000, 2400, (16, 3_000_000), zlib.compress(bytes(48_000_000))
    ),
    "a TIFF of five thousand rows of tiles ten megabytes wide": lambda: tiff(
        grid(10_000, 5000, 1, bits=1, t322=80_000_000, t323=1, t324=listed(30_000, 5000)),
        bytes(FULL),
        30_000,
    ),
}
BROKEN = {
    "a PNG of eight hundred thousand empty chunks": lambda: png(chunk(b"prVt", b"") * (FULL // 12)),
    "a JPEG of half a million pieces of EXIF": lambda: segments(0xE1, b"Exif\0\0" + bytes(10)),
    "a JPEG of two million empty segments": lambda: segments(0xE5, b""),
    "a JPEG of two million empty comments": lambda: segments(0xFE, b""),
    "a JPEG header of ten million fill bytes": (
        lambda: b"\xff\xd8" + b"\xff" * FULL + FILES["JPEG"]()[2:]
    ),
    "a JPEG of ten thousand scans": (
        lambda: (
            FILES["JPEG"]()[:-2]
            + b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0\x3f\0" * 10_000
            + b"\xff\xd9"
        )
    ),
    "a GIF of two million comments": lambda: gif((60, 44), extra=b"!\xfe\1x\0" * (FULL // 5)),
    "a GIF comment of five million pieces": lambda: gif(
        (60, 44), extra=b"!\xfe" + b"\1x" * (FULL // 2) + b"\0"
    ),
    "a GIF of a million empty extensions": lambda: gif(
        (60, 44), extra=b"!\xf9\4\0\0\0\0\0" * (FULL // 8)
    ),
    "a TIFF of one strip listed a hundred thousand times": lambda: strips(
        10_000, 5000, 2500, 100_000
    ),
    "a TIFF of two million strips": lambda: strips(16, 16, 8, 2_000_000),
    "a TIFF of ten thousand tiles that are the same megabyte": lambda: tiles(
        1600,
        1600,
        (16, 16),
        b"\x78\x9c" + b"\0\0\0\xff\xff" * 200_000 + zlib.compress(bytes(256))[2:],
    ),
    "a TIFF with a tile size that only its decoder would see": hidden_tile,
    "a TIFF with strips of four gigabytes": lambda: tiff(
        grid(64, 64, 8, t273=2000, t279=0xFFFFFFFF), zlib.compress(bytes(99))
    ),
    "a TIFF of sixty thousand tags": lambda: tiff(
        grid(64, 64, 1, t273=2000) | {tag: (1, 140, bytes(140)) for tag in range(400, 60_400)},
        bytes(4096),
        9_200_000,
    ),
    "a HEIC made of grids of grids": lambda: heif_boxes.nested(picture(), b"grid"),
    "a HEIC made of overlays of overlays": lambda: heif_boxes.nested(picture(), b"iovl"),
    "a HEIC of five thousand pictures": lambda: heif_boxes.heic(
        [(i, b"hvc1", b"") for i in range(1, 5000)],
        [heif_boxes.size(64, 64)],
        {i: [1] for i in range(1, 5000)},
    ),
    "a HEIC that declares less than it holds": lambda: heif_boxes.heic(
        *(
            lambda coded, head: (
                [(1, b"hvc1", coded)],
                [head, heif_boxes.size(64, 64)],
                {1: [1, 2]},
            )
        )(*heif_boxes.coded_picture(Image.new("RGB", (4096, 4096), "red")))
    ),
    "half of a JPEG of 49 million pixels": lambda: encode(Image.new("L", (7000, 7000), 99), "JPEG")[
        :-9000
    ],
    "a BMP of runs that never reach the picture's end": lambda: bmp(
        7000, 7000, bytes(1024) + b"\0\2\1\0" * 200_000, 1, 8
    ),
    "a BMP with a header of four gigabytes": (
        lambda: b"BM" + struct.pack("<IHHII", 99, 0, 0, 54, 0xFFFFFFFF) + bytes(99)
    ),
}
HARMLESS = {  # the first picture needs none of the costly parts
    "a PNG comment that unpacks to 100 MB": (
        lambda: png(chunk(b"zTXt", b"k\0\0" + hundred_megabytes()))
    ),
    "a PNG comment in another chunk that unpacks to 100 MB": (
        lambda: png(chunk(b"iTXt", b"k\0\1\0\0\0" + hundred_megabytes()))
    ),
    "a PNG profile that unpacks to 100 MB": (
        lambda: png(chunk(b"iCCP", b"k\0\0" + hundred_megabytes()))
    ),
    "a PNG of nine thousand profiles of 1 MB": (
        lambda: png(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1_000_000))) * 9000)
    ),
    "a PNG whose pixels go on for 100 MB": (
        lambda: (
            FILES["PNG"]()[:33]
            + chunk(b"IDAT", zlib.compress(bytes(8000)))
            + chunk(b"IDAT", hundred_megabytes())
            + chunk(b"IEND", b"")
        )
    ),
    "a PNG that announces two billion frames": (
        lambda: (
            FILES["PNG"]()[:33]
            + chunk(b"acTL", struct.pack(">II", 0x7FFFFFFF, 0))
            + FILES["PNG"]()[33:]
        )
    ),
    "a TIFF whose directories point at themselves": (
        lambda: tiff(grid(64, 64, 1, t273=2000, t279=4096, t330=8, t34665=8, t34853=8), bytes(4096))
    ),
    "a JPEG whose EXIF points at itself": (
        lambda: encode(
            picture(),
            "JPEG",
            exif=b"Exif\0\0II*\0"
            + struct.pack("<IHHHIIHHIII", 8, 2, 0x8769, LONG, 1, 8, 0x0112, 3, 1, 1, 8),
        )
    ),
    "a raw TIFF with a strip of four gigabytes": (
        lambda: tiff(grid(64, 64, 1, t273=2000, t279=0xFFFFFFFF), bytes(4096))
    ),
    "a GIF of ten thousand frames": (
        lambda: (
            FILES["GIF"]()[:-1]
            + (b"," + struct.pack("<HHHHB", 0, 0, 9, 9, 0) + b"\2\2\x44\1\0") * 10_000
            + b";"
        )
    ),
}


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("evil.html", "<script>alert(1)</script>")
    return file.getvalue()


HTML = b"<html><script>alert(1)</script></html>"
POLYGLOTS = {  # {name: (HTTP status, function)}; the first bytes decide
    "a JPEG that is an archive too": (200, lambda: FILES["JPEG"]() + zipped()),
    "a GIF that is a script too": (200, lambda: FILES["GIF"]() + b"*/=1;alert(1)//"),
    "a PNG that is a page too": (200, lambda: png(chunk(b"tEXt", b"c\0" + HTML)) + HTML),
    "a JPEG with a page in its comment": (200, lambda: segments(0xFE, HTML, 500)),
    "an archive with a JPEG inside": (415, lambda: zipped() + FILES["JPEG"]()),
    "a PDF that shows a JPEG": (
        415,
        lambda: b"%PDF-1.7\n1 0 obj <</Filter /DCTDecode>> stream\n" + FILES["JPEG"](),
    ),
    "a page that ends in a PNG": (415, lambda: HTML + FILES["PNG"]()),
    "a script that starts like a GIF": (422, lambda: b"GIF89a=0;alert(1)//"),
    "PostScript that starts like a program": (
        415,
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run",
    ),
    "an SVG that includes a file": (
        415,
        lambda: b'<?xml version="1.0"?><svg><image href="file:///etc/passwd"/></svg>',
    ),
}
BOMBS = {  # {name: function -> (HTTP status, bytes)}
    name: lambda status=status, make=make: (status, make())
    for status, group in ((413, TOO_LARGE), (422, BROKEN), (200, HARMLESS))
    for name, make in group.items()
}
