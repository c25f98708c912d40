"""Features of images that a table labels: as from folders, changed with the table, grown, resumed.

A group of the table stays together in every split, fold and interval.
"""

import json

import numpy as np
import pytest
from commands import assert_one_line_error
from extracting import digest, extract, finish, names, rows, strike
from made_up import make_columns, training_arguments, write_features

from detector.features.file import load_features
from detector.images.facts import make_groups
from detector.images.folders import read_folder
from detector.training.rows import choose_rows

pytestmark = pytest.mark.usefixtures("settings")

HEADER = "path,label,split,source,group"


@pytest.fixture
def table(few, tmp_path):
    """A table that repeats the folders' names: list of its rows, each a list of fields."""
    return [[e.path, str(e.label), e.split, e.source, ""] for e in read_folder(few).entries]


@pytest.fixture
def labels(tmp_path):
    """Function: rows -> the flag with their file."""

    def write(rows):
        lines = [HEADER, *(",".join(row) for row in rows)]
        (tmp_path / "labels.csv").write_text("\n".join(lines))
        return "--labels_file", tmp_path / "labels.csv"

    return write


# ---- the features file ----


def test_a_table_that_repeats_the_folders_gives_the_same_file_to_the_byte(
    few, table, labels, tmp_path
):
    extract(few, tmp_path / "folders.npz", "--views", 1)
    extract(few, tmp_path / "table.npz", "--views", 1, *labels(table[::-1]))
    assert digest(tmp_path / "folders.npz") == digest(tmp_path / "table.npz")


def test_every_column_follows_the_table(few, table, labels, tmp_path):
    for i, row in enumerate(table):
        row[1:] = str(1 - int(row[1])), "val" if i < 12 else "", f"s{i}", f"g{i // 3}"
    columns = extract(few, tmp_path / "f.npz", *labels(table))
    for i, name in enumerate(("paths", "labels", "splits", "sources", "groups")):
        assert columns[name].astype(str).tolist() == [row[i] for row in table]


def test_a_changed_table_relabels_without_encoding_anew(
    few, table, labels, tmp_path, encoded, capsys
):
    before = extract(few, tmp_path / "f.npz", *labels(table))
    encoded.clear()
    table[0][1:] = "1", "test", "a much longer name of a source", "a group"
    table[5][3] = "other"
    columns = extract(few, tmp_path / "f.npz", *labels(table))
    assert encoded == [] and list(columns["paths"]) == list(before["paths"])
    assert columns["labels"][0] == 1 and columns["splits"][0] == "test"
    assert columns["sources"][0] == "a much longer name of a source"
    assert columns["groups"].tolist() == ["a group"] + [""] * 23
    said = capsys.readouterr().err
    assert "2 rows have another label, split, source or group than before" in said
    extract(few, tmp_path / "f.npz", *labels(table))
    assert "another label" not in capsys.readouterr().err
    assert rows(extract(few, tmp_path / "f.npz")) == rows(before)  # the folders count again


def test_a_draw_relabels_the_rows_outside_it_too(few, table, labels, tmp_path):
    extract(few, tmp_path / "f.npz", "--limit", 8, *labels(table))
    drawn = load_features(tmp_path / "f.npz")["paths"]
    for row in table:  # other cells, so another draw
        row[2] = "train" if row[0] in drawn else "test"
        row[3] = "new"
    columns = extract(few, tmp_path / "f.npz", "--limit", 8, *labels(table))
    assert len(columns["paths"]) > 8 and set(columns["sources"]) == {"new"}


@pytest.mark.parametrize("flags", [(), ("--prune",)], ids=["kept", "pruned"])
def test_a_table_that_grows_and_shrinks(few, table, labels, tmp_path, encoded, capsys, flags):
    first = extract(few, tmp_path / "f.npz", *labels(table[4:]))
    encoded.clear()
    columns = extract(few, tmp_path / "f.npz", *labels(table[:-2]), *flags)
    assert sum(encoded) == 4
    gone = {row[0] for row in table[-2:]}
    assert set(columns["paths"]) == {row[0] for row in table} - (gone if flags else set())
    now, stay = rows(columns), rows(first, slice(-2 if flags else None))
    assert all(now[key] == values for key, values in stay.items())
    said = capsys.readouterr().err
    assert "new images: 4 (test/fake 4)" in said
    assert f"2 {'' if flags else 'of these '}rows " in said
    assert "files that the table does not list" in said


def test_a_killed_run_resumes_with_the_table_of_the_day(few, table, labels, tmp_path, capsys):
    blow = "np.savez = lambda file, **columns: count() and half(file) or savez(file, **columns)"
    strike(blow, few, tmp_path / "f.npz", *labels(table), after=5)
    stored = len(list(tmp_path.glob("f.npz.parts/*.npz")))
    assert stored in (3, 4)  # two threads store parts; the other may be about to end its own
    table[0][1:] = "1", "test", "s", "g"
    done = finish(few, tmp_path / "f.npz", *labels(table))
    assert f"resuming: {stored} of 12 batches" in done.stderr
    extract(few, tmp_path / "whole.npz", "--batch_size", 2, *labels(table))
    assert rows(load_features(tmp_path / "f.npz")) == rows(load_features(tmp_path / "whole.npz"))
    assert load_features(tmp_path / "f.npz")["groups"][0] == "g"


