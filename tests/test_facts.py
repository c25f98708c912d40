"""What is noted of each file for the leak audit: format, size, quantisation, blockiness and a thumbnail, for every format."""
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import audit
import common
from audit import blockiness, describe_image, near_pairs
from common import ImageError
from dataset import FACTS
from written import encode, jpeg, pictures, rotated  # noqa: F401


@pytest.fixture(scope="session")
def photo(pictures):
    """A piece of a photograph with no side a multiple of 8."""
    return pictures["china.jpg"].crop((100, 100, 401, 303))


# ---- the facts of one file ----

def grey16(image):
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def with_alpha(image):
    """Opaque but for one transparent corner."""
    image = image.convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 20, 20))
    return image


FILES = {
    # name: (format, bytes of the photo in that format, how far a decoded grey value lies from the photo's on average)
    "JPEG": ("JPEG", lambda p: jpeg(p), 3),
    "JPEG, grey": ("JPEG", lambda p: jpeg(p.convert("L")), 3),
    "JPEG, CMYK": ("JPEG", lambda p: jpeg(p.convert("CMYK")), 3),
    "JPEG, progressive": ("JPEG", lambda p: jpeg(p, progressive=True), 3),
    "JPEG, rotated": ("JPEG", lambda p: rotated(p.transpose(Image.Transpose.ROTATE_90), "JPEG", 6, quality=90), 3),
    "JPEG of several pictures": ("JPEG", lambda p: encode(p, "MPO", save_all=True, append_images=[p.rotate(180)], quality=90), 3),
    "PNG": ("PNG", lambda p: encode(p, "PNG"), 0),
    "PNG, grey": ("PNG", lambda p: encode(p.convert("L"), "PNG"), 0),
    "PNG, grey of 16 bits": ("PNG", lambda p: encode(grey16(p), "PNG"), 0),
    "PNG, palette": ("PNG", lambda p: encode(p.quantize(256), "PNG"), 8),
    "PNG, black and white": ("PNG", lambda p: encode(p.convert("1"), "PNG"), 110),
    "PNG, alpha": ("PNG", lambda p: encode(with_alpha(p), "PNG"), 3),
    "PNG, rotated": ("PNG", lambda p: rotated(p.transpose(Image.Transpose.ROTATE_180), "PNG", 3), 0),
    "WebP": ("WEBP", lambda p: encode(p, "WEBP", quality=90), 4),
    "WebP, lossless, alpha": ("WEBP", lambda p: encode(with_alpha(p), "WEBP", lossless=True), 3),
    "WebP, rotated": ("WEBP", lambda p: rotated(p.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "WEBP", 2, lossless=True), 0),
    "AVIF": ("AVIF", lambda p: encode(p, "AVIF", quality=90), 4),
    "GIF": ("GIF", lambda p: encode(p.quantize(256), "GIF"), 8),
    "GIF, animated": ("GIF", lambda p: encode(p.quantize(256), "GIF", save_all=True,
                                              append_images=[Image.new("P", p.size)]), 8),
    "BMP": ("BMP", lambda p: encode(p, "BMP"), 0),
    "BMP, palette": ("BMP", lambda p: encode(p.quantize(256), "BMP"), 8),
    "TIFF": ("TIFF", lambda p: encode(p, "TIFF"), 0),
    "TIFF, compressed": ("TIFF", lambda p: encode(p, "TIFF", compression="tiff_lzw"), 0),
    "TIFF, CMYK": ("TIFF", lambda p: encode(p.convert("CMYK"), "TIFF"), 1),
    "TIFF, grey of 16 bits": ("TIFF", lambda p: encode(grey16(p), "TIFF"), 0),
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
    assert row["sha256"] == common.sha256(data)
    assert row["thumb"].shape == (64,) and row["thumb"].dtype == np.uint8 and facts.dtype == FACTS


def test_a_turned_file_has_the_sides_of_its_header_and_the_picture_of_its_viewer(photo):
    upright = describe_image(jpeg(photo))[1]
    turned = describe_image(rotated(photo.transpose(Image.Transpose.ROTATE_90), "JPEG", 6, quality=90))[1]
    assert (turned["facts"]["width"], turned["facts"]["height"]) == photo.size[::-1]
    assert near_pairs(np.stack([upright["thumb"], turned["thumb"]])).tolist() == [[0, 1]]


def test_the_name_says_nothing_about_the_format(photo, tmp_path):
    for name, kind in (("real/a.png", "JPEG"), ("real/b.jpg", "PNG"), ("fake/c", "WEBP"), ("fake/d.jpeg", "TIFF")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(photo, kind))
    columns = audit.describe_folder(tmp_path)
    assert list(columns["facts"]["format"]) == ["WEBP", "TIFF", "JPEG", "PNG"]  # in the order of the paths


def test_quantisation_tells_how_coarsely_a_jpeg_was_saved(photo):
    facts = [describe_image(jpeg(photo, quality))[1]["facts"] for quality in (95, 75, 40, 40)]
    assert facts[0]["quant_mean"] < facts[1]["quant_mean"] < facts[2]["quant_mean"]
    assert facts[2]["quant_hash"] == facts[3]["quant_hash"] != facts[1]["quant_hash"]


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (15, 400), (7, 9)])
def test_small_pictures_have_facts_too(size):
    rgb, row = describe_image(encode(Image.new("RGB", size, "teal"), "PNG"))
    assert rgb.size == size and row["facts"]["blockiness"] == 1 and (row["thumb"] == row["thumb"][0]).all()


