"""benchmarks/occlusion.py: its pictures are what it says, and it counts what the maps point to."""

import re
import shlex

import numpy as np
import pytest
from made_up import BASELINE
from PIL import Image

from benchmarks import occlusion
from detector.base.errors import UsageError
from detector.images.folders import Entry
from detector.images.occlusion import CELLS
from detector.verdict import Detector


def entries(number=12, sources=3):
    """`number` of each label in each split, of as many sources each."""
    return [
        Entry(f"{split}/{label}/{i}.jpg", label, split, f"{label}s{i % sources}")
        for split in occlusion.SPLITS
        for label in (0, 1)
        for i in range(number)
    ]


def test_the_command_of_the_docstring_parses():
    (flags,) = re.findall(r"python -m benchmarks.occlusion(.*)", occlusion.__doc__)
    assert occlusion.parse_args(shlex.split(flags)).number == 100


def test_no_image_is_used_twice_and_both_halves_have_their_labels_and_two_sources():
    pasted, control = occlusion.draw(entries(), 8)
    assert len(pasted) == len(control) == 8
    assert {(pair.own.label, pair.other.label) for pair in pasted} == {(1, 0)}
    assert {(pair.own.label, pair.other.label) for pair in control} == {(0, 0)}
    used = [entry.path for pair in pasted + control for entry in pair[:2]]
    assert len(set(used)) == len(used) == 32
    assert all(pair.own.source != pair.other.source for pair in pasted + control)
    assert occlusion.draw(entries(), 8) == (pasted, control)


def test_too_few_images_are_a_one_line_error():
    with pytest.raises(UsageError, match="too few images in test and external for 9 pairs"):
        occlusion.draw(entries(number=4), 9)


@pytest.mark.parametrize(
    "place, own, other",
    [
        ("left", (80, 160), (240, 160)),
        ("right", (240, 160), (80, 160)),
        ("top", (160, 80), (160, 240)),
        ("bottom", (160, 240), (160, 80)),
    ],
)
def test_a_pasted_picture_has_the_own_half_in_its_place(place, own, other):
    red, blue = (Image.new("RGB", (200, 100), colour) for colour in ("red", "blue"))
    picture = occlusion.paste(red, blue, place)
    assert picture.size == (320, 320)
    assert np.abs(np.subtract(picture.getpixel(own), (255, 0, 0))).max() < 5
    assert np.abs(np.subtract(picture.getpixel(other), (0, 0, 255))).max() < 5
    assert np.asarray(picture)[..., 0].mean() == pytest.approx(127, abs=3)  # half and half


@pytest.mark.parametrize("place", occlusion.PLACES)
def test_a_map_points_to_the_half_with_the_larger_mean(place):
    rows = np.zeros((CELLS, CELLS))
    middle = CELLS // 2
    y, x = {"left": (middle, 0), "right": (middle, -1), "top": (0, middle), "bottom": (-1, middle)}[
        place
    ]
    rows[y, x] = 1
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[place]
    assert occlusion.difference(rows, place) > 0 > occlusion.difference(rows, opposite)
    even = np.ones((CELLS, CELLS))
    assert occlusion.difference(even, place) == pytest.approx(0)


def test_the_page_counts_each_kind_of_picture(make_folder, tmp_path, monkeypatch, capsys):
    counts = {
        f"{split}/{label}/{label}{source}": 3
        for split in occlusion.SPLITS
        for label in ("real", "fake")
        for source in range(2)
    }
    make_folder(tmp_path / "data", counts)
    monkeypatch.setattr(occlusion, "SHIPPED_MODEL", BASELINE)
    flags = ["--number", "3", "--output", str(tmp_path / "page.md")]
    occlusion.main(["--data_dir", str(tmp_path / "data"), *flags])
    page = (tmp_path / "page.md").read_text()
    assert page.strip() in capsys.readouterr().out
    shares = dict(re.findall(r"^\| (.*?) \| \d of (\d) \|", page, re.MULTILINE))
    assert shares["points to the generated half"] == "3"
    assert shares["control: points to the drawn half"] == "3"
    assert Detector(BASELINE).encoder.name in page
