"""Draw images of a folder to label by hand, and make a page that labels them by keyboard.

    python draw_sample.py --data_dir uploads --number 300 --output_dir to_label
    python draw_sample.py --data_dir uploads --log service.log     # only what the service judged

Open to_label/index.html in a browser, label, and save labels.csv. Then evaluate.py --labels_file
estimates the accuracy on the whole folder.
"""

import argparse
from pathlib import Path

from detector.base.console import Help, need_folder, run
from detector.base.errors import UsageError
from detector.base.files import check_folder, only_writer


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="folder of uploads")
    parser.add_argument(
        "--number", type=int, default=300, metavar="N", help="images to draw, twins only once"
    )
    parser.add_argument(
        "--model_path",
        metavar="FILE",
        help="model whose verdicts are measured; half of the draw prefers scores near its threshold"
        " (default: model.joblib if it exists, else the shipped model)",
    )
    parser.add_argument(
        "--output_dir", default="to_label", metavar="DIR", help="folder for the page and pictures"
    )
    parser.add_argument(
        "--log", nargs="+", metavar="LOG", help="draw only images with a verdict in these logs"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draw")
    args = parser.parse_args(argv)
    need_folder(args.data_dir)
    for name, least in (("number", 2), ("seed", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if Path(args.output_dir, "index.html").exists():
        raise UsageError(f"--output_dir {args.output_dir}: holds a draw already; name another")
    check_folder(args.output_dir, f"--output_dir {args.output_dir}")
    return args


def main(argv=None):
    args = parse_args(argv)
    from detector.evaluation.drawing import draw_sample
    from detector.verdict import Detector, choose_model

    page = Path(args.output_dir, "index.html")
    with only_writer(page, f"--output_dir {args.output_dir}"):
        detector = Detector(choose_model(args.model_path))
        line, unreadable = draw_sample(
            detector, args.data_dir, args.number, args.output_dir, args.seed, args.log
        )
    print(line)
    return 1 if unreadable else 0


if __name__ == "__main__":
    run(main)
