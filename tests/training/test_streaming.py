"""More rows than memory holds: what is drawn of them, and linear-svm on all of them, with nothing leaking into what judges it."""
import json

import numpy as np
import pytest
from conftest import assert_one_line_error
from made_up import make_columns, training_arguments, with_views, write_features

from detector.base.errors import UsageError
from detector.evaluation.metrics import auc
from detector.features.columns import COLUMNS, join_columns
from detector.features.file import FeaturesFile, load_rows, sample_rows
from detector.model.file import load_model
from detector.model.score import decision, probability
from detector.training import streaming
from detector.training.rows import Rows, choose_rows

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -r requirements/ray.txt")
from test_storage import write_dataset

# ---- the draw ----

def drawn(most, seed=0, **columns):
    n = len(columns["labels"])
    given = {"splits": np.full(n, "train"), "sources": np.full(n, ""), "view": np.zeros(n, np.int8)} | columns
    return sample_rows(given["labels"], given["splits"], given["sources"], given["view"], most, seed)


def test_a_draw_is_even_over_class_and_source_as_far_as_their_numbers_go():
    labels = np.repeat([0, 0, 1, 1], [900, 20, 60, 20])
    sources = np.repeat(["common", "rare", "flux", "gan"], [900, 20, 60, 20])
    rows = drawn(160, labels=labels, sources=sources)
    assert len(rows) == 160 == len(set(rows)) and (np.diff(rows) > 0).all()
    assert dict(zip(*np.unique(sources[rows], return_counts=True))) == {"common": 60, "rare": 20, "flux": 60, "gan": 20}


def test_splits_keep_their_shares_and_unlabelled_rows_stay_out():
    labels = np.tile([0, 1, -1], 400)
    splits = np.repeat(["train", "test", "external"], [900, 200, 100])
    rows = drawn(80, labels=labels, splits=splits)
    assert (labels[rows] >= 0).all() and dict(zip(*np.unique(splits[rows], return_counts=True))) == {"train": 60, "test": 13, "external": 6}


def test_an_image_comes_with_its_copies_or_not_at_all():
    view = np.tile([0, 1, 2], 100)
    rows = drawn(60, labels=np.repeat(np.tile([0, 1], 50), 3), view=view)
    assert len(rows) == 60 and (view[rows].reshape(-1, 3) == [0, 1, 2]).all() and (rows[::3] % 3 == 0).all()


def test_the_draw_is_the_same_for_a_seed_and_another_for_another():
    labels = np.tile([0, 1], 500)
    assert np.array_equal(drawn(100, labels=labels), drawn(100, labels=labels)) and not np.array_equal(drawn(100, labels=labels), drawn(100, 1, labels=labels))


def test_rows_that_are_drawn_are_those_of_the_files_whatever_their_kind_and_few_rows_are_all_taken(tmp_path):
    one, other = with_views(make_columns(), 1), make_columns(seed=1)
    files = [FeaturesFile(write_dataset(tmp_path / "f", one, parts=7)), FeaturesFile(write_features(tmp_path / "f.npz", other))]
    whole = join_columns([one, other])
    columns, rows = load_rows(files, 100)
    assert 90 <= len(rows) <= 100 and rows.max() > 240
    assert all(np.array_equal(columns[name], whole[name][rows]) for name in COLUMNS)
    everything, rows = load_rows(files, 360)
    assert rows is None and all(np.array_equal(everything[name], whole[name]) for name in COLUMNS)


# ---- who may see what ----

SOURCES = 12


