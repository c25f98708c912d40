"""The card of the shipped encoder and model: models/README.md, and the rows that README.md shows.

    python models/make_card.py       # part of `make ship`, after evaluate.py has written models/evaluation/
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402
import encoders  # noqa: E402
from report import elsewhere, words  # noqa: E402

TIERS = ("768 px q60", "512 px q40")
PARTS = {"known": "images not trained on, of {} known sources", "unseen": "images of {} sources never seen"}

CARD = """# `tiny` and the baseline model: a demonstration

**On sources never seen**: {elsewhere}.

**Not a detector to rely on.** It is shipped so that every command of this project works at once, offline. CLIP's features
were not measured on these images. Do not decide anything about anybody's picture with it.

| images | AUC | balanced accuracy | {tiers} |
|---|---|---|---|---|
{rows}

The last columns are balanced accuracy on what a site hands out; few of these pictures are larger than 512 pixels, so it is
mostly the JPEG that they show. The threshold is {threshold:.2f} throughout, the intervals are 95%, over sources.

- **What it is**: fixed statistics of a picture's colours and residuals, {dim} of them ([textures.py](../textures.py)), run by OpenVINO
  in float32; nothing in it is learnt. The baseline is `train_model.py`'s RBF SVM on them. How it was chosen, and what else was tried:
  [benchmarks/DETECTION.md](../benchmarks/DETECTION.md).
- **How it was made**: `make tiny` and `make ship IMAGES=DIR`, the encoder at commit `{commit}`; beside each training image a degraded copy (`--views 1`).
- **Data**: photographs and generated images from public repositories, all shrunk to a short side of 320 pixels at most
  and saved as JPEG 90 in the same way. Most of these repositories state no licence for pictures, and some show people;
  none of the pictures is part of this project. A few percent of the labels may be wrong.
- **Splits**: `train` and `extra` train the SVM ({train} images); `test` holds other images of the same sources, `external` other
  sources.
- **What it leans on**: aspect ratio and size betray the labels of these sets; the centre crop hides the shape from the
  encoder, not every habit that goes with it. {leak} On the images of known sources alone, {known_leak} The row of
  sources never seen is the one to go by.
- **Where it fails**: besides the sources above, under {moved} (share of verdicts that flip). All rows, every distortion and what the
  files betray: [evaluation/MODEL_CARD.md](evaluation/MODEL_CARD.md).
"""


def main():
    from audit import leak_sentence
    found = json.loads((HERE / "evaluation" / "metrics.json").read_text())
    trained = json.loads((HERE / "baseline_report" / "metrics.json").read_text())
    manifest, rows, shown = encoders.read_manifest(encoders.SHIPPED), [], []
    resaved = [next(r for r in found["robustness"] if r["level"] == tier) for tier in TIERS]
    for part, text in PARTS.items():
        m, known = found[part], part == "known"
        text = f"{m['n']} {text.format(sum(r['known'] == known for r in found['by_source']))}"
        rows.append(f"| {text} | {words(m['auc'])} | {words(m['balanced_accuracy'])} | " + " | ".join(words(r[part]) for r in resaved) + " |")
        shown.append(f"| `tiny` + SVM, shipped here: a demonstration | AUC {words(m['auc'])}, balanced accuracy "
                     f"{words(m['balanced_accuracy'])} | {text} |")
    moved = sorted(found["robustness"][1:], key=lambda r: -r["flipped"]["value"])[:4]
    (HERE / "README.md").write_text(CARD.format(
        elsewhere=elsewhere(found), tiers=" | ".join(TIERS), rows="\n".join(rows), threshold=found["threshold"], dim=manifest["dim"],
        commit=manifest["commit"][:12], leak="As a whole, " + leak_sentence(found["leak"]), known_leak=leak_sentence(trained["leak"]),
        moved=", ".join(f"{r['panel']}, {r['level']} ({r['flipped']['value']:.0%})" for r in moved),
        train=sum(found["training_data"][name] for name in common.CLASSES)))
    (HERE / "evaluation" / "summary.txt").write_text("\n".join(shown) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    common.run(main)
