"""The engine without HTTP: bounded work, bounded waiting, and verdicts as the detector gives them alone."""

import contextlib
import copy
import threading
import time
from types import SimpleNamespace

import numpy as np
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


def take(slots, told, work=lambda: None):
    """Take a slot and work; what came of it is appended to `told`: seconds waited, or the reason for turning it away."""
    try:
        with slots.take() as waited:
            work()
        told.append(waited)
    except Busy as busy:
        told.append(busy.reason)


def test_many_threads_never_work_on_more_than_there_are_slots_and_each_gets_its_turn():
    slots, most, told, all_there = Slots(3, limit=40, timeout=PATIENCE), [], [], threading.Event()

    def work():
        all_there.wait(PATIENCE)
        most.append(slots.busy)
        time.sleep(0.002)

    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(meanwhile(take, slots, told, work))
        until(lambda: slots.waiting == 37)
        all_there.set()
    assert len(told) == 40 and all(isinstance(waited, float) for waited in told)
    assert max(most) == 3 and (slots.busy, slots.waiting) == (0, 0)


def test_as_many_as_may_wait_do_and_one_more_is_turned_away_at_once():
    waits, told = [], []
    slots = Slots(1, limit=2, timeout=PATIENCE, observe=waits.append)
    with contextlib.ExitStack() as waiters:
        with slots.take():
            for number in (1, 2):
                assert not slots.full()
                waiters.enter_context(meanwhile(take, slots, told))
                until(lambda: slots.waiting == number)
            assert slots.full()
            with pytest.raises(Busy, match="as many requests as may wait") as error, slots.take():
                pass
            assert (
                error.value.reason == "queue_full" and len(waits) == 1
            )  # its own wait would be another
            assert slots.waiting == 2 and told == []
    assert all(isinstance(waited, float) for waited in told) and len(told) == 2
    assert (slots.busy, slots.waiting) == (0, 0)


def test_a_wait_ends_after_the_timeout_and_leaves_no_trace():
    slots = Slots(1, limit=5, timeout=0.1)
    with slots.take():
        started = time.monotonic()
        with pytest.raises(Busy, match="within 0.1 s") as error, slots.take():
            pass
        assert error.value.reason == "queue_timeout" and time.monotonic() - started > 0.09
        assert (slots.busy, slots.waiting) == (1, 0)
    with slots.take():
        assert slots.busy == 1


def test_the_wait_is_told_in_seconds():
    slots, told = Slots(1, limit=1, timeout=PATIENCE), []
    with meanwhile(take, slots, told):  # in and out at once
        pass
    with contextlib.ExitStack() as stack:
        with slots.take():
            stack.enter_context(meanwhile(take, slots, told))
            until(lambda: slots.waiting == 1)
            time.sleep(told[0] + 0.1)
    assert 0 <= told[0] < told[1] and told[1] >= told[0] + 0.1


def test_where_none_may_wait_a_free_slot_is_taken_all_the_same():
    slots = Slots(2, limit=0, timeout=PATIENCE)
    with slots.take(), slots.take():
        with pytest.raises(Busy) as error, slots.take():
            pass
        assert error.value.reason == "queue_full"
    with slots.take():
        assert slots.busy == 1


def test_work_that_fails_gives_its_slot_back():
    slots = Slots(1, limit=0, timeout=1)
    for error in (ValueError, Busy("queue_full", ""), KeyboardInterrupt):
        with pytest.raises((ValueError, Busy, KeyboardInterrupt)), slots.take():
            raise error
        assert (slots.busy, slots.waiting) == (0, 0)
    with slots.take():
        assert slots.busy == 1


