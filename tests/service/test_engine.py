"""The engine without HTTP: limits on work and waiting, and the verdicts of the detector."""

import contextlib
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
from engines import counted, engine_on, meanwhile, picture, until
from made_up import BASELINE
from patience import PATIENCE

from detector.base.files import sha256
from detector.encoders.runtime import Encoder
from detector.images import decoding
from detector.service import engine as service_engine
from detector.service.engine import Busy, Slots
from detector.service.together import TOGETHER
from detector.verdict import Detector

pytestmark = pytest.mark.usefixtures("compiled_once")

# ---- slots ----


def take(slots, results, work=lambda: None):
    """Take a slot and work. Appends the seconds waited, or the reason of the refusal."""
    try:
        with slots.take() as waited:
            work()
        results.append(waited)
    except Busy as busy:
        results.append(busy.reason)


def take_several(slots, places, work=lambda: None):
    with slots.take(places):
        work()


def wait_for_queue(slots, waiting):
    until(lambda: slots.waiting == waiting)


def assert_empty(slots):
    assert (slots.busy, slots.waiting) == (0, 0)


def assert_refused_at_once(slots, places=1):
    with pytest.raises(Busy, match="as many requests as may wait") as error, slots.take(places):
        pass
    assert error.value.reason == "queue_full"


def test_many_threads_share_the_slots_and_each_gets_its_turn():
    slots, most, results, go = Slots(3, limit=40, timeout=PATIENCE), [], [], threading.Event()

    def work():
        go.wait(PATIENCE)
        most.append(slots.busy)
        time.sleep(0.002)

    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(meanwhile(take, slots, results, work))
        wait_for_queue(slots, 37)
        go.set()
    assert len(results) == 40 and all(isinstance(waited, float) for waited in results)
    assert max(most) == 3
    assert_empty(slots)


def test_with_a_full_queue_a_request_is_refused_at_once():
    waits, results = [], []
    slots = Slots(1, limit=2, timeout=PATIENCE, observe=waits.append)
    with contextlib.ExitStack() as waiters:
        with slots.take():
            for number in (1, 2):
                assert not slots.full()
                waiters.enter_context(meanwhile(take, slots, results))
                wait_for_queue(slots, number)
            assert slots.full()
            assert_refused_at_once(slots)
            assert len(waits) == 1  # the wait of the request in work, and none for the refusal
            assert slots.waiting == 2 and results == []
    assert len(results) == 2 and all(isinstance(waited, float) for waited in results)
    assert_empty(slots)


def test_a_wait_ends_after_the_timeout_and_is_observed():
    waits = []
    slots = Slots(1, limit=5, timeout=0.1, observe=waits.append)
    started = time.perf_counter()
    with slots.take():
        with pytest.raises(Busy, match="within 0.1 s") as error, slots.take():
            pass
        assert error.value.reason == "queue_timeout"
        assert (slots.busy, slots.waiting) == (1, 0)
    assert 0 <= waits[0] and 0.1 <= waits[1] and len(waits) == 2
    assert sum(waits) <= time.perf_counter() - started
    with slots.take():
        assert slots.busy == 1


def test_a_wait_is_measured_in_seconds():
    slots, results = Slots(1, limit=1, timeout=PATIENCE), []
    with meanwhile(take, slots, results):  # in and out at once
        pass
    with contextlib.ExitStack() as stack:
        with slots.take():
            stack.enter_context(meanwhile(take, slots, results))
            wait_for_queue(slots, 1)
            time.sleep(results[0] + 0.1)
    assert results[0] >= 0 and results[1] >= results[0] + 0.1


def test_without_a_queue_a_free_slot_can_be_taken():
    slots = Slots(2, limit=0, timeout=PATIENCE)
    with slots.take(), slots.take():
        assert_refused_at_once(slots)
    with slots.take():
        assert slots.busy == 1


def test_work_that_fails_returns_its_slot():
    slots = Slots(1, limit=0, timeout=1)
    for error in (ValueError, Busy("queue_full", ""), KeyboardInterrupt):
        with pytest.raises((ValueError, Busy, KeyboardInterrupt)), slots.take():
            raise error
        assert_empty(slots)


