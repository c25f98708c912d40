"""The format of a file by its first bytes, and the parts of a file that its pixels need.

sniff(data)                               # "PNG"; "JPEG XL", known but not accepted; or None
data, texts = needed_parts(data, "PNG")   # the picture alone, and the file's texts
tiff_tags(data)                           # {256: (width,), ...} of the first directory
"""

import itertools
import re
import struct
import zlib

import numpy as np

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "HEIF")  # accepted
TAKEN = ", ".join(FORMATS).replace("HEIF", "HEIC")  # with the names that people know
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
    # known, not accepted
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
BASE64 = "base64 text of an image"
BASE64_START = re.compile(rb"data:image/|/9j/|iVBORw0KGgo|UklGR|R0lGOD|SUkqA|TU0AK|AAAA..Z0eXB")
# ISO base media files list "brands" in their first box: major, version, compatible brands
BRANDS = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"crx ": "camera raw (CR3)",
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIF"
    ),
}
MAX_PARTS = 100_000  # chunks beside the pixels; millions would take seconds
MAX_TEXT = 1 << 20  # bytes that are unpacked of one text in a PNG
MAX_TEXTS = 4 << 20  # bytes of all texts
# PNG's colour type -> valid lengths of the chunk tRNS; readers ignore other lengths
TRANSPARENCY = {b"\0": (2,), b"\2": (6,), b"\3": range(257)}
# a scan holds stuffed bytes and restart markers only
JPEG_MARKER = re.compile(rb"\xff+[\x02-\xcf\xd9-\xfe]")
JPEG_SCAN_MARKER = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")  # ends the bits of a scan
JPEG_ANY_MARKER = re.compile(rb"\xff+[\x01-\xfe]")  # ends those of a scan without restarts
TIFF_TYPES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}  # unsigned numbers


def sniff(data):
    """Name of the format by its first bytes, accepted (FORMATS) or not; None if unknown."""
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4]), 400)
        brands = [data[8:12], *(data[at : at + 4] for at in range(16, end, 4))]
        named = next((BRANDS[brand] for brand in brands if brand in BRANDS), None)
        return named or ("HEIF" if brands[0] in (b"mif1", b"msf1") else None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if re.match(rb"\s*<[?!s]", data[:100]) and b"<svg" in data[:1000]:
        return "SVG"
    if BASE64_START.match(data):
        return BASE64
    return next((name for start, name in STARTS if data.startswith(start)), None)


def needed_parts(data, kind):
    """Bytes of an image -> (bytes of its first picture and its EXIF, {key: text} of a PNG).

    Profiles, texts, further pictures and damaged metadata of a JPEG, PNG or WebP are left out,
    because they can make a sound picture unreadable.
    """
    if kind == "PNG":
        return png_parts(data)
    return {"JPEG": jpeg_parts, "WEBP": webp_parts}.get(kind, bytes)(data), {}


def png_parts(data):
    """-> (critical chunks, transparency and sound EXIF; {key: text}).

    The decoder checks the critical chunks.
    """
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
    """[(chunk's name, its bytes)] -> {key: text}: the first text of a key, cut to MAX_TEXT."""
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
    """Bytes of a JPEG or AVIF with an unreadable header -> the file without metadata."""
    if kind == "AVIF":
        return re.sub(rb"(infe[\2\3]\0\0.(?:..|....)..)Exif", rb"\1skip", data, flags=re.DOTALL)
    return jpeg_parts(data, left_out=(*range(0xE2, 0xEE), 0xEF, 0xFE)) if kind == "JPEG" else data


def jpeg_parts(data, left_out=(0xE2,)):
    """A JPEG without APP2 (profiles, list of pictures) and without cut JFIF and Adobe segments."""
    kept, start, at = [], 0, 2
    for _ in range(MAX_PARTS):
        marker = data[at : at + 2]
        if marker[:1] != b"\xff" or marker[1:] in (b"\xda", b"\xff", b""):
            break  # pixels, or a part that only a decoder understands
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker[1] in left_out or marker[1] in (0xE0, 0xEE) and end - at < 16:
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]])


def webp_parts(data):
    """The first picture and complete metadata, in a file of the right length."""
    kept, at, frames = [], 12, 0
    # an animation: the canvas is clear where no frame draws, so declare alpha
    if data[12:16] == b"VP8X" and len(data) > 20 and data[20] & 2:
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
    """[(tag, type, count, offset of its value)] of a TIFF's first directory, as libtiff reads it.

    [] where the directory is cut.
    """

    def number(at, size):
        return int.from_bytes(data[at : at + size], order)

    order, wide = "big" if data[:2] == b"MM" else "little", b"+" in data[2:4]
    at, head, line, room = (number(8, 8), 8, 20, 8) if wide else (number(4, 4), 2, 12, 4)
    lines = min(number(at, head), 1 << 16)
    if at + head + lines * line > len(data):
        return []
    return [
        (number(at, 2), number(at + 2, 2), number(at + 4, room), at + line - room)
        for at in range(at + head, at + head + lines * line, line)
    ]


