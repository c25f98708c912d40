"""Every file below a folder is encoded, counted as unreadable, or named. None disappears."""

import os
import socket

import pytest
import small
from commands import assert_one_line_error, without_root

from detector.features.file import load_features
from detector.images.folders import (
    EXTENSIONS,
    describe,
    kind_of,
    list_files,
    list_images,
    read_folder,
)

TWO_OF_EACH = {"train/real": 2, "train/fake": 2}


@pytest.fixture
def data(make_folder, tmp_path):
    return make_folder(tmp_path / "data", TWO_OF_EACH)


@pytest.fixture
def extract(script, data):
    """Function: flags -> extract_features.py on `data`, as a process."""

    def run(*flags, **options):
        command = "extract_features.py", "--data_dir", data, *flags
        return script(*command, CLIP_MODEL=str(small.CHECKPOINT), **options)

    return run


# ---- folders without a label ----


@pytest.mark.parametrize(
    "name", ["AI-generated", "AI Generated", "ai_generated", "0-real", "Photos"]
)
def test_hyphens_and_spaces_in_a_label_count_as_underscores(name):
    assert describe(f"train/{name}/1.png").label >= 0


def test_a_folder_without_a_label_is_named_with_its_number_of_files(extract, data, make_folder):
    make_folder(data, {"train/screens": 3})
    result = extract()
    assert result.returncode == 0
    assert "ignored: train/screens (3 files): not a label; accepted: real, " in result.stderr
    assert "ignored 3 files in 1 folders" in result.stdout


@pytest.mark.parametrize(
    "name, question",
    [
        ("fakes", "did you mean 'fake'?"),
        ("Real images", "did you mean 'real'?"),
        ("AIgenerated", "did you mean 'ai_generated'?"),
        ("photograph", "did you mean 'photo'?"),
        ("1-fakes", "did you mean '1_fake'?"),
        *((name, "") for name in ("screens", "midjourney", "cats")),
    ],
)
def test_only_a_name_close_to_a_label_gets_a_question(name, question, data, capsys):
    (data / name).mkdir()
    (data / name / "1.jpg").touch()
    list_images(data)
    note = capsys.readouterr().err
    assert f"ignored: {name} " in note and question in note and ("mean" in note) == bool(question)


def test_the_error_of_a_missing_class_names_the_ignored_folders(extract, data):
    (data / "train/fake").rename(data / "train/midjourney")
    words = "only one class", "'real'", "train/midjourney (2 files)", "accepted: "
    assert_one_line_error(extract(), *words)


def test_strict_ends_with_1_where_a_folder_is_ignored(extract, data, make_folder, tmp_path):
    (data / "train/README.txt").touch()
    assert extract("--strict").returncode == 0
    make_folder(data, {"train/screens": 1})
    assert extract("--strict").returncode == 1
    assert len(load_features(tmp_path / "features.npz")["labels"]) == 4


def test_a_file_beside_the_label_folders_is_named(data, capsys):
    (data / "1.jpg").touch()
    assert read_folder(data).ignored == {"*": 1}
    assert "ignored: * (1 files)" in capsys.readouterr().err


# ---- splits ----


@pytest.mark.parametrize(
    "name, split",
    [
        ("valid", "val"),
        ("Validation", "val"),
        ("val_set", "val"),
        ("dev", "val"),
        ("training", "train"),
        ("Train-Set", "train"),
        ("training_data", "train"),
        ("Testing", "test"),
        ("testset", "test"),
        ("test images", "test"),
    ],
)
def test_usual_spellings_of_a_split_are_that_split(name, split):
    entry = describe(f"{name}/real/a/1.png")
    assert (entry.split, entry.source) == (split, "a")


def test_custom_split_names_have_no_other_spellings():
    assert describe("testing/real/1.png", ("fit", "check")).split == ""
    assert describe("valid/real/1.png", ("fit", "valid")).split == "valid"


def test_a_folder_close_to_a_split_is_named_with_the_flag(data, capsys):
    (data / "train").rename(data / "trian")
    list_images(data)
    note = capsys.readouterr().err
    assert "the folder 'trian' counts as a source" in note
    assert "did you mean 'train'" in note and "--split_names" in note


# ---- unreadable folders ----


@pytest.fixture
def extract_without(extract):
    """Function: (path, flags) -> `extract` while nobody may read the path."""

    def run(path, *flags):
        mode = path.stat().st_mode
        path.chmod(0)
        result = extract(*flags, first=without_root)
        path.chmod(mode)
        assert "Traceback" not in result.stderr
        return result

    return run


def test_an_unreadable_folder_is_named_and_ends_with_1(extract_without, data, make_folder):
    make_folder(data, {"train/real/closed": 2})
    result = extract_without(data / "train/real/closed")
    assert result.returncode == 1
    assert f"cannot be read: the folder {data}/train/real/closed (Permission" in result.stderr
    assert "4 images" in result.stdout and "1 folders could not be read" in result.stdout


