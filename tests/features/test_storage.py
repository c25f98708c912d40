"""Folders and features as Parquet: what is written is read back, whatever reads Parquet reads it, what is damaged is told."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import assert_one_line_error
from made_up import BASELINE, ENCODER, make_columns, with_views, write_features

from detector.base.errors import UsageError
from detector.features import file, storage
from detector.features.columns import COLUMNS, join_columns
from detector.features.file import load_features, load_rows


def rich_columns():
    """Columns with everything that a file may have: copies, no source, no split, no label, names of other scripts."""
    columns = with_views(make_columns(real=9, fake=7), 2)
    columns["paths"][0], columns["sources"][3:9], columns["splits"][-1] = (
        "übung/图.jpg",
        "camera",
        "",
    )
    columns["labels"][5], columns["facts"]["format"][2:5] = -1, ["PNG", "", "WEBP"]
    return columns


def write_dataset(folder, columns, parts=3, encoder=ENCODER):
    """Columns -> a finished data set of that many parts."""
    cuts = np.linspace(0, len(columns["labels"]), parts + 1).astype(int)
    names = [f"part-{i:06d}-{i:016x}.parquet" for i in range(parts)]
    for name, start, end in zip(names, cuts[:-1], cuts[1:]):
        storage.write_part(
            folder,
            name,
            {column: columns[column][start:end] for column in COLUMNS},
            {"start": int(start)},
        )
    storage.write_bytes(
        folder, "_meta.json", json.dumps({"encoder": encoder, "parts": names}).encode()
    )
    return folder


def test_a_data_set_is_read_as_the_features_file_of_the_same_columns(tmp_path):
    columns = rich_columns()
    one, other = (
        load_features(write_features(tmp_path / "f.npz", columns)),
        load_features(write_dataset(tmp_path / "f", columns)),
    )
    for name in COLUMNS:
        assert (
            one[name].dtype.kind == other[name].dtype.kind
            and one[name].shape == other[name].shape
            and (one[name] == other[name]).all()
        ), name
    assert other["meta"]["encoder"] == one["meta"]["encoder"]


def test_whatever_reads_parquet_reads_the_folder(tmp_path):
    columns = rich_columns()
    table = pq.read_table(write_dataset(tmp_path / "f", columns))
    assert set(table.column_names) == set(COLUMNS) and len(table) == len(columns["labels"])
    assert table["paths"].to_pylist() == columns["paths"].tolist()
    assert np.array_equal(
        np.stack(table["features"].to_pylist()).astype(np.float32), columns["features"]
    )
    assert table["facts"][2].as_py()["format"] == "PNG"


def test_a_part_without_rows_and_what_it_was_told_are_kept(tmp_path):
    nothing = {name: column[:0] for name, column in make_columns().items()}
    storage.write_part(
        tmp_path, "part-000000-00.parquet", nothing, {"bad": [["a.jpg", "truncated", True]]}
    )
    assert storage.about_part(tmp_path, "part-000000-00.parquet") == {
        "bad": [["a.jpg", "truncated", True]]
    }
    assert storage.read_part(tmp_path, "part-000000-00.parquet")["features"].shape == (0, 6)


def test_a_folder_may_have_any_name(tmp_path, monkeypatch):
    columns = make_columns(real=3, fake=3)
    monkeypatch.chdir(tmp_path)
    for name in ("f", "with space", "100%25 ?#", "图"):
        write_dataset(name, columns, parts=1)
        assert load_features(name)["paths"].tolist() == columns["paths"].tolist()


def test_parts_that_meta_does_not_name_are_not_there(tmp_path):
    columns = make_columns()
    folder = write_dataset(tmp_path / "f", columns)
    storage.write_part(folder, "part-000099-00.parquet", columns, {})  # of a run that was killed
    assert len(load_features(folder)["labels"]) == len(columns["labels"])


def test_npz_and_parquet_are_trained_on_together_and_the_audit_reads_parquet_too(script, tmp_path):
    one, other = make_columns(), make_columns(seed=1)
    files = [write_features(tmp_path / "f.npz", one), write_dataset(tmp_path / "f.parquet", other)]
    opened, encoder = file.open_files(files, crops=0)
    columns, total = load_rows(opened, 1000)
    assert (
        encoder == ENCODER
        and total == 240
        and np.array_equal(columns["features"], join_columns([one, other])["features"])
    )
    assert script("audit.py", "--features_file", files[1]).returncode == 0


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda folder: (folder / "_meta.json").unlink(), "nor a finished data set"),
        (lambda folder: (folder / "_meta.json").write_text("{"), "_meta.json is damaged"),
        (lambda folder: (folder / "_meta.json").write_text("{}"), "_meta.json is damaged"),
        (
            lambda folder: next(folder.glob("part-000001*")).unlink(),
            "part-000001-0000000000000001.parquet cannot be read",
        ),
        (
            lambda folder: next(folder.glob("part-000001*")).write_bytes(
                b"PAR1 of something else PAR1"
            ),
            "cannot be read",
        ),
        (
            lambda folder: next(folder.glob("part-000001*")).write_bytes(
                next(folder.glob("part-000001*")).read_bytes()[:-50]
            ),
            "cannot be read",
        ),
    ],
    ids=[
        "unfinished",
        "broken meta",
        "meta without parts",
        "a part missing",
        "a part of something else",
        "a part truncated",
    ],
)
def test_a_damaged_data_set_is_one_line(script, tmp_path, damage, told):
    folder = write_dataset(tmp_path / "f.parquet", make_columns())
    damage(folder)
    assert_one_line_error(script("train_model.py", "--features_file", folder), folder, told)


def test_columns_of_other_types_are_one_line(tmp_path):
    import pyarrow as pa

    folder = write_dataset(tmp_path / "f", make_columns(), parts=1)
    name = "part-000000-0000000000000000.parquet"
    table = pq.read_table(folder / name)
    for column, values in (
        ("features", pa.array(["x"] * len(table))),
        ("labels", pa.array([7] * len(table))),
    ):
        pq.write_table(
            table.set_column(table.column_names.index(column), column, values), folder / name
        )
        with pytest.raises(UsageError, match="extract again"):
            load_features(folder)


@pytest.mark.parametrize("address", ["ftp://host/folder", "s3:///folder", "C://x"])
def test_an_address_that_is_none_is_one_line(script, tmp_path, address):
    assert_one_line_error(script("train_model.py", "--features_file", address), address)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data_dir", "s3://bucket/a"], ["s3://bucket/a", "--ray"]),
        (["--data_dir", ".", "--output_file", "gs://bucket/a"], ["gs://bucket/a", "--ray"]),
        (["--data_dir", ".", "--output_file", "f.parquet"], ["f.parquet", "--ray"]),
        (
            ["--data_dir", ".", "--output_file", "f.npz", "--ray", "local"],
            ["f.npz", "features.parquet"],
        ),
    ],
)
def test_what_needs_ray_says_so(script, tmp_path, flags, words):
    assert_one_line_error(script("extract_features.py", *flags), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_without_pyarrow_it_is_named(script, tmp_path):
    (tmp_path / "none" / "pyarrow").mkdir(parents=True)
    (tmp_path / "none" / "pyarrow" / "__init__.py").write_text("raise ImportError")
    done = script(
        "train_model.py",
        "--features_file",
        write_dataset(tmp_path / "f", make_columns()),
        PYTHONPATH=str(tmp_path / "none"),
    )
    assert_one_line_error(done, "pyarrow", "requirements/ray.txt")


def test_of_a_file_of_another_kind_nobody_is_told_to_load_it_unsafely():
    with pytest.raises(UsageError, match="not a features file .it is of another kind.; extract"):
        load_features(BASELINE)
