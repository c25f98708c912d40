"""Images that an encoder is tuned on: whole sources held out, draws and views by seed."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT

from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.finetuning import images
from detector.images import decoding, preprocessing
from detector.images.folders import Entry


def arguments(folder, **changes):
    values = {"train_splits": "train", "holdout": 0.25, "keep": 0.0, "seed": 0}
    values |= {"data_dir": str(folder), "batch_size": 4, "accumulate": 1, "steps": 3}
    return Namespace(**values | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_folder):
    """Five sources of two images for each class."""
    counts = {f"train/{label}/s{i}": 2 for label in CLASSES for i in range(5)}
    return make_folder(tmp_path_factory.mktemp("images"), counts)


def test_a_share_of_each_classs_sources_is_held_out_by_seed(folder):
    drawn = set()
    for seed in range(8):
        seen, kept, held = images.list_rows(arguments(folder, seed=seed))
        sources = {row[1:3] for row in held}
        assert sorted(label for label, _ in sources) == [0, 1]  # a quarter of five
        assert len(held) == 4 and not sources & {row[1:3] for row in seen + kept}
        assert len(seen) + len(kept) + len(held) == 20
        drawn.add(frozenset(sources))
    assert len(drawn) > 4
    assert images.list_rows(arguments(folder)) == images.list_rows(arguments(folder))


def test_half_of_every_draw_goes_to_each_class_and_small_sources_keep_a_share():
    counts = {(0, "big"): 90, (0, "small"): 10, (1, "only"): 30}
    rows = [(None, label, source, "") for (label, source), n in counts.items() for _ in range(n)]
    big, small, only = np.add.reduceat(images.balanced_draw(rows), [0, 90, 100])
    assert [big + small, only] == pytest.approx([0.5, 0.5])
    assert big / small == pytest.approx(3)  # root of 90 / 10


@pytest.mark.parametrize("share, held", [(0, 0), (0.01, 1), (0.4, 2), (1, 4)])
def test_at_least_one_source_is_held_out_and_one_is_left(share, held):
    entries = [Entry(f"{i}", label, f"s{i}", f"s{i}") for i in range(5) for label in (0, 1)]
    assert len(images.held_sources(entries, share, seed=0)) == 2 * held


def test_the_only_source_of_a_class_cannot_be_held_out():
    entries = [Entry("", 0, "", "a"), Entry("", 0, "", "b"), Entry("", 1, "", "a")]
    message = "^--holdout 0.5: the class 'fake' has 1 source.*--holdout 0 to train"
    with pytest.raises(UsageError, match=message):
        images.held_sources(entries, 0.5, seed=0)


def test_a_copy_of_a_held_out_file_is_not_trained_on(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    seen, _, held = images.list_rows(arguments(copy))
    (of_seen, *_), (of_held, *_) = (
        [row[0] for row in rows if row[1] == 0] for rows in (seen, held)
    )
    shutil.copy(of_held, Path(of_seen).with_name("again.jpg"))
    seen, _, held = images.list_rows(arguments(copy))
    assert not {row[3] for row in seen} & {row[3] for row in held} and len(seen) == 16
    assert not any(row[0].endswith("again.jpg") for row in seen)


def test_draws_depend_on_the_step_but_not_on_its_division_into_batches(folder):
    weight = np.full(20, 1 / 20)
    whole = list(images.draws(weight, arguments(folder, batch_size=6), 0))
    cut = list(images.draws(weight, arguments(folder, batch_size=3, accumulate=2), 0))
    assert len(whole) == 3 and len(cut) == 6 and sum(whole, []) == sum(cut, [])
    assert list(images.draws(weight, arguments(folder, batch_size=6), 2)) == whole[2:]
    assert len(set(sum(whole, []))) == 18  # no two views share a seed


def test_a_view_depends_on_its_key_and_without_a_seed_is_the_whole_picture(folder):
    rows = images.list_rows(arguments(folder))[0]
    keys = [(0, 0, 0, 0), (0, 0, 0, 1), (3, 0, 1, 0), (0,)]
    ((once, labels),) = images.load(rows, [keys], 32, 0)
    ((again, _),) = images.load(rows, [keys], 32, 1)
    assert once.shape == (4, 32, 32, 3) and labels.tolist() == [rows[i[0]][1] for i in keys]
    assert (once == again).all() and (once[0] != once[1]).any()
    image = decoding.decode_image(Path(rows[0][0]).read_bytes())
    whole = preprocessing.resize_and_crop(image, preprocessing.clip_transform(32))
    assert (once[3].numpy() == whole).all()


def test_a_caption_is_left_out_and_a_truncated_image_is_replaced(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "train" / "real" / "s0" / "000.txt").write_text("a caption")
    broken = copy / "train" / "real" / "s0" / "001.jpg"
    broken.write_bytes(broken.read_bytes()[:-400])
    seen, _, _ = images.list_rows(arguments(copy, holdout=0))
    assert len(seen) == 20 and "left out" in capsys.readouterr().err
    at = [row[0] for row in seen].index(str(broken))
    ((crops, labels),) = images.load(seen, [[(at,), (at + 1,)]], 32, 0)
    assert (crops[0] == crops[1]).all() and labels[0] == labels[1]
    assert f"left out {broken}" in capsys.readouterr().err


def test_an_evaluation_is_even_over_class_and_source():
    counts = {(0, "big"): 90, (0, "small"): 3, (1, "only"): 30}
    rows = [("", *key, str(i)) for key, n in counts.items() for i in range(n)]
    drawn = Counter(row[1:3] for row in images.evenly(rows, 12))
    assert drawn[0, "small"] == 3 and sorted(drawn.values()) == [3, 4, 5]


SAME = """
import sys
from detector.finetuning.images import load
rows = [(path, 0, "s", "") for path in sys.argv[1:]]
keys = [[(i, 7, i) for i in range(k, k + 4)] for k in (0, 4, 8)]
alone, beside = (
    [images.numpy().tobytes() for images, _ in load(rows, keys, 32, workers)]
    for workers in (0, 2))
assert alone == beside and len(set(alone)) == 3
"""


@pytest.mark.slow
def test_reader_processes_give_the_same_views_in_the_same_order(folder):
    """In a process of its own, because the readers are forked from it."""
    paths = sorted(map(str, folder.glob("train/*/*/*")))[:12]
    done = subprocess.run(
        [sys.executable, "-c", SAME, *paths],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
