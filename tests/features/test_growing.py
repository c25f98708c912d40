"""A folder that grows and shrinks under its features file: what is told of the new images, and what --prune drops."""

import shutil

import numpy as np
import pytest
from extracting import BLOWS, digest, extract, names, rows, strike
from made_up import make_columns, with_views
from patience import costs_at_most
from PIL import Image

from detector.features.columns import join_columns
from detector.features.file import load_features
from detector.features.growing import digests_of, whats_new, words

pytestmark = pytest.mark.usefixtures("settings")


def grown(old, *more):
    """What is told of a file of the columns `old` that has got more below them."""
    return whats_new(digests_of(old), join_columns([old, *more]))


def pictures_of(columns, thumb):
    return columns | {"thumb": np.asarray(thumb, np.uint8)}


# ---- what is new, from columns alone ----


def test_new_images_are_counted_by_class_and_split_and_by_source_with_new_sources_named():
    old, new = make_columns(), make_columns(real=3, fake=6, seed=1)
    old["sources"][:] = "camera"
    new["sources"] = np.array(["camera"] * 3 + ["flux"] * 2 + ["gan"] * 3 + [""])
    found = grown(old, new)
    assert found == {
        "images": 9,
        "changed": 0,
        "moved": 0,
        "alike": [],
        "other label": [],
        "cells": {"test/real": 1, "test/fake": 2, "train/real": 2, "train/fake": 4},
        "known sources": {"camera": 3},
        "new sources": {"gan": 3, "flux": 2},
    }
    assert words(found) == [
        "new images: 9 (test/real 1, test/fake 2, train/real 2, train/fake 4)",
        "from known sources: camera 3",
        "from new sources: gan 3, flux 2",
    ]


def test_copies_count_as_one_with_their_image():
    old, new = make_columns(), make_columns(real=3, fake=6, seed=1)
    assert grown(with_views(old, 2), with_views(new, 2)) == grown(old, new)


def test_where_nothing_is_new_nothing_is_said():
    assert words(grown(make_columns())) == []


def test_a_file_with_other_bytes_is_changed_and_one_at_another_place_is_moved_and_neither_is_new():
    old = make_columns()
    now = {name: column.copy() for name, column in old.items()}
    now["sha256"][7] = "other bytes"
    now["paths"][9], now["labels"][9] = "elsewhere", 1  # the label put right: its twin is itself
    assert words(whats_new(digests_of(old), now)) == ["changed: 1; moved: 1"]


def test_the_bytes_of_a_file_that_was_written_over_are_moved_where_they_turn_up():
    old = make_columns()
    extra = {name: column[:1].copy() for name, column in old.items()} | {
        "paths": np.array(["elsewhere"])
    }
    now = join_columns([old, extra])
    assert words(whats_new(digests_of(old), now))[0].startswith(
        "new images: 1 "
    )  # a copy, while the first stands
    now["sha256"][0] = "other bytes"
    assert words(whats_new(digests_of(old), now)) == ["changed: 1; moved: 1"]


def test_new_images_that_look_like_one_that_was_there_are_told_and_apart_those_under_the_other_label():
    old, new = make_columns(), make_columns(real=3, fake=3, seed=1)  # each has its reals first
    new = pictures_of(
        new, np.concatenate([old["thumb"][[5, 70, 80]], new["thumb"][3:5], old["thumb"][90:91]])
    )
    found = grown(old, new)
    assert found["alike"] == [
        ["1/00000.jpg", "0/00005.jpg"],
        ["1/00001.jpg", "0/00070.jpg"],
        ["1/00002.jpg", "0/00080.jpg"],
        ["1/00005.jpg", "0/00090.jpg"],
    ]
    assert found["other label"] == found["alike"][1:3]
    assert words(found)[1:] == [
        (
            "new images that look like an earlier image: 4, such as 1/00000.jpg and 0/00005.jpg;"
            " 1/00001.jpg and 0/00070.jpg; 1/00002.jpg and 0/00080.jpg"
        ),
        (
            "warning: new images that look like an earlier image of the other label: 2, such as 1/00001.jpg and 0/00070.jpg;"
            " 1/00002.jpg and 0/00080.jpg"
        ),
    ]


