"""benchmarks/planted_faults.py: the audit names planted faults, and does not name them before."""

import numpy as np
import pytest
from made_up import BASELINE
from threadpoolctl import threadpool_limits

from benchmarks import planted_faults
from detector.images.decoding import decode_image
from detector.verdict import Detector

COUNTS = {
    f"{split}/{label}/source{k}": 10
    for split in ("train", "test")
    for label in ("real", "fake")
    for k in range(10)
}

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def control(make_folder, tmp_path_factory):
    with threadpool_limits(1):
        folder = make_folder(tmp_path_factory.mktemp("clean"), COUNTS)
        return planted_faults.control(folder, Detector(BASELINE))


@pytest.fixture
def drawn(control):
    return planted_faults.draw(control, np.random.default_rng(0))


@pytest.mark.parametrize("name", planted_faults.DATA_FAULTS)
def test_a_fault_in_a_fifth_of_the_images_is_named_and_was_not_before(drawn, name):
    plant, expected = planted_faults.DATA_FAULTS[name]
    with threadpool_limits(1):
        before, after = (
            planted_faults.lines_of(columns)
            for columns in (drawn, plant(drawn, 0.2, np.random.default_rng(0)))
        )
    named = [line for line in after if any(word in line for word in expected)]
    assert named and not set(named) & set(before), (before, after)


def test_the_files_of_the_control_give_nothing_away(drawn):
    facts = drawn["facts"]
    assert {
        name: len(np.unique(facts[name])) for name in ("width", "height", "format", "quant_hash")
    } == {"width": 1, "height": 1, "format": 1, "quant_hash": 1}
    with threadpool_limits(1):
        assert [line for line in planted_faults.lines_of(drawn) if line.startswith("files ")] == []


def test_only_the_source_with_swapped_labels_is_named(control):
    columns, source, part = planted_faults.swap(
        planted_faults.strong(control), 0.2, np.random.default_rng(0), 36
    )
    with threadpool_limits(1):
        assert [row["source"] for row in planted_faults.label_lines(columns)] == [source]
    assert part == pytest.approx(0.2, abs=0.02)


def test_padding_doubles_the_bytes_and_keeps_the_pixels(drawn):
    data = drawn["data"][0]
    padded = planted_faults.twice_the_bytes(data)
    same = [decode_image(d).tobytes() for d in (data, padded)]
    assert same[0] == same[1] and len(padded) / len(data) == pytest.approx(2, abs=0.01)