def test_several_slots_are_taken_and_given_back_together_and_nobody_overtakes_who_waits_for_them():
    slots, order = Slots(3, limit=9, timeout=PATIENCE), []
    with contextlib.ExitStack() as stack:
        with slots.take(2):
            assert slots.busy == 2
            for number, places in enumerate((2, 1)):
                stack.enter_context(
                    meanwhile(
                        lambda number=number, places=places: taken(
                            slots, places, lambda: order.append(number)
                        )
                    )
                )
                until(lambda: slots.waiting == number + 1)
            assert order == [], "one is free, but the one that waits for two was there first"
    assert sorted(order) == [0, 1] and (slots.busy, slots.waiting) == (0, 0)


def test_where_none_may_wait_one_that_needs_more_slots_than_are_free_is_turned_away_at_once():
    slots = Slots(3, limit=0, timeout=PATIENCE)
    with slots.take(2):
        assert slots.full(2) and not slots.full()
        with pytest.raises(Busy) as error, slots.take(2):
            pass
        assert error.value.reason == "queue_full"
        with slots.take():
            assert slots.busy == 3


def test_one_that_gave_up_waiting_for_several_slots_holds_up_nobody():
    for timeout in (0.5, 5, 50):  # until the second stands in the queue before the first gives up
        slots, told = Slots(2, limit=9, timeout=timeout), []
        with (
            slots.take(),
            meanwhile(lambda: told.append(pytest.raises(Busy, taken, slots, 2).value.reason)),
        ):
            until(lambda: slots.waiting == 1 or told)
            slots.timeout = PATIENCE
            with meanwhile(take, slots, told):
                until(lambda: slots.waiting == 2 or told)
                both_waited = slots.waiting == 2
        if both_waited:
            break
    assert both_waited and told[0] == "queue_timeout" and isinstance(told[1], float)


def taken(slots, places, work=lambda: None):
    with slots.take(places):
        work()


def test_who_has_waited_longest_is_next_and_newcomers_pass_nobody():
    slots, order = Slots(1, limit=9, timeout=PATIENCE), []

    def work(number):
        order.append(number)
        if number < 5:  # a newcomer at the moment that a slot is given back
            stack.enter_context(meanwhile(take, slots, [], lambda: work(number + 5)))

    with contextlib.ExitStack() as stack:
        with slots.take():
            for number in range(5):
                stack.enter_context(meanwhile(take, slots, [], lambda number=number: work(number)))
                until(lambda: slots.waiting == number + 1)
    assert order == list(range(10))


def test_a_turn_that_comes_as_the_wait_ends_is_taken_or_passed_on_and_never_lost():
    slots, told = Slots(1, limit=3, timeout=0.02), []
    for _ in range(50):
        with contextlib.ExitStack() as stack:
            with slots.take():
                for _ in range(3):
                    stack.enter_context(meanwhile(take, slots, told))
                time.sleep(0.019)
        assert (slots.busy, slots.waiting) == (0, 0)
    assert len(told) == 150


def test_every_wait_is_observed_those_in_vain_too():
    waits = []
    slots = Slots(1, limit=1, timeout=0.1, observe=waits.append)
    started = time.perf_counter()
    with slots.take(), pytest.raises(Busy), slots.take():
        pass
    assert 0 <= waits[0] and 0.1 <= waits[1] and len(waits) == 2
    assert sum(waits) <= time.perf_counter() - started


# ---- images ----


@pytest.fixture(scope="module")
def engine():
    return engine_on(SLOTS=2)


def meeting(monkeypatch, patience):
    """`load_rgb` notes how many are in it at a time; those that come wait so many seconds for a second one."""
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
def test_two_large_images_are_never_decoded_at_the_same_time_small_ones_are(
    engine, monkeypatch, heights, together
):
    monkeypatch.setattr(service_engine, "LARGE_PIXELS", 40 * 30)
    most = meeting(monkeypatch, patience=PATIENCE if together else 0.2)
    images = [picture(seed, height=height) for seed, height in enumerate(heights)]
    with (
        meanwhile(engine.judge, engine.detector, images[:1]),
        meanwhile(engine.judge, engine.detector, images[1:]),
    ):
        pass
    assert max(most) == 1 + together


