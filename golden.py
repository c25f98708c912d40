"""A labelled folder through the live service: accuracy of each model version, against the floor that its model states.

    python golden.py --url http://127.0.0.1:8000 --data_dir golden
    API_KEY=token python golden.py --url https://detector.example --data_dir golden --pushgateway http://pushgateway:9091

The token of a service with keys comes from the environment variable API_KEY: a flag would show in `ps`. Exit code 1: an
accuracy below its floor, images without a verdict, or a model that changed during the run; 2: the service or the
Pushgateway cannot be used.
"""

import argparse
import os

from detector.base.console import need_folder, run, say


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--url", required=True, metavar="URL", help="the service, as http://127.0.0.1:8000"
    )
    parser.add_argument(
        "--data_dir",
        required=True,
        metavar="DIR",
        help="folder of labelled images that trained no model",
    )
    parser.add_argument(
        "--pushgateway", metavar="URL", help="send the figures to this Prometheus Pushgateway, too"
    )
    args = parser.parse_args(argv)
    need_folder(args.data_dir)
    return args


def main(argv=None):
    args = parse_args(argv)
    from detector.evaluation.golden import (
        Service,
        complaints,
        push,
        read_golden,
        run_through,
        table,
    )

    service = Service(args.url, os.environ.get("API_KEY", "").strip())
    images = read_golden(args.data_dir)
    before = service.model()
    if before.get("notice"):
        say(f"note: {before['notice']}")
    found = run_through(service, images, before["version"])
    after = service.model()
    floors = {model["version"]: model["golden_floor"] for model in (before, after)}
    print(table(found, floors), flush=True)
    for version in found:
        if floors.get(version) is None:
            why = (
                "its model holds no test metrics"
                if version in floors
                else "it served only in between"
            )
            say(f"{version} is held against no floor: {why}")
    # another file under the same version is another model
    changed = len({*found, *floors}) > 1 or before.get("sha256") != after.get("sha256")
    lines = complaints(found, floors, len(images), changed)
    for line in lines:
        say(line)
    if args.pushgateway:
        push(args.pushgateway, found, floors, changed)
    return 1 if lines else 0


if __name__ == "__main__":
    run(main)
