"""Scripts import no slow package before --help or an error. benchmarks/ measures their speed."""

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
    "compare.py",
    "draw_sample.py",
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
    "compare.py": ["a.joblib", "b.joblib", "--data_dir", "nowhere"],
    "draw_sample.py": ["--data_dir", "nowhere"],
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
    """Run a script -> (CompletedProcess, the slow packages that it imported)."""
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


def test_the_list_holds_every_script_with_a_parser():
    commands = [p.name for p in ROOT.glob("*.py") if "argparse.ArgumentParser(" in p.read_text()]
    assert SCRIPTS == [*sorted(commands), "tools.demo", "tools.samples", "tools.study"]


@pytest.mark.parametrize("script", WRONG)
def test_a_wrong_flag_is_refused_before_a_slow_import(script, tmp_path):
    result, slow = imported(script, *WRONG[script], cwd=tmp_path)
    assert result.returncode == 2 and slow == set(), result.stderr
    assert any(
        line.startswith("error: ") and WRONG[script][-1] in line
        for line in result.stderr.splitlines()
    )


def test_the_parser_offers_all_classifiers_that_can_be_trained(capsys):
    import train_model
    from detector.training import classifiers

    for kind in [*classifiers.GRIDS, "all"]:
        args = train_model.parse_args(["--features_file", __file__, "--classifier", kind])
        assert args.classifier == kind
    with pytest.raises(SystemExit):
        train_model.parse_args(["--help"])
    assert "{" + ",".join([*classifiers.GRIDS, "all"]) + "}" in capsys.readouterr().out


def test_a_compiled_encoder_is_cached_and_runs_without_a_cache_too(tmp_path, monkeypatch):
    import numpy as np

    from detector.encoders import runtime

    pixels = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    features = []
    for cache in (tmp_path / "cache", tmp_path / "cache", Path("/proc/none")):
        monkeypatch.setenv("CLIP_CACHE", str(cache))
        features.append(runtime.Encoder(small.ENCODER).encode(pixels))
    assert len(list((tmp_path / "cache" / "compiled").glob("*.blob"))) == 1
    assert all(np.array_equal(features[0], again) for again in features[1:])
