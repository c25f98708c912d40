"""A game day: each alert fires on a live service, and the commands of its section are run then.

A real Prometheus evaluates the shipped rules, with all times divided by 100. The causes are real,
with two exceptions. The bug of DetectorErrors is planted. The scores of last week are written into
Prometheus' storage, because a week divided by 100 is 101 minutes.
"""

import contextlib
import itertools
import json
import re
import time
from pathlib import Path

import pytest
import requests
from engines import picture
from patience import PATIENCE
from staged import RULES, SECTIONS, TOKEN, Stage, blocks, repeated, report_of, until
from standins import pushgateway

from detector.base.files import sha256

pytestmark = pytest.mark.long

ALERTS = {
    rule["alert"]: group["name"]
    for group in RULES["groups"]
    for rule in group["rules"]
    if "alert" in rule
}
OF_ALL_ALERTS = {
    "First",
    "Find the images of the last hours",
    "Roll back",
    "Turn it off",
    "What uploads do then",
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory, photos, make_folder, wheel):
    place = tmp_path_factory.mktemp("stage")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("no_proxy", "127.0.0.1")
        (place / "gateway").mkdir()
        gateway = stack.enter_context(pushgateway(place / "gateway"))
        yield Stage(place, gateway, stack, photos.values(), make_folder)


