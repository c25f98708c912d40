"""tools/study.py: every command on one folder, as processes, and the page of the results."""

import json
import re

import pytest
import small
from commands import assert_one_line_error

COUNTS = {
    f"{split}/{label}/{source}": n
    for split, n in (("train", 12), ("test", 6))
    for label in ("real", "fake")
    for source in "ab"
}


@pytest.fixture
def study(script, make_folder, tmp_path):
    """Function: flags and the encoder -> (stdout, the page)."""
    folder = make_folder(tmp_path / "data", COUNTS)
    sizes = ("--limit", 64, "--robustness_images", 4)

    def run(*flags, encoder):
        env = {"CLIP_MODEL": str(encoder), "OMP_NUM_THREADS": "1"}
        words = ("--data_dir", folder, *sizes, *flags)
        result = script("tools.study", *words, timeout=1200, **env)
        assert result.returncode == 0, result.stderr
        return result.stdout, (tmp_path / "study" / "index.html").read_text()

    return run


def metrics_of(tmp_path, *names):
    files = [tmp_path / "study" / name / "metrics.json" for name in names]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.long
def test_one_command_makes_one_page_of_everything(study, tmp_path):
    printed, page = study(encoder=small.CHECKPOINT)
    assert "balanced accuracy" in printed
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
def test_levers_are_compared_on_the_same_images(study, photos, tmp_path, monkeypatch):
    import small_clip

    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    for name, seed in (("one", 0), ("two", 1)):
        tower = small_clip.small_vit(small_clip.crops(photos), seed)
        small_clip.save_state_dict(tower, tmp_path / f"{name}.pt")
    _, page = study("--levers", "--checkpoints", "two.pt", encoder="one.pt")
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
        "two.pt",
    ]
    models = metrics_of(tmp_path, "with", "lever1", "lever2", "lever3", "lever4")
    encoders = ["one", "one penultimate", "one 1,2,final", "one", "two"]
    assert [m["encoder"] for m in models] == encoders
    assert [m["crops"] for m in models] == [0, 0, 0, 4, 0]
    assert len({str(m["data"]) for m in models}) == 1
    assert len({m["overall"]["auc"]["value"] for m in models}) > 2


def test_a_missing_folder_is_refused_before_any_command_starts(script, tmp_path):
    assert_one_line_error(script("tools.study", "--data_dir", "nowhere"), "nowhere")
    assert not (tmp_path / "study").exists()
