"""Training on stored outputs of the frozen blocks: the same as without them, reused, refused."""

import errno
import os
import re
from argparse import Namespace
from unittest.mock import Mock

import numpy as np
import pytest
import small_clip
import torch

import finetune_clip
from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.encoders.prepare import load_visual
from detector.finetuning import adapters, tokens, tuning
from detector.finetuning.images import draws, list_rows
from detector.finetuning.tokens import Tokens, drawn_view, drawn_views, view_key

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_folder):
    counts = {f"train/{label}/s{i}": 6 for label in CLASSES for i in range(2)}
    return make_folder(tmp_path_factory.mktemp("images"), counts)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    tower = small_clip.small_vit(None, resolution=32)
    return small_clip.save_state_dict(tower, tmp_path_factory.mktemp("start") / "start.pt")


@pytest.fixture
def arguments(folder, start, tmp_path):
    """Function: flags -> the list of flags of a training with four steps."""

    def make(*flags):
        given = ["--clip_model", start, "--data_dir", folder, "--output", tmp_path / "tuned.pt"]
        given += ["--steps", 4, "--every", 2, "--batch_size", 4, "--train", "blocks:1"]
        return [*map(str, given), *map(str, flags)]

    return make


@pytest.fixture
def exact(monkeypatch):
    """float32 and all patches, as the whole tower sees them."""
    monkeypatch.setattr(tuning, "precision", lambda: ("cpu", torch.float32))
    monkeypatch.setattr(tokens, "KEPT_PATCHES", 1.0)


class SameViews(tuning.Pixels):
    """The pixels of the views whose tokens another training has stored."""

    def batches(self, rows, batches):
        args = self.training.args
        same = (
            [view_key(rows, row, drawn_view(seed, args.views)[0], args.seed) for row, *seed in keys]
            for keys in batches
        )
        return super().batches(rows, same)


def train(flags, monkeypatch, inputs_of=None):
    """-> (losses, change of the trained weights). `inputs_of`: in place of stored tokens."""
    args = finetune_clip.parse_args([*flags, "--holdout", "0", "--keep", "0"])
    tower = load_visual(args.clip_model)
    torch.manual_seed(args.seed)
    adapters.choose_trained(tower, args.train, args.last)
    if inputs_of:
        monkeypatch.setattr(adapters, "frozen_blocks", lambda tower: 0)
    training, losses, descend = tuning.Training(args, tower), [], tuning.descend
    trained = adapters.Trained(tower)
    before = trained.state_dict()
    monkeypatch.setattr(tuning, "descend", lambda *given: losses.append(descend(*given)) or 0.0)
    seen, _, _ = list_rows(args)
    with tuning.open_inputs(training, seen, []) as inputs:
        inputs = inputs_of(training) if inputs_of else inputs
        assert len(list(tuning.take_steps(training, inputs, seen, 0, args.steps))) == 4
    monkeypatch.undo()
    return losses, {name: value - before[name] for name, value in trained.state_dict().items()}


@pytest.mark.parametrize("flags", [["--train", "blocks:1"], ["--train", "lora:4", "--last", "1"]])
def test_stored_tokens_train_like_the_whole_tower_on_the_same_views(
    flags, arguments, exact, monkeypatch
):
    flags = arguments(*flags, "--lr", "1e-3")
    losses, change = train(flags, monkeypatch)
    monkeypatch.setattr(tuning, "precision", lambda: ("cpu", torch.float32))
    whole_losses, whole_change = train(flags, monkeypatch, SameViews)
    # the tokens are rounded to float16
    assert losses == pytest.approx(whole_losses, rel=2e-3) and len(set(losses)) == 4
    assert change.keys() == whole_change.keys() and len(change) > 2
    apart = sum((change[name] - whole_change[name]).square().sum() for name in change)
    size = sum(value.square().sum() for value in whole_change.values())
    assert 0 < apart < 0.01 * size


def files_of(tmp_path):
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tuned.pt.tokens").iterdir()}


@pytest.fixture
def interrupted(arguments, tmp_path, monkeypatch):
    """Function: flags -> files with tokens of a training that was interrupted at its end."""

    def make(*flags):
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "FILE_VIEWS", 4)
            patch.setattr(tuning, "held_auc", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                finetune_clip.main(arguments(*flags))
        return files_of(tmp_path)

    return make


def test_a_resumed_training_uses_the_stored_tokens_and_the_end_removes_them(
    interrupted, arguments, tmp_path, monkeypatch
):
    files = interrupted()
    assert len(files) > 2
    (tmp_path / "tuned.pt.tokens" / next(iter(files))).unlink()
    assert interrupted().keys() == files.keys()  # the missing file alone was computed again
    assert len(files.items() & files_of(tmp_path).items()) == len(files) - 1
    monkeypatch.setattr(tokens, "FILE_VIEWS", 4)
    monkeypatch.setattr(Tokens, "compute", Mock(side_effect=AssertionError("computed again")))
    finetune_clip.main(arguments())
    assert sorted(path.name for path in tmp_path.glob("tuned*")) == ["tuned.json", "tuned.pt"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "1"],
        ["--views", "2"],
        ["--steps", "6"],
        ["--keep", "0"],
        ["--train", "lora:2", "--last", "1", "--seed", "2"],
    ],
)
def test_a_training_with_other_settings_stores_its_own_tokens(flags, interrupted):
    before = interrupted()
    after = interrupted(*flags)
    assert before and after and not before.keys() & after.keys()


