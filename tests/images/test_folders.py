"""Every file below a folder is encoded, counted as bad, or named: nothing disappears."""

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

    def run(*flags, **how):
        return script(
            "extract_features.py",
            "--data_dir",
            data,
            *flags,
            CLIP_MODEL=str(small.CHECKPOINT),
            **how,
        )

    return run


# ---- folders whose name is no label ----


@pytest.mark.parametrize(
    "name", ["AI-generated", "AI Generated", "ai_generated", "0-real", "Photos"]
)
def test_hyphens_and_spaces_in_a_label_count_as_underscores(name):
    assert describe(f"train/{name}/1.png").label >= 0


def test_a_folder_that_is_no_label_is_named_with_its_number_of_files(extract, data, make_folder):
    make_folder(data, {"train/screens": 3})
    result = extract()
    assert result.returncode == 0
    assert "ignored: train/screens (3 files): not a label; accepted: real, " in result.stderr
    assert "ignored 3 files in 1 folders" in result.stdout


@pytest.mark.parametrize(
    "name, label",
    [
        ("fakes", "fake"),
        ("Real images", "real"),
        ("AIgenerated", "ai_generated"),
        ("photograph", "photo"),
        ("1-fakes", "1_fake"),
    ],
)
def test_a_name_close_to_a_label_is_asked_about(name, label, data, capsys):
    (data / name).mkdir()
    (data / name / "1.jpg").touch()
    list_images(data)
    assert f"did you mean '{label}'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["screens", "midjourney", "cats"])
def test_a_name_like_no_label_is_not_asked_about(name, data, capsys):
    (data / name).mkdir()
    (data / name / "1.jpg").touch()
    list_images(data)
    assert f"ignored: {name} " in (said := capsys.readouterr().err) and "mean" not in said


def test_with_one_class_missing_the_ignored_folders_are_in_the_error(extract, data):
    (data / "train/fake").rename(data / "train/midjourney")
    assert_one_line_error(
        extract(), "only one class", "'real'", "train/midjourney (2 files)", "accepted: "
    )


def test_strict_ends_with_1_where_a_folder_is_ignored(extract, data, make_folder, tmp_path):
    (data / "train/README.txt").touch()
    assert extract("--strict").returncode == 0
    make_folder(data, {"train/screens": 1})
    result = extract("--strict")
    assert result.returncode == 1
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
    assert describe(f"{name}/real/a/1.png")[2:] == (split, "a")


def test_split_names_of_ones_own_have_no_other_spellings():
    assert describe("testing/real/1.png", ("fit", "check")).split == ""
    assert describe("valid/real/1.png", ("fit", "valid")).split == "valid"


def test_a_folder_close_to_a_split_is_named_with_the_flag(data, capsys):
    (data / "train").rename(data / "trian")
    list_images(data)
    assert "the folder 'trian' is taken for a source" in (said := capsys.readouterr().err)
    assert "did you mean 'train'" in said and "--split_names" in said


# ---- what cannot be read ----


def test_an_unreadable_folder_is_named_and_ends_with_1(extract, data, make_folder):
    make_folder(data, {"train/real/closed": 2})
    (data / "train/real/closed").chmod(0)
    result = extract(first=without_root)
    (data / "train/real/closed").chmod(0o755)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert (
        f"cannot be read: the folder {data}/train/real/closed (Permission denied)" in result.stderr
    )
    assert "4 images" in result.stdout and "1 folders could not be read" in result.stdout


def test_to_what_measures_an_unreadable_folder_is_a_file_that_cannot_be_read(script, data):
    """evaluate.py and golden.py end with 1 for these."""
    (data / "train/real/closed").mkdir(mode=0)
    result = script("audit.py", "--data_dir", data, first=without_root)
    assert "1 files cannot be read (1 real, 0 fake), such as train/real/closed/" in result.stdout


def test_a_folder_that_vanishes_while_it_is_listed_is_no_matter_of_permissions(data, capsys):
    listing = list_files(data)._replace(unreadable=[("train/real/a", "No such file or directory")])
    assert list_images(data, listing=listing)[-1] == describe("train/real/a/")
    assert "train/real/a (No such file or directory); look whether" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, flag",
    [
        ("audit.py", "--data_dir"),
        ("extract_features.py", "--data_dir"),
        ("classify.py", "--image_path"),
    ],
)
def test_an_empty_name_is_no_folder(script, command, flag):
    """As of a variable that was never set."""
    assert_one_line_error(script(command, flag, ""), flag, "no such f")


