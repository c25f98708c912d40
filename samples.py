"""Photographs to try things on: those that the installed packages carry, copied into one folder.

python samples.py
python classify.py --image_path samples
"""

import argparse
import importlib.util
from pathlib import Path

import common
from common import UsageError

# Package -> folder in it, files. scikit-image comes with `make demo` alone.
PHOTOS = {
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
    "matplotlib": ("mpl-data/sample_data", "grace_hopper.jpg"),
    "skimage": (
        "data",
        "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png "
        "grass.png gravel.png moon.png motorcycle_left.png rocket.jpg",
    ),
}


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=common.Help
    )
    parser.add_argument(
        "--output_dir", default="samples", metavar="DIR", help="folder to copy them to"
    )
    return parser.parse_args(argv)


def installed_photos():
    """Paths of the photographs that are installed here."""
    found = []
    for package, (folder, names) in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is not None:
            found += [Path(spec.origin).parent / folder / name for name in names.split()]
    return found


def main(argv=None):
    args = parse_args(argv)
    photos = installed_photos()
    if not photos:
        raise UsageError(
            "no installed package carries a photograph: pip install -r requirements-serve.txt"
        )
    common.check_folder(args.output_dir, f"--output_dir {args.output_dir}")
    for path in photos:
        with common.atomic_write(Path(args.output_dir, path.name)) as file:
            file.write(path.read_bytes())
    print(
        f"{args.output_dir}: {len(photos)} photographs ({', '.join(path.name for path in photos)})"
    )


if __name__ == "__main__":
    common.run(main)
