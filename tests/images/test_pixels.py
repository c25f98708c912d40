"""Right pixels from every kind of file: each row's are computed from what was written, or by another decoder, never by Pillow.

Writers: tifffile, imagecodecs, and bytes made by hand.
"""

import io
import struct
import warnings
import zlib

import heif_boxes
import imagecodecs
import numpy as np
import pillow_heif
import pytest
import tifffile
from PIL import Image
from test_decoding import chunk

from detector.base.errors import BrokenImage, UnsupportedImage
from detector.images import decoding, pixels

HEIGHT, WIDTH = 24, 40
Y, X = np.mgrid[:HEIGHT, :WIDTH]
RAMP = X / (WIDTH - 1)  # 0 to 1
COLOURS = np.stack([RAMP, Y / (HEIGHT - 1), 1 - RAMP], axis=2)
ALPHA = np.where(Y < HEIGHT // 2, 1.0, 0.25)


def stored(values, bits):
    """0 to 1 -> unsigned numbers of so many bits."""
    return np.round(values * (2**bits - 1)).astype(np.uint8 if bits <= 8 else np.uint16)


def over_white(colours, alpha):
    colours = np.broadcast_to(
        colours[..., None] if colours.ndim == 2 else colours, (HEIGHT, WIDTH, 3)
    )
    return 255 * (
        colours * np.broadcast_to(alpha, (HEIGHT, WIDTH))[..., None]
        + 1
        - np.broadcast_to(alpha, (HEIGHT, WIDTH))[..., None]
    )


def rgb(data):
    return np.asarray(decoding.decode_image(data)).astype(float)


def assert_pixels(data, right, tolerance=1.01):
    assert np.abs(rgb(data) - right).max() <= tolerance


# ---- PNG ----


def png(bits, colour, samples, *chunks):
    """A PNG of stored numbers [height, width] or [height, width, channels]."""
    samples = samples.reshape(HEIGHT, -1)
    if bits < 8:
        unpacked = (samples[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        rows = np.packbits(unpacked.reshape(HEIGHT, -1).astype(np.uint8), axis=1)
    else:
        rows = samples.astype(np.uint8 if bits == 8 else ">u2")
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + b"".join(chunks)
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("clear", [None, 0, 1, "high"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_png_of_any_depth_with_and_without_a_transparent_value(bits, clear):
    grey = stored(RAMP, bits)
    key = {"high": 2**bits - 1, None: None}.get(clear, clear)
    chunks = [] if key is None else [chunk(b"tRNS", struct.pack(">H", key))]
    alpha = np.ones((HEIGHT, WIDTH)) if key is None else (grey != key).astype(float)
    assert_pixels(png(bits, 0, grey, *chunks), over_white(grey / (2**bits - 1), alpha))


def test_a_colour_png_with_a_transparent_colour():
    colours = stored(COLOURS, 8)
    key = colours[3, 5]
    alpha = (colours != key).any(axis=2).astype(float)
    assert alpha.min() == 0
    assert_pixels(
        png(8, 2, colours, chunk(b"tRNS", struct.pack(">3H", *key))),
        over_white(colours / 255, alpha),
    )
    with pytest.raises(UnsupportedImage, match="16-bit colour PNG"):
        decoding.decode_image(
            png(16, 2, stored(COLOURS, 16), chunk(b"tRNS", struct.pack(">3H", 1, 2, 3)))
        )


def test_bits_of_a_transparent_value_above_the_depth_do_not_count():
    """PNG 11.3.2.1: only the low bits are used."""
    grey, colours = stored(RAMP, 2), stored(COLOURS, 8).astype(int)
    right = over_white(grey / 3, (grey != 1).astype(float))
    assert_pixels(png(2, 0, grey, chunk(b"tRNS", struct.pack(">H", 4 + 1))), right)
    clear = chunk(b"tRNS", struct.pack(">3H", *(colours[3, 5] + 256)))
    seen = (colours != colours[3, 5]).any(axis=2).astype(float)
    assert_pixels(png(8, 2, colours, clear), over_white(colours / 255, seen))


def test_a_picture_that_ends_transparent_is_not_wholly_transparent(monkeypatch):
    monkeypatch.setattr(pixels, "STRIP_PIXELS", 2 * WIDTH)
    alpha = (Y < HEIGHT // 2).astype(float)
    data = png(8, 6, stored(np.dstack([COLOURS, alpha]), 8))
    assert_pixels(data, over_white(COLOURS, alpha))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_colour_png_and_pngs_with_alpha(bits):
    grey, colours, alpha = stored(RAMP, bits), stored(COLOURS, bits), stored(ALPHA, bits)
    assert_pixels(png(bits, 2, colours), 255 * COLOURS)
    assert_pixels(png(bits, 4, np.dstack([grey, alpha])), over_white(RAMP, ALPHA), 2)
    assert_pixels(png(bits, 6, np.dstack([colours, alpha])), over_white(COLOURS, ALPHA), 2)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("alphas", [(), (0,), (128, 255), (0, 64)])
def test_a_palette_png_with_and_without_alphas(bits, alphas):
    index = ((X + Y) % 2**bits).astype(np.uint8)
    palette = np.random.default_rng(0).integers(0, 256, (2**bits, 3))
    opacity = np.concatenate([alphas, np.full(2**bits, 255)])[: 2**bits] / 255
    chunks = [
        chunk(b"PLTE", palette.astype(np.uint8).tobytes()),
        *([chunk(b"tRNS", bytes(alphas[: 2**bits]))] if alphas else []),
    ]
    assert_pixels(png(bits, 3, index, *chunks), over_white(palette[index] / 255, opacity[index]))


CLEAR = {
    "PNG": lambda: png(8, 6, np.zeros((HEIGHT, WIDTH, 4), int)),
    "16-bit grey PNG": lambda: png(16, 0, np.zeros((HEIGHT, WIDTH), int), chunk(b"tRNS", bytes(2))),
    "palette PNG": lambda: png(1, 3, X % 2, chunk(b"PLTE", bytes(6)), chunk(b"tRNS", bytes(2))),
    "TIFF": lambda: tiff(
        np.zeros((HEIGHT, WIDTH, 4), np.uint8), photometric="rgb", extrasamples=["unassalpha"]
    ),
    "BMP": lambda: bmp(
        32, np.zeros((HEIGHT, 4 * WIDTH)), masks=(0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    ),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_a_wholly_transparent_picture_gets_no_verdict(kind):
    with pytest.raises(UnsupportedImage, match="wholly transparent") as error:
        decoding.decode_image(CLEAR[kind]())
    assert error.value.is_image


def test_a_palette_png_without_its_palette_is_broken():
    with pytest.raises(BrokenImage, match="lacks the palette"):
        decoding.decode_image(png(8, 3, stored(RAMP, 4)))


# ---- TIFF ----


def tiff(samples, **options):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tifffile tells of what few programs read
        tifffile.imwrite(file, samples, metadata=None, **options)
    return file.getvalue()


def extras(kind):
    return {"extrasamples": [kind]}


GREY = 255 * np.repeat(RAMP[..., None], 3, axis=2)
BLACK, WHITE, COLOUR = (
    {"photometric": "minisblack"},
    {"photometric": "miniswhite"},
    {"photometric": "rgb"},
)
INKS = np.dstack([COLOURS, 0.3 * RAMP])
MAP = np.random.default_rng(0).integers(0, 65536, (3, 256)).astype(np.uint16)
TIFFS = {
    **{
        f"{bits}-bit grey": (
            stored(RAMP, bits),
            BLACK | {"bitspersample": bits},
            stored(RAMP, bits)[..., None] * 255.0 / (2**bits - 1),
        )
        for bits in (1, 2, 4, 8, 12, 16)
    },
    **{
        f"{bits}-bit grey, white is zero": (
            stored(RAMP, bits),
            WHITE | {"bitspersample": bits},
            255 - stored(RAMP, bits)[..., None] * 255.0 / (2**bits - 1),
        )
        for bits in (1, 2, 4, 8, 16)
    },
    "8-bit colour": (stored(COLOURS, 8), COLOUR, 255 * COLOURS),
    "16-bit colour": (stored(COLOURS, 16), COLOUR, 255 * COLOURS),
    "8-bit colour in planes": (
        stored(COLOURS, 8).transpose(2, 0, 1),
        COLOUR | {"planarconfig": "separate"},
        255 * COLOURS,
    ),
    "16-bit colour in planes": (
        stored(COLOURS, 16).transpose(2, 0, 1),
        COLOUR | {"planarconfig": "separate"},
        255 * COLOURS,
    ),
    "8-bit grey with alpha": (
        stored(np.dstack([RAMP, ALPHA]), 8),
        BLACK | extras("unassalpha"),
        over_white(RAMP, ALPHA),
    ),
    "8-bit grey with multiplied alpha": (
        stored(np.dstack([RAMP * ALPHA, ALPHA]), 8),
        BLACK | extras("assocalpha"),
        over_white(RAMP, ALPHA),
    ),
    "8-bit grey with a mask": (
        stored(np.dstack([RAMP, ALPHA]), 8),
        BLACK | extras("unspecified"),
        GREY,
    ),
    "16-bit grey with alpha": (
        stored(np.dstack([RAMP, ALPHA]), 16),
        BLACK | extras("unassalpha"),
        over_white(RAMP, ALPHA),
    ),
    **{
        f"{bits}-bit colour with {name}": (
            stored(np.dstack([values, ALPHA]), bits),
            COLOUR | extras(kind),
            right,
        )
        for bits in (8, 16)
        for name, kind, values, right in (
            ("alpha", "unassalpha", COLOURS, over_white(COLOURS, ALPHA)),
            ("a mask", "unspecified", COLOURS, 255 * COLOURS),
            (
                "multiplied alpha",
                "assocalpha",
                COLOURS * ALPHA[..., None],
                over_white(COLOURS, ALPHA),
            ),
        )
    },
    **{
        f"{bits}-bit inks": (
            stored(INKS, bits),
            {"photometric": "separated"},
            255 * (1 - COLOURS) * (1 - INKS[..., 3:]),
        )
        for bits in (8, 16)
    },
    "8-bit colour with alpha in planes": (
        stored(np.dstack([COLOURS, ALPHA]), 8).transpose(2, 0, 1),
        COLOUR | extras("unassalpha") | {"planarconfig": "separate"},
        over_white(COLOURS, ALPHA),
    ),
    "a palette": (
        stored(RAMP, 8),
        {"photometric": "palette", "colormap": MAP},
        MAP.T[stored(RAMP, 8)] / 257,
    ),
    "a palette of 8-bit values": (
        stored(RAMP, 8),
        {"photometric": "palette", "colormap": MAP // 257},
        MAP.T[stored(RAMP, 8)] // 257,
    ),
    "32-bit numbers": ((RAMP * 2**31).astype(np.uint32), BLACK, None),
    "64-bit floats": (RAMP, BLACK, None),
    "32-bit floats": (RAMP.astype(np.float32), BLACK, None),
    "16-bit floats": (RAMP.astype(np.float16), BLACK, None),
    "signed 8-bit numbers": ((127 * RAMP).astype(np.int8), BLACK, None),
    "signed 16-bit numbers": ((9999 * RAMP).astype(np.int16), BLACK, None),
    "32-bit colour": ((COLOURS * 2**31).astype(np.uint32), COLOUR, None),
    "CIELab": (stored(COLOURS, 8), {"photometric": "cielab"}, None),
    "a reduced copy": (stored(COLOURS, 8), COLOUR | {"subfiletype": 1}, None),
    "a DNG": (
        stored(COLOURS, 8),
        COLOUR | {"extratags": [(50706, 1, 4, (1, 4, 0, 0), True)]},
        None,
    ),
    "a sensor's mosaic": (stored(RAMP, 16), {"photometric": "cfa"}, None),
}
REFUSED = {"16-bit colour in planes", "16-bit grey with alpha", "8-bit colour with alpha in planes"}
LAYOUTS = {
    "raw": {},
    "big-endian": {"byteorder": ">"},
    "deflate": {"compression": "zlib"},
    "LZW": {"compression": "lzw"},
    "predicted": {"compression": "zlib", "predictor": True},
    "rows": {"rowsperstrip": 5},
    "tiles": {"tile": (16, 16)},
    "BigTIFF": {"bigtiff": True},
    "packed": {"compression": "packbits"},
}


def written():
    """(kind, layout) of all that tifffile writes."""
    for kind, (samples, options, _) in TIFFS.items():
        for layout, more in LAYOUTS.items():
            try:
                tiff(samples, **options, **more)
            except (ValueError, NotImplementedError, TypeError, RuntimeError, OSError):
                continue
            yield kind, layout


@pytest.mark.parametrize("kind, layout", list(written()))
def test_a_tiff_is_what_its_tags_declare_or_refused_by_name(kind, layout):
    samples, options, right = TIFFS[kind]
    data = tiff(samples, **options, **LAYOUTS[layout])
    if right is None or kind in REFUSED or (kind, layout) == ("12-bit grey", "big-endian"):
        with pytest.raises(UnsupportedImage, match="save the (image|picture) as") as error:
            decoding.decode_image(data)
        assert error.value.is_image
    else:
        assert_pixels(data, right, 2.01)


def tagged(samples, tag, value, **options):
    return tiff(samples, extratags=[(tag, 3, 1, value, True)], **options)


def reversed_bits():
    """Tag 266 is tifffile's own: another is written and renamed."""
    data = tagged(stored(RAMP, 8), 265, 2, **BLACK)
    return data.replace(struct.pack("<HHI", 265, 3, 1), struct.pack("<HHI", 266, 3, 1))


def ycbcr_in_planes():
    """Tag 284 is tifffile's own: its value is changed."""
    data = tiff(stored(COLOURS, 8), photometric="ycbcr", compression="jpeg")
    assert decoding.decode_image(data)
    return data.replace(struct.pack("<HHIH", 284, 3, 1, 1), struct.pack("<HHIH", 284, 3, 1, 2))


def without_extra_samples():
    data = tiff(stored(np.dstack([RAMP, ALPHA]), 8), **BLACK, **extras("unassalpha"))
    return data.replace(struct.pack("<HH", 338, 3), struct.pack("<HH", 337, 3))


def camera_raw():
    """A TIFF with Canon's mark behind its header; its directory lies at the end."""
    data = tiff(stored(COLOURS, 8), **COLOUR)
    directory = data[8 : 14 + 12 * int.from_bytes(data[8:10], "little")]
    return data[:4] + struct.pack("<I", len(data)) + b"CR" + data[10:] + directory


@pytest.mark.parametrize(
    "make, words",
    [
        (reversed_bits, "reversed bits"),
        (lambda: tagged(stored(INKS, 8), 332, 2, photometric="separated"), "inks other"),
        (lambda: tagged(stored(COLOURS, 8), 255, 2, **COLOUR), "preview"),
        (lambda: tiff(stored(COLOURS, 8), photometric="ycbcr"), "YCbCr that is not JPEG"),
        (ycbcr_in_planes, "separate planes"),
        (
            lambda: tiff(
                stored(np.dstack([INKS, ALPHA]), 8), photometric="separated", **extras("unassalpha")
            ),
            "extra samples",
        ),
        (without_extra_samples, "2 samples a pixel"),
        (camera_raw, "camera raw"),
    ],
)
def test_a_tiff_of_a_rare_kind_is_refused_by_name(make, words):
    with pytest.raises(UnsupportedImage, match=words):
        decoding.decode_image(make())


# ---- BMP ----


def bmp(bits, rows, masks=(), palette=b"", head=108):
    """A BMP of stored rows, from above."""
    pad = -(WIDTH * bits // 8) % 4
    body = b"".join(row.astype(np.uint8).tobytes() + bytes(pad) for row in np.asarray(rows)[::-1])
    fields = struct.pack(
        "<iiHHIIiiII",
        WIDTH,
        HEIGHT,
        1,
        bits,
        3 if masks else 0,
        len(body),
        0,
        0,
        len(palette) // 4,
        0,
    )
    fields += struct.pack(f"<{len(masks)}I", *masks)
    fields = fields.ljust(head - 4, b"\0")
    start = 14 + head + len(palette)
    return (
        b"BM"
        + struct.pack("<IHHII", start + len(body), 0, 0, start, head)
        + fields
        + palette
        + body
    )


def greys(*values):
    return b"".join(bytes([value] * 3 + [0]) for value in values)


def test_bmps_by_their_depth_their_masks_and_their_palette():
    colours, alpha = stored(COLOURS, 8), stored(ALPHA, 8)
    two, sixteen = (X + Y) % 2, (X + Y) % 16
    assert_pixels(bmp(24, colours[..., ::-1].reshape(HEIGHT, -1)), 255 * COLOURS)
    quads = np.dstack([colours[..., ::-1], alpha]).reshape(HEIGHT, -1)
    assert_pixels(bmp(32, quads), 255 * COLOURS)
    assert_pixels(
        bmp(32, quads, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)), over_white(COLOURS, ALPHA), 2
    )
    assert_pixels(bmp(8, stored(RAMP, 8), palette=greys(*range(256))), GREY)
    assert_pixels(bmp(8, two, palette=greys(0, 255)), 255 * two[..., None])
    assert_pixels(
        bmp(4, two[:, ::2] * 16 + two[:, 1::2], palette=greys(0, 255)), 255 * two[..., None]
    )
    assert_pixels(
        bmp(4, sixteen[:, ::2] * 16 + sixteen[:, 1::2], palette=greys(*range(16))),
        sixteen[..., None],
    )
    with pytest.raises(UnsupportedImage, match="alpha mask"):
        decoding.decode_image(bmp(16, np.zeros((HEIGHT, 2 * WIDTH)), (0x7C00, 0x3E0, 0x1F, 0x8000)))


# ---- GIF, JPEG, HEIC, AVIF, WebP ----


def gif(frame, at, screen, clear=None):
    """A GIF of stored indices [height, width] of two colours, drawn at a place on a larger screen, uncompressed."""
    control = b"" if clear is None else b"!\xf9\4\1\0\0" + bytes([clear]) + b"\0"
    # codes of 3 bits: clear (4) before every second index keeps the table empty; 5 ends
    codes = [
        code
        for i, index in enumerate(frame.ravel())
        for code in ([4] if i % 2 == 0 else []) + [int(index)]
    ] + [5]
    bits = "".join(format(code, "03b")[::-1] for code in codes)
    bits = bits.ljust(-(-len(bits) // 8) * 8, "0")
    body = bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    blocks = b"".join(
        bytes([len(body[i : i + 255])]) + body[i : i + 255] for i in range(0, len(body), 255)
    )
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", *screen, 0x81, 0, 0)
        + bytes([200, 0, 0, 0, 0, 200] + [9] * 6)
        + control
        + b","
        + struct.pack("<HHHHB", *at, *frame.shape[::-1], 0)
        + b"\2"
        + blocks
        + b"\0;"
    )


def test_a_gif_s_first_frame_lies_on_white_and_so_do_its_transparent_pixels():
    index = (X + Y) % 2
    drawn = np.where(index[..., None], (0, 0, 200), (200, 0, 0)).astype(float)
    assert_pixels(gif(index, (0, 0), (WIDTH, HEIGHT)), drawn)
    screen = np.full((HEIGHT + 9, WIDTH + 5, 3), 255.0)
    screen[6 : 6 + HEIGHT, 3 : 3 + WIDTH] = drawn
    assert_pixels(gif(index, (3, 6), (WIDTH + 5, HEIGHT + 9)), screen)
    screen[6 : 6 + HEIGHT, 3 : 3 + WIDTH][index == 1] = 255
    assert_pixels(gif(index, (3, 6), (WIDTH + 5, HEIGHT + 9), clear=1), screen)


def test_inks_of_a_jpeg_are_read_by_adobe_s_marker_and_refused_without_it():
    inks = np.full(
        (16, 16, 4), (255, 128, 64, 230), np.uint8
    )  # as Adobe stores them, inverted: little ink
    data = imagecodecs.jpeg8_encode(inks, level=100, colorspace="CMYK", outcolorspace="CMYK")
    marker = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"
    bare = data.replace(data[data.index(b"\xff\xee") :][:16], b"") if b"\xff\xee" in data else data
    right = np.array([255, 128, 64]) * 230 / 255
    assert np.abs(rgb(bare[:2] + marker + bare[2:]) - right).max() <= 3
    with pytest.raises(UnsupportedImage, match="Adobe's marker"):
        decoding.decode_image(bare)


def heic(samples, mode="RGB", **options):
    file = io.BytesIO()
    pillow_heif.from_bytes(mode, samples.shape[1::-1], samples.tobytes()).save(
        file, quality=-1, chroma=444, **options
    )
    return file.getvalue()


def test_heic_of_eight_and_ten_bits_of_grey_and_with_alpha():
    assert_pixels(heic(stored(COLOURS, 8)), 255 * COLOURS, 3)
    assert_pixels(heic(stored(COLOURS, 16), "RGB;16"), 255 * COLOURS, 3)
    assert_pixels(heic(stored(RAMP, 8), "L"), GREY, 3)
    assert_pixels(
        heic(stored(np.dstack([COLOURS, ALPHA]), 8), "RGBA"), over_white(COLOURS, ALPHA), 4
    )
    with pytest.raises(UnsupportedImage, match="wholly transparent"):
        decoding.decode_image(heic(stored(np.dstack([COLOURS, 0 * ALPHA]), 8), "RGBA"))


@pytest.mark.parametrize("quarters", range(4))
def test_heic_is_turned_by_its_own_box(quarters):
    """ISO 23008-12: `irot` turns anticlockwise."""
    image = np.tile(stored(COLOURS, 8), (4, 4, 1))
    coded, configuration = heif_boxes.coded_picture(Image.fromarray(image), quality=-1, chroma=444)
    turn = heif_boxes.box(b"irot", bytes([quarters]))
    properties = [configuration, heif_boxes.size(*image.shape[1::-1]), turn]
    data = heif_boxes.heic([(1, b"hvc1", coded)], properties, {1: [1, 2, 3]})
    assert_pixels(data, np.rot90(image.astype(float), quarters), 3)


def test_heic_with_a_box_and_exif_of_one_turn_is_turned_once():
    tag = Image.Exif()
    tag[0x0112] = 6  # a quarter clockwise; pillow-heif writes the box for it
    data = heic(stored(COLOURS, 8), exif=tag.tobytes())
    assert b"irot" in data
    assert_pixels(data, np.rot90(255 * COLOURS, -1), 3)


def test_the_tiles_of_a_heic_lie_side_by_side():
    image = Image.fromarray(
        np.tile(stored(COLOURS, 8), (4, 4, 1))
    )  # libheif wants tiles of 64 at least
    whole = np.tile(np.asarray(image), (2, 3, 1))[:150, :400]
    assert_pixels(heif_boxes.tiled(image, 2, 3, 400, 150, quality=-1, chroma=444), whole, 3)


@pytest.mark.parametrize("alpha", [ALPHA, None])
def test_avif_and_webp_of_each_depth(alpha):
    values = COLOURS if alpha is None else np.dstack([COLOURS, alpha])
    right = over_white(COLOURS, 1.0 if alpha is None else alpha)
    assert_pixels(imagecodecs.webp_encode(stored(values, 8), lossless=True), right)
    assert_pixels(imagecodecs.avif_encode(stored(values, 8), level=100), right, 3)
    for bits in (10, 12):
        assert_pixels(
            imagecodecs.avif_encode(stored(values, bits), level=100, bitspersample=bits), right, 3
        )


def webp_animation(frame, at, screen):
    """An animated WebP of one frame, without the flag that says it has alpha."""

    def part(name, body):
        return name + struct.pack("<I", len(body)) + body

    def numbers(*values):
        return b"".join(value.to_bytes(3, "little") for value in values)

    place = numbers(at[0] // 2, at[1] // 2, frame.shape[1] - 1, frame.shape[0] - 1, 100) + b"\0"
    parts = [
        part(b"VP8X", b"\2\0\0\0" + numbers(screen[0] - 1, screen[1] - 1)),
        part(b"ANIM", bytes(6)),
        part(b"ANMF", place + imagecodecs.webp_encode(frame, lossless=True)[12:]),
    ]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_the_first_frame_of_an_animated_webp_lies_on_white():
    right = np.full((HEIGHT + 20, WIDTH + 20, 3), 255.0)
    right[6 : 6 + HEIGHT, 4 : 4 + WIDTH] = 255 * COLOURS
    assert_pixels(webp_animation(stored(COLOURS, 8), (4, 6), right.shape[1::-1]), right)
