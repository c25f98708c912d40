"""A table of labels: the rows it takes, and each wrong line by its number and value."""

import os
from collections import Counter

import pytest
from commands import assert_one_line_error, without_root
from patience import costs_at_most

from detector.base.errors import UsageError
from detector.images.folders import Entry, list_files, read_folder
from detector.images.labels_file import read_labels

FILES = "a/1.jpg", "a/2.jpg", "b/3.jpg", "b/4 5.jpg"


@pytest.fixture
def pictures(tmp_path):
    """A folder of empty files, because a listing reads names only."""
    for path in FILES:
        (tmp_path / "pictures" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / path).touch()
    (tmp_path / "pictures/b/.9.jpg").touch()
    return tmp_path / "pictures"


@pytest.fixture
def read(tmp_path, pictures):
    """Function: text or bytes of a table -> its Folder."""

    def run(text, **options):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "labels.csv").write_bytes(data)
        return read_labels(str(tmp_path / "labels.csv"), str(pictures), **options)

    return run


TABLE = "path,label,split,source,group\na/1.jpg,real,train,canon,x\nb/3.jpg,fake,test,flux,\n"
ENTRIES = [Entry("a/1.jpg", 0, "train", "canon", "x"), Entry("b/3.jpg", 1, "test", "flux", "")]

# ---- rows ----


@pytest.mark.parametrize(
    "text",
    [
        TABLE,
        TABLE.replace(",", ";"),
        TABLE.replace(",", "\t"),
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\n\n , ,\n\n"),
        TABLE.replace(",", ", "),
        TABLE.replace("path,label", " Path ,LABEL"),
        TABLE.replace("a/1.jpg", '"a/1.jpg"'),
        TABLE.replace("a/1.jpg", ".\\a\\1.jpg"),
        TABLE.replace("a/1.jpg", "b/../a//1.jpg"),
        TABLE.replace("real", "0").replace("fake", "1"),
        TABLE.replace("real", "Nature").replace("fake", "AI-Generated"),
        TABLE.replace("train", "Training").replace("test", "Test-Set"),
        b"\xef\xbb\xbf" + TABLE.encode(),
        "\n".join([*TABLE.split()[:1], *TABLE.split()[:0:-1]]),
    ],
    ids=(
        "plain semicolons tabs CRLF blank spaces header-case quotes backslashes dots numbers words"
        " splits BOM reversed"
    ).split(),
)
def test_a_table_may_be_written_in_many_ways(read, text):
    assert read(text).entries == ENTRIES


def test_columns_but_path_and_label_may_be_missing(read):
    assert read("label,path\nfake,a/1.jpg\nreal,a/2.jpg\n").entries == [
        Entry("a/1.jpg", 1, "", ""),
        Entry("a/2.jpg", 0, "", ""),
    ]


def test_folder_names_count_for_nothing(read, pictures):
    (pictures / "b").rename(pictures / "real")
    text = "path,label\nreal/3.jpg,fake\na/1.jpg,real\n"
    assert {entry.path: entry.label for entry in read(text).entries}["real/3.jpg"] == 1


def test_other_split_names_count_in_a_table_as_well(read):
    text = TABLE.replace("train", "Fit").replace("test", "check")
    splits = [entry.split for entry in read(text, split_names=("fit", "check")).entries]
    assert splits == ["fit", "check"]


def test_a_quoted_field_may_hold_the_delimiter(read, pictures):
    (pictures / "b/4 5.jpg").rename(pictures / "b/4,5.jpg")
    folder = read('path,label,source\n"b/4,5.jpg",real,"a ""b"", c"\na/1.jpg,fake,\n')
    assert folder.entries[1] == Entry("b/4,5.jpg", 0, "", 'a "b", c')


def test_a_file_whose_name_has_a_backslash_is_found(read, pictures):
    (pictures / "a\\1.jpg").touch()
    assert read("path,label\na\\1.jpg,real\na/1.jpg,fake\n").entries == [
        Entry("a/1.jpg", 1, "", ""),
        Entry("a\\1.jpg", 0, "", ""),
    ]


