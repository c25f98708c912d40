"""classify.py --explain: a map of what moved a verdict, beside the picture."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from commands import assert_one_line_error
from made_up import BASELINE
from PIL import Image

import classify
from detector.images.occlusion import CELLS, MEANING, PASSES
from detector.images.preprocessing import clip_transform
from detector.model.file import load_model
from detector.verdict import Detector

SIDE = 8 * CELLS


def planted(y, x, **changes):
    """A detector whose log-odds of fake are twice the mean of one cell, and a bright picture."""
    cell = np.s_[:, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
    model = {
        "classifier": "logistic",
        "center": np.zeros(1, np.float32),
        "scale": np.ones(1, np.float32),
        "coef": np.ones(1),
        "intercept": 0.0,
        "calibrator": np.array([-2.0, 0.5]),
        "threshold": 0.5,
        "band": np.array([0.4, 0.6]),
        **changes,
    }
    encoder = SimpleNamespace(
        encode=lambda pixels: pixels[cell].mean((1, 2, 3), keepdims=True)[:, :, 0, 0],
        transform=clip_transform(SIDE),
    )
    pixels = np.zeros((3, SIDE, SIDE), np.float32)
    pixels[cell[1:]] = 1
    return Detector("planted", model=model, encoder=encoder), pixels


@pytest.mark.parametrize("y, x", [(0, 0), (3, 3), (5, 2), (6, 6)])
def test_a_model_that_looks_at_one_patch_lights_up_that_patch(y, x):
    detector, pixels = planted(y, x)
    rows = detector.explain(pixels)
    assert rows.shape == (CELLS, CELLS) and rows[y, x] == pytest.approx(rows.max())
    grey = 1 / CELLS**2
    assert rows[y, x] == pytest.approx(2 * (1 - grey))  # in log-odds, not in decision values
    away = np.maximum(*np.abs(np.mgrid[:CELLS, :CELLS] - [[[y]], [[x]]]))
    assert np.abs(rows[away >= 3]).max() == 0


def test_a_part_that_speaks_for_real_is_negative():
    detector, pixels = planted(3, 3, coef=-np.ones(1))
    rows = detector.explain(pixels)
    assert rows[3, 3] == pytest.approx(rows.min()) and rows.min() < -1 and rows.max() <= 0


def test_with_crops_the_map_is_that_of_the_whole_view():
    detector, pixels = planted(3, 3)
    with_crops, _ = planted(3, 3, crops=2)
    views = np.stack([pixels, pixels + 1, pixels - 1])
    assert (with_crops.explain(views) == detector.explain(pixels)).all()


# ---- the command ----


@pytest.fixture
def explain(script, tmp_path):
    """Function: classify.py --explain map.png on the small model."""

    def run(*paths, output="map.png", flags=()):
        flags = ("--model_path", BASELINE, "--explain", output, *flags)
        return script("classify.py", "--image_path", *paths, *flags)

    return run


def test_the_verdict_stays_and_the_map_lies_beside_the_picture(explain, script, photos, tmp_path):
    plain = script("classify.py", "--image_path", photos["china.jpg"], "--model_path", BASELINE)
    result = explain(photos["china.jpg"])
    assert result.returncode == 0 and result.stdout == plain.stdout, result.stderr
    line = rf"map.png: {PASSES} forward passes in \d+\.\d s. {re.escape(MEANING)}"
    assert re.search(f"^{line}$", result.stderr, re.MULTILINE), result.stderr
    with Image.open(tmp_path / "map.png") as image:
        assert image.format == "PNG" and image.width > 1.5 * image.height
    assert [path.name for path in tmp_path.glob("*.p*")] == ["map.png"]


def test_the_plot_has_the_picture_the_map_a_scale_and_the_sentence():
    from detector.evaluation.plots import plot_map
    from detector.images.preprocessing import normalise

    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    rows = np.linspace(-0.5, 1, CELLS**2).reshape(CELLS, CELLS)
    transform = clip_transform(64)
    figure = plot_map(normalise(picture, transform), transform, rows)
    left, right, scale = figure.axes
    assert np.abs(left.images[0].get_array() * 255 - picture).max() < 0.01
    assert (right.images[0].get_array() == rows).all() and right.images[0].get_clim() == (-1, 1)
    assert scale.get_ylabel() == "log-odds of fake"
    assert figure.get_supxlabel() == MEANING
    assert MEANING.endswith("It proves nothing about the picture.")


@pytest.mark.parametrize(
    "places, output, words",
    [
        (["a.jpg", "a.jpg"], "map.png", ["--explain map.png", "give --image_path one image"]),
        (["."], "map.png", ["--explain map.png", "give --image_path one image"]),
        (["a.jpg"], ".", ["--explain .", "it is a folder"]),
        (["a.jpg"], "a.jpg/map.png", ["--explain a.jpg/map.png", "name another place"]),
    ],
    ids=["several", "a folder", "no file", "no writable place"],
)
def test_where_no_map_can_be_drawn_one_line_says_why(
    explain, photos, tmp_path, places, output, words
):
    (tmp_path / "a.jpg").write_bytes(photos["china.jpg"].read_bytes())
    result = explain(*places, output=output)
    assert_one_line_error(result, *words)
    assert result.stdout == "" and not (tmp_path / "map.png").exists()


def test_an_unreadable_image_leaves_an_old_map_alone(explain, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    (tmp_path / "map.png").write_bytes(b"old")
    assert explain(tmp_path / "a.jpg").returncode == 1
    assert (tmp_path / "map.png").read_bytes() == b"old"


@pytest.mark.parametrize("pass_s, expected", [(10, f"about {10 * PASSES} s"), (0.1, None)])
def test_a_map_that_takes_over_a_minute_is_announced(tmp_path, capsys, pass_s, expected):
    detector, pixels = planted(3, 3)
    classify.explain(detector, pixels, tmp_path / "map.png", pass_s)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (2 if expected else 1)
    assert expected is None or expected in lines[0]


def test_the_map_of_the_small_model_is_no_accident_of_one_sign(photos):
    from detector.images.decoding import decode_image

    detector = Detector(BASELINE)
    pixels = detector.pixels(decode_image(photos["china.jpg"].read_bytes()))
    rows, reverse = detector.explain(pixels), load_model(BASELINE)
    assert np.abs(rows).max() > 0.01
    reverse["calibrator"] = -reverse["calibrator"]
    other = Detector(BASELINE, model=reverse, encoder=detector.encoder)
    assert other.explain(pixels) == pytest.approx(-rows)
