"""What the first bytes of a file announce, and the parts of a file that its pixels need.

sniff(data)                               # "PNG"; "JPEG XL", known and not taken; or None
data, texts = needed_parts(data, "PNG")   # the picture alone, and what it says of itself
tiff_tags(data)                           # {256: (width,), ...} of the first directory
"""

import math
import re
import struct
import zlib

import numpy as np

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "HEIF")  # those that are taken
TAKEN = ", ".join(FORMATS).replace("HEIF", "HEIC")  # as people know them
PNG_START = b"\x89PNG\r\n\x1a\n"
STARTS = (
    (b"\xff\xd8\xff\xf7", "JPEG-LS"),
    (b"\xff\xd8\xff", "JPEG"),
    (PNG_START + b"\0\0\0\4CgBI", "Apple's own kind of PNG (CgBI)"),
    (PNG_START, "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    # known and not taken
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"II\xbc", "JPEG XR"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\1\0", "icon"),
    (b"FUJIFILMCCD-RAW", "camera raw (RAF)"),
    (b"IIRO", "camera raw (ORF)"),
    (b"IIRS", "camera raw (ORF)"),
    (b"MMOR", "camera raw (ORF)"),
    (b"IIU\0", "camera raw (RW2)"),
    (b"II\x1a\0\0\0HEAP", "camera raw (CRW)"),
    (b"FOVb", "camera raw (X3F)"),
    (b"\0MRM", "camera raw (MRW)"),
    (b"v/1\1", "OpenEXR"),
    (b"DDS ", "DDS"),
    (b"gimp xcf", "GIMP"),
    (b"qoif", "QOI"),
    (b"BPG\xfb", "BPG"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"SIMPLE  =", "FITS"),
    (b"P4\n", "PBM"),
    (b"P5\n", "PGM"),
    (b"P6\n", "PPM"),
    (b"P7\n", "PAM"),
)
# ISO base media files name their kinds ("brands") in the first box: major, version, compatible ones
BRANDS = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"crx ": "camera raw (CR3)",
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIF"
    ),
}
MAX_PARTS = 100_000  # chunks beside the pixels: millions would take seconds
MAX_TEXT = 1 << 20  # bytes that are unpacked of one text in a PNG, and of all of them
MAX_TEXTS = 4 << 20
# of a PNG, colour type: lengths that its chunk tRNS may have; readers pass over another
TRANSPARENCY = {b"\0": (2,), b"\2": (6,), b"\3": range(257)}
# inside a scan are stuffed bytes and restarts alone
JPEG_MARKER = re.compile(rb"\xff+[\x02-\xcf\xd9-\xfe]")
TIFF_TYPES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}  # unsigned numbers


def sniff(data):
    """Name of the format that the first bytes announce, taken (FORMATS) or not, or None."""
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4]), 400)
        brands = [data[8:12], *(data[at : at + 4] for at in range(16, end, 4))]
        named = next((BRANDS[brand] for brand in brands if brand in BRANDS), None)
        return named or ("HEIF" if brands[0] in (b"mif1", b"msf1") else None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if re.match(rb"\s*<[?!s]", data[:100]) and b"<svg" in data[:1000]:
        return "SVG"
    return next((name for start, name in STARTS if data.startswith(start)), None)


def needed_parts(data, kind):
    """Bytes of an image -> (bytes of its first picture and its EXIF, {key: text} of a PNG).

    Profiles, texts, further pictures and damaged metadata of a JPEG, PNG or WebP stay out, because
    they can make a sound picture unreadable.
    """
    if kind == "PNG":
        return png_parts(data)
    return {"JPEG": jpeg_parts, "WEBP": webp_parts}.get(kind, bytes)(data), {}


def png_parts(data):
    """Only critical chunks, transparency and sound EXIF; the decoder checks the others."""
    kept, texts, at, others, pixels = [data[:8]], [], 8, 0, False
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if not name.isalpha():
            kept.append(data[at:])
            break
        if (
            name[:1].isupper()
            or name == b"tRNS"
            and not pixels
            and length in TRANSPARENCY.get(data[25:26], ())
            or name == b"eXIf"
            and checksum_fits(data[at:end])
        ):
            kept.append(data[at:end])
        elif (others := others + 1) > MAX_PARTS:
            break
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            texts.append((name, data[at + 8 : end - 4]))
        if name == b"IEND":
            break
        pixels, at = pixels or name == b"IDAT", end
    return b"".join(kept), png_texts(texts)


def checksum_fits(chunk):
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])


