"""tools/study.py: every command on one folder, as processes, and the page of the results."""

import json
import re
import subprocess
from argparse import Namespace

import pytest
import small
from commands import ROOT, assert_one_line_error

from tools import study as page_maker

COUNTS = {
    f"{split}/{label}/{source}": n
    for split, n in (("train", 12), ("test", 6))
    for label in ("real", "fake")
    for source in "ab"
}


@pytest.fixture
def study(script, make_folder, tmp_path):
    """Function: flags and the encoder -> (stdout, the page, stderr)."""
    folder = make_folder(tmp_path / "data", COUNTS)
    sizes = ("--limit", 64, "--robustness_images", 4)

    def run(*flags, encoder=None):
        env = {"CLIP_MODEL": encoder and str(encoder), "OMP_NUM_THREADS": "1"}
        words = ("--data_dir", folder, *sizes, *flags)
        result = script("tools.study", *words, timeout=1200, **env)
        assert result.returncode == 0, result.stderr
        page = (tmp_path / "study" / "index.html").read_text()
        return result.stdout, page, result.stderr

    return run


@pytest.fixture
def checkpoints(photos, tmp_path, monkeypatch):
    """Write one.pt and two.pt, small encoders with different weights."""
    import small_clip

    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    for name, seed in (("one", 0), ("two", 1)):
        tower = small_clip.small_vit(small_clip.crops(photos), seed)
        small_clip.save_state_dict(tower, tmp_path / f"{name}.pt")


def metrics_of(tmp_path, *names):
    files = [tmp_path / "study" / name / "metrics.json" for name in names]
    return [json.loads(file.read_text()) for file in files]


def table_of(printed):
    """stdout -> the rows of the table of encoders, as lists of cells."""
    lines = printed.splitlines()
    assert re.split("  +", lines[0]) == list(page_maker.HEADINGS)
    end = next(i for i, line in enumerate(lines) if " named sources in " in line)
    return [re.split("  +", line) for line in lines[1:end]]


@pytest.mark.long
def test_one_command_makes_one_page_of_everything(study, tmp_path):
    printed, page, _ = study(encoder=small.CHECKPOINT)
    assert "balanced accuracy" in printed
    assert [row[0] for row in table_of(printed)] == [str(small.CHECKPOINT)]
    for part in (
        "Training without and with degraded copies",
        "Classifiers on the same folds",
        "Robustness",
        "Both classes saved alike",
        "What the folder gives away",
        "“Uncertain”",
        "left out of the training",
    ):
        assert part in page, part
    assert set(re.findall(r'src="([a-z]+):', page)) == {"data"}
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    without, with_copies = metrics_of(tmp_path, "without", "with")
    assert [m["training_data"]["views"] for m in (without, with_copies)] == [0, 1]
    assert without["data"]["overall"] == with_copies["data"]["overall"]
    assert without["degraded"]["n"] == with_copies["degraded"]["n"] > 0


@pytest.mark.long
def test_levers_are_compared_on_the_same_images(study, checkpoints, tmp_path):
    _, page, _ = study("--levers", encoder="one.pt")
    start, end = (
        page.index(title)
        for title in ("Which parts of the encoder are used", "Real images called fake")
    )
    rows = re.findall(r"<tr><td>(.*?)</td>\s*<td>(.*?)</td>", page[start:end])
    assert [words for words, _ in rows] == [
        "embedding",
        "layer before the projection",
        "middle blocks and embedding",
        "embedding, and of 4 crops",
    ]
    models = metrics_of(tmp_path, "with", "lever1", "lever2", "lever3")
    encoders = ["one", "one penultimate", "one 1,2,final", "one"]
    assert [m["encoder"] for m in models] == encoders
    assert [m["crops"] for m in models] == [0, 0, 0, 4]
    assert len({str(m["data"]) for m in models}) == 1
    assert len({m["overall"]["auc"]["value"] for m in models}) > 2


