"""README.md and docs/ state what is true: their commands run, their tables are the code's own.

The commands of a page run in order, in a fresh folder with the files that a reader would have. A
small checkpoint with random weights replaces OpenAI's CLIP, a download of 890 MB. The first block
of README.md runs with the weights that `make test` fetches.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import small
from commands import OPENAI_CACHE, ROOT
from live import free_port
from made_up import BASELINE, DIM, make_columns, write_features
from patience import PATIENCE
from PIL import Image

from detector.evaluation.intervals import words

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCK = re.compile(r"```sh\n(.*?)```\n(?:```\n(.*?)```)?", re.DOTALL)
BLOCKS = {page: BLOCK.findall(text) for page, text in PAGES.items()}
COMMANDS = {
    page: [line.strip() for block, _ in blocks for line in block.splitlines() if line.strip()]
    for page, blocks in BLOCKS.items()
}
TABLES = re.findall(r"```csv\n(.*?)```", PAGES["docs/data.md"], re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", PAGES["docs/python.md"], re.DOTALL)
# Commands that this file does not run, with the reason or the test that covers them.
ELSEWHERE = {
    "python3 -m venv": "the tests have an environment already",
    "pip install -r": "installing is what `make test` begins with",
    "pytest": "this is pytest",
    "make ": "tools/demo.py is run by test_demo.py; the targets are looked at below",
    "kaggle ": "needs an account of Kaggle's",
    "docker ": "no engine at hand: test_deploy.py holds the Dockerfile against the repository",
    'curl -H "Authorization': "needs a service with keys: test_keys.py",
    "python evaluate.py --feedback": "needs the log of a service that was used: test_feedback.py",
    "kubectl ": (
        "no cluster at hand: test_manifests.py holds the manifests against Kubernetes' schemas"
    ),
}
# The same command without the half hour, with enough images left to train on.
SHORTER = {"finetune_clip.py": " --steps 2 --batch_size 8 --keep 0.75"}
REPLACED = {
    "--clip_model ViT-L/14": "--clip_model start.pt",  # a small checkpoint with random weights
    "--last 4": "--last 1",  # of its two blocks
    "CLIP_MODEL=ViT-B/16-8bit": "CLIP_MODEL=start.pt",
    "--max_false_reject 0.005 --max_missed 0.2": "--max_false_reject 0.4 --max_missed 0.4",  # few
}
# exit code 1 is a result of theirs
MAY_FIND_FAULTS = (
    "python audit.py",
    "python golden.py",
    "python compare.py",
    "python registry.py promote detector v1.3.0",
)


@pytest.fixture(scope="module")
def clone(tmp_path_factory, make_folder, photos):
    """A folder as a reader has it after cloning, and the environment of its commands."""
    place = tmp_path_factory.mktemp("clone")
    counts = {"train": 40, "test": 15}
    make_folder(
        place / "data",
        {f"{split}/{label}": n for split, n in counts.items() for label in ("real", "fake")},
    )
    make_folder(place / "more", {f"train/{label}": 10 for label in ("real", "fake")}, seed=1)
    make_folder(place / "folder", {".": 3})
    make_folder(place / "pictures", {".": 4}, seed=3)
    (place / "labels.csv").write_text("".join(TABLES))
    make_uploads(place / "uploads", make_folder)
    make_folder(place / "golden", dict.fromkeys(("real", "fake"), 5), seed=2)
    shutil.copy(photos["china.jpg"], place / "photo.jpg")
    shutil.copy(photos["coffee.png"], place / "other.png")
    for script in [*ROOT.glob("*.py"), ROOT / "detector", ROOT / "tools", ROOT / "benchmarks"]:
        (place / script.name).symlink_to(script)
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    return place, {
        **os.environ,
        "PATH": path,
        "CLIP_MODEL": str(small.CHECKPOINT),
        "CLIP_CACHE": str(private_cache(tmp_path_factory.mktemp("cache"))),
        "PORT": str(free_port()),
        "ALLOW_DEMO_MODEL": "1",
        "GIT_DIR": "/nowhere",  # the working tree may be dirty
        "CODE_COMMIT": "c0de" * 10,
    }


def make_uploads(place, make_folder):
    """Write 40 images of each class, of the development images where they are at hand."""
    if "IMAGES_DIR" not in os.environ:
        return make_folder(place, dict.fromkeys(("real", "fake"), 40), seed=4)
    external = Path(os.environ["IMAGES_DIR"], "external")
    for label in ("real", "fake"):
        for path in sorted((external / label).rglob("*.jpg"))[::4][:40]:
            copy = place / path.relative_to(external)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def private_cache(cache):
    """OpenAI's encoders linked into a cache that may be written to."""
    small.link_encoder(cache)
    for path in [*OPENAI_CACHE.glob("*.whl"), *OPENAI_CACHE.glob("encoders/ViT-B-16-8bit*")]:
        (cache / path.relative_to(OPENAI_CACHE)).symlink_to(path)
    return cache