def test_a_table_that_repeats_the_folders_gives_the_entries_of_the_folders(make_folder, tmp_path):
    data = make_folder(tmp_path / "data", {"train/real/canon": 2, "test/fake": 2})
    expected = read_folder(data)
    rows = [f"{e.path},{e.label},{e.split},{e.source}" for e in reversed(expected.entries)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split,source", *rows]))
    assert read_labels(tmp_path / "labels.csv", data) == expected


# ---- files that the table does not list ----


def test_files_that_the_table_does_not_list_are_counted_in_one_line(read, pictures, capsys):
    (pictures / "b/notes.txt").touch()
    folder = read(TABLE)
    assert folder.ignored == {"a": 1, "b": 1, "*": 1}
    assert folder.listing == list_files(pictures)._replace(files=["a/1.jpg", "b/3.jpg"])
    left_out, ignored = capsys.readouterr().err.splitlines()
    assert left_out == "left out: 1 hidden files, such as b/.9.jpg"
    assert ignored.startswith("ignored: 3 files that ")
    assert ignored.endswith("labels.csv does not list, such as a/2.jpg")


def test_a_table_in_its_own_folder_is_not_among_its_files(pictures, capsys, monkeypatch):
    rows = [f"{path},{i % 2}" for i, path in enumerate(FILES)]
    (pictures / "labels.csv").write_text("\n".join(["path,label", *rows]))
    monkeypatch.chdir(pictures)
    assert read_labels("labels.csv", ".").ignored == {}
    assert "ignored" not in capsys.readouterr().err


def test_other_columns_are_named(read, capsys):
    read(TABLE.replace("source", "sources").replace("group", "groups"))
    line = next(line for line in capsys.readouterr().err.splitlines() if "columns" in line)
    assert line.startswith("ignored: columns of ") and line.endswith("labels.csv: sources, groups")


# ---- wrong lines ----

GOOD = "a/1.jpg,real\nb/3.jpg,fake\n"
WRONG = {
    "a missing file": (f"{GOOD}a/9.jpg,real", 4, "'a/9.jpg' is not among the images of "),
    "a file elsewhere": (f"{GOOD}x/2.jpg,real", 4, "'x/2.jpg'", "did you mean 'a/2.jpg'?"),
    "another case": (f"{GOOD}A/2.jpg,real", 4, "'A/2.jpg'", "did you mean 'a/2.jpg'?"),
    "a folder": (f"{GOOD}a,real", 4, "'a' is not among the images of "),
    "no path": (f"{GOOD},real", 4, "'' is not among the images of "),
    "a NUL": (f"{GOOD}a\0/1.jpg,real", 4, "is not among the images of "),
    "an absolute path": (f"{GOOD}/a/2.jpg,real", 4, "'/a/2.jpg' is not", "give a path below that"),
    "a drive": (f"{GOOD}C:\\a\\2.jpg,real", 4, "'C:\\a\\2.jpg' is not among"),
    "a way out": (f"{GOOD}a/../../2.jpg,real", 4, "'a/../../2.jpg' is not among"),
    "a Windows way out": (f"{GOOD}..\\2.jpg,real", 4, "'..\\2.jpg' is not among"),
    "a hidden file": (f"{GOOD}b/.9.jpg,real", 4, "'b/.9.jpg' is not among", "no hidden file"),
    "listed twice": (f"{GOOD}\na\\1.jpg,real", 5, "'a/1.jpg' is real here and real in line 2;"),
    "two labels": (f"{GOOD}a/1.jpg,fake", 4, "'a/1.jpg' is fake here and real in line 2; remove"),
    "an unknown label": (f"a/1.jpg,fakes\n{GOOD}", 2, "'fakes' is no label", "mean 'fake'?"),
    "a label unlike all": (f"a/1.jpg,cat\n{GOOD}", 2, "'cat' is no label; accepted: 0, 1, real, "),
    "no label": (f"a/2.jpg,\n{GOOD}", 2, "'' is no label; accepted: "),
    "a short row": (f"a/2.jpg\n{GOOD}", 2, "'' is no label; accepted: "),
    "a long row": (f"a/2.jpg,real,train,x\n{GOOD}", 2, "more fields than the header; quote"),
    "a quote left open": (f'{GOOD}"a/2.jpg,real\n', 4, "unexpected end of data"),
    "a quote in the middle": (f'{GOOD}"a"/2.jpg,real\n', 4, "expected after"),
    "a long field": (f"{GOOD}{'x' * 5000},real", 4, "xx' is not among"),
    "a huge field": (f"{GOOD}{'x' * 200_000},real", 4, "field larger than field limit"),
    "several": (f"a/8.jpg,real\n{GOOD}a/9.jpg,x\n", 2, "'a/8.jpg'", "(wrong lines: 2)"),
}


@pytest.mark.parametrize("rows, line, words", [(r, n, w) for r, n, *w in WRONG.values()], ids=WRONG)
def test_a_wrong_line_is_named_with_its_number_and_value(read, rows, line, words):
    with pytest.raises(UsageError) as error:
        read(f"path,label\n{rows}")
    message = str(error.value)
    assert message.startswith("--labels_file ") and f"labels.csv: line {line}: " in message
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 600


@pytest.mark.parametrize(
    "column, value, words",
    [
        ("split", "tests", ("'tests' is no split; accepted: train, val,", "did you mean 'test'?")),
        ("split", "holiday", ("'holiday' is no split; accepted: train, val, test,",)),
        ("group", "x", ("the group 'x' is in the split 'test' here and in 'train' in line 2",)),
    ],
)
def test_a_wrong_split_is_named_with_its_line(read, column, value, words):
    header, first, second = TABLE.splitlines()
    fields = dict(zip(header.split(","), second.split(","), strict=True)) | {column: value}
    with pytest.raises(UsageError) as error:
        read("\n".join([header, first, ",".join(fields.values())]))
    assert all(word in str(error.value) for word in ("line 3: ", *words)), error.value


TABLES = {
    "empty": (b"", "the header needs one column 'path'; there: nothing"),
    "blank": (b"\n \n", "the header needs one column 'path'; there: nothing"),
    "no header": (b"a/1.jpg,real\n", "the header needs one column 'path'; there: a/1.jpg, real"),
    "no label column": (b"path,labels\n", "needs one column 'label'; there: path, labels"),
    "a column twice": (b"path,label,Label\n", "one column 'label'; there: path, label, label"),
    "an optional column twice": (b"path,label,group,group\n", "needs one column 'group'"),
    "no row": (b"path,label\n", "lists images of no class; a detector needs both"),
    "one class": (b"path,label\na/1.jpg,1\n", "lists images of fake; a detector needs both"),
    "Latin-1": ("path,label\né.jpg,real".encode("latin-1"), "is not UTF-8 text; save the table as"),
    "UTF-16": ("path,label\na/1.jpg,real".encode("utf-16"), "is not UTF-8 text"),
    "an image": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not UTF-8 text"),
    "binary": (bytes(range(1, 128)) * 50, "the header needs one column 'path'"),
}


@pytest.mark.parametrize("data, words", TABLES.values(), ids=TABLES)
def test_a_table_without_rows_of_both_classes_is_an_error_of_one_line(read, data, words):
    with pytest.raises(UsageError) as error:
        read(data)
    assert "labels.csv" in str(error.value) and words in str(error.value)
    assert len(str(error.value)) < 600


def test_a_missing_table_is_named(pictures):
    with pytest.raises(UsageError, match=r"cannot read none\.csv: No such file"):
        read_labels("none.csv", pictures)


def test_files_below_an_unreadable_folder_are_left_to_their_reader(script, pictures, tmp_path):
    rows = [f"{path},{i % 2}" for i, path in enumerate(FILES)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    os.chmod(pictures / "b", 0)
    flags = "--data_dir", pictures, "--labels_file", tmp_path / "labels.csv"
    result = script("audit.py", *flags, first=without_root)
    os.chmod(pictures / "b", 0o755)
    assert "left out b/3.jpg: " in result.stderr and "Permission denied" in result.stderr
    assert_one_line_error(result, "no readable image")


def test_a_hundred_thousand_rows_are_read_in_seconds(tmp_path, pictures):
    paths = [f"a/{i}.jpg" for i in range(100_000)]
    listing = list_files(pictures)._replace(files=paths)
    rows = [f"{path},{i % 2},train,s{i % 50},g{i // 2}" for i, path in enumerate(paths)]
    (tmp_path / "labels.csv").write_text("\n".join([TABLE.splitlines()[0], *rows]))
    with costs_at_most(200):  # it takes 50; with a search of a list for each row, 4,200
        folder = read_labels(tmp_path / "labels.csv", pictures, listing=listing)
    assert Counter(entry.label for entry in folder.entries) == {0: 50_000, 1: 50_000}
    (tmp_path / "labels.csv").write_text("\n".join([TABLE.splitlines()[0], *rows[::-1], *rows]))
    with pytest.raises(UsageError, match=r"here and .* in line 100001; .*wrong lines: 100000"):
        read_labels(tmp_path / "labels.csv", pictures, listing=listing)
