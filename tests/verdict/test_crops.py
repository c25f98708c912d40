"""--crops: squares of an image in its own resolution beside the resized whole, from extraction to the live service."""

import json
import signal

import numpy as np
import pytest
import small
from commands import assert_one_line_error
from live import metric, wait_for
from PIL import Image

from detector.base import errors
from detector.features.file import FeaturesFile, load_features, take_crops
from detector.images import decoding, preprocessing
from detector.model import file, score
from detector.training.classifiers import fit
from detector.verdict import Detector

CROPS = 3


# ---- squares ----


def marked(width, height):
    """A picture whose pixels say where they are."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(
        np.stack([x % 256, y % 256, x // 256 * 16 + y // 256], -1).astype(np.uint8)
    )


@pytest.mark.parametrize("size", [(160, 160), (900, 400), (161, 3000)])
def test_crops_are_the_images_own_pixels_the_first_from_its_middle(size):
    image = marked(*size)
    crops = preprocessing.native_crops(image, 160, 8)
    assert crops.shape == (8, 160, 160, 3) and crops.dtype == np.uint8
    x, y = (round((side - 160) / 2) for side in size)
    assert (crops[0] == np.asarray(image.crop((x, y, x + 160, y + 160)))).all()
    for crop in crops:  # each lies within the picture as it is
        x, y = (
            int(crop[0, 0, i]) + 256 * int(crop[0, 0, 2] // 16 if i == 0 else crop[0, 0, 2] % 16)
            for i in (0, 1)
        )
        assert (crop == np.asarray(image.crop((x, y, x + 160, y + 160)))).all()


def test_crops_spread_over_the_picture_and_fewer_are_the_first_of_more():
    image = marked(2000, 2000)
    crops = preprocessing.native_crops(image, 160, 16)
    x, y = (
        crops[:, 0, 0, 0] + 256 * (crops[:, 0, 0, 2].astype(int) // 16),
        crops[:, 0, 0, 1] + 256 * (crops[:, 0, 0, 2].astype(int) % 16),
    )
    corners = set(zip((x // 500).tolist(), (y // 500).tolist()))
    assert len(corners) >= 10  # of sixteen parts of the picture
    assert (preprocessing.native_crops(image, 160, 5) == crops[:5]).all()


def test_a_small_picture_is_enlarged_to_the_square(photos):
    small = Image.open(photos["china.jpg"]).convert("RGB").resize((40, 30))
    crops = preprocessing.native_crops(small, 160, 2)
    assert (
        crops.shape == (2, 160, 160, 3)
        and (
            crops[0]
            == np.asarray(
                small.resize((213, 160), Image.Resampling.BICUBIC).crop((26, 0, 186, 160))
            )
        ).all()
    )


def test_without_crops_a_piece_is_the_whole_alone(photos):
    image = Image.open(photos["coffee.png"]).convert("RGB")
    assert (
        preprocessing.normalise(preprocessing.in_pieces(image, 160))[0]
        == preprocessing.preprocess(image, 160)
    ).all()


# ---- from files to verdicts ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_folder):
    """A folder with data/, features.npz with crops and a degraded copy of each image, and model.joblib that looks at crops."""
    import extract_features
    import train_model

    place = tmp_path_factory.mktemp("crops")
    make_folder(
        place / "data",
        {f"{split}/{label}": 25 for split in ("train", "test") for label in ("real", "fake")},
    )
    extract_features.main(
        [
            "--data_dir",
            str(place / "data"),
            "--output_file",
            str(place / "features.npz"),
            "--clip_model",
            str(small.CHECKPOINT),
            "--crops",
            str(CROPS),
            "--views",
            "1",
        ]
    )
    train_model.main(
        [
            "--features_file",
            str(place / "features.npz"),
            "--model_output_path",
            str(place / "model.joblib"),
            "--crops",
            str(CROPS),
            "--classifier",
            "linear-svm",
        ]
    )
    return place


@pytest.fixture(scope="module")
def detector(trained):
    return Detector(trained / "model.joblib")


def read(path):
    return decoding.decode_image(path.read_bytes())


def test_a_row_holds_the_features_of_each_piece(trained, detector):
    columns, encoder = load_features(trained / "features.npz"), detector.encoder
    assert columns["features"].shape == (200, (1 + CROPS) * encoder.dim)
    largest = np.argsort(np.where(columns["view"] == 0, columns["facts"]["width"], 0))[
        -2:
    ]  # pieces of a small picture are all alike
    for row in largest:
        pieces = preprocessing.in_pieces(
            read(trained / "data" / columns["paths"][row]), encoder.resolution, CROPS
        )
        expected = encoder.encode(preprocessing.normalise(pieces))
        np.testing.assert_allclose(
            columns["features"][row].reshape(1 + CROPS, -1), expected, atol=1e-4
        )
        assert len(np.unique(expected.round(3), axis=0)) == 1 + CROPS


def test_fewer_crops_of_a_file_are_the_first_and_none_is_the_whole(trained):
    stored = load_features(trained / "features.npz")["features"].reshape(200, 1 + CROPS, -1)
    for crops, expected in ((0, stored[:, 0]), (1, stored[:, :2]), (CROPS, stored)):
        (part,) = FeaturesFile(trained / "features.npz", crops).parts()
        assert (part["features"] == expected).all() and part["features"].shape == expected.shape


@pytest.mark.parametrize(
    "there, wanted, shape", [(0, 0, (0, 8)), (3, 0, (0, 8)), (3, 2, (0, 3, 8))]
)
def test_a_part_without_rows_has_the_shape_of_the_others(there, wanted, shape):
    """All its images were broken."""
    assert take_crops(np.empty((0, (1 + there) * 8), np.float32), there, wanted).shape == shape


def test_a_score_is_the_mean_over_the_pieces(detector, trained):
    features = load_features(trained / "features.npz")["features"].reshape(200, 1 + CROPS, -1)
    each = [score.decision(detector.model, features[:, i]) for i in range(1 + CROPS)]
    np.testing.assert_allclose(
        score.decision(detector.model, features), np.mean(each, axis=0), atol=1e-9
    )
    assert detector.model["crops"] == CROPS and np.std(each, axis=0).max() > 0


def test_script_detector_and_features_file_agree(script, trained, detector):
    columns = load_features(trained / "features.npz")
    rows = np.flatnonzero((columns["splits"] == "test") & (columns["view"] == 0))[:4]
    pieces = columns["features"][rows].reshape(len(rows), 1 + CROPS, -1)
    expected = score.probability(detector.model, score.decision(detector.model, pieces))
    paths = [trained / "data" / columns["paths"][row] for row in rows]
    done = script(
        "classify.py",
        "--image_path",
        *paths,
        "--model_path",
        trained / "model.joblib",
        "--json",
        "--details",
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["p_fake"] for line in done.stdout.splitlines()]
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.long
def test_evaluating_the_folder_and_its_features_file_agree(script, trained):
    figures = []
    for given in (["--data_dir", trained / "data"], ["--features_file", trained / "features.npz"]):
        done = script(
            "evaluate.py",
            "--model_path",
            trained / "model.joblib",
            *given,
            "--report_dir",
            trained / "report",
            "--robustness_images",
            "2",
        )
        assert done.returncode in (0, 1), done.stderr
        figures.append(
            json.loads((trained / "report" / "metrics.json").read_text())["overall"]["auc"]["value"]
        )
    assert figures[0] == pytest.approx(figures[1], abs=2e-3)


@pytest.mark.long
def test_the_live_service_looks_at_crops_too_and_takes_over_from_a_model_without(
    script, serve, trained, tmp_path
):
    """Both models share the encoder and its passes, though their images are of other numbers of pieces."""
    plain = trained / "plain.joblib"
    done = script(
        "train_model.py",
        "--features_file",
        trained / "features.npz",
        "--model_output_path",
        plain,
        "--classifier",
        "linear-svm",
    )
    assert done.returncode == 0, done.stderr
    server, picture = serve(), next((trained / "data/test").rglob("*.jpg"))
    for number, model in enumerate((plain, trained / "model.joblib"), 1):
        (tmp_path / "model.joblib").write_bytes(model.read_bytes())
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: metric(server, "detector_reloads_total") == number)
        classification, confidence = Detector(model).classify(picture.read_bytes())
        found = server.post(picture.read_bytes()).json()
        assert found["classification"] == classification and found["confidence"] == pytest.approx(
            confidence, abs=2e-3
        )


def test_an_image_weighs_as_much_in_pieces_as_whole():
    """Alike pieces change nothing: C means the same with crops."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 40)
    features = (rng.normal(size=(80, 6)) + labels[:, None]).astype(np.float32)
    whole, pieces = (
        fit("logistic", x, labels, np.ones(80), 0, C=0.01)
        for x in (features, features[:, None].repeat(4, 1))
    )
    np.testing.assert_allclose(pieces["coef"], whole["coef"], rtol=1e-3)


# ---- what is refused ----


def test_more_crops_than_the_file_holds_name_the_remedy(script, trained):
    done = script(
        "train_model.py", "--features_file", trained / "features.npz", "--crops", CROPS + 1
    )
    assert_one_line_error(
        done,
        f"holds {CROPS} crops of an image, {CROPS + 1} are needed: extract again with --crops"
        f" {CROPS + 1}",
    )


@pytest.mark.parametrize("command", ["extract_features.py", "train_model.py"])
@pytest.mark.parametrize("number", ["-1", "33"])
def test_a_number_of_crops_out_of_range_is_one_line(script, command, number, trained):
    given = (
        ["--data_dir", trained / "data"]
        if command == "extract_features.py"
        else ["--features_file", trained / "features.npz"]
    )
    assert_one_line_error(
        script(command, *given, f"--crops={number}"),
        f"--crops {number}: must be at least 0, at most 32",
    )


@pytest.mark.parametrize("crops", [-1, 1.5, "3", 33, True])
def test_a_model_whose_crops_make_no_sense_is_refused(detector, crops):
    with pytest.raises(errors.ModelError, match="crops"):
        file.check(detector.model | {"crops": crops})
