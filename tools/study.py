"""Audit, extraction, training without and with views, and evaluation of your folder, on one page.

    python -m tools.study --data_dir data
    python -m tools.study --data_dir data --limit 4000 --views 3 --robustness_images 200
    python -m tools.study --data_dir data --levers
    python -m tools.study --data_dir data --clip_models ViT-L/14 ViT-B/16-8bit finetuned.pt

The first takes about 20 minutes on two cores with ViT-L/14 (400 images). The third compares other
layers and crops with the embedding, and the fourth compares encoders. `make study DATA=data` sets
up the environment first. The page is study/index.html. An interrupted run is resumed.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from detector.base.console import Help, need_folder, printable, run, say
from detector.base.constants import MAX_VIEWS
from detector.base.errors import UsageError
from detector.base.files import atomic_write, check_folder
from detector.base.project import HERE

CROPS = 4  # full-resolution crops of each image that --levers tries
# alternatives to the embedding: words, flags for extraction, flags for training
LEVERS = (
    ("layer before the projection", ["--layers", "penultimate"], []),
    ("middle blocks and embedding", ["--layers", "multi"], []),
    (f"embedding, and of {CROPS} crops", ["--crops", CROPS], ["--crops", CROPS]),
)
PASSES = 5  # forward passes that are timed
HEADINGS = (
    "encoder",
    "AUC, known sources",
    "AUC, sources left out",
    "AUC, degraded copies",
    "images/s",
    "MB",
    "seconds to start",
)
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
        "--clip_models",
        nargs="+",
        default=[os.environ.get("CLIP_MODEL") or "ViT-L/14"],
        metavar="NAME|FILE",
        help="encoders to compare (docs/encoders.md); the page is about the first; CLIP_MODEL sets "
        "the default",
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
    """The project's commands on one folder.

    `times`: command of each, and seconds from its start to the first line of its results.
    """

    def __init__(self, args):
        self.args, self.out, self.times = args, Path(args.output_dir), []

    def run(self, *words):
        """Run a command, shown as a user would type it, with its progress. -> its stdout"""
        words = [str(word) for word in words]
        say("$ python " + " ".join(words))
        command, start = [sys.executable, str(HERE / words[0]), *words[1:]], time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            first = process.stdout.readline()
            seconds = round(time.perf_counter() - start, 1)
            printed = first + process.stdout.read()
        failed = process.returncode not in ((0, 1) if words[0] in FINDING else (0,))
        if failed or not printed:
            raise SystemExit(process.returncode or 1)  # the command has printed the reason
        self.times.append({"command": "python " + " ".join(words), "seconds": seconds})
        return printed

    def prepare(self):
        """Prepare all encoders. -> {value of --clip_models: its prepared folder}"""
        names = self.args.clip_models
        return {n: Path(self.run("prepare_clip.py", "--clip_model", n).rstrip("\n")) for n in names}

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

    def measure(self, name, extraction, training=()):
        """Extract, train and evaluate under one name. -> seconds of the extraction"""
        seconds = self.extract(name, *extraction)
        self.train(name, name, *training)
        self.evaluate(name, name, name)
        return seconds

    def metrics_of(self, folder):
        return json.loads((self.out / folder / "metrics.json").read_text())


def without_views(source, target):
    """Copy a features file without the degraded copies. -> the columns of the copy"""
    import numpy as np

    with np.load(source) as file:
        columns = dict(file)
    whole, meta = columns["view"] == 0, columns.pop("meta")
    with atomic_write(target) as file:
        kept = {name: values[whole] for name, values in columns.items()}
        np.savez_compressed(file, meta=meta, **kept)
    return kept


def compare_levers(steps, seconds):
    """-> rows {words, seconds of extraction, evaluation}, the embedding first.

    Each is trained and evaluated with the degraded copies. `seconds`: of the embedding.
    """
    rows = [{"words": "embedding", "seconds": seconds, **steps.metrics_of("with")}]
    for number, (words, extraction, training) in enumerate(LEVERS, 1):
        name, encoder = f"lever{number}", ("--clip_model", steps.args.clip_models[0])
        seconds = steps.measure(name, [*encoder, *extraction], training)
        rows.append({"words": words, "seconds": seconds, **steps.metrics_of(name)})
    return rows


def compare_encoders(steps, folders, columns):
    """-> {sentences on the images, rows of text under HEADINGS}, the first encoder first.

    All are trained and evaluated alike. `folders`: of `Steps.prepare`; `columns`: of
    `without_views`.
    """
    measured, rows = [], []
    for clip_model, folder in folders.items():
        name = folder.name if rows else "with"  # the study has measured the first
        if rows:
            steps.measure(name, ["--clip_model", clip_model])
        image = Path(steps.args.data_dir, str(columns["paths"][0]))
        for _ in range(2):  # the first start fills the caches
            model = ("--model_path", steps.out / f"{name}.joblib")
            steps.run("classify.py", "--image_path", image, *model)
        measured.append(steps.metrics_of(name))
        seconds = steps.times[-1]["seconds"]
        rows.append([clip_model, *aucs(measured[-1]), *speed_and_size(folder), f"{seconds:.1f}"])
    return {"words": words_on_images(steps.args, columns, measured), "rows": rows}


def aucs(measured):
    """metrics.json of an evaluation -> three AUCs as text; '-' without such images."""
    from detector.evaluation.intervals import words

    # without named sources, test images count as of the training's sources
    known = measured["known"] or (None if measured["unseen"] else measured["overall"])
    parts = known, measured["trained"]["left_out"], measured["degraded"]
    return [words(part["auc"]) if part and part["auc"] else "-" for part in parts]


def speed_and_size(folder):
    """Prepared encoder -> (images a second, megabytes of its weights) as text.

    The speed is that of forward passes of extraction's size, without reading the files.
    """
    import statistics
    import timeit

    import numpy as np

    from detector.encoders.runtime import Encoder
    from detector.features.extraction import BATCH

    encoder = Encoder(folder)
    shape = BATCH[encoder.device], 3, encoder.resolution, encoder.resolution
    pixels = np.random.default_rng(0).random(shape, np.float32)
    seconds = timeit.repeat(lambda: encoder.encode(pixels), number=1, repeat=1 + PASSES)[1:]
    weights = "vision.safetensors" if encoder.device == "cuda" else "encoder.bin"
    size = (folder / weights).stat().st_size
    return f"{len(pixels) / statistics.median(seconds):.1f}", f"{size / 1e6:.1f}"


def words_on_images(args, columns, measured):
    """What the table of encoders was measured on -> sentences. `measured`: metrics.json of each."""
    first, sources = measured[0], len(set(columns["sources"]) - {""})
    trained = first["training_data"]["real"] + first["training_data"]["fake"]
    copies = f"{args.views} degraded {'copy' if args.views == 1 else 'copies'}"
    sentences = [
        f"{len(columns['paths'])} images of {sources} named sources in {args.data_dir}, and"
        f" {copies} of each.",
        f"{trained} images trained the same kind of classifier ({first['classifier']}) on each"
        f" encoder's features, and {first['overall']['n']} tested it.",
        "Known sources: the test images of sources that trained it.",
        "Sources left out: the training images, each judged by a classifier without its source.",
        "Degraded copies: those of all test images.",
        "Each AUC has its 95% interval over groups. A source left out is a group.",
        "images/s: forward passes, without reading files. MB: the encoder's weights.",
        "Seconds to start: from the start of classify.py to its first verdict, with warm caches.",
    ]
    if len({(m["data"]["overall"], m["training_data"]["sha256"]) for m in measured}) > 1:
        sentences.append(
            "WARNING: the images differ between encoders, because images that fine-tuned an encoder"
            " are left out."
        )
    return sentences


def study(steps, folders):
    """Run every command on the folder.

    -> the audit, rows of `compare_levers`, the table of `compare_encoders`
    """
    args, out = steps.args, steps.out
    clip_model, folder = next(iter(folders.items()))
    features = folder.name  # so that the encoders may come in another order later
    audit = json.loads(steps.run("audit.py", "--data_dir", args.data_dir, "--json"))
    seconds = steps.extract(features, "--clip_model", clip_model)
    columns = without_views(out / f"{features}.npz", out / "untouched.npz")
    steps.train("untouched", "without")
    steps.train(features, "model", "--classifier", "all")
    steps.train(features, "with")
    for name in ("without", "with"):  # the same classifier, on the same images and their copies
        steps.evaluate(features, name, name)
    images = ("--data_dir", args.data_dir, "--robustness_images", args.robustness_images)
    steps.evaluate(features, "model", "evaluation", *images)
    encoders = compare_encoders(steps, folders, columns)
    return audit, compare_levers(steps, seconds) if args.levers else [], encoders


def aligned(rows):
    """Rows of text -> lines with columns of even width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def write_page(steps, measured, audit, compared, encoders):
    from detector.evaluation import report

    training, evaluation = steps.metrics_of("model_report"), steps.out / "evaluation"
    page = {
        **measured,
        "folder": audit,
        "levers": compared,
        "encoders": {"headings": HEADINGS, **encoders},
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
    audit, compared, encoders = study(steps, steps.prepare())
    measured = steps.metrics_of("evaluation")
    write_page(steps, measured, audit, compared, encoders)
    for line in (*aligned([HEADINGS, *encoders["rows"]]), *encoders["words"]):
        print(printable(line))
    balanced, auc = (words(measured["overall"][name]) for name in ("balanced_accuracy", "auc"))
    print(
        f"{steps.out / 'index.html'}: {measured['overall']['n']} images not trained on, "
        f"{measured['classifier']} on '{measured['encoder']}', "
        f"balanced accuracy {balanced}, AUC {auc}"
    )


if __name__ == "__main__":
    run(main)
