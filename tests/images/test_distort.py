"""Degradations: RGB in, RGB out, the same each time, with the effect that the name states."""

import itertools

import numpy as np
import pytest
from PIL import Image

from detector.images import distort
from detector.images.distort import ARMS, CONDITIONS, degrade, view_rng

SIZES = [(640, 427), (427, 640), (101, 33), (7, 9), (1, 1), (1, 50)]
SIZES += [(3000, 10), (10, 3000), (3000, 1)]
CHANGES = {
    **{f"{panel}, {level}": change for panel, level, change in CONDITIONS},
    **{
        f"{name}, {side}": change
        for name, *both in ARMS
        for side, change in zip(("reals", "fakes"), both, strict=True)
    },
    "degraded copy": lambda image: degrade(image, view_rng("ab" * 32, 1)),
}
EVERY = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def condition(panel, level):
    return next(change for *name, change in CONDITIONS if name == [panel, level])


def noise_of(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def same(a, b):
    return a.size == b.size and np.array_equal(np.asarray(a), np.asarray(b))


def difference(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()


@EVERY
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_change_gives_the_same_rgb_each_time_and_leaves_its_input_unchanged(change, size):
    image = noise_of(size)
    first = change(image)
    assert first.mode == "RGB" and min(first.size) >= 1
    assert same(first, change(noise_of(size))) and same(image, noise_of(size))


@EVERY
def test_a_photograph_stays_recognisable(pictures, change):
    image = pictures["coffee.png"]
    after = change(image)
    if after.size == (224, 224):
        image = distort.square(image)
    greys = [i.convert("L").resize((16, 16), Image.Resampling.BOX) for i in (image, after)]
    correlation = np.corrcoef(*(np.asarray(grey, float).ravel() for grey in greys))[0, 1]
    assert correlation > 0.6  # 0.7 for a crop, above 0.95 for all others


# ---- single changes ----


def test_every_condition_has_its_own_name_and_effect(pictures):
    names = [(panel, level) for panel, level, _ in CONDITIONS]
    image = pictures["coffee.png"].resize((1200, 800))  # larger than any site shows
    results = [change(image).tobytes() for *_, change in CONDITIONS]
    assert len(set(names)) == len(names) == len(set(results) - {image.tobytes()})


@pytest.mark.parametrize(
    "panel, milder_first",
    [
        ("JPEG", [f"quality {q}" for q in (95, 80, 60, 40, 30)]),
        ("WebP", [f"quality {q}" for q in (95, 80, 60, 40, 30)]),
        ("resize and back", ["to 0.75", "to 0.5", "to 0.25"]),
        ("blur", ["sigma 0.5 px", "sigma 1 px", "sigma 2 px"]),
        ("noise", ["sigma 2", "sigma 5", "sigma 10"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_harder_level_changes_a_photograph_more(pictures, panel, milder_first):
    image = pictures["coffee.png"]
    changed = [difference(condition(panel, level)(image), image) for level in milder_first]
    assert changed == sorted(changed) and 0 < changed[0] < 0.8 * changed[-1]


@pytest.mark.parametrize("sigma", [2, 5, 10])
def test_noise_has_the_deviation_in_its_name(sigma):
    grey = Image.new("RGB", (300, 300), (128, 128, 128))
    added = np.asarray(condition("noise", f"sigma {sigma}")(grey), float) - 128
    # rounding adds a variance of 1/12
    assert added.std() == pytest.approx(np.sqrt(sigma**2 + 1 / 12), rel=0.02)
    assert abs(added.mean()) < 0.1
    assert abs(np.corrcoef(added[..., 0].ravel(), added[..., 1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(
    "size, expected",
    [((100, 50), (80, 40)), ((101, 33), (81, 26)), ((1, 1), (1, 1)), ((3000, 10), (2400, 8))],
)
def test_a_crop_to_80_percent_keeps_the_middle_of_both_sides(size, expected):
    image = noise_of(size)
    after = condition("crop", "to 80%")(image)
    assert after.size == expected
    left, top = round((size[0] - expected[0]) / 2), round((size[1] - expected[1]) / 2)
    assert same(after, image.crop((left, top, left + expected[0], top + expected[1])))


@pytest.mark.parametrize(
    "level, side",
    [
        ("1080 px q75", 1080),
        ("768 px q60", 768),
        ("512 px q40", 512),
        ("both, one after the other", 512),
    ],
)
@pytest.mark.parametrize(
    "size", [(1600, 1200), (1200, 1600), (1080, 720), (768, 5), (500, 400), (8, 8)], ids=str
)
def test_a_site_shrinks_large_uploads_in_proportion_and_never_enlarges(level, side, size):
    after = condition("social media", level)(noise_of(size))
    scale = min(1, side / max(size))
    assert after.size == pytest.approx([max(1, round(s * scale)) for s in size], abs=1)
    assert max(after.size) == min(max(size), side)


@pytest.mark.parametrize("scale", [0.75, 0.5, 0.25])
def test_resizing_scales_both_sides_and_back_gives_the_old_size(scale):
    smaller = condition("resize", f"to {scale:g}")(noise_of((400, 200)))
    assert smaller.size == (400 * scale, 200 * scale)
    assert condition("resize and back", f"to {scale:g}")(noise_of((401, 203))).size == (401, 203)


def jpeg_quality(image):
    """Quality of the JPEG that an image was: saving again with it changes the least."""
    return min(range(85, 101), key=lambda quality: difference(distort.jpeg(image, quality), image))


def test_the_arms_make_files_alike_step_by_step(pictures):
    image, arms = pictures["coffee.png"], {name: both for name, *both in ARMS}
    as_jpeg = distort.jpeg(image, 96)
    assert not same(as_jpeg, image) and jpeg_quality(as_jpeg) == 96
    for name, *expected in (
        ("fakes as JPEG 96", image, as_jpeg),
        ("both as JPEG 96", as_jpeg, as_jpeg),
        ("both as PNG", image, image),
    ):
        assert all(map(same, [change(image) for change in arms[name]], expected)), name
    for change in arms["both one square, then JPEG 96"]:
        for photo in (image, pictures["rocket.jpg"], noise_of((3, 50))):
            assert change(photo).size == (224, 224)
        assert same(change(image), distort.jpeg(distort.square(image), 96))


# ---- degraded copies ----


def test_a_copy_depends_only_on_the_hash_of_the_file_and_its_number():
    image, copies = noise_of((200, 150)), set()
    hashes = ["ab" * 32, "ab" * 31 + "cd", "ab" * 4 + "cd" * 28, "bb" * 32, "f" * 64, "0" * 64]
    for sha256, number in itertools.product(hashes, (1, 2, 3)):
        copy = degrade(image, view_rng(sha256, number))
        np.random.seed(number)  # the global generator has no influence
        assert same(copy, degrade(image, view_rng(sha256, number)))
        copies.add((copy.size, copy.tobytes()))
    # the first 64 bits count, and two of these hashes share them
    assert len(copies) == (len(hashes) - 1) * 3


def test_copies_vary_in_size_and_coarseness_and_none_is_the_image():
    image = noise_of((600, 450))
    copies = [degrade(image, view_rng(f"{i:064x}"[::-1], 1)) for i in range(60)]
    assert not any(same(copy, image) for copy in copies)
    assert len({copy.size for copy in copies}) > 20
    scales = np.array([copy.size for copy in copies]) / image.size
    # a chain keeps at least 0.4 (resized) x 0.75 (cropped) x 400 / 600 (shared) of the sides
    assert scales.max() <= 1 and scales.min() > 0.4 * 0.75 * 0.66


def test_each_copy_is_saved_at_the_end_by_either_format_and_any_quality(monkeypatch):
    saved, last, image = [], [], noise_of((40, 30))

    def spy_on(name):
        save = getattr(distort, name)

        def spy(image, quality):
            saved.append((name, int(quality)))
            return save(image, quality)

        monkeypatch.setattr(distort, name, spy)

    spy_on("jpeg")
    spy_on("webp")
    for i in range(300):
        degrade(image, view_rng(f"{i:064x}"[::-1], 1))
        last.append(saved[-1])
    qualities = [quality for _, quality in last]
    assert (min(qualities), max(qualities)) == (30, 95)
    assert 0.15 < np.mean([name == "webp" for name, _ in last]) < 0.35
