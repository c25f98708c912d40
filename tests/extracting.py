"""For the tests of extract_features.py: folders of images, the command in this process, what it wrote."""
import hashlib
import json
import shutil
from pathlib import Path

import pytest

import encoders
import extract_features
from conftest import ROOT
from dataset import load_features

FEW = {"train/real/camera": 8, "train/fake/gan": 8, "test/real/camera": 4, "test/fake/gan": 4}
# No git repository at that place, so that meta holds CODE_COMMIT: an edit of the code during a test changes no bytes.
SETTINGS = {"CLIP_MODEL": "tiny", "GIT_DIR": "/nowhere", "CODE_COMMIT": "c0de"}


@pytest.fixture(autouse=True)
def settings(clean_environment, monkeypatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def few(make_folder, tmp_path_factory):
    """24 images that no test changes."""
    return make_folder(tmp_path_factory.mktemp("few"), FEW)


@pytest.fixture
def own(few, tmp_path):
    """A copy of the 24 images, to change."""
    return shutil.copytree(few, tmp_path / "own")


def extract(data_dir, output, *flags):
    """The command, in this process; -> the columns it wrote."""
    extract_features.main(["--data_dir", str(data_dir), "--output_file", str(output), *map(str, flags)])
    return load_features(output)


@pytest.fixture
def encoded(monkeypatch):
    """List that grows by the size of each batch that is encoded."""
    sizes, encode = [], encoders.Encoder.encode

    def count(self, pixels):
        sizes.append(len(pixels))
        return encode(self, pixels)
    monkeypatch.setattr(encoders.Encoder, "encode", count)
    return sizes


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def names(folder):
    """What lies in a folder, hidden files and all."""
    return sorted(p.name for p in Path(folder).iterdir())


def another_encoder(folder, **changes):
    """The shipped encoder under another identity (or with other changes to what it says of itself)."""
    shutil.copytree(ROOT / "models/tiny", folder)
    manifest = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps({**manifest, "identity": "f" * 64, **changes}))
    return folder