@pytest.mark.long
def test_encoders_are_compared_on_the_same_images_and_resumed_in_any_order(
    study, checkpoints, tmp_path
):
    printed, page, _ = study("--clip_models", "one.pt", "two.pt", encoder="nowhere.pt")
    rows, (two,) = table_of(printed), (tmp_path / "cache" / "encoders").glob("two-*")
    models = metrics_of(tmp_path, "with", two.name)
    assert [m["encoder"] for m in models] == ["one", "two"]
    assert "64 images of 2 named sources in" in printed and "WARNING" not in printed
    for name, row, m in zip(("one.pt", "two.pt"), rows, models, strict=True):
        parts = m["known"], m["trained"]["left_out"], m["degraded"]
        assert row[:4] == [name, *(page_maker.aucs(m))] and all(parts)
        assert [part["auc"]["n"] for part in parts] == [24, 40, 24]
        assert "<td>" + "</td><td>".join(row) + "</td>" in page
        assert float(row[4]) > 0 and float(row[6]) > 0
        assert row[5] == f"{(two / 'encoder.bin').stat().st_size / 1e6:.1f}"
    assert rows[0][1:4] != rows[1][1:4]

    again, _, log = study("--clip_models", "two.pt", "one.pt")
    assert [row[:4] for row in table_of(again)] == [row[:4] for row in rows[::-1]]
    assert log.count("rows stay unchanged") == 2 and "set aside" not in log


def part(auc):
    return {"auc": {"value": auc, "interval": None}}


def test_an_auc_that_was_not_measured_is_a_dash():
    of_known = {
        "overall": part(0.5),
        "known": part(0.9),
        "unseen": part(0.6),
        "trained": {"left_out": part(0.8)},
        "degraded": part(0.7),
    }
    assert page_maker.aucs(of_known) == ["0.90", "0.80", "0.70"]
    all_unseen = {**of_known, "known": None, "degraded": None}
    assert page_maker.aucs(all_unseen) == ["-", "0.80", "-"]
    one_source_a_class = {**of_known, "trained": {"left_out": None}}
    assert page_maker.aucs(one_source_a_class) == ["0.90", "-", "0.70"]
    sources_without_names = {**of_known, "known": None, "unseen": None}
    assert page_maker.aucs(sources_without_names) == ["0.50", "0.80", "0.70"]


@pytest.mark.parametrize("test, train, warned", [("a", "b", 0), ("x", "b", 1), ("a", "x", 1)])
def test_encoders_that_were_not_measured_on_the_same_images_are_a_warning(test, train, warned):
    def measured(test, train):
        return {
            "classifier": "svm",
            "training_data": {"real": 3, "fake": 4, "sha256": train},
            "overall": {"n": 5},
            "data": {"overall": test},
        }

    columns = {"paths": ["1", "2"], "sources": ["", "camera"]}
    both = [measured("a", "b"), measured(test, train)]
    text = page_maker.words_on_images(Namespace(data_dir="data", views=3), columns, both)
    assert text[0] == "2 images of 1 named sources in data, and 3 degraded copies of each."
    assert text[1].startswith("7 images trained ") and text[1].endswith(" 5 tested it.")
    assert sum("WARNING" in sentence for sentence in text) == warned


@pytest.mark.parametrize("second", ["nowhere.pt", "text.pt"])
def test_a_bad_second_encoder_ends_the_study_before_the_first_is_used(script, tmp_path, second):
    for label in ("real", "fake"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "0.jpg").touch()
    (tmp_path / "text.pt").write_text("no weights")
    result = script("tools.study", "--data_dir", ".", "--clip_models", small.CHECKPOINT, second)
    assert_one_line_error(result, second)
    commands = re.findall(r"^\$ python (\S+)", result.stderr, re.MULTILINE)
    assert commands == ["prepare_clip.py", "prepare_clip.py"]


def test_make_study_passes_the_encoders_on():
    words = ["make", "-n", "study", "DATA=data", "CLIP_MODELS=ViT-L/14 two.pt"]
    made = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--clip_models ViT-L/14 two.pt" in made


def test_a_missing_folder_is_refused_before_any_command_starts(script, tmp_path):
    assert_one_line_error(script("tools.study", "--data_dir", "nowhere"), "nowhere")
    assert not (tmp_path / "study").exists()
