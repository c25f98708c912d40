"""Bytes -> RGB -> CLIP's input: the pixels are CLIP's own to the last bit, and RGB means the same for every mode.

CLIP's own transform (torchvision on PIL images) is the reference: on the file itself where it is RGB or grey, on our
RGB where CLIP has no opinion worth having (it drops alpha and clips 16 bit to white). What is refused is in
test_decoding.py.
"""

import io
import struct
import warnings

import numpy as np
import pytest
from clip.clip import _transform
from PIL import Image

from detector.base.errors import UnsupportedImage
from detector.images import decoding, preprocessing

RESOLUTIONS = (224, 160, 336)
# Sides of one pixel, longest shapes, sides about the resolution (crop offsets of .5 round to even), common photographs
SIZES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (2, 3),
    (1, 200),
    (200, 1),
    (3, 200),
    (200, 3),
    (159, 160),
    (161, 160),
    (160, 163),
    (223, 223),
    (224, 224),
    (225, 225),
    (223, 225),
    (225, 224),
    (224, 225),
    (224, 226),
    (227, 224),
    (224, 227),
    (335, 337),
    (337, 336),
    (336, 339),
    (640, 427),
    (427, 640),
    (1000, 667),
    (667, 1000),
    (999, 1000),
    (50, 49),
]


def noise(size, mode="RGB", seed=0):
    """A PIL image of random pixels: every rounding counts."""
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), np.uint8), mode
    )


