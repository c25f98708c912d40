"""Photographs, and the bytes of the files that they are written to."""

import io

from PIL import Image


def encode(image, kind, **options):
    """PIL image -> the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(image, quality=90, **options):
    return encode(image, "JPEG", quality=quality, **options)


def rotated(image, kind, orientation, **options):
    """A file whose EXIF says how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif, **options)