# Set, it names a folder of files as people have them; each is read, or refused with one line.
if os.environ.get("FORMATS_DIR"):
    ODD_FILES = sorted(path for path in Path(os.environ["FORMATS_DIR"]).iterdir() if path.is_file())

    @pytest.mark.filterwarnings("ignore")  # Pillow warns of oddities in some; users are not shown that
    @pytest.mark.parametrize("path", ODD_FILES, ids=lambda path: path.name)
    def test_a_file_as_people_have_them_is_read_or_refused_with_one_line(path):
        try:
            rgb, row = describe_image(path.read_bytes())
            assert rgb.mode == "RGB" and row["facts"]["format"] in common.FORMATS
            assert np.isfinite(common.preprocess(rgb, 160)).all()
        except ImageError as error:
            assert str(error) and "\n" not in str(error)


# ---- blockiness ----

def test_a_coarse_jpeg_shows_blocks_and_a_photograph_that_never_was_one_does_not(pictures):
    for name in ("astronaut.png", "coffee.png", "chelsea.png"):
        found = [blockiness(common.decode_image(data)) for data in
                 (encode(pictures[name], "PNG"), *(jpeg(pictures[name], quality) for quality in (90, 50, 15)))]
        assert found[0] == pytest.approx(1, abs=0.04)
        assert found[0] - 0.02 < found[1] < found[2] < found[3] and found[3] > 1.25


def test_blocks_outlive_a_png(photo):
    image = common.decode_image(jpeg(photo, 30))
    assert describe_image(encode(image, "PNG"))[1]["facts"]["blockiness"] == pytest.approx(blockiness(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_blocks_of_a_turned_jpeg_are_seen_whatever_its_sides(photo, orientation):
    plain = describe_image(jpeg(photo, 30))[1]["facts"]
    turned = describe_image(rotated(photo, "JPEG", orientation, quality=30))[1]["facts"]
    assert turned["blockiness"] == pytest.approx(plain["blockiness"]) and plain["blockiness"] > 1.1


def test_the_middle_of_a_large_picture_is_looked_at_on_the_grid_of_its_blocks(pictures):
    image = pictures["astronaut.png"].resize((1501, 1403), Image.Resampling.LANCZOS)
    assert blockiness(common.decode_image(jpeg(image, 20))) > 1.3 > 1.1 > blockiness(image)