def test_no_more_images_are_decoded_at_a_time_than_there_are_processors(monkeypatch):
    monkeypatch.setattr("detector.encoders.runtime.processors", lambda: 1)
    engine, most = engine_on(SLOTS=4), meeting(monkeypatch, patience=0.2)
    with (
        meanwhile(engine.judge, engine.detector, [picture(0)]),
        meanwhile(engine.judge, engine.detector, [picture(1)]),
    ):
        pass
    assert max(most) == 1


def test_waiting_for_others_is_told_as_waiting_and_not_as_work(monkeypatch):
    monkeypatch.setattr("detector.encoders.runtime.processors", lambda: 1)
    engine, encode, found, begun, go_on = (
        engine_on(SLOTS=4),
        Encoder.encode,
        {},
        threading.Event(),
        threading.Event(),
    )
    monkeypatch.setattr(
        Encoder,
        "encode",
        lambda self, pixels: begun.set() or go_on.wait(PATIENCE) and encode(self, pixels),
    )

    def judge(number):
        started = time.perf_counter()
        waited, (facts,) = engine.judge(engine.detector, [picture(number)])
        found[number] = waited, facts, time.perf_counter() - started

    with contextlib.ExitStack() as stack:
        for number in range(3):
            stack.enter_context(meanwhile(judge, number))
            assert begun.wait(PATIENCE)  # the first is encoded when the others come
        until(lambda: len(engine.detector.passes._waiting) == 2)
        time.sleep(0.2)
        go_on.set()
    assert found[0][1]["encode_s"] >= 0.2, "the first worked"
    assert min(found[1][0], found[2][0]) >= 0.2, "the others waited"
    for waited, facts, whole in found.values():
        assert waited + facts["decode_s"] + facts["encode_s"] + facts["classify_s"] <= whole, (
            "nothing counts as both"
        )
        assert "turn_s" not in facts
    told = [
        counted(engine.telemetry, "stage_seconds_sum", stage=stage) for stage in ("wait", "turn")
    ]
    assert sum(told) == pytest.approx(sum(waited for waited, *_ in found.values()))


def test_a_large_image_that_cannot_be_decoded_does_not_hold_up_the_next(engine, monkeypatch):
    monkeypatch.setattr(service_engine, "LARGE_PIXELS", 100)
    torn = picture(0, 60, 60)[:-2000]
    for data in (torn, picture()):
        with meanwhile(engine.judge, engine.detector, [data]):
            pass
    assert not engine.large.locked()


# ---- verdicts ----


def test_one_image_gets_the_verdict_that_the_detector_gives(engine, photos):
    alone, found = Detector(BASELINE), []
    for path in photos.values():
        data = path.read_bytes()
        waited, (facts,) = engine.judge(engine.ready(), [data])
        assert waited >= 0
        assert (facts["classification"], facts["confidence"]) == alone.classify(data)
        found.append((facts["classification"], facts["confidence"]))
    assert len(set(found)) == len(found) and len({name for name, _ in found}) == 2


def test_the_facts_name_the_bytes_the_picture_and_the_seconds(engine, photos):
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
    """Ten images among which three are none -> (bytes, expected: the verdict alone or a status)."""
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


def test_a_batch_gets_the_same_verdicts_in_order_with_errors_in_their_places(engine, mixed):
    images, expected = mixed
    _, found = engine.judge(engine.detector, images)
    assert [facts["sha256"] for facts in found] == [sha256(data) for data in images]
    for facts, wanted in zip(found, expected, strict=True):
        if isinstance(wanted, int):
            assert (facts["status"], "p_fake" in facts, bool(facts["error"])) == (
                wanted,
                False,
                True,
            )
        else:
            assert facts["classification"] == wanted[0] and facts["confidence"] == pytest.approx(
                wanted[1], abs=1.01e-4
            )
    assert len({facts.get("confidence") for facts in found}) > 6  # so that a mix-up would show


