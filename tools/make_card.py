"""The shipped model's card, and the rows that README.md shows. Part of `make ship`.

python -m tools.make_card
"""

import json

from detector.base.console import run
from detector.base.constants import CLASSES
from detector.base.project import HERE
from detector.evaluation.metrics import words
from detector.evaluation.report import elsewhere
from detector.images.distort import RESAVED
from detector.model.file import load_model

MODELS = HERE / "models"

PARTS = {
    "unseen": "images of {} sources never seen",
    "known": "images not trained on, of {} known sources",
}

CARD = """# The baseline model: a demonstration

**On sources never seen**: {elsewhere}.

It is shipped so that every command of this project works at once. It was trained on {train}
pictures, many of which
state no licence. Do not decide anything about anybody's picture with it: train a model on your own
images.

| images | AUC | balanced accuracy | {tiers} |
|---|---|---|---|---|
{rows}

The last columns are balanced accuracy when every picture is re-saved at that share of its sides
and that JPEG quality.
The threshold is {threshold:.2f} throughout. The intervals are 95%, over sources.

- **What it is**: `train_model.py --classifier {classifier}` ({hyperparameters}) on {dim} features
  of the encoder
  `{encoder}`: the class token after block {layers} of OpenAI's ViT-B/16 with 8-bit weights
  ([docs/encoders.md](../docs/encoders.md)).
- **How it was chosen**: layer, kind and C on repositories held out of `train` and `extra`
  ([benchmarks/DETECTION.md](../benchmarks/DETECTION.md)). Before that, five choices of layer and
  kind had been measured
  on `external`: the embedding with an RBF SVM (AUC 0.89) and with a linear head (0.90), `multi`
  (0.91), the class token
  after block 11 with a linear head (0.92), and means of patch tokens (lower). This choice was
  measured there once.
- **How it was made**: `make ship IMAGES=DIR`.
- **Data**: photographs and generated images from public repositories. All were shrunk to a short
  side of 320 pixels at most
  and saved as JPEG 90 in the same way. Most of these repositories state no licence for pictures,
  and some show people.
  None of the pictures is part of this project. A few percent of the labels may be wrong.
- **Splits**: `train` and `extra` train the classifier. `test` holds other images of the same
  sources, `external` other sources.
- **What it leans on**: aspect ratio and size give the labels of these sets away. The centre crop
  hides the shape from the
  encoder, not every habit that goes with it. {audit} {leak} On the images of known sources alone,
  {known_leak} Judge the
  model by the row of sources never seen.
- **Where it fails**: besides the sources above, under {moved} (share of verdicts that flip, {n}
  images). All rows, every
  distortion and what the files give away: [evaluation/MODEL_CARD.md](evaluation/MODEL_CARD.md).
"""


def audit_words(leaks):
    """What the audit of the training finds, in one sentence; '' where it finds no leak."""
    if not leaks:
        return ""
    facts = " and ".join(line.split(" alone separates")[0] for line in leaks)
    return f"By the rule of `audit.py` the images of known sources are a LEAK ({facts})."


def main():
    from detector.evaluation.audit import leak_sentence, sentences

    found = json.loads((MODELS / "evaluation" / "metrics.json").read_text())
    resaved = json.loads((MODELS / "evaluation" / "resaved.json").read_text())[1:]
    trained = json.loads((MODELS / "baseline_report" / "metrics.json").read_text())
    encoder, rows, shown = load_model(MODELS / "baseline.joblib")["encoder"], [], []
    for part, text in PARTS.items():
        m, known = found[part], part == "known"
        text = f"{m['n']} {text.format(sum(r['known'] == known for r in found['by_source']))}"
        rows.append(
            f"| {text} | {words(m['auc'])} | {words(m['balanced_accuracy'])} | "
            + " | ".join(words(r[part]) for r in resaved)
            + " |"
        )
        shown.append(
            f"| this project's shipped model, CLIP `ViT-B/16` + {found['classifier']} "
            f"| AUC {words(m['auc'])}, balanced accuracy {words(m['balanced_accuracy'])} | {text} |"
        )
    moved = sorted(found["robustness"][1:], key=lambda r: -r["flipped"]["value"])[:4]
    (MODELS / "README.md").write_text(
        CARD.format(
            elsewhere=elsewhere(found),
            tiers=" | ".join(RESAVED),
            rows="\n".join(rows),
            threshold=found["threshold"],
            classifier=found["classifier"],
            hyperparameters=", ".join(f"{k} {v:g}" for k, v in found["hyperparameters"].items()),
            encoder=encoder["name"],
            layers=encoder["layers"],
            dim=encoder["dim"],
            audit=audit_words(sentences(trained["audit"])[0]),
            leak="As a whole, " + leak_sentence(found["leak"]),
            known_leak=leak_sentence(trained["leak"]),
            moved=", ".join(
                f"{r['panel']}, {r['level']} ({r['flipped']['value']:.0%})" for r in moved
            ),
            n=moved[0]["n"],
            train=sum(found["training_data"][name] for name in CLASSES),
        )
    )
    (MODELS / "evaluation" / "summary.txt").write_text("\n".join(shown) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    run(main)