def test_an_image_with_many_look_alikes_is_one_and_that_under_the_other_label_is_not_overlooked():
    old, new = make_columns(), make_columns(real=1, fake=0, seed=1)
    old["thumb"][[3, 4, 100]] = new["thumb"][0]
    found = grown(old, new)
    assert found["alike"] == [["1/00000.jpg", "0/00003.jpg"]] and found["other label"] == [
        ["1/00000.jpg", "0/00100.jpg"]
    ]


def test_new_images_that_look_like_each_other_alone_are_not_told():
    new = make_columns(real=2, fake=2, seed=1)
    assert (
        grown(make_columns(), pictures_of(new, np.repeat(new["thumb"][:1], 4, axis=0)))["alike"]
        == []
    )


def test_flat_pictures_look_alike_only_byte_for_byte():
    old, new = make_columns(), make_columns(real=2, fake=0, seed=1)
    old["thumb"][:2], new["thumb"][:] = 255, 255
    new["sha256"][1] = old["sha256"][1]
    assert grown(old, new)["alike"] == [["1/00001.jpg", "0/00001.jpg"]]


def test_an_image_without_a_label_contradicts_none():
    old, new = make_columns(), make_columns(real=1, fake=0, seed=1)
    new["thumb"][0], new["labels"][0] = old["thumb"][100], -1
    found = grown(old, new)
    assert (
        len(found["alike"]) == 1
        and found["other label"] == []
        and found["cells"] == {"train/unlabelled": 1}
    )


@pytest.mark.parametrize("number, ends_with", [(10, ", s09 1"), (13, ", s09 1 and 3 more")])
def test_of_many_sources_the_largest_ten_are_named(number, ends_with):
    new = make_columns(real=number, fake=1, seed=1)
    new["sources"] = np.array([*(f"s{i:02d}" for i in range(number)), "s05"])
    line = words(grown(make_columns(), new))[1]
    assert line.startswith("from new sources: s05 2, s00 1, ") and line.endswith(ends_with)


def test_a_thousand_new_images_beside_48000_are_told_in_seconds():
    """All against all would be 49 times the work."""
    old, new = make_columns(real=24_000, fake=24_000), make_columns(real=500, fake=500, seed=1)
    new["thumb"][:] = old["thumb"][:1000]
    columns, before = join_columns([old, new]), digests_of(old)
    with costs_at_most(120):
        assert len(whats_new(before, columns)["alike"]) == 1000


# ---- the command ----


def add_copy(own, of, to):
    (own / to).parent.mkdir(parents=True, exist_ok=True)
    Image.open(own / of).save(own / to, quality=70)


@pytest.mark.parametrize("views", [0, 2])
def test_an_extraction_that_adds_images_tells_what_is_new(own, tmp_path, capsys, views):
    extract(own, tmp_path / "f.npz", "--views", views)
    first = capsys.readouterr()
    assert "new images" not in first.err
    add_copy(own, "train/real/camera/000.jpg", "train/real/camera/again.jpg")
    add_copy(own, "train/real/camera/001.jpg", "train/fake/flux/wrong.jpg")
    Image.open(own / "test/real/camera/001.jpg").rotate(180).save(own / "test/real/camera/001.jpg")
    (own / "test/fake/gan/001.jpg").rename(own / "test/real/camera/right.jpg")
    extract(own, tmp_path / "f.npz", "--views", views)
    said = capsys.readouterr()
    assert said.err.splitlines()[-5:] == [
        "new images: 2 (train/real 1, train/fake 1); changed: 1; moved: 1",
        "from known sources: camera 1",
        "from new sources: flux 1",
        (
            "new images that look like an earlier image: 2, such as train/fake/flux/wrong.jpg and"
            " train/real/camera/001.jpg; train/real/camera/again.jpg and train/real/camera/000.jpg"
        ),
        (
            "warning: new images that look like an earlier image of the other label: 1, such as train/fake/flux/wrong.jpg and"
            " train/real/camera/001.jpg"
        ),
    ]
    assert len(said.out.splitlines()) == 1
    extract(own, tmp_path / "f.npz", "--views", views)
    assert "new images" not in capsys.readouterr().err


