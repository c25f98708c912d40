"""study.py: the whole chain on one folder, as processes, and the page that comes of it."""
import json
import re

import pytest
from conftest import assert_one_line_error

COUNTS = {f"{split}/{label}/{source}": n for split, n in (("train", 12), ("test", 6)) for label in ("real", "fake") for source in "ab"}


@pytest.mark.long
def test_one_command_makes_one_page_of_everything(script, make_folder, tmp_path):
    folder = make_folder(tmp_path / "data", COUNTS)
    result = script("study.py", "--data_dir", folder, "--limit", 64, "--robustness_images", 4, CLIP_MODEL="tiny", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "study" / "index.html").read_text()
    for part in ("Training without and with degraded copies", "Classifiers on the same folds", "Robustness", "Files made alike",
                 "What the folder betrays", "“Uncertain”", "One source left out", "demonstration"):
        assert part in page, part
    assert set(re.findall(r'src="([a-z]+):', page)) == {"data"} and "http" not in re.sub(r"data:[^\"]*", "", page)
    models = [json.loads((tmp_path / "study" / name / "metrics.json").read_text()) for name in ("without", "with")]
    assert [m["training_data"]["views"] for m in models] == [0, 1]
    assert models[0]["data"]["overall"] == models[1]["data"]["overall"] and models[0]["degraded"]["n"] == models[1]["degraded"]["n"] > 0
    assert "balanced accuracy" in result.stdout


def test_a_folder_that_is_not_there_is_told_before_anything_starts(script, tmp_path):
    assert_one_line_error(script("study.py", "--data_dir", "nowhere"), "nowhere")
    assert not (tmp_path / "study").exists()
