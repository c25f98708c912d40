"""Rows that train or test: the folders' split or our own, with whole groups and copies."""

import numpy as np
import pytest
from made_up import make_columns, training_arguments, with_views, write_features

from detector.base.errors import UsageError
from detector.evaluation import rules
from detector.features.columns import COLUMNS, without_repeats
from detector.features.file import FeaturesFile, load_rows
from detector.images.facts import make_groups
from detector.training import rows
from detector.training.classifiers import fold_rows
from detector.training.rows import choose_rows


def chosen(columns, **changes):
    """choose_rows with the given flags -> (train rows, test rows, groups, words)."""
    train, test, groups, _, words = choose_rows(columns, training_arguments(**changes), 0)
    return train, test, groups, words


# ---- which rows ----


def test_the_folders_split_is_used():
    columns = make_columns()
    rows, test, _, words = chosen(columns)
    assert set(columns["splits"][rows]) == {"train"} and set(columns["splits"][test]) == {"test"}
    assert len(rows) + len(test) == len(columns["labels"])
    assert "folders' split" in words


@pytest.mark.parametrize("splits", ["", "val"], ids=["no split folders", "another split only"])
def test_without_a_split_a_fifth_of_each_class_tests(splits):
    columns = make_columns(real=100, fake=50, splits=False)
    columns["splits"][:] = splits
    rows, test, _, words = chosen(columns)
    assert "our own split" in words and "a fifth" in words
    assert np.bincount(columns["labels"][test]).tolist() == [20, 10]
    assert sorted(np.concatenate([rows, test])) == list(range(150))


def test_without_test_images_a_fifth_of_train_tests():
    columns = make_columns(real=90, fake=90)
    columns["splits"] = np.where(columns["splits"] == "test", "external", "train")
    rows, test, _, words = chosen(columns)
    assert "our own split" in words
    assert set(columns["splits"][np.concatenate([rows, test])]) == {"train"}
    assert (len(rows), len(test)) == (96, 24)


def test_resplit_ignores_the_folders_split_and_leaves_external_out():
    columns = make_columns(real=100, fake=100)
    columns["splits"][::10] = "external"
    rows, test, _, words = chosen(columns, resplit=True)
    assert "our own split" in words
    assert {"train", "test"} == set(columns["splits"][rows]) == set(columns["splits"][test])
    assert np.bincount(columns["labels"][test]).tolist() == [18, 18]


def test_train_splits_chooses_what_to_train_on():
    columns = make_columns()
    columns["splits"][::4] = "extra"
    rows, test, _, _ = chosen(columns, train_splits="train,extra")
    assert set(columns["splits"][rows]) == {"train", "extra"}
    assert set(columns["splits"][test]) == {"test"}


