"""Nothing that extract_features.py has done is ever lost: not by a kill at any moment, not by images added, changed or
removed, not by another run's leftovers.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from extracting import (
    BLOWS,
    FEW,
    SETTINGS,
    another_encoder,
    command,
    digest,
    extract,
    finish,
    names,
    rows,
    strike,
)
from patience import PATIENCE
from PIL import Image

from detector.encoders import runtime
from detector.features.file import load_features

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("settings")]

MANY = {"train/real/camera": 40, "train/fake/gan": 40, "test/real/camera": 20, "test/fake/gan": 20}
PARTS = 60  # of them in batches of 2


@pytest.fixture(scope="module")
def many(make_folder, tmp_path_factory):
    """120 images that no test changes."""
    return make_folder(tmp_path_factory.mktemp("many"), MANY, seed=1)


# ---- killed ----


@pytest.fixture(scope="module")
def uninterrupted(many, tmp_path_factory):
    """Digest of the file that a run over `many` writes when it is left in peace."""
    output = tmp_path_factory.mktemp("uninterrupted") / "f.npz"
    subprocess.run(
        command(many, output),
        env={**os.environ, **SETTINGS},
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    return digest(output)


def parts_of(output):
    try:
        return sum(
            name.startswith("0") and name.endswith(".npz") for name in os.listdir(f"{output}.parts")
        )
    except (
        FileNotFoundError
    ):  # not there yet, or gone again: glob stumbles where it goes while being read
        return 0


def kill_in_a_run(data_dir, output, more_parts, wait):
    """Start the command, SIGKILL it `wait` seconds after it has stored `more_parts` batches. -> was it still running?"""
    goal = parts_of(output) + more_parts
    with subprocess.Popen(
        command(data_dir, output),
        env={**os.environ, **SETTINGS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        give_up = time.monotonic() + PATIENCE
        while parts_of(output) < goal and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("seed, times", [(0, 1), (1, 1), (2, 1), (3, 4)])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(
    many, uninterrupted, tmp_path, seed, times
):
    output, rng = tmp_path / "out/f.npz", random.Random(seed)
    for _ in range(50):  # on a busy machine, or a very fast one, a blow may come too late
        if any(
            [
                kill_in_a_run(many, output, rng.randrange(1, 50 // times), rng.uniform(0, 0.02))
                for _ in range(times)
            ]
        ):
            break
        shutil.rmtree(output.parent)
    else:
        pytest.fail("no run was met by its blow")
    stored = parts_of(output)
    said = finish(many, output)
    if stored:
        assert f"resuming: {stored} of {PARTS} batches are stored already" in said
    assert digest(output) == uninterrupted
    assert names(output.parent) == ["f.npz"]


def test_a_run_killed_about_the_time_of_the_last_write_goes_on_to_the_same_bytes(
    many, uninterrupted, tmp_path
):
    output, rng = tmp_path / "out/f.npz", random.Random(4)
    for _ in range(3):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        kill_in_a_run(many, output, PARTS, rng.uniform(0, 0.02))
        finish(many, output)
        assert digest(output) == uninterrupted
        assert names(output.parent) == ["f.npz"]


@pytest.mark.parametrize("blow", BLOWS.values(), ids=BLOWS)
def test_a_run_killed_at_the_worst_moment_goes_on_to_the_same_bytes(
    many, uninterrupted, tmp_path, blow
):
    output = tmp_path / "out/f.npz"
    strike(blow, many, output, after=20)
    assert not output.exists() or digest(output) == uninterrupted  # whole or not there
    finish(many, output)
    assert digest(output) == uninterrupted
    assert names(output.parent) == ["f.npz"]


def test_a_run_with_copies_killed_at_the_worst_moment_goes_on_to_the_same_bytes(own, tmp_path):
    output, fresh, views = tmp_path / "out/f.npz", tmp_path / "fresh.npz", ("--views", "2")
    for blow, after in (
        ("in the middle of a part", 3),
        ("between a part's last byte and its name", 5),
        ("in the middle of the file", 0),
    ):
        strike(BLOWS[blow], own, output, *views, after=after)
        assert not output.exists()
    assert "resuming: 12 of 12 batches" in finish(own, output, *views)
    finish(own, fresh, *views)
    assert digest(output) == digest(fresh) and names(output.parent) == ["f.npz"]
    assert load_features(output)["view"].tolist() == [0, 1, 2] * 24


@pytest.mark.parametrize("blow", [blow for blow in BLOWS if blow != "before anything is stored"])
def test_killed_while_images_are_added_the_old_file_stands_until_the_new_one_is_whole(
    own, make_folder, tmp_path, blow
):
    output, added = tmp_path / "out/f.npz", {"train/fake/another": 6, "test/real/another": 6}
    extract(own, output, "--batch_size", 2)
    old, before = rows(load_features(output)), digest(output)
    make_folder(own, added, seed=3)
    strike(BLOWS[blow], own, output, after=4)
    assert digest(output) == before or len(load_features(output)["paths"]) == 36
    new = extract(own, output, "--batch_size", 2)
    assert rows(new, slice(24)) == old and len(new["paths"]) == 36
    assert names(output.parent) == ["f.npz"]


def test_a_run_stopped_by_the_user_goes_on_from_there(many, uninterrupted, tmp_path):
    output = tmp_path / "out/f.npz"
    strike(
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "np.savez = lambda file, **columns: count() and os.kill(os.getpid(), signal.SIGINT) or"
        " savez(file, **columns)",
        many,
        output,
        after=20,
        ends_with=130,
    )
    stored = int(re.search(rf"resuming: (\d+) of {PARTS} batches", finish(many, output))[1])
    assert 17 <= stored <= 25  # those that were at work may end, or not
    assert digest(output) == uninterrupted
    assert names(output.parent) == ["f.npz"]


def test_an_image_changed_between_kill_and_next_run_is_read_again(many, few, tmp_path):
    data = shutil.copytree(many, tmp_path / "data")
    output, changed = tmp_path / "out/f.npz", "train/real/camera/007.jpg"
    strike(BLOWS["in the middle of the file"], data, output, after=0)
    shutil.copyfile(few / "train/real/camera/000.jpg", data / changed)
    assert f"resuming: {PARTS - 1} of {PARTS} batches" in finish(data, output)
    columns = load_features(output)
    assert list(columns["sha256"][columns["paths"] == changed]) == [digest(data / changed)]
    finish(data, tmp_path / "fresh.npz")
    assert digest(output) == digest(tmp_path / "fresh.npz")


# ---- leftovers of other runs ----


def other_flags(tmp_path, monkeypatch):
    return ["--max_pixels", "1000000"]


def other_views(tmp_path, monkeypatch):
    return ["--views", "1"]


def other_batches(tmp_path, monkeypatch):
    return ["--batch_size", "3"]


def other_precision(tmp_path, monkeypatch):
    # Whatever this processor runs by default is called something else.
    forward = runtime.openvino_forward
    monkeypatch.setattr(runtime, "openvino_forward", lambda *a: (forward(*a)[0], "float8"))
    return []


def other_encoder(tmp_path, monkeypatch):
    another_encoder()
    return []


OTHERS = pytest.mark.parametrize(
    "change",
    [other_flags, other_views, other_batches, other_precision, other_encoder],
    ids=["flags", "views", "batch size", "precision", "encoder"],
)


@OTHERS
def test_a_file_made_otherwise_is_set_aside_and_said(
    few, tmp_path, monkeypatch, encoded, capsys, change
):
    output = tmp_path / "out/f.npz"
    extract(few, output)
    before = digest(output)
    columns = extract(few, output, *change(tmp_path, monkeypatch))
    why = "was made with other flags, another encoder or precision"
    assert f"{output} {why}: set aside as {output}.old-1" in capsys.readouterr().err
    assert names(output.parent) == ["f.npz", "f.npz.old-1"]
    assert digest(f"{output}.old-1") == before
    assert (
        sum(encoded) == 24 + len(columns["view"])
        and columns["meta"]["key"] != load_features(f"{output}.old-1")["meta"]["key"]
    )


@OTHERS
def test_parts_left_by_other_runs_are_set_aside_and_said(
    few, tmp_path, monkeypatch, encoded, capsys, change
):
    output = tmp_path / "out/f.npz"
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract(few, output)
    left = {p.name: digest(p) for p in Path(f"{output}.parts").glob("0*.npz")}
    columns = extract(few, output, *change(tmp_path, monkeypatch))
    assert f"set aside as {output}.parts.old-1" in capsys.readouterr().err
    assert names(output.parent) == ["f.npz", "f.npz.parts.old-1"]
    assert (
        left == {p.name: digest(p) for p in Path(f"{output}.parts.old-1").glob("0*.npz")}
        and len(left) == 2
    )
    assert sum(encoded) == 24 + len(columns["view"])


def test_nothing_set_aside_is_ever_overwritten(few, tmp_path):
    output = tmp_path / "out/f.npz"
    written = []
    for limit in (4, 8, 12):
        extract(few, output, "--limit", limit)
        written.append(digest(output))
    assert [digest(f"{output}{end}") for end in (".old-1", ".old-2", "")] == written


def test_a_file_that_cannot_be_read_is_set_aside(few, tmp_path, capsys):
    (tmp_path / "f.npz").write_text("my notes")
    extract(few, tmp_path / "f.npz")
    assert (tmp_path / "f.npz.old-1").read_text() == "my notes"
    assert "cannot be read: set aside" in capsys.readouterr().err


@pytest.mark.parametrize(
    "layout", [{"train/real/x": 4, "train/fake/y": 4}, FEW], ids=["other names", "the same names"]
)
def test_the_file_of_another_folder_is_set_aside(few, make_folder, tmp_path, capsys, layout):
    other = make_folder(tmp_path / "other", {**layout}, seed=2)
    output = tmp_path / "out/f.npz"
    extract(few, output)
    before = digest(output)
    columns = extract(other, output)
    assert "has none of the images of this folder: set aside" in capsys.readouterr().err
    assert digest(f"{output}.old-1") == before
    assert set(columns["sha256"]) == {digest(p) for p in other.rglob("*.jpg")}


# ---- a folder that changes ----


def test_the_command_again_encodes_nothing_and_changes_nothing(few, tmp_path, encoded):
    extract(few, tmp_path / "f.npz")
    before = digest(tmp_path / "f.npz")
    extract(few, tmp_path / "f.npz")
    assert sum(encoded) == 24
    assert digest(tmp_path / "f.npz") == before


def test_images_added_later_are_encoded_alone_and_stand_below_the_old_rows(
    own, few, tmp_path, encoded, capsys
):
    old = extract(own, tmp_path / "f.npz")
    # Before, among and behind the old ones in the order of paths; one name longer than all the old.
    added = [
        "external/fake/a/1.jpg",
        "test/real/camera/0005.jpg",
        "train/real/zz/a-name-much-longer-than-all-before-it.jpg",
    ]
    for i, path in enumerate(added):
        (own / path).parent.mkdir(parents=True, exist_ok=True)
        Image.open(few / f"train/real/camera/00{i}.jpg").rotate(90).save(own / path)
    new = extract(own, tmp_path / "f.npz")
    assert sum(encoded) == 24 + 3
    assert "24 rows stay unchanged" in capsys.readouterr().err
    assert list(new["paths"]) == [*old["paths"], *added]
    assert rows(new, slice(24)) == rows(old)
    assert list(new["splits"][24:]) == ["external", "test", "train"] and list(
        new["labels"][24:]
    ) == [1, 0, 0]
    fresh = extract(own, tmp_path / "fresh.npz")
    where = {path: i for i, path in enumerate(fresh["paths"])}
    np.testing.assert_allclose(
        new["features"], fresh["features"][[where[p] for p in new["paths"]]], rtol=0.05, atol=0.05
    )


def test_a_changed_file_is_encoded_again(own, tmp_path, encoded):
    old = extract(own, tmp_path / "f.npz")
    path = "test/real/camera/001.jpg"
    Image.open(own / path).rotate(180).save(own / path)
    new = extract(own, tmp_path / "f.npz")
    assert sum(encoded) == 24 + 1
    assert list(new["paths"]).count(path) == 1
    same = {p: row for p, row in rows(new).items() if p != path}
    assert same == {p: row for p, row in rows(old).items() if p != path}
    assert rows(new)[path] != rows(old)[path]
    assert new["sha256"][list(new["paths"]).index(path)] == digest(own / path)


def test_a_file_that_only_looks_newer_is_not_encoded_again(own, tmp_path, encoded):
    extract(own, tmp_path / "f.npz")
    os.utime(own / "test/real/camera/001.jpg", (0, 0))
    extract(own, tmp_path / "f.npz")
    assert sum(encoded) == 24


def test_the_row_of_a_vanished_file_is_kept(own, tmp_path, encoded):
    old = extract(own, tmp_path / "f.npz")
    (own / "test/real/camera/001.jpg").unlink()
    shutil.rmtree(own / "train/fake/gan")
    (own / "train/fake/gan").mkdir()
    shutil.copy(own / "test/fake/gan/000.jpg", own / "train/fake/gan/new.jpg")
    new = extract(own, tmp_path / "f.npz")
    assert rows(new, slice(24)) == rows(old)
    assert list(new["paths"][24:]) == ["train/fake/gan/new.jpg"]
    assert sum(encoded) == 24 + 1
