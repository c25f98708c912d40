"""What large towers of timm cost on this machine, from preparing to a verdict.

    python -m benchmarks.towers --data_dir data
    python -m benchmarks.towers --data_dir data --names vit_large_patch16_dinov3.lvd1689m

Speed and memory do not depend on the weights, so they are random. `--data_dir` needs a labelled
folder; a few of its images are encoded. Each command is a process of its own, run once. Prints
Markdown.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import heading, row, run
from detector.base.constants import CLASSES
from detector.encoders import runtime
from detector.images.folders import list_images

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    "vit_pe_core_large_patch14_336.fb",
    "vit_large_patch16_dinov3.lvd1689m",
    "vit_so400m_patch14_siglip_378.v2_webli",
)
IMAGES = 30  # of each class, encoded with each tower


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="labelled pictures")
    parser.add_argument("--names", nargs="+", default=NAMES, help="names of towers in timm")
    return parser.parse_args(argv)


def save_random(name, path):
    import timm
    from safetensors.torch import save_file

    state = timm.create_model(name).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return sum(value.numel() for value in state.values())


def command(script, **flags):
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return [sys.executable, ROOT / script, *words]


def copy_images(data_dir, folder):
    """Copy IMAGES of each class, without their splits -> path of the last copy."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        entries = [entry for entry in list_images(data_dir) if entry.label == label][:IMAGES]
        for number, entry in enumerate(entries):
            copy = folder / name / f"{number}{Path(entry.path).suffix}"
            shutil.copy(Path(data_dir, entry.path), copy)
    return copy


def measure(name, data_dir, place):
    """Print the row of a tower."""
    clip_model = f"timm:{name}@{place}/weights.safetensors"
    million = save_random(name, place / "weights.safetensors") / 1e6
    prepared = run(command("prepare_clip.py", clip_model=clip_model))
    image = copy_images(data_dir, place / "data")
    files = {"data_dir": place / "data", "output_file": place / "f.npz"}
    extracted = run(command("extract_features.py", clip_model=clip_model, **files))
    model = place / "m.joblib"
    run(command("train_model.py", features_file=place / "f.npz", model_output_path=model))
    verdict = command("classify.py", image_path=image, model_path=model)
    first, second = run(verdict), run(verdict)
    (folder,) = runtime.prepared()
    megabytes = (folder / "encoder.bin").stat().st_size / 1e6
    row(
        f"`{name}`",
        f"{million:.0f}",
        f"{megabytes:.0f}",
        f"{prepared[0]:.0f} s, {prepared[1]:.0f} MB",
        f"{2 * IMAGES / extracted[0]:.2f}",
        f"{extracted[1]:.0f}",
        f"{first[0]:.1f}, {second[0]:.1f}",
        f"{second[1]:.0f}",
    )


def main(argv=None):
    args = parse_args(argv)
    heading(
        "tower",
        "million weights",
        "MB on the disk",
        "preparing: seconds, peak MB",
        "extraction, images/s with start",
        "peak MB",
        "a verdict: first, second process, s",
        "peak MB",
    )
    for name in args.names:
        with tempfile.TemporaryDirectory() as place:
            os.environ["CLIP_CACHE"] = str(Path(place, "cache"))
            measure(name, args.data_dir, Path(place))


if __name__ == "__main__":
    main()
