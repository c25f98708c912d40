"""Refused files and their errors: truncated, corrupt, too large, unknown. Never a grey image.

Pillow warns about some broken files before it gives up. Warnings are errors in these tests but not
for users, so tests of broken files use the fixture `as_users_have_it`.
"""

import base64
import contextlib
import re
import struct
import zlib

import numpy as np
import pytest
from commands import ROOT
from crafted import bmp, gif, grid, tiff
from PIL import Image
from written import FILES, PNG_START, animation, chunk, encode, heic, picture, png

from detector.base.errors import BrokenImage, ImageError, ImageTooLarge, UnsupportedImage
from detector.images import decoding, formats

FAULTS = ROOT / "tests" / "faults"
MAGIC = 16  # first bytes that identify every format


def test_every_format_is_among_the_files_here():
    assert {formats.sniff(make()) for make in FILES.values()} == set(formats.FORMATS)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_cut_anywhere_is_broken_or_complete(kind, as_users_have_it):
    data = FILES[kind]()
    whole = np.asarray(decoding.decode_image(data))
    for cut in sorted(
        {*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 40, len(data))}
    ):
        try:
            image = decoding.decode_image(data[:cut])
        except BrokenImage as error:
            assert "\n" not in str(error) and error.status == 422
            continue
        except UnsupportedImage:
            assert cut < MAGIC, cut
            continue
        # some formats end in bytes that no pixel needs: an end marker, a checksum, a second picture
        assert cut > len(data) * (0.3 if "animated" in kind or "two" in kind else 0.9), cut
        assert (np.asarray(image) == whole).all(), (
            f"cut after {cut} of {len(data)} bytes: other pixels"
        )


@pytest.mark.parametrize(
    "magic",
    [
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"MM\0*",
        b"RIFF\0\0\0\0WEBP",
        b"\0\0\0 ftypavif",
    ],
)
def test_a_format_that_only_announces_itself_is_broken(magic):
    with pytest.raises(BrokenImage):
        decoding.decode_image(magic + b"and then nothing that fits" * 4)