def test_nobody_overtakes_a_request_that_waits_for_several_slots():
    slots, order = Slots(3, limit=9, timeout=PATIENCE), []
    with contextlib.ExitStack() as stack:
        with slots.take(2):
            assert slots.busy == 2
            for number, places in enumerate((2, 1)):
                work = partial(order.append, number)
                stack.enter_context(meanwhile(take_several, slots, places, work))
                wait_for_queue(slots, number + 1)
            assert order == [], "a slot is free, but the request for two slots came first"
    assert sorted(order) == [0, 1]
    assert_empty(slots)


def test_without_a_queue_a_request_for_more_slots_than_are_free_is_refused():
    slots = Slots(3, limit=0, timeout=PATIENCE)
    with slots.take(2):
        assert slots.full(2) and not slots.full()
        assert_refused_at_once(slots, 2)
        with slots.take():
            assert slots.busy == 3


def give_up(slots, results):
    """Wait in vain for two slots."""
    results.append(pytest.raises(Busy, take_several, slots, 2).value.reason)


def test_a_request_that_gave_up_waiting_for_several_slots_blocks_nobody():
    for timeout in (0.5, 5, 50):  # until the second request queues before the first gives up
        slots, results = Slots(2, limit=9, timeout=timeout), []
        both_waited = queue_behind_a_request_that_gives_up(slots, results)
        if both_waited:
            break
    assert both_waited and results[0] == "queue_timeout" and isinstance(results[1], float)


def queue_behind_a_request_that_gives_up(slots, results):
    """-> Did both requests wait at the same time?"""
    with slots.take(), meanwhile(give_up, slots, results):
        until(lambda: slots.waiting == 1 or results)
        slots.timeout = PATIENCE
        with meanwhile(take, slots, results):
            until(lambda: slots.waiting == 2 or results)
            return slots.waiting == 2


def test_requests_get_their_slots_in_the_order_in_which_they_came():
    slots, order = Slots(1, limit=9, timeout=PATIENCE), []

    def work(number):
        order.append(number)
        if number < 5:  # a new request comes at the moment that a slot is returned
            stack.enter_context(meanwhile(take, slots, [], partial(work, number + 5)))

    with contextlib.ExitStack() as stack:
        with slots.take():
            for number in range(5):
                stack.enter_context(meanwhile(take, slots, [], partial(work, number)))
                wait_for_queue(slots, number + 1)
    assert order == list(range(10))


def test_a_slot_that_comes_at_the_timeout_is_never_lost():
    slots, results = Slots(1, limit=3, timeout=0.02), []
    for _ in range(50):
        with contextlib.ExitStack() as stack:
            with slots.take():
                for _ in range(3):
                    stack.enter_context(meanwhile(take, slots, results))
                time.sleep(0.019)
        assert_empty(slots)
    assert len(results) == 150


# ---- images ----


@pytest.fixture(scope="module")
def engine():
    return engine_on(SLOTS=2)


def meeting(monkeypatch, patience):
    """`load_rgb` notes how many calls run at a time. Each waits `patience` seconds for a second."""
    load, inside, most, second = decoding.load_rgb, [], [0], threading.Event()

    def slow(image):
        inside.append(1)
        most.append(len(inside))
        if len(inside) == 2:
            second.set()
        second.wait(patience)
        try:
            return load(image)
        finally:
            inside.pop()

    monkeypatch.setattr(decoding, "load_rgb", slow)
    return most


@pytest.mark.parametrize(
    "heights, together",
    [((31, 31), False), ((30, 30), True), ((31, 30), True)],
    ids=["both large", "both just small enough", "a large and a small one"],
)
def test_only_large_images_are_decoded_one_at_a_time(engine, monkeypatch, heights, together):
    monkeypatch.setattr(service_engine, "LARGE_PIXELS", 40 * 30)
    most = meeting(monkeypatch, patience=PATIENCE if together else 0.2)
    images = [picture(seed, height=height) for seed, height in enumerate(heights)]
    with (
        meanwhile(engine.judge, engine.detector, images[:1]),
        meanwhile(engine.judge, engine.detector, images[1:]),
    ):
        pass
    assert max(most) == 1 + together


def test_at_most_one_image_for_each_processor_is_decoded_at_a_time(monkeypatch):
    monkeypatch.setattr("detector.encoders.runtime.processors", lambda: 1)
    engine, most = engine_on(SLOTS=4), meeting(monkeypatch, patience=0.2)
    with (
        meanwhile(engine.judge, engine.detector, [picture(0)]),
        meanwhile(engine.judge, engine.detector, [picture(1)]),
    ):
        pass
    assert max(most) == 1


