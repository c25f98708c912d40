"""Bytes -> RGB -> CLIP's input, equal to CLIP's own to the last bit.

The reference is CLIP's own transform (torchvision on PIL images). It reads the file itself where
the file is RGB or grey. Otherwise it reads our RGB, because CLIP drops alpha and clips 16 bits.
"""

import io

import numpy as np
import pytest
from clip.clip import _transform
from PIL import Image, ImageCms
from written import encode, rotated, sixteen_bits

from detector.images import decoding, preprocessing

RESOLUTIONS = (224, 160, 336)
# Sides of one pixel, longest shapes, sides near the resolution (crop offsets of .5 round to even),
# common photographs
SIZES = [
    tuple(map(int, size.split("x")))
    for size in (
        "1x1 1x7 7x1 2x3 1x200 200x1 3x200 200x3 159x160 161x160 160x163 223x223 224x224 225x225 "
        "223x225 225x224 224x225 224x226 227x224 224x227 335x337 337x336 336x339 640x427 427x640 "
        "1000x667 667x1000 999x1000 50x49"
    ).split()
]


def noise(size, mode="RGB", seed=0):
    """A PIL image of random pixels: every rounding counts."""
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), np.uint8), mode
    )


def differing_values(data, resolution, rgb_by_us=False):
    """Number of input values that differ between our transform and CLIP's, for an image file."""
    image = decoding.decode_image(data)
    ours = preprocessing.preprocess(image, preprocessing.clip_transform(resolution))
    source = image if rgb_by_us else Image.open(io.BytesIO(data))
    theirs = _transform(resolution)(source).numpy()
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape == (3, resolution, resolution)
    return int((ours != theirs).sum())


# ---- CLIP's transform, bit for bit ----


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_every_size_gives_clips_own_pixels(size, resolution):
    assert differing_values(encode(noise(size), "PNG"), resolution) == 0


def test_a_hundred_random_sizes_give_clips_own_pixels():
    rng = np.random.default_rng(1)
    for _ in range(100):
        size, resolution = tuple(rng.integers(1, 500, 2)), int(rng.choice(RESOLUTIONS))
        if max(size) <= decoding.MAX_ASPECT * min(size):
            data = encode(noise(size), "PNG", compress_level=0)
            assert differing_values(data, resolution) == 0, (size, resolution)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_photographs_give_clips_own_pixels(photos, resolution):
    for path in photos.values():
        assert differing_values(path.read_bytes(), resolution) == 0, path


