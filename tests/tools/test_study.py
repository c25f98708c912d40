"""tools/study.py: the whole chain on one folder, as processes, and the page that comes of it."""

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


@pytest.mark.long
def test_one_command_makes_one_page_of_everything(script, make_folder, tmp_path):
    folder = make_folder(tmp_path / "data", COUNTS)
    result = script(
        "tools.study",
        "--data_dir",
        folder,
        "--limit",
        64,
        "--robustness_images",
        4,
        timeout=900,
        CLIP_MODEL=str(small.CHECKPOINT),
        OMP_NUM_THREADS="1",
    )
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "study" / "index.html").read_text()
    for part in (
        "Training without and with degraded copies",
        "Classifiers on the same folds",
        "Robustness",
        "Both classes saved alike",
        "What the folder gives away",
        "“Uncertain”",
        "One source left out",
    ):
        assert part in page, part
    assert set(re.findall(r'src="([a-z]+):', page)) == {"data"} and "http" not in re.sub(
        r"data:[^\"]*", "", page
    )
    models = [
        json.loads((tmp_path / "study" / name / "metrics.json").read_text())
        for name in ("without", "with")
    ]
    assert [m["training_data"]["views"] for m in models] == [0, 1]
    assert (
        models[0]["data"]["overall"] == models[1]["data"]["overall"]
        and models[0]["degraded"]["n"] == models[1]["degraded"]["n"] > 0
    )
    assert "balanced accuracy" in result.stdout


@pytest.mark.long
def test_levers_are_compared_on_the_same_images(script, make_folder, photos, tmp_path, monkeypatch):
    import small_clip

    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    for name, seed in (("one", 0), ("two", 1)):
        small_clip.save_state_dict(
            small_clip.small_vit(small_clip.crops(photos), seed), tmp_path / f"{name}.pt"
        )
    folder = make_folder(tmp_path / "data", COUNTS)
    result = script(
        "tools.study",
        "--data_dir",
        folder,
        "--limit",
        64,
        "--robustness_images",
        4,
        "--levers",
        "--checkpoints",
        "two.pt",
        timeout=1200,
        CLIP_MODEL="one.pt",
        OMP_NUM_THREADS="1",
    )
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "study" / "index.html").read_text()
    table = page[
        page.index("What of the encoder is looked at") : page.index("Real images called fake")
    ]
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", table)
    assert [words for words, _ in rows] == [
        "embedding",
        "layer before the projection",
        "middle blocks and embedding",
        "embedding, and of 4 crops",
        "two.pt",
    ]
    models = [
        json.loads((tmp_path / "study" / name / "metrics.json").read_text())
        for name in ("with", "lever1", "lever2", "lever3", "lever4")
    ]
    assert [m["encoder"] for m in models] == [
        "one",
        "one penultimate",
        "one 1,2,final",
        "one",
        "two",
    ]
    assert [m["crops"] for m in models] == [0, 0, 0, 4, 0]
    assert (
        len({str(m["data"]) for m in models}) == 1
        and len({m["overall"]["auc"]["value"] for m in models}) > 2
    )


def test_a_folder_that_is_not_there_is_told_before_anything_starts(script, tmp_path):
    assert_one_line_error(script("tools.study", "--data_dir", "nowhere"), "nowhere")
    assert not (tmp_path / "study").exists()
