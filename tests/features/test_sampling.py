"""--max_rows: which rows are drawn."""

from collections import Counter

import numpy as np
from commands import assert_one_line_error
from extracting import write_dataset
from made_up import make_columns, with_views, write_features

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


def test_a_draw_is_as_even_over_class_and_source_as_possible():
    labels = np.repeat([0, 0, 1, 1], [900, 20, 60, 20])
    sources = np.repeat(["common", "rare", "flux", "gan"], [900, 20, 60, 20])
    rows = drawn(160, labels=labels, sources=sources)
    assert len(rows) == 160 == len(set(rows)) and (np.diff(rows) > 0).all()
    assert Counter(sources[rows].tolist()) == {"common": 60, "rare": 20, "flux": 60, "gan": 20}


def test_splits_keep_their_shares_and_unlabelled_rows_are_not_drawn():
    labels = np.tile([0, 1, -1], 400)
    splits = np.repeat(["train", "test", "external"], [900, 200, 100])
    rows = drawn(80, labels=labels, splits=splits)
    assert (labels[rows] >= 0).all()
    assert Counter(splits[rows].tolist()) == {"train": 60, "test": 13, "external": 6}


def test_an_image_is_drawn_with_all_its_copies():
    view = np.tile([0, 1, 2], 100)
    rows = drawn(60, labels=np.repeat(np.tile([0, 1], 50), 3), view=view)
    assert view[rows].tolist() == [0, 1, 2] * 20 and (rows[::3] % 3 == 0).all()


def test_the_draw_depends_on_the_seed_alone():
    labels = np.tile([0, 1], 500)
    first, again, other = (drawn(100, seed, labels=labels).tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_rows_are_drawn_from_both_kinds_of_files(tmp_path):
    one, other = with_views(make_columns(), 1), make_columns(seed=1)
    files = [
        FeaturesFile(write_dataset(tmp_path / "f", one, parts=7)),
        FeaturesFile(write_features(tmp_path / "f.npz", other)),
    ]
    whole = join_columns([one, other])
    columns, total = load_rows(files, 100)
    keys = list(zip(whole["sha256"].tolist(), whole["view"].tolist(), strict=True))
    drawn_keys = zip(columns["sha256"].tolist(), columns["view"].tolist(), strict=True)
    rows = np.array([keys.index(key) for key in drawn_keys])
    assert 90 <= len(rows) <= 100 and total == 360
    assert rows.max() > 240 and (np.diff(rows) > 0).all()
    assert all(np.array_equal(columns[name], whole[name][rows]) for name in COLUMNS)
    everything, total = load_rows(files, 360)
    assert total == 360 and all(np.array_equal(everything[name], whole[name]) for name in COLUMNS)


# ---- the command ----


def test_a_model_is_trained_on_the_draw_and_reports_it(script, tmp_path):
    columns = make_columns(real=1500, fake=1500, gap=1.5)
    columns["splits"] = np.where(np.arange(3000) % 5 == 0, "test", "train")
    columns["sources"] = np.array([f"{y}{i % 6}" for i, y in enumerate(columns["labels"])])
    write_features(tmp_path / "f.npz", columns)
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


def test_a_row_limit_of_zero_is_a_one_line_error(script, tmp_path):
    write_features(tmp_path / "f.npz")
    assert_one_line_error(
        script("train_model.py", "--features_file", "f.npz", "--max_rows", 0), "--max_rows 0"
    )
