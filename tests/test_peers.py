"""benchmarks/peers.py: figures of a detector from its scores and its own verdicts; what a user gets wrong is one line."""
import subprocess
import sys

import pytest
from conftest import ROOT, assert_one_line_error

sys.path.insert(0, str(ROOT / "benchmarks"))
import peers  # noqa: E402
from dataset import Entry  # noqa: E402

ENTRIES = [Entry(f"{label}{i}.jpg", label, "test", f"s{i % 4}") for label in (0, 1) for i in range(20)]


def judged(fake, undecided=()):
    """A detector that scores every fake above every photograph, with these verdicts."""
    return [[entry.label + i / 100, i in fake, i in undecided, 0.1] for i, entry in enumerate(ENTRIES)]


def test_a_detector_is_judged_by_its_scores_and_at_its_own_threshold():
    n, auc, balanced, alarms, undecided = peers.figures(ENTRIES, judged(fake=range(10, 30)), "test")
    assert (n, undecided) == ("40", "0") and auc.startswith("1.00 [") and balanced.startswith("0.50 [")
    assert alarms == "0.50"


def test_an_undecided_image_counts_as_not_called_fake():
    n, _, balanced, alarms, undecided = peers.figures(ENTRIES, judged(range(20, 30), range(30, 40)), "test")
    assert (n, alarms, undecided) == ("40", "0.00", "10") and balanced.startswith("0.75 [")


def test_other_splits_play_no_part():
    other = [entry._replace(split="external") for entry in ENTRIES]
    assert peers.figures(ENTRIES + other, judged([]) * 2, "external")[0] == "40"


def test_a_loop_gives_a_line_for_each_image_and_its_memory(tmp_path):
    setup = "def judge(path):\n    return len(path), path == 'b', False"
    rows, first, peak = peers.judge(sys.executable, setup, ["a", "b", "ccc"])
    assert [row[:3] for row in rows] == [[1, False, False], [1, True, False], [3, False, False]]
    assert first > 0 and peak > 1


def test_a_detector_that_ends_early_is_one_line(tmp_path):
    with pytest.raises(peers.UsageError, match="ended with 3 after 0 images"):
        peers.judge(sys.executable, "def judge(path):\n    sys.exit(3)", ["a"])


@pytest.mark.parametrize("flags, words", [
    (["--data_dir", "nowhere"], ["--data_dir nowhere: no such folder"]),
    (["--data_dir", "data", "--splits", "val"], ["--splits val", "has no image in these"])])
def test_wrong_flags(flags, words, make_folder, tmp_path):
    make_folder(tmp_path / "data", {"test/real": 2, "test/fake": 2})
    result = subprocess.run([sys.executable, ROOT / "benchmarks" / "peers.py", *flags], cwd=tmp_path, capture_output=True,
                            text=True)
    assert_one_line_error(result, *words)
