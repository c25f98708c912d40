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
from itertools import chain

import numpy as np
from pi_heif import HeifImagePlugin  # noqa: F401

# The plug-ins of our formats, by name. Otherwise Pillow imports all forty at the first WebP.
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
    BASE64,
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

MAX_ASPECT = 200  # beyond it the resized strip alone takes more memory than any photograph
MAX_SCANS = 50  # of a JPEG, a decoding pass each; a progressive JPEG has about 10
MAX_EXIF_SEGMENTS = 200  # of a JPEG; Pillow copies all earlier segments at each
MAX_SCANNED = 150_000_000  # pixels times scans of a JPEG without end marker, decoded 5 times
MAX_HEADER_READS = 100_000  # cameras write dozens of parts; millions of empty parts take seconds
MAX_TIFF_PIECES = 250_000  # strips or tiles; no picture here has so many rows
# tags that place a TIFF's pixels
TIFF_GRID = {256, 257, 258, 259, 273, 277, 278, 279, 284, 322, 323, 324, 325}
HEIF_DERIVED = b"grid", b"iovl", b"iden"  # items that are made of other items

# Pillow warns above its limit and refuses above twice the limit. We refuse where it warns.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
with suppress(OSError, AttributeError):  # libtiff writes thousands of lines to stderr
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
    ctypes.CDLL(Image.core.__file__).TIFFSetWarningHandler(None)


# ---- bytes -> RGB ----


class Header(io.BytesIO):
    """Bytes that allow MAX_HEADER_READS reads. `del header.read` ends the counting."""

    def __init__(self, data):
        super().__init__(data)
        self.read, self.left = self.count, MAX_HEADER_READS

    def count(self, *size):
        self.left -= 1
        if self.left < 0:
            raise BrokenImage("its header has too many parts")
        return io.BytesIO.read(self, *size)


def open_image(data, max_pixels=MAX_PIXELS):
    """Image bytes -> PIL image, not decoded. Its header is read, its size and pixel kind checked.

    The content decides on the format, never a name.
    Raises UnsupportedImage, BrokenImage, ImageTooLarge.
    """
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    known = sniff(data)
    if known not in FORMATS:
        raise unsupported(known, data)
    if known == "JPEG":
        refuse_jpeg_bombs(data)
    elif known == "TIFF":
        refuse_tiff_pieces(data)
        refuse_tiff_kind(data)
    parts, texts = needed_parts(data, known)
    try:
        image = read_header(parts, known, max_pixels)
    except BrokenImage:
        image = read_header(without_metadata(data, known), known, max_pixels)
    image.info |= texts
    refuse_size(*image.size, max_pixels)
    if known == "TIFF":
        refuse_tiff_bombs(image, data, max_pixels)
    elif known == "HEIF":
        refuse_heif_bombs(data, max_pixels)
    return image


def unsupported(known, data):
    """The error for bytes of a known format that we do not accept, or of no known format."""
    if known == BASE64:
        return UnsupportedImage(f"{known} is not taken: decode it, and send the bytes of the image")
    if known:
        return UnsupportedImage(
            f"{known} is not among the formats taken ({TAKEN}): save the image as JPEG or PNG"
        )
    problem = "not an image format we take" if data else "the file is empty"
    error = UnsupportedImage(f"{problem} (taken: {TAKEN})")
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
            f"the file starts like {name} but its header cannot be read"
            " (damaged, or of a rare kind): save the image as JPEG or PNG"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLarge(f"the image has more than the {max_pixels:,} pixels allowed") from None
    except Exception as error:  # Pillow's parsers raise almost anything on crafted bytes
        raise BrokenImage(f"the image cannot be opened: {one_line(error)}") from None
    finally:
        del file.read  # no limit for the reads of pixels


# ---- small files that ask for gigabytes or hours ----


