"""Which images train and which test: the folders' split or our own, whole groups, copies of an image always together."""

import numpy as np
import pytest
from made_up import make_columns, training_arguments, with_views, write_features

from detector.base.errors import UsageError
from detector.evaluation import probes
from detector.features.columns import COLUMNS, without_repeats
from detector.features.file import FeaturesFile, load_rows
from detector.images.facts import make_groups
from detector.training import rows
from detector.training.classifiers import fold_rows
from detector.training.rows import choose_rows


def chosen(columns, **changes):
    """choose_rows with the given flags -> (train rows, test rows, groups, words)."""
    train, test, groups, _, how = choose_rows(columns, training_arguments(**changes), 0)
    return train, test, groups, how


# ---- which rows ----


def test_the_folders_split_is_used():
    columns = make_columns()
    rows, test, _, how = chosen(columns)
    assert set(columns["splits"][rows]) == {"train"} and set(columns["splits"][test]) == {"test"}
    assert len(rows) + len(test) == len(columns["labels"])
    assert "folders' split" in how


@pytest.mark.parametrize("splits", ["", "val"], ids=["no split folders", "another split only"])
def test_without_a_split_a_fifth_of_each_class_tests(splits):
    columns = make_columns(real=100, fake=50, splits=False)
    columns["splits"][:] = splits
    rows, test, _, how = chosen(columns)
    assert "our own split" in how and "a fifth" in how
    assert np.bincount(columns["labels"][test]).tolist() == [20, 10]
    assert sorted(np.concatenate([rows, test])) == list(range(150))


def test_without_test_images_a_fifth_of_train_tests():
    columns = make_columns(real=90, fake=90)
    columns["splits"] = np.where(columns["splits"] == "test", "external", "train")
    rows, test, _, how = chosen(columns)
    assert "our own split" in how and set(columns["splits"][np.concatenate([rows, test])]) == {
        "train"
    }
    assert (len(rows), len(test)) == (96, 24)


def test_resplit_divides_anew_whatever_the_folders_say_and_leaves_external_out():
    columns = make_columns(real=100, fake=100)
    columns["splits"][::10] = "external"
    rows, test, _, how = chosen(columns, resplit=True)
    assert "our own split" in how
    assert {"train", "test"} == set(columns["splits"][rows]) == set(columns["splits"][test])
    assert np.bincount(columns["labels"][test]).tolist() == [18, 18]


def test_train_splits_chooses_what_to_train_on():
    columns = make_columns()
    columns["splits"][::4] = "extra"
    rows, test, _, _ = chosen(columns, train_splits="train,extra")
    assert set(columns["splits"][rows]) == {"train", "extra"} and set(columns["splits"][test]) == {
        "test"
    }