def many(n=3000, gap=1.0, seed=0):
    """Columns of twelve sources, six a class, a fifth of the rows to test on."""
    columns = make_columns(real=n // 2, fake=n // 2, gap=gap, seed=seed)
    columns["splits"] = np.where(np.arange(n) % 5 == 0, "test", "train")
    columns["sources"] = np.array([f"{label}{i % (SOURCES // 2)}" for i, label in enumerate(columns["labels"])])
    return columns


def sampled(tmp_path, columns, most=400, **changes):
    """-> (files, numbers, the sample's columns, its Sample, what choose_rows said of it)."""
    files = [FeaturesFile(write_dataset(tmp_path / "f", columns, parts=5))]
    own, numbers = load_rows(files, most)
    train, test, groups, twins, _ = choose_rows(own, training_arguments(**changes), 0)
    return files, numbers, own, streaming.Sample(numbers, own, train, test, groups, 0), (train, test, groups, twins)


def test_a_source_that_is_held_out_of_a_fold_is_held_out_with_all_its_rows(tmp_path):
    columns = many()
    _, numbers, own, sample, (train, _, groups, _) = sampled(tmp_path, columns)
    role, _ = sample.roles(columns, 0)
    for fold, (_, held) in enumerate(sample.folds):
        sources = np.unique(own["sources"][train[held]])
        assert len(sources) and (role[np.isin(columns["sources"], sources) & (columns["splits"] == "train")] == fold).all()
    assert (role[columns["splits"] == "test"] == streaming.OUT).all()


def test_a_row_that_looks_like_a_sampled_one_goes_where_that_goes_and_one_that_two_folds_claim_nowhere(tmp_path):
    columns = many() | {"sources": np.full(3000, "")}
    _, numbers, own, sample, (train, *_) = sampled(tmp_path, columns)
    of_fold = [train[held[0]] for _, held in sample.folds]
    unsampled = np.setdiff1d(np.flatnonzero(columns["splits"] == "train"), numbers)[:3]
    columns["thumb"][unsampled[0]] = own["thumb"][of_fold[2]]
    columns["sha256"][unsampled[1]] = own["sha256"][of_fold[3]]            # a flat picture has no look-alike but its own bytes
    columns["thumb"][unsampled[2]], columns["sha256"][unsampled[2]] = own["thumb"][of_fold[0]], own["sha256"][of_fold[1]]
    role, _ = sample.roles(columns, 0)
    assert role[unsampled].tolist() == [2, 3, streaming.OUT]
    assert (np.delete(role, np.concatenate([numbers, unsampled]))[columns["splits"][np.delete(np.arange(3000), np.concatenate([numbers, unsampled]))] == "train"]
            == streaming.ALL).all()


def test_with_a_split_of_our_own_nothing_like_a_test_image_trains_and_with_the_folders_it_is_counted(tmp_path):
    columns = many() | {"sources": np.full(3000, "")}
    for flags, trains in (({"resplit": True}, False), ({}, True)):
        (tmp_path / str(trains)).mkdir()
        _, numbers, own, sample, (_, test, *_) = sampled(tmp_path / str(trains), columns, **flags)
        unsampled = np.setdiff1d(np.flatnonzero(columns["splits"] == "train"), numbers)[0]
        there = columns["thumb"][unsampled].copy()
        columns["thumb"][unsampled] = own["thumb"][test[0]]
        role, alike = sample.roles(columns, 0)
        columns["thumb"][unsampled] = there
        assert (role[unsampled] != streaming.OUT) == trains and alike == trains


def test_rows_without_a_label_and_of_other_splits_train_nothing(tmp_path):
    columns = many()
    columns["splits"][7:1000:5], columns["labels"][8:1000:5] = "external", -1
    _, _, _, sample, _ = sampled(tmp_path, columns)
    role, _ = sample.roles(columns, 0)
    assert (role[7:1000:5] == streaming.OUT).all() and (role[8:1000:5] == streaming.OUT).all() and (role[2001::5] != streaming.OUT).all()


def test_classifiers_never_see_the_rows_that_they_are_to_judge(tmp_path):
    """Each held-out source has a mark of its own that gives its label away: out-of-fold scores must not profit, training scores do."""
    columns = many(gap=0.0)
    rng = np.random.default_rng(1)
    for source in np.unique(columns["sources"]):
        columns["features"][columns["sources"] == source] += 4 * rng.normal(size=6).astype(np.float32)
    files, numbers, own, sample, (train, test, groups, twins) = sampled(tmp_path, columns, most=1500)
    part, _ = streaming.build(files, numbers, own, Rows(own, train, groups, twins), train, test, groups, 0)
    labels = own["labels"][train].astype(int)
    honest = auc(labels, part["out_of_fold"]["scores"], groups[train])["value"]
    seen = auc(labels, decision(part, own["features"][train]), groups[train])["value"]
    assert seen > honest + 0.2


def test_a_piece_is_of_many_parts_and_all_rows_come_once(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "POOL", 80)
    monkeypatch.setattr(streaming, "PIECE", 30)
    folder = write_dataset(tmp_path / "f", make_columns(real=120, fake=120), parts=24)
    places = [(folder, name, 10 * i) for i, name in enumerate(FeaturesFile(folder).meta["parts"])]
    numbers = [numbers for _, numbers in streaming.pieces(places, np.random.default_rng(0))]
    assert max(map(len, numbers)) == 30 and min(len(np.unique(piece // 10)) for piece in numbers[::2]) >= 7
    assert sorted(np.concatenate(numbers)) == list(range(240))
    assert all((np.diff(piece) == 1).mean() < 0.2 for piece in numbers)  # mixed, not part after part


# ---- the command ----

@pytest.mark.long
def test_the_command_trains_on_all_rows_says_so_and_the_model_knows_its_images(script, tmp_path):
    columns = many(gap=1.5)
    write_dataset(tmp_path / "f.parquet", columns, parts=5)
    done = script("train_model.py", "--features_file", "f.parquet", "--classifier", "linear-svm", "--max_rows", 800, "--max_fpr", 0.2)
    assert done.returncode == 0, done.stderr
    words = "800 of 3000 rows, a draw even over class and source, and the others train as well"
    assert words in done.stderr and words in json.loads((tmp_path / "model_report/metrics.json").read_text())["split"]
    model = load_model(tmp_path / "model.joblib")
    train = columns["splits"] == "train"
    assert set(model["training_data"]["images"].tolist()) == {int(d[:16], 16) - 2 ** 63 for d in columns["sha256"][train]}
    assert (model["training_data"]["real"], model["training_data"]["fake"]) == (1200, 1200)
    p_fake, labels = probability(model, decision(model, columns["features"][~train])), columns["labels"][~train]
    assert (p_fake[labels == 0] >= model["threshold"]).mean() < 0.25 and (p_fake[labels == 1] >= model["threshold"]).mean() > 0.6
    assert np.allclose(model["center"], columns["features"][train].mean(0), atol=1e-5)
    again = script("train_model.py", "--features_file", "f.parquet", "--classifier", "linear-svm", "--max_rows", 800, "--max_fpr", 0.2,
                   "--model_output_path", "again.joblib")
    assert again.returncode == 0 and (tmp_path / "again.joblib").read_bytes() == (tmp_path / "model.joblib").read_bytes()


def test_other_kinds_and_npz_files_are_trained_on_the_draw_alone(script, tmp_path):
    write_features(tmp_path / "f.npz", many(gap=1.5))
    done = script("train_model.py", "--features_file", "f.npz", "--classifier", "linear-svm", "--max_rows", 800)
    assert done.returncode == 0, done.stderr
    assert "800 of 3000 rows, a draw even over class and source)" in done.stderr
    assert len(load_model(tmp_path / "model.joblib")["training_data"]["images"]) == 640


def test_a_limit_that_is_none_is_one_line(script, tmp_path):
    write_features(tmp_path / "f.npz")
    assert_one_line_error(script("train_model.py", "--features_file", "f.npz", "--max_rows", 0), "--max_rows 0")


def test_a_data_set_that_is_damaged_further_on_is_one_line(tmp_path):
    columns = many()
    files, numbers, own, _, (train, test, groups, twins) = sampled(tmp_path, columns)
    next((tmp_path / "f").glob("part-000004*")).write_bytes(b"no Parquet")
    with pytest.raises(UsageError, match="part-000004.* cannot be read"):
        streaming.build(files, numbers, own, Rows(own, train, groups, twins), train, test, groups, 0)