def refuse_size(width, height, max_pixels):
    """Raises ImageTooLarge."""
    size = f"the image has {width} x {height} pixels"
    if width * height > max_pixels:
        raise ImageTooLarge(f"{size}; at most {max_pixels:,} are allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageTooLarge(f"{size}; a side may be at most {MAX_ASPECT} times the other")


def refuse_jpeg_bombs(data):
    """Raises BrokenImage for many scans or EXIF segments; each costs a pass."""
    for pattern, most, parts in (
        (rb"\xff\xda\0[\x08\x0a\x0c\x0e]", MAX_SCANS, "scans"),
        (rb"Exif\0\0", MAX_EXIF_SEGMENTS, "EXIF segments"),
    ):
        if len(re.findall(pattern, data)) > most:
            raise BrokenImage(f"the JPEG has more than {most} {parts}")


def refuse_tiff_pieces(data):
    """Raises BrokenImage before Pillow reads long lists of strips or tiles."""
    if any(line[2] > MAX_TIFF_PIECES for line in tiff_directory(data) if line[0] in TIFF_GRID):
        raise BrokenImage(f"the TIFF is cut into more than {MAX_TIFF_PIECES:,} pieces")


def refuse_tiff_bombs(image, data, max_pixels):
    """Raises ImageTooLarge for tiles far larger than the picture.

    Raises BrokenImage for strips that are listed repeatedly, and for tags that libtiff reads and
    Pillow does not.
    """
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
    counts = (tags[tag] for tag in (279, 325) if isinstance(tags.get(tag), tuple))
    stored = sum(min(n, len(data)) for n in chain(*counts) if isinstance(n, int))
    # up to 6 planes lie one after the other; sound files may have wrong byte counts
    if read > 8 * width * height or stored > 4 * len(data):
        raise BrokenImage("the TIFF lists the same strips or tiles again and again")


def refuse_heif_bombs(data, max_pixels):
    """Raises BrokenImage for derived pictures of derived pictures, ImageTooLarge for large tiles.

    libheif itself refuses thousands of items, and sizes that differ from the coded pictures.
    """
    kinds, made_of, pixels = heif_items(data)
    for item, parts in made_of.items():
        if kinds.get(item) in HEIF_DERIVED:
            if any(kinds.get(part) in HEIF_DERIVED for part in parts):
                raise BrokenImage("the HEIF is made of pictures that are made of others")
            if sum(pixels.get(part, max_pixels) for part in parts) > 2 * max_pixels:
                raise ImageTooLarge(
                    f"the HEIF has tiles of more than the {max_pixels:,} pixels allowed"
                )


def upright(image):
    """EXIF orientation applied; unreadable EXIF counts as none.

    Pillow's exif_transpose would copy an upright image, and raise on unreadable EXIF.
    """
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
    """Decodes an image of `open_image` in place. A complete JPEG may lack its end marker.

    Where the bits of a JPEG end too early at a marker, libjpeg draws grey without an error.
    """
    file = image.fp
    try:
        image.load()
    except OSError as error:
        if image.format != "JPEG" or "truncated" not in str(error):
            raise
        image._im = error.__traceback__ = None  # the traceback's frames hold the pixels, too
        image.im, image.tile = complete_jpeg(image, file, error).im, []
    else:
        if image.format == "JPEG" and is_grey_below(image):
            complete_jpeg(image, file, OSError("its lower rows are missing"))


def is_grey_below(image):
    """Are the last rows of the decoded JPEG the grey of missing bits (127 in CMYK)?"""
    bottom = image.crop((0, max(0, image.height - 8), *image.size))
    return {*np.ravel(bottom.getextrema())} <= {127, 128}


def complete_jpeg(image, file, error):
    """A JPEG and its file -> the image, decoded from `jpeg_ends`. Raises `error` if bits miss."""
    data, checksums = file.getvalue(), set()
    if not 0 < jpeg_scans(data) * image.width * image.height <= MAX_SCANNED:
        raise error
    for ended in jpeg_ends(data):
        complete = None  # free the memory before the next one is decoded
        complete = Image.open(io.BytesIO(ended), formats=["JPEG"])
        complete.load()
        checksums.add(checksum(complete))
        if len(checksums) > 1:
            raise error
    return complete


def checksum(image):
    """CRC-32 of an image's pixels, in strips to save memory."""
    value, rows = 0, max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        value = zlib.crc32(strip.tobytes(), value)
    return value


def load_rgb(image):
    """An image from `open_image` -> decoded RGB, upright.

    Raises BrokenImage, for truncated files too, and UnsupportedImage.
    """
    try:
        load(image)
        return to_rgb(upright(image))
    except ImageError:
        raise
    except Exception as error:
        raise BrokenImage(f"the image cannot be decoded: {one_line(error)}") from None


def decode_image(data, max_pixels=MAX_PIXELS):
    """Image bytes -> PIL image, RGB, upright. Of an animation: the first frame.

    Raises ImageError's kinds.
    """
    return load_rgb(open_image(data, max_pixels))
