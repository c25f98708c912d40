"""Facts of files in every format, twins and groups."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from written import encode, jpeg, rotated, sixteen_bits

from detector.base.errors import ImageError
from detector.base.files import sha256
from detector.evaluation import audit
from detector.images import decoding, formats, preprocessing
from detector.images.facts import (
    FACTS,
    MIN_OF_CLASS,
    MIN_SOURCES,
    blockiness,
    density,
    describe_image,
    make_groups,
    merge,
    near_pairs,
    twin_clusters,
)


@pytest.fixture(scope="session")
def photo(pictures):
    """A piece of a photograph with no side a multiple of 8."""
    return pictures["china.jpg"].crop((100, 100, 401, 303))


# ---- the facts of one file ----


def with_alpha(image):
    """Opaque except for one transparent corner."""
    image = image.convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 20, 20))
    return image


FILES = {
    # name: (format, function: photo -> bytes, mean difference of decoded grey values)
    "JPEG": ("JPEG", lambda p: jpeg(p), 3),
    "JPEG, grey": ("JPEG", lambda p: jpeg(p.convert("L")), 3),
    "JPEG, CMYK": ("JPEG", lambda p: jpeg(p.convert("CMYK")), 3),
    "JPEG, progressive": ("JPEG", lambda p: jpeg(p, progressive=True), 3),
    "JPEG, rotated": (
        "JPEG",
        lambda p: rotated(p.transpose(Image.Transpose.ROTATE_90), "JPEG", 6, quality=90),
        3,
    ),
    "JPEG of several pictures": (
        "JPEG",
        lambda p: encode(p, "MPO", save_all=True, append_images=[p.rotate(180)], quality=90),
        3,
    ),
    "PNG": ("PNG", lambda p: encode(p, "PNG"), 0),
    "PNG, grey": ("PNG", lambda p: encode(p.convert("L"), "PNG"), 0),
    "PNG, grey of 16 bits": ("PNG", lambda p: encode(sixteen_bits(p), "PNG"), 0),
    "PNG, palette": ("PNG", lambda p: encode(p.quantize(256), "PNG"), 8),
    "PNG, black and white": ("PNG", lambda p: encode(p.convert("1"), "PNG"), 110),
    "PNG, alpha": ("PNG", lambda p: encode(with_alpha(p), "PNG"), 3),
    "PNG, rotated": (
        "PNG",
        lambda p: rotated(p.transpose(Image.Transpose.ROTATE_180), "PNG", 3),
        0,
    ),
    "WebP": ("WEBP", lambda p: encode(p, "WEBP", quality=90), 4),
    "WebP, lossless, alpha": ("WEBP", lambda p: encode(with_alpha(p), "WEBP", lossless=True), 3),
    "WebP, rotated": (
        "WEBP",
        lambda p: rotated(p.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "WEBP", 2, lossless=True),
        0,
    ),
    "AVIF": ("AVIF", lambda p: encode(p, "AVIF", quality=90), 4),
    "GIF": ("GIF", lambda p: encode(p.quantize(256), "GIF"), 8),
    "GIF, animated": (
        "GIF",
        lambda p: encode(
            p.quantize(256), "GIF", save_all=True, append_images=[Image.new("P", p.size)]
        ),
        8,
    ),
    "BMP": ("BMP", lambda p: encode(p, "BMP"), 0),
    "BMP, palette": ("BMP", lambda p: encode(p.quantize(256), "BMP"), 8),
    "TIFF": ("TIFF", lambda p: encode(p, "TIFF"), 0),
    "TIFF, compressed": ("TIFF", lambda p: encode(p, "TIFF", compression="tiff_lzw"), 0),
    "TIFF, CMYK": ("TIFF", lambda p: encode(p.convert("CMYK"), "TIFF"), 1),
    "TIFF, grey of 16 bits": ("TIFF", lambda p: encode(sixteen_bits(p), "TIFF"), 0),
}


@pytest.mark.parametrize("kind, write, tolerance", FILES.values(), ids=FILES)
def test_every_format_is_read_as_the_same_picture_with_its_own_facts(photo, kind, write, tolerance):
    data = write(photo)
    rgb, row = describe_image(data)
    assert (rgb.mode, rgb.size) == ("RGB", photo.size)
    grey = [np.asarray(image.convert("L")).astype(int)[20:, 20:] for image in (rgb, photo)]
    assert np.abs(grey[0] - grey[1]).mean() <= tolerance
    facts = row["facts"]
    assert facts["format"] == kind and facts["bytes"] == len(data)
    assert sorted((facts["width"], facts["height"])) == sorted(photo.size)
    assert (facts["quant_mean"] > 0) == (facts["quant_hash"] > 0) == (kind == "JPEG")
    assert row["sha256"] == sha256(data)
    assert row["thumb"].shape == (64,) and row["thumb"].dtype == np.uint8 and facts.dtype == FACTS


def test_a_turned_file_has_the_sides_of_its_header_and_the_upright_picture(photo):
    upright = describe_image(jpeg(photo))[1]
    stored = photo.transpose(Image.Transpose.ROTATE_90)
    turned = describe_image(rotated(stored, "JPEG", 6, quality=90))[1]
    assert (turned["facts"]["width"], turned["facts"]["height"]) == photo.size[::-1]
    assert near_pairs(np.stack([upright["thumb"], turned["thumb"]])).tolist() == [[0, 1]]


def test_the_content_gives_the_format_and_not_the_name(photo, tmp_path):
    kinds = {"fake/c": "WEBP", "fake/d.jpeg": "TIFF", "real/a.png": "JPEG", "real/b.jpg": "PNG"}
    for name, kind in kinds.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(photo, kind))
    columns, unreadable = audit.describe_folder(tmp_path)
    assert unreadable == [] and list(columns["facts"]["format"]) == list(kinds.values())


def test_the_quantisation_of_a_jpeg_grows_with_its_coarseness(photo):
    facts = [describe_image(jpeg(photo, quality))[1]["facts"] for quality in (95, 75, 40, 40)]
    assert facts[0]["quant_mean"] < facts[1]["quant_mean"] < facts[2]["quant_mean"]
    assert facts[2]["quant_hash"] == facts[3]["quant_hash"] != facts[1]["quant_hash"]


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (15, 400), (7, 9)])
def test_small_pictures_have_facts_too(size):
    rgb, row = describe_image(encode(Image.new("RGB", size, "teal"), "PNG"))
    assert rgb.size == size and row["facts"]["blockiness"] == 1
    assert (row["thumb"] == row["thumb"][0]).all()


# FORMATS_DIR names a folder of odd files that people have.
if os.environ.get("FORMATS_DIR"):
    ODD_FILES = sorted(path for path in Path(os.environ["FORMATS_DIR"]).iterdir() if path.is_file())

    @pytest.mark.parametrize("path", ODD_FILES, ids=lambda path: path.name)
    def test_an_odd_file_is_read_or_refused_with_one_line(path, as_users_have_it):
        try:
            rgb, row = describe_image(path.read_bytes())
            assert rgb.mode == "RGB" and row["facts"]["format"] in formats.FORMATS
            assert np.isfinite(
                preprocessing.preprocess(rgb, preprocessing.clip_transform(160))
            ).all()
        except ImageError as error:
            assert str(error) and "\n" not in str(error)


# ---- blockiness ----


@pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "chelsea.png"])
def test_a_coarse_jpeg_shows_blocks_and_a_photograph_without_jpeg_does_not(pictures, name):
    files = [jpeg(pictures[name], quality) for quality in (90, 50, 15)]
    fine, middle, coarse = (blockiness(decoding.decode_image(data)) for data in files)
    without = blockiness(pictures[name])
    assert without == pytest.approx(1, abs=0.04)
    assert without - 0.02 < fine < middle < coarse and coarse > 1.25


def test_blocks_remain_in_a_png(photo):
    image = decoding.decode_image(jpeg(photo, 30))
    facts = describe_image(encode(image, "PNG"))[1]["facts"]
    assert facts["blockiness"] == pytest.approx(blockiness(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_has_the_blockiness_of_the_upright_jpeg(photo, orientation):
    plain = describe_image(jpeg(photo, 30))[1]["facts"]
    turned = describe_image(rotated(photo, "JPEG", orientation, quality=30))[1]["facts"]
    assert turned["blockiness"] == pytest.approx(plain["blockiness"]) and plain["blockiness"] > 1.1


def test_the_middle_of_a_large_picture_is_cut_on_the_grid_of_its_blocks(pictures):
    image = pictures["astronaut.png"].resize((1501, 1403), Image.Resampling.LANCZOS)
    assert blockiness(decoding.decode_image(jpeg(image, 20))) > 1.3 > 1.1 > blockiness(image)


# ---- density ----


def test_density_grows_with_the_detail_of_the_picture(photo):
    pixels = np.random.default_rng(0).integers(0, 256, (203, 301, 3))
    noise, flat = Image.fromarray(pixels.astype(np.uint8)), Image.new("RGB", (301, 203), "teal")
    assert density(flat) < 0.05 < density(photo) < 0.7 < density(noise)
    assert density(photo) == pytest.approx(len(jpeg(photo)) / (photo.width * photo.height))


def test_density_depends_on_the_picture_and_not_on_the_file(photo):
    files = encode(photo, "PNG"), encode(photo, "BMP"), jpeg(photo, 60)
    png, bmp, coarse = (describe_image(data)[1]["facts"] for data in files)
    assert png["density"] == bmp["density"] == pytest.approx(density(photo))
    assert coarse["density"] == pytest.approx(density(photo), rel=0.25)
    assert coarse["bytes"] < 0.6 * png["bytes"]


def test_the_density_of_a_large_picture_is_that_of_its_middle(pictures):
    picture = pictures["astronaut.png"]  # 512 x 512
    framed = Image.new("RGB", (1500, 1300), "white")
    framed.paste(picture, ((1500 - 512) // 2 // 8 * 8, (1300 - 512) // 2 // 8 * 8))
    assert density(framed) == pytest.approx(density(picture))


# ---- twins ----


def described(*files):
    """Bytes of files -> (thumb, sha256) of all files."""
    rows = [describe_image(data)[1] for data in files]
    return np.stack([row["thumb"] for row in rows]), np.array([row["sha256"] for row in rows])


COPIES = {
    "byte for byte": lambda p: encode(p, "PNG"),
    "re-saved as JPEG": lambda p: jpeg(p, 90),
    "re-saved coarsely": lambda p: jpeg(p, 30),
    "re-saved as WebP": lambda p: encode(p, "WEBP", quality=60),
    "re-saved as AVIF": lambda p: encode(p, "AVIF", quality=60),
    "half the size": lambda p: jpeg(p.resize((p.width // 2, p.height // 2))),
    "a messenger's size": lambda p: jpeg(p.resize((160, 160 * p.height // p.width)), 50),
    "another shape": lambda p: jpeg(p.resize((300, 300))),
    "grey": lambda p: jpeg(p.convert("L")),
    "a border cut off": lambda p: jpeg(p.crop((4, 4, p.width - 4, p.height - 4))),
    "turned by EXIF": lambda p: rotated(p.transpose(Image.Transpose.ROTATE_180), "JPEG", 3),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_copies_of_a_photograph_are_twins(pictures, copy):
    for name, picture in pictures.items():
        cluster = twin_clusters(*described(encode(picture, "PNG"), copy(picture)))
        assert cluster[0] == cluster[1], name


def test_different_photographs_are_no_twins(pictures):
    different = []
    for picture in pictures.values():
        width, height = picture.width // 2, picture.height // 2
        corners = itertools.product((0, width), (0, height))
        different += [picture.crop((x, y, x + width, y + height)) for x, y in corners]
        turns = Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180
        different += [picture, *(picture.transpose(turn) for turn in turns)]
    assert len(set(twin_clusters(*described(*map(jpeg, different))))) == 8 * (4 + 1 + 2)


@pytest.mark.parametrize("shift, twins", [(0.004, True), (0.25, False), (0.5, False)])
def test_crops_side_by_side_are_twins_only_if_nearly_the_same(pictures, shift, twins):
    for name, picture in pictures.items():
        side, right = min(picture.size) // 2, round(shift * min(picture.size) / 2)
        crops = [picture.crop((left, 50, left + side, 50 + side)) for left in (10, 10 + right)]
        cluster = twin_clusters(*described(*map(jpeg, crops)))
        assert (cluster[0] == cluster[1]) == twins, name


def test_copies_of_copies_end_up_in_one_cluster(pictures):
    astronaut, coffee = pictures["astronaut.png"], pictures["coffee.png"]
    png, coarse = encode(astronaut, "PNG"), jpeg(astronaut, 40)
    cluster = twin_clusters(*described(png, jpeg(coffee), coarse, jpeg(coffee), png))
    assert cluster[0] == cluster[2] == cluster[4] != cluster[1] == cluster[3]
    assert set(cluster) == {0, 1}


@pytest.mark.parametrize("n", [0, 1])
def test_no_pairs_among_too_few(n):
    assert near_pairs(np.zeros((n, 64), np.uint8)).shape == (0, 2)


def test_pairs_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (30, 64))
    copies = pictures + rng.integers(-4, 5, pictures.shape)
    thumb = np.concatenate([pictures, copies]).clip(0, 255).astype(np.uint8)
    order = rng.permutation(60)
    permuted = np.sort(order[near_pairs(thumb[order])], axis=1)
    expected = [[i, i + 30] for i in range(30)]
    assert near_pairs(thumb).tolist() == sorted(permuted.tolist()) == expected


@pytest.mark.parametrize("block", [1, 7, 60, 1000])
def test_pairs_do_not_depend_on_how_many_are_compared_at_a_time(block):
    rng = np.random.default_rng(0)
    thumb = np.repeat(rng.integers(0, 256, (20, 64)).astype(np.uint8), 3, axis=0)
    expected = [[3 * i + a, 3 * i + b] for i in range(20) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert sorted(near_pairs(thumb, block).tolist()) == expected


def test_flat_pictures_are_twins_only_byte_for_byte():
    """Nothing distinguishes a white page from another white page."""
    thumb = np.stack([np.full(64, grey, np.uint8) for grey in (0, 0, 128, 130, 255)])
    assert near_pairs(thumb).tolist() == []
    cluster = twin_clusters(thumb, np.array(["a", "a", "b", "c", "d"]))
    assert cluster[0] == cluster[1] and len(set(cluster)) == 4


def test_the_same_picture_at_another_brightness_is_no_twin():
    picture = np.random.default_rng(0).integers(0, 200, (1, 64))
    assert near_pairs(np.concatenate([picture, picture + 20]).astype(np.uint8)).tolist() == []


def test_equal_hashes_are_twins_whatever_the_thumbnails():
    thumb = np.random.default_rng(0).integers(0, 256, (4, 64)).astype(np.uint8)
    cluster = twin_clusters(thumb, np.array(["a", "b", "a", "c"]))
    assert cluster[0] == cluster[2] and len(set(cluster)) == 3


def test_a_cluster_has_all_of_its_many_copies():
    rng = np.random.default_rng(0)
    one, rest = rng.integers(0, 256, (1, 64)), rng.integers(0, 256, (100, 64))
    thumb = np.concatenate([np.repeat(one, 70, axis=0), rest]).astype(np.uint8)
    assert np.bincount(twin_clusters(thumb, np.arange(170).astype(str))).max() == 70


def test_no_pictures_have_no_clusters():
    assert twin_clusters(np.zeros((0, 64), np.uint8), np.zeros(0, str)).tolist() == []


# ---- groups ----


def grouped(labels, sources, sha256=None):
    """-> (groups, words) of pictures that all differ, except for equal hashes."""
    n, rng = len(labels), np.random.default_rng(0)
    columns = {
        "labels": np.array(labels),
        "sources": np.array(sources),
        "groups": np.full(n, ""),
        "sha256": np.arange(n).astype(str) if sha256 is None else sha256,
        "thumb": rng.integers(0, 256, (n, 64)).astype(np.uint8),
    }
    return make_groups(columns)


def same_partition(groups, names):
    return (
        len(set(zip(groups.tolist(), names, strict=True)))
        == len(set(groups.tolist()))
        == len(set(names))
    )


@pytest.mark.parametrize(
    "reals, fakes, by_source",
    [
        (MIN_OF_CLASS, MIN_SOURCES - MIN_OF_CLASS, True),
        (MIN_OF_CLASS, MIN_SOURCES - MIN_OF_CLASS - 1, False),
        (MIN_OF_CLASS - 1, MIN_SOURCES, False),
        (MIN_SOURCES, MIN_OF_CLASS - 1, False),
    ],
)
def test_sources_are_groups_where_each_class_has_enough_of_them(reals, fakes, by_source):
    labels = np.repeat([0, 1], [3 * reals, 3 * fakes])
    sources = np.repeat([f"s{i}" for i in range(reals + fakes)], 3)
    groups, words = grouped(labels, sources)
    assert words == ("sources" if by_source else "near-identical images")
    assert same_partition(groups, sources.tolist() if by_source else list(range(len(labels))))


@pytest.mark.parametrize("number", [MIN_SOURCES - 1, MIN_SOURCES])
def test_fewer_sources_of_both_classes_are_no_groups(number):
    sources = np.tile([f"s{i}" for i in range(number)], 4)
    words = "sources" if number == MIN_SOURCES else "near-identical images"
    assert grouped(np.repeat([0, 1], 2 * number), sources)[1] == words


def test_sources_with_a_common_picture_are_one_group_and_other_images_stand_alone():
    labels, sources = np.repeat([0, 1], 12), [f"s{i // 2}" for i in range(24)]
    sources[22:] = "", ""
    hashes = list(range(24))
    hashes[0] = hashes[23] = hashes[5]  # of s0, of none, of s2
    groups, words = grouped(labels, sources, np.array(hashes).astype(str))
    names = ["s0" if s in ("s0", "s2") else s for s in sources[:22]] + ["alone", "s0"]
    assert words == "sources" and same_partition(groups, names)


def test_clusters_are_merged_along_chains_of_pairs():
    merged = merge(np.array([0, 1, 2, 3, 4, 1]), np.array([(0, 1), (4, 5)]))
    assert same_partition(merged, ["a", "a", "c", "d", "a", "a"]) and set(merged) == {0, 1, 2}