@pytest.mark.parametrize(
    "kind, options",
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("AVIF", {}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_rgb_and_grey_files_of_every_format_give_clips_own_pixels(mode, kind, options):
    assert differing_values(encode(noise((301, 240), mode), kind, **options), 224) == 0


OTHER_MODES = {
    "palette": lambda: encode(noise((301, 240)).quantize(200), "PNG"),
    "palette, transparent colour": lambda: encode(
        noise((301, 240)).quantize(200), "PNG", transparency=7
    ),
    "palette with alphas": lambda: encode(
        noise((301, 240)).quantize(200), "PNG", transparency=bytes(range(200))
    ),
    "RGBA": lambda: encode(noise((301, 240), "RGBA"), "PNG"),
    "grey and alpha": lambda: encode(noise((301, 240), "LA"), "PNG"),
    "one bit": lambda: encode(noise((301, 240), "L").convert("1"), "PNG"),
    "CMYK": lambda: encode(noise((301, 240), "CMYK"), "TIFF"),
    "CMYK JPEG": lambda: encode(noise((301, 240), "CMYK"), "JPEG"),
    "16 bit": lambda: encode(sixteen_bits(noise((301, 240), "L")), "PNG"),
    "GIF": lambda: encode(noise((301, 240)).quantize(200), "GIF"),
}


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("mode", OTHER_MODES)
def test_other_modes_give_clips_pixels_of_our_rgb(mode, resolution):
    assert differing_values(OTHER_MODES[mode](), resolution, rgb_by_us=True) == 0


right = preprocessing.preprocess  # the faults below wrap it


def bilinear(image, transform):
    size = [int(side * transform.resolution / min(image.size)) for side in image.size]
    return right(image.resize(size, Image.Resampling.BILINEAR), transform)


FAULTS = {
    "swapped channels": lambda image, n: right(Image.merge("RGB", image.split()[::-1]), n),
    "no normalisation": (
        lambda image, n: (
            preprocessing.colours(right(image, n), n).transpose(2, 0, 1).astype(np.float32)
        )
    ),
    "a bilinear filter": bilinear,
    "a crop one pixel beside": lambda image, n: np.roll(right(image, n), 1, axis=2),
    "no crop": lambda image, n: right(image, n._replace(crop_mode="squash")),
    "one value one bit off": lambda image, n: np.nextafter(
        right(image, n), np.float32(9), where=np.eye(224)[0] > 0, out=right(image, n)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_detects_a_planted_fault(fault, monkeypatch, photos):
    monkeypatch.setattr(preprocessing, "preprocess", FAULTS[fault])
    assert differing_values(photos["rocket.jpg"].read_bytes(), 224) > 0


def test_the_pixels_are_contiguous_in_memory_as_the_runtimes_require():
    assert right(noise((30, 20)), preprocessing.clip_transform(224)).flags["C_CONTIGUOUS"]


# ---- decoded RGB ----


def rgb(data):
    image = decoding.decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_to_the_nearest_level(kind):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = rgb(encode(Image.fromarray(ramp), kind))
    # the nearest of 256 levels; 0 is black, 65535 white
    assert (pixels == np.floor(ramp / 257 + 0.5)[..., None]).all()


def test_icc_profiles_are_ignored_as_clip_does():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert (
        rgb(encode(noise((9, 9)), "PNG", icc_profile=profile)) == rgb(encode(noise((9, 9)), "PNG"))
    ).all()


# EXIF orientation -> the visual sides of the stored row 0 and the stored column 0
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored_turned(image, orientation):
    """The picture as a turned camera stores it."""
    row, column = SIDES[orientation]
    pixels = np.asarray(image)
    pixels = pixels.swapaxes(0, 1) if row in ("left", "right") else pixels
    pixels = pixels[::-1] if row in ("bottom", "right") else pixels
    pixels = pixels[:, ::-1] if column in ("bottom", "right") else pixels
    return Image.fromarray(np.ascontiguousarray(pixels))


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize(
    "kind, options, tolerance",
    [
        ("PNG", {}, 0),
        ("TIFF", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95}, 6),
        ("AVIF", {"quality": 95}, 6),
    ],
)
def test_pictures_stand_upright_whatever_their_exif_orientation(
    photos, kind, options, tolerance, orientation
):
    upright = Image.open(photos["coffee.png"]).convert("RGB").crop((100, 50, 260, 162))
    pixels = rgb(rotated(stored_turned(upright, orientation), kind, orientation, **options))
    assert pixels.shape == (112, 160, 3)
    assert np.abs(pixels - np.asarray(upright)).mean() <= tolerance


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"],
    ids=["text", "no directory", "nothing"],
)
def test_unreadable_exif_counts_as_none(kind, exif, as_users_have_it):
    picture = noise((16, 24))
    assert (rgb(encode(picture, kind, exif=exif)) == rgb(encode(picture, kind))).all()


def test_an_orientation_beyond_the_standard_counts_as_none():
    assert (rgb(rotated(noise((5, 7)), "PNG", 9)) == np.asarray(noise((5, 7)))).all()


@pytest.mark.parametrize(
    "kind, options",
    [
        ("GIF", {}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("MPO", {"quality": 95}),
    ],
)
def test_the_first_frame_stands_for_an_animation(kind, options):
    frames = [Image.new("RGB", (32, 16), colour) for colour in ("red", "blue", "lime")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.abs(rgb(data) - (255, 0, 0)).max() <= 2