def test_another_start_has_its_own_tokens(interrupted, tmp_path):
    before = interrupted()
    other = small_clip.small_vit(None, seed=1, resolution=32)
    other = small_clip.save_state_dict(other, tmp_path / "other.pt")
    assert not before.keys() & interrupted("--clip_model", other).keys()


@pytest.fixture
def described(tmp_path):
    """Function: changes of a training's values -> Tokens of two views of a picture."""

    def make(digest="ab" * 32, views=((0, 0), (0, 1)), **changes):
        values = {"start": "sha256:1", "seed": 0, "frozen": 1, "dtype": torch.float32} | changes
        args = Namespace(start=values["start"], seed=values["seed"])
        model = [Namespace(frozen=values["frozen"])]
        tower = small_clip.small_vit(None, resolution=32)
        training = Namespace(args=args, model=model, tower=tower, dtype=values["dtype"])
        return Tokens(training, [("a.jpg", 1, "s", digest)], views, tmp_path)

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {"start": "sha256:2"},
        {"seed": 1},
        {"frozen": 2},
        {"dtype": torch.bfloat16},
        {"digest": "cd" * 32},
        {"views": ((0, 0), (0, 2))},
    ],
)
def test_all_that_determines_the_tokens_names_their_files(changes, described):
    assert described().path(0) == described().path(0) != described(**changes).path(0)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["reserve", "compute"])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(place, arguments, tmp_path, monkeypatch):
    target = Tokens if place == "compute" else tokens
    monkeypatch.setattr(target, place, full_disk)
    message = (
        r"^cannot write .*tuned\.pt\.tokens.*: No space left on device; free some space[^\n]*$"
    )
    with pytest.raises(UsageError, match=message):
        finetune_clip.main(arguments())
    assert list((tmp_path / "tuned.pt.tokens").iterdir()) == []


def test_a_dry_run_prints_disk_and_time_of_the_tokens_and_writes_nothing(
    arguments, tmp_path, capsys
):
    finetune_clip.main(arguments("--steps", 1000, "--dry_run"))
    first, second = capsys.readouterr().out.splitlines()
    line = (
        r"the first 1 blocks are frozen; their outputs for (\d+) views take 0\.00 GB in"
        r" .*tuned\.pt\.tokens until the training ends, \d:\d\d:\d\d to compute"
    )
    assert int(re.fullmatch(line, first)[1]) > 12 and " s a step of 4 images" in second
    assert list(tmp_path.glob("tuned*")) == []


def test_new_views_in_each_step_store_nothing(arguments, capsys):
    finetune_clip.main(arguments("--views", 0, "--dry_run"))
    assert "frozen" not in capsys.readouterr().out


def test_a_step_draws_half_of_the_patches_and_an_evaluation_takes_all(
    arguments, tmp_path, monkeypatch
):
    args = finetune_clip.parse_args(arguments("--holdout", "0", "--keep", "0", "--views", "1"))
    monkeypatch.setattr(tuning, "precision", lambda: ("cpu", torch.float32))
    tower = load_visual(args.clip_model)
    adapters.choose_trained(tower, args.train)
    rows, views = list_rows(args)[0][:1], [(0, 0), (0, 1), (0, tokens.WHOLE)]
    stored = Tokens(tuning.Training(args, tower), rows, views, tmp_path / "t")
    stored.fill()
    records = np.memmap(stored.path(0), stored.record, "r")["tokens"]
    assert len({record.tobytes() for record in records}) == 3  # no two views are equal
    keys = [[(0, 0, step, 0) for step in range(20)], [(0,)]]
    (drawn, _), (whole, labels) = stored.batches(rows, keys)
    assert drawn.shape == (20, 3, 128) and whole.shape == (1, 5, 128)  # class token and patches
    assert labels.tolist() == [rows[0][1]]
    assert (drawn[:, 0] == drawn[0, 0]).all()
    patches = {tuple(row.tolist()) for row in drawn[:, 1:].flatten(0, 1)}
    assert (
        len(patches) == 4 and len({str(sorted(map(tuple, d.tolist()))) for d in drawn[:, 1:]}) > 2
    )


def test_all_drawn_views_are_stored_and_no_other(arguments):
    args = finetune_clip.parse_args(arguments("--steps", "2", "--accumulate", "2"))
    rows = [("", i % 2, "s", f"{i:064x}") for i in range(50)]
    drawn = [
        (row, drawn_view(seed, 3)[0])
        for batch in draws([1 / 50] * 50, args, 0)
        for row, *seed in batch
    ]
    assert drawn_views(rows, args, 2) == sorted(set(drawn)) and len(drawn) == 16
    assert set(drawn_views(rows, args, 1)) == set(drawn[:8])