@pytest.mark.parametrize("images, places", [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_a_batch_takes_at_most_half_of_the_slots(monkeypatch, images, places):
    engine, most = engine_on(SLOTS=6), []
    decode = engine._decode
    monkeypatch.setattr(
        engine, "_decode", lambda *args: most.append(engine.slots.busy) or decode(*args)
    )
    engine.judge(engine.detector, [picture()] * images)
    assert set(most) == {places} and engine.slots.busy == 0


def test_a_batch_is_encoded_in_passes_of_at_most_four_and_what_is_no_image_takes_no_place(
    engine, mixed, monkeypatch
):
    sizes, encode = [], Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, pixels: sizes.append(len(pixels)) or encode(self, pixels)
    )
    engine.judge(engine.detector, mixed[0])
    assert sizes == [4, 4, 2] and max(sizes) <= TOGETHER
    engine.judge(engine.detector, [b"hello"])
    assert sizes == [4, 4, 2]


def test_each_stage_is_timed_once_an_image_or_a_forward_pass(mixed):
    engine = engine_on()
    engine.judge(engine.detector, mixed[0])
    stages = {
        stage: counted(engine.telemetry, "stage_seconds_count", stage=stage)
        for stage in ("wait", "turn", "decode", "encode", "classify")
    }
    assert stages == {"wait": 1, "turn": 1, "decode": 10, "encode": 3, "classify": 3}


def test_the_seconds_of_a_forward_pass_are_shared_by_its_images():
    engine = engine_on()
    _, found = engine.judge(engine.detector, list(map(picture, range(6))))
    for stage in ("decode", "encode", "classify"):
        total = counted(engine.telemetry, "stage_seconds_sum", stage=stage)
        assert sum(facts[f"{stage}_s"] for facts in found) == pytest.approx(total)


def test_the_largest_image_taken_is_that_of_the_settings():
    engine = engine_on(MAX_PIXELS=1200)
    _, (taken, refused) = engine.judge(engine.detector, [picture(0, 40, 30), picture(0, 40, 31)])
    assert "classification" in taken and (refused["status"], "1,200" in refused["error"]) == (
        413,
        True,
    )


@pytest.mark.parametrize("band, uncertain", [([0.0, 1.0], True), ([0.5, 0.5], False)])
def test_a_verdict_is_uncertain_inside_the_models_band(engine, band, uncertain):
    detector = copy.copy(engine.detector)
    detector.model = {**detector.model, "band": np.array(band)}
    _, (facts,) = engine.judge(detector, [picture()])
    assert facts["uncertain"] is uncertain


def test_images_that_take_too_long_together_are_left_at_some_point_and_told_so(engine, monkeypatch):
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
    _, found = engine.judge(engine.detector, list(map(picture, range(4))))
    assert [facts.get("status") for facts in found] == [None, None, 503, 503]
    assert "send fewer at a time" in found[3]["error"] and "classification" in found[1]


def test_without_a_slot_nothing_is_decoded(monkeypatch):
    engine = engine_on(SLOTS=1, QUEUE_LIMIT=0)
    monkeypatch.setattr(decoding, "open_image", None)  # would raise TypeError
    with engine.slots.take():
        with pytest.raises(Busy) as error:
            engine.judge(engine.detector, [picture()])
        assert error.value.reason == engine.refusal().reason == "queue_full"
    assert engine.refusal() is None


@pytest.mark.parametrize("given, slots", [(0, 7), (5, 5)])
def test_the_slots_are_one_a_processor_and_a_forward_pass_of_four_unless_a_number_is_set(
    monkeypatch, given, slots
):
    monkeypatch.setattr("detector.encoders.runtime.processors", lambda: 3)
    engine = engine_on(SLOTS=given, QUEUE_LIMIT=7, QUEUE_TIMEOUT_S=9)
    assert (engine.slots.count, engine.slots.limit, engine.slots.timeout) == (slots, 7, 9)
    assert counted(engine.telemetry, "slots") == slots
