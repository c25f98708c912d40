"""Pictures, and the bytes of files that hold them."""

import io
import struct
import zlib

import numpy as np
import pillow_heif
from PIL import Image

PNG_START = b"\x89PNG\r\n\x1a\n"


def encode(image, kind, **options):
    """PIL image -> the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(image, quality=90, **options):
    return encode(image, "JPEG", quality=quality, **options)


def heic(image, **options):
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **options)
    return file.getvalue()


def rotated(image, kind, orientation, **options):
    """A file with this EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif, **options)


def picture(mode="RGB", size=(60, 44)):
    """Waves and noise: the picture compresses like a photograph, and no part is flat grey."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    wave = np.stack([128 + 90 * np.sin(x / 9 + i) * np.cos(y / 7 - i) for i in range(3)], axis=2)
    wave += np.random.default_rng(0).normal(0, 20, wave.shape)
    return Image.fromarray(wave.clip(0, 255).astype(np.uint8)).convert(mode)


def sixteen_bits(image):
    """A 16-bit grey version of an image."""
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def animation(kind, **options):
    second = picture("L").convert("RGB")
    return encode(picture(), kind, save_all=True, append_images=[second], **options)


# {kind: function -> bytes of a file}, with each format that we accept
FILES = {
    "JPEG": lambda: encode(picture(), "JPEG"),
    "progressive JPEG": lambda: encode(picture(), "JPEG", progressive=True),
    "grey JPEG": lambda: encode(picture("L"), "JPEG"),
    "CMYK JPEG": lambda: encode(picture("CMYK"), "JPEG"),
    "two-picture JPEG": lambda: animation("MPO"),
    "PNG": lambda: encode(picture(), "PNG"),
    "palette PNG": lambda: encode(picture().quantize(60), "PNG"),
    "16-bit PNG": lambda: encode(sixteen_bits(picture()), "PNG"),
    "animated PNG": lambda: animation("PNG"),
    "WebP": lambda: encode(picture(), "WEBP"),
    "lossless WebP": lambda: encode(picture(), "WEBP", lossless=True),
    "animated WebP": lambda: animation("WEBP"),
    "AVIF": lambda: encode(picture(), "AVIF"),
    "HEIC": lambda: heic(picture()),
    "GIF": lambda: encode(picture().quantize(60), "GIF"),
    "BMP": lambda: encode(picture(), "BMP"),
    "TIFF": lambda: encode(picture(), "TIFF"),
    "LZW TIFF": lambda: encode(picture(), "TIFF", compression="tiff_lzw"),
    "deflate TIFF": lambda: encode(picture(), "TIFF", compression="tiff_adobe_deflate"),
    "JPEG in TIFF": lambda: encode(picture(), "TIFF", compression="jpeg"),
    "packbits TIFF": lambda: encode(picture(), "TIFF", compression="packbits"),
    "fax TIFF": lambda: encode(picture("1"), "TIFF", compression="group4"),
}


def chunk(name, body, checksum=None):
    """A chunk of a PNG."""
    checksum = zlib.crc32(name + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def png_of(size, bits, colour, rows, *chunks, level=-1):
    """A PNG of this size, depth and colour type: `chunks`, then `rows`, which are compressed."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows, level))
    return b"".join([PNG_START, header, *chunks, pixels, chunk(b"IEND", b"")])


def png(*chunks, size=(60, 44)):
    """A grey PNG with `chunks` before its pixels, which are always those of 60 x 44."""
    return png_of(size, 8, 0, (b"\0" + bytes(range(60))) * 44, *chunks)
