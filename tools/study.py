"""Everything on your own labelled folder, in one page: audit, extraction, training without and with views, evaluation.

    python -m tools.study --data_dir data                      # 400 images, about 20 minutes on two cores with ViT-L/14
    python -m tools.study --data_dir data --limit 4000 --views 3 --robustness_images 200
    python -m tools.study --data_dir data --levers --checkpoints finetuned.pt     # other layers, crops, an encoder of your own beside it

`make study DATA=data` sets up the environment first. The page is study/index.html; runs that were interrupted go on.
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

CROPS = 4  # squares in full resolution that --levers tries


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument(
        "--data_dir", required=True, metavar="DIR", help="folder of labelled images"
    )
    parser.add_argument(
        "--output_dir",
        default="study",
        metavar="DIR",
        help="folder for the page and everything behind it",
    )
    parser.add_argument(
        "--limit", type=int, default=400, metavar="N", help="a seeded draw of N images"
    )
    parser.add_argument(
        "--views", type=int, default=1, metavar="N", help="degraded copies of each image"
    )
    parser.add_argument(
        "--robustness_images",
        type=int,
        default=40,
        metavar="N",
        help="images that go through the distortions",
    )
    parser.add_argument(
        "--levers",
        action="store_true",
        help=f"compare with other layers and with {CROPS} crops: seven extractions' time",
    )
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        default=[],
        metavar="FILE",
        help="and with these encoders, as of finetune_clip.py",
    )
    parser.add_argument(
        "--max_fpr",
        type=float,
        metavar="X",
        help="threshold at which at most this share of real images is called fake",
    )
    args = parser.parse_args(argv)
    for name, most in (("limit", math.inf), ("views", MAX_VIEWS), ("robustness_images", math.inf)):
        if not 1 <= getattr(args, name) <= most:
            raise UsageError(
                f"--{name} {getattr(args, name)}: must be at least 1"
                + (f", at most {most}" if most < math.inf else "")
            )
    if args.max_fpr is not None and not 0 < args.max_fpr < 1:
        raise UsageError(f"--max_fpr {args.max_fpr:g}: must be between 0 and 1")
    need_folder(args.data_dir)
    return args


def step(times, *words):
    """One of the project's commands, shown as a user would type it; its progress goes on, its output is kept. -> stdout"""
    words = [str(word) for word in words]
    say("$ python " + " ".join(words))
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, str(HERE / words[0]), *words[1:]], stdout=subprocess.PIPE, text=True
    )
    if result.returncode == 2:
        raise UsageError(f"{words[0]} failed (see the line above)")
    if (
        result.returncode not in ((0, 1) if words[0] in ("audit.py", "evaluate.py") else (0,))
        or not result.stdout
    ):
        raise SystemExit(result.returncode or 1)  # it has told why
    times.append(
        {"command": "python " + " ".join(words), "seconds": round(time.perf_counter() - start)}
    )
    return result.stdout


def without_views(source, target):
    """Features file -> the same without the degraded copies."""
    import numpy as np

    with np.load(source) as file:
        columns = dict(file)
    whole = columns["view"] == 0
    with atomic_write(target) as file:
        np.savez_compressed(
            file,
            **{
                name: values if name == "meta" else values[whole]
                for name, values in columns.items()
            },
        )


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def levers(args):
    """What is compared with the encoder's embedding -> (words, flags for extraction, flags for training)."""
    if args.levers:
        yield "layer before the projection", ["--layers", "penultimate"], []
        yield "middle blocks and embedding", ["--layers", "multi"], []
        yield f"embedding, and of {CROPS} crops", ["--crops", CROPS], ["--crops", CROPS]
    for checkpoint in args.checkpoints:
        yield checkpoint, ["--clip_model", checkpoint], []