NOTHING = {
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


@pytest.mark.parametrize("data", NOTHING.values(), ids=NOTHING)
def test_a_file_without_pixels_is_broken(data, as_users_have_it):
    with pytest.raises(BrokenImage):
        decoding.decode_image(data)


@pytest.mark.parametrize("name", [b"tRNS", b"PLTE", b"IHDR"])
def test_a_png_chunk_that_pixels_need_is_broken_with_a_wrong_checksum(name):
    with pytest.raises(BrokenImage):
        decoding.decode_image(png(chunk(name, b"\0\1", checksum=12345)))


# ---- parts that no pixel needs ----


def with_riff_size(data, size):
    return data[:4] + struct.pack("<I", size) + data[8:]


def inserted(data, segment):
    """A JPEG with another first segment."""
    return data[:2] + segment + data[2:]


def damaged(data, name, at, filler):
    """The file with other bytes at this distance from the last `name`."""
    at += data.rindex(name)
    return data[:at] + filler + data[at + len(filler) :]


EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"
WITH_METADATA = {
    "PNG": png(),
    "JPEG": encode(picture(), "JPEG", exif=EXIF),
    "WebP": encode(picture(), "WEBP", exif=EXIF, icc_profile=bytes(33)),
    "AVIF": encode(picture(), "AVIF", exif=EXIF),
    "HEIC": heic(picture(), exif=EXIF),
    "GIF": FILES["GIF"](),
    "BMP": encode(picture(size=(61, 44)), "BMP"),
    "MPO": animation("MPO"),
}
ANCILLARY = {
    **{
        f"PNG, {name.decode()} with a wrong checksum": (
            "PNG",
            lambda data, name=name: png(chunk(name, b"\0\0\1\0", checksum=12345)),
        )
        for name in (b"tEXt", b"gAMA", b"eXIf", b"iCCP", b"zTXt", b"iTXt", b"acTL", b"prVt")
    },
    "PNG, a text that unpacks to 100 MB": (
        "PNG",
        lambda data: png(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000)))),
    ),
    "PNG, a transparent value of no right length": ("PNG", lambda data: png(chunk(b"tRNS", b"\1"))),
    "PNG, without its end": ("PNG", lambda data: data[:-12]),
    "PNG, with half of its end": ("PNG", lambda data: data[:-5]),
    "JPEG, a profile without a number": (
        "JPEG",
        lambda data: inserted(data, b"\xff\xe2\0\x0eICC_PROFILE\0"),
    ),
    "JPEG, half of JFIF": ("JPEG", lambda data: inserted(data, b"\xff\xe0\0\6JFIF")),
    "JPEG, half of Adobe": ("JPEG", lambda data: inserted(data, b"\xff\xee\0\7Adobe")),
    "JPEG, half of IPTC": (
        "JPEG",
        lambda data: inserted(data, b"\xff\xed\0\x16Photoshop 3.0\x008BIM\3\xed"),
    ),
    "JPEG, EXIF of nothing": ("JPEG", lambda data: damaged(data, b"MM\0*", 0, b"nothing")),
    "JPEG, a broken list of pictures": (
        "JPEG",
        lambda data: inserted(data, b"\xff\xe2\0\x0cMPF\0MM\0*\xff\xff"),
    ),
    "JPEG, without its end": ("JPEG", lambda data: data[:-2]),
    "JPEG, with half of its end": ("JPEG", lambda data: data[:-1]),
    "MPO, its second picture cut": ("MPO", lambda data: data[:-500]),
    "GIF, without its end": ("GIF", lambda data: data[:-1]),
    "WebP, too long": ("WebP", lambda data: with_riff_size(data, len(data) + 500)),
    "WebP, too short": ("WebP", lambda data: with_riff_size(data, 20)),
    "WebP, cut in its EXIF": ("WebP", lambda data: data[:-9]),
    "WebP, EXIF of two gigabytes": (
        "WebP",
        lambda data: damaged(data, b"EXIF", 4, b"\xff\xff\xff\x7f"),
    ),
    "AVIF, EXIF of nothing": ("AVIF", lambda data: damaged(data, b"MM\0*", 0, b"nothing")),
    "HEIC, EXIF of nothing": ("HEIC", lambda data: damaged(data, b"MM\0*", 0, b"nothing")),
    "BMP, without its last padding": ("BMP", lambda data: data[:-1]),
}


def same_pixels(*files):
    first, second = (np.asarray(decoding.decode_image(data)) for data in files)
    return np.array_equal(first, second)


@pytest.mark.parametrize("kind, damage", ANCILLARY.values(), ids=ANCILLARY)
def test_damaged_metadata_and_tails_change_no_pixel(kind, damage, as_users_have_it):
    sound = WITH_METADATA[kind]
    assert damage(sound) != sound and same_pixels(damage(sound), sound)


@pytest.mark.parametrize(
    "name", ["ztxt-large.png", "itxt-large.png", "text-bad-crc.png", "no-end-marker.jpg"]
)
def test_odd_files_of_programs_and_cameras_are_read(name):
    assert decoding.decode_image((FAULTS / name).read_bytes()).size == (200, 160)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 1}],
    ids=["baseline", "progressive", "restarts by rows", "restarts by blocks"],
)
def test_a_jpeg_without_its_end_marker_is_read_only_where_it_is_complete(options):
    data = encode(picture(), "JPEG", **options)
    assert same_pixels(data[:-2], data)

    def places(pattern):
        return [match.start() for match in re.finditer(pattern, data[:-2]) if match.start() >= 600]

    restarts, scans = places(rb"\xff[\xd0-\xd7]")[::5], places(rb"\xff\xda")[1:]
    stuffed = [at + 1 for at in places(rb"\xff\0")[::5]]
    behind = [at + 2 for at in restarts]
    for cut in {*restarts, *behind, *scans, *stuffed, *range(len(data) - 30, len(data) - 4)}:
        with pytest.raises(BrokenImage, match="truncated"):
            decoding.decode_image(data[:cut])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_cut_by_an_early_end_marker_is_no_grey_picture(mode, options):
    data = encode(picture(mode, (300, 220)), "JPEG", **options)
    at = data.index(b"\xff\xda") + 150  # in the first scan, whose loss leaves grey
    with pytest.raises(BrokenImage, match="its lower rows are missing"):
        decoding.decode_image(data[:at].rstrip(b"\xff") + b"\xff\xd9")


