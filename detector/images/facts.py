"""What is known of each file without any detector: its facts, its 8x8 picture, its twins, the group it belongs to.

rgb, row = describe_image(data)                 # sha256, facts (FACTS), thumb
cluster = twin_clusters(thumb, sha256)          # images that show the same picture share a number
groups, kind = make_groups(columns)             # what must stay on one side of every split
"""

import io
import json
import zlib

import numpy as np

from detector.base.constants import MAX_PIXELS
from detector.base.files import sha256
from detector.images import decoding

# Of each file: what a leak probe needs. Sizes as in the header (before EXIF rotation), bytes of the whole file.
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

NEAR_GREY = 3.0  # root mean square difference of two 8x8 thumbnails, in grey levels: copies re-saved at other
NEAR_CORRELATION = (
    0.9  # sizes and qualities stay below 1.9 (and above 0.95), different photographs above 7
)
MIN_SOURCES = (
    10  # sources, and MIN_OF_CLASS of them in each class, from which on groups are sources
)
MIN_OF_CLASS = 5
MIDDLE = 512  # pixels of the middle that blockiness and density look at


# ---- one image ----


def describe_image(data, max_pixels=MAX_PIXELS):
    """Image bytes -> (decoded RGB, {'sha256': ..., 'facts': record of FACTS, 'thumb': uint8 [64]}). Raises ImageError's kinds."""
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
            # as stored: EXIF rotation moves the grid of a JPEG whose sides are no multiples of 8
            blockiness(opened if format_name == "JPEG" else rgb),
            density(rgb),
        ),
        dtype=FACTS,
    )


def middle(image):
    """The middle MIDDLE pixels of an image, cut on its 8x8 grid."""
    left, top = (max(0, (side - MIDDLE) // 2) // 8 * 8 for side in image.size)
    return image.crop((left, top, min(left + MIDDLE, image.width), min(top + MIDDLE, image.height)))


def density(rgb):
    """Bytes per pixel that the picture itself takes: of its middle, saved here as JPEG 90."""
    crop, buffer = middle(rgb), io.BytesIO()
    crop.info = {}  # Pillow would copy comments and colour profiles, which are the file's and not the picture's
    crop.save(buffer, "JPEG", quality=90)
    return buffer.tell() / (crop.width * crop.height)


def blockiness(image):
    """Grey steps across the 8x8 grid over those inside it, in the middle; 1 where no JPEG ever was."""
    grey = np.asarray(middle(image).convert("L")).astype(np.int16)
    if min(grey.shape) < 16:
        return 1.0
    across, down = (
        np.abs(np.diff(grey, axis=1)).mean(axis=0),
        np.abs(np.diff(grey, axis=0)).mean(axis=1),
    )
    edge = np.concatenate([across[7::8], down[7::8]]).mean()
    inside = np.concatenate([np.delete(d, np.s_[7::8]) for d in (across, down)]).mean()
    return float((edge + 0.1) / (inside + 0.1))


def thumbnail(rgb):
    """8x8 grey picture, uint8 [64]."""
    small = rgb.resize(
        (8, 8), decoding.Image.Resampling.BOX
    )  # no reducing_gap: it moves greys by 10
    return np.asarray(small.convert("L")).reshape(64)


# ---- twins ----


def near_pairs(thumb, block=256):
    """uint8 [n, 64] -> index pairs [m, 2], first below second, whose 8x8 pictures agree (see `pairs_between`)."""
    pairs = pairs_between(thumb, thumb, block)
    return pairs[pairs[:, 0] < pairs[:, 1]]


def pairs_between(thumb, others, block=256):
    """uint8 [n, 64], uint8 [k, 64] -> index pairs [m, 2], one of each, whose 8x8 pictures agree.

    Within NEAR_GREY of each other and, so that flat pictures do not all agree, correlated by NEAR_CORRELATION. Two pictures
    differ by no less than their means do, so only those of about the same brightness are compared.
    """
    (
        (order, mean, grey, square, shape),
        (other_order, other_mean, other_grey, other_square, other_shape),
    ) = map(by_brightness, (thumb, others))
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
    """-> (row numbers from dark to bright; and of these rows: mean, greys as float32, their squared length, their deviations
    from the mean at length 1)."""
    grey = thumb.astype(np.float32)
    mean = grey.mean(axis=1)
    order = np.argsort(mean, kind="stable")
    grey, mean = grey[order], mean[order]
    shape = grey - mean[:, None]
    return (
        order,
        mean,
        grey,
        (grey * grey).sum(axis=1),
        shape / np.maximum(np.linalg.norm(shape, axis=1, keepdims=True), 1e-6),
    )


def twin_clusters(thumb, sha256):
    """Cluster number of each image, int [n]: byte-identical and near-identical images share one.

    Seen in the pictures, not in features: on a few pictures saved many times whitened features tell copies apart
    (cosine -0.5), and plain cosine chains half of a data set together.
    """
    _, first, cluster = np.unique(
        sha256, return_index=True, return_inverse=True
    )  # views of an image are compared once
    return merge(cluster, first[near_pairs(thumb[first])])


def merge(cluster, pairs):
    """Cluster numbers joined along index pairs [m, 2], renumbered from 0."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = int(cluster.max(initial=-1)) + 1
    left, right = cluster[pairs[:, 0]], cluster[pairs[:, 1]]
    return connected_components(
        coo_matrix((np.ones(len(pairs)), (left, right)), (n, n)), directed=False
    )[1][cluster]


# ---- groups ----


def make_groups(columns, cluster=None):
    """Group number of each row, int [n]: twins share one; with MIN_SOURCES sources or more, sources do.

    Images without a source are grouped as twins alone. -> (groups, what they are, in words)
    """
    cluster = twin_clusters(columns["thumb"], columns["sha256"]) if cluster is None else cluster
    sources = columns["sources"]
    named = np.flatnonzero(sources != "")
    of_class = [
        len(np.unique(sources[named][columns["labels"][named] == label])) for label in (0, 1)
    ]
    if len(np.unique(sources[named])) < MIN_SOURCES or min(of_class) < MIN_OF_CLASS:
        return cluster, "near-identical images"
    first = {sources[i]: i for i in named[::-1]}
    return merge(cluster, np.array([(i, first[sources[i]]) for i in named])), "sources"
