"""The shipped model's card, and the rows that README.md shows. Part of `make ship`.

python -m tools.make_card
"""

import json

from detector.base.console import run
from detector.base.constants import CLASSES
from detector.base.project import HERE
from detector.evaluation.audit import is_leak, leak_sentence, lowest_end
from detector.evaluation.intervals import words
from detector.evaluation.report import elsewhere, training_words
from detector.images.distort import RESAVED
from detector.model.file import load_model

MODELS = HERE / "models"
PARTS = {
    "unseen": "images of {} sources never seen",
    "known": "images not trained on, of {} known sources",
}
CARD = """# The baseline model: a demonstration

**In training**: {trained}.

**On sources never seen**: {elsewhere}.

The model ships so that every command of this project works at once. It was trained on {train}
pictures and a degraded copy of each. Many of these pictures state no licence. Do not decide
anything about anybody's picture with it: train a model on your own images.

| images | AUC | balanced accuracy | {tiers} |
|---|---|---|---|---|
{rows}

The last columns are balanced accuracy after every picture is re-saved at that share of its sides
and that JPEG quality. The threshold is {threshold:.2f} throughout. The intervals are 95%, over
sources.

- **What it is**: `train_model.py --classifier {classifier}` ({hyperparameters}) on {dim} features
  of the encoder `{encoder}`: the class token after block {layers} of OpenAI's ViT-B/16 with 8-bit
  weights ([docs/encoders.md](../docs/encoders.md)).
- **How it was chosen**: layer, kind and C were chosen on repositories held out of `train` and
  `extra` ([benchmarks/DETECTION.md](../benchmarks/DETECTION.md)). Five earlier choices of layer
  and kind had been measured on `external`. The embedding with an RBF SVM reached AUC 0.89, and with
  a linear head 0.90. `multi` reached 0.91, and the class token after block 11 with a linear head
  0.92. Means of patch tokens were lower. Block 10 without degraded copies reached 0.905. The copies
  were chosen on held-out repositories, too, and this model was measured on `external` once.
- **How it was made**: `make ship IMAGES=DIR`.
- **Data**: photographs and generated images from public repositories. All were shrunk to a short
  side of 320 pixels at most and saved as JPEG 90 in the same way. Most of these repositories state
  no licence for pictures, and some show people. None of the pictures is part of this project. A
  few percent of the labels may be wrong.
- **Splits**: `train` and `extra` train the classifier. `test` holds other images of the same
  sources. `external` holds other sources.
- **What it leans on**: aspect ratio and size give the labels of these sets away. The centre crop
  hides the shape from the encoder, but not every habit that goes with the shape. {audit}
  {leak}
  On the images of known sources alone, {known_leak}
  Judge the model by the row of sources never seen.
- **Where it fails**: the sources above, and these distortions: {moved}. The percentages are the
  verdicts that flip, on {n} images. [evaluation/MODEL_CARD.md](evaluation/MODEL_CARD.md) has all
  rows, every distortion and the leaks of the files.
"""


def audit_words(audit):
    """The leaks that the audit of the training finds, in one sentence; '' where it finds none."""
    probes = sorted(audit["probes"], key=lowest_end, reverse=True)
    facts = [probe["what"] for probe in probes if is_leak(probe, audit.get("detector"))]
    if not facts:
        return ""
    names = " and ".join(facts)
    return f"By the rule of `audit.py` the images of known sources are a LEAK ({names})."


def rows_of(evaluation, resaved):
    """-> (rows of the card's table, rows of README.md)"""
    card, readme = [], []
    for part, text in PARTS.items():
        measured, known = evaluation[part], part == "known"
        sources = sum(row["known"] == known for row in evaluation["by_source"])
        text = f"{measured['n']} {text.format(sources)}"
        auc, balanced = words(measured["auc"]), words(measured["balanced_accuracy"])
        card.append(" | ".join([text, auc, balanced, *(words(row[part]) for row in resaved)]))
        readme.append(
            f"this project's shipped model, CLIP `ViT-B/16` + {evaluation['classifier']} "
            f"| AUC {auc}, balanced accuracy {balanced} | {text}"
        )
    return ["\n".join(f"| {row} |" for row in rows) for rows in (card, readme)]


def read(name):
    return json.loads((MODELS / name).read_text())


def main():
    evaluation, trained = read("evaluation/metrics.json"), read("baseline_report/metrics.json")
    rows, shown = rows_of(evaluation, read("evaluation/resaved.json")[1:])
    encoder = load_model(MODELS / "baseline.joblib")["encoder"]
    moved = sorted(evaluation["robustness"][1:], key=lambda row: -row["flipped"]["value"])[:4]
    card = CARD.format(
        trained=training_words(evaluation["trained"]),
        elsewhere=elsewhere(evaluation),
        tiers=" | ".join(RESAVED),
        rows=rows,
        threshold=evaluation["threshold"],
        classifier=evaluation["classifier"],
        hyperparameters=", ".join(f"{k} {v:g}" for k, v in evaluation["hyperparameters"].items()),
        encoder=encoder["name"],
        layers=encoder["layers"],
        dim=encoder["dim"],
        audit=audit_words(trained["audit"]),
        leak="As a whole, " + leak_sentence(evaluation["leak"]),
        known_leak=leak_sentence(trained["leak"]),
        moved="; ".join(f"{m['panel']}, {m['level']} ({m['flipped']['value']:.0%})" for m in moved),
        n=moved[0]["n"],
        train=sum(evaluation["training_data"][name] for name in CLASSES),
    )
    (MODELS / "README.md").write_text(card)
    (MODELS / "evaluation" / "summary.txt").write_text(shown + "\n")
    print(rows)


if __name__ == "__main__":
    run(main)
