"""Audit, extraction, training without and with views, and evaluation of your folder, on one page.

    python -m tools.study --data_dir data
    python -m tools.study --data_dir data --limit 4000 --views 3 --robustness_images 200
    python -m tools.study --data_dir data --levers --checkpoints finetuned.pt

The first takes about 20 minutes on two cores with ViT-L/14 (400 images). The third compares other
layers, crops and an encoder of your own with the embedding. `make study DATA=data` sets up the
environment first. The page is study/index.html. An interrupted run is resumed.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from detector.base.console import Help, need_folder, run, say
from detector.base.constants import MAX_VIEWS
from detector.base.errors import UsageError
from detector.base.files import atomic_write, check_folder
from detector.base.project import HERE

CROPS = 4  # full-resolution crops of each image that --levers tries
FINDING = ("audit.py", "evaluate.py")  # exit code 1 of these is a finding, not a failure


def add_input_arguments(parser):
    parser.add_argument(
        "--data_dir", required=True, metavar="DIR", help="folder of labelled images"
    )
    parser.add_argument(
        "--output_dir",
        default="study",
        metavar="DIR",
        help="folder for the page and the files behind it",
    )


def add_size_arguments(parser):
    for name, default, text in (
        ("limit", 400, "draw N images, with a fixed seed"),
        ("views", 1, "degraded copies of each image"),
        ("robustness_images", 40, "images that go through the distortions"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)


def add_comparison_arguments(parser):
    parser.add_argument(
        "--levers",
        action="store_true",
        help=f"compare with other layers and with {CROPS} crops; takes as long as 7 extractions",
    )
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        default=[],
        metavar="FILE",
        help="compare with these encoders too, for example of finetune_clip.py",
    )
    parser.add_argument(
        "--max_fpr",
        type=float,
        metavar="X",
        help="set the threshold so that at most this share of real images is called fake",
    )


def check_arguments(args):
    """Raises UsageError."""
    for name, most in (("limit", math.inf), ("views", MAX_VIEWS), ("robustness_images", math.inf)):
        if not 1 <= getattr(args, name) <= most:
            limit = f", at most {most}" if most < math.inf else ""
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1{limit}")
    if args.max_fpr is not None and not 0 < args.max_fpr < 1:
        raise UsageError(f"--max_fpr {args.max_fpr:g}: must be between 0 and 1")
    need_folder(args.data_dir)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add_input_arguments(parser)
    add_size_arguments(parser)
    add_comparison_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


class Steps:
    """The project's commands on one folder. `times`: command and seconds of each."""

    def __init__(self, args):
        self.args, self.out, self.times = args, Path(args.output_dir), []

    def run(self, *words):
        """Run a command, shown as a user would type it, with its progress. -> its stdout"""
        words = [str(word) for word in words]
        say("$ python " + " ".join(words))
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, str(HERE / words[0]), *words[1:]], stdout=subprocess.PIPE, text=True
        )
        if result.returncode == 2:
            raise UsageError(f"{words[0]} failed (see the line above)")
        failed = result.returncode not in ((0, 1) if words[0] in FINDING else (0,))
        if failed or not result.stdout:
            raise SystemExit(result.returncode or 1)  # the command has printed the reason
        seconds = round(time.perf_counter() - start)
        self.times.append({"command": "python " + " ".join(words), "seconds": seconds})
        return result.stdout

    def extract(self, name, *flags):
        """Write NAME.npz. -> seconds"""
        args, output = self.args, self.out / f"{name}.npz"
        files = ("--data_dir", args.data_dir, "--output_file", output)
        draw = ("--limit", args.limit, "--views", args.views)
        self.run("extract_features.py", *files, *draw, *flags)
        return self.times[-1]["seconds"]

    def train(self, features, name, *flags):
        """Train NAME.joblib."""
        rate = [] if self.args.max_fpr is None else ["--max_fpr", self.args.max_fpr]
        files = ("--features_file", self.out / f"{features}.npz")
        output = ("--model_output_path", self.out / f"{name}.joblib")
        self.run("train_model.py", *files, *output, *flags, *rate)

    def evaluate(self, features, name, folder, *flags):
        """Evaluate NAME.joblib into a folder."""
        files = ("--model_path", self.out / f"{name}.joblib")
        files += ("--features_file", self.out / f"{features}.npz")
        self.run("evaluate.py", *files, *flags, "--report_dir", self.out / folder)

    def metrics_of(self, folder):
        return json.loads((self.out / folder / "metrics.json").read_text())


