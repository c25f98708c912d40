"""Features as Parquet: written, read back, read by others, and refused when damaged."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import assert_one_line_error
from extracting import names, write_dataset
from made_up import BASELINE, ENCODER, make_columns, with_views, write_features

from detector.base.errors import UsageError
from detector.features import file, storage
from detector.features.columns import COLUMNS, join_columns
from detector.features.file import load_features, load_rows


def rich_columns():
    """Columns with copies, non-Latin names, and rows without source, split or label."""
    columns = with_views(make_columns(real=9, fake=7), 2)
    columns["paths"][0], columns["sources"][3:9] = "übung/图.jpg", "camera"
    columns["splits"][-1], columns["labels"][5] = "", -1
    columns["groups"][:6] = "a scene"
    columns["facts"]["format"][2:5] = ["PNG", "", "WEBP"]
    return columns


def test_a_data_set_is_read_like_a_features_file(tmp_path):
    columns = rich_columns()
    one = load_features(write_features(tmp_path / "f.npz", columns))
    other = load_features(write_dataset(tmp_path / "f", columns))
    for name in COLUMNS:
        assert one[name].dtype.kind == other[name].dtype.kind, name
        assert np.array_equal(one[name], other[name]), name
    assert other["meta"]["encoder"] == one["meta"]["encoder"]


def test_a_data_set_of_an_earlier_version_has_no_groups(tmp_path):
    columns = rich_columns()
    folder = write_dataset(tmp_path / "f", columns, parts=1)
    (part,) = folder.glob("*.parquet")
    pq.write_table(pq.read_table(part).drop_columns(["groups"]), part)
    again = load_features(folder)
    assert again["groups"].tolist() == [""] * len(columns["labels"])
    assert again["paths"].tolist() == columns["paths"].tolist()


def test_any_parquet_reader_reads_the_folder(tmp_path):
    columns = rich_columns()
    table = pq.read_table(write_dataset(tmp_path / "f", columns))
    assert set(table.column_names) == set(COLUMNS) and len(table) == len(columns["labels"])
    assert table["paths"].to_pylist() == columns["paths"].tolist()
    assert np.array_equal(
        np.stack(table["features"].to_pylist()).astype(np.float32), columns["features"]
    )
    assert table["facts"][2].as_py()["format"] == "PNG"


def test_a_part_without_rows_keeps_its_footer(tmp_path):
    nothing = {name: column[:0] for name, column in make_columns().items()}
    about = {"bad": [["a.jpg", "truncated", True]]}
    storage.write_part(tmp_path, "part-000000-00.parquet", nothing, about)
    assert storage.about_part(tmp_path, "part-000000-00.parquet") == about
    assert storage.read_part(tmp_path, "part-000000-00.parquet")["features"].shape == (0, 6)


def test_a_folder_may_have_any_name(tmp_path, monkeypatch):
    columns = make_columns(real=3, fake=3)
    monkeypatch.chdir(tmp_path)
    for name in ("f", "with space", "100%25 ?#", "图"):
        write_dataset(name, columns, parts=1)
        assert load_features(name)["paths"].tolist() == columns["paths"].tolist()


def test_parts_that_meta_does_not_name_are_ignored(tmp_path):
    columns = make_columns()
    folder = write_dataset(tmp_path / "f", columns)
    storage.write_part(folder, "part-000099-00.parquet", columns, {})  # left by a killed run
    assert len(load_features(folder)["labels"]) == len(columns["labels"])


def test_npz_and_parquet_are_read_together_and_audited(script, tmp_path):
    one, other = make_columns(), make_columns(seed=1)
    files = [write_features(tmp_path / "f.npz", one), write_dataset(tmp_path / "f.parquet", other)]
    opened, encoder = file.open_files(files, crops=0)
    columns, total = load_rows(opened, 1000)
    assert encoder == ENCODER and total == 240
    assert np.array_equal(columns["features"], join_columns([one, other])["features"])
    assert script("audit.py", "--features_file", files[1]).returncode == 0


PART = "part-000001-0000000000000001.parquet"


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("_meta.json", lambda path: path.unlink(), "nor a finished data set"),
        ("_meta.json", lambda path: path.write_text("{"), "_meta.json is damaged"),
        ("_meta.json", lambda path: path.write_text("{}"), "_meta.json is damaged"),
        (PART, lambda path: path.unlink(), f"{PART} cannot be read"),
        (PART, lambda path: path.write_bytes(b"PAR1 other PAR1"), "cannot be read"),
        (PART, lambda path: path.write_bytes(path.read_bytes()[:-50]), "cannot be read"),
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
def test_a_damaged_data_set_is_a_one_line_error(script, tmp_path, name, damage, message):
    folder = write_dataset(tmp_path / "f.parquet", make_columns())
    damage(folder / name)
    assert_one_line_error(script("train_model.py", "--features_file", folder), folder, message)


def test_columns_of_other_types_are_refused(tmp_path):
    import pyarrow as pa

    folder = write_dataset(tmp_path / "f", make_columns(), parts=1)
    name = "part-000000-0000000000000000.parquet"
    table = pq.read_table(folder / name)
    for column, value in (("features", "x"), ("labels", 7)):
        values = pa.array([value] * len(table))
        place = table.column_names.index(column)
        pq.write_table(table.set_column(place, column, values), folder / name)
        with pytest.raises(UsageError, match="extract again"):
            load_features(folder)


@pytest.mark.parametrize("address", ["ftp://host/folder", "s3:///folder", "C://x"])
def test_an_invalid_address_is_a_one_line_error(script, tmp_path, address):
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
def test_object_stores_and_parquet_require_ray(script, tmp_path, flags, words):
    assert_one_line_error(script("extract_features.py", *flags), *words)
    assert names(tmp_path) == ["home"]


def test_a_missing_pyarrow_is_named(script, tmp_path):
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "pyarrow.py").write_text("raise ImportError")
    folder = write_dataset(tmp_path / "f", make_columns())
    done = script("train_model.py", "--features_file", folder, PYTHONPATH=tmp_path / "blocked")
    assert_one_line_error(done, "pyarrow", "requirements/ray.txt")


def test_the_error_for_another_file_recommends_no_unsafe_loading():
    with pytest.raises(UsageError, match="not a features file .it is of another kind.; extract"):
        load_features(BASELINE)
