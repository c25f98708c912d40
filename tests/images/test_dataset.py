"""What a folder says about its images (label, split, source), and what a features file must hold to be read."""

import json
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT
from made_up import make_columns, write_features

from detector.base.errors import UsageError
from detector.features.columns import COLUMNS
from detector.features.file import load_features
from detector.images.facts import FACTS
from detector.images.folders import (
    LABELS,
    SPLITS,
    Entry,
    describe,
    draw_evenly,
    list_files,
    list_images,
)

REAL, FAKE, UNKNOWN = 0, 1, -1


# ---- one path ----

LAYOUTS = {
    # path: (label, split, source)
    "Kaggle, real": ("train/real/0001.jpg", REAL, "train", ""),
    "Kaggle, fake": ("test/fake/0001.jpg", FAKE, "test", ""),
    "split, label, source": ("train/fake/midjourney/1.png", FAKE, "train", "midjourney"),
    "split, label, nested source": (
        "external/real/flickr/2014/1.png",
        REAL,
        "external",
        "flickr/2014",
    ),
    "CNNDetection": ("progan/0_real/1.png", REAL, "", "progan"),
    "CNNDetection below a split": ("val/progan/1_fake/1.png", FAKE, "val", "progan"),
    "ForenSynths with a category, real": (
        "test/progan/cat/0_real/1.png",
        REAL,
        "test",
        "progan/cat",
    ),
    "ForenSynths with a category, fake": (
        "test/progan/cat/1_fake/1.png",
        FAKE,
        "test",
        "progan/cat",
    ),
    "GenImage, real": ("Midjourney/train/nature/1.jpg", REAL, "train", "Midjourney"),
    "GenImage, fake": (
        "stable_diffusion_v_1_4/val/ai/1.png",
        FAKE,
        "val",
        "stable_diffusion_v_1_4",
    ),
    "label only": ("real/1.jpg", REAL, "", ""),
    "source above the label": ("camera/real/1.jpg", REAL, "", "camera"),
    "source on both sides of the label": ("gan/fake/faces/1.jpg", FAKE, "", "gan/faces"),
    "nested, split in the middle": (
        "sets/2024/train/gan/fake/faces/1.jpg",
        FAKE,
        "train",
        "sets/2024/gan/faces",
    ),
    "upper and mixed case": ("TRAIN/Real/Nikon/1.JPG", REAL, "train", "Nikon"),
    "two labels that agree": ("fake/ai/sdxl/1.png", FAKE, "", "sdxl"),
    "the first of two splits": ("extra/test/real/1.png", REAL, "extra", "test"),
    "a split's name below the label is part of the source": (
        "train/real/test/1.png",
        REAL,
        "train",
        "test",
    ),
    "only a split's name below the label": ("real/test/1.png", REAL, "", "test"),
    "a label's name as part of a folder's name is none": (
        "train/real/unreal_engine/1.png",
        REAL,
        "train",
        "unreal_engine",
    ),
    "a label's name as the file's name is none": ("train/real/fake.png", REAL, "train", ""),
    "no label": ("holiday/1.jpg", UNKNOWN, "", "holiday"),
    "no label below a split": ("test/holiday/1.jpg", UNKNOWN, "test", "holiday"),
    "no folder at all": ("real.jpg", UNKNOWN, "", ""),
}


@pytest.mark.parametrize("path, label, split, source", LAYOUTS.values(), ids=LAYOUTS)
def test_label_split_and_source_are_read_from_the_folders(path, label, split, source):
    assert describe(path) == Entry(path, label, split, source)


@pytest.mark.parametrize(
    "name", ["real", "0_real", "nature", "natural", "human", "photo", "photos"]
)
@pytest.mark.parametrize("spell", [str, str.upper, str.title], ids=["lower", "upper", "title"])
def test_these_names_mean_real(name, spell):
    assert describe(f"train/{spell(name)}/x/1.png") == (
        f"train/{spell(name)}/x/1.png",
        REAL,
        "train",
        "x",
    )


