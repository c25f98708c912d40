"""Properties of each file that need no detector: facts, 8x8 thumbnail, twins, group.

rgb, row = describe_image(data)                 # sha256, facts (FACTS), thumb
cluster = twin_clusters(thumb, sha256)          # images that show the same picture share a number
groups, kind = make_groups(columns)             # images that must stay on one side of every split
"""

import json
import zlib

import numpy as np

from detector.base.constants import MAX_PIXELS
from detector.base.files import sha256
from detector.images import decoding
from detector.images.distort import jpeg_bytes

# The leak probes need these. Sizes are those of the header, before EXIF rotation. `bytes` counts
# the whole file.
FACTS = np.dtype(
    [
        ("width", np.int32),
        ("height", np.int32),
        ("bytes", np.int64),
        ("format", "U8"),
        ("quant_mean", np.float32),
        ("quant_hash", np.uint32),
        ("blockiness", np.float32),
        ("density", np.float32),
    ]
)

# Two 8x8 thumbnails: root mean square difference in grey levels, and correlation. Copies re-saved
# at other sizes and qualities stay below 1.9 and above 0.95. Different photographs are above 7.
NEAR_GREY = 3.0
NEAR_CORRELATION = 0.9
MIN_SOURCES = 10  # groups are sources from this number on,
MIN_OF_CLASS = 5  # with this many in each class
MIDDLE = 512  # side in pixels of the middle for blockiness and density


# ---- one image ----


def describe_image(data, max_pixels=MAX_PIXELS):
    """Image bytes -> (decoded RGB, {'sha256': ..., 'facts': record of FACTS, 'thumb': uint8 [64]}).

    Raises ImageError's kinds.
    """
    opened = decoding.open_image(data, max_pixels)
    rgb = decoding.load_rgb(opened)
    return rgb, {
        "sha256": sha256(data),
        "facts": container_facts(opened, rgb, len(data)),
        "thumb": thumbnail(rgb),
    }


def container_facts(opened, rgb, size):
    """Opened PIL image, its decoded RGB and the file's size in bytes -> one record of FACTS."""
    tables = getattr(opened, "quantization", None) or {}
    values = [v for key in sorted(tables) for v in tables[key]]
    format_name = "JPEG" if opened.format == "MPO" else opened.format
    return np.array(
        (
            *opened.size,
            size,
            format_name,
            np.mean(values) if values else 0,
            zlib.crc32(json.dumps(values).encode()) if values else 0,
            # before rotation, because EXIF rotation moves the grid where a side is no multiple of 8
            blockiness(opened if format_name == "JPEG" else rgb),
            density(rgb),
        ),
        dtype=FACTS,
    )