def test_where_nothing_can_be_read_it_ends_with_2(extract, data):
    data.chmod(0)
    result = extract(first=without_root)
    data.chmod(0o755)
    assert_one_line_error(result, data, "cannot be read")


@pytest.mark.parametrize("closed", ["train/real/a", "train/real/a/000.jpg"])
def test_rows_of_files_that_cannot_be_looked_at_are_never_gone(
    extract, data, make_folder, tmp_path, closed
):
    make_folder(data, {"train/real/a": 1})
    assert extract().returncode == 0
    (data / closed).chmod(0)
    result = extract("--prune", first=without_root)
    (data / closed).chmod(0o755)
    assert "Traceback" not in result.stderr and "gone" not in result.stderr, result.stderr
    assert "1 of them are of files that cannot be read now" in result.stderr
    assert len(load_features(tmp_path / "features.npz")["labels"]) == 5


# ---- what is no picture of the user's ----


@pytest.mark.parametrize(
    "name", ["@eaDir", ".thumbnails", "_thumbs", ".picasaoriginals", "__MACOSX", "$RECYCLE.BIN"]
)
def test_thumbnails_and_thrown_away_files_are_left_out_and_counted(name, data, make_folder, capsys):
    make_folder(data, {f"train/real/{name}": 2})
    assert len(list_images(data)) == 4
    assert "left out: 2 thumbnails" in capsys.readouterr().err


def test_the_thumbnail_that_a_camera_keeps_of_a_film_is_left_out(data, capsys):
    (data / "train/real/GOPR0001.THM").write_bytes((data / "train/real/000.jpg").read_bytes())
    assert len(list_images(data)) == 4
    assert "left out: 1 thumbnails" in capsys.readouterr().err


def test_hidden_files_are_counted(data, capsys):
    (data / "train/real/.hidden.jpg").touch()
    (data / "train/real/.old").mkdir()
    (data / "train/real/.old/1.jpg").touch()
    assert len(list_images(data)) == 4
    assert "left out: 2 hidden files, such as train/real/.hidden.jpg" in capsys.readouterr().err


def test_pipes_and_sockets_are_never_opened_and_are_counted(extract, script, data):
    os.mkfifo(data / "train/real/pipe.jpg")
    os.symlink(data / "train/real/pipe.jpg", data / "train/real/link.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(data)  # the name of a socket may have 107 bytes
        server.bind("train/fake/socket.jpg")
    result = extract(timeout=60)
    assert result.returncode == 0 and "left out: 3 pipes, sockets or devices" in result.stderr
    assert "left out 3 pipes or devices" in result.stdout


def test_a_device_is_special(tmp_path):
    with os.scandir("/dev") as entries:
        assert {kind_of(entry) for entry in entries if entry.name in ("null", "zero")} == {
            "special"
        }


def test_a_link_that_leads_nowhere_counts_as_a_bad_image(extract, data):
    (data / "train/real/gone.jpg").symlink_to(data / "nowhere.jpg")
    result = extract("--max_bad_fraction", "0.5")
    assert "skipped train/real/gone.jpg" in result.stderr and "1 of 5 skipped" in result.stdout


def test_a_linked_folder_is_listed_once(data):
    (data / "train/real/again").symlink_to(data / "train/real")
    (data / "train/fake/other").symlink_to(data / "train/fake")
    assert len(list_files(data).files) == 4


def test_a_folder_that_a_link_leads_to_keeps_the_label_of_its_own_place(data, make_folder):
    make_folder(data, {"train/fake/a/b": 2})
    (data / "train/real/link").symlink_to(data / "train/fake/a/b")
    assert sorted(entry.label for entry in list_images(data)) == [0] * 2 + [1] * 4


# ---- files that are meant to be images ----


@pytest.mark.parametrize("name", ["lfs-pointer.jpg", "announces.heic", "announces.jxl", "a.nef"])
def test_what_is_meant_to_be_an_image_counts_as_bad(extract, data, name):
    assert os.path.splitext(name)[1] in EXTENSIONS
    (data / "train/real" / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    assert_one_line_error(extract(), "1 of 5 images cannot be read", "--max_bad_fraction")


def test_a_caption_beside_an_image_does_not_count_as_bad(extract, data):
    (data / "train/real/000.txt").write_text("a cat")
    assert extract().returncode == 0