def tiff_tags(data):
    """{tag: numbers} of a TIFF's first directory, for tags of at most 16 unsigned numbers.

    {} where the file is cut before the end of a value.
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


def number(data, at, size):
    """A big-endian number; bytes beyond the end count as missing."""
    return int.from_bytes(data[at : at + size])


def heif_items(data):
    """HEIF (ISO 23008-12) -> ({item: type}, {item: its parts}, {item: declared pixels})."""
    kinds, made_of, pixels, sizes, links = {}, {}, {}, [], []
    tops = [
        part
        for name, start, end in boxes(data, 0, len(data))
        if name == b"meta"
        for part in boxes(data, start + 4, end)
    ]
    parts = tops + [part for top in tops if top[0] == b"iprp" for part in boxes(data, *top[1:])]
    for name, start, end in parts:
        if name == b"iinf":
            kinds |= heif_types(data, start, end)
        elif name == b"iref":
            made_of |= heif_derivations(data, start, end)
        elif name == b"ipco":
            sizes = heif_sizes(data, start, end)
        elif name == b"ipma":
            links += heif_links(data, start, end)
    for item, index in links:
        pixels[item] = max(pixels.get(item, 0), sizes[index - 1] if 0 < index <= len(sizes) else 0)
    return kinds, made_of, pixels


def heif_types(data, start, end):
    """Box iinf -> {item: type}."""
    kinds = {}
    for _, at, _ in boxes(data, start + (8 if number(data, start, 1) else 6), end):
        size = 4 if number(data, at, 1) > 2 else 2
        kinds[number(data, at + 4, size)] = data[at + size + 6 : at + size + 10]
    return kinds


def heif_derivations(data, start, end):
    """Box iref -> {item: the items that it is made of}."""
    made_of, size = {}, 4 if number(data, start, 1) else 2
    for name, at, _ in boxes(data, start + 4, end):
        if name == b"dimg":
            first, count = at + size + 2, number(data, at + size, 2)
            parts = [number(data, first + i * size, size) for i in range(count)]
            made_of[number(data, at, size)] = parts
    return made_of


def heif_sizes(data, start, end):
    """Box ipco -> declared pixels of each property; 0 for a property that is no size."""
    return [
        number(data, at + 4, 4) * number(data, at + 8, 4) if name == b"ispe" else 0
        for name, at, _ in boxes(data, start, end)
    ]


def heif_links(data, start, end):
    """Box ipma -> [(item, number of its property, from 1)]."""
    links, at, size = [], start + 8, 4 if number(data, start, 1) else 2
    width, mask = (2, 0x7FFF) if number(data, start + 1, 3) & 1 else (1, 0x7F)
    for _ in range(min(number(data, start + 4, 4), len(data))):
        item, count = number(data, at, size), number(data, at + size, 1)
        at += size + 1
        links += [(item, number(data, at + i * width, width) & mask) for i in range(count)]
        at += count * width
        if at >= end:
            break
    return links


def jpeg_segments(data):
    """(marker, start and end of its content) of each segment before the end marker."""
    at = 2
    while marker := JPEG_MARKER.search(data, at):
        code, at = data[marker.end() - 1], marker.end()
        if code == 0xD9:
            break
        start, at = at + 2, at + int.from_bytes(data[at : at + 2])
        yield code, start, at


def jpeg_scans(data):
    """Number of a JPEG's scans; 0 unless their headers cover every bit of every coefficient.

    ISO 10918-1, B.2.3 and G.1.1.
    """
    levels, scans = {}, 0
    for code, start, end in jpeg_segments(data):
        body = data[start:end]
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            levels = {part: [8] * 64 for part in body[6::3]}
        elif code == 0xDA and len(body) > 3:
            scans, first, last, level = scans + 1, body[-3], min(body[-2], 63), body[-1] & 15
            for part in body[1:-3:2]:
                levels.setdefault(part, [8] * 64)[first : last + 1] = [level] * (last + 1 - first)
    return 0 if any(map(any, levels.values())) else scans


def jpeg_scan_ends(data):
    """Where a decoder stops to read the bits of each scan: at a marker, or where the file ends."""
    restarts, ends = False, []
    for code, start, end in jpeg_segments(data):
        if code == 0xDD:
            restarts = any(data[start:end])
        elif code == 0xDA:
            marker = (JPEG_SCAN_MARKER if restarts else JPEG_ANY_MARKER).search(data, end)
            ends.append(marker.start() if marker else len(data))
    return ends


def jpeg_ends(data):
    """A JPEG -> four files that end, with other bits after the bits of each scan.

    A complete picture decodes to the same pixels in all files. A cut picture does not, because the
    decoder reads its missing bits from the added bits. Two files agree by chance in 1 of 4,000
    cuts. After a cut at a restart marker a decoder skips to the next restart marker, so the added
    bits have restart markers too.
    """
    data = data.rstrip(b"\xff")  # half of a marker or of a stuffed byte
    places = [0, *jpeg_scan_ends(data), len(data)]
    parts = [data[start:end] for start, end in itertools.pairwise(places)]
    noise = np.random.default_rng(0).integers(1, 255, (2, 64), np.uint8)
    for filler in map(bytes, (*noise, *~noise)):
        filled = (part + more_bits(part, filler) for part in parts[:-1])
        yield b"".join([*filled, parts[-1], b"\xff\xd9"])


def more_bits(part, filler):
    """The filler, and eight times a restart marker and the filler, for the end of a scan."""
    restarts = re.findall(rb"\xff[\xd0-\xd7]", part[part.rfind(b"\xff\xda") :])
    first = restarts[-1][1] + 1 if restarts else 0
    return filler + b"".join(bytes([0xFF, 0xD0 | (first + i) & 7]) + filler for i in range(8))