def middle(image):
    """The middle square of an image, of side MIDDLE, cut on its 8x8 grid."""
    left, top = (max(0, (side - MIDDLE) // 2) // 8 * 8 for side in image.size)
    return image.crop((left, top, min(left + MIDDLE, image.width), min(top + MIDDLE, image.height)))


def density(rgb):
    """Bytes per pixel of the picture itself: its middle, saved as JPEG 90."""
    crop = middle(rgb)
    crop.info = {}  # Pillow would save the file's comments and colour profile
    return len(jpeg_bytes(crop, 90)) / (crop.width * crop.height)


def blockiness(image):
    """Grey steps across the 8x8 grid, divided by steps inside the blocks; about 1 without JPEG."""
    grey = np.asarray(middle(image).convert("L")).astype(np.int16)
    if min(grey.shape) < 16:
        return 1.0
    steps = [np.abs(np.diff(grey, axis=axis)).mean(axis=1 - axis) for axis in (1, 0)]
    edge = np.concatenate([step[7::8] for step in steps]).mean()
    inside = np.concatenate([np.delete(step, np.s_[7::8]) for step in steps]).mean()
    return float((edge + 0.1) / (inside + 0.1))


def thumbnail(rgb):
    """8x8 grey picture, uint8 [64]."""
    # without reducing_gap, which changes grey values by 10
    small = rgb.resize((8, 8), decoding.Image.Resampling.BOX)
    return np.asarray(small.convert("L")).reshape(64)


# ---- twins ----


def near_pairs(thumb, block=256):
    """uint8 [n, 64] -> index pairs [m, 2], first below second; see `pairs_between`."""
    pairs = pairs_between(thumb, thumb, block)
    return pairs[pairs[:, 0] < pairs[:, 1]]


def pairs_between(thumb, others, block=256):
    """uint8 [n, 64], uint8 [k, 64] -> index pairs [m, 2] of near-identical thumbnails.

    They differ by at most NEAR_GREY. They must also correlate by NEAR_CORRELATION, or all flat
    pictures would match. Thumbnails differ at least as much as their means, so only thumbnails of
    nearly the same brightness are compared.
    """
    order, mean, grey, square, shape = by_brightness(thumb)
    other_order, other_mean, other_grey, other_square, other_shape = by_brightness(others)
    pairs = [np.empty((0, 2), int)]
    for start in range(0, len(grey), block):
        rows = slice(start, start + block)
        first = np.searchsorted(other_mean, mean[start] - NEAR_GREY - 0.01)
        near = slice(first, np.searchsorted(other_mean, mean[rows][-1] + NEAR_GREY + 0.01))
        distance = (
            square[rows, None] + other_square[near] - 2 * grey[rows] @ other_grey[near].T
        ) / 64
        i, j = np.nonzero(distance <= NEAR_GREY**2)
        alike = (shape[start + i] * other_shape[first + j]).sum(axis=1) >= NEAR_CORRELATION
        pairs.append(np.stack([order[start + i[alike]], other_order[first + j[alike]]], axis=1))
    pairs = np.concatenate(pairs)
    return pairs[np.lexsort(pairs.T[::-1])]


def by_brightness(thumb):
    """uint8 [n, 64] -> (order, mean, grey, square, shape), the last four in this order.

    `order` lists rows from dark to bright. `grey` is float32, `square` its squared length, `shape`
    its deviation from the mean, scaled to length 1.
    """
    grey = thumb.astype(np.float32)
    mean = grey.mean(axis=1)
    order = np.argsort(mean, kind="stable")
    grey, mean = grey[order], mean[order]
    shape = grey - mean[:, None]
    shape /= np.maximum(np.linalg.norm(shape, axis=1, keepdims=True), 1e-6)
    return order, mean, grey, (grey * grey).sum(axis=1), shape


def twin_clusters(thumb, sha256):
    """Cluster number of each image, int [n]: byte-identical and near-identical images share one.

    Thumbnails are compared, not features. On a few pictures saved many times, copies have whitened
    features of cosine -0.5. Plain cosine joins half of a data set.
    """
    # views of an image share its hash and are compared once
    _, first, cluster = np.unique(sha256, return_index=True, return_inverse=True)
    return merge(cluster, first[near_pairs(thumb[first])])


def merge(cluster, pairs):
    """Cluster numbers joined along index pairs [m, 2], renumbered from 0."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = int(cluster.max(initial=-1)) + 1
    left, right = cluster[pairs[:, 0]], cluster[pairs[:, 1]]
    graph = coo_matrix((np.ones(len(pairs)), (left, right)), (n, n))
    return connected_components(graph, directed=False)[1][cluster]


# ---- groups ----


def merge_named(cluster, names):
    """Cluster numbers int [n], joined where images have the same name. '' is no name."""
    named = np.flatnonzero(names != "")
    if not len(named):
        return cluster
    first = {names[i]: i for i in named[::-1]}
    return merge(cluster, np.array([(i, first[names[i]]) for i in named]))


def make_groups(columns, cluster=None):
    """Columns -> (group number of each row, int [n]; name of the groups).

    Twins share a group, and so do the images of a group that a labels file names. With MIN_SOURCES
    sources or more, images of one source share a group too. Images without a source are grouped
    with their twins and their named group only.
    """
    cluster = twin_clusters(columns["thumb"], columns["sha256"]) if cluster is None else cluster
    cluster = merge_named(cluster, columns["groups"])
    more = " and given groups" if (columns["groups"] != "").any() else ""
    sources = columns["sources"]
    named = np.flatnonzero(sources != "")
    of_class = [set(sources[named][columns["labels"][named] == label]) for label in (0, 1)]
    if len(set(sources[named])) < MIN_SOURCES or min(map(len, of_class)) < MIN_OF_CLASS:
        return cluster, f"near-identical images{more}"
    return merge_named(cluster, sources), f"sources{more}"