def without_views(source, target):
    """Copy a features file without the degraded copies."""
    import numpy as np

    with np.load(source) as file:
        columns = dict(file)
    whole, meta = columns["view"] == 0, columns.pop("meta")
    with atomic_write(target) as file:
        kept = {name: values[whole] for name, values in columns.items()}
        np.savez_compressed(file, meta=meta, **kept)


def levers(args):
    """Alternatives to the embedding -> (words, flags for extraction, flags for training)."""
    if args.levers:
        yield "layer before the projection", ["--layers", "penultimate"], []
        yield "middle blocks and embedding", ["--layers", "multi"], []
        yield f"embedding, and of {CROPS} crops", ["--crops", CROPS], ["--crops", CROPS]
    for checkpoint in args.checkpoints:
        yield checkpoint, ["--clip_model", checkpoint], []


def compare_levers(steps, seconds):
    """-> rows {words, seconds of extraction, evaluation, left_out}, the embedding first.

    Each is trained and evaluated with the degraded copies. `seconds`: of the embedding.
    """
    rows = [lever_row(steps, "embedding", seconds, "with")]
    for number, (words, extraction, training) in enumerate(levers(steps.args), 1):
        name = f"lever{number}"
        seconds = steps.extract(name, *extraction)
        steps.train(name, name, *training)
        steps.evaluate(name, name, name)
        rows.append(lever_row(steps, words, seconds, name))
    return rows if len(rows) > 1 else []


def lever_row(steps, words, seconds, name):
    left_out = steps.metrics_of(f"{name}_report")["leave_one_source_out"]
    mean = sum(row["value"] for row in left_out) / len(left_out) if left_out else None
    return {"words": words, "seconds": seconds, **steps.metrics_of(name), "left_out": mean}


def study(steps):
    """Run every command on the folder. -> the audit, rows of `compare_levers`"""
    args, out = steps.args, steps.out
    audit = json.loads(steps.run("audit.py", "--data_dir", args.data_dir, "--json"))
    seconds = steps.extract("features")
    without_views(out / "features.npz", out / "untouched.npz")
    steps.train("untouched", "without")
    steps.train("features", "model", "--classifier", "all")
    steps.train("features", "with")
    for name in ("without", "with"):  # the same classifier, on the same images and their copies
        steps.evaluate("features", name, name)
    images = ("--data_dir", args.data_dir, "--robustness_images", args.robustness_images)
    steps.evaluate("features", "model", "evaluation", *images)
    return audit, compare_levers(steps, seconds)


def write_page(steps, measured, audit, compared):
    from detector.evaluation import report

    training, evaluation = steps.metrics_of("model_report"), steps.out / "evaluation"
    page = {
        **measured,
        "folder": audit,
        "levers": compared,
        "times": steps.times,
        "arguments": vars(steps.args),
        "models": {name: steps.metrics_of(name) for name in ("without", "with")},
        **{
            name: training[name] for name in ("classifiers", "leave_one_source_out", "false_alarms")
        },
    }
    pictures = {path.stem: path.read_bytes() for path in evaluation.glob("*.png")}
    with atomic_write(steps.out / "index.html", "w") as file:
        file.write(report.render("study.html", page, pictures))


def main(argv=None):
    args = parse_args(argv)
    from detector.evaluation.intervals import words
    from detector.images.folders import list_images

    list_images(args.data_dir)  # raises before any command starts
    check_folder(args.output_dir, f"--output_dir {args.output_dir}")
    steps = Steps(args)
    audit, compared = study(steps)
    measured = steps.metrics_of("evaluation")
    write_page(steps, measured, audit, compared)
    balanced, auc = (words(measured["overall"][name]) for name in ("balanced_accuracy", "auc"))
    print(
        f"{steps.out / 'index.html'}: {measured['overall']['n']} images not trained on, "
        f"{measured['classifier']} on '{measured['encoder']}', "
        f"balanced accuracy {balanced}, AUC {auc}"
    )


if __name__ == "__main__":
    run(main)