@pytest.mark.parametrize("marker", [b"\xff\1", b"\xff\xd0", b"\xff\xd5", b"\xff\xfe\0\2"])
def test_a_jpeg_with_a_marker_amid_its_bits_is_no_grey_picture(marker):
    data = encode(picture(size=(300, 220)), "JPEG")
    at = data.index(b"\xff\xda") + 2000
    with pytest.raises(BrokenImage, match="its lower rows are missing"):
        decoding.decode_image(data[:at].rstrip(b"\xff") + marker + data[at:])


@pytest.mark.parametrize("mode, grey", [("RGB", (128,) * 3), ("L", 128), ("CMYK", (127,) * 4)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_a_sound_jpeg_that_is_grey_below_is_read(mode, grey, options):
    image = picture(mode=mode)
    image.paste(grey, (0, image.height // 2, *image.size))
    assert decoding.decode_image(encode(image, "JPEG", **options)).size == image.size


# ---- other formats ----

OTHERS = {
    "JPEG XL": (b"\xff\x0a" + bytes(40), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40)),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(90), b"\xff\x4f\xff\x51" + bytes(40)),
    "camera raw": (
        b"\0\0\0\x18ftypcrx " + bytes(40),
        b"FUJIFILMCCD-RAW 0201",
        b"IIRO\x08\0\0\0",
        b"IIU\0\x18\0\0\0",
    ),
    "CgBI": (PNG_START + chunk(b"CgBI", bytes(4)) + png()[8:],),
    "Photoshop": (b"8BPS\0\1" + bytes(40),),
    "DDS": (b"DDS " + bytes(124),),
    "FITS": (b"SIMPLE  = T",),
    "icon": (b"\0\0\1\0\1\0" + bytes(60),),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<?xml version='1.0'?>\n<svg/>"),
}


@pytest.mark.parametrize("name, data", [(name, data) for name in OTHERS for data in OTHERS[name]])
def test_a_known_format_that_is_not_accepted_is_named_with_the_remedy(name, data):
    with pytest.raises(UnsupportedImage, match=f"{name}.*save the image as JPEG or PNG") as error:
        decoding.decode_image(data)
    assert error.value.is_image and error.value.status == 415


@pytest.mark.parametrize("kind", sorted(FILES.keys() - {"BMP"}))  # BM starts words
def test_an_image_in_base64_is_named_with_the_remedy(kind):
    with pytest.raises(UnsupportedImage, match="base64 text of an image.*: decode it"):
        decoding.decode_image(base64.b64encode(FILES[kind]()))


@pytest.mark.parametrize(
    "name, error", [("announces-heic.heic", "HEIC"), ("announces-jxl.jxl", "JPEG XL")]
)
def test_the_first_bytes_of_a_format_name_it_in_the_error(name, error):
    with pytest.raises(ImageError, match=f"{error}.*save the image as JPEG or PNG") as raised:
        decoding.decode_image((FAULTS / name).read_bytes())
    assert raised.value.is_image


STRANGERS = {
    "nothing": (b"", "the file is empty"),
    "one byte": (b"x", "JPEG"),
    "text": (b"hello, world\n" * 50, "JPEG"),
    "a byte order mark": (b"\xef\xbb\xbf", "JPEG"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1", "JPEG"),
    "a page": (b"<html></html>", "JPEG"),
    "a script": (b"#!/bin/sh\n", "JPEG"),
    "PDF": (b"%PDF-1.7\n", "JPEG"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "JPEG"),
    "ELF": (b"\x7fELF", "JPEG"),
    "a program": (b"MZ" + bytes(500), "JPEG"),
    "zeros": (bytes(1000), "JPEG"),
    "half of PPM": (b"P6 1 1 255 abc", "JPEG"),
}


@pytest.mark.parametrize("data, words", STRANGERS.values(), ids=STRANGERS)
def test_bytes_of_no_image_format_are_no_image(data, words):
    with pytest.raises(UnsupportedImage, match=words) as error:
        decoding.decode_image(data)
    assert error.value.status == 415 and not error.value.is_image


# ---- sizes ----


@pytest.mark.parametrize("kind", [k for k in FILES if k != "two-picture JPEG"])
def test_the_limit_on_pixels_counts_width_times_height(kind):
    data = FILES[kind]()
    assert decoding.open_image(data, max_pixels=60 * 44).size == (60, 44)
    with pytest.raises(ImageTooLarge, match="60 x 44 pixels; at most 2,639"):
        decoding.open_image(data, max_pixels=60 * 44 - 1)


def test_a_limit_above_pillows_own_is_kept(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decoding.decode_image(FILES["PNG"](), max_pixels=5000).size == (60, 44)


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (400, 2), (3, 600)])
def test_an_image_up_to_200_times_as_long_as_wide_is_accepted(size):
    assert decoding.decode_image(encode(picture(size=size), "PNG")).size == size


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (401, 2), (2, 401), (5000, 3)])
def test_a_longer_image_is_refused(size):
    with pytest.raises(ImageTooLarge, match=f"{size[0]} x {size[1]} pixels.*200 times"):
        decoding.decode_image(encode(picture(size=size), "PNG"))


