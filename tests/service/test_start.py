"""What a script imports before it answers: speed is measured in benchmarks/, its cause is held here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import small
from commands import ROOT

SLOW = {
    "numpy",
    "PIL",
    "torch",
    "clip",
    "sklearn",
    "scipy",
    "matplotlib",
    "openvino",
    "flask",
    "mlflow",
    "cryptography",
    "c2pa",
}
SCRIPTS = [
    "app.py",
    "audit.py",
    "classify.py",
    "evaluate.py",
    "extract_features.py",
    "finetune_clip.py",
    "golden.py",
    "prepare_clip.py",
    "registry.py",
    "train_model.py",
    "tools.demo",
    "tools.samples",
    "tools.study",
]
WRONG = {
    "audit.py": ["--data_dir", "nowhere"],
    "classify.py": ["--image_path", "nowhere.jpg"],
    "evaluate.py": ["--features_file", "nowhere.npz"],
    "extract_features.py": ["--data_dir", ".", "--limit", "0"],
    "golden.py": ["--url", "http://127.0.0.1:1", "--data_dir", "nowhere"],
    "prepare_clip.py": ["--clip_model", "nowhere.pt"],
    "registry.py": ["list", "a/b"],
    "tools.study": ["--data_dir", ".", "--views", "99"],
    "train_model.py": ["--max_fpr", "7"],
    "finetune_clip.py": ["--data_dir", "nowhere"],
    "tools.samples": ["--output_dir", "/proc/none/samples"],
}


def imported(*command, cwd):
    """-> (CompletedProcess, the slow packages that it imported)."""
    name = ["-m", command[0]] if command[0].startswith("tools.") else [ROOT / command[0]]
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *name, *command[1:]],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    times = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return result, {line.rsplit("|", 1)[1].strip().split(".")[0] for line in times} & SLOW


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_slow(script, tmp_path):
    result, slow = imported(script, "--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.startswith("usage:") and slow == set()


def test_every_script_with_a_parser_is_held_to_it():
    of_root = sorted(
        p.name for p in ROOT.glob("*.py") if "argparse.ArgumentParser(" in p.read_text()
    )
    assert SCRIPTS == [*of_root, "tools.demo", "tools.samples", "tools.study"]


@pytest.mark.parametrize("script", WRONG)
def test_a_wrong_flag_is_told_before_anything_slow_is_imported(script, tmp_path):
    result, slow = imported(script, *WRONG[script], cwd=tmp_path)
    assert result.returncode == 2 and slow == set(), result.stderr
    assert any(
        line.startswith("error: ") and WRONG[script][-1] in line
        for line in result.stderr.splitlines()
    )


def test_the_kinds_that_the_parser_offers_are_those_that_can_be_trained(capsys):
    import train_model
    from detector.training import classifiers

    for kind in [*classifiers.GRIDS, "all"]:
        assert (
            train_model.parse_args(["--features_file", __file__, "--classifier", kind]).classifier
            == kind
        )
    with pytest.raises(SystemExit):
        train_model.parse_args(["--help"])
    assert "{" + ",".join([*classifiers.GRIDS, "all"]) + "}" in capsys.readouterr().out


def test_a_compiled_encoder_is_kept_and_where_none_can_be_kept_it_runs_all_the_same(
    tmp_path, monkeypatch
):
    import numpy as np

    from detector.encoders import runtime

    pixels = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    found = []
    for cache in (tmp_path / "cache", tmp_path / "cache", Path("/proc/none")):
        monkeypatch.setenv("CLIP_CACHE", str(cache))
        found.append(runtime.Encoder(small.ENCODER).encode(pixels))
    assert len(list((tmp_path / "cache" / "compiled").glob("*.blob"))) == 1
    assert all(np.array_equal(found[0], again) for again in found[1:])
