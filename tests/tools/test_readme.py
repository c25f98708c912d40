"""README.md says what is so: every command in it runs, every setting and figure in it is the code's own.

The commands run in order in one folder that holds what a reader would have: data/, more/, folder/, photo.jpg, other.png.
A small checkpoint with random weights stands in for OpenAI's CLIP, which is a download of 890 MB; the commands are the same.
The first block, and the pages in docs/, run with the weights that `make test` fetches.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import small
from commands import OPENAI_CACHE, ROOT
from patience import PATIENCE

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```\n(?:```\n(.*?)```)?", README, re.DOTALL)
COMMANDS = [line.strip() for block, _ in BLOCKS for line in block.splitlines() if line.strip()]
# Not run here, and where they are: they install, fetch or need an engine.
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
SHORTER = {
    "finetune_clip.py": " --steps 2 --batch_size 8 --keep 0.75"
}  # the same command, not the half hour, and enough left to train on
IN_ITS_PLACE = {
    "--clip_model ViT-L/14": "--clip_model start.pt",  # a small checkpoint with random weights
    "CLIP_MODEL=ViT-B/16-8bit": "CLIP_MODEL=start.pt",
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory, make_folder, photos):
    """A folder as a reader has it after cloning, and the environment in which the commands run."""
    place = tmp_path_factory.mktemp("reader")
    make_folder(
        place / "data",
        {
            f"{split}/{label}": n
            for split, n in (("train", 40), ("test", 15))
            for label in ("real", "fake")
        },
    )
    make_folder(place / "more", {f"train/{label}": 10 for label in ("real", "fake")}, seed=1)
    make_folder(place / "folder", {".": 3})
    make_folder(place / "golden", {label: 5 for label in ("real", "fake")})
    shutil.copy(photos["china.jpg"], place / "photo.jpg")
    shutil.copy(photos["coffee.png"], place / "other.png")
    for script in [*ROOT.glob("*.py"), ROOT / "detector", ROOT / "tools", ROOT / "benchmarks"]:
        (place / script.name).symlink_to(script)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    return place, {
        **os.environ,
        "PATH": path,
        "CLIP_MODEL": str(small.CHECKPOINT),
        "CLIP_CACHE": str(OPENAI_CACHE),
        "PORT": port,
        "ALLOW_DEMO_MODEL": "1",
        "GIT_DIR": "/nowhere",
        "CODE_COMMIT": "c0de" * 10,
    }  # not dirty while one works on it


def run(command, place, env):
    return subprocess.run(
        ["bash", "-c", command.replace(":8000", ":" + env["PORT"])],
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


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


@pytest.mark.long
def test_every_command_runs_in_the_order_of_the_page(reader, wheel):
    for needed in ("torch", "clip"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: finetune_clip.py and prepare_clip.py need it")
    import small_clip

    place, env = reader
    small_clip.save_state_dict(small_clip.small_vit(None), place / "start.pt")
    server = None
    try:
        for command in COMMANDS:
            if command.startswith(tuple(ELSEWHERE)):
                continue
            if "app.py" in command:
                server = start_service(command, place, env)
                continue
            for theirs, small in IN_ITS_PLACE.items():
                command = command.replace(theirs, small)
            result = run(
                command + next((more for name, more in SHORTER.items() if name in command), ""),
                place,
                env,
            )
            assert (
                result.returncode == 0
                or re.search("audit|golden", command)
                and result.returncode == 1
                and "Traceback" not in result.stderr
            ), command + "\n" + result.stderr
    finally:
        if server:
            server.send_signal(signal.SIGTERM)
            assert server.wait(PATIENCE) == 0


def test_the_printed_outputs_are_those_that_the_page_shows(reader, wheel):
    place, env = reader
    shown = {block.splitlines()[-1]: output for block, output in BLOCKS if output}
    assert run("python -m tools.samples", place, env).stdout.startswith("samples: ")
    first = run(
        "rm -f model.joblib; python classify.py --image_path"
        " samples/{china,flower,grace_hopper}.jpg",
        place,
        env,
    )
    expected = next(output for command, output in shown.items() if command.endswith("samples"))
    assert re.sub(r"\d\.\d\d", "0.00", first.stderr + first.stdout) == re.sub(
        r"\d\.\d\d", "0.00", expected
    )
    for output in shown.values():
        if output.startswith("{"):
            assert list(json.loads(output)) == ["classification", "confidence"]


def test_every_make_target_exists():
    for command in COMMANDS:
        if command.startswith("make "):
            assert (
                subprocess.run(
                    ["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True
                ).returncode
                == 0
            ), command


def test_the_settings_table_is_the_code_s():
    from detector.service.settings import SETTINGS

    table = re.findall(r"^\| `([A-Z0-9_]+)` \| (.*?) \| (.*) \|$", README, re.MULTILINE)
    assert table == [
        (name, f"`{default}`" if default else "", text)
        for name, (default, text) in SETTINGS.items()
    ]


def test_the_figures_of_the_shipped_model_are_its_own():
    """The rows are written from models/evaluation/summary.txt, which `make ship` makes."""
    assert (ROOT / "models" / "evaluation" / "summary.txt").read_text().strip() in README


def test_the_number_of_distortions_is_the_code_s():
    from detector.images.distort import CONDITIONS

    assert f"{len(CONDITIONS)} distortions" in README


def test_the_table_of_planted_faults_is_the_benchmark_s():
    """Between the two comments stands benchmarks/planted_faults.md, which benchmarks/planted_faults.py writes."""
    assert (ROOT / "benchmarks" / "planted_faults.md").read_text().strip() in README


def test_the_table_of_pods_is_the_benchmark_s():
    """Its rows are what benchmarks/service.py prints last, once for each encoder."""
    rows = re.findall(r"^\| encoder \| images/s .*\n(?:\|.*\n)+", README, re.MULTILINE)
    assert len(rows) == 1 and rows[0] in (ROOT / "benchmarks" / "service.md").read_text()


def test_the_tables_of_speed_are_the_benchmarks():
    """benchmarks/speed.md keeps what the commands in it printed, and on which machine."""
    section = README.split("### How fast is it?")[1].split("\n## ")[0]
    tables, kept = (
        re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE),
        (ROOT / "benchmarks" / "speed.md").read_text(),
    )
    assert len(tables) >= 7 and [table for table in tables if table not in kept] == []


@pytest.mark.parametrize("script", ["extract_features.py", "train_model.py", "classify.py"])
def test_the_help_of_the_three_user_scripts_fits_one_screen_and_names_the_user_s_flags_first(
    script,
):
    text = subprocess.run(
        [sys.executable, ROOT / script, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    ).stdout.splitlines()
    assert len(text) <= 40 and max(map(len, text)) <= 80
    flags = re.findall(r"^  (--\w+)", "\n".join(text), re.MULTILINE)
    users = {
        "extract_features.py": ["--data_dir", "--output_file"],
        "classify.py": ["--image_path", "--model_path"],
        "train_model.py": ["--features_file", "--model_output_path"],
    }[script]
    assert flags[:2] == users


def test_every_command_of_the_page_on_encoders_runs(script, openai):
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "encoders.md").read_text(), re.DOTALL)
    commands = [line.split() for block in blocks for line in block.splitlines()]
    assert commands and all(words[0] == "python" for words in commands)
    for words in commands:
        assert script(*words[1:]).returncode == 0, words


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_every_file_that_the_page_links_to_is_there(path):
    assert (ROOT / path).is_file()