def test_strict_ends_with_1_where_the_table_leaves_out_an_image(
    few, table, labels, tmp_path, script
):
    flags = "extract_features.py", "--data_dir", few, "--strict", *labels(table[1:])
    result = script(*flags)
    assert result.returncode == 1 and "ignored 1 files in 1 folders" in result.stdout
    assert f"does not list, such as {table[0][0]}" in result.stderr
    assert script(*flags[:-2], *labels(table)).returncode == 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--ray", "local"), "--ray takes labels from folder names alone"),
        (("--labels_file", "none.csv"), "cannot read none.csv: No such file"),
    ],
)
def test_a_table_that_cannot_be_used_is_an_error_before_the_work(
    few, table, labels, tmp_path, script, flags, words
):
    result = script("extract_features.py", "--data_dir", few, *labels(table), *flags)
    assert_one_line_error(result, words)
    assert names(tmp_path) == ["home", "labels.csv"]


def test_a_table_and_unlabelled_exclude_each_other(few, table, labels, script):
    result = script("extract_features.py", "--data_dir", few, *labels(table), "--unlabelled")
    assert result.returncode == 2 and "not allowed with argument" in result.stderr


# ---- groups ----


def grouped(columns, size=6):
    """The columns with groups of `size` images of a class, and every tenth image alone."""
    number = np.arange(len(columns["labels"]))
    names = np.char.add("g", (number // size).astype(str))
    return columns | {"groups": np.where(number % 10 == 0, "", names)}


def test_files_of_earlier_versions_have_no_groups(tmp_path):
    columns = make_columns()
    del columns["groups"]
    np.savez(tmp_path / "f.npz", meta=np.array(json.dumps({})), **columns)
    assert load_features(tmp_path / "f.npz")["groups"].tolist() == [""] * 120


@pytest.mark.parametrize("sources", [1, 12], ids=["one source", "many sources"])
def test_images_of_a_group_are_on_one_side_of_every_split_and_fold(sources):
    columns = grouped(make_columns(splits=False))
    columns["sources"] = np.array([f"s{i % sources}" for i in range(120)])
    columns["sources"][::5] = ""
    groups, words = make_groups(columns)
    kind = "sources" if sources == 12 else "near-identical images"
    assert words == f"{kind} and given groups"
    for name in set(columns["groups"]) - {""}:
        assert len(set(groups[columns["groups"] == name])) == 1
    if sources == 1:
        assert len(set(groups)) == len(set(columns["groups"])) - 1 + 12  # those alone
    train, test, _, _, words = choose_rows(columns, training_arguments(), 0)
    of_both = set(columns["groups"][train]) & set(columns["groups"][test])
    assert len(test) and of_both <= {""} and "given groups" in words


def test_groups_widen_the_intervals_over_images_and_of_sources(train):
    plain = make_columns(real=120, fake=120, gap=1.5)
    plain["sources"] = np.where(np.arange(240) % 2, "odd", "even")
    plain["features"] = plain["features"][np.arange(240) // 10 * 10]  # alike within a group

    def widths(columns, name):
        _, metrics, *_ = train(columns, name=name)
        measured = [metrics["overall"]["auc"], *(row["auc"] for row in metrics["by_source"])]
        return np.array([high - low for low, high in (row["interval"] for row in measured)])

    alone, given = widths(plain, "alone"), widths(grouped(plain, size=10), "given")
    assert len(alone) == 3 and (given > 1.2 * alone).all()


def test_a_group_counts_once_where_independent_images_are_counted():
    columns = grouped(make_columns(splits=False))
    train, test, _, twins, _ = choose_rows(columns, training_arguments(), 0)
    assert len(set(twins[[*train, *test]])) == len(set(columns["groups"])) - 1 + 12


def test_images_of_a_group_are_no_duplicates_for_the_audit(tmp_path, train):
    columns = make_columns()
    columns["groups"] = np.array([f"pair {i % 60}" for i in range(120)])  # a real and its fake
    _, metrics, _, said = train(columns)
    assert metrics["audit"]["twins"]["clusters_with_both_labels"] == 0
    assert "copies under both labels" not in said


def test_too_few_groups_to_train_on_are_an_error(command, tmp_path):
    columns = make_columns()
    columns["groups"] = np.where(columns["labels"] == 1, "all fakes", "")
    result = command(features=[write_features(tmp_path / "g.npz", columns)])
    assert_one_line_error(result, "only 1 groups of fake images")
