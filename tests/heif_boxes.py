"""HEIC files, box by box (ISO 14496-12 and 23008-12), around pictures that pillow-heif coded.

coded, configuration = coded_picture(image)     # the bits of a picture, and its decoder's settings
data = heic([(1, b"hvc1", coded)], [configuration, size(64, 48)], {1: [1, 2]})
"""

import struct

from written import heic as encode_heic


def box(name, *parts):
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + name + body


def full_box(name, version, *parts):
    return box(name, struct.pack(">I", version << 24), *parts)


def size(width, height):
    return full_box(b"ispe", 0, struct.pack(">II", width, height))


def grid(rows, columns, width, height):
    return struct.pack(">BBBBII", 0, 1, rows - 1, columns - 1, width, height)


def overlay(width, height):
    """An overlay of two pictures, both at its top left."""
    return struct.pack(">BB4HHH4h", 0, 0, 65535, 0, 0, 65535, width, height, 0, 0, 0, 0)


def coded_picture(image, **options):
    data = encode_heic(image, **options)
    at = data.index(b"hvcC") - 4
    return data[data.index(b"mdat") + 4 :], data[at : at + struct.unpack_from(">I", data, at)[0]]


def heic(items, properties, of_item, made_of=()):
    """A file of items [(id, type, bytes)]; item 1 is the picture.

    `of_item`: {id: numbers of its properties, from 1}; `made_of`: [(id, [ids])].
    """
    places, stored, locations = {}, b"", b""
    for item, _, body in items:  # equal bytes are stored once
        if body not in places:
            places[body], stored = len(stored), stored + body
        locations += struct.pack(">IHHHII", item, 1, 0, 1, places[body], len(body))
    infos = [
        full_box(b"infe", 3, struct.pack(">IH", item, 0), kind, b"\0") for item, kind, _ in items
    ]
    references = [
        box(b"dimg", struct.pack(f">IH{len(parts)}I", item, len(parts), *parts))
        for item, parts in made_of
    ]
    links = [
        struct.pack(">IB", item, len(numbers)) + bytes(numbers) for item, numbers in of_item.items()
    ]
    return box(b"ftyp", b"heic\0\0\0\0mif1heic") + full_box(
        b"meta",
        0,
        full_box(b"hdlr", 0, bytes(4), b"pict", bytes(13)),
        full_box(b"pitm", 1, struct.pack(">I", 1)),
        full_box(b"iloc", 2, struct.pack(">HI", 0x4400, len(items)), locations),
        full_box(b"iinf", 1, struct.pack(">I", len(items)), *infos),
        *([full_box(b"iref", 1, *references)] if references else []),
        box(
            b"iprp",
            box(b"ipco", *properties),
            full_box(b"ipma", 1, struct.pack(">I", len(links)), *links),
        ),
        box(b"idat", stored),
    )


def tiled(image, rows, columns, width, height, **options):
    """A grid with one picture in all tiles, shown up to this size."""
    coded, configuration = coded_picture(image, **options)
    tiles = list(range(2, 2 + rows * columns))
    items = [
        (1, b"grid", grid(rows, columns, width, height)),
        *((tile, b"hvc1", coded) for tile in tiles),
    ]
    return heic(
        items,
        [configuration, size(*image.size), size(width, height)],
        {1: [3], **{tile: [1, 2] for tile in tiles}},
        [(1, tiles)],
    )


def nested(image, kind, levels=12):
    """Pictures made of two pictures, on many levels. Each level doubles the work."""
    coded, configuration = coded_picture(image)
    body = grid(1, 2, *image.size) if kind == b"grid" else overlay(*image.size)
    items, made_of, below = [(100, b"hvc1", coded), (101, b"hvc1", coded)], [], [100, 101]
    for level in range(levels):
        ids = [1] if level == levels - 1 else [200 + 2 * level, 201 + 2 * level]
        items += [(item, kind, body) for item in ids]
        made_of += [(item, below) for item in ids]
        below = ids
    return heic(
        items,
        [configuration, size(*image.size)],
        {item: [1, 2] if item in (100, 101) else [2] for item, *_ in items},
        made_of,
    )
