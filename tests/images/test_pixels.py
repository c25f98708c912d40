"""Right pixels from every kind of file.

tifffile, imagecodecs and hand-made bytes write the files. The expected pixels are computed from
the written values, never by Pillow.
"""

import io
import struct
import warnings

import heif_boxes
import imagecodecs
import numpy as np
import pillow_heif
import pytest
import tifffile
from crafted import riff
from PIL import Image
from written import chunk, encode, png_of

from detector.base.errors import BrokenImage, UnsupportedImage
from detector.images import decoding, pixels

HEIGHT, WIDTH = 24, 40
Y, X = np.mgrid[:HEIGHT, :WIDTH]
RAMP = X / (WIDTH - 1)  # 0 to 1
COLOURS = np.stack([RAMP, Y / (HEIGHT - 1), 1 - RAMP], axis=2)
ALPHA = np.where(Y < HEIGHT // 2, 1.0, 0.25)


def stored(values, bits):
    """0 to 1 -> unsigned numbers of this many bits."""
    return np.round(values * (2**bits - 1)).astype(np.uint8 if bits <= 8 else np.uint16)


def over_white(colours, alpha):
    colours = colours if colours.ndim == 3 else colours[..., None].repeat(3, axis=2)
    alpha = np.broadcast_to(alpha, (HEIGHT, WIDTH))[..., None]
    return 255 * (colours * alpha + 1 - alpha)


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
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    return png_of((WIDTH, HEIGHT), bits, colour, body, *chunks)


@pytest.mark.parametrize("clear", [None, 0, 1, "high"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_png_of_any_depth_with_and_without_a_transparent_value(bits, clear):
    grey = stored(RAMP, bits)
    key = {"high": 2**bits - 1, None: None}.get(clear, clear)
    chunks = [] if key is None else [chunk(b"tRNS", struct.pack(">H", key))]
    alpha = np.ones((HEIGHT, WIDTH)) if key is None else (grey != key).astype(float)
    assert_pixels(png(bits, 0, grey, *chunks), over_white(grey / (2**bits - 1), alpha))


@pytest.mark.parametrize("beyond", [0, 256])
def test_a_colour_png_with_a_transparent_colour(beyond):
    """PNG 11.3.2.1: only the low bits count."""
    colours = stored(COLOURS, 8).astype(int)
    alpha = (colours != colours[3, 5]).any(axis=2).astype(float)
    assert alpha.min() == 0
    key = chunk(b"tRNS", struct.pack(">3H", *(colours[3, 5] + beyond)))
    assert_pixels(png(8, 2, colours, key), over_white(colours / 255, alpha))


def test_a_16_bit_colour_png_with_a_transparent_colour_is_refused():
    data = png(16, 2, stored(COLOURS, 16), chunk(b"tRNS", struct.pack(">3H", 1, 2, 3)))
    with pytest.raises(UnsupportedImage, match="16-bit colour PNG"):
        decoding.decode_image(data)


@pytest.mark.parametrize("low", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bits_of_a_transparent_value_above_the_depth_do_not_count(bits, low):
    """PNG 11.3.2.1: only the low bits count. libpng reads the value alike."""
    grey = stored(RAMP, bits)
    key = chunk(b"tRNS", struct.pack(">H", 2**bits + low))
    exif = chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0\0\0\0\0 tRNS" + bytes([0, 1 - low]) + b"IDAT")
    data = png(bits, 0, grey, exif, key, exif)
    assert_pixels(data, over_white(grey / (2**bits - 1), (grey != low).astype(float)))
    assert ((imagecodecs.png_decode(data)[..., 1] == 0) == (grey == low)).all()


def test_a_picture_with_a_transparent_end_is_accepted(monkeypatch):
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


def one_colour():
    """A palette picture of colour 5 only."""
    image = Image.new("P", (4, 4), 5)
    image.putpalette(range(3 * 8))
    return image


CLEAR = {
    "grey and alpha PNG": lambda: encode(Image.new("LA", (4, 4), (0, 0)), "PNG"),
    "8-bit grey PNG": lambda: encode(Image.new("L", (4, 4), 9), "PNG", transparency=9),
    "1-bit PNG": lambda: encode(Image.new("1", (4, 4), 0), "PNG", transparency=0),
    "colour PNG": lambda: encode(Image.new("RGB", (4, 4)), "PNG", transparency=(0, 0, 0)),
    "palette PNG, one colour": lambda: encode(one_colour(), "PNG", transparency=5),
    "WebP": lambda: encode(Image.new("RGBA", (4, 4)), "WEBP", lossless=True),
    "GIF": lambda: encode(one_colour(), "GIF", transparency=5),
    "HEIC": lambda: heic(stored(np.dstack([COLOURS, 0 * ALPHA]), 8), "RGBA"),
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


@pytest.mark.parametrize("make", CLEAR.values(), ids=CLEAR)
def test_a_wholly_transparent_picture_is_refused(make):
    with pytest.raises(UnsupportedImage, match="wholly transparent") as error:
        decoding.decode_image(make())
    assert error.value.is_image


def test_a_palette_png_without_its_palette_is_broken():
    with pytest.raises(BrokenImage, match="lacks the palette"):
        decoding.decode_image(png(8, 3, stored(RAMP, 4)))


# ---- TIFF ----


def tiff(samples, **options):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tifffile warns about rare kinds
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
    """(kind, layout) of all files that tifffile can write."""
    for kind, (samples, options, _) in TIFFS.items():
        for layout, more in LAYOUTS.items():
            try:
                tiff(samples, **options, **more)
            except (ValueError, NotImplementedError, TypeError, RuntimeError, OSError):
                continue
            yield kind, layout


@pytest.mark.parametrize("kind, layout", list(written()))
def test_a_tiff_is_read_as_its_tags_declare_or_refused_by_name(kind, layout):
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
    """tifffile writes tag 266 itself, so another tag is written and renamed."""
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
    """A TIFF with Canon's mark behind its header and the directory at its end."""
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
    """A BMP of stored rows, top first."""
    pad = -(WIDTH * bits // 8) % 4
    body = b"".join(row.astype(np.uint8).tobytes() + bytes(pad) for row in np.asarray(rows)[::-1])
    compression, colours = 3 if masks else 0, len(palette) // 4
    size = WIDTH, HEIGHT, 1, bits, compression, len(body), 0, 0, colours, 0
    fields = struct.pack("<iiHHIIiiII", *size) + struct.pack(f"<{len(masks)}I", *masks)
    start = 14 + head + len(palette)
    header = b"BM" + struct.pack("<IHHII", start + len(body), 0, 0, start, head)
    return header + fields.ljust(head - 4, b"\0") + palette + body


def greys(*values):
    return b"".join(bytes([value] * 3 + [0]) for value in values)


def nibbles(values):
    """Two pixels of 4 bits a byte."""
    return values[:, ::2] * 16 + values[:, 1::2]


BLUE_FIRST = stored(COLOURS, 8)[..., ::-1]
QUADS = np.dstack([BLUE_FIRST, stored(ALPHA, 8)]).reshape(HEIGHT, -1)
MASKS = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
TWO, SIXTEEN = (X + Y) % 2, (X + Y) % 16
BMPS = {
    "24 bits": (bmp(24, BLUE_FIRST.reshape(HEIGHT, -1)), 255 * COLOURS),
    "32 bits": (bmp(32, QUADS), 255 * COLOURS),
    "32 bits with masks": (bmp(32, QUADS, MASKS), over_white(COLOURS, ALPHA), 2),
    "256 greys": (bmp(8, stored(RAMP, 8), palette=greys(*range(256))), GREY),
    "two greys in 8 bits": (bmp(8, TWO, palette=greys(0, 255)), 255 * TWO[..., None]),
    "two greys in 4 bits": (bmp(4, nibbles(TWO), palette=greys(0, 255)), 255 * TWO[..., None]),
    "16 greys": (bmp(4, nibbles(SIXTEEN), palette=greys(*range(16))), SIXTEEN[..., None]),
}


@pytest.mark.parametrize("name", BMPS)
def test_a_bmp_of_any_depth_masks_and_palette(name):
    assert_pixels(*BMPS[name])


def test_a_16_bit_bmp_with_an_alpha_mask_is_refused():
    with pytest.raises(UnsupportedImage, match="alpha mask"):
        decoding.decode_image(bmp(16, np.zeros((HEIGHT, 2 * WIDTH)), (0x7C00, 0x3E0, 0x1F, 0x8000)))


# ---- GIF, JPEG, HEIC, AVIF, WebP ----


def gif(frame, at, screen, clear=None):
    """An uncompressed GIF: indices [height, width] of two colours, at a place on a screen."""
    control = b"" if clear is None else b"!\xf9\4\1\0\0" + bytes([clear]) + b"\0"
    # codes of 3 bits: clear (4) before every second index keeps the table empty; 5 ends
    pairs = frame.reshape(-1, 2)
    codes = [*np.insert(pairs, 0, 4, axis=1).ravel().tolist(), 5]
    number = sum(code << 3 * i for i, code in enumerate(codes))
    body = number.to_bytes(-(-3 * len(codes) // 8), "little")
    blocks = [body[i : i + 255] for i in range(0, len(body), 255)]
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", *screen, 0x81, 0, 0)
        + bytes([200, 0, 0, 0, 0, 200] + [9] * 6)
        + control
        + b","
        + struct.pack("<HHHHB", *at, *frame.shape[::-1], 0)
        + b"\2"
        + b"".join(bytes([len(block)]) + block for block in blocks)
        + b"\0;"
    )


def test_the_first_frame_of_a_gif_and_its_transparent_pixels_lie_on_white():
    index = (X + Y) % 2
    drawn = np.where(index[..., None], (0, 0, 200), (200, 0, 0)).astype(float)
    assert_pixels(gif(index, (0, 0), (WIDTH, HEIGHT)), drawn)
    screen = np.full((HEIGHT + 9, WIDTH + 5, 3), 255.0)
    screen[6 : 6 + HEIGHT, 3 : 3 + WIDTH] = drawn
    assert_pixels(gif(index, (3, 6), (WIDTH + 5, HEIGHT + 9)), screen)
    screen[6 : 6 + HEIGHT, 3 : 3 + WIDTH][index == 1] = 255
    assert_pixels(gif(index, (3, 6), (WIDTH + 5, HEIGHT + 9), clear=1), screen)


def test_inks_of_a_jpeg_are_read_with_adobes_marker_and_refused_without():
    # Adobe stores inks inverted
    inks = np.full((16, 16, 4), (255, 128, 64, 230), np.uint8)
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
    with_alpha = stored(np.dstack([COLOURS, ALPHA]), 8)
    assert_pixels(heic(with_alpha, "RGBA"), over_white(COLOURS, ALPHA), 4)


@pytest.mark.parametrize("quarters", range(4))
def test_a_heic_is_turned_by_its_own_box(quarters):
    """ISO 23008-12: `irot` turns anticlockwise."""
    image = np.tile(stored(COLOURS, 8), (4, 4, 1))
    coded, configuration = heif_boxes.coded_picture(Image.fromarray(image), quality=-1, chroma=444)
    turn = heif_boxes.box(b"irot", bytes([quarters]))
    properties = [configuration, heif_boxes.size(*image.shape[1::-1]), turn]
    data = heif_boxes.heic([(1, b"hvc1", coded)], properties, {1: [1, 2, 3]})
    assert_pixels(data, np.rot90(image.astype(float), quarters), 3)


def test_a_heic_whose_box_and_exif_give_the_same_turn_is_turned_once():
    tag = Image.Exif()
    tag[0x0112] = 6  # a quarter clockwise; pillow-heif writes the box too
    data = heic(stored(COLOURS, 8), exif=tag.tobytes())
    assert b"irot" in data
    assert_pixels(data, np.rot90(255 * COLOURS, -1), 3)


def test_a_heic_is_cut_to_its_clean_aperture():
    """ISO 14496-12, box `clap`: width, height, and the distance of both middles, as fractions."""
    image = np.tile(stored(COLOURS, 8), (4, 4, 1))
    coded, configuration = heif_boxes.coded_picture(Image.fromarray(image), quality=-1, chroma=444)
    aperture = heif_boxes.box(b"clap", struct.pack(">4I4i", 120, 1, 60, 1, -10, 1, 8, 1))
    properties = [configuration, heif_boxes.size(160, 96), aperture]
    data = heif_boxes.heic([(1, b"hvc1", coded)], properties, {1: [1, 2, 3]})
    assert_pixels(data, image[26:86, 10:130], 3)


def test_the_tiles_of_a_heic_lie_side_by_side():
    # libheif wants tiles of at least 64 pixels
    image = Image.fromarray(np.tile(stored(COLOURS, 8), (4, 4, 1)))
    whole = np.tile(np.asarray(image), (2, 3, 1))[:150, :400]
    assert_pixels(heif_boxes.tiled(image, 2, 3, 400, 150, quality=-1, chroma=444), whole, 3)


@pytest.mark.parametrize("alpha", [ALPHA, None])
def test_avif_and_webp_of_each_depth(alpha):
    values = COLOURS if alpha is None else np.dstack([COLOURS, alpha])
    right = over_white(COLOURS, 1.0 if alpha is None else alpha)
    assert_pixels(imagecodecs.webp_encode(stored(values, 8), lossless=True), right)
    assert_pixels(imagecodecs.avif_encode(stored(values, 8), level=100), right, 3)
    for bits in (10, 12):
        data = imagecodecs.avif_encode(stored(values, bits), level=100, bitspersample=bits)
        assert_pixels(data, right, 3)


def webp_animation(frame, at, screen):
    """An animated WebP of one frame, without the flag for alpha."""

    def numbers(*values):
        return b"".join(value.to_bytes(3, "little") for value in values)

    place = numbers(at[0] // 2, at[1] // 2, frame.shape[1] - 1, frame.shape[0] - 1, 100) + b"\0"
    return riff(
        (b"VP8X", b"\2\0\0\0" + numbers(screen[0] - 1, screen[1] - 1)),
        (b"ANIM", bytes(6)),
        (b"ANMF", place + imagecodecs.webp_encode(frame, lossless=True)[12:]),
    )


def test_the_first_frame_of_an_animated_webp_lies_on_white():
    right = np.full((HEIGHT + 20, WIDTH + 20, 3), 255.0)
    right[6 : 6 + HEIGHT, 4 : 4 + WIDTH] = 255 * COLOURS
    assert_pixels(webp_animation(stored(COLOURS, 8), (4, 6), right.shape[1::-1]), right)
