"""extract_features.py never loses finished work.

Kills at any moment, images that are added, changed or removed, and files left by other runs.
"""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from extracting import (
    BLOWS,
    FEW,
    LATE_BLOWS,
    another_encoder,
    digest,
    extract,
    finish,
    names,
    rows,
    start,
    strike,
)
from patience import PATIENCE
from PIL import Image

from detector.encoders import runtime
from detector.features.file import load_features

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("settings")]

PARTS = 80  # of `many`, in batches of 2

# ---- killed runs ----


@pytest.fixture(scope="module")
def uninterrupted(many, tmp_path_factory):
    """Hash of the file that an uninterrupted run over `many` writes."""
    output = tmp_path_factory.mktemp("uninterrupted") / "f.npz"
    finish(many, output)
    return digest(output)


def parts_of(output):
    try:
        files = os.listdir(f"{output}.parts")  # glob fails if the folder is deleted meanwhile
    except FileNotFoundError:
        return 0
    return sum(name.startswith("0") and name.endswith(".npz") for name in files)


def kill_in_a_run(data_dir, output, more_parts, wait):
    """Start the command, SIGKILL it `wait` seconds after it has stored `more_parts` batches.

    -> was it still running?
    """
    goal = parts_of(output) + more_parts
    with start(data_dir, output) as process:
        deadline = time.monotonic() + PATIENCE
        while parts_of(output) < goal and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("seed, times", [(0, 1), (1, 1), (2, 1), (3, 4)])
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(
    many, uninterrupted, tmp_path, seed, times
):
    output, rng = tmp_path / "out/f.npz", random.Random(seed)
    for _ in range(50):  # on a busy or a very fast machine, a kill may come too late
        kills = [
            kill_in_a_run(many, output, rng.randrange(1, 50 // times), rng.uniform(0, 0.02))
            for _ in range(times)
        ]
        if any(kills):
            break
        shutil.rmtree(output.parent)
    else:
        pytest.fail("every run ended before it was killed")
    stored = parts_of(output)
    stderr = finish(many, output).stderr
    if stored:
        assert f"resuming: {stored} of {PARTS} batches are stored already" in stderr
    assert digest(output) == uninterrupted
    assert names(output.parent) == ["f.npz"]


def test_a_run_killed_near_the_last_write_resumes_to_the_same_bytes(many, uninterrupted, tmp_path):
    output, rng = tmp_path / "out/f.npz", random.Random(4)
    for _ in range(3):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        kill_in_a_run(many, output, PARTS, rng.uniform(0, 0.02))
        finish(many, output)
        assert digest(output) == uninterrupted
        assert names(output.parent) == ["f.npz"]


@pytest.mark.parametrize("blow", BLOWS.values(), ids=BLOWS)
def test_a_run_killed_at_the_worst_moment_resumes_to_the_same_bytes(
    many, uninterrupted, tmp_path, blow
):
    output = tmp_path / "out/f.npz"
    strike(blow, many, output, after=20)
    assert not output.exists() or digest(output) == uninterrupted
    finish(many, output)
    assert digest(output) == uninterrupted
    assert names(output.parent) == ["f.npz"]


def test_a_run_with_views_killed_thrice_resumes_to_the_same_bytes(own, tmp_path):
    output, fresh, views = tmp_path / "out/f.npz", tmp_path / "fresh.npz", ("--views", "2")
    for blow, after in (
        ("in the middle of a part", 3),
        ("between a part's last byte and its name", 5),
        ("in the middle of the file", 0),
    ):
        strike(BLOWS[blow], own, output, *views, after=after)
        assert not output.exists()
    assert "resuming: 12 of 12 batches" in finish(own, output, *views).stderr
    finish(own, fresh, *views)
    assert digest(output) == digest(fresh) and names(output.parent) == ["f.npz"]
    assert load_features(output)["view"].tolist() == [0, 1, 2] * 24


@pytest.mark.parametrize("blow", LATE_BLOWS)
def test_killed_while_adding_the_old_file_stays_until_the_new_is_whole(
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


def test_a_run_interrupted_by_the_user_resumes(many, uninterrupted, tmp_path):
    output = tmp_path / "out/f.npz"
    strike(
        # tests in the background ignore SIGINT
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "np.savez = lambda file, **columns: "
        "count() and os.kill(os.getpid(), signal.SIGINT) or savez(file, **columns)",
        many,
        output,
        after=20,
        ends_with=130,
    )
    stderr = finish(many, output).stderr
    stored = int(re.search(rf"resuming: (\d+) of {PARTS} batches", stderr)[1])
    assert 17 <= stored <= 25  # batches in work may or may not end
    assert digest(output) == uninterrupted
    assert names(output.parent) == ["f.npz"]


def test_an_image_changed_after_a_kill_is_read_again(many, few, tmp_path):
    data = shutil.copytree(many, tmp_path / "data")
    output, changed = tmp_path / "out/f.npz", "train/real/camera/007.jpg"
    strike(BLOWS["in the middle of the file"], data, output, after=0)
    shutil.copyfile(few / "train/real/camera/000.jpg", data / changed)
    assert f"resuming: {PARTS - 1} of {PARTS} batches" in finish(data, output).stderr
    columns = load_features(output)
    assert list(columns["sha256"][columns["paths"] == changed]) == [digest(data / changed)]
    finish(data, tmp_path / "fresh.npz")
    assert digest(output) == digest(tmp_path / "fresh.npz")


# ---- files left by other runs ----


def other_precision(monkeypatch):
    """Rename the default precision of this processor."""
    forward = runtime.openvino_forward
    monkeypatch.setattr(runtime, "openvino_forward", lambda *a: (forward(*a)[0], "float8", True))
    return []


def other_encoder(monkeypatch):
    another_encoder()
    return []


OTHERS = pytest.mark.parametrize(
    "change",
    [
        lambda monkeypatch: ["--max_pixels", "1000000"],
        lambda monkeypatch: ["--views", "1"],
        lambda monkeypatch: ["--batch_size", "3"],
        other_precision,
        other_encoder,
    ],
    ids=["flags", "views", "batch size", "precision", "encoder"],
)


@OTHERS
def test_a_file_with_other_settings_is_set_aside(
    few, tmp_path, monkeypatch, encoded, capsys, change
):
    output = tmp_path / "out/f.npz"
    extract(few, output)
    before = digest(output)
    columns = extract(few, output, *change(monkeypatch))
    reason = "was made with other flags, another encoder or precision"
    assert f"{output} {reason}: set aside as {output}.old-1" in capsys.readouterr().err
    assert names(output.parent) == ["f.npz", "f.npz.old-1"]
    assert digest(f"{output}.old-1") == before
    assert sum(encoded) == 24 + len(columns["view"])
    assert columns["meta"]["key"] != load_features(f"{output}.old-1")["meta"]["key"]


@OTHERS
def test_parts_with_other_settings_are_set_aside(
    few, tmp_path, monkeypatch, encoded, capsys, change
):
    output = tmp_path / "out/f.npz"
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract(few, output)
    left = {p.name: digest(p) for p in Path(f"{output}.parts").glob("0*.npz")}
    columns = extract(few, output, *change(monkeypatch))
    assert f"set aside as {output}.parts.old-1" in capsys.readouterr().err
    assert names(output.parent) == ["f.npz", "f.npz.parts.old-1"]
    aside = {p.name: digest(p) for p in Path(f"{output}.parts.old-1").glob("0*.npz")}
    assert left == aside and len(left) == 2
    assert sum(encoded) == 24 + len(columns["view"])


def test_files_set_aside_are_never_overwritten(few, tmp_path):
    output = tmp_path / "out/f.npz"
    written = []
    for limit in (4, 8, 12):
        extract(few, output, "--limit", limit)
        written.append(digest(output))
    assert [digest(f"{output}{end}") for end in (".old-1", ".old-2", "")] == written


def test_an_unreadable_features_file_is_set_aside(few, tmp_path, capsys):
    (tmp_path / "f.npz").write_text("my notes")
    extract(few, tmp_path / "f.npz")
    assert (tmp_path / "f.npz.old-1").read_text() == "my notes"
    assert "cannot be read: set aside" in capsys.readouterr().err


OTHER = {"train/real/x": 4, "train/fake/y": 4}


@pytest.mark.parametrize(
    "counts, flags",
    [(OTHER, []), (FEW, []), (OTHER, ["--prune"])],
    ids=["other names", "the same names", "prune"],
)
def test_the_file_of_another_folder_is_set_aside(few, make_folder, tmp_path, capsys, counts, flags):
    other = make_folder(tmp_path / "other", counts, seed=2)
    output = tmp_path / "out/f.npz"
    extract(few, output)
    before = digest(output)
    columns = extract(other, output, *flags)
    assert "has none of the images of this folder: set aside" in capsys.readouterr().err
    assert digest(f"{output}.old-1") == before
    assert set(columns["sha256"]) == {digest(p) for p in other.rglob("*.jpg")}


# ---- a folder that changes ----


def test_a_second_run_encodes_and_changes_nothing(few, tmp_path, encoded):
    extract(few, tmp_path / "f.npz")
    before = digest(tmp_path / "f.npz")
    extract(few, tmp_path / "f.npz")
    assert sum(encoded) == 24
    assert digest(tmp_path / "f.npz") == before


def test_only_added_images_are_encoded_and_their_rows_come_last(
    own, few, tmp_path, encoded, capsys
):
    old = extract(own, tmp_path / "f.npz")
    # before, between and after the old paths in order; one path is longer than all old paths
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
    before, after = rows(old), rows(new)
    assert after.pop((path, 0)) != before.pop((path, 0))
    assert after == before
    assert new["sha256"][list(new["paths"]).index(path)] == digest(own / path)


def test_a_file_with_only_a_new_time_is_not_encoded_again(own, tmp_path, encoded):
    extract(own, tmp_path / "f.npz")
    os.utime(own / "test/real/camera/001.jpg", (0, 0))
    extract(own, tmp_path / "f.npz")
    assert sum(encoded) == 24


def test_the_row_of_a_deleted_file_is_kept(own, tmp_path, encoded):
    old = extract(own, tmp_path / "f.npz")
    (own / "test/real/camera/001.jpg").unlink()
    shutil.rmtree(own / "train/fake/gan")
    (own / "train/fake/gan").mkdir()
    shutil.copy(own / "test/fake/gan/000.jpg", own / "train/fake/gan/new.jpg")
    new = extract(own, tmp_path / "f.npz")
    assert rows(new, slice(24)) == rows(old)
    assert list(new["paths"][24:]) == ["train/fake/gan/new.jpg"]
    assert sum(encoded) == 24 + 1
