"""A folder grows and shrinks under its features file: reports of new images, and --prune."""

import shutil

import numpy as np
import pytest
from extracting import BLOWS, LATE_BLOWS, digest, extract, names, rows, strike
from made_up import make_columns, with_views
from PIL import Image

from detector.features import growing
from detector.features.columns import join_columns
from detector.features.file import load_features
from detector.features.growing import digests_of, whats_new, words
from detector.images.facts import pairs_between

pytestmark = pytest.mark.usefixtures("settings")


def grown(old, *more):
    """Report about a file of the columns `old` with more columns appended."""
    return whats_new(digests_of(old), join_columns([old, *more]))


# ---- reports of new images ----


def test_new_images_are_counted_by_class_split_and_source():
    old, new = make_columns(), make_columns(real=3, fake=6, seed=1)
    old["sources"][:] = "camera"
    new["sources"] = np.array(["camera"] * 3 + ["flux"] * 2 + ["gan"] * 3 + [""])
    news = grown(old, new)
    assert news == {
        "images": 9,
        "changed": 0,
        "moved": 0,
        "alike": [],
        "other label": [],
        "cells": {"test/real": 1, "test/fake": 2, "train/real": 2, "train/fake": 4},
        "known sources": {"camera": 3},
        "new sources": {"gan": 3, "flux": 2},
    }
    assert words(news) == [
        "new images: 9 (test/real 1, test/fake 2, train/real 2, train/fake 4)",
        "from known sources: camera 3",
        "from new sources: gan 3, flux 2",
    ]


def test_degraded_copies_are_not_counted():
    old, new = make_columns(), make_columns(real=3, fake=6, seed=1)
    assert grown(with_views(old, 2), with_views(new, 2)) == grown(old, new)


def test_nothing_new_gives_no_report():
    assert words(grown(make_columns())) == []


def test_changed_and_moved_files_are_not_new():
    old = make_columns()
    now = {name: column.copy() for name, column in old.items()}
    now["sha256"][7] = "other bytes"
    now["paths"][9], now["labels"][9] = "elsewhere", 1  # a corrected label
    assert words(whats_new(digests_of(old), now)) == ["changed: 1; moved: 1"]


def test_bytes_of_an_overwritten_file_count_as_moved():
    old = make_columns()
    extra = {name: column[:1].copy() for name, column in old.items()}
    now = join_columns([old, {**extra, "paths": np.array(["elsewhere"])}])
    # a copy is new as long as the first file has the same bytes
    assert words(whats_new(digests_of(old), now))[0].startswith("new images: 1 ")
    now["sha256"][0] = "other bytes"
    assert words(whats_new(digests_of(old), now)) == ["changed: 1; moved: 1"]


def test_look_alikes_are_reported_with_contradicting_labels_apart():
    old, new = make_columns(), make_columns(real=3, fake=3, seed=1)  # real images come first
    new["thumb"][[0, 1, 2, 5]] = old["thumb"][[5, 70, 80, 90]]
    news = grown(old, new)
    assert news["alike"] == [
        ["1/00000.jpg", "0/00005.jpg"],
        ["1/00001.jpg", "0/00070.jpg"],
        ["1/00002.jpg", "0/00080.jpg"],
        ["1/00005.jpg", "0/00090.jpg"],
    ]
    assert news["other label"] == news["alike"][1:3]
    alike = "new images that look like an earlier image"
    assert words(news)[1:] == [
        f"{alike}: 4, such as 1/00000.jpg and 0/00005.jpg; 1/00001.jpg and 0/00070.jpg; "
        "1/00002.jpg and 0/00080.jpg",
        f"warning: {alike} of the other label: 2, such as 1/00001.jpg and 0/00070.jpg; "
        "1/00002.jpg and 0/00080.jpg",
    ]


def test_an_image_with_many_look_alikes_is_reported_once():
    old, new = make_columns(), make_columns(real=1, fake=0, seed=1)
    old["thumb"][[3, 4, 100]] = new["thumb"][0]
    news = grown(old, new)
    assert news["alike"] == [["1/00000.jpg", "0/00003.jpg"]]
    assert news["other label"] == [["1/00000.jpg", "0/00100.jpg"]]


def test_look_alikes_among_new_images_are_not_reported():
    new = make_columns(real=2, fake=2, seed=1)
    new["thumb"][:] = new["thumb"][0]
    assert grown(make_columns(), new)["alike"] == []


def test_flat_images_look_alike_only_with_equal_bytes():
    old, new = make_columns(), make_columns(real=2, fake=0, seed=1)
    old["thumb"][:2], new["thumb"][:] = 255, 255
    new["sha256"][1] = old["sha256"][1]
    assert grown(old, new)["alike"] == [["1/00001.jpg", "0/00001.jpg"]]


def test_an_unlabelled_image_contradicts_no_label():
    old, new = make_columns(), make_columns(real=1, fake=0, seed=1)
    new["thumb"][0], new["labels"][0] = old["thumb"][100], -1
    news = grown(old, new)
    assert len(news["alike"]) == 1 and news["other label"] == []
    assert news["cells"] == {"train/unlabelled": 1}


@pytest.mark.parametrize("number, ends_with", [(10, ", s09 1"), (13, ", s09 1 and 3 more")])
def test_the_ten_largest_sources_are_named(number, ends_with):
    new = make_columns(real=number, fake=1, seed=1)
    new["sources"] = np.array([*(f"s{i:02d}" for i in range(number)), "s05"])
    line = words(grown(make_columns(), new))[1]
    assert line.startswith("from new sources: s05 2, s00 1, ") and line.endswith(ends_with)