def test_waiting_for_others_is_not_counted_as_work(monkeypatch):
    monkeypatch.setattr("detector.encoders.runtime.processors", lambda: 1)
    engine, encode, results = engine_on(SLOTS=4), Encoder.encode, {}
    begun, go_on = threading.Event(), threading.Event()

    def slow(self, pixels):
        begun.set()
        assert go_on.wait(PATIENCE)
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "encode", slow)

    def judge(number):
        started = time.perf_counter()
        waited, (facts,) = engine.judge(engine.detector, [picture(number)])
        results[number] = waited, facts, time.perf_counter() - started

    with contextlib.ExitStack() as stack:
        for number in range(3):
            stack.enter_context(meanwhile(judge, number))
            assert begun.wait(PATIENCE)  # the first pass has begun before the others come
        until(lambda: len(engine.detector.passes._waiting) == 2)
        time.sleep(0.2)
        go_on.set()
    assert results[0][1]["encode_s"] >= 0.2, "the first worked"
    assert min(results[1][0], results[2][0]) >= 0.2, "the others waited"
    for waited, facts, whole in results.values():
        work = facts["decode_s"] + facts["encode_s"] + facts["classify_s"]
        assert waited + work <= whole, "no second counts twice"
        assert "turn_s" not in facts
    metrics = [
        counted(engine.telemetry, "stage_seconds_sum", stage=stage) for stage in ("wait", "turn")
    ]
    assert sum(metrics) == pytest.approx(sum(waited for waited, *_ in results.values()))


def test_a_broken_large_image_does_not_block_the_next(engine, monkeypatch):
    monkeypatch.setattr(service_engine, "LARGE_PIXELS", 100)
    torn = picture(0, 60, 60)[:-2000]
    for data in (torn, picture()):
        with meanwhile(engine.judge, engine.detector, [data]):
            pass
    assert not engine.large.locked()


# ---- verdicts ----


def test_an_image_gets_the_verdict_of_the_detector(engine, photos):
    alone, verdicts = Detector(BASELINE), []
    for path in photos.values():
        data = path.read_bytes()
        waited, (facts,) = engine.judge(engine.ready(), [data])
        assert waited >= 0
        assert (facts["classification"], facts["confidence"]) == alone.classify(data)
        verdicts.append((facts["classification"], facts["confidence"]))
    assert len(set(verdicts)) == len(verdicts) and len({name for name, _ in verdicts}) == 2


def test_the_facts_describe_the_image_and_the_seconds_of_each_stage(engine, photos):
    data, started = photos["china.jpg"].read_bytes(), time.perf_counter()
    _, (facts,) = engine.judge(engine.detector, [data])
    whole = time.perf_counter() - started
    assert {name: facts[name] for name in ("sha256", "bytes", "format", "width", "height")} == {
        "sha256": sha256(data),
        "bytes": len(data),
        "format": "JPEG",
        "width": 640,
        "height": 427,
    }
    seconds = [facts[f"{stage}_s"] for stage in ("decode", "encode", "classify")]
    assert min(seconds) > 0 and sum(seconds) <= whole
    assert facts["confidence"] == round(max(facts["p_fake"], 1 - facts["p_fake"]), 4)
    assert "error" not in facts and "status" not in facts


@pytest.fixture(scope="module")
def mixed(photos):
    """Ten images and three files that are none -> (bytes, expected: a verdict or a status)."""
    images = [
        photos["china.jpg"].read_bytes(),
        b"hello",
        *map(picture, range(4)),
        photos["coffee.png"].read_bytes()[:9000],
        photos["rocket.jpg"].read_bytes(),
        b"",
        *map(picture, range(4, 8)),
    ]
    alone, statuses = Detector(BASELINE), {1: 415, 6: 422, 8: 415}
    return images, [statuses.get(i) or alone.classify(data) for i, data in enumerate(images)]


