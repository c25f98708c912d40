"""Photographs in the installed packages."""

import importlib.util
from pathlib import Path

# Package -> its folder, files. Only `make demo` installs scikit-image.
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
    """Paths of these photographs, of the packages that are installed."""
    paths = []
    for package, (folder, names) in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is not None:
            paths += [Path(spec.origin).parent / folder / name for name in names.split()]
    return paths
