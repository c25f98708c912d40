"""The benchmarks on a small scale: their commands parse, and they compare the right things.

The pages beside them have their figures. Nothing here measures time.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
from commands import ROOT

from detector.base.errors import UsageError

NAMES = [
    *("amounts", "clients", "decoding", "encoding", "levers", "precision", "service", "starting"),
    *("training", "tuning_step"),
]


def commands(text):
    return re.findall(r"^ *python -m benchmarks\.(\w+)(.*?)(?: {2,}#.*)?$", text, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_a_benchmark_s_docstring_parse(name):
    module = importlib.import_module(f"benchmarks.{name}")
    own = [flags for script, flags in commands(module.__doc__) if script == name]
    assert own
    for flags in own:
        module.parse_args(shlex.split(flags))


def test_each_benchmark_has_its_commands_and_figures_on_a_page(in_repositories, monkeypatch):
    monkeypatch.chdir(in_repositories)
    pages = [page.read_text().replace("\\\n", "") for page in (ROOT / "benchmarks").glob("*.md")]
    documented = [command for page in pages for command in commands(page)]
    assert {name for name, _ in documented} >= {*NAMES, "fine_tuning", "held_out", "peers"}
    for name, flags in documented:
        if name != "efficientnet":  # takes the names of two files
            importlib.import_module(f"benchmarks.{name}").parse_args(shlex.split(flags))


@pytest.fixture(scope="module")
def mosaics(make_folder, tmp_path_factory):
    from benchmarks import decoding

    folder = make_folder(tmp_path_factory.mktemp("tiles"), {"real": 6, "fake": 6})
    return decoding.mosaics(folder, 4, 2)


def test_mosaics_differ_and_are_large_enough_for_draft_mode(mosaics):
    from benchmarks import decoding
    from detector.images.decoding import open_image

    images = [open_image(data) for data in mosaics]
    assert {image.size for image in images} == {(2400, 1680)} and mosaics[0] != mosaics[1]
    images[0].draft("RGB", (decoding.MARGIN * decoding.SIDE,) * 2)
    assert images[0].size == (1200, 840)  # a quarter would be less than twice the encoder's side


def test_only_draft_mode_decodes_to_other_pixels(mosaics):
    import clip

    from benchmarks import decoding

    pillow = decoding.plain(clip.clip._transform(decoding.SIDE))
    for data in mosaics:
        expected = pillow(data)
        for way in (decoding.ours, decoding.ours_described):
            assert (way(data) == expected).all()
        drafted = decoding.drafted(data)
        assert (drafted != expected).any() and np.abs(drafted - expected).mean() < 0.1
    sizes = [len(data) for data in mosaics]
    assert decoding.in_threads(len)(mosaics) == decoding.one_by_one(len)(mosaics) == sizes


def test_our_svm_equals_scikit_learn_s_on_classes_that_no_plane_separates():
    from benchmarks import training

    x, y = training.made_up(1500)
    x = (x - x.mean(0)) / x.std(0)
    fits = (training.stock, training.ours, training.linear)
    fitted = {fit.__name__: fit(x[:1000], y[:1000]) for fit in fits}
    scores = {name: score(x[1000:]) for name, (score, _) in fitted.items()}
    accuracy = {name: ((values > 0) == y[1000:]).mean() for name, values in scores.items()}
    assert accuracy["stock"] > 0.75 and accuracy["linear"] < 0.7
    differ = (scores["ours"] > 0) != (scores["stock"] > 0)  # both solvers stop at a tolerance
    assert np.abs(scores["stock"][differ]).max(initial=0) < 0.02
    assert np.corrcoef(scores["ours"], scores["stock"])[0, 1] > 0.9999
    assert fitted["ours"][1] == pytest.approx(fitted["stock"][1], rel=0.01)


def of_repositories(rng, repositories, images, dim=40):
    """Columns as of held_out.prepared_columns, and the repository of each image.

    The label shows in another direction in each repository.
    """
    repository = np.repeat(np.arange(repositories), images)
    labels = np.tile([0, 1], repositories * images // 2)
    own, centre = rng.normal(size=(2, repositories, dim))
    signal = (2 * labels - 1)[:, None] * own[repository]
    features = centre[repository] + signal + rng.normal(0, 0.3, (len(labels), dim))
    columns = {
        "features": features.astype(np.float32)[:, None],
        "labels": labels,
        "view": np.zeros(len(labels), np.int8),
        "sources": np.char.add("s", (repository * 2 + labels).astype(str)),
        "scored": np.arange(len(labels)),
    }
    return columns, repository


def held_out_auc(columns, groups):
    from benchmarks import held_out

    labels, fold = columns["labels"], held_out.folds_of(groups, columns["labels"])
    columns["fold"] = np.array([fold[group] for group in groups])
    seen, point = {"untouched": columns["features"]}, {"C": 1, "gamma": 0.3}
    scores = held_out.held_scores(columns, seen, "svm", point, 0, 0, np.mean)["untouched"]
    return np.mean(held_out.mean_auc(labels, scores, columns["fold"], columns["sources"])[0])


def test_nothing_is_learnt_of_a_held_out_repository():
    columns, repository = of_repositories(np.random.default_rng(0), 24, 20)
    assert abs(held_out_auc(columns, repository) - 0.5) < 0.15
    images = np.arange(len(repository))  # folds of single images would know each repository
    assert held_out_auc(columns, images) > 0.95


def test_folds_keep_repositories_whole_and_classes_about_even():
    from benchmarks import held_out

    rng = np.random.default_rng(0)
    repository = rng.choice(30, 900, p=rng.dirichlet(np.ones(30)))
    labels = (rng.random(900) < 0.5).astype(int)
    fold = held_out.folds_of(repository, labels)
    assert set(fold) == set(repository)
    of_image = np.array([fold[r] for r in repository])
    for label in (0, 1):
        counts = np.bincount(of_image[labels == label], minlength=3)
        assert np.ptp(counts) < 0.2 * (labels == label).sum()


@pytest.fixture(scope="module")
def in_repositories(make_folder, tmp_path_factory):
    """A folder with data/ (three repositories of two sources each), held.npz and SOURCES.csv."""
    place = tmp_path_factory.mktemp("repositories")
    sources = [(label, i) for label in ("real", "fake") for i in range(3)]
    make_folder(place / "data", {f"train/{label}/{label}{i}": 12 for label, i in sources})
    lines = ["source,repository", *(f"{label}{i},r{i}" for label, i in sources)]
    (place / "SOURCES.csv").write_text("\n".join(lines) + "\n")
    flags = "--data_dir data --output_file held.npz --views 1 --crops 4".split()
    subprocess.run(
        [sys.executable, ROOT / "extract_features.py", *flags],
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
    for script, flags in commands(held_out.__doc__):
        if script == "held_out":
            held_out.main(shlex.split(flags))
    lines = capsys.readouterr().out.splitlines()
    title, *rows = [x for x in lines if x and not x.startswith(("|---", "| trained"))]
    assert title == (
        "Encoder `small`, 72 images of 6 sources in 3 folds (24, 24, 24). "
        "95% intervals over sources."
    )
    assert len([row for row in rows if row.startswith("| ")]) == 4 * 2 + 4 * 9
    row_form = r"\|.*\|.*\|( 0\.\d{3}[,\d. ]*| 1\.000[,\d. ]*)\|( [01]\.\d{3} \[.*\] \|){2,4}"
    assert all(re.fullmatch(row_form, row) for row in rows if row[0] == "|"), rows


def test_the_study_of_fine_tuning_has_a_row_for_each_encoder_and_resumes(
    in_repositories, monkeypatch, tmp_path, capsys
):
    import finetune_clip
    from benchmarks import fine_tuning

    monkeypatch.chdir(in_repositories)
    documented = [flags for script, flags in commands(fine_tuning.__doc__)]
    for flags in documented:
        fine_tuning.parse_args(shlex.split(flags))
    flags = shlex.split(documented[0]) + ["--clip_model", str(small.CHECKPOINT)]
    flags += ["--work_dir", str(tmp_path), "--steps", "1", "--folds", "0", "2", "--arms", "norms"]
    flags += ["--layers", "final", "1"]
    fine_tuning.main(flags)
    table = capsys.readouterr().out
    title, _, _, _, *rows = table.splitlines()
    assert "1 steps of 32. Folds [0, 2] of 3 with [24, 24] images" in title
    names = [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in rows]
    frozen = [(f"frozen, {layers}", of) for layers in ("final", "1") for of in ("kept", "all")]
    assert names == [*frozen, ("`norms`, seed 0", "kept")]
    figures = r"( [01]\.\d{3} \[[^|]*\] \| [+-][01]\.\d{3} \[[^|]*\] \|){2}"
    row_form = r"\|[^|]*\|[^|]*\|[^|]*\|( [01]\.\d{3},? ?){2}\|" + figures
    assert rows[0].count("+0.000 [+0.000, +0.000]") == 2  # the base
    assert all(re.fullmatch(row_form, row) for row in rows), rows
    seen = [json.loads(path.read_text())["seen"] for path in tmp_path.glob("*.json")]
    assert len(seen) == 2 and not set(seen[0]) == set(seen[1])
    monkeypatch.setattr(finetune_clip, "main", None)  # nothing is trained again
    fine_tuning.main(flags)
    assert capsys.readouterr().out == table


def test_the_mean_of_seeds_averages_the_folds_and_the_draws():
    from benchmarks.fine_tuning import mean_of

    first = [np.array([0.5, 0.7]), np.array([0.6, 0.8]), 9]
    second = [np.array([0.7, 0.9]), np.array([0.8, 1.0]), 9]
    seeds = ("0.01", first, second), ("0.001", second, second)
    best, untouched, resaved = mean_of(seeds)
    assert best == "0.001, 0.01" and untouched[2] == resaved[2] == 9
    np.testing.assert_allclose(untouched[:2], [[0.6, 0.8], [0.7, 0.9]])
    np.testing.assert_allclose(resaved[:2], second[:2])


def test_no_image_of_a_fold_trains_its_encoder_or_classifier(
    in_repositories, monkeypatch, tmp_path
):
    from benchmarks import fine_tuning

    monkeypatch.chdir(in_repositories)
    flags = "--data_dir data --sources_file SOURCES.csv --work_dir".split()
    args = fine_tuning.parse_args([*flags, str(tmp_path)])
    images = fine_tuning.Images(args)
    for k in range(3):
        held = set(images.paths[images.fold == k])
        folder = fine_tuning.linked(args, images, k)
        linked = {path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg")}
        assert held and linked == set(images.paths) - held
    trained = []
    monkeypatch.setattr(fine_tuning, "fit", lambda kind, rows, *_, **point: trained.append(rows))
    monkeypatch.setattr(fine_tuning, "decision", lambda classifier, rows: rows)
    monkeypatch.setattr(fine_tuning, "encoded", lambda args, encoder, paths, resave=None: paths)
    fine_tuning.fold_scores(args, images, None, 1, images.kept)
    assert set(trained[0]) == set(images.paths[images.kept & (images.fold != 1)])


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
def test_a_table_of_sources_that_makes_no_folds_is_a_one_line_error(
    in_repositories, monkeypatch, tmp_path, change, words
):
    from benchmarks import held_out

    table = tmp_path / "S.csv"
    table.write_text(change((in_repositories / "SOURCES.csv").read_text()))
    monkeypatch.chdir(in_repositories)
    with pytest.raises(UsageError, match=re.escape(words)):
        held_out.main(["--features_file", "held.npz", "--sources_file", str(table)])


def test_an_amount_beyond_the_images_adds_crops_of_them_in_their_folders(
    make_folder, tmp_path_factory, tmp_path
):
    from benchmarks import amounts
    from detector.images.folders import list_images

    folder = make_folder(tmp_path_factory.mktemp("few"), {"real": 3, "fake": 3})
    amounts.write_images(str(folder), 10, tmp_path)
    entries, places = list_images(str(tmp_path)), {e.path for e in list_images(str(folder))}
    assert len(entries) == 10
    for entry in entries:
        path = Path(entry.path)
        assert str(path.with_name(path.name.partition("-")[2])) in places
    data = {(tmp_path / entry.path).read_bytes() for entry in entries}
    assert len(data) == 10


def test_the_memory_of_a_measured_process_is_its_own():
    from benchmarks.measure import run

    held = bytearray(400_000_000)
    _, megabytes = run([sys.executable, "-c", "pass"])
    assert megabytes < 100 < len(held) / 1e6
    with pytest.raises(SystemExit, match="failed: bad"):
        run([sys.executable, "-c", "raise SystemExit('bad')"])
    assert run([sys.executable, "-c", "raise SystemExit(1)"], good=(0, 1))[0] > 0


@pytest.mark.parametrize("arm", ["lora:2 --last 1", "blocks:1"])
@pytest.mark.parametrize("own_code, code", [(False, "Tail"), (True, "ClipTail")])
def test_a_timed_step_uses_the_code_and_the_patches_asked_for(
    arm, own_code, code, tmp_path, monkeypatch
):
    import small_clip

    from benchmarks import tuning_step

    taken, step = [], tuning_step.Training.step

    def watched(training, batches, number):
        taken.append((type(training.model[0]).__name__, tuple(batches[0][0].shape)))
        return step(training, batches, number)

    monkeypatch.setattr(tuning_step.Training, "step", watched)
    tower = small_clip.small_vit(None, resolution=32)
    start = small_clip.save_state_dict(tower, tmp_path / "start.pt")
    assert tuning_step.timed_step(str(start), arm, 0.5, own_code)() > 0
    assert taken == [(code, (32, 3, 128))]  # the class token and two of four patches


def test_a_step_of_clip_s_own_code_computes_what_ours_does():
    import small_clip
    import torch

    from benchmarks.tuning_step import ClipTail
    from detector.finetuning.tail import Tail

    tower = small_clip.small_vit(None, resolution=32)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = Tail(tower, 1).first(pixels)
        expected = tower(pixels)
        for tail in (ClipTail(tower, 1), Tail(tower, 1)):
            torch.testing.assert_close(tail(tokens), expected, rtol=1e-4, atol=1e-5)
