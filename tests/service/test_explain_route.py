"""POST /explain: the map of a verdict, one at a time, while verdicts go on."""

from threading import Event

import numpy as np
import pytest
from engines import client_on, counted, engine_of, lines, meanwhile, picture, upload
from live import assert_error
from made_up import BASELINE
from patience import PATIENCE

from detector.images.decoding import decode_image
from detector.images.occlusion import MEANING, PASSES
from detector.service.engine import SharedDetector
from detector.service.together import TOGETHER
from detector.verdict import Detector

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_the_map_is_that_of_the_detector(client, photo):
    response = upload(client, "/explain", photo)
    assert response.status_code == 200
    assert list(response.json) == ["rows", "passes", "seconds", "meaning"]
    assert (response.json["passes"], response.json["meaning"]) == (PASSES, MEANING)
    detector = Detector(BASELINE)
    expected = detector.explain(detector.pixels(decode_image(photo)))
    assert np.array(response.json["rows"]) == pytest.approx(expected, abs=1e-3)
    assert np.ptp(expected) > 0.01
    assert response.headers["X-Model-Version"] == detector.model["versions"]["model"]


@pytest.mark.parametrize(
    "images, status, words",
    [
        ([b"hello"], 415, ["image"]),
        ([picture()[:-500]], 422, ["decoded"]),
        ([picture(), picture(1)], 400, ["2 fields 'image'"]),
        ([], 400, ["image"]),
    ],
    ids=["no image", "a torn image", "two", "none"],
)
def test_bad_uploads_are_refused_as_by_classify(client, images, status, words):
    assert_error(upload(client, "/explain", *images), status, *words)
    assert upload(client, "/explain", picture()).status_code == 200  # the next is served


def test_a_map_is_no_verdict_in_the_metrics_and_the_log(caplog):
    client = client_on()
    upload(client, "/explain", picture())
    telemetry = engine_of(client).telemetry
    assert telemetry.drift.seen == 0 and lines(caplog, "verdict") == []
    assert counted(telemetry, "requests_total", route="/explain", status=200) == 1
    assert lines(caplog, "request")[-1]["route"] == "/explain"


@pytest.fixture
def explaining(monkeypatch):
    """Function: client -> a context in which a map of another client is half made."""
    go_on, begun, features = Event(), Event(), SharedDetector.features

    def slow(self, pixels):
        begun.set()
        assert go_on.wait(PATIENCE)
        return features(self, pixels)

    def start(client):
        monkeypatch.setattr(SharedDetector, "features", slow)
        other = client.application.test_client()
        return meanwhile(lambda: start.results.append(upload(other, "/explain", picture())))

    start.results, start.begun, start.go_on = [], begun, go_on
    yield start
    go_on.set()


def test_verdicts_go_on_while_a_map_is_made_and_a_second_map_waits(explaining):
    client = client_on(QUEUE_TIMEOUT_S="7")
    with explaining(client):
        try:
            assert explaining.begun.wait(PATIENCE)
            for path in ("/classify", "/classify/batch"):
                assert upload(client, path, picture(1)).status_code == 200
            refused = upload(client, "/explain", picture(1))
            assert_error(refused, 503, "busy: another map is being made; try again later")
            assert refused.headers["Retry-After"] == "7"
        finally:
            explaining.go_on.set()
    assert [response.status_code for response in explaining.results] == [200]
    assert upload(client, "/explain", picture(1)).status_code == 200


def test_each_pass_of_a_map_leaves_room_for_the_images_of_others(client, monkeypatch):
    sizes, passes = [], engine_of(client).detector.passes
    monkeypatch.setattr(
        engine_of(client).detector,
        "passes",
        lambda pixels: sizes.append(len(pixels)) or passes(pixels),
    )
    assert upload(client, "/explain", picture()).status_code == 200
    assert sizes == [1] * PASSES and TOGETHER > 1
