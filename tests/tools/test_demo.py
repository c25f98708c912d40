"""tools/demo.py, run once: what it prints. `make demo` runs it in an environment without torch."""

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


def figure(printed, pattern):
    return float(re.search(pattern, printed)[1])


def test_the_first_line_says_that_the_model_is_a_demonstration(printed):
    assert "demonstration" in printed.splitlines()[0]


def test_act_one_counts_the_verdicts_that_flip(printed):
    cell = r" +(real|fake) \d\.\d\d"
    row = rf"^(\S+\.(?:png|jpg)){cell}{cell}(\*?){cell}(\*?)"
    rows = re.findall(row, printed, re.MULTILINE)
    assert len(rows) == len(samples.installed_photos()) >= 12
    for _, first, second, star2, third, star3 in rows:
        assert [first != second, first != third] == [bool(star2), bool(star3)]
    flips = [sum(bool(row[k]) for row in rows) for k in (3, 5)]
    assert f"flipped (*): {flips[0]} at 768 px q60, {flips[1]} at 512 px q40" in printed


def test_act_two_keeps_known_and_unseen_sources_apart(printed):
    assert re.search(r"known sources.*n \d+, balanced accuracy \d\.\d\d \[", printed)
    assert re.search(r"sources never seen: n \d+, balanced accuracy \d\.\d\d \[", printed)


def test_act_three_has_a_high_accuracy_by_folders_and_chance_when_split_by_picture(printed):
    assert "\n== 3. The trap. There is nothing to find: chance is 0.5\n" in printed
    balanced = r" +balanced accuracy (\d\.\d+)"
    assert figure(printed, f"split as the folders have it:{balanced}") > 0.85
    assert 0.3 < figure(printed, f"other halves called fake:{balanced} on average") < 0.65
    leak = re.search(r"LEAK  (\d+) of (\d+) test images have a duplicate in train", printed)
    assert int(leak[1]) == int(leak[2]) > 0


def test_one_image_went_through_a_live_service(printed):
    assert re.search(r'\{"classification":"(real|fake)","confidence":[01]\.\d+\}', printed)