def png_texts(chunks):
    """[(chunk's name, its bytes)] -> {key: text}: the first of a key, the start of a long one."""
    texts, left = {}, MAX_TEXTS
    for name, body in chunks:
        key, _, body = body.partition(b"\0")
        key = key[:80].decode("latin-1")
        if key in texts or left <= 0:
            continue
        packed = name == b"zTXt" or name == b"iTXt" and body[:1] == b"\1"
        body = {b"tEXt": body, b"zTXt": body[1:], b"iTXt": body[2:].split(b"\0", 2)[-1]}[name]
        try:
            body = zlib.decompressobj().decompress(body, MAX_TEXT) if packed else body[:MAX_TEXT]
        except zlib.error:
            continue
        left -= len(body)
        texts[key] = body.decode("utf-8" if name == b"iTXt" else "latin-1", errors="replace")
        if key == "XML:com.adobe.xmp":
            texts["xmp"] = body
    return texts


def without_metadata(data, kind):
    """Bytes of a JPEG or AVIF whose header cannot be read -> without metadata."""
    if kind == "AVIF":
        return re.sub(rb"(infe[\2\3]\0\0.(?:..|....)..)Exif", rb"\1skip", data, flags=re.DOTALL)
    return jpeg_parts(data, left_out=(*range(0xE2, 0xEE), 0xEF, 0xFE)) if kind == "JPEG" else data


def jpeg_parts(data, left_out=(0xE2,)):
    """Without APP2 (profiles, the list of further pictures) and cut segments of JFIF and Adobe."""
    kept, start, at = [], 0, 2
    for _ in range(MAX_PARTS):
        marker = data[at : at + 2]
        if marker[:1] != b"\xff" or marker[1:] in (b"\xda", b"\xff", b""):
            break  # the pixels, or what only a decoder can make sense of
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker[1] in left_out or marker[1] in (0xE0, 0xEE) and end - at < 16:
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]])


def webp_parts(data):
    """The picture, or an animation's first, and whole metadata, in a file of the right length."""
    kept, at, frames = [], 12, 0
    if data[12:16] == b"VP8X" and len(data) > 20 and data[20] & 2:  # what no frame fills is clear
        data = data[:20] + bytes([data[20] | 16]) + data[21:]
    for _ in range(MAX_PARTS):
        if at + 8 > len(data):
            break
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        whole, frames = at + 8 + size <= len(data), frames + (name == b"ANMF")
        if (
            name in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM")
            or name == b"ANMF"
            and frames == 1
            or name in (b"EXIF", b"XMP ")
            and whole
        ):
            kept.append(data[at : at + 8 + size] + b"\0" * (whole and size & 1))
        at += 8 + size + (size & 1)
    body = b"".join(kept)
    return data[:4] + struct.pack("<I", 4 + len(body)) + data[8:12] + body


def tiff_directory(data):
    """[(tag, type, count, place of its value)] of a TIFF's first directory, as libtiff finds them.

    [] where the directory is cut.
    """

    def number(at, size):
        return int.from_bytes(data[at : at + size], order or "little")

    order, wide = {b"II": "little", b"MM": "big"}.get(data[:2]), b"+" in data[2:4]
    at, head, line, room = (number(8, 8), 8, 20, 8) if wide else (number(4, 4), 2, 12, 4)
    lines = min(number(at, head), 1 << 16) if order else 0
    if at + head + lines * line > len(data):
        return []
    return [
        (number(at, 2), number(at + 2, 2), number(at + 4, room), at + line - room)
        for at in range(at + head, at + head + lines * line, line)
    ]


def tiff_tags(data):
    """{tag: numbers} of a TIFF's first directory, for tags of at most 16 unsigned ones.

    {} where the file is cut before the end of these.
    """
    order, room, tags = ">" if data[:2] == b"MM" else "<", 8 if b"+" in data[2:4] else 4, {}
    for tag, kind, count, at in tiff_directory(data):
        if kind in TIFF_TYPES and 0 < count <= 16:
            form = f"{order}{count}{TIFF_TYPES[kind]}"
            if struct.calcsize(form) > room:
                at = int.from_bytes(data[at : at + room], "big" if order == ">" else "little")
            if at + struct.calcsize(form) > len(data):
                return {}
            tags.setdefault(tag, struct.unpack_from(form, data, at))
    return tags


