"""finetune_clip.py: a checkpoint for every command, also after an interruption.

No image of a held-out source trains it.
"""

import errno
import io
import json
import os
import re
import shutil
from argparse import Namespace
from unittest.mock import Mock

import clip
import numpy as np
import pytest
import small_clip
import torch
from commands import assert_one_line_error

import finetune_clip
from detector.base.constants import CLASSES
from detector.base.errors import DetectorError
from detector.base.files import only_writer
from detector.encoders import prepare, runtime
from detector.features.file import load_features
from detector.finetuning import images, tuning
from detector.finetuning.descent import clip_state_dict

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = ["--steps", "4", "--every", "2", "--batch_size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_folder):
    """Three sources of six images for each class."""
    counts = {f"train/{label}/s{i}": 6 for label in CLASSES for i in range(3)}
    return make_folder(tmp_path_factory.mktemp("images"), counts)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    tower = small_clip.small_vit(None, resolution=32)
    return small_clip.save_state_dict(tower, tmp_path_factory.mktemp("start") / "start.pt")


@pytest.fixture
def tune(folder, start, tmp_path):
    """Function: flags -> path of the checkpoint that a training in this process wrote."""

    def run(*flags, output=tmp_path / "tuned.pt", clip_model=start):
        given = ["--clip_model", clip_model, "--data_dir", folder, "--output", output]
        finetune_clip.main([*map(str, given), *STEPS, *map(str, flags)])
        return output

    return run


def card_of(path):
    return json.loads(path.with_suffix(".json").read_text())


@pytest.mark.long
def test_the_other_commands_take_a_tuned_checkpoint_and_mark_seen_images(
    folder, tune, script, tmp_path
):
    tuned = tune("--train", "lora:4")
    model, _ = clip.load(str(tuned), device="cpu")
    assert model.visual.input_resolution == 32
    result = script("prepare_clip.py", "--clip_model", tuned)
    assert result.returncode == 0, result.stderr
    result = script("extract_features.py", "--data_dir", folder, CLIP_MODEL=str(tuned))
    assert result.returncode == 0, result.stderr
    columns, card = load_features(tmp_path / "features.npz"), card_of(tuned)
    seen, digests = columns["splits"] == "seen", columns["sha256"]
    assert {digest[:16] for digest in digests[seen]} == set(card["seen"])
    assert seen.sum() == card["images"] > 0
    pairs = zip(columns["labels"], columns["sources"], strict=True)
    sources = np.array([f"{CLASSES[label]}/{source}" for label, source in pairs])
    held_out = np.isin(sources, card["held_out"])
    assert set(sources[held_out]) == set(card["held_out"]) and len(card["held_out"]) == 2
    kept = np.array([images.kept_back(digest, 0.5) for digest in digests])
    assert np.array_equal(seen, ~held_out & ~kept)
    assert f"{seen.sum()} images were used to train this encoder" in result.stderr
    assert card["arguments"]["train"] == "lora:4"
    assert card["arguments"]["start"].startswith("sha256:")


def test_only_trained_weights_change(start, tune):
    before, after = torch.load(start), torch.load(tune("--train", "norms"))
    visual = [name for name in before if name.startswith("visual.")]
    changed = [name for name in visual if not torch.equal(before[name], after[name])]
    assert before.keys() == after.keys() and changed and all("ln_" in name for name in changed)


def test_clip_load_and_the_prepared_encoder_give_the_same_features(tune, photos):
    tuned, images = tune("--train", "lora:4"), small_clip.crops(photos)
    model, transform = clip.load(str(tuned), device="cpu")
    with torch.inference_mode():
        theirs = model.encode_image(torch.stack([transform(image) for image in images])).numpy()
    encoder = runtime.Encoder(prepare.ensure_encoder(str(tuned)), "cpu", "float32")
    ours = encoder.encode(small_clip.pixels_of(images, encoder.resolution))
    assert small_clip.centred_cosines(ours, theirs).min() > 0.9999


def test_images_that_the_start_has_seen_stay_seen(start, tune, tmp_path):
    first = shutil.copy(start, tmp_path / "first.pt")
    (tmp_path / "first.json").write_text(json.dumps({"seen": ["0123456789abcdef"]}))
    card = card_of(tune(clip_model=first))
    assert "0123456789abcdef" in card["seen"] and len(card["seen"]) == card["images"] + 1


def test_training_stops_without_a_gain_and_stores_the_best_weights(tune, monkeypatch, capsys):
    scores, states = iter([0.6, 0.9, 0.7, 0.8]), []

    def scripted(model, *_):
        states.append(clip_state_dict(model[0].tower))
        return next(scores)

    monkeypatch.setattr(tuning, "held_auc", scripted)
    tuned = tune("--train", "blocks:1", "--steps", 20, "--patience", 2)
    stored = torch.load(tuned)
    assert len(states) == 4 and "best 0.900 at step 4" in capsys.readouterr().err
    named = [name for name in stored if name.startswith("visual.transformer.resblocks.1.")]
    assert all(torch.equal(stored[name], states[1][name]) for name in named)
    assert not all(torch.equal(stored[name], states[3][name]) for name in named)
    assert (card_of(tuned)["auc"], card_of(tuned)["step"]) == (0.9, 4)


@pytest.mark.parametrize("train", ["lora:2", "blocks:1"])
def test_a_resumed_training_gives_the_same_weights(train, tune, tmp_path, monkeypatch, capsys):
    # the whole training, one evaluation until the interruption, and the rest
    aucs = Mock(side_effect=[0.1, 0.2, 0.3, KeyboardInterrupt, 0.5])
    monkeypatch.setattr(tuning, "held_auc", aucs)
    whole = tune("--train", train, output=tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        tune("--train", train)
    assert not (tmp_path / "tuned.pt").exists()
    message = "tuned.pt.state is the state of a training with other arguments"
    with pytest.raises(DetectorError, match=message):
        tune("--train", train, "--lr", 0.5)
    capsys.readouterr()
    resumed = torch.load(tune("--train", train))
    assert "resuming from step 2" in capsys.readouterr().err
    torch.testing.assert_close(resumed, torch.load(whole), rtol=0, atol=0)
    assert sorted(p.name for p in tmp_path.glob("tuned*")) == ["tuned.json", "tuned.pt"]


def test_a_dry_run_prints_the_cost_and_writes_nothing(tune, tmp_path, capsys):
    tune("--train", "lora:4", "--accumulate", 2, "--checkpointing", "--steps", 1000, "--dry_run")
    out, err = capsys.readouterr()
    line = (
        r"--train lora:4: ([\d,]+) of ([\d,]+) parameters; cpu, (float32|bfloat16); \d+\.\d\d s a"
        r" step of 8 images, \d+:\d\d:\d\d an epoch of \d+, \d+:\d\d:\d\d for 1,000 steps; peak"
        r" memory \d+\.\d\d GB\n"
    )
    numbers = re.fullmatch(line, out).groups()[:2]
    trained, total = (int(number.replace(",", "")) for number in numbers)
    # two blocks of width 128: rank times (in + out) of in_proj, out_proj, c_fc and c_proj
    assert trained == 2 * 4 * ((128 + 384) + (128 + 128) + (128 + 512) + (512 + 128)) < total
    assert [p.name for p in tmp_path.glob("tuned*")] == []


def test_a_training_without_holdout_logs_its_cost_once_and_no_auc(tune, capsys):
    card = card_of(tune("--holdout", 0, "--keep", 0))
    err = capsys.readouterr().err
    assert len(re.findall(r"--train lora:8: .* for 4 steps; peak memory", err)) == 1
    assert "AUC" not in err and card["images"] == 36 and "auc" not in card


def test_the_head_detects_swapped_channels_on_held_out_sources(tune, capsys):
    steps = ["--steps", 40, "--every", 20, "--batch_size", 16]
    tune("--train", "blocks:2", "--lr", 1e-3, "--keep", 0, *steps)
    assert max(map(float, re.findall(r"AUC (\d\.\d+) on", capsys.readouterr().err))) > 0.8


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--clip_model", "START", "--train", "all"], ["--train all", "blocks:K, norms or lora:R"]),
        (["--clip_model", "START", "--train", "blocks:0"], ["--train blocks:0", "at least 1"]),
        (["--clip_model", "START", "--train", "blocks:9"], ["--train blocks:9", "2 blocks"]),
        (["--clip_model", "START", "--train", "lora:500"], ["--train lora:500", "at most 128"]),
        (["--clip_model", "nowhere.pt"], ["'nowhere.pt'", "neither a file"]),
        (["--clip_model", __file__], [__file__, "not a CLIP checkpoint"]),
        (["--clip_model", "START", "--output", "START"], ["--output", "another file"]),
        (["--clip_model", "START", "--output", "tuned.json"], ["tuned.json", ".pt"]),
        (["--clip_model", "START", "--output", "/dev/null"], ["--output /dev/null", "device"]),
        (["--clip_model", "START", "--accumulate", "0"], ["--accumulate 0", "at least 1"]),
        (["--clip_model", "START", "--steps", "0"], ["--steps 0", "at least 1"]),
        (["--clip_model", "START", "--last", "0"], ["--last 0", "at least 1"]),
        (["--clip_model", "START", "--last", "3"], ["--last 3", "2 transformer blocks"]),
        (
            ["--clip_model", "START", "--train", "blocks:1", "--last", "1"],
            ["--last 1", "lora:R or norms"],
        ),
        (["--clip_model", "START", "--views", "-1"], ["--views -1", "at least 0"]),
        (["--clip_model", "START", "--holdout", "2"], ["--holdout 2", "between 0 and 1"]),
        (["--clip_model", "START", "--lr", "0"], ["--lr 0"]),
        (
            ["--clip_model", "START", "--train_splits", "test"],
            ["no images of both classes", "test"],
        ),
        (
            ["--clip_model", "START", "--keep", "1"],
            ["no images of both classes to train on", "--keep"],
        ),
        (
            ["--clip_model", "START", "--train_splits", "val"],
            ["--holdout 0.2", "'real' has 1 source", "--holdout 0 "],
        ),
        (
            ["--clip_model", "START", "--lr", "1e30", "--holdout", "0", "--steps", "9"],
            ["no number", "--lr"],
        ),
    ],
)
def test_an_impossible_request_is_one_line_that_names_the_value(
    flags, words, start, tmp_path, make_folder, monkeypatch
):
    counts = {f"train/{label}/s{i}": 2 for label in CLASSES for i in (0, 1)}
    counts |= {"val/real/a": 2, "val/fake/a": 2, "test/real/a": 1}
    make_folder(tmp_path / "data", counts)
    monkeypatch.chdir(tmp_path)
    given = [str(start) if flag == "START" else flag for flag in flags]
    with pytest.raises(DetectorError) as error:
        finetune_clip.main(["--data_dir", "data", "--batch_size", "2", *given])
    message = str(error.value)
    assert "\n" not in message and [word for word in words if word not in message] == [], message
    assert {p.name for p in tmp_path.iterdir()} == {"data", "home"}