@pytest.fixture(autouse=True)
def no_proxy(clean_environment, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# ---- causes ----
# Each makes its alert fire, and yields (the service, the alert's labels, patterns of what the
# commands of the section print). At its end the service is as before.

DETECTOR = {"namespace": "detector"}


def odd_uploads(stage, service, name, **labels):
    """Upload odd images until the alert fires."""
    images = [path.read_bytes() for path in stage.images]
    batches = itertools.cycle([images[i : i + 16] for i in range(0, len(images), 16)])

    def upload():
        assert service.post("/classify/batch", *next(batches)).status_code == 200
        time.sleep(0.2)

    with repeated(upload):
        stage.until_firing(name, **labels)


@contextlib.contextmanager
def other_scores_than_last_week(stage):
    labels = {"namespace": "staging", "model_version": "v0.9.0"}
    odd_uploads(stage, stage.staging, "DetectorDriftSinceLastWeek", **labels)
    yield stage.staging, labels, ('"format": "JPEG"', '"key": "ops"', '"classification": "real"')


@contextlib.contextmanager
def other_scores_than_in_training(stage):
    labels = {**DETECTOR, "model_version": "v1.0.0"}
    odd_uploads(stage, stage.detector, "DetectorDriftFromTraining", **labels)
    yield stage.detector, labels, ("detector_scores_total", "detector_feature_distance")


@contextlib.contextmanager
def images_unlike_training(stage):
    labels = {**DETECTOR, "model_version": "v1.0.0"}
    odd_uploads(stage, stage.detector, "DetectorUnknownImages", **labels)
    yield stage.detector, labels, ("fakes right", "v1.0.0")


@contextlib.contextmanager
def damaged_model_after_a_restart(stage):
    broken = stage.good.with_name("broken")
    broken.write_bytes(stage.good.read_bytes()[:-1000])
    stage.detector.put(broken, pin=False)
    stage.detector.kill_worker()
    try:
        yield stage.detector, DETECTOR, ("load_failed", "is cut off or damaged")
    finally:
        stage.detector.restore(stage.good)


@contextlib.contextmanager
def wrong_pair_after_a_restart(stage):
    stage.detector.put(stage.bad, pin=False)
    stage.detector.kill_worker()
    hashes = [sha256(path.read_bytes()) for path in (stage.good, stage.bad)]
    try:
        yield stage.detector, DETECTOR, ("MODEL_SHA256_FILE", *hashes)
    finally:
        stage.detector.restore(stage.good)


@contextlib.contextmanager
def killed_workers(stage):
    def kill():
        started = "process_start_time_seconds{namespace='detector'}"
        before = stage.prometheus.value(started)
        stage.detector.kill_worker()
        until(lambda: stage.prometheus.value(started) not in (before, None))

    with repeated(kill):
        stage.until_firing("DetectorRestarting", **DETECTOR)
    stage.detector.until_serving("v1.0.0")
    yield stage.detector, DETECTOR, ("SIGKILL", "process_resident_memory_bytes")


@contextlib.contextmanager
def planted_bug(stage):
    image = stage.images[0].read_bytes()
    with repeated(lambda: stage.detector.post("/classify?details=1", image)):
        yield stage.detector, DETECTOR, ("ZeroDivisionError", "app.details")


@contextlib.contextmanager
def more_uploads_than_slots(stage):
    image = stage.images[0].read_bytes()
    with repeated(*[lambda: stage.detector.post("/classify", image)] * 8):
        yield stage.detector, DETECTOR, ("queue_full", '"key": "ops"')


@contextlib.contextmanager
def slow_clients(stage):
    image = stage.images[0].read_bytes()
    with repeated(*[lambda: stage.detector.post_slowly(image)] * 6):
        yield stage.detector, DETECTOR, (r'\A"read_s": ',)


@contextlib.contextmanager
def model_without_its_hash(stage):
    stage.detector.put(stage.bad, pin=False)
    stage.detector.reload()
    try:
        yield stage.detector, DETECTOR, ("MODEL_SHA256_FILE", '"old_model_serves": true')
    finally:
        stage.detector.restore(stage.good)


@contextlib.contextmanager
def wrong_tokens(stage):
    def guess():
        assert stage.detector.post("/classify", b"", token="guess").status_code == 401
        time.sleep(0.05)

    with repeated(guess):
        yield stage.detector, DETECTOR, ("this token is not known",)


@contextlib.contextmanager
def worse_model(stage):
    """Its operator promotes it by force. The recipe takes it back, and the alert ends."""
    service = stage.detector
    for model in (stage.good, stage.bad):
        report_of(model)
        service.sh(f"python registry.py register detector {model}")
        service.sh(f"python registry.py promote detector {model.stem} --force 'a game day'")
    service.restore(stage.bad)
    measure(stage, service)
    yield service, {"model_version": "v1.1.0"}, ("v1.1.0: balanced accuracy 0.00", "the floor")
    assert sha256(stage.good.read_bytes()) in service.run("Roll back")
    assert service.get("/model").json()["version"] == "v1.0.0"
    measure(stage, service)
    stage.until_silent("DetectorGoldenAccuracyLow")


def measure(stage, service):
    """As the CronJob does."""
    service.run("DetectorGoldenStale", stage.gateway)


@contextlib.contextmanager
def no_golden_run(stage):
    yield stage.staging, {"model_version": "v0.9.0"}, ("v0.9.0", "balanced accuracy")
    stage.until_silent("DetectorGoldenStale", model_version="v0.9.0")


CAUSES = {
    "DetectorDriftSinceLastWeek": other_scores_than_last_week,
    "DetectorDriftFromTraining": other_scores_than_in_training,
    "DetectorUnknownImages": images_unlike_training,
    "DetectorNoneReady": damaged_model_after_a_restart,
    "DetectorPodNotReady": wrong_pair_after_a_restart,
    "DetectorRestarting": killed_workers,
    "DetectorErrors": planted_bug,
    "DetectorRejecting": more_uploads_than_slots,
    "DetectorSlow": slow_clients,
    "DetectorReloadFailed": model_without_its_hash,
    "DetectorUnauthorizedBurst": wrong_tokens,
    "DetectorGoldenAccuracyLow": worse_model,
    "DetectorGoldenStale": no_golden_run,
}


# ---- the game day ----


def test_without_a_cause_no_alert_fires(stage):
    up = "sum(detector_ready) == 2 and count(fleet:detector_scores:increase6h) >= 2"
    until(lambda: stage.prometheus.value(up))
    slow = "DetectorGoldenStale"  # fires for v0.9.0 from the fifth minute on
    until(lambda: all(a["labels"]["alertname"] == slow for a in stage.prometheus.firing()))


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_fires_and_the_commands_of_its_section_show_the_cause(name, stage):
    if ALERTS[name] == "detector-service-alerts":  # others stay after the cause has ended
        stage.until_silent(name)
    with CAUSES[name](stage) as (service, labels, patterns):
        alert = stage.until_firing(name, **labels)
        printed = service.run(name, stage.gateway)
        assert [one for one in patterns if not re.search(one, printed)] == [], printed
    assert not re.search("{{|<error", " ".join(alert["annotations"].values()))
    assert alert["annotations"]["runbook_url"].endswith(f"docs/runbook.md#{name.lower()}")


def test_every_section_with_commands_is_run_here():
    assert {section for section in SECTIONS if blocks(section)} <= {*ALERTS, *OF_ALL_ALERTS}
    assert set(CAUSES) == set(ALERTS) and OF_ALL_ALERTS <= set(SECTIONS)


def test_the_first_commands_show_the_state_the_model_and_the_last_errors(stage):
    stage.staging.put(stage.bad, pin=False)
    stage.staging.reload()
    until(lambda: "load_failed" in stage.staging.live.log.read_text())
    printed = stage.staging.run("First")
    stage.staging.restore(stage.small)
    for word in ('"status":"ready"', '"version":"v0.9.0"', "MODEL_SHA256_FILE"):
        assert word in printed


def test_images_of_the_last_hours_are_found_by_their_hashes(stage):
    place, log = stage.staging.place, stage.staging.place / "service.log"
    for seed, name in enumerate(("before", "never", "one", "an other")):
        folder = place / "uploads" / f"client {seed % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(picture(seed))
    for seed in (2, 3):
        assert stage.staging.post("/classify", picture(seed)).status_code == 200
    old = {"time": "2020-01-01T00:00:00.000Z", "event": "verdict", "sha256": sha256(picture(0))}
    now = stage.staging.live.log.read_text()
    log.unlink()
    log.write_text(f"a line of the download\n{json.dumps(old)}\n{now}")
    try:
        stage.staging.run("Find the images of the last hours")
    finally:
        log.unlink()
        log.symlink_to("log")
    assert {path.name for path in (place / "look").iterdir()} == {"one.png", "an other.png"}


def test_turned_off_uploads_pass_or_wait_and_are_checked_later(stage, monkeypatch):
    service, caller = stage.staging, {}
    monkeypatch.chdir(service.place)
    (code,) = blocks("What uploads do then", "python")
    exec(code, caller)
    image = str(stage.images[0])
    asked = image, service.live.url, TOKEN
    shown = {"real": "publish", "fake": "a person looks"}[caller["verdict"](*asked)]
    assert caller["passes"](*asked) == caller["waits"](*asked) == shown
    with pytest.raises(requests.HTTPError, match="401"):
        caller["passes"](image, service.live.url, "guess")
    assert not Path("unchecked").exists()

    service.run("Turn it off")
    assert service.live.process.wait(PATIENCE) == 0
    stage.until_firing("DetectorNoneReady", namespace="staging")
    assert caller["passes"](*asked) == "publish" and caller["waits"](*asked) == "wait"
    assert Path("unchecked").read_text() == f"{image}\n" * 2

    service.start()
    assert re.search("^(real|fake) ", service.run("What uploads do then"), re.MULTILINE)
    assert not Path("unchecked").exists()
    assert caller["passes"](*asked) == shown
    stage.until_silent("DetectorNoneReady", namespace="staging")


def test_while_no_model_is_loaded_uploads_pass_or_wait(stage, monkeypatch, tmp_path):
    service, caller = stage.detector, {}
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("What uploads do then", "python")
    exec(code, caller)
    asked = str(stage.images[0]), service.live.url, TOKEN
    with wrong_pair_after_a_restart(stage):
        until(lambda: service.get("/readyz").status_code == 503)
        assert caller["passes"](*asked) == "publish" and caller["waits"](*asked) == "wait"