# ---- crafted files ----


@pytest.mark.parametrize("kind", FILES)
def test_a_scrambled_file_gives_an_image_or_an_image_error(kind, as_users_have_it):
    data, rng = FILES[kind](), np.random.default_rng(0)
    for _ in range(80):
        scrambled = np.frombuffer(data, np.uint8).copy()
        # mostly in the header, where the parsers are
        at = (rng.random(int(rng.integers(1, 8))) ** 3 * len(data)).astype(int)
        scrambled[at] = rng.integers(0, 256, len(at))
        try:
            image = decoding.decode_image(scrambled.tobytes(), max_pixels=1_000_000)
        except ImageError as error:
            assert str(error)
        else:
            assert image.mode == "RGB" and min(image.size) > 0


def test_a_tiff_in_strips_may_have_tile_sizes_of_text():
    tile_sizes = dict.fromkeys((322, 323), (2, 1, b"A\0\0\0"))
    data = tiff(grid(8, 8, 1, t273=2000, t278=8, t279=64) | tile_sizes, bytes(64))
    assert decoding.decode_image(data).size == (8, 8)


def test_a_jpeg_of_endless_scans_is_refused_and_a_progressive_jpeg_is_not(photos):
    data = encode(Image.open(photos["china.jpg"]), "JPEG", progressive=True)
    decoding.decode_image(data)
    scan = data.rindex(b"\xff\xda")
    with pytest.raises(BrokenImage, match="more than 50 scans"):
        decoding.decode_image(data[:scan] + data[scan:-2] * 50 + data[-2:])


@pytest.mark.parametrize("length", [8, 12, 16, 19, 24])
def test_a_heic_whose_size_box_has_another_length_is_one_of_our_errors(length):
    data = bytearray(heic(picture()))
    start = data.index(b"ispe") - 4
    data[start : start + 4] = length.to_bytes(4)
    with contextlib.suppress(ImageError):
        decoding.decode_image(bytes(data))