def test_a_batch_gets_the_same_verdicts_and_errors_in_order(engine, mixed):
    images, expected = mixed
    _, results = engine.judge(engine.detector, images)
    assert [facts["sha256"] for facts in results] == [sha256(data) for data in images]
    for facts, alone in zip(results, expected, strict=True):
        if isinstance(alone, int):
            assert facts["status"] == alone and facts["error"] and "p_fake" not in facts
        else:
            assert facts["classification"] == alone[0]
            assert facts["confidence"] == pytest.approx(alone[1], abs=1.01e-4)
    # Verdicts must differ, or a mix-up would pass.
    assert len({facts.get("confidence") for facts in results}) > 6


@pytest.mark.parametrize("images, places", [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_a_batch_takes_at_most_half_of_the_slots(monkeypatch, images, places):
    engine, most = engine_on(SLOTS=6), []
    decode = engine._decode
    monkeypatch.setattr(
        engine, "_decode", lambda *args: most.append(engine.slots.busy) or decode(*args)
    )
    engine.judge(engine.detector, [picture()] * images)
    assert set(most) == {places} and engine.slots.busy == 0


def test_a_batch_is_encoded_in_passes_of_at_most_four_images(engine, mixed, monkeypatch):
    sizes, encode = [], Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, pixels: sizes.append(len(pixels)) or encode(self, pixels)
    )
    engine.judge(engine.detector, mixed[0])
    assert sizes == [4, 4, 2] and max(sizes) <= TOGETHER
    engine.judge(engine.detector, [b"hello"])
    assert sizes == [4, 4, 2]


def test_each_stage_is_timed_once_for_an_image_or_a_forward_pass(mixed):
    engine = engine_on()
    engine.judge(engine.detector, mixed[0])
    stages = {
        stage: counted(engine.telemetry, "stage_seconds_count", stage=stage)
        for stage in ("wait", "turn", "decode", "encode", "classify")
    }
    assert stages == {"wait": 1, "turn": 1, "decode": 10, "encode": 3, "classify": 3}


def test_the_seconds_of_a_forward_pass_are_shared_by_its_images():
    engine = engine_on()
    _, results = engine.judge(engine.detector, list(map(picture, range(6))))
    for stage in ("decode", "encode", "classify"):
        total = counted(engine.telemetry, "stage_seconds_sum", stage=stage)
        assert sum(facts[f"{stage}_s"] for facts in results) == pytest.approx(total)


def test_an_image_above_max_pixels_is_413():
    engine = engine_on(MAX_PIXELS=1200)
    _, (taken, refused) = engine.judge(engine.detector, [picture(0, 40, 30), picture(0, 40, 31)])
    assert "classification" in taken
    assert refused["status"] == 413 and "1,200" in refused["error"]


def test_images_after_the_time_limit_of_a_request_are_errors(engine, monkeypatch):
    clock, pixels = [0.0], Detector.pixels
    monkeypatch.setattr(
        service_engine,
        "time",
        SimpleNamespace(perf_counter=lambda: clock[0], monotonic=time.monotonic),
    )

    def take_long(self, image):
        clock[0] += 0.75 * service_engine.DECODE_S
        return pixels(self, image)

    monkeypatch.setattr(Detector, "pixels", take_long)
    _, results = engine.judge(engine.detector, list(map(picture, range(4))))
    assert [facts.get("status") for facts in results] == [None, None, 503, 503]
    assert "send fewer at a time" in results[3]["error"] and "classification" in results[1]


def test_without_a_slot_nothing_is_decoded(monkeypatch):
    engine = engine_on(SLOTS=1, QUEUE_LIMIT=0)
    monkeypatch.setattr(decoding, "open_image", None)  # would raise TypeError
    with engine.slots.take():
        with pytest.raises(Busy) as error:
            engine.judge(engine.detector, [picture()])
        assert error.value.reason == engine.refusal().reason == "queue_full"
    assert engine.refusal() is None


@pytest.mark.parametrize("given, slots", [(0, 7), (5, 5)])
def test_slots_default_to_the_processors_and_a_forward_pass_of_four(monkeypatch, given, slots):
    monkeypatch.setattr("detector.encoders.runtime.processors", lambda: 3)
    engine = engine_on(SLOTS=given, QUEUE_LIMIT=7, QUEUE_TIMEOUT_S=9)
    assert (engine.slots.count, engine.slots.limit, engine.slots.timeout) == (slots, 7, 9)
    assert counted(engine.telemetry, "slots") == slots