def boxes(data, at, end):
    """(name, start, end) of each box of an ISO base media file between two offsets."""
    while at + 8 <= end:
        size, name, head = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        stop = min(end, at + size) if size else end
        yield name, at + head, stop
        at = max(stop, at + head)


def heif_items(data):
    """HEIF (ISO 23008-12) -> ({item: type}, {item: its parts}, {item: declared pixels})."""

    def number(size):
        nonlocal at
        at += size
        return int.from_bytes(data[at - size : at])

    kinds, made_of, pixels, sizes, links = {}, {}, {}, [], []
    tops = [
        part
        for name, start, end in boxes(data, 0, len(data))
        if name == b"meta"
        for part in boxes(data, start + 4, end)
    ]
    parts = tops + [part for top in tops if top[0] == b"iprp" for part in boxes(data, *top[1:])]
    for name, at, end in parts:
        if name == b"ipco":
            sizes = [
                math.prod(struct.unpack(">II", data[start + 4 : stop])) if kind == b"ispe" else 0
                for kind, start, stop in boxes(data, at, end)
            ]
            continue
        version, flags = number(1), number(3)
        if name == b"iinf":
            for _, at, _ in boxes(data, at + (4 if version else 2), end):
                item = number(4 if number(4) >> 24 > 2 else 2)
                kinds[item] = data[at + 2 : at + 6]
        elif name == b"iref":
            for kind, at, _ in boxes(data, at, end):
                item, count = number(4 if version else 2), number(2)
                if kind == b"dimg":
                    made_of[item] = [number(4 if version else 2) for _ in range(count)]
        elif name == b"ipma":
            for _ in range(min(number(4), len(data))):
                item, count = number(4 if version else 2), number(1)
                links += [
                    (item, number(2) & 0x7FFF if flags & 1 else number(1) & 0x7F)
                    for _ in range(count)
                ]
                if at >= end:
                    break
    for item, index in links:
        pixels[item] = max(pixels.get(item, 0), sizes[index - 1] if 0 < index <= len(sizes) else 0)
    return kinds, made_of, pixels


def jpeg_scans(data):
    """Number of a JPEG's scans; 0 unless their heads cover every bit of every coefficient.

    ISO 10918-1, B.2.3 and G.1.1.
    """
    at, levels, scans = 2, {}, 0
    while marker := JPEG_MARKER.search(data, at):
        code, at = data[marker.end() - 1], marker.end()
        body = data[at + 2 : at + int.from_bytes(data[at : at + 2])]
        if code == 0xD9:
            break
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            levels = {part: [8] * 64 for part in body[6::3]}
        elif code == 0xDA and len(body) > 3:
            scans, first, last, level = scans + 1, body[-3], min(body[-2], 63), body[-1] & 15
            for part in body[1:-3:2]:
                levels.setdefault(part, [8] * 64)[first : last + 1] = [level] * (last + 1 - first)
        at += 2 + len(body)
    return 0 if any(map(any, levels.values())) else scans


def jpeg_ends(data):
    """A JPEG without its end marker -> the same with each of four tails and an end marker.

    A complete picture is the same in all. A cut one is not, because its missing bits are read from
    the tail. (Two tails agree by chance in 1 of 4,000 cuts.) After a cut at a restart marker a
    decoder passes over everything up to the next one, so the tails have restart markers too.
    """
    data = data.rstrip(b"\xff")  # half of a marker, or of a stuffed byte
    restarts = re.findall(rb"\xff[\xd0-\xd7]", data[data.rfind(b"\xff\xda") :])
    first = restarts[-1][1] + 1 if restarts else 0
    filler = np.random.default_rng(0).integers(1, 255, (2, 64), np.uint8)
    for filler in map(bytes, (*filler, *~filler)):
        restarts = (b"\xff" + bytes([0xD0 | (first + i) & 7]) + filler for i in range(8))
        yield data + filler + b"".join(restarts) + b"\xff\xd9"