@pytest.fixture(scope="module")
def trained(clone, tmp_path_factory):
    """The same folder with the features and the model that README.md leaves behind."""
    small_clip = pytest.importorskip("small_clip")
    place, env = tmp_path_factory.mktemp("trained") / "clone", clone[1]
    shutil.copytree(clone[0], place, symlinks=True)
    small_clip.save_state_dict(small_clip.small_vit(None), place / "start.pt")
    timm_small = pytest.importorskip("timm_small")
    timm_small.save_random("convnext_atto.d2_in1k", place / "weights.safetensors")
    for command in (
        "python extract_features.py --data_dir data",
        "python train_model.py --model_version v1.2.0",
    ):
        assert run(command, place, env).returncode == 0
    return place


def run(command, place, env):
    return subprocess.run(
        ["bash", "-c", command.replace(":8000", ":" + env["PORT"])],
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def label(place):
    """Save labels.csv as a person does who opens the page of draw_sample.py."""
    page = (place / "to_label" / "index.html").read_text()
    (images,) = re.findall(r'<script id="images".*?>(.*?)</script>', page, re.DOTALL)
    lines = ["path,label,seconds,who,probability,images"]
    for image in json.loads(images):
        word, figures = image["path"].split("/")[0], (image["probability"], image["images"])
        lines.append(f"{image['path']},{word},2.5,Ann,{','.join(map(str, figures))}")
    (place / "labels.csv").write_text("\n".join(lines) + "\n")


def start_service(command, place, env):
    """Start it as a reader would in another terminal; return when it is ready."""
    server = subprocess.Popen(
        ["bash", "-c", "exec env " + command],
        cwd=place,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(
                f"http://127.0.0.1:{env['PORT']}/readyz", timeout=PATIENCE
            ).close()
            return server
        except OSError:
            assert server.poll() is None, "the service ended"
            time.sleep(0.1)
    raise AssertionError("the service is never ready")


def runnable(command):
    """The command as it is run here, or None where another test covers it."""
    if command.startswith(tuple(ELSEWHERE)):
        return None
    for text, replacement in REPLACED.items():
        command = command.replace(text, replacement)
    return command + "".join(more for name, more in SHORTER.items() if name in command)


@pytest.mark.long
# test_game_day.py runs the commands of the runbook while its alerts fire.
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/runbook.md"])
def test_every_command_of_a_page_runs_in_order(page, clone, trained, wheel, tmp_path):
    for needed in ("torch", "clip"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: finetune_clip.py and prepare_clip.py need it")
    place, env = tmp_path / "clone", clone[1]
    shutil.copytree(trained, place, symlinks=True)
    if page == "README.md":  # its reader has only cloned
        for output in place.glob("model*"):
            shutil.rmtree(output) if output.is_dir() else output.unlink()
        (place / "features.npz").unlink()
    server = None
    try:
        for command in filter(None, map(runnable, COMMANDS[page])):
            if "app.py" in command:
                server = start_service(command, place, env)
                continue
            result = run(command, place, env)
            allowed = (0, 1) if command.startswith(MAY_FIND_FAULTS) else (0,)
            assert result.returncode in allowed, f"{command}\n{result.stderr}"
            assert "Traceback" not in result.stderr, f"{command}\n{result.stderr}"
            if "draw_sample.py" in command:
                label(place)
    finally:
        if server:
            server.send_signal(signal.SIGTERM)
            assert server.wait(PATIENCE) == 0


def test_the_python_of_its_page_runs_in_order(clone, tmp_path):
    place, env = tmp_path / "clone", clone[1]
    shutil.copytree(clone[0], place, symlinks=True)
    shutil.copy(BASELINE, place / "model.joblib")
    columns = make_columns(dim=DIM)
    columns["sources"] = np.array([f"source {i % 4}" for i in range(len(columns["labels"]))])
    write_features(place / "features.npz", columns)
    (place / "page.py").write_text("".join(PYTHON))
    result = run("python -W error page.py", place, env | {"MPLBACKEND": "agg"})
    assert result.returncode == 0, result.stderr
    assert "missing.jpg error: cannot read missing.jpg: No such file" in result.stdout
    with Image.open(place / "p_fake_by_source.png") as plot:
        assert min(plot.size) > 300 and len(plot.convert("L").getcolors()) > 20


def without_digits(text):
    return re.sub(r"\d\.\d\d", "0.00", text)


def test_the_first_commands_print_what_the_readme_shows(clone, wheel):
    place, env = clone
    shown = {block.splitlines()[-1]: output for block, output in BLOCKS["README.md"]}
    assert run("python -m tools.samples", place, env).stdout.startswith("samples: ")
    names = "samples/{china,flower,grace_hopper}.jpg"
    first = run(f"python classify.py --image_path {names}", place, env)
    expected = shown["python classify.py --image_path samples"]
    assert without_digits(first.stderr + first.stdout) == without_digits(expected)


def test_every_json_response_of_the_pages_has_the_documented_keys():
    outputs = [output for blocks in BLOCKS.values() for _, output in blocks]
    responses = [json.loads(output) for output in outputs if output.startswith("{")]
    assert len(responses) >= 2
    assert all(list(response) == ["classification", "confidence"] for response in responses)


@pytest.mark.parametrize(
    "command", sorted({c for page in COMMANDS.values() for c in page if c.startswith("make ")})
)
def test_every_make_target_exists(command):
    words = ["make", "-n", *shlex.split(command)[1:]]
    assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 0


def test_the_table_of_settings_is_the_code_s():
    from detector.service.settings import SETTINGS

    row = re.compile(r"^\| `([A-Z0-9_]+)` \| (.*?) \| (.*) \|$", re.MULTILINE)
    assert row.findall(PAGES["docs/service.md"]) == [
        (name, f"`{default}`" if default else "", text)
        for name, (default, text) in SETTINGS.items()
    ]


@pytest.mark.parametrize(
    "page, source",
    [
        ("README.md", "models/evaluation/summary.txt"),  # `make ship` writes it
        ("docs/data.md", "benchmarks/planted_faults.md"),  # benchmarks/planted_faults.py writes it
    ],
)
def test_a_generated_part_of_a_page_is_as_its_script_wrote_it(page, source):
    assert (ROOT / source).read_text().strip() in PAGES[page]


def test_the_figures_in_appeals_are_those_of_the_shipped_evaluation():
    folder = ROOT / "models" / "evaluation"
    cells = [
        line.strip("| ").split(" | ")[-1]
        for row in ("accuracy on reals", "1%", "10%")
        for line in (folder / "MODEL_CARD.md").read_text().splitlines()
        if line.startswith(f"| {row} |")
    ]
    resaved = json.loads((folder / "resaved.json").read_text())[1:]
    assert [row["level"] for row in resaved] == ["75%, quality 60", "50%, quality 40"]
    cells += [words(row["flipped"]) for row in resaved]
    figures = r"0\.\d\d \[0\.\d\d, 0\.\d\d\]"
    assert re.findall(figures, " ".join(PAGES["docs/appeals.md"].split())) == cells


@pytest.mark.parametrize("page", ["README.md", "docs/evaluation.md"])
def test_the_number_of_distortions_is_the_code_s(page):
    from detector.images.distort import CONDITIONS

    assert f"{len(CONDITIONS)} distortions" in " ".join(PAGES[page].split())


@pytest.mark.parametrize(
    "page, benchmark, header, least",
    [
        ("docs/deployment.md", "benchmarks/service.md", "| encoder | images/s ", 1),
        ("docs/speed.md", "benchmarks/speed.md", "|", 8),
        ("docs/evaluation.md", "benchmarks/occlusion.md", "| | pictures", 1),
    ],
)
def test_the_tables_of_a_page_are_the_benchmark_s(page, benchmark, header, least):
    """A benchmark's page keeps what its command printed, and on which machine."""
    tables = re.findall(r"(?:^\|.*\n)+", PAGES[page], re.MULTILINE)
    tables = [table for table in tables if table.startswith(header)]
    measured = (ROOT / benchmark).read_text()
    assert len(tables) >= least and [table for table in tables if table not in measured] == []


@pytest.mark.parametrize(
    "script, users_flags",
    [
        ("extract_features.py", ["--data_dir", "--output_file"]),
        ("train_model.py", ["--features_file", "--model_output_path"]),
        ("classify.py", ["--image_path", "--model_path"]),
    ],
)
def test_help_fits_a_screen_and_names_the_main_flags_first(script, users_flags):
    text = subprocess.run(
        [sys.executable, ROOT / script, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    ).stdout.splitlines()
    assert len(text) <= 40 and max(map(len, text)) <= 80
    assert re.findall(r"^  (--\w+)", "\n".join(text), re.MULTILINE)[:2] == users_flags