def saved_by_torch():
    buffer = io.BytesIO()
    torch.save({"step": 1}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("data", [b"", b"garbage", b"PK\3\4garbage", saved_by_torch()])
def test_a_damaged_or_foreign_state_is_refused(data, tune, tmp_path):
    (tmp_path / "tuned.pt.state").write_bytes(data)
    message = "tuned.pt.state is damaged, or no state of a training: remove it first"
    with pytest.raises(DetectorError, match=message):
        tune("--holdout", 0)


def test_a_second_training_with_the_same_output_names_the_process_of_the_first(tune, tmp_path):
    with only_writer(tmp_path / "tuned.pt", ""):
        with pytest.raises(DetectorError, match=f"--output .*process {os.getpid()} is writing it"):
            tune("--holdout", 0)


def test_without_its_card_no_checkpoint_is_written(tune, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(json, "dumps", Mock(side_effect=full))
    with pytest.raises(DetectorError, match="cannot write .*tuned.json: No space left"):
        tune("--holdout", 0)
    assert [path.name for path in tmp_path.glob("tuned.*")] == ["tuned.pt.state"]


@pytest.mark.long
def test_a_refusal_ends_the_command_with_exit_code_2(start, folder, script):
    flags = ["--data_dir", folder, "--clip_model", start, "--train", "blocks:3"]
    assert_one_line_error(script("finetune_clip.py", *flags), "--train blocks:3", "2 blocks")


def test_the_default_start_is_clip_model_or_vit_l_14(start, folder, monkeypatch):
    flags = ["--data_dir", str(folder)]
    assert finetune_clip.parse_args(flags).clip_model == "ViT-L/14"
    monkeypatch.setenv("CLIP_MODEL", str(start))
    args = finetune_clip.parse_args(flags)
    assert args.clip_model == str(start) and args.start.startswith("sha256:")


def test_insufficient_gpu_memory_is_one_line_with_the_remedy(tune, monkeypatch):
    full = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(tuning, "descend", Mock(side_effect=full))
    message = "^--batch_size 4: the GPU's memory does not suffice.*--checkpointing$"
    with pytest.raises(DetectorError, match=message):
        tune()


def test_the_scores_of_an_evaluation_do_not_depend_on_its_batches(folder, start):
    tower = prepare.load_visual(str(start))
    model = torch.nn.Sequential(tower, torch.nn.Linear(tower.output_dim, 1)).eval()
    paths = sorted(map(str, folder.glob("train/*/s0/*")))
    rows = [(path, int("fake" in path), "s", "") for path in paths]
    autocast = torch.autocast("cpu", enabled=False)
    training = Namespace(tower=tower, workers=0, device="cpu")

    def auc(size):
        keys = [[(i,) for i in range(k, min(k + size, 12))] for k in range(0, 12, size)]
        return tuning.held_auc(model, tuning.Pixels(training).batches(rows, keys), autocast)

    assert auc(5) == pytest.approx(auc(12)) and 0 < auc(5) < 1
