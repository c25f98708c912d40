"""The benchmarks of speed, on a scale that takes seconds: their commands are taken, and each compares what it says it does.

What they measure is told in benchmarks/speed.md; nothing here looks at a clock.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import small
from commands import ROOT

from detector.base.errors import UsageError

NAMES = ["clients", "decoding", "encoding", "precision", "service", "starting", "training"]


def commands(text):
    return re.findall(r"^ *python -m benchmarks\.(\w+)(.*?)(?: {2,}#.*)?$", text, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_that_a_benchmark_tells_of_itself_are_taken_by_its_parser(name):
    module = importlib.import_module(f"benchmarks.{name}")
    own = [flags for script, flags in commands(module.__doc__) if script == name]
    assert own
    for flags in own:
        module.parse_args(shlex.split(flags))


def test_the_commands_of_the_table_file_are_taken_too():
    found = commands((ROOT / "benchmarks" / "speed.md").read_text())
    assert {name for name, _ in found} >= set(NAMES) - {"service"}
    for name, flags in found:
        if name != "random_clip":
            importlib.import_module(f"benchmarks.{name}").parse_args(shlex.split(flags))


@pytest.fixture(scope="module")
def mosaics(make_folder, tmp_path_factory):
    from benchmarks import decoding

    folder = make_folder(tmp_path_factory.mktemp("tiles"), {"real": 6, "fake": 6})
    return decoding.mosaics(folder, 4, 2)


def test_mosaics_are_large_different_and_large_enough_for_draft_mode(mosaics):
    from benchmarks import decoding
    from detector.images.decoding import open_image

    images = [open_image(data) for data in mosaics]
    assert {image.size for image in images} == {(2400, 1680)} and mosaics[0] != mosaics[1]
    images[0].draft("RGB", (decoding.MARGIN * decoding.SIDE,) * 2)
    assert images[0].size == (
        1200,
        840,
    )  # the next half would leave fewer than twice the pixels that the encoder takes


def test_every_way_of_decoding_gives_the_same_picture_but_draft_mode(mosaics):
    import clip

    from benchmarks import decoding

    pillow = decoding.plain(clip.clip._transform(decoding.SIDE))
    for data in mosaics:
        expected = pillow(data)
        assert (decoding.ours(data) == expected).all() and (
            decoding.ours_described(data) == expected
        ).all()
        drafted = decoding.drafted(data)
        assert (drafted != expected).any() and np.abs(drafted - expected).mean() < 0.1
    assert (
        decoding.in_threads(len)(mosaics)
        == decoding.one_by_one(len)(mosaics)
        == [len(data) for data in mosaics]
    )


def test_ours_learns_what_scikit_learn_learns_and_no_plane_separates_the_classes():
    from benchmarks import training

    x, y = training.made_up(1500)
    x = (x - x.mean(0)) / x.std(0)
    found = {
        fit.__name__: fit(x[:1000], y[:1000])
        for fit in (training.stock, training.ours, training.linear)
    }
    scores = {name: score(x[1000:]) for name, (score, _) in found.items()}
    accuracy = {name: ((values > 0) == y[1000:]).mean() for name, values in scores.items()}
    assert accuracy["stock"] > 0.75 and accuracy["linear"] < 0.7
    differ = (scores["ours"] > 0) != (scores["stock"] > 0)  # both solvers stop at a tolerance
    assert (
        np.abs(scores["stock"][differ]).max(initial=0) < 0.02
        and np.corrcoef(scores["ours"], scores["stock"])[0, 1] > 0.9999
    )
    assert found["ours"][1] == pytest.approx(found["stock"][1], rel=0.01)


def of_repositories(rng, repositories, images, dim=40):
    """Columns as held_out.prepared_columns gives them: what tells the label is another direction in each repository."""
    repository = np.repeat(np.arange(repositories), images)
    labels = np.tile([0, 1], repositories * images // 2)
    own = rng.normal(size=(repositories, dim))
    centre = rng.normal(size=(repositories, dim))
    features = (
        centre[repository]
        + (2 * labels - 1)[:, None] * own[repository]
        + rng.normal(0, 0.3, (len(labels), dim))
    )
    return {
        "features": features.astype(np.float32)[:, None],
        "labels": labels,
        "view": np.zeros(len(labels), np.int8),
        "sources": np.char.add("s", (repository * 2 + labels).astype(str)),
        "scored": np.arange(len(labels)),
    }, repository


def test_nothing_of_a_held_out_repository_is_learnt():
    from benchmarks import held_out

    columns, repository = of_repositories(np.random.default_rng(0), 24, 20)
    by = {
        "repositories": repository,
        "images": np.arange(len(repository)),
    }  # the second is what the script must not do
    found = {}
    for name, groups in by.items():
        fold = held_out.folds_of(groups, columns["labels"])
        columns["fold"] = np.array([fold[group] for group in groups])
        scores = held_out.held_scores(
            columns,
            {"untouched": columns["features"]},
            "svm",
            {"C": 1, "gamma": 0.3},
            0,
            0,
            np.mean,
        )["untouched"]
        found[name] = np.mean(
            held_out.mean_auc(columns["labels"], scores, columns["fold"], columns["sources"])[0]
        )
    assert abs(found["repositories"] - 0.5) < 0.15 and found["images"] > 0.95


def test_folds_keep_repositories_whole_and_classes_about_even():
    from benchmarks import held_out

    rng = np.random.default_rng(0)
    repository = rng.choice(30, 900, p=rng.dirichlet(np.ones(30)))
    labels = (rng.random(900) < 0.5).astype(int)
    fold = held_out.folds_of(repository, labels)
    assert set(fold) == set(repository)
    of_image = np.array([fold[r] for r in repository])
    for label in (0, 1):
        assert (
            np.ptp(np.bincount(of_image[labels == label], minlength=3))
            < 0.2 * (labels == label).sum()
        )


@pytest.fixture(scope="module")
def in_repositories(make_folder, tmp_path_factory):
    """A folder with data/, three repositories of two sources each, and held.npz and SOURCES.csv of it."""
    place = tmp_path_factory.mktemp("repositories")
    make_folder(
        place / "data",
        {f"train/{label}/{label}{i}": 12 for label in ("real", "fake") for i in range(3)},
    )
    (place / "SOURCES.csv").write_text(
        "source,repository\n"
        + "".join(f"{label}{i},r{i}\n" for label in ("real", "fake") for i in range(3))
    )
    subprocess.run(
        [
            sys.executable,
            ROOT / "extract_features.py",
            "--data_dir",
            "data",
            "--output_file",
            "held.npz",
            "--views",
            "1",
            "--crops",
            "4",
        ],
        cwd=place,
        env={**os.environ, "CLIP_MODEL": str(small.CHECKPOINT)},
        check=True,
        capture_output=True,
    )
    return place


def test_the_held_out_table_has_a_row_for_each_recipe_and_point(
    in_repositories, monkeypatch, capsys
):
    from benchmarks import held_out

    monkeypatch.chdir(in_repositories)
    for flags in (flags for script, flags in commands(held_out.__doc__) if script == "held_out"):
        held_out.main(shlex.split(flags))
    first, *rows = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line and not line.startswith(("|---", "| trained"))
    ]
    assert (
        first == "Encoder `small`, 72 images of 6 sources in 3 folds (24, 24, 24). "
        "95% intervals over sources."
    )
    assert len([row for row in rows if row.startswith("| ")]) == 4 * 2 + 4 * 9
    row_form = r"\|.*\|.*\|( 0\.\d{3}[,\d. ]*| 1\.000[,\d. ]*)\|( [01]\.\d{3} \[.*\] \|){2,4}"
    assert all(re.fullmatch(row_form, row) for row in rows if row[0] == "|"), rows


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda text: text.replace("fake2,r2\n", ""),
            "names no repository of 'fake2' (1 sources in all): add a line for each",
        ),
        (
            lambda text: text.replace("repository", "owner"),
            "name a CSV file with the columns source and repository",
        ),
        (
            lambda text: text.replace("r2", "r1"),
            "the 2 repositories of 'train' make no 3 folds with both classes: add sources",
        ),
    ],
)
def test_a_table_of_sources_that_cannot_hold_anything_out_is_one_line(
    in_repositories, monkeypatch, tmp_path, change, words
):
    from benchmarks import held_out

    (tmp_path / "S.csv").write_text(change((in_repositories / "SOURCES.csv").read_text()))
    monkeypatch.chdir(in_repositories)
    with pytest.raises(UsageError, match=re.escape(words)):
        held_out.main(
            [
                "--features_file",
                "held.npz",
                "--data_dir",
                "data",
                "--sources_file",
                str(tmp_path / "S.csv"),
            ]
        )
