"""More rows than --max_rows: what is drawn of them."""

import numpy as np
from commands import assert_one_line_error
from made_up import make_columns, with_views, write_features
from test_storage import write_dataset

from detector.features.columns import COLUMNS, join_columns
from detector.features.file import FeaturesFile, load_rows, sample_rows
from detector.model.file import load_model

# ---- the draw ----


def drawn(most, seed=0, **columns):
    n = len(columns["labels"])
    given = {
        "splits": np.full(n, "train"),
        "sources": np.full(n, ""),
        "view": np.zeros(n, np.int8),
    } | columns
    return sample_rows(
        given["labels"], given["splits"], given["sources"], given["view"], most, seed
    )


def test_a_draw_is_even_over_class_and_source_as_far_as_their_numbers_go():
    labels = np.repeat([0, 0, 1, 1], [900, 20, 60, 20])
    sources = np.repeat(["common", "rare", "flux", "gan"], [900, 20, 60, 20])
    rows = drawn(160, labels=labels, sources=sources)
    assert len(rows) == 160 == len(set(rows)) and (np.diff(rows) > 0).all()
    assert dict(zip(*np.unique(sources[rows], return_counts=True))) == {
        "common": 60,
        "rare": 20,
        "flux": 60,
        "gan": 20,
    }


def test_splits_keep_their_shares_and_unlabelled_rows_stay_out():
    labels = np.tile([0, 1, -1], 400)
    splits = np.repeat(["train", "test", "external"], [900, 200, 100])
    rows = drawn(80, labels=labels, splits=splits)
    assert (labels[rows] >= 0).all() and dict(
        zip(*np.unique(splits[rows], return_counts=True))
    ) == {"train": 60, "test": 13, "external": 6}


def test_an_image_comes_with_its_copies_or_not_at_all():
    view = np.tile([0, 1, 2], 100)
    rows = drawn(60, labels=np.repeat(np.tile([0, 1], 50), 3), view=view)
    assert (
        len(rows) == 60
        and (view[rows].reshape(-1, 3) == [0, 1, 2]).all()
        and (rows[::3] % 3 == 0).all()
    )


def test_the_draw_is_the_same_for_a_seed_and_another_for_another():
    labels = np.tile([0, 1], 500)
    assert np.array_equal(
        drawn(100, labels=labels), drawn(100, labels=labels)
    ) and not np.array_equal(drawn(100, labels=labels), drawn(100, 1, labels=labels))


def test_rows_that_are_drawn_are_those_of_the_files_whatever_their_kind_and_few_rows_are_all_taken(
    tmp_path,
):
    one, other = with_views(make_columns(), 1), make_columns(seed=1)
    files = [
        FeaturesFile(write_dataset(tmp_path / "f", one, parts=7)),
        FeaturesFile(write_features(tmp_path / "f.npz", other)),
    ]
    whole = join_columns([one, other])
    columns, total = load_rows(files, 100)
    keys = list(zip(whole["sha256"].tolist(), whole["view"].tolist(), strict=True))
    rows = np.array(
        [
            keys.index(key)
            for key in zip(columns["sha256"].tolist(), columns["view"].tolist(), strict=True)
        ]
    )
    assert (
        90 <= len(rows) <= 100 and total == 360 and rows.max() > 240 and (np.diff(rows) > 0).all()
    )
    assert all(np.array_equal(columns[name], whole[name][rows]) for name in COLUMNS)
    everything, total = load_rows(files, 360)
    assert total == 360 and all(np.array_equal(everything[name], whole[name]) for name in COLUMNS)


SOURCES = 12


def many(n=3000, gap=1.0, seed=0):
    """Columns of twelve sources, six a class, a fifth of the rows to test on."""
    columns = make_columns(real=n // 2, fake=n // 2, gap=gap, seed=seed)
    columns["splits"] = np.where(np.arange(n) % 5 == 0, "test", "train")
    columns["sources"] = np.array(
        [f"{label}{i % (SOURCES // 2)}" for i, label in enumerate(columns["labels"])]
    )
    return columns


# ---- the command ----


def test_a_model_is_trained_on_the_draw_and_its_report_says_so(script, tmp_path):
    write_features(tmp_path / "f.npz", many(gap=1.5))
    done = script(
        "train_model.py",
        "--features_file",
        "f.npz",
        "--classifier",
        "linear-svm",
        "--max_rows",
        800,
    )
    assert done.returncode == 0, done.stderr
    assert "800 of 3000 rows, a draw even over class and source)" in done.stderr
    assert len(load_model(tmp_path / "model.joblib")["training_data"]["images"]) == 640


def test_a_limit_that_is_none_is_one_line(script, tmp_path):
    write_features(tmp_path / "f.npz")
    assert_one_line_error(
        script("train_model.py", "--features_file", "f.npz", "--max_rows", 0), "--max_rows 0"
    )
