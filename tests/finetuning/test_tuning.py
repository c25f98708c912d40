"""finetune_clip.py: a checkpoint that every command takes, interrupted or not.

No image of a held-out source trains it.
"""

import errno
import json
import os
import re
import shutil

import clip
import numpy as np
import pytest
import small_clip
import torch
from commands import assert_one_line_error

import finetune_clip
from detector.base.errors import DetectorError
from detector.base.files import only_writer, sha256
from detector.encoders import prepare, runtime
from detector.features.file import load_features
from detector.finetuning import images, tuning
from detector.finetuning.descent import clip_state_dict

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = ["--steps", "4", "--every", "2", "--batch_size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_folder):
    """Three sources of six images for each class."""
    return make_folder(
        tmp_path_factory.mktemp("images"),
        {f"train/{label}/s{i}": 6 for label in ("real", "fake") for i in range(3)},
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return small_clip.save_state_dict(
        small_clip.small_vit(None, resolution=32), tmp_path_factory.mktemp("start") / "start.pt"
    )


@pytest.fixture
def tune(folder, start, tmp_path):
    """Function: flags -> path of the checkpoint that a training in this process wrote."""

    def run(*flags, output=tmp_path / "tuned.pt", clip_model=start):
        finetune_clip.main(
            [
                "--clip_model",
                str(clip_model),
                "--data_dir",
                str(folder),
                "--output",
                str(output),
                *STEPS,
                *map(str, flags),
            ]
        )
        return output

    return run


def card_of(path):
    return json.loads(path.with_suffix(".json").read_text())


def hashes(folder, pattern):
    return {sha256(path.read_bytes())[:16] for path in folder.glob(pattern)}


@pytest.mark.long
def test_a_tuned_checkpoint_goes_through_the_other_commands_and_the_images_it_has_seen_are_marked(
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
    seen = columns["splits"] == "seen"
    assert {digest[:16] for digest in columns["sha256"][seen]} == set(
        card["seen"]
    ) and seen.sum() == card["images"] > 0
    held = {
        f"{('real', 'fake')[label]}/{source}"
        for label, source in zip(columns["labels"], columns["sources"])
        if f"{('real', 'fake')[label]}/{source}" in card["held_out"]
    }
    assert held == set(card["held_out"]) and len(held) == 2
    for label, source, was_seen, digest in zip(
        columns["labels"], columns["sources"], seen, columns["sha256"]
    ):
        held_out = f"{('real', 'fake')[label]}/{source}" in card["held_out"]
        assert was_seen == (not held_out and not images.kept_back(digest, 0.5))
    assert f"{seen.sum()} images were used to train this encoder" in result.stderr
    assert card["arguments"]["train"] == "lora:4" and card["arguments"]["start"].startswith(
        "sha256:"
    )


def test_what_is_not_trained_is_stored_bit_for_bit_and_what_is_has_changed(start, tune):
    before, after = torch.load(start), torch.load(tune("--train", "norms"))
    changed = {
        name
        for name in before
        if name.startswith("visual.") and not torch.equal(before[name], after[name])
    }
    assert before.keys() == after.keys() and changed and all("ln_" in name for name in changed)


def test_clip_load_and_the_prepared_encoder_give_the_same_features_of_a_tuned_checkpoint(
    tune, photos
):
    tuned, images = tune("--train", "lora:4"), small_clip.crops(photos)
    model, transform = clip.load(str(tuned), device="cpu")
    with torch.inference_mode():
        theirs = model.encode_image(torch.stack([transform(image) for image in images])).numpy()
    encoder = runtime.Encoder(prepare.ensure_encoder(str(tuned)), "cpu", "float32")
    ours = encoder.encode(small_clip.pixels_of(images, encoder.resolution))
    assert small_clip.centred_cosines(ours, theirs).min() > 0.9999


def test_what_the_start_has_seen_its_child_has_seen_too(start, tune, tmp_path):
    first = shutil.copy(start, tmp_path / "first.pt")
    (tmp_path / "first.json").write_text(json.dumps({"seen": ["0123456789abcdef"]}))
    card = card_of(tune(clip_model=first))
    assert "0123456789abcdef" in card["seen"] and len(card["seen"]) == card["images"] + 1


def test_the_training_stops_after_evaluations_without_gain_and_the_best_weights_are_stored(
    tune, monkeypatch, capsys
):
    scores, states = iter([0.6, 0.9, 0.7, 0.8]), []

    def scripted(model, *_):
        states.append(clip_state_dict(model[0]))
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
def test_an_interrupted_training_goes_on_to_the_same_weights(
    train, tune, tmp_path, monkeypatch, capsys
):
    class Killed(BaseException):
        pass

    calls = []

    def better_each_time(*_):
        calls.append(1)
        if len(calls) == 4:  # two evaluations of the whole training, one of the other
            raise Killed
        return float(len(calls))

    monkeypatch.setattr(tuning, "held_auc", better_each_time)
    whole = tune("--train", train, output=tmp_path / "whole.pt")
    with pytest.raises(Killed):
        tune("--train", train)
    assert not (tmp_path / "tuned.pt").exists()
    with pytest.raises(
        DetectorError, match="tuned.pt.state is the state of a training with other arguments"
    ):
        tune("--train", train, "--lr", 0.5)
    capsys.readouterr()
    resumed = torch.load(tune("--train", train))
    assert "resuming from step 2" in capsys.readouterr().err
    whole = torch.load(whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert sorted(p.name for p in tmp_path.glob("tuned*")) == ["tuned.json", "tuned.pt"]


def test_a_dry_run_tells_what_it_will_cost_and_writes_nothing(tune, tmp_path, capsys):
    tune("--train", "lora:4", "--accumulate", 2, "--checkpointing", "--steps", 1000, "--dry_run")
    out, err = capsys.readouterr()
    line = (
        r"--train lora:4: ([\d,]+) of ([\d,]+) parameters; cpu, (float32|bfloat16); \d+\.\d\d s a"
        r" step of 8 images, \d+:\d\d:\d\d an epoch "
        r"of \d+, \d+:\d\d:\d\d for 1,000 steps; peak memory \d+\.\d\d GB\n"
    )
    trained, everything = (
        int(number.replace(",", "")) for number in re.fullmatch(line, out).groups()[:2]
    )
    # two blocks of width 128: rank times (in + out) of in_proj, out_proj, c_fc and c_proj
    assert trained == 2 * 4 * ((128 + 384) + (128 + 128) + (128 + 512) + (512 + 128)) < everything
    assert [p.name for p in tmp_path.glob("tuned*")] == []


def test_a_training_says_what_it_will_cost_from_its_first_steps_and_runs_without_sources(
    tune, capsys
):
    card = card_of(tune("--holdout", 0, "--keep", 0))
    err = capsys.readouterr().err
    assert (
        len(re.findall(r"--train lora:8: .* for 4 steps; peak memory", err)) == 1
        and "AUC" not in err
    )
    assert card["images"] == 36 and "auc" not in card


def test_the_head_finds_the_swapped_channels_on_sources_never_trained_on(tune, capsys):
    tune(
        "--train",
        "blocks:2",
        "--steps",
        40,
        "--every",
        20,
        "--batch_size",
        16,
        "--lr",
        1e-3,
        "--keep",
        0,
    )
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
def test_what_cannot_be_done_is_one_line_that_names_the_value(
    flags, words, start, tmp_path, make_folder, monkeypatch
):
    make_folder(
        tmp_path / "data",
        {
            **{f"train/{label}/s{i}": 2 for label in ("real", "fake") for i in (0, 1)},
            "val/real/a": 2,
            "val/fake/a": 2,
            "test/real/a": 1,
        },
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DetectorError) as error:
        finetune_clip.main(
            [
                "--data_dir",
                "data",
                "--batch_size",
                "2",
                *(str(start) if flag == "START" else flag for flag in flags),
            ]
        )
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(
        error.value
    )
    assert {p.name for p in tmp_path.iterdir()} == {"data", "home"}


@pytest.mark.parametrize("left", [b"", b"garbage", b"PK\3\4garbage"])
def test_a_damaged_state_is_one_line(left, tune, tmp_path):
    (tmp_path / "tuned.pt.state").write_bytes(left)
    with pytest.raises(DetectorError, match="tuned.pt.state is damaged.*remove it first"):
        tune("--holdout", 0)


def test_another_file_of_torch_is_no_state(tune, tmp_path):
    torch.save({"step": 1}, tmp_path / "tuned.pt.state")
    with pytest.raises(DetectorError, match="no state of a training"):
        tune("--holdout", 0)


def test_the_second_training_with_an_output_says_who_holds_it(tune, tmp_path):
    with only_writer(tmp_path / "tuned.pt", ""):
        with pytest.raises(DetectorError, match=f"--output .*process {os.getpid()} is writing it"):
            tune("--holdout", 0)


def test_a_checkpoint_is_not_there_without_its_card(tune, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(DetectorError, match="cannot write .*tuned.json: No space left"):
        tune("--holdout", 0)
    assert [path.name for path in tmp_path.glob("tuned.*")] == ["tuned.pt.state"]


@pytest.mark.long
def test_such_a_line_ends_the_command_with_exit_code_2(start, folder, script):
    flags = ["--data_dir", folder, "--clip_model", start, "--train", "blocks:3"]
    assert_one_line_error(script("finetune_clip.py", *flags), "--train blocks:3", "2 blocks")


def test_without_a_flag_the_training_starts_from_clip_model_else_from_openais_large_one(
    start, folder, monkeypatch
):
    flags = ["--data_dir", str(folder)]
    assert finetune_clip.parse_args(flags).clip_model == "ViT-L/14"
    monkeypatch.setenv("CLIP_MODEL", str(start))
    args = finetune_clip.parse_args(flags)
    assert args.clip_model == str(start) and args.start.startswith("sha256:")


def test_memory_that_does_not_suffice_is_one_line(tune, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning, "descend", full)
    with pytest.raises(
        DetectorError, match="^--batch_size 4: the GPU's memory does not suffice.*--checkpointing$"
    ):
        tune()


def test_the_scores_of_an_evaluation_do_not_depend_on_its_batches(folder, start):
    tower = prepare.load_visual(str(start))
    model = torch.nn.Sequential(tower, torch.nn.Linear(tower.output_dim, 1)).eval()
    rows = [
        (str(path), int("fake" in str(path)), "s", "")
        for path in sorted(folder.glob("train/*/s0/*"))
    ]
    found = [
        tuning.held_auc(model, rows, 32, size, torch.autocast("cpu", enabled=False), "cpu", 0)
        for size in (5, 12)
    ]
    assert found[0] == pytest.approx(found[1]) and 0 < found[0] < 1 and not np.isnan(found[0])
