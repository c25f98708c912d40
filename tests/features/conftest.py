"""Fixtures for tests of extraction: folders of images, and the settings under which they run."""

import shutil

import pytest
from extracting import FEW, MANY, SETTINGS

from detector.encoders import runtime


@pytest.fixture
def settings(clean_environment, monkeypatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def few(make_folder, tmp_path_factory):
    """24 images that no test changes."""
    return make_folder(tmp_path_factory.mktemp("few"), FEW)


@pytest.fixture(scope="session")
def many(make_folder, tmp_path_factory):
    """160 images that no test changes."""
    return make_folder(tmp_path_factory.mktemp("many"), MANY, seed=1)


@pytest.fixture
def own(few, tmp_path):
    """A copy of the 24 images, to change."""
    return shutil.copytree(few, tmp_path / "own")


@pytest.fixture
def encoded(monkeypatch):
    """List that grows by the size of each encoded batch."""
    sizes, encode = [], runtime.Encoder.encode

    def count(self, pixels):
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(runtime.Encoder, "encode", count)
    return sizes
