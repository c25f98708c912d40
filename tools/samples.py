"""Photographs to try things on, copied from the installed packages into one folder.

python -m tools.samples
python classify.py --image_path samples
"""

import argparse
from pathlib import Path

from detector.base.console import Help, run
from detector.base.errors import UsageError
from detector.base.files import atomic_write, check_folder


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument(
        "--output_dir", default="samples", metavar="DIR", help="folder for the copies"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from detector.images.samples import installed_photos

    photos = installed_photos()
    if not photos:
        raise UsageError(
            "no installed package carries a photograph: pip install -r requirements-serve.txt"
        )
    check_folder(args.output_dir, f"--output_dir {args.output_dir}")
    for path in photos:
        with atomic_write(Path(args.output_dir, path.name)) as file:
            file.write(path.read_bytes())
    names = ", ".join(path.name for path in photos)
    print(f"{args.output_dir}: {len(photos)} photographs ({names})")


if __name__ == "__main__":
    run(main)
