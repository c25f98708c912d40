"""Bytes -> RGB pixels -> CLIP's input.

image = decode_image(data)          # bytes -> PIL image, RGB, upright
pixels = preprocess(image, 224)     # -> float32 [3, 224, 224], bit for bit CLIP's own transform
"""

import ctypes
import io
import re
import warnings
import zlib
from contextlib import suppress

from pi_heif import HeifImagePlugin  # noqa: F401

# The plug-ins of the formats we take, by name: otherwise Pillow imports all forty at the first WebP.
from PIL import (  # noqa: F401
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from detector.base.console import one_line
from detector.base.constants import MAX_PIXELS
from detector.base.errors import BrokenImage, ImageError, ImageTooLarge, UnsupportedImage
from detector.images.formats import (
    FORMATS,
    TAKEN,
    heif_items,
    jpeg_ends,
    jpeg_scans,
    needed_parts,
    sniff,
    tiff_directory,
    without_metadata,
)
from detector.images.pixels import STRIP_PIXELS, declare_kind, refuse_tiff_kind, to_rgb

MAX_ASPECT = 200  # beyond it the resized strip alone would take more memory than any photograph
MAX_SCANS, MAX_REPEATS = (
    50,
    200,
)  # what costs a pass each: a JPEG's scans (10 where it is progressive); profiles, EXIF
MAX_SCANNED = 150_000_000  # pixels times scans of a JPEG without end marker, decoded 5 times
MAX_HEADER_READS = 100_000  # pieces of a file's header: cameras write dozens, millions of empty ones would take seconds
MAX_TIFF_PIECES = 250_000  # strips or tiles: more than any picture here has rows
TIFF_GRID = {
    256,
    257,
    258,
    259,
    273,
    277,
    278,
    279,
    284,
    322,
    323,
    324,
    325,
}  # tags that say how a TIFF's pixels lie
HEIF_DERIVED = b"grid", b"iovl", b"iden"  # items that are made of others

# Pillow warns above its limit and refuses above twice that; a bomb must never get as far as a warning.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", module=r"PIL\.")  # what it thinks of a file's metadata
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
with suppress(
    OSError, AttributeError
):  # libtiff writes to stderr itself, for a crafted file thousands of lines
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
    ctypes.CDLL(Image.core.__file__).TIFFSetWarningHandler(None)


# ---- bytes -> RGB ----


class Header(io.BytesIO):
    """Bytes that can be read in so many pieces and no more. `del header.read` ends the counting."""

    def __init__(self, data):
        super().__init__(data)
        self.read, self.left = self.count, MAX_HEADER_READS

    def count(self, *size):
        self.left -= 1
        if self.left < 0:
            raise BrokenImage("its header has too many parts")
        return io.BytesIO.read(self, *size)


def open_image(data, max_pixels=MAX_PIXELS):
    """Image bytes -> PIL image, its header read, its size and kind of pixels checked, not decoded.

    The content decides on the format, never a name. Raises UnsupportedImage, BrokenImage,
    ImageTooLarge.
    """
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    known = sniff(data)
    if known not in FORMATS:
        raise unsupported(known, data)
    refuse_repeats(known, data)
    if known == "TIFF":
        refuse_tiff_kind(data)
    parts, texts = needed_parts(data, known)
    try:
        image = read_header(parts, known, max_pixels)
    except BrokenImage:
        image = read_header(without_metadata(data, known), known, max_pixels)
    image.info |= texts
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} pixels; at most {max_pixels:,} are allowed"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageTooLarge(
            f"the image has {width} x {height} pixels; a side may be at most {MAX_ASPECT} times the"
            " other"
        )
    if known == "TIFF":
        refuse_tiff_bombs(image, data, max_pixels)
    if known == "HEIF":
        refuse_heif_bombs(data, max_pixels)
    return image


def unsupported(known, data):
    """The error for bytes of a format that is not taken, or of none that is known."""
    if known:
        return UnsupportedImage(
            f"{known} is not among the formats taken ({TAKEN}): save the image as JPEG or PNG"
        )
    what = "not an image format we take" if data else "the file is empty"
    error = UnsupportedImage(f"{what} (taken: {TAKEN})")
    error.is_image = False
    return error