def test_only_new_images_are_compared_with_those_before(monkeypatch):
    """Comparing all pairs of 49,000 images would be 49 times the work for 1,000 new ones."""
    compared = []

    def watched(thumb, others):
        compared.append((len(thumb), len(others)))
        return pairs_between(thumb, others)

    monkeypatch.setattr(growing, "pairs_between", watched)
    old, new = make_columns(real=240, fake=240), make_columns(real=5, fake=5, seed=1)
    new["thumb"][:] = old["thumb"][:10]
    assert len(grown(old, new)["alike"]) == 10
    assert compared == [(10, 480)]


# ---- the command ----


def add_copy(own, of, to):
    (own / to).parent.mkdir(parents=True, exist_ok=True)
    Image.open(own / of).save(own / to, quality=70)


@pytest.mark.parametrize("views", [0, 2])
def test_an_extraction_reports_added_images(own, tmp_path, capsys, views):
    extract(own, tmp_path / "f.npz", "--views", views)
    first = capsys.readouterr()
    assert "new images" not in first.err
    add_copy(own, "train/real/camera/000.jpg", "train/real/camera/again.jpg")
    add_copy(own, "train/real/camera/001.jpg", "train/fake/flux/wrong.jpg")
    Image.open(own / "test/real/camera/001.jpg").rotate(180).save(own / "test/real/camera/001.jpg")
    (own / "test/fake/gan/001.jpg").rename(own / "test/real/camera/right.jpg")
    extract(own, tmp_path / "f.npz", "--views", views)
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-5:] == [
        "new images: 2 (train/real 1, train/fake 1); changed: 1; moved: 1",
        "from known sources: camera 1",
        "from new sources: flux 1",
        "new images that look like an earlier image: 2, such as train/fake/flux/wrong.jpg and "
        "train/real/camera/001.jpg; train/real/camera/again.jpg and train/real/camera/000.jpg",
        "warning: new images that look like an earlier image of the other label: 1, such as "
        "train/fake/flux/wrong.jpg and train/real/camera/001.jpg",
    ]
    assert len(captured.out.splitlines()) == 1
    extract(own, tmp_path / "f.npz", "--views", views)
    assert "new images" not in capsys.readouterr().err


# ---- --prune ----

GONE = ["test/real/camera/001.jpg", "train/fake/gan/003.jpg"]


@pytest.fixture
def shrunk(own, tmp_path, capsys):
    """Extract the 24 images with a copy each, then delete two. -> (folder, features file)"""
    extract(own, tmp_path / "out/f.npz", "--views", 1)
    for path in GONE:
        (own / path).unlink()
    capsys.readouterr()
    return own, tmp_path / "out/f.npz"


def test_prune_drops_and_reports_the_rows_of_deleted_files(shrunk, capsys, encoded):
    data, output = shrunk
    old = load_features(output)
    new = extract(data, output, "--views", 1, "--prune")
    assert rows(new) == {key: row for key, row in rows(old).items() if key[0] not in GONE}
    assert len(new["paths"]) == 44 and new["meta"]["counts"]["images"] == 22 and encoded == []
    stderr = capsys.readouterr().err
    assert "44 rows stay unchanged" in stderr and "4 rows of deleted files are dropped\n" in stderr


def test_without_prune_rows_of_deleted_files_stay(shrunk, capsys):
    data, output = shrunk
    assert len(extract(data, output, "--views", 1)["paths"]) == 48
    assert "4 of these rows belong to deleted files; --prune drops them" in capsys.readouterr().err


def test_prune_does_not_change_the_key(shrunk, capsys):
    data, output = shrunk
    before = load_features(output)["meta"]["key"]
    pruned = extract(data, output, "--views", 1, "--prune")
    assert pruned["meta"]["key"] == before and names(output.parent) == ["f.npz"]
    pruned_bytes = digest(output)
    extract(data, output, "--views", 1)
    assert digest(output) == pruned_bytes and "set aside" not in capsys.readouterr().err


def test_prune_of_a_complete_folder_changes_nothing(few, tmp_path, capsys):
    extract(few, tmp_path / "f.npz", "--prune")  # the first run has nothing to prune
    before = digest(tmp_path / "f.npz")
    extract(few, tmp_path / "f.npz", "--prune")
    assert digest(tmp_path / "f.npz") == before and "deleted files" not in capsys.readouterr().err


def test_prune_reports_a_moved_image(shrunk, capsys):
    data, output = shrunk
    shutil.move(data / "train/real/camera/000.jpg", data / "train/fake/gan/right.jpg")
    extract(data, output, "--views", 1, "--prune")
    assert capsys.readouterr().err.splitlines()[-1] == "moved: 1"


@pytest.mark.slow
@pytest.mark.parametrize("blow", LATE_BLOWS)
def test_killed_while_pruning_the_old_file_stays_until_the_new_is_whole(
    own, make_folder, tmp_path, blow
):
    output, added = tmp_path / "out/f.npz", {"train/fake/another": 6, "test/real/another": 6}
    extract(own, output, "--batch_size", 2)
    old, before = rows(load_features(output)), digest(output)
    for path in GONE:
        (own / path).unlink()
    make_folder(own, added, seed=3)
    strike(BLOWS[blow], own, output, "--prune", after=4)
    assert digest(output) == before or len(load_features(output)["paths"]) == 34
    new = extract(own, output, "--batch_size", 2, "--prune")
    assert rows(new, slice(22)) == {key: row for key, row in old.items() if key[0] not in GONE}
    assert len(new["paths"]) == 34
    assert names(output.parent) == ["f.npz"]
