"""A detector in this process: the same verdicts for an image alone and among others."""

import numpy as np
import pytest
from made_up import BASELINE

from detector.base.constants import MAX_PIXELS
from detector.base.errors import ImageTooLarge, UnsupportedImage, UsageError
from detector.base.files import read_bytes
from detector.verdict import Detector, Verdict, classify_all


@pytest.fixture(scope="module")
def crops(make_folder, tmp_path_factory):
    """Paths of 1,000 crops of photographs, half of them with their channels swapped."""
    folder = make_folder(tmp_path_factory.mktemp("crops"), {"real": 500, "fake": 500}, seed=1)
    return sorted(map(str, folder.rglob("*.jpg")))


def test_an_image_alone_gets_the_verdict_it_has_among_others(crops):
    # The order of sums differs. 0.0001 is the step of the confidence.
    detector, some = Detector(BASELINE), crops[::20]
    for path, (verdict, _) in classify_all(detector, some, MAX_PIXELS):
        alone = detector.classify(read_bytes(path))
        assert alone[1] == pytest.approx(verdict.confidence, abs=1.01e-4)
        assert alone[0] == verdict.classification or verdict.confidence < 0.5002


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_bad_image_does_not_shift_the_verdicts_of_the_others(crops, tmp_path, batch):
    detector, bad = Detector(BASELINE), str(tmp_path / "bad.jpg")
    (tmp_path / "bad.jpg").write_text("hello")
    paths = [bad, *crops[:4], bad, *crops[4:7], bad]
    results = dict(classify_all(detector, paths, MAX_PIXELS, batch))
    assert isinstance(results.pop(bad), UnsupportedImage)
    assert list(results) == crops[:7]
    among = [verdict.p_fake for verdict, _ in results.values()]
    pairs = classify_all(detector, crops[:7], MAX_PIXELS, 1)
    alone = [verdict.p_fake for _, (verdict, _) in pairs]
    assert among == pytest.approx(alone, abs=1e-5)
    assert np.diff(sorted(alone)).min() > 3e-4  # a verdict in another's place would show


def test_files_are_classified_in_their_order_and_a_bad_file_is_its_error(crops, tmp_path):
    detector, bad = Detector(BASELINE), tmp_path / "bad.jpg"
    bad.write_text("hello")
    paths = [crops[0], bad, tmp_path / "none.jpg", *crops[1:9], tmp_path]
    results = detector.classify_files(iter(paths))
    assert [path for path, _ in results] == paths
    errors = [result for _, result in results if isinstance(result, Exception)]
    assert [type(error) for error in errors] == [UnsupportedImage, UsageError, UsageError]
    verdict = results[0][1]
    assert isinstance(verdict, Verdict)
    assert verdict.confidence == pytest.approx(detector.classify(read_bytes(crops[0]))[1], abs=2e-4)
    assert detector.classify_files([]) == []
    small = dict(detector.classify_files(crops[:2], max_pixels=100))
    assert all(isinstance(error, ImageTooLarge) for error in small.values())