def test_training_images_never_test_even_with_test_in_train_splits():
    columns = make_columns()
    rows, test, _, words = chosen(columns, train_splits="train,test")
    assert not set(rows) & set(test)
    assert "our own split" in words and len(rows) + len(test) == len(columns["labels"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_unlabelled_images_neither_train_nor_test(split):
    columns = make_columns()
    unknown = np.flatnonzero(columns["splits"] == split)[::3]
    columns["labels"][unknown] = -1
    for resplit in (False, True):
        rows, test, _, _ = chosen(columns, resplit=resplit)
        assert not set(unknown) & set(np.concatenate([rows, test]))


def test_splits_that_are_left_out_are_logged(train):
    columns = make_columns()
    columns["splits"][:3], columns["splits"][3:5] = "external", "seen"
    assert "left out: 3 external, 2 seen" in train(columns)[3]


# ---- groups ----


def with_twins(columns, copies=4, seed=0):
    """Every picture `copies` times, with other bytes and nearly the same thumbnail."""
    many = {name: np.repeat(column, copies, axis=0) for name, column in columns.items()}
    many["sha256"] = np.array([f"{i:064x}" for i in range(len(many["sha256"]))])
    noise = np.random.default_rng(seed).integers(-1, 2, many["thumb"].shape)
    many["thumb"] = np.clip(many["thumb"] + noise, 0, 255).astype(np.uint8)
    return many


def test_near_identical_pictures_are_one_group():
    groups, kind = make_groups(with_twins(make_columns(), copies=4))
    assert kind == "near-identical images"
    assert (groups.reshape(-1, 4) == groups[::4, None]).all() and len(set(groups)) == 120


def test_byte_identical_files_are_one_group():
    columns = make_columns()
    columns["sha256"][5] = columns["sha256"][100]
    groups, _ = make_groups(columns)
    assert groups[5] == groups[100] and len(set(groups)) == 119


@pytest.mark.parametrize(
    "sources, kind", [(3, "near-identical images"), (9, "near-identical images"), (12, "sources")]
)
def test_sources_are_groups_from_ten_sources_on(sources, kind):
    columns = make_columns()
    columns["sources"] = np.array([f"source {i % sources}" for i in range(120)])
    groups, words = make_groups(columns)
    assert words == kind
    if kind == "sources":
        assert len(set(groups)) == len(set(zip(groups, columns["sources"], strict=True))) == sources


def test_ten_sources_with_too_few_of_a_class_are_no_groups():
    columns = make_columns()
    cameras, generators = ([f"{n} {i % n}" for i in range(60)] for n in (12, 2))
    columns["sources"] = np.array(cameras + generators)
    assert make_groups(columns)[1] == "near-identical images"


def test_a_twin_joins_two_sources():
    columns = make_columns()
    columns["sources"] = np.array([f"source {i % 12}" for i in range(120)])
    columns["sha256"][0] = columns["sha256"][1]
    assert len(set(make_groups(columns)[0])) == 11


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_fold_has_a_group_on_both_sides(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 300)
    groups = rng.integers(0, 60, 300) * 2 + labels
    folds = fold_rows(labels, groups, seed)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(300))
    for train, test in folds:
        assert not set(groups[train]) & set(groups[test])
        assert abs(labels[test].mean() - labels.mean()) < 0.15


@pytest.mark.parametrize("sources", [1, 20])
def test_our_own_split_keeps_groups_whole(sources):
    columns = with_twins(make_columns(splits=False))
    columns["sources"] = np.array([f"source {i // 4 % sources}" for i in range(480)])
    rows, test, groups, _ = chosen(columns)
    assert not set(groups[rows]) & set(groups[test]) and len(test) > 50


def test_twins_across_the_folders_split_are_reported_and_resplit_joins_them(train):
    columns = with_twins(make_columns(real=40, fake=40), copies=2)
    columns["splits"][:] = ["train", "test"] * 80
    assert "LEAK  80 of 80 test images have a duplicate in train" in train(columns)[3]
    assert "LEAK" not in train(columns, resplit=True)[3]


@pytest.mark.parametrize("flags", [{}, {"resplit": True}], ids=["the folders' split", "our own"])
def test_copies_share_the_group_and_the_side_of_their_image(flags):
    columns = with_views(make_columns(), 3)
    rows, test, groups, _ = chosen(columns, **flags)
    used = np.concatenate([rows, test])
    assert len(used) == 480 and len(set(groups[used])) == 120
    assert (groups[used].reshape(-1, 4) == groups[used][::4, None]).all()
    assert not set(columns["sha256"][rows]) & set(columns["sha256"][test])
    digests = columns["sha256"][rows]
    for train, scored in fold_rows(columns["labels"][rows], groups[rows], 0):
        assert not set(digests[train]) & set(digests[scored])


@pytest.mark.parametrize("flags", [{}, {"resplit": True}], ids=["the folders' split", "our own"])
def test_degraded_copies_count_neither_as_images_nor_as_twins(flags):
    too_few = rules.MIN_IMAGES - 1
    with pytest.raises(UsageError, match=f"{too_few} real images to train on"):
        chosen(with_views(make_columns(real=too_few, fake=60, splits=False), 3), **flags)
    assert len(chosen(with_views(make_columns(real=30, fake=30), 60), **flags)[0])


@pytest.mark.parametrize(
    "copies, others, stops",
    [(51, 100, True), (50, 100, False), (60, 1300, False), (70, 1300, True)],
)
def test_a_picture_repeated_above_5_percent_and_50_images_is_refused(copies, others, stops):
    columns = make_columns(real=copies + others - 40, fake=40)
    columns["thumb"][:copies] = columns["thumb"][0]
    if not stops:
        assert np.bincount(rows.group_rows(columns)[0]).max() == copies
        return
    message = f"^{copies} of {copies + others} images look like the same .*remove the copies"
    with pytest.raises(UsageError, match=message):
        rows.group_rows(columns)


# ---- distinct images ----


def joined(*several):
    return {name: np.concatenate([columns[name] for columns in several]) for name in several[0]}


def test_a_features_file_given_twice_changes_nothing(train, quick):
    columns = with_views(make_columns(), 1)
    once = train(columns, max_fpr=0.01, name="once")
    twice = train(columns, columns, max_fpr=0.01, name="twice")
    assert "240 rows repeat an earlier image and are dropped" in twice[3]
    assert twice[2].count("WARNING") == once[2].count("WARNING") == 2
    assert twice[1] == once[1]
    assert twice[0].pop("sha256") == once[0].pop("sha256")  # of the model file


def test_a_draw_of_repeated_rows_draws_distinct_rows(tmp_path):
    columns, few = (with_views(make_columns(real=300, fake=300), views) for views in (1, 3))
    once, twice, grown = (
        [
            FeaturesFile(write_features(tmp_path / f"{name}{i}.npz", part))
            for i, part in enumerate(parts)
        ]
        for name, parts in (("a", [columns]), ("b", [columns, columns]), ("c", [columns, few]))
    )
    (one, _), (two, total) = load_rows(once, 400), load_rows(twice, 400)
    assert 390 < len(two["labels"]) <= 400 and total == 1200
    assert all(np.array_equal(one[name], two[name]) for name in COLUMNS)
    whole, total = load_rows(twice, 1200)
    assert len(whole["labels"]) == total == 1200
    drawn, _ = load_rows(grown, 400)
    pairs = set(zip(drawn["sha256"], drawn["view"], strict=True))
    assert pairs == {(digest, view) for digest in set(drawn["sha256"]) for view in range(4)}


def test_a_draw_keeps_an_image_of_two_splits_in_both_with_its_copies(tmp_path):
    columns = make_columns(real=100, fake=100)
    again = {name: values[:10] for name, values in columns.items()} | {
        "splits": np.full(10, "test")
    }
    both = joined(columns, again)
    files = [
        FeaturesFile(write_features(tmp_path / f"{views}.npz", with_views(both, views)))
        for views in (1, 2)
    ]
    drawn, total = load_rows(files, 300)
    assert total == 3 * 210
    images = set(zip(drawn["sha256"], drawn["splits"], strict=True))
    rows = set(zip(drawn["sha256"], drawn["splits"], drawn["view"], strict=True))
    assert len(drawn["labels"]) == 3 * len(images)
    assert rows == {(*image, view) for image in images for view in range(3)}


def test_an_image_of_two_splits_is_a_leak_and_counts_once_after_a_resplit():
    columns = make_columns()
    again = {name: values[:10] for name, values in columns.items()}
    again["splits"] = np.full(10, "test")
    both = without_repeats(joined(columns, again))
    assert len(both["labels"]) == 130
    rows, test, *_ = chosen(both)
    assert set(both["sha256"][rows]) & set(both["sha256"][test]) == set(again["sha256"])
    rows, test, *_ = chosen(both, resplit=True)
    assert len(rows) + len(test) == 120 == len(set(both["sha256"][np.concatenate([rows, test])]))


def test_repeats_do_not_make_up_for_missing_images():
    columns = make_columns(real=18)
    columns["splits"][:] = "train"
    again = joined(columns, {**columns, "splits": np.full(78, "val")})
    with pytest.raises(UsageError, match="18 real images to train on; at least 20"):
        chosen(again, resplit=True)


def test_an_image_under_both_labels_is_no_repeat(capsys):
    columns = make_columns(splits=False)
    columns["sha256"][0] = columns["sha256"][100]
    assert len(without_repeats(columns)["labels"]) == 120
    assert "repeat" not in capsys.readouterr().err