def test_audit_counts_an_unreadable_folder_as_an_unreadable_file(script, data):
    """evaluate.py and golden.py end with 1 for such files."""
    (data / "train/real/closed").mkdir(mode=0)
    result = script("audit.py", "--data_dir", data, first=without_root)
    assert "1 files cannot be read (1 real, 0 fake), such as train/real/closed/" in result.stdout


def test_a_folder_that_vanishes_while_it_is_listed_has_another_remedy(data, capsys):
    listing = list_files(data)._replace(unreadable=[("train/real/a", "No such file or directory")])
    assert list_images(data, listing=listing)[-1] == describe("train/real/a/")
    assert (
        "train/real/a (No such file or directory); check that its disk" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "command, flag",
    [
        ("audit.py", "--data_dir"),
        ("extract_features.py", "--data_dir"),
        ("classify.py", "--image_path"),
    ],
)
def test_an_empty_name_is_no_folder(script, command, flag):
    """An unset variable gives an empty name."""
    assert_one_line_error(script(command, flag, ""), flag, "no such f")


def test_an_unreadable_data_folder_ends_with_2(extract_without, data):
    assert_one_line_error(extract_without(data), data, "cannot be read")


@pytest.mark.parametrize("closed", ["train/real/a", "train/real/a/000.jpg"])
def test_rows_of_unreadable_files_are_never_pruned(
    extract, extract_without, data, make_folder, tmp_path, closed
):
    make_folder(data, {"train/real/a": 1})
    assert extract().returncode == 0
    result = extract_without(data / closed, "--prune")
    assert "gone" not in result.stderr, result.stderr
    assert "1 of these rows belong to files that cannot be read now" in result.stderr
    assert len(load_features(tmp_path / "features.npz")["labels"]) == 5


# ---- files that are left out ----


@pytest.mark.parametrize(
    "path, kind",
    [
        *(
            (f"train/real/{name}/1.jpg", "thumbnails")
            for name in "@eaDir .thumbnails _thumbs .picasaoriginals __MACOSX $RECYCLE.BIN".split()
        ),
        ("train/real/GOPR0001.THM", "thumbnails"),  # a camera's thumbnail of a film
        ("train/real/.hidden.jpg", "hidden files"),
        (".cache/real/1.png", "hidden files"),
        ("train/fake/.x/1.png", "hidden files"),
    ],
)
def test_hidden_files_and_thumbnails_are_left_out_and_counted(path, kind, data, capsys):
    (data / path).parent.mkdir(parents=True, exist_ok=True)
    (data / path).touch()
    assert len(list_images(data)) == 4
    note = capsys.readouterr().err
    assert f"left out: 1 {kind}" in note and f"such as {path}" in note


def test_pipes_and_sockets_are_never_opened_and_are_counted(extract, data, monkeypatch):
    os.mkfifo(data / "train/real/pipe.jpg")
    os.symlink(data / "train/real/pipe.jpg", data / "train/real/link.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(data)  # the name of a socket may have 107 bytes
        server.bind("train/fake/socket.jpg")
    result = extract(timeout=60)
    assert result.returncode == 0 and "left out: 3 pipes, sockets or devices" in result.stderr
    assert "left out 3 pipes, sockets or devices" in result.stdout


def test_a_device_is_special(tmp_path):
    with os.scandir("/dev") as entries:
        assert {kind_of(entry) for entry in entries if entry.name in ("null", "zero")} == {
            "special"
        }


def test_a_broken_link_counts_as_an_unreadable_image(extract, data):
    (data / "train/real/gone.jpg").symlink_to(data / "nowhere.jpg")
    result = extract("--max_bad_fraction", "0.5")
    assert "skipped train/real/gone.jpg" in result.stderr and "1 of 5 skipped" in result.stdout


def test_a_linked_folder_is_listed_once(data):
    (data / "train/real/again").symlink_to(data / "train/real")
    (data / "train/fake/other").symlink_to(data / "train/fake")
    assert len(list_files(data).files) == 4


def test_the_target_of_a_link_keeps_the_label_of_its_own_path(data, make_folder):
    make_folder(data, {"train/fake/a/b": 2})
    (data / "train/real/link").symlink_to(data / "train/fake/a/b")
    assert sorted(entry.label for entry in list_images(data)) == [0] * 2 + [1] * 4


# ---- files with an image's extension ----


@pytest.mark.parametrize("name", ["lfs-pointer.jpg", "announces.heic", "announces.jxl", "a.nef"])
def test_a_text_with_an_images_extension_counts_as_unreadable(extract, data, name):
    assert os.path.splitext(name)[1] in EXTENSIONS
    (data / "train/real" / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert_one_line_error(extract(), "1 of 5 images cannot be read", "--max_bad_fraction")


def test_a_caption_beside_an_image_does_not_count_as_unreadable(extract, data):
    (data / "train/real/000.txt").write_text("a cat")
    assert extract().returncode == 0