def saved(image, kind="PNG", **options):
    """The bytes of `image` as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def differing_values(data, resolution, rgb_by_us=False):
    """How many of the input's values differ between ours and CLIP's transform, for an image file."""
    ours = preprocessing.preprocess(decoding.decode_image(data), resolution)
    theirs = _transform(resolution)(
        decoding.decode_image(data) if rgb_by_us else Image.open(io.BytesIO(data))
    ).numpy()
    assert ours.dtype == theirs.dtype == np.float32 and ours.shape == theirs.shape == (
        3,
        resolution,
        resolution,
    )
    return int((ours != theirs).sum())


# ---- CLIP's transform, bit for bit ----


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_every_size_gives_clips_own_pixels(size, resolution):
    assert differing_values(saved(noise(size)), resolution) == 0


def test_a_hundred_random_sizes_give_clips_own_pixels():
    rng = np.random.default_rng(1)
    for _ in range(100):
        size, resolution = tuple(rng.integers(1, 500, 2)), int(rng.choice(RESOLUTIONS))
        if max(size) <= decoding.MAX_ASPECT * min(size):
            assert differing_values(saved(noise(size), compress_level=0), resolution) == 0, (
                size,
                resolution,
            )


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
    assert differing_values(saved(noise((301, 240), mode), kind, **options), 224) == 0


def sixteen_bit(size):
    grey = np.random.default_rng(2).integers(0, 65536, (size[1], size[0])).astype(np.uint16)
    return Image.fromarray(grey)


OTHER_MODES = {
    "palette": lambda: saved(noise((301, 240)).quantize(200)),
    "palette, transparent colour": lambda: saved(noise((301, 240)).quantize(200), transparency=7),
    "palette with alphas": lambda: saved(
        noise((301, 240)).quantize(200), transparency=bytes(range(200))
    ),
    "RGBA": lambda: saved(noise((301, 240), "RGBA")),
    "grey and alpha": lambda: saved(noise((301, 240), "LA")),
    "one bit": lambda: saved(noise((301, 240), "L").convert("1")),
    "CMYK": lambda: saved(noise((301, 240), "CMYK"), "TIFF"),
    "CMYK JPEG": lambda: saved(noise((301, 240), "CMYK"), "JPEG"),
    "16 bit": lambda: saved(sixteen_bit((301, 240))),
    "GIF": lambda: saved(noise((301, 240)).quantize(200), "GIF"),
}


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("mode", OTHER_MODES)
def test_other_modes_give_clips_pixels_of_our_rgb(mode, resolution):
    assert differing_values(OTHER_MODES[mode](), resolution, rgb_by_us=True) == 0


right = preprocessing.preprocess  # the faults below wrap it


def bilinear(image, resolution):
    scale = resolution / min(image.size)
    return right(
        image.resize([int(side * scale) for side in image.size], Image.Resampling.BILINEAR),
        resolution,
    )


FAULTS = {
    "swapped channels": lambda image, n: right(Image.merge("RGB", image.split()[::-1]), n),
    "no normalisation": (
        lambda image, n: (
            right(image, n) * preprocessing.STD[:, None, None] + preprocessing.MEAN[:, None, None]
        )
    ),
    "a bilinear filter": bilinear,
    "a crop one pixel beside": lambda image, n: np.roll(right(image, n), 1, axis=2),
    "no crop": lambda image, n: right(image.resize((n, n), Image.Resampling.BICUBIC), n),
    "one value one bit off": lambda image, n: np.nextafter(
        right(image, n), np.float32(9), where=np.eye(n)[0] > 0, out=right(image, n)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_planted_fault(fault, monkeypatch, photos):
    monkeypatch.setattr(preprocessing, "preprocess", FAULTS[fault])
    assert differing_values(photos["rocket.jpg"].read_bytes(), 224) > 0


def test_the_pixels_are_one_block_of_memory_as_the_runtimes_want_them():
    assert right(noise((30, 20)), 224).flags["C_CONTIGUOUS"]


# ---- what RGB means ----


def rgb(data):
    image = decoding.decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_alpha_is_laid_over_white():
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (255, 0, 40, alpha))
    # 40 at half alpha: 40 * 128/255 + 255 * 127/255 = 147.08
    assert rgb(saved(image))[0].tolist() == [[255, 255, 255], [255, 127, 147], [255, 0, 40]]


def one_colour():
    """A palette picture of colour 5 alone."""
    image = Image.new("P", (4, 4), 5)
    image.putpalette(range(3 * 8))
    return image


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.new("LA", (4, 4), (0, 0))),
        saved(Image.new("L", (4, 4), 9), transparency=9),
        saved(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
        saved(one_colour(), transparency=5),
        saved(one_colour(), transparency=bytes(8)),
        saved(Image.new("1", (4, 4), 0), transparency=0),
        saved(Image.new("RGBA", (4, 4)), "WEBP", lossless=True),
        saved(one_colour(), "GIF", transparency=5),
        saved(Image.new("RGBA", (4, 4)), "TIFF"),
    ],
    ids=[
        "LA",
        "grey key",
        "RGB key",
        "palette key",
        "palette alphas",
        "one bit key",
        "WebP",
        "GIF",
        "TIFF",
    ],
)
def test_a_wholly_transparent_picture_is_refused_in_every_mode_that_knows_transparency(data):
    with pytest.raises(UnsupportedImage, match="wholly transparent"):
        decoding.decode_image(data)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = rgb(saved(Image.fromarray(ramp), kind))
    assert (
        pixels == np.floor(ramp / 257 + 0.5)[..., None]
    ).all()  # the nearest of 256 levels; 0 is black, 65535 white


def test_sixteen_bit_grey_in_either_byte_order_is_the_same():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    tags = [
        (256, 16),
        (257, 16),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 122),
        (277, 1),
        (278, 16),
        (279, 512),
    ]
    for order, magic in (("<", b"II*\0"), (">", b"MM\0*")):
        directory = (
            struct.pack(order + "IH", 8, len(tags))
            + b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
            + bytes(4)
        )
        data = magic + directory + ramp.astype(order + "u2").tobytes()
        assert (rgb(data)[..., 0] == np.arange(256).reshape(16, 16)).all(), order


def test_palette_and_one_bit_become_their_colours():
    picture = noise((20, 10)).quantize(64)
    assert (rgb(saved(picture)) == np.asarray(picture.convert("RGB"))).all()
    assert set(np.unique(rgb(saved(noise((20, 10), "L").convert("1"))))) == {0, 255}


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_no_ink_in_cmyk_is_white_and_full_ink_is_black(kind):
    assert (rgb(saved(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), kind)) == 255).all()
    assert (rgb(saved(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), kind)) == 0).all()


def test_icc_profiles_are_ignored_as_clip_does():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert (rgb(saved(noise((9, 9)), icc_profile=profile)) == rgb(saved(noise((9, 9))))).all()


# What the standard says of each orientation: which visual side the stored row 0 is, and which the stored column 0
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
    """The picture as a camera held in another way stores it."""
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
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = rgb(saved(stored_turned(upright, orientation), kind, exif=exif, **options))
    assert pixels.shape == (112, 160, 3)
    assert np.abs(pixels - np.asarray(upright)).mean() <= tolerance


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"],
    ids=["text", "no directory", "nothing"],
)
def test_unreadable_exif_counts_as_none(kind, exif):
    picture = noise((16, 24))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow says so, as it should; only in tests are warnings errors
        assert (rgb(saved(picture, kind, exif=exif)) == rgb(saved(picture, kind))).all()


def test_an_orientation_beyond_the_standard_counts_as_none():
    exif = Image.Exif()
    exif[0x0112] = 9
    assert (rgb(saved(noise((5, 7)), exif=exif)) == np.asarray(noise((5, 7)))).all()


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
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.abs(rgb(data) - (255, 0, 0)).max() <= 2
