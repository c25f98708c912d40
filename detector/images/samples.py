"""Photographs that the installed packages carry."""

import importlib.util
from pathlib import Path

# Package -> folder in it, files. scikit-image comes with `make demo` alone.
PHOTOS = {
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
    "matplotlib": ("mpl-data/sample_data", "grace_hopper.jpg"),
    "skimage": (
        "data",
        (
            "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png "
            "grass.png gravel.png moon.png motorcycle_left.png rocket.jpg"
        ),
    ),
}


def installed_photos():
    """Paths of the photographs that are installed here."""
    found = []
    for package, (folder, names) in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is not None:
            found += [Path(spec.origin).parent / folder / name for name in names.split()]
    return found