@pytest.mark.parametrize("name", ["fake", "1_fake", "ai", "generated", "synthetic", "ai_generated"])
@pytest.mark.parametrize("spell", [str, str.upper, str.title], ids=["lower", "upper", "title"])
def test_these_names_mean_fake(name, spell):
    assert describe(f"train/{spell(name)}/x/1.png") == (
        f"train/{spell(name)}/x/1.png",
        FAKE,
        "train",
        "x",
    )


def test_no_other_name_is_a_label():
    assert len(LABELS) == 7 + 6  # a new synonym belongs into one of the two tests above


@pytest.mark.parametrize("split", ["train", "val", "test", "external", "extra"])
def test_these_names_are_splits(split):
    assert describe(f"{split}/real/1.png").split == split
    assert split in SPLITS


@pytest.mark.parametrize(
    "path, one, other",
    [
        ("real/fake/1.png", "real", "fake"),
        ("train/AI/sd/Nature/1.png", "AI", "Nature"),
        ("photos/train/0_real/1_fake/1.png", "photos", "1_fake"),
    ],
)
def test_two_labels_that_disagree_are_an_error_that_names_both(path, one, other):
    with pytest.raises(UsageError) as error:
        describe(path)
    assert path in str(error.value) and one in str(error.value) and other in str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_name_under_both_labels_is_one_source():
    assert describe("train/real/coco/1.png").source == describe("test/fake/coco/2.png").source


def test_other_split_names_replace_the_usual_ones():
    names = ("fit", "check")
    assert describe("Fit/real/a/1.png", names) == ("Fit/real/a/1.png", REAL, "fit", "a")
    assert describe("train/real/a/1.png", names) == ("train/real/a/1.png", REAL, "", "train/a")


# ---- a folder ----


