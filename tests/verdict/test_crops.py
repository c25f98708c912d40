"""--crops: full-resolution crops beside the resized image, from extraction to the service."""

import json
import signal

import numpy as np
import pytest
import small
from commands import assert_one_line_error
from live import metric, wait_for
from PIL import Image

from detector.base import errors
from detector.base.constants import CLASSES
from detector.features.file import FeaturesFile, load_features, take_crops
from detector.images import decoding, preprocessing
from detector.model import file, score
from detector.training.classifiers import fit
from detector.verdict import Detector

CROPS = 3
TRANSFORM = preprocessing.clip_transform(160)


# ---- crops ----


def marked(width, height):
    """A picture whose pixels hold their own positions."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x % 256, y % 256, x // 256 * 16 + y // 256], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def positions(crops):
    """Left and top of each crop of a marked picture, int64 [n] each."""
    corners = crops[:, 0, 0].astype(int)
    return corners[:, 0] + 256 * (corners[:, 2] // 16), corners[:, 1] + 256 * (corners[:, 2] % 16)


@pytest.mark.parametrize("size", [(160, 160), (900, 400), (161, 3000)])
def test_crops_are_pixels_of_the_image_and_the_first_is_its_middle(size):
    image = marked(*size)
    crops = preprocessing.native_crops(image, TRANSFORM, 8)
    assert crops.shape == (8, 160, 160, 3) and crops.dtype == np.uint8
    left, top = positions(crops)
    assert (left[0], top[0]) == tuple(round((side - 160) / 2) for side in size)
    for crop, x, y in zip(crops, left.tolist(), top.tolist(), strict=True):
        assert (crop == np.asarray(image.crop((x, y, x + 160, y + 160)))).all()


def test_crops_spread_over_the_picture_and_fewer_are_the_first_of_more():
    image = marked(2000, 2000)
    crops = preprocessing.native_crops(image, TRANSFORM, 16)
    left, top = positions(crops)
    assert len(set(zip(left // 500, top // 500, strict=True))) >= 10  # of 16 parts of the picture
    assert (preprocessing.native_crops(image, TRANSFORM, 5) == crops[:5]).all()


def test_a_small_picture_is_enlarged_to_the_crop(photos):
    small = Image.open(photos["china.jpg"]).convert("RGB").resize((40, 30))
    crops = preprocessing.native_crops(small, TRANSFORM, 2)
    enlarged = small.resize((213, 160), Image.Resampling.BICUBIC).crop((26, 0, 186, 160))
    assert crops.shape == (2, 160, 160, 3) and (crops[0] == np.asarray(enlarged)).all()


def test_without_crops_the_only_piece_is_the_whole(photos):
    image = Image.open(photos["coffee.png"]).convert("RGB")
    pieces = preprocessing.normalise(preprocessing.in_pieces(image, TRANSFORM), TRANSFORM)
    assert (pieces == preprocessing.preprocess(image, TRANSFORM)[None]).all()


# ---- from files to verdicts ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_folder):
    """A folder with data/, features.npz (with crops and a copy of each image) and model.joblib."""
    import extract_features
    import train_model

    place = tmp_path_factory.mktemp("crops")
    counts = {f"{split}/{label}": 25 for split in ("train", "test") for label in CLASSES}
    make_folder(place / "data", counts)
    data, features, model = (str(place / name) for name in ("data", "features.npz", "model.joblib"))
    flags = ["--clip_model", str(small.CHECKPOINT), "--crops", str(CROPS), "--views", "1"]
    extract_features.main(["--data_dir", data, "--output_file", features, *flags])
    flags = ["--crops", str(CROPS), "--classifier", "linear-svm"]
    train_model.main(["--features_file", features, "--model_output_path", model, *flags])
    return place


@pytest.fixture(scope="module")
def detector(trained):
    return Detector(trained / "model.joblib")


def test_a_row_holds_the_features_of_each_piece(trained, detector):
    columns, encoder = load_features(trained / "features.npz"), detector.encoder
    assert columns["features"].shape == (200, (1 + CROPS) * encoder.dim)
    # the two largest images, because the pieces of a small picture are all alike
    largest = np.argsort(np.where(columns["view"] == 0, columns["facts"]["width"], 0))[-2:]
    for row in largest:
        image = decoding.decode_image((trained / "data" / columns["paths"][row]).read_bytes())
        expected = encoder.encode(detector.pixels(image))
        stored = columns["features"][row].reshape(1 + CROPS, -1)
        np.testing.assert_allclose(stored, expected, atol=1e-4)
        assert len(np.unique(expected.round(3), axis=0)) == 1 + CROPS


def test_fewer_crops_of_a_file_are_its_first_and_no_crops_are_the_whole(trained):
    stored = load_features(trained / "features.npz")["features"].reshape(200, 1 + CROPS, -1)
    for crops, expected in ((0, stored[:, 0]), (1, stored[:, :2]), (CROPS, stored)):
        (part,) = FeaturesFile(trained / "features.npz", crops).parts()
        assert (part["features"] == expected).all() and part["features"].shape == expected.shape


@pytest.mark.parametrize(
    "stored, wanted, shape", [(0, 0, (0, 8)), (3, 0, (0, 8)), (3, 2, (0, 3, 8))]
)
def test_a_part_of_broken_images_has_the_shape_of_the_others(stored, wanted, shape):
    features = np.empty((0, (1 + stored) * 8), np.float32)
    assert take_crops(features, stored, wanted).shape == shape


def test_a_score_is_the_mean_over_the_pieces(detector, trained):
    features = load_features(trained / "features.npz")["features"].reshape(200, 1 + CROPS, -1)
    each = [score.decision(detector.model, features[:, i]) for i in range(1 + CROPS)]
    np.testing.assert_allclose(
        score.decision(detector.model, features), np.mean(each, axis=0), atol=1e-9
    )
    assert detector.model["crops"] == CROPS and np.std(each, axis=0).max() > 0


def test_classify_and_the_features_file_agree(script, trained, detector):
    columns = load_features(trained / "features.npz")
    rows = np.flatnonzero((columns["splits"] == "test") & (columns["view"] == 0))[:4]
    pieces = columns["features"][rows].reshape(len(rows), 1 + CROPS, -1)
    expected = score.p_fake_of(detector.model, pieces)
    paths = [trained / "data" / columns["paths"][row] for row in rows]
    flags = ["--model_path", trained / "model.joblib", "--json", "--details"]
    done = script("classify.py", "--image_path", *paths, *flags)
    assert done.returncode == 0, done.stderr
    p_fake = [json.loads(line)["p_fake"] for line in done.stdout.splitlines()]
    np.testing.assert_allclose(p_fake, expected, atol=2e-3)


@pytest.mark.long
def test_evaluating_the_folder_and_its_features_file_agree(script, trained):
    aucs, flags = [], ["--model_path", trained / "model.joblib", "--report_dir", trained / "report"]
    for given in (["--data_dir", trained / "data"], ["--features_file", trained / "features.npz"]):
        done = script("evaluate.py", *given, *flags, "--robustness_images", "2")
        assert done.returncode in (0, 1), done.stderr
        metrics = json.loads((trained / "report" / "metrics.json").read_text())
        aucs.append(metrics["overall"]["auc"]["value"])
    assert aucs[0] == pytest.approx(aucs[1], abs=2e-3)


@pytest.mark.long
def test_the_service_reloads_from_a_model_without_crops_to_one_with(
    script, serve, trained, tmp_path
):
    """Both models share the encoder and its passes, but their images have 1 and 4 pieces."""
    plain = trained / "plain.joblib"
    flags = ["--model_output_path", plain, "--classifier", "linear-svm"]
    done = script("train_model.py", "--features_file", trained / "features.npz", *flags)
    assert done.returncode == 0, done.stderr
    server, picture = serve(), next((trained / "data/test").rglob("*.jpg"))
    for number, model in enumerate((plain, trained / "model.joblib"), 1):
        (tmp_path / "model.joblib").write_bytes(model.read_bytes())
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda n=number: metric(server, "detector_reloads_total") == n)
        classification, confidence = Detector(model).classify(picture.read_bytes())
        verdict = server.post(picture.read_bytes()).json()
        assert verdict["classification"] == classification
        assert verdict["confidence"] == pytest.approx(confidence, abs=2e-3)


def test_an_image_in_equal_pieces_weighs_as_much_as_a_whole_image():
    """C then means the same with crops."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 40)
    features = (rng.normal(size=(80, 6)) + labels[:, None]).astype(np.float32)
    whole, pieces = (
        fit("logistic", x, labels, np.ones(80), 0, C=0.01)
        for x in (features, features[:, None].repeat(4, 1))
    )
    np.testing.assert_allclose(pieces["coef"], whole["coef"], rtol=1e-3)


# ---- refusals ----


def test_more_crops_than_the_file_holds_are_refused_with_the_remedy(script, trained):
    flags = "--features_file", trained / "features.npz", "--crops", CROPS + 1
    words = "holds 3 crops of an image, 4 are needed: extract again with --crops 4"
    assert_one_line_error(script("train_model.py", *flags), words)


@pytest.mark.parametrize(
    "name, flag, place",
    [
        ("extract_features.py", "--data_dir", "data"),
        ("train_model.py", "--features_file", "features.npz"),
    ],
)
@pytest.mark.parametrize("number", ["-1", "33"])
def test_a_number_of_crops_out_of_range_is_one_line(script, trained, name, flag, place, number):
    result = script(name, flag, trained / place, f"--crops={number}")
    assert_one_line_error(result, f"--crops {number}: must be at least 0, at most 32")


@pytest.mark.parametrize("crops", [-1, 1.5, "3", 33, True])
def test_a_model_with_a_bad_number_of_crops_is_refused(detector, crops):
    with pytest.raises(errors.ModelError, match="crops"):
        file.check(detector.model | {"crops": crops})
