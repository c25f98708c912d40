"""Classify a labelled folder with the live service and compare each model version with its floor.

    python golden.py --url http://127.0.0.1:8000 --data_dir golden
    API_KEY=token python golden.py --url https://detector.example --data_dir golden
    python golden.py --url URL --data_dir golden --pushgateway http://pushgateway:9091

The environment variable API_KEY holds the token of a service with keys. `ps` would show a flag.
The exit code is 1 where an accuracy is below its floor, images have no verdict, or the model
changed during the run. It is 2 where the service or the Pushgateway cannot be used.
"""

import argparse
import os

from detector.base.console import need_folder, run, say


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--url",
        required=True,
        metavar="URL",
        help="address of the service, such as http://127.0.0.1:8000",
    )
    parser.add_argument(
        "--data_dir",
        required=True,
        metavar="DIR",
        help="folder of labelled images that trained no model",
    )
    parser.add_argument(
        "--pushgateway", metavar="URL", help="also send the metrics to this Prometheus Pushgateway"
    )
    args = parser.parse_args(argv)
    need_folder(args.data_dir)
    return args


def main(argv=None):
    args = parse_args(argv)
    from detector.evaluation import golden

    service = golden.Service(args.url, os.environ.get("API_KEY", "").strip())
    images = golden.read_golden(args.data_dir)
    before = service.model()
    if before.get("notice"):
        say(f"note: {before['notice']}")
    tallies = golden.run_through(service, images, before["version"])
    after = service.model()
    floors = {model["version"]: model["golden_floor"] for model in (before, after)}
    print(golden.table(tallies, floors), flush=True)
    for line in golden.without_floor(tallies, floors):
        say(line)
    # The same version may come from another file.
    changed = len({*tallies, *floors}) > 1 or before.get("sha256") != after.get("sha256")
    problems = golden.complaints(tallies, floors, len(images), changed)
    for line in problems:
        say(line)
    if args.pushgateway:
        golden.push(args.pushgateway, tallies, floors, changed)
    return 1 if problems else 0


if __name__ == "__main__":
    run(main)