def touch(folder, *paths):
    """Empty files: listing looks at names alone."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def test_a_folder_is_listed_in_the_order_of_its_paths(tmp_path):
    touch(
        tmp_path,
        "train/real/b.png",
        "train/fake/z/1.png",
        "test/real/a.png",
        "train/real/a/1.png",
        "train/real/B.png",
    )
    listed = [e.path for e in list_images(tmp_path)]
    assert listed == sorted(listed) and len(listed) == 5


def test_files_outside_a_label_folder_are_left_out(tmp_path):
    touch(tmp_path, "README.txt", "train/list.csv", "train/real/1.png", "train/fake/1.png")
    assert [e.path for e in list_images(tmp_path)] == ["train/fake/1.png", "train/real/1.png"]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    listing = list_files(
        touch(
            tmp_path / "data",
            "real/1.png",
            "fake/1.png",
            "real/.DS_Store",
            ".cache/real/1.png",
            "fake/.x/1.png",
        )
    )
    assert listing.files == ["fake/1.png", "real/1.png"]
    assert listing.hidden == [".cache/real/1.png", "fake/.x/1.png", "real/.DS_Store"]


def test_unlabelled_takes_all_files_and_no_label(tmp_path):
    touch(tmp_path, "holiday/1.png", "test/real/2.png", "3.png")
    assert {(e.path, e.label, e.split) for e in list_images(tmp_path, unlabelled=True)} == {
        ("3.png", UNKNOWN, ""),
        ("holiday/1.png", UNKNOWN, ""),
        ("test/real/2.png", UNKNOWN, "test"),
    }


@pytest.mark.parametrize(
    "paths, words",
    [
        ([], ["the folder is empty"]),
        (
            ["holiday/1.png"],
            ["no folder below it names a label", "real/ and fake/", "--unlabelled"],
        ),
        (["train/real/1.png", "test/photo/1.png"], ["only one class", "'real'", "--unlabelled"]),
        (["ai/1.png"], ["only one class", "'fake'"]),
        (["real/1.png", "fake/1.png", "real/fake/1.png"], ["'real' and 'fake'", "rename"]),
    ],
)
def test_a_folder_that_cannot_teach_is_an_error_that_says_why(tmp_path, paths, words):
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError) as error:
        list_images(touch(tmp_path / "data", *paths))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.touch()], ids=["missing", "a file"]
)
def test_what_is_no_folder_is_an_error_that_names_it(tmp_path, make):
    make(tmp_path / "data")
    with pytest.raises(UsageError, match="no such folder") as error:
        list_images(tmp_path / "data")
    assert str(tmp_path / "data") in str(error.value)


# ---- a features file ----


def some_columns(n=4):
    return {
        "features": np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32),
        "labels": np.zeros(n, np.int8),
        "paths": np.array([f"real/{i}.png" for i in range(n)]),
        "splits": np.array(["train"] * n),
        "sources": np.array([""] * n),
        "sha256": np.array(["0" * 64] * n),
        "view": np.zeros(n, np.int8),
        "facts": np.zeros(n, FACTS),
        "thumb": np.zeros((n, 64), np.uint8),
        "meta": np.array(json.dumps({"format": 1})),
    }


def test_a_features_file_is_read_as_its_columns_and_meta(tmp_path):
    stored = some_columns()
    np.savez(tmp_path / "f.npz", **stored)
    columns = load_features(tmp_path / "f.npz")
    assert columns["meta"] == {"format": 1}
    for name in COLUMNS:
        assert columns[name].dtype == stored[name].dtype
        assert (columns[name] == stored[name]).all()


def truncated(path):
    np.savez_compressed(path, **some_columns())
    path.write_bytes(path.read_bytes()[:-100])


def damaged(path):
    # No deflate stream starts with this byte: zlib itself refuses, before any checksum is looked at.
    np.savez_compressed(path, **some_columns())
    data = bytearray(path.read_bytes())
    data[30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")] = (
        0x07  # behind the first header
    )
    path.write_bytes(data)


def without_a_column(path):
    columns = some_columns()
    del columns["thumb"]
    np.savez(path, **columns)


def with_a_short_column(path):
    np.savez(path, **{**some_columns(), "labels": np.zeros(3, np.int8)})


def with_a_pickle(path):
    np.savez(path, **{**some_columns(), "paths": np.array([{"a": 1}] * 4, dtype=object)})


def without_a_fact(path):
    fewer = np.dtype([(name, FACTS[name]) for name in FACTS.names if name != "density"])
    np.savez(path, **{**some_columns(), "facts": np.zeros(4, fewer)})


def single_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    "write, word",
    [
        (lambda path: None, "no such file; make it with extract_features.py"),
        (lambda path: path.mkdir(), "is not a features file"),
        (lambda path: path.write_bytes(b""), "is not a features file"),
        (lambda path: path.write_text("path,label\n"), "is not a features file"),
        (single_array, "is not a features file"),
        (truncated, "is not a features file"),
        (damaged, "is not a features file"),
        (with_a_pickle, "is not a features file"),
        (without_a_column, "'thumb"),
        (with_a_short_column, "differ in length [3, 4]"),
        (without_a_fact, "its facts have another format; extract again"),
    ],
    ids=[
        "missing",
        "folder",
        "empty",
        "text",
        "npy",
        "truncated",
        "damaged",
        "pickle",
        "no column",
        "short column",
        "an older file",
    ],
)
def test_anything_else_is_an_error_of_one_line_that_names_the_file(tmp_path, write, word):
    write(tmp_path / "f.npz")
    with pytest.raises(UsageError) as error:
        load_features(tmp_path / "f.npz")
    assert str(tmp_path / "f.npz") in str(error.value) and word in str(error.value)
    assert "\n" not in str(error.value)


def test_reading_folders_and_features_needs_neither_torch_nor_scikit_learn():
    code = (
        "import sys; from detector.features import file; print([m for m in ('torch', 'sklearn',"
        " 'openvino') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_an_even_draw_goes_round_all_cells():
    cells = ["a"] * 48 + ["b"] * 2 + ["c"] * 40 + ["d"] * 10
    rows = draw_evenly(cells, 8)
    assert [cells[i] for i in rows] == list("aabbccdd") and np.array_equal(
        rows, draw_evenly(cells, 8)
    )
    assert len(draw_evenly(cells, 1000)) == 100


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda c: c["features"].__setitem__((3, 0), np.nan), "1 rows hold NaN"),
        (lambda c: c["labels"].__setitem__(0, 5), "labels other than -1, 0 and 1"),
    ],
    ids=["nan", "label"],
)
def test_values_that_no_extraction_writes_are_refused_by_every_reader(tmp_path, damage, words):
    columns = make_columns()
    damage(columns)
    with pytest.raises(UsageError, match=words):
        load_features(write_features(tmp_path / "f.npz", columns))
