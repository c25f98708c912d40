"""Label, split and source by folder names, and the checks of a features file."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT
from patience import PATIENCE

from detector.base.errors import UsageError
from detector.features.columns import COLUMNS
from detector.features.file import load_features
from detector.images.facts import FACTS
from detector.images.folders import LABELS, Entry, describe, draw_evenly, list_images

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
    "a label's name inside a folder's name is no label": (
        "train/real/unreal_engine/1.png",
        REAL,
        "train",
        "unreal_engine",
    ),
    "a label's name as the file's name is no label": ("train/real/fake.png", REAL, "train", ""),
    "no label": ("holiday/1.jpg", UNKNOWN, "", "holiday"),
    "no label below a split": ("test/holiday/1.jpg", UNKNOWN, "test", "holiday"),
    "no folder at all": ("real.jpg", UNKNOWN, "", ""),
}


@pytest.mark.parametrize("path, label, split, source", LAYOUTS.values(), ids=LAYOUTS)
def test_label_split_and_source_are_read_from_the_folders(path, label, split, source):
    assert describe(path) == Entry(path, label, split, source)


NAMES = {
    **dict.fromkeys(["real", "0_real", "nature", "natural", "human", "photo", "photos"], REAL),
    **dict.fromkeys(["fake", "1_fake", "ai", "generated", "synthetic", "ai_generated"], FAKE),
}


@pytest.mark.parametrize("name, label", NAMES.items(), ids=NAMES)
@pytest.mark.parametrize("spell", [str, str.upper, str.title], ids=["lower", "upper", "title"])
def test_these_names_are_labels(name, label, spell):
    path = f"train/{spell(name)}/x/1.png"
    assert describe(path) == Entry(path, label, "train", "x")


def test_no_other_name_is_a_label():
    assert set(LABELS) == set(NAMES)


@pytest.mark.parametrize(
    "path, first, second",
    [
        ("real/fake/1.png", "real", "fake"),
        ("train/AI/sd/Nature/1.png", "AI", "Nature"),
        ("photos/train/0_real/1_fake/1.png", "photos", "1_fake"),
    ],
)
def test_two_labels_that_disagree_are_an_error_that_names_both(path, first, second):
    words = f"^{path}: .*'{first}'.* and '{second}' name both labels; rename one of them$"
    with pytest.raises(UsageError, match=words):
        describe(path)


def test_other_split_names_replace_the_usual_ones():
    names = ("fit", "check")
    paths = "Fit/real/a/1.png", "train/real/a/1.png"
    assert describe(paths[0], names) == Entry(paths[0], REAL, "fit", "a")
    assert describe(paths[1], names) == Entry(paths[1], REAL, "", "train/a")


# ---- a folder ----


def touch(folder, *paths):
    """Make empty files; a listing reads names only."""
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


def test_unlabelled_lists_all_files_without_a_label(tmp_path):
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
def test_a_folder_without_both_labels_is_an_error_with_the_reason(tmp_path, paths, words):
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError) as error:
        list_images(touch(tmp_path / "data", *paths))
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.touch()], ids=["missing", "a file"]
)
def test_a_path_that_is_no_folder_is_named_in_the_error(tmp_path, make):
    make(tmp_path / "data")
    with pytest.raises(UsageError, match=f"{tmp_path}/data: no such folder"):
        list_images(tmp_path / "data")


# ---- a features file ----


def some_columns(n=4):
    return {
        "features": np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32),
        "labels": np.zeros(n, np.int8),
        "paths": np.array([f"real/{i}.png" for i in range(n)]),
        "splits": np.array(["train"] * n),
        "sources": np.array([""] * n),
        "groups": np.array([""] * n),
        "sha256": np.array(["0" * 64] * n),
        "view": np.zeros(n, np.int8),
        "facts": np.zeros(n, FACTS),
        "thumb": np.zeros((n, 64), np.uint8),
        "meta": np.array(json.dumps({"format": 1})),
    }


def test_a_features_file_gives_its_columns_and_meta(tmp_path):
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
    # no deflate stream starts with 0x07, so zlib refuses before any checksum is compared
    np.savez_compressed(path, **some_columns())
    data = bytearray(path.read_bytes())
    name, extra = struct.unpack_from("<HH", data, 26)
    data[30 + name + extra] = 0x07
    path.write_bytes(data)


def without_a_column(path):
    columns = some_columns()
    del columns["thumb"]
    np.savez(path, **columns)


def changed(**columns):
    """Function: path -> a features file with other columns there."""
    return lambda path: np.savez(path, **{**some_columns(), **columns})


def single_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


NO_FILE = "is not a features file"
FEWER_FACTS = np.dtype([(name, FACTS[name]) for name in FACTS.names if name != "density"])
WRONG_FILES = {
    "missing": (lambda path: None, "no such file; make it with extract_features.py"),
    "folder": (lambda path: path.mkdir(), "is neither a features file nor a finished data set"),
    "empty": (lambda path: path.write_bytes(b""), NO_FILE),
    "text": (lambda path: path.write_text("path,label\n"), NO_FILE),
    "npy": (single_array, NO_FILE),
    "truncated": (truncated, NO_FILE),
    "damaged": (damaged, NO_FILE),
    "pickle": (changed(paths=np.array([{"a": 1}] * 4, dtype=object)), NO_FILE),
    "no column": (without_a_column, "'thumb"),
    "short column": (changed(labels=np.zeros(3, np.int8)), "differ in length [3, 4]"),
    "an older file": (
        changed(facts=np.zeros(4, FEWER_FACTS)),
        "its facts have another format; extract again",
    ),
    "NaN": (changed(features=np.full((4, 3), np.nan)), "4 rows hold NaN"),
    "a label": (changed(labels=np.full(4, 5, np.int8)), "labels other than -1, 0 and 1"),
}


@pytest.mark.parametrize("write, words", WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_features_file_is_an_error_of_one_line_that_names_it(tmp_path, write, words):
    write(tmp_path / "f.npz")
    with pytest.raises(UsageError) as error:
        load_features(tmp_path / "f.npz")
    message = str(error.value)
    assert str(tmp_path / "f.npz") in message and words in message and "\n" not in message


def test_reading_features_imports_neither_torch_nor_scikit_learn():
    code = "import sys; from detector.features import file; print(*sys.modules)"
    options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    modules = subprocess.run([sys.executable, "-c", code], timeout=PATIENCE, **options).stdout
    assert {"torch", "sklearn", "openvino"}.isdisjoint(modules.split())


def test_an_even_draw_takes_rows_of_all_cells_in_turn():
    cells = ["a"] * 48 + ["b"] * 2 + ["c"] * 40 + ["d"] * 10
    rows = draw_evenly(cells, 8)
    assert [cells[i] for i in rows] == list("aabbccdd")
    assert np.array_equal(rows, draw_evenly(cells, 8))
    assert len(draw_evenly(cells, 1000)) == 100
