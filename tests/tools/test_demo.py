"""`make demo` runs tools/demo.py in an environment without torch; this runs it where it is, and reads what it prints."""

import os
import re
import subprocess
import sys

import pytest
from commands import OPENAI_CACHE, ROOT

from detector.images import samples

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def printed(wheel):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tools.demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "CLIP_CACHE": str(OPENAI_CACHE)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE), "the demo must not need torch"
    return result.stdout


def test_it_says_first_that_the_model_is_a_demonstration(printed):
    assert "demonstration" in printed.splitlines()[0]


def test_act_one_counts_the_verdicts_that_flip(printed):
    rows = re.findall(
        r"^(\S+\.(?:png|jpg)) +(real|fake) \d\.\d\d +(real|fake) \d\.\d\d(\*?) +(real|fake)"
        r" \d\.\d\d(\*?)",
        printed,
        re.MULTILINE,
    )
    assert len(rows) == len(samples.installed_photos()) >= 12
    assert all(
        (first != second) == bool(star2) and (first != third) == bool(star3)
        for _, first, second, star2, third, star3 in rows
    )
    flips = [sum(bool(row[k]) for row in rows) for k in (3, 5)]
    assert f"flipped (*): {flips[0]} at 768 px q60, {flips[1]} at 512 px q40" in printed


def test_act_two_keeps_known_and_unseen_sources_apart(printed):
    assert re.search(r"known sources.*n \d+, balanced accuracy \d\.\d\d \[", printed)
    assert re.search(r"sources never seen: n \d+, balanced accuracy \d\.\d\d \[", printed)


def test_act_three_a_fine_accuracy_where_there_is_nothing_to_find_and_chance_once_split_by_picture(
    printed,
):
    assert "\n== 3. The trap. There is nothing to find: chance is 0.5\n" in printed
    believed = float(
        re.search(r"split as the folders have it: +balanced accuracy (\d\.\d+)", printed)[1]
    )
    honest = float(
        re.search(r"other halves called fake: +balanced accuracy (\d\.\d+) on average", printed)[1]
    )
    assert believed > 0.85 and 0.3 < honest < 0.65
    twins, test = map(
        int, re.search(r"LEAK  (\d+) of (\d+) test images have a duplicate in train", printed).groups()
    )
    assert twins == test > 0


def test_one_image_went_through_a_live_service(printed):
    assert re.search(r'\{"classification":"(real|fake)","confidence":[01]\.\d+\}', printed)
