"""What is refused, and as what: truncated and corrupt files, bombs, strangers. Never a grey image, never a traceback.

Pillow warns about some broken files before it gives up on them. Warnings are errors in these tests but not for users,
so what concerns broken files runs with warnings as users have them.
"""

import io
import struct
import zlib

import numpy as np
import pillow_heif
import pytest
from commands import ROOT
from PIL import Image, ImageFile

from detector.base.errors import BrokenImage, ImageError, ImageTooLarge, UnsupportedImage
from detector.base.files import read_bytes
from detector.images import decoding, formats


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def heic(image, **options):
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **options)
    return file.getvalue()


def picture(mode="RGB", size=(60, 44)):
    """Smooth below, noise above: it compresses like a photograph, and no part of it is flat grey."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    wave = np.stack([128 + 90 * np.sin(x / 9 + i) * np.cos(y / 7 - i) for i in range(3)], axis=2)
    wave += np.random.default_rng(0).normal(0, 20, wave.shape)
    return Image.fromarray(wave.clip(0, 255).astype(np.uint8)).convert(mode)


FILES = {
    "JPEG": lambda: saved(picture(), "JPEG"),
    "progressive JPEG": lambda: saved(picture(), "JPEG", progressive=True),
    "grey JPEG": lambda: saved(picture("L"), "JPEG"),
    "CMYK JPEG": lambda: saved(picture("CMYK"), "JPEG"),
    "two-picture JPEG": lambda: saved(picture(), "MPO", save_all=True, append_images=[picture()]),
    "PNG": lambda: saved(picture(), "PNG"),
    "palette PNG": lambda: saved(picture().quantize(60), "PNG"),
    "16-bit PNG": lambda: saved(
        Image.fromarray(np.asarray(picture("L")).astype(np.uint16) * 257), "PNG"
    ),
    "animated PNG": lambda: saved(
        picture(), "PNG", save_all=True, append_images=[picture("L").convert("RGB")]
    ),
    "WebP": lambda: saved(picture(), "WEBP"),
    "lossless WebP": lambda: saved(picture(), "WEBP", lossless=True),
    "animated WebP": lambda: saved(
        picture(), "WEBP", save_all=True, append_images=[picture("L").convert("RGB")]
    ),
    "AVIF": lambda: saved(picture(), "AVIF"),
    "HEIC": lambda: heic(picture()),
    "GIF": lambda: saved(picture().quantize(60), "GIF"),
    "BMP": lambda: saved(picture(), "BMP"),
    "TIFF": lambda: saved(picture(), "TIFF"),
    "LZW TIFF": lambda: saved(picture(), "TIFF", compression="tiff_lzw"),
    "deflate TIFF": lambda: saved(picture(), "TIFF", compression="tiff_adobe_deflate"),
    "JPEG in TIFF": lambda: saved(picture(), "TIFF", compression="jpeg"),
    "packbits TIFF": lambda: saved(picture(), "TIFF", compression="packbits"),
    "fax TIFF": lambda: saved(picture("1"), "TIFF", compression="group4"),
}
FAULTS = ROOT / "tests" / "faults"
MAGIC = 16  # bytes in which every format has announced itself


def test_every_format_is_among_the_files_here():
    assert {formats.sniff(make()) for make in FILES.values()} == set(formats.FORMATS)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_cut_anywhere_is_broken_and_never_a_grey_image(kind, as_users_have_it):
    data = FILES[kind]()
    whole = np.asarray(decoding.decode_image(data))
    for cut in sorted(
        {*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 40, len(data))}
    ):
        try:
            image = decoding.decode_image(data[:cut])
        except BrokenImage:
            continue
        except UnsupportedImage:
            assert cut < MAGIC, cut
            continue
        # Some formats end in bytes that no pixel needs: an end marker, a checksum, the second picture of two
        assert cut > len(data) * (0.3 if "animated" in kind or "two" in kind else 0.9), cut
        assert (np.asarray(image) == whole).all(), (
            f"cut after {cut} of {len(data)} bytes: other pixels"
        )


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("kind", [k for k in FILES if "animated" not in k and "two" not in k])
def test_a_file_that_lacks_a_part_is_told_as_broken(kind, share, as_users_have_it):
    data = FILES[kind]()
    with pytest.raises(BrokenImage) as error:
        decoding.decode_image(data[: int(len(data) * share)])
    assert "\n" not in str(error.value) and error.value.status == 422


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"hello, world\n" * 50,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7\n",
        bytes(1000),
        b"MZ" + bytes(500),
        b"P6 1 1 255 abc",
        b"8BPS\0\1" + bytes(40),
        b"\0\0\1\0\1\0" + bytes(60),
    ],
    ids=["empty", "one byte", "text", "SVG", "PDF", "zeros", "program", "PPM", "Photoshop", "icon"],
)
def test_what_is_none_of_our_formats_is_unsupported(data):
    with pytest.raises(UnsupportedImage) as error:
        decoding.decode_image(data)
    assert error.value.status == 415 and "JPEG" in str(error.value)


def test_an_empty_file_is_called_empty():
    with pytest.raises(UnsupportedImage, match="the file is empty"):
        decoding.decode_image(b"")


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


def test_the_name_of_a_file_plays_no_part(tmp_path):
    for name, make in (
        ("photo.txt", FILES["PNG"]),
        ("photo.png", FILES["JPEG"]),
        ("photo", FILES["WebP"]),
    ):
        (tmp_path / name).write_bytes(make())
        assert decoding.decode_image(read_bytes(tmp_path / name)).size == (60, 44)
    (tmp_path / "text.jpg").write_bytes(b"no picture")
    with pytest.raises(UnsupportedImage):
        decoding.decode_image(read_bytes(tmp_path / "text.jpg"))


def test_floating_point_pixels_are_refused_with_the_remedy():
    with pytest.raises(UnsupportedImage, match="8 or 16 bits"):
        decoding.decode_image(saved(picture("F"), "TIFF"))


# ---- PNG's chunks ----


def chunk(name, body, checksum=None):
    checksum = zlib.crc32(name + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def png(*chunks, size=(60, 44)):
    """A grey PNG with `chunks` between its header and its pixels."""
    rows = zlib.compress(b"".join(b"\0" + bytes(range(size[0])) for _ in range(size[1])))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunks)
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def test_a_png_with_a_comment_is_read():
    assert decoding.decode_image(png(chunk(b"tEXt", b"Comment\0a photograph"))).size == (60, 44)


@pytest.mark.parametrize("name", [b"tRNS", b"PLTE", b"IHDR"])
def test_a_png_chunk_that_pixels_need_is_broken_with_a_wrong_checksum(name):
    with pytest.raises(BrokenImage):
        decoding.decode_image(png(chunk(name, b"\0\1", checksum=12345)))


# ---- what no pixel needs ----


def without_riff_size(data, size):
    return data[:4] + struct.pack("<I", size) + data[8:]


def damaged(data, name, at, filler):
    """The file with other bytes at this distance from the last of a name."""
    at += data.rindex(name)
    return data[:at] + filler + data[at + len(filler) :]


EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"
WITH_METADATA = {
    "PNG": png(),
    "JPEG": saved(picture(), "JPEG", exif=EXIF),
    "WebP": saved(picture(), "WEBP", exif=EXIF, icc_profile=bytes(33)),
    "AVIF": saved(picture(), "AVIF", exif=EXIF),
    "HEIC": heic(picture(), exif=EXIF),
    "GIF": FILES["GIF"](),
    "BMP": saved(picture(size=(61, 44)), "BMP"),
    "MPO": saved(picture(), "MPO", save_all=True, append_images=[picture()]),
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
        lambda data: data[:2] + b"\xff\xe2\0\x0eICC_PROFILE\0" + data[2:],
    ),
    "JPEG, half of JFIF": ("JPEG", lambda data: data[:2] + b"\xff\xe0\0\6JFIF" + data[2:]),
    "JPEG, half of Adobe": ("JPEG", lambda data: data[:2] + b"\xff\xee\0\7Adobe" + data[2:]),
    "JPEG, half of IPTC": (
        "JPEG",
        lambda data: data[:2] + b"\xff\xed\0\x16Photoshop 3.0\x008BIM\3\xed" + data[2:],
    ),
    "JPEG, EXIF of nothing": ("JPEG", lambda data: damaged(data, b"MM\0*", 0, b"nothing")),
    "JPEG, a broken list of pictures": (
        "JPEG",
        lambda data: data[:2] + b"\xff\xe2\0\x0cMPF\0MM\0*\xff\xff" + data[2:],
    ),
    "JPEG, without its end": ("JPEG", lambda data: data[:-2]),
    "JPEG, with half of its end": ("JPEG", lambda data: data[:-1]),
    "MPO, its second picture cut": ("MPO", lambda data: data[:-500]),
    "GIF, without its end": ("GIF", lambda data: data[:-1]),
    "WebP, too long": ("WebP", lambda data: without_riff_size(data, len(data) + 500)),
    "WebP, too short": ("WebP", lambda data: without_riff_size(data, 20)),
    "WebP, cut in its EXIF": ("WebP", lambda data: data[:-9]),
    "WebP, EXIF of two gigabytes": (
        "WebP",
        lambda data: damaged(data, b"EXIF", 4, b"\xff\xff\xff\x7f"),
    ),
    "AVIF, EXIF of nothing": ("AVIF", lambda data: damaged(data, b"MM\0*", 0, b"nothing")),
    "HEIC, EXIF of nothing": ("HEIC", lambda data: damaged(data, b"MM\0*", 0, b"nothing")),
    "BMP, without its last padding": ("BMP", lambda data: data[:-1]),
}


@pytest.mark.parametrize("what", ANCILLARY)
def test_pixels_decide_whatever_becomes_of_metadata_and_of_the_tail(what, as_users_have_it):
    kind, damage = ANCILLARY[what]
    sound = WITH_METADATA[kind]
    assert damage(sound) != sound
    assert (
        np.asarray(decoding.decode_image(damage(sound))) == np.asarray(decoding.decode_image(sound))
    ).all()


@pytest.mark.parametrize(
    "name", ["ztxt-large.png", "itxt-large.png", "text-bad-crc.png", "no-end-marker.jpg"]
)
def test_pictures_as_programs_and_cameras_have_written_them_are_read(name):
    assert decoding.decode_image((FAULTS / name).read_bytes()).size == (200, 160)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 1}],
    ids=["baseline", "progressive", "restarts by rows", "restarts by blocks"],
)
def test_a_jpeg_without_its_end_marker_is_read_where_it_is_complete_and_only_there(options):
    data = saved(picture(), "JPEG", **options)
    whole = np.asarray(decoding.decode_image(data))
    assert (np.asarray(decoding.decode_image(data[:-2])) == whole).all()
    restarts = [
        at for at in range(600, len(data) - 2) if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7
    ]
    scans = [at for at in range(600, len(data) - 2) if data[at : at + 2] == b"\xff\xda"][1:]
    stuffed = [at + 1 for at in range(600, len(data) - 2) if data[at : at + 2] == b"\xff\0"]
    for cut in {
        *restarts[::5],
        *scans,
        *stuffed[::5],
        *(at + 2 for at in restarts[::5]),
        *range(len(data) - 30, len(data) - 4),
    }:
        with pytest.raises(BrokenImage, match="truncated"):
            decoding.decode_image(data[:cut])


# ---- formats that are known and not taken ----

OTHERS = {
    "JPEG XL": (b"\xff\x0a" + bytes(40), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40)),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(90), b"\xff\x4f\xff\x51" + bytes(40)),
    "camera raw": (
        b"\0\0\0\x18ftypcrx " + bytes(40),
        b"FUJIFILMCCD-RAW 0201",
        b"IIRO\x08\0\0\0",
        b"IIU\0\x18\0\0\0",
    ),
    "CgBI": (b"\x89PNG\r\n\x1a\n" + chunk(b"CgBI", bytes(4)) + png()[8:],),
    "Photoshop": (b"8BPS\0\1" + bytes(40),),
    "icon": (b"\0\0\1\0\1\0" + bytes(60),),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<?xml version='1.0'?>\n<svg/>"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_format_that_is_known_and_not_taken_is_named_with_the_remedy(name):
    for data in OTHERS[name]:
        with pytest.raises(
            UnsupportedImage, match=f"{name}.*save the image as JPEG or PNG"
        ) as error:
            decoding.decode_image(data)
        assert error.value.is_image and error.value.status == 415


@pytest.mark.parametrize(
    "name, error", [("announces-heic.heic", "HEIC"), ("announces-jxl.jxl", "JPEG XL")]
)
def test_the_first_bytes_of_a_format_are_enough_to_name_it(name, error):
    with pytest.raises(ImageError, match=f"{error}.*save the image as JPEG or PNG") as raised:
        decoding.decode_image((FAULTS / name).read_bytes())
    assert raised.value.is_image


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"a caption",
        b"version https://git-lfs.github.com/spec/v1",
        b"<html></html>",
        b"%PDF-1.7\n",
    ],
)
def test_what_no_image_format_announces_is_no_image(data):
    with pytest.raises(UnsupportedImage) as error:
        decoding.decode_image(data)
    assert not error.value.is_image


# ---- bombs ----


def huge_jpeg():
    data = bytearray(FILES["JPEG"]())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


BOMBS = {  # a few hundred bytes that declare billions of pixels
    "PNG": (
        lambda: (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(200)))
            + chunk(b"IEND", b"")
        )
    ),
    "JPEG": huge_jpeg,
    "GIF": (
        lambda: (
            b"GIF89a"
            + struct.pack("<HHBBB", 65000, 65000, 0x80, 0, 0)
            + bytes(6)
            + b","
            + struct.pack("<HHHHB", 0, 0, 65000, 65000, 0)
            + b"\2\2\x44\1\0;"
        )
    ),
    "BMP": (
        lambda: (
            b"BM"
            + struct.pack("<IHHI", 200, 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
            + bytes(100)
        )
    ),
    "TIFF": (
        lambda: (
            b"II*\0"
            + struct.pack("<IH", 8, 6)
            + b"".join(
                struct.pack("<HHII", tag, 4, 1, value)
                for tag, value in [
                    (256, 60000),
                    (257, 60000),
                    (259, 1),
                    (262, 1),
                    (273, 8),
                    (279, 8),
                ]
            )
            + bytes(4)
        )
    ),
    "GIF frame larger than its screen": (
        lambda: (
            b"GIF89a"
            + struct.pack("<HHBBB", 10, 10, 0x80, 0, 0)
            + bytes(6)
            + b","
            + struct.pack("<HHHHB", 0, 0, 65000, 65000, 0)
            + b"\2\2\x44\1\0;"
        )
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_by_its_header_before_memory_is_taken(kind, monkeypatch):
    data = BOMBS[kind]()

    def never(*_):
        raise AssertionError("decoding has begun")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    monkeypatch.setattr(Image.core, "fill", never)
    with pytest.raises(ImageTooLarge) as error:
        decoding.decode_image(data)
    assert error.value.status == 413 and "pixels" in str(error.value)


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
def test_strips_up_to_the_limit_of_their_shape_are_taken(size):
    assert decoding.decode_image(saved(picture(size=size), "PNG")).size == size


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (401, 2), (2, 401), (5000, 3)])
def test_longer_strips_are_refused(size):
    with pytest.raises(ImageTooLarge, match=f"{size[0]} x {size[1]} pixels.*200 times"):
        decoding.decode_image(saved(picture(size=size), "PNG"))


# ---- whatever else arrives ----


@pytest.mark.parametrize("kind", FILES)
def test_scrambled_files_give_an_image_or_one_of_our_errors(kind, as_users_have_it):
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


def test_a_small_tiff_that_asks_for_gigabytes_of_tiles_is_refused_before_they_are_allocated():
    """Its picture is 64 x 64; the one tile that holds it claims 65,536 x 65,536."""
    tags = {
        256: 64,
        257: 64,
        258: 8,
        259: 1,
        262: 1,
        277: 1,
        322: 65536,
        323: 65536,
        324: 8,
        325: 4096,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4 + 4096)
    with pytest.raises(ImageTooLarge, match="tiles of more than the 200,000,000 pixels"):
        decoding.decode_image(data)


def test_tile_sizes_that_are_letters_are_no_traceback():
    """A picture in strips, and beside them tile tags of text, which mean nothing."""
    tags = [
        (256, 4, 8),
        (257, 4, 8),
        (258, 4, 8),
        (259, 4, 1),
        (262, 4, 1),
        (273, 4, 160),
        (277, 4, 1),
        (278, 4, 8),
        (279, 4, 64),
        (322, 2, 65),
        (323, 2, 65),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(160, b"\0") + bytes(64)
    assert decoding.decode_image(data).size == (8, 8)


def test_a_jpeg_of_endless_scans_is_refused_and_a_progressive_one_is_not(photos):
    buffer = io.BytesIO()
    Image.open(photos["china.jpg"]).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    decoding.decode_image(data)
    scan = data.rindex(b"\xff\xda")
    with pytest.raises(BrokenImage, match="more than 50 scans"):
        decoding.decode_image(data[:scan] + data[scan:-2] * 50 + data[-2:])