def compare_levers(args, times, out, rate):
    """-> rows {words, seconds of extraction, evaluation, left_out}, the embedding first, each trained and judged with the copies."""
    rows = [
        (
            "embedding",
            sum(t["seconds"] for t in times if "extract_features.py" in t["command"]),
            "with",
        )
    ]
    for number, (words, extraction, training) in enumerate(levers(args), 1):
        name = f"lever{number}"
        features, model = out / f"{name}.npz", out / f"{name}.joblib"
        step(
            times,
            "extract_features.py",
            "--data_dir",
            args.data_dir,
            "--output_file",
            features,
            "--limit",
            args.limit,
            "--views",
            args.views,
            *extraction,
        )
        seconds = times[-1]["seconds"]
        step(
            times,
            "train_model.py",
            "--features_file",
            features,
            "--model_output_path",
            model,
            *training,
            *rate,
        )
        step(
            times,
            "evaluate.py",
            "--model_path",
            model,
            "--features_file",
            features,
            "--report_dir",
            out / name,
        )
        rows.append((words, seconds, name))
    found = []
    for words, seconds, name in rows:
        left_out = [
            row["value"] for row in metrics_of(out / f"{name}_report")["leave_one_source_out"]
        ]
        found.append(
            {
                "words": words,
                "seconds": seconds,
                **metrics_of(out / name),
                "left_out": sum(left_out) / len(left_out) if left_out else None,
            }
        )
    return found


def main(argv=None):
    args = parse_args(argv)
    from detector.evaluation import metrics, report
    from detector.images.folders import list_images

    list_images(args.data_dir)  # told before anything is started
    out, times = Path(args.output_dir), []
    rate = [] if args.max_fpr is None else ["--max_fpr", args.max_fpr]
    check_folder(out, f"--output_dir {out}")
    audit = json.loads(step(times, "audit.py", "--data_dir", args.data_dir, "--json"))
    step(
        times,
        "extract_features.py",
        "--data_dir",
        args.data_dir,
        "--output_file",
        out / "features.npz",
        "--limit",
        args.limit,
        "--views",
        args.views,
    )
    without_views(out / "features.npz", out / "untouched.npz")
    step(
        times,
        "train_model.py",
        "--features_file",
        out / "untouched.npz",
        "--model_output_path",
        out / "without.joblib",
        *rate,
    )
    step(
        times,
        "train_model.py",
        "--features_file",
        out / "features.npz",
        "--model_output_path",
        out / "model.joblib",
        "--classifier",
        "all",
        *rate,
    )
    step(
        times,
        "train_model.py",
        "--features_file",
        out / "features.npz",
        "--model_output_path",
        out / "with.joblib",
        *rate,
    )
    for name in ("without", "with"):  # the same classifier, on the same images and their copies
        step(
            times,
            "evaluate.py",
            "--model_path",
            out / f"{name}.joblib",
            "--features_file",
            out / "features.npz",
            "--report_dir",
            out / name,
        )
    step(
        times,
        "evaluate.py",
        "--model_path",
        out / "model.joblib",
        "--features_file",
        out / "features.npz",
        "--data_dir",
        args.data_dir,
        "--report_dir",
        out / "evaluation",
        "--robustness_images",
        args.robustness_images,
    )
    compared = compare_levers(args, times, out, rate) if args.levers or args.checkpoints else []
    found = metrics_of(out / "evaluation")
    training = metrics_of(out / "model_report")
    page = {
        **found,
        "folder": audit,
        "levers": compared,
        "times": times,
        "arguments": vars(args),
        "classifiers": training["classifiers"],
        "leave_one_source_out": training["leave_one_source_out"],
        "false_alarms": training["false_alarms"],
        "models": {name: metrics_of(out / name) for name in ("without", "with")},
    }
    pictures = {path.stem: path.read_bytes() for path in (out / "evaluation").glob("*.png")}
    with atomic_write(out / "index.html", "w") as file:
        file.write(report.render("study.html", page, pictures))
    print(
        f"{out / 'index.html'}: {found['overall']['n']} images not trained on,"
        f" {found['classifier']} on '{found['encoder']}', balanced accuracy"
        f" {metrics.words(found['overall']['balanced_accuracy'])}, AUC"
        f" {metrics.words(found['overall']['auc'])}"
    )


if __name__ == "__main__":
    run(main)
