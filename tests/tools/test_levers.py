"""benchmarks/levers.py: a better head is found, a useless one is not, and folds stay apart."""

import numpy as np
import pytest
from made_up import ENCODER, make_columns, with_views, write_features

from benchmarks import levers
from benchmarks.held_out import FOLDS

IMAGES, SOURCES = 240, 24  # untouched images and their sources


@pytest.fixture
def columns():
    """Columns of `prepared_columns` with one degraded copy of each image."""
    source = np.tile(np.arange(IMAGES) % SOURCES, 2)
    return {
        "labels": source % 2,
        "sources": np.array([f"s{i}" for i in source]),
        "fold": source // 2 % FOLDS,
        "view": np.repeat([0, 1], IMAGES),
    }


@pytest.fixture
def features(columns):
    """Block 10 separates the classes poorly, block 8 well, block 11 holds nothing."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 2 * IMAGES, 12))
    gaps = np.array([0.5, 3, 0])[:, None, None]
    noise[:, :, :1] += gaps * columns["labels"][:, None]
    return dict(zip(("10", "8", "11"), noise, strict=True))


@pytest.fixture
def measured(columns, features):
    """Function: a lever's words -> its result on the untouched images."""
    tried = levers.levers(list(features))
    conditions = [np.flatnonzero(columns["view"] == 0)]

    def measure(words):
        return levers.best_of(tried[words], columns, features, conditions, levers.C)[1][0]

    return measure


def interval(text):
    return [float(number) for number in text.partition("[")[2].strip("]").split(", ")]


def test_a_better_block_has_a_difference_above_zero(measured):
    base = measured("base: block 10, logistic")
    low, high = interval(levers.difference(measured("block 8"), base))
    assert 0 < low < high and np.mean(measured("block 8")[0]) > 0.95


def test_a_block_without_information_is_at_chance(measured):
    assert abs(np.mean(measured("block 11")[0]) - 0.5) < 0.15


def test_the_base_differs_from_itself_by_nothing(measured):
    base = measured("base: block 10, logistic")
    assert levers.difference(base, base) == "+0.000 [+0.000, +0.000]"


@pytest.mark.parametrize("words", levers.levers(["8", "10", "11"]))
def test_every_change_scores_a_fold_without_its_own_labels(words, columns, features):
    """Labels of a fold that are turned around change no score of this fold."""
    lever = levers.levers(["8", "10", "11"])[words]
    if "components" in words:  # there are fewer features here than components
        lever = lever._replace(scaled=levers.partial(levers.components, 4))
    own = columns["fold"] == 1
    turned = columns | {"labels": np.where(own, 1 - columns["labels"], columns["labels"])}
    point = levers.points_of(lever.kinds, levers.C)[0]
    scores = [levers.scores_of(lever, c, features, point)[own] for c in (columns, turned)]
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-7)


def test_a_source_weighs_by_the_power_of_its_images():
    labels, sources = np.array([0, 0, 0, 1, 1]), np.array(["a", "a", "b", "c", "d"])
    weight = levers.by_source(0, labels, sources)
    assert weight[:2].sum() == pytest.approx(weight[2]) and weight[labels == 0].sum() == 2.5
    assert levers.by_source(1, labels, sources)[0] == pytest.approx(2.5 / 3)


def test_the_values_of_c_that_are_given_are_tried(columns, features):
    conditions = [np.flatnonzero(columns["view"] == 0)]
    for values in ([2e-4], [2e-4, 2e-5]):
        grid = levers.C | {"logistic": values}
        best, _ = levers.best_of(levers.BASE, columns, features, conditions, grid)
        assert float(best) in values


def test_the_command_reads_blocks_and_c_from_its_flags(tmp_path, monkeypatch, capsys):
    columns = make_columns(dim=8)
    number = np.arange(len(columns["labels"])) % 6
    columns["sources"] = np.array([f"s{i}" for i in number])
    columns["splits"][:] = "train"
    write_features(tmp_path / "held.npz", with_views(columns, 2), ENCODER | {"layers": "8,10"})
    lines = ["source,repository", *(f"s{i},r{i}" for i in range(6))]
    (tmp_path / "SOURCES.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(levers, "levers", lambda blocks: {f"base of {blocks}": levers.BASE})
    files = ["--features_file", "held.npz", "--sources_file", "SOURCES.csv"]
    levers.main([*files, "--C", "3e-4"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| base of")]
    assert line.startswith("| base of ['8', '10'] | 0.0003 | ")


def test_each_value_of_c_is_tried_with_the_last_of_a_shorter_grid():
    points = levers.points_of(["logistic", "svm"], {"logistic": (1, 2, 3), "svm": (7, 8)})
    assert [tuple(point.values()) for point in points] == [(1, 7), (2, 8), (3, 8)]
