"""The card of the shipped encoder and model, measured anew: models/README.md, and the rows that README.md shows.

    python models/make_card.py --data_dir IMAGES       # part of `make ship`
"""
import argparse
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402
import distort  # noqa: E402
from classify import Detector  # noqa: E402
from dataset import load_features  # noqa: E402
from report import measure  # noqa: E402

TIERS = {"768 px, JPEG 60": (768, 60), "512 px, JPEG 40": (512, 40)}
SPLITS = {"test": "images not trained on, of {} known sources", "external": "images of {} sources never seen"}

CARD = """# `tiny` and the baseline model: a demonstration

**Not a detector to rely on.** `tiny` is a small network trained from scratch on {seen} images, shipped so that every
command of this project works at once, offline. It is far below what CLIP's features give. Do not decide anything about
anybody's picture with it.

| images | as they are | {tiers} |
|---|---|---|---|
{rows}

The re-saved columns are what a site hands out; few of these pictures are larger than 512 pixels, so it is mostly the
JPEG that they show. Each cell: AUC, then balanced accuracy at the model's threshold of 0.5, with 95% intervals from a bootstrap over
sources (over images they are narrower: AUC {by_image}). Random weights and hand-made statistics reach an AUC of 0.60 to 0.64 on such images.

- **What it is**: a `ModifiedResNet` of CLIP's kind (layers 2-2-2-2, width 20, 10 heads, 160 px, {dim}-d, {parameters:.1f} million
  parameters), fp16, run by OpenVINO; the baseline is `train_model.py`'s RBF SVM on its features.
- **How it was made**: `make tiny IMAGES=DIR`: `finetune_clip.py` with {arguments}, at commit `{commit}`.
- **Data**: photographs and generated images from public repositories, all shrunk to a short side of 320 pixels at most
  and saved as JPEG 90 in the same way. Most of these repositories state no licence for pictures, and some show people;
  none of the pictures is part of this project. A few percent of the labels may be wrong.
- **Splits**: half of `train` was kept from the encoder and trains the SVM ({train} images); the encoder has seen the other
  half and `extra` (split `seen` in `features.npz`), which are good for nothing else. `test` holds other images of the
  same sources, `external` other sources.
- **What it leans on**: aspect ratio and size betray the labels of these sets (`audit.py --features_file
  models/features.npz`); the centre crop hides the shape from the encoder, not every habit that goes with it.
- **Where it fails**: of the sources never seen, worst are {worst}
  (share answered right). All rows of the known ones are in `baseline_report/metrics.json`.
"""


def measured(detector, columns, data_dir, split, tier, groups):
    """Metrics of one split, of the stored features or (tier: (side, quality)) of the re-saved pictures."""
    from model import decision, probability
    rows = np.flatnonzero(columns["splits"] == split)
    if tier is None:
        p_fake = probability(detector.model, decision(detector.model, columns["features"][rows]))
    else:
        images = (common.decode_image(Path(data_dir, path).read_bytes()) for path in columns["paths"][rows])
        p_fake = np.concatenate([detector.p_fake(detector.pixels(distort.jpeg(distort.fit(image, tier[0]), tier[1]))[None])
                                 for image in images])
    return measure(columns["labels"][rows].astype(int), p_fake, detector.model["threshold"], groups[rows])


def worst_external(detector, columns):
    """The four worst answered of the unseen sources with at least ten images, in words."""
    from model import decision, probability
    from report import by_source
    rows = np.flatnonzero(columns["splits"] == "external")
    p_fake = probability(detector.model, decision(detector.model, columns["features"][rows]))
    found = by_source(columns["labels"][rows].astype(int), p_fake, detector.model["threshold"], columns["sources"][rows])
    return ", ".join(f"`{r['source']}` ({r['label']} images, {r['value']:.0%} of {r['n']})"
                     for r in [r for r in found if r["n"] >= 10][:4])


def cell(metrics):
    words = [f"{m['value']:.2f} [{m['interval'][0]:.2f}, {m['interval'][1]:.2f}]" for m in (metrics["auc"], metrics["balanced_accuracy"])]
    return f"AUC {words[0]}, balanced accuracy {words[1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="the development images")
    args = parser.parse_args()
    detector, columns = Detector(HERE / "baseline.joblib"), load_features(HERE / "features.npz")
    manifest, rows, shown, over_images = detector.encoder.manifest, [], [], []
    for split, words in SPLITS.items():
        cells = [measured(detector, columns, args.data_dir, split, tier, columns["sources"]) for tier in (None, *TIERS.values())]
        n, sources = cells[0]["n"], len(np.unique(columns["sources"][columns["splits"] == split]))
        words = f"{n} {words.format(sources)}"
        rows.append(f"| {words} | " + " | ".join(map(cell, cells)) + " |")
        every = np.arange(len(columns["splits"]))
        over_images.append(measured(detector, columns, args.data_dir, split, None, every)["auc"]["interval"])
        shown.append(f"| `tiny` + SVM, shipped here: a demonstration | {cell(cells[0])} | {words} |")
    size = (HERE / "tiny" / "encoder.bin").stat().st_size / 2 / 1e6
    (HERE / "README.md").write_text(CARD.format(
        worst=worst_external(detector, columns), seen=len(manifest["seen"]), tiers=" | ".join(TIERS), rows="\n".join(rows),
        by_image=" and ".join(f"[{low:.2f}, {high:.2f}]" for low, high in over_images), dim=manifest["dim"], parameters=size,
        arguments=", ".join(f"{k} {v}" for k, v in manifest["arguments"].items()), commit=manifest["commit"][:12],
        train=sum(detector.model["training_data"][name] for name in common.CLASSES)))
    (HERE / "baseline_report" / "summary.txt").write_text("\n".join(shown) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    common.run(main)
