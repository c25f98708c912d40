"""Decoded pixels of any kind -> RGB.

    declare_kind(image, data, kind)   # from the header: notes in `image.info` what to_rgb needs
    rgb = to_rgb(image)               # after decoding

Values are scaled to 8 bits. Alpha lies over white. ICC profiles are ignored, as CLIP does.
`image.info` holds `levels`: the stored values of black and white, where a value has more than
8 bits. `drawn` is the box of a GIF's frame. `transparency` is Pillow's, in stored values for
16-bit grey.
"""

import numpy as np
from PIL import Image, ImagePalette, TiffImagePlugin

from detector.base.errors import BrokenImage, UnsupportedImage
from detector.images.formats import tiff_tags

STRIP_PIXELS = 1 << 20  # converted at a time; copies of a whole image would double the memory
REMEDY = "save the image as PNG or JPEG, with 8 or 16 bits"
# TIFF 6.0, photometric interpretation: (name, samples, bits, accepted values of ExtraSamples)
TIFF_KINDS = {
    0: ("white is zero", 1, (1, 2, 4, 8, 16), [()]),
    1: ("black is zero", 1, (1, 2, 4, 8, 12, 16), [(), (0,), (1,), (2,)]),
    2: ("RGB", 3, (8, 16), [(), (0,), (1,), (2,)]),
    3: ("palette", 1, (1, 2, 4, 8), [()]),
    5: ("CMYK", 4, (8, 16), [(), (0,)]),
    6: ("YCbCr", 3, (8,), [()]),
}
TIFF_JPEG = 6, 7  # compressions
# Pillow has this entry for little-endian files only
TiffImagePlugin.OPEN_INFO[(b"MM", 0, (1,), 1, (16,), ())] = "I;16B", "I;16B"


# ---- header ----


def declare_kind(image, data, known):
    """Notes in `image.info` what `to_rgb` needs. Raises UnsupportedImage, BrokenImage."""
    if known == "PNG":
        declare_png(image, data)
    elif known == "TIFF":
        declare_tiff(image)
    elif known == "BMP":
        declare_bmp(image, data)
    elif known == "GIF":
        image.info["drawn"] = image.dispose_extent
    elif image.mode == "CMYK" and "adobe" not in image.info:
        raise UnsupportedImage(
            "a CMYK JPEG without Adobe's marker does not say whether its inks are inverted:"
            " save it as RGB"
        )


