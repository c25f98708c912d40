"""Images that an encoder is tuned on: whole sources held out, draws that follow from the seed, files read when their batch is due."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
from commands import ROOT

from detector.base.errors import UsageError
from detector.finetuning import images
from detector.images import decoding, preprocessing
from detector.images.folders import Entry


def arguments(folder, **changes):
    return Namespace(
        **{
            **dict(
                data_dir=str(folder),
                train_splits="train",
                holdout=0.25,
                keep=0.0,
                seed=0,
                batch_size=4,
                accumulate=1,
                steps=3,
            ),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_folder):
    return make_folder(
        tmp_path_factory.mktemp("images"),
        {f"train/{label}/s{i}": 2 for label in ("real", "fake") for i in range(5)},
    )


def test_a_share_of_each_class_s_sources_is_held_out_whole_by_seed(folder):
    drawn = set()
    for seed in range(8):
        seen, kept, held = images.list_rows(arguments(folder, seed=seed))
        sources = {row[1:3] for row in held}
        assert [sum(label == wanted for label, _ in sources) for wanted in (0, 1)] == [
            1,
            1,
        ]  # a quarter of five
        assert len(held) == 4 and not sources & {row[1:3] for row in seen + kept}
        assert len(seen) + len(kept) + len(held) == 20
        drawn.add(frozenset(sources))
    assert len(drawn) > 4
    assert images.list_rows(arguments(folder)) == images.list_rows(arguments(folder))


def test_half_of_every_draw_goes_to_each_class_and_small_sources_are_not_drowned():
    counts = {(0, "big"): 90, (0, "small"): 10, (1, "only"): 30}
    rows = [(None, label, source, "") for (label, source), n in counts.items() for _ in range(n)]
    weight = images.balanced_draw(rows)
    of = {key: sum(w for w, row in zip(weight, rows) if row[1:3] == key) for key in counts}
    assert of[1, "only"] == pytest.approx(0.5)
    assert of[0, "big"] + of[0, "small"] == pytest.approx(0.5)
    assert of[0, "big"] / of[0, "small"] == pytest.approx(3)  # root of 90 / 10


@pytest.mark.parametrize("share, held", [(0, 0), (0.01, 1), (0.4, 2), (1, 4)])
def test_at_least_one_source_is_held_out_and_one_is_left(share, held):
    entries = [Entry(f"{i}", label, f"s{i}", f"s{i}") for i in range(5) for label in (0, 1)]
    assert len(images.held_sources(entries, share, seed=0)) == 2 * held


def test_one_source_of_a_class_cannot_be_held_out():
    with pytest.raises(
        UsageError, match="^--holdout 0.5: the class 'fake' has 1 source.*--holdout 0 to train"
    ):
        images.held_sources(
            [Entry("", 0, "", "a"), Entry("", 0, "", "b"), Entry("", 1, "", "a")], 0.5, seed=0
        )


def test_a_file_that_lies_in_a_held_out_source_as_well_is_not_trained_on(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    _, _, held = images.list_rows(arguments(copy))
    other = next(
        path
        for path in copy.glob("train/real/s*")
        if (0, path.name) not in {row[1:3] for row in held}
    )
    shutil.copy(next(row[0] for row in held if row[1] == 0), other / "again.jpg")
    seen, kept, held = images.list_rows(arguments(copy))
    assert not {row[3] for row in seen} & {row[3] for row in held} and len(seen) == 16
    assert not any(row[0].endswith("again.jpg") for row in seen)


def test_draws_go_on_as_they_would_have_and_do_not_depend_on_how_a_step_is_cut(folder):
    weight = np.full(20, 1 / 20)
    whole = list(images.draws(weight, arguments(folder, batch_size=6), 0))
    cut = list(images.draws(weight, arguments(folder, batch_size=3, accumulate=2), 0))
    assert len(whole) == 3 and len(cut) == 6 and sum(whole, []) == sum(cut, [])
    assert list(images.draws(weight, arguments(folder, batch_size=6), 2)) == whole[2:]
    assert len(set(sum(whole, []))) == 18  # no two views share a seed


def test_views_are_random_by_key_alone_and_without_a_seed_the_picture_is_as_the_encoder_will_see_it(
    folder,
):
    rows = images.list_rows(arguments(folder))[0]
    keys = [(0, 0, 0, 0), (0, 0, 0, 1), (3, 0, 1, 0), (0,)]
    ((once, labels),) = images.load(rows, [keys], 32, 0)
    ((again, _),) = images.load(rows, [keys], 32, 1)
    assert once.shape == (4, 32, 32, 3) and labels.tolist() == [rows[i[0]][1] for i in keys]
    assert (once == again).all() and (once[0] != once[1]).any()
    with open(rows[0][0], "rb") as file:
        assert (
            once[3].numpy() == preprocessing.resize_and_crop(decoding.decode_image(file.read()), 32)
        ).all()


def test_a_file_that_is_no_image_is_left_out_and_a_truncated_one_is_replaced_by_the_next(
    folder, tmp_path, capsys
):
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
    rows = [
        ("", label, source, str(i))
        for label, source, n in ((0, "big", 90), (0, "small", 3), (1, "only", 30))
        for i in range(n)
    ]
    found = [row[1:3] for row in images.evenly(rows, 12)]
    assert found.count((0, "small")) == 3 and sorted(
        found.count((label, name)) for label, name in ((0, "big"), (1, "only"))
    ) == [4, 5]


SAME = """
import sys
from detector.finetuning.images import load
rows = [(path, 0, "s", "") for path in sys.argv[1:]]
keys = [[(i, 7, i) for i in range(k, k + 4)] for k in (0, 4, 8)]
alone, beside = ([images.numpy().tobytes() for images, _ in load(rows, keys, 32, workers)] for workers in (0, 2))
assert alone == beside and len(set(alone)) == 3
"""


@pytest.mark.slow
def test_processes_that_read_beside_the_training_give_the_same_views_in_the_same_order(folder):
    """In a process of its own: the readers are forked from it, as beside a GPU."""
    paths = sorted(map(str, folder.glob("train/*/*/*")))[:12]
    done = subprocess.run(
        [sys.executable, "-c", SAME, *paths],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