# ---- --prune ----

GONE = ["test/real/camera/001.jpg", "train/fake/gan/003.jpg"]


@pytest.fixture
def shrunk(own, tmp_path, capsys):
    """The 24 images, extracted with a copy each; then two were removed. -> (folder, features file)"""
    extract(own, tmp_path / "out/f.npz", "--views", 1)
    for path in GONE:
        (own / path).unlink()
    capsys.readouterr()
    return own, tmp_path / "out/f.npz"


def test_prune_drops_the_rows_of_files_that_are_gone_and_says_so(shrunk, capsys, encoded):
    data, output = shrunk
    old = load_features(output)
    new = extract(data, output, "--views", 1, "--prune")
    kept = ~np.isin(old["paths"], GONE)
    assert (
        rows(new) == rows({name: column[kept] for name, column in old.items() if name != "meta"})
        and len(new["paths"]) == 44
    )
    assert new["meta"]["counts"]["images"] == 22 and encoded == []
    said = capsys.readouterr().err
    assert "44 rows stay unchanged" in said and "4 rows of deleted files are dropped\n" in said


def test_without_prune_they_stay_and_prune_is_named(shrunk, capsys):
    data, output = shrunk
    assert len(extract(data, output, "--views", 1)["paths"]) == 48
    assert "4 of these rows belong to deleted files; --prune drops them" in capsys.readouterr().err


def test_prune_is_no_other_way_to_make_a_file(shrunk, capsys):
    data, output = shrunk
    before = load_features(output)["meta"]["key"]
    pruned = extract(data, output, "--views", 1, "--prune")
    assert pruned["meta"]["key"] == before and names(output.parent) == ["f.npz"]
    pruned_bytes = digest(output)
    extract(data, output, "--views", 1)
    assert digest(output) == pruned_bytes and "set aside" not in capsys.readouterr().err


def test_prune_with_nothing_gone_changes_nothing(few, tmp_path, capsys):
    extract(few, tmp_path / "f.npz", "--prune")  # nothing to prune yet: a first run like any other
    before = digest(tmp_path / "f.npz")
    extract(few, tmp_path / "f.npz", "--prune")
    assert digest(tmp_path / "f.npz") == before and "deleted" not in capsys.readouterr().err


def test_a_file_of_which_all_are_gone_is_set_aside_and_not_pruned(
    few, make_folder, tmp_path, capsys
):
    output = tmp_path / "out/f.npz"
    extract(few, output)
    before = digest(output)
    extract(
        make_folder(tmp_path / "other", {"train/real/x": 4, "train/fake/y": 4}, seed=2),
        output,
        "--prune",
    )
    assert digest(f"{output}.old-1") == before
    assert "has none of the images of this folder: set aside" in capsys.readouterr().err


def test_an_image_that_was_moved_is_moved_with_prune_too(shrunk, capsys):
    data, output = shrunk
    shutil.move(data / "train/real/camera/000.jpg", data / "train/fake/gan/right.jpg")
    extract(data, output, "--views", 1, "--prune")
    assert capsys.readouterr().err.splitlines()[-1] == "moved: 1"


@pytest.mark.slow
@pytest.mark.parametrize("blow", [blow for blow in BLOWS if blow != "before anything is stored"])
def test_killed_while_it_prunes_the_old_file_stands_until_the_new_one_is_whole(
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
    assert (
        rows(new, slice(22)) == {path: row for path, row in old.items() if path not in GONE}
        and len(new["paths"]) == 34
    )
    assert names(output.parent) == ["f.npz"]