def test_images_to_train_on_never_test_even_where_the_user_names_the_test_split():
    columns = make_columns()
    rows, test, _, how = chosen(columns, train_splits="train,test")
    assert not set(rows) & set(test)
    assert "our own split" in how and len(rows) + len(test) == len(columns["labels"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_unlabelled_images_neither_train_nor_test(split):
    columns = make_columns()
    unknown = np.flatnonzero(columns["splits"] == split)[::3]
    columns["labels"][unknown] = -1
    for resplit in (False, True):
        rows, test, _, _ = chosen(columns, resplit=resplit)
        assert not set(unknown) & set(np.concatenate([rows, test]))


def test_what_is_left_out_is_said(train):
    columns = make_columns()
    columns["splits"][:3], columns["splits"][3:5] = "external", "seen"
    assert "left out: 3 external, 2 seen" in train(columns)[3]


# ---- groups ----


def with_twins(columns, copies=4, seed=0):
    """Every picture there `copies` times: other bytes, nearly the same thumbnail."""
    rng = np.random.default_rng(seed)
    many = {name: np.repeat(column, copies, axis=0) for name, column in columns.items()}
    many["sha256"] = np.array([f"{i:064x}" for i in range(len(many["sha256"]))])
    many["thumb"] = np.clip(
        many["thumb"].astype(int) + rng.integers(-1, 2, many["thumb"].shape), 0, 255
    ).astype(np.uint8)
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
def test_ten_sources_or_more_are_groups_fewer_are_not(sources, kind):
    columns = make_columns()
    columns["sources"] = np.array([f"source {i % sources}" for i in range(120)])
    groups, found = make_groups(columns)
    assert found == kind
    if kind == "sources":
        assert all(
            len(set(groups[columns["sources"] == name])) == 1 for name in set(columns["sources"])
        )
        assert len(set(groups)) == sources


def test_ten_sources_of_which_too_few_hold_one_class_are_no_groups():
    columns = make_columns()
    columns["sources"] = np.array(
        [f"camera {i % 12}" for i in range(60)] + [f"generator {i % 2}" for i in range(60)]
    )
    assert make_groups(columns)[1] == "near-identical images"


def test_a_twin_ties_two_sources_together():
    columns = make_columns()
    columns["sources"] = np.array([f"source {i % 12}" for i in range(120)])
    columns["sha256"][0] = columns["sha256"][1]
    assert len(set(make_groups(columns)[0])) == 11


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_group_is_ever_on_both_sides(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 300)
    groups = rng.integers(0, 60, 300) * 2 + labels
    folds = fold_rows(labels, groups, seed)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(300))
    for rows, test in folds:
        assert not set(groups[rows]) & set(groups[test])
        assert abs(labels[test].mean() - labels.mean()) < 0.15


@pytest.mark.parametrize("sources", [1, 20])
def test_our_own_split_keeps_groups_whole(sources):
    columns = with_twins(make_columns(splits=False))
    columns["sources"] = np.array([f"source {i // 4 % sources}" for i in range(480)])
    rows, test, groups, _ = chosen(columns)
    assert not set(groups[rows]) & set(groups[test]) and len(test) > 50


def test_twins_across_the_folders_split_are_told_and_resplit_mends_it(train):
    columns = with_twins(make_columns(real=40, fake=40), copies=2)
    columns["splits"][:] = ["train", "test"] * 80
    assert "LEAK  80 of 80 test images have a twin in train" in train(columns)[3]
    assert "LEAK" not in train(columns, resplit=True)[3]


@pytest.mark.parametrize("flags", [{}, {"resplit": True}], ids=["the folders' split", "our own"])
def test_the_copies_of_an_image_are_of_its_group_and_on_its_side(flags):
    columns = with_views(make_columns(), 3)
    rows, test, groups, _ = chosen(columns, **flags)
    used = np.concatenate([rows, test])
    assert len(used) == 480 and len(set(groups[used])) == 120
    assert (groups[used].reshape(-1, 4) == groups[used][::4, None]).all()
    assert not set(columns["sha256"][rows]) & set(columns["sha256"][test])
    for fit_on, scored in fold_rows(columns["labels"][rows], groups[rows], 0):
        assert not set(columns["sha256"][rows][fit_on]) & set(columns["sha256"][rows][scored])


@pytest.mark.parametrize("flags", [{}, {"resplit": True}], ids=["the folders' split", "our own"])
def test_copies_neither_count_as_images_nor_as_one_picture_repeated(train, flags):
    fewest = probes.MIN_IMAGES - 1
    with pytest.raises(UsageError, match=f"{fewest} real images to train on"):
        chosen(with_views(make_columns(real=fewest, fake=60, splits=False), 3), **flags)
    columns = with_views(make_columns(real=30, fake=30), 60)
    assert len(
        chosen(columns, **flags)[0]
    )  # 61 rows of one picture each, and no copies among the files
    assert (
        "40 images to train, and 120 degraded copies, 20 to test"
        in train(with_views(make_columns(real=30, fake=30), 3))[3]
    )


def test_fold_rows_refuses_fewer_groups_than_folds():
    labels = np.repeat([0, 1], 50)
    with pytest.raises(UsageError, match="only 4 groups of real images for 5 folds"):
        fold_rows(labels, np.concatenate([np.arange(50) % 4, 10 + np.arange(50)]), 0)


@pytest.mark.parametrize(
    "copies, others, stops",
    [(51, 100, True), (50, 100, False), (60, 1300, False), (70, 1300, True)],
)
def test_one_picture_above_5_percent_of_the_data_and_50_images_stops_everything(
    copies, others, stops
):
    columns = make_columns(real=copies + others - 40, fake=40)
    columns["thumb"][:copies] = columns["thumb"][0]
    if not stops:
        assert np.bincount(rows.group_rows(columns)[0]).max() == copies
        return
    with pytest.raises(
        UsageError, match=f"^{copies} of {copies + others} images look like one .*remove the copies"
    ):
        rows.group_rows(columns)


# ---- distinct images ----


def joined(*several):
    return {name: np.concatenate([columns[name] for columns in several]) for name in several[0]}


def test_a_features_file_given_twice_changes_no_model_no_figure_and_no_warning(train, quick):
    columns = with_views(make_columns(), 1)
    once, twice = (
        train(columns, max_fpr=0.01, name="once"),
        train(columns, columns, max_fpr=0.01, name="twice"),
    )
    assert "240 rows repeat an image that is there already: dropped" in twice[3]
    assert (
        twice[3]
        .replace("240 rows repeat an image that is there already: dropped\n", "")
        .count("warning")
        == once[3].count("warning")
        == 1
    )
    assert twice[1] == once[1]
    assert twice[0].pop("sha256") == once[0].pop("sha256")  # of the model file


def test_a_draw_of_repeated_rows_is_a_draw_of_distinct_ones(tmp_path):
    columns, few = (
        with_views(make_columns(real=300, fake=300), 1),
        with_views(make_columns(real=300, fake=300), 3),
    )
    once, twice, grown = (
        [
            FeaturesFile(write_features(tmp_path / f"{name}{i}.npz", part))
            for i, part in enumerate(parts)
        ]
        for name, parts in (("a", [columns]), ("b", [columns, columns]), ("c", [columns, few]))
    )
    (one, _), (two, total) = load_rows(once, 400), load_rows(twice, 400)
    assert (
        390 < len(two["labels"]) <= 400
        and total == 1200
        and all(np.array_equal(one[name], two[name]) for name in COLUMNS)
    )
    whole, total = load_rows(twice, 1200)
    assert len(whole["labels"]) == total == 1200
    drawn, _ = load_rows(grown, 400)
    assert set(zip(drawn["sha256"], drawn["view"])) == {
        (digest, view) for digest in set(drawn["sha256"]) for view in range(4)
    }


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
    images = set(zip(drawn["sha256"], drawn["splits"]))
    assert len(drawn["labels"]) == 3 * len(images) and set(
        zip(drawn["sha256"], drawn["splits"], drawn["view"])
    ) == {(*image, view) for image in images for view in range(3)}


def test_an_image_in_train_and_in_test_stays_in_both_as_a_leak_and_counts_once_after_a_resplit():
    columns = make_columns()
    again = {name: values[:10] for name, values in columns.items()} | {
        "splits": np.full(10, "test")
    }
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


def test_one_image_under_both_labels_is_no_repeat(capsys):
    columns = make_columns(splits=False)
    columns["sha256"][0] = columns["sha256"][100]
    assert (
        len(without_repeats(columns)["labels"]) == 120 and "repeat" not in capsys.readouterr().err
    )
