"""What a script imports before it answers: speed is measured in benchmarks/, its cause is held here."""
import subprocess
import sys

import pytest
from conftest import ROOT

SLOW = {"numpy", "PIL", "torch", "clip", "sklearn", "scipy", "matplotlib", "openvino", "flask"}
SCRIPTS = ["app.py", "audit.py", "classify.py", "demo.py", "evaluate.py", "extract_features.py", "finetune_clip.py", "golden.py",
           "prepare_clip.py", "study.py", "train_model.py"]
WRONG = {"audit.py": ["--data_dir", "nowhere"], "classify.py": ["--image_path", "nowhere.jpg"],
         "evaluate.py": ["--features_file", "nowhere.npz"], "extract_features.py": ["--data_dir", ".", "--limit", "0"],
         "golden.py": ["--url", "http://127.0.0.1:1", "--data_dir", "nowhere"], "prepare_clip.py": ["--clip_model", "nowhere.pt"],
         "study.py": ["--data_dir", ".", "--views", "99"], "train_model.py": ["--max_fpr", "7"],
         "finetune_clip.py": ["--data_dir", "nowhere"]}


def imported(*command, cwd):
    """-> (CompletedProcess, the slow packages that it imported)."""
    result = subprocess.run([sys.executable, "-X", "importtime", ROOT / command[0], *command[1:]], cwd=cwd,
                            capture_output=True, text=True, timeout=60)
    times = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return result, {line.rsplit("|", 1)[1].strip().split(".")[0] for line in times} & SLOW


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_slow(script, tmp_path):
    result, slow = imported(script, "--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.startswith("usage:") and slow == set()


def test_every_script_with_a_parser_is_held_to_it():
    assert SCRIPTS == sorted(p.name for p in ROOT.glob("*.py") if "argparse.ArgumentParser(" in p.read_text())


@pytest.mark.parametrize("script", WRONG)
def test_a_wrong_flag_is_told_before_anything_slow_is_imported(script, tmp_path):
    result, slow = imported(script, *WRONG[script], cwd=tmp_path)
    assert result.returncode == 2 and slow == set(), result.stderr
    assert any(line.startswith("error: ") and WRONG[script][-1] in line for line in result.stderr.splitlines())