def read_header(data, known, max_pixels):
    """Bytes of a known format -> PIL image, not decoded. Raises ImageError's kinds."""
    file = Header(data)
    try:
        image = Image.open(file, formats=[known])
        declare_kind(image, data, known)
        return image
    except ImageError:
        raise
    except UnidentifiedImageError:
        name = known.replace("HEIF", "HEIC")
        raise BrokenImage(
            f"the file starts like {name} but its header cannot be read (damaged, or "
            "of a rare kind): save the image as JPEG or PNG"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLarge(f"the image has more than the {max_pixels:,} pixels allowed") from None
    except Exception as error:  # Pillow's parsers raise almost anything on crafted bytes
        raise BrokenImage(f"the image cannot be opened: {one_line(error)}") from None
    finally:
        del file.read  # pixels may come in as many pieces as they like


# ---- what a small file with a harmless header can still ask for: gigabytes, or hours ----


def refuse_repeats(known, data):
    """Parts that cost a pass over the image, or over all parts before them, each time they come."""
    for name, most, what, pattern in (
        ("JPEG", MAX_SCANS, "scans", rb"\xff\xda\0[\x08\x0a\x0c\x0e]"),
        ("JPEG", MAX_REPEATS, "EXIF segments", rb"Exif\0\0"),
    ):
        if known == name and len(re.findall(pattern, data)) > most:
            raise BrokenImage(f"the {known} has more than {most} {what}")
    if any(line[2] > MAX_TIFF_PIECES for line in tiff_directory(data) if line[0] in TIFF_GRID):
        raise BrokenImage(f"the TIFF is cut into more than {MAX_TIFF_PIECES:,} pieces")


def refuse_tiff_bombs(image, data, max_pixels):
    """Tiles far larger than the picture, strips that are listed again and again, tags that libtiff sees and Pillow does not."""
    tags = image.tag_v2
    listed = {line[0] for line in tiff_directory(data)}
    if data.startswith(b"MM\0+") or listed & TIFF_GRID - set(tags):
        raise BrokenImage("the TIFF's directory cannot be read in full")
    width, height, *tile = (tags.get(tag) for tag in (256, 257, 322, 323))
    if all(isinstance(side, int) and side > 0 for side in tile):  # a crafted tag may be text
        padded = -(-width // tile[0]) * -(-height // tile[1]) * tile[0] * tile[1]
        if tile[0] * tile[1] > max_pixels or padded > 2 * max_pixels:
            raise ImageTooLarge(
                f"the TIFF has tiles of more than the {max_pixels:,} pixels allowed"
            )
    read = sum((right - left) * (bottom - top) for _, (left, top, right, bottom), *_ in image.tile)
    lengths = (
        n
        for tag in (279, 325)
        if isinstance(tags.get(tag), tuple)
        for n in tags[tag]
        if isinstance(n, int)
    )
    stored = sum(min(n, len(data)) for n in lengths)
    if read > 8 * width * height or stored > 4 * len(
        data
    ):  # planes lie one by one, up to 6; byte counts may be careless
        raise BrokenImage("the TIFF lists the same strips or tiles again and again")


def refuse_heif_bombs(data, max_pixels):
    """Pictures made of pictures that are made of others, and tiles far larger than the picture.

    (libheif refuses thousands of items, and sizes that are not those of the coded pictures.)
    """
    kinds, made_of, pixels = heif_items(data)
    for item in made_of:
        if kinds.get(item) in HEIF_DERIVED:
            if any(kinds.get(part) in HEIF_DERIVED for part in made_of[item]):
                raise BrokenImage("the HEIF is made of pictures that are made of others")
            if sum(pixels.get(part, max_pixels) for part in made_of[item]) > 2 * max_pixels:
                raise ImageTooLarge(
                    f"the HEIF has tiles of more than the {max_pixels:,} pixels allowed"
                )


def upright(image):
    """EXIF orientation applied; unreadable EXIF counts as none."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:
        return image
    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def load(image):
    """Decodes an image of `open_image` in place; a complete JPEG may lack its end marker."""
    try:
        image.load()
    except OSError as error:
        data = image.fp.getvalue() if image.format == "JPEG" and "truncated" in str(error) else b""
        if not 0 < jpeg_scans(data) * image.width * image.height <= MAX_SCANNED:
            raise
        image._im, checksums = None, set()
        for data in jpeg_ends(data):
            complete = None  # its memory is free before the next is decoded
            complete = Image.open(io.BytesIO(data), formats=["JPEG"])
            complete.load()
            checksums.add(checksum(complete))
            if len(checksums) > 1:
                raise
        image.im, image.tile = complete.im, []


def checksum(image):
    """CRC-32 of an image's pixels, taken in strips."""
    value, rows = 0, max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        value = zlib.crc32(strip.tobytes(), value)
    return value


def load_rgb(image):
    """An image from `open_image` -> decoded RGB, upright. Truncated files are errors, not grey images. Raises BrokenImage,
    UnsupportedImage."""
    try:
        load(image)
        return to_rgb(upright(image))
    except ImageError:
        raise
    except Exception as error:
        raise BrokenImage(f"the image cannot be decoded: {one_line(error)}") from None


def decode_image(data, max_pixels=MAX_PIXELS):
    """Image bytes -> PIL image, RGB, upright (first frame of an animation). Raises ImageError's kinds."""
    return load_rgb(open_image(data, max_pixels))