def declare_png(image, data):
    """Scales a transparent colour to 8 bits. PNG stores it in the file's depth (11.3.2.1)."""
    if image.mode == "P" and not image.palette:
        raise BrokenImage("the PNG lacks the palette that its pixels are numbers of")
    bits, colour = data[24], data[25]
    key = image.info.get("transparency")
    if key is None:
        return
    if colour == 0 and bits < 16:
        if bits == 1:  # Pillow keeps no more of the value than whether it is 0
            key = lowest_byte_of_key(data)
        most = 2**bits - 1
        image.info["transparency"] = (key & most) * (255 // most)
    elif colour == 2 and bits == 16:
        raise UnsupportedImage(
            "a 16-bit colour PNG with one transparent colour is not taken:"
            " save it with an alpha channel"
        )
    elif colour == 2:
        image.info["transparency"] = tuple(value & 255 for value in key)


def lowest_byte_of_key(data):
    """Bytes of a grey PNG in which Pillow found a tRNS chunk -> the lower byte of its value."""
    at = 8
    while data[at : at + 8] != b"\0\0\0\2tRNS":
        at += 12 + int.from_bytes(data[at : at + 4])
    return data[at + 9]


def refuse_tiff_kind(data):
    """Raises UnsupportedImage for kinds without agreed colours, and kinds that Pillow misreads."""
    tags = tiff_tags(data)
    # CR2, DNGVersion, NewSubfileType and SubfileType of a reduced copy
    if data[8:10] == b"CR" or 50706 in tags or tags.get(254, (0,))[0] & 1 or tags.get(255) == (2,):
        raise UnsupportedImage(
            "a camera raw file, or a TIFF that begins with a preview of its picture:"
            " save the picture as JPEG or PNG"
        )
    if not {256, 257} <= set(tags):
        return  # no directory; the decoder reports it
    for fault, is_wrong in tiff_faults(tags, data[:2] == b"MM").items():
        if is_wrong:
            raise UnsupportedImage(f"a TIFF of this kind is not taken ({fault}): {REMEDY}")


def tiff_faults(tags, big_endian):
    """Tags of a TIFF -> {fault in words: has the TIFF this fault?}. Raises UnsupportedImage."""
    compression, photometric = tags.get(259, (1,))[0], tags.get(262, (None,))[0]
    extra, bits, formats = tags.get(338, ()), set(tags.get(258, (1,))), set(tags.get(339, (1,)))
    planes, fill = (tags.get(tag, (1,))[0] for tag in (284, 266))
    if formats == {3}:
        raise UnsupportedImage(f"floating-point pixels have no agreed white: {REMEDY}")
    name, samples, depths, extras = TIFF_KINDS.get(
        photometric, (f"photometric interpretation {photometric}", 0, (), ())
    )
    depth = bits.pop() if len(bits) == 1 else 0
    given = tags.get(277, (3 if compression == 6 else 1,))[0]
    one_by_one = planes != 1 and given > 1
    return {
        f"{name} with {depth or 'mixed'} bits": depth not in depths,
        "signed or undefined numbers": formats != {1},
        f"{name} with extra samples {extra}": (
            extra not in extras or extra and photometric == 1 and depth != 8
        ),
        f"{given} samples a pixel of {name}": given != samples + len(extra),
        f"separate planes of {depth} bits": (
            one_by_one and (depth != 8 or extra or photometric == 6)
        ),
        "big-endian with 12 bits": big_endian and depth == 12,
        "reversed bits": fill != 1 and depth != 1,
        "inks other than CMYK": tags.get(332, (1,)) != (1,),
        "YCbCr that is not JPEG": photometric == 6 and compression not in TIFF_JPEG,
    }


def declare_tiff(image):
    tags = image.tag_v2
    if tags.get(258) == (12,):
        image.info["levels"] = 0, 4095
    elif image.mode in ("I;16", "I;16B") and tags.get(262) == 0:
        image.info["levels"] = 65535, 0
    colours = tags.get(320)
    # some programs write 8-bit colours; libtiff accepts them too
    if image.mode == "P" and max(colours) < 256:
        image.palette = ImagePalette.raw("RGB", np.uint8(colours).reshape(3, -1).T.tobytes())


def declare_bmp(image, data):
    """Corrects a grey palette: Pillow reads its pixels as 8-bit or 1-bit values."""
    head = int.from_bytes(data[14:18], "little")
    bits = int.from_bytes(data[24:26] if head == 12 else data[28:30], "little")
    if bits == 16 and head >= 56 and data[30:31] == b"\3" and any(data[66:70]):
        raise UnsupportedImage("a 16-bit BMP with an alpha mask is not taken: save it as PNG")
    if image.mode == "1" and bits > 1 or image.mode == "L" and bits == 4:
        greys = (0, 255) if image.mode == "1" else range(16)
        colours = bytes(grey for grey in greys for _ in range(3))
        image._mode, image.palette = "P", ImagePalette.raw("RGB", colours)
        if image.tile[0].codec_name == "raw":
            args = "P;4" if bits == 4 else "P", *image.tile[0].args[1:]
            image.tile = [image.tile[0]._replace(args=args)]


# ---- decoded -> RGB ----


def to_rgb(image):
    """A loaded PIL image of any mode -> RGB. Raises UnsupportedImage without any opaque pixel."""
    if image.mode == "F":
        raise UnsupportedImage(f"floating-point pixels have no agreed white: {REMEDY}")
    drawn = image.info.get("drawn", (0, 0, *image.size))
    if image.mode == "RGB" and not image.has_transparency_data and drawn == (0, 0, *image.size):
        return image
    rows, visible = max(1, STRIP_PIXELS // image.width), False
    rgb = Image.new("RGB", image.size, "white")
    for top in range(drawn[1], drawn[3], rows):
        box = (drawn[0], top, drawn[2], min(top + rows, drawn[3]))
        strip, opaque = strip_to_rgb(image.crop(box))
        rgb.paste(strip, box)
        visible |= opaque
    if not visible:
        raise UnsupportedImage(
            "the picture is wholly transparent: save it without its alpha channel"
        )
    return rgb


def strip_to_rgb(image):
    """-> (RGB, has it any visible pixel?)"""
    key = image.info.get("transparency")
    if image.mode in ("I", "I;16", "I;16L", "I;16B"):
        black, white = image.info.get("levels", (0, 65535))
        stored = np.asarray(image).astype(np.int64)
        most = max(black, white)
        grey = (np.abs(stored - black) * 255 + most // 2) // most
        grey[stored == key] = 255
        opaque = key is None or bool((stored != key).any())
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB"), opaque
    if not image.has_transparency_data:
        return image.convert("RGB"), True
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    over = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return over.convert("RGB"), image.getchannel("A").getextrema()[1] > 0
