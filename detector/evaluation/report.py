"""Turn scores on labelled images into a report: metrics.json and everything made from it.

report = {**names, **assess(model, columns, rows, groups, twins)}
with staged("model_report") as place:
    fill(place, report)      # metrics.json, CSV tables, plots, report.html, MODEL_CARD.md
"""

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np

from detector.base.console import all_printable
from detector.base.files import atomic_folder, atomic_write
from detector.evaluation import metrics
from detector.evaluation.intervals import words
from detector.evaluation.metrics import METRICS
from detector.model.score import decision, probability

# Keys that only a training or only an evaluation has. Templates get None for a missing key.
OPTIONAL = (
    "whole_folder",
    "operating",
    "review",
    "uploads_per_day",
    "robustness",
    "arms",
    "not_measured",
    "hardest",
    "warnings",
    "leak",
    "leave_one_source_out",
    "classifiers",
    "split",
    "data",
)
# CSV tables that not every report has
PARTIAL = [
    f"{name}.csv"
    for name in ("robustness", "arms", "operating", "review", "left_out", "predictions")
]
SHOWN_IMAGES = 1000  # of predictions.csv in report.html: a page of more rows is slow
WORST = 10  # sources that are shown; the others are folded
LEAST_IMAGES = 10  # of a source that is listed among the worst
PARTS = ("overall", "known", "unseen", "degraded")
# The metrics of a row of `pictures.condition` in the CSV tables.
CONDITION = (
    "accuracy_real",
    "accuracy_fake",
    "balanced_accuracy",
    "auc",
    "known",
    "unseen",
    "flipped",
)
# The plain columns and the metrics of the tables of `operating`.
OPERATING = (
    ("images", "rule", "threshold", "prevalence"),
    ("false_positives", "caught", "precision", "alarms", "false_alarms"),
)
REVIEW = (
    ("images", "prevalence"),
    ("queue", "passed_fakes", "rejected_reals", "fakes_in_pass", "reals_in_reject"),
)
NAMES = {name: text for name, (text, _) in METRICS.items()}


# ---- from scores to numbers ----


def about(model):
    """What every report states about the model."""
    return {
        "encoder": model["encoder"]["name"],
        "notice": model.get("notice"),
        "model_version": model["versions"]["model"],
        "code": model["versions"]["code"],
        "classifier": model["classifier"],
        "hyperparameters": model["hyperparameters"],
        "crops": model.get("crops", 0),
        "training_data": {k: v for k, v in model["training_data"].items() if k != "images"},
        "threshold": model["threshold"],
        "threshold_rule": model["threshold_rule"],
        "band": model["band"].tolist(),
        "trained": {name: model["metrics"].get(name) for name in ("out_of_fold", "left_out")},
    }


def parts_of(model, columns):
    """Columns -> {part: boolean [n]}: the parts of a report.

    Overall, known and unseen are untouched images. Degraded are their degraded copies.
    """
    whole, known = columns["view"] == 0, known_rows(model, columns["sources"])
    named = columns["sources"] != ""  # an image without a source is neither known nor unseen
    return {
        "overall": whole,
        "known": whole & known & named,
        "unseen": whole & ~known & named,
        "degraded": ~whole,
    }


def assess(model, columns, rows, groups, twins):
    """Row numbers of labelled images and their degraded copies -> the metrics of a report.

    `groups` [all rows]: groups for intervals over several sources. `twins` [all rows]: copies of
    one picture share a number.
    """
    scores = decision(model, columns["features"][rows])
    p_fake, labels = probability(model, scores), columns["labels"][rows].astype(int)
    parts = parts_of(model, {name: columns[name][rows] for name in ("view", "sources")})
    groups, whole, threshold = groups[rows], parts["overall"], model["threshold"]

    def measured(part):
        mask = parts[part]
        if not mask.any():
            return None
        return metrics.measure(labels[mask], p_fake[mask], threshold, groups[mask])

    def banded(part):
        mask, band = parts[part], model["band"].tolist()
        if not mask.any():
            return None
        return metrics.abstention(labels[mask], p_fake[mask], threshold, band, groups[mask])

    measures = {part: measured(part) for part in parts}
    raw = 0.5 * (1 + np.tanh(0.5 * scores[whole]))  # as if the decision value were a logit
    return {
        **measures,
        "base_rates": metrics.base_rates(measures["overall"]),
        "calibration": metrics.calibration(labels[whole], p_fake[whole], groups[whole]),
        "uncalibrated": metrics.calibration(labels[whole], raw, groups[whole]),
        **assess_sources(
            model, labels[whole], p_fake[whole], columns["sources"][rows][whole], twins[rows][whole]
        ),
        "band_error": model["threshold_rule"]["band_error"],
        "abstention": {part: banded(part) for part in ("overall", "known", "unseen")},
        "risk_coverage": metrics.risk_coverage(labels[whole], p_fake[whole], threshold),
        "scores": {"labels": labels[whole].tolist(), "p_fake": p_fake[whole].round(6).tolist()},
    }


def assess_sources(model, labels, p_fake, sources, twins):
    """-> {by_source: a row for each source, over_sources: summaries of known and unseen}."""
    known = model["training_data"]["sources"]
    rows = metrics.by_source(labels, p_fake, model["threshold"], sources, twins, known)
    return {
        "by_source": rows,
        "over_sources": {
            name: metrics.over_sources([r for r in rows if r["known"] == (name == "known")])
            for name in ("known", "unseen")
        },
    }


def known_rows(model, sources):
    """Boolean [n]: images of sources that the model was trained on."""
    return np.isin(sources, model["training_data"]["sources"])


# ---- in words ----


def point(report):
    """The hyperparameters as text, such as 'C 10, gamma 0.3'."""
    return ", ".join(f"{name} {value:g}" for name, value in report["hyperparameters"].items())


def named_sources(rows):
    """Rows {source, label, n, value} -> 'camera (real, 12 images: 75% right), ...'"""
    return ", ".join(
        f"{row['source']} ({row['label']}, {row['n']} images: {row['value']:.0%} right)"
        for row in rows
    )


def training_words(trained):
    """A sentence on the training alone: AUC out of fold, and the worst sources left out of it.

    `trained`: of `about`. '' for a model of an earlier version.
    """
    lines = []
    if auc := trained["out_of_fold"]:
        lines.append(f"AUC {words(auc)} on the training images, out of fold")
    if left := trained["left_out"]:
        lines.append(
            f"with each of {left['sources']} sources left out of the training in turn, on average"
            f" {left['mean']:.0%} of its images of a class get the right verdict; worst on"
            f" {named_sources(left['worst'])}"
        )
    return "; ".join(lines)


def elsewhere(report):
    """A sentence on sources never seen: accuracy, and the worst of them. '' without such images.

    Sources below LEAST_IMAGES are not listed.
    """
    if not report["unseen"]:
        return ""
    # A source with both classes has its balanced accuracy as 'own'.
    rows = [
        {**row, "value": row["own"]["value"]} for row in report["by_source"] if not row["known"]
    ]
    worst = sorted((r for r in rows if r["n"] >= LEAST_IMAGES), key=lambda r: r["value"])[:4]
    return (
        f"AUC {words(report['unseen']['auc'])}, balanced accuracy"
        f" {words(report['unseen']['balanced_accuracy'])} on {report['unseen']['n']} images of"
        f" {len(rows)} sources" + (f"; worst on {named_sources(worst)}" if worst else "")
    )


def headline(report):
    """The first sentences of a report, as pairs (on what, what), the least flattering first."""
    part = report["overall"]
    overall = (
        f"AUC {words(part['auc'])}, balanced accuracy {words(part['balanced_accuracy'])} on"
        f" {part['n']} images that did not train it"
    )
    pairs = [
        ("In training", training_words(report["trained"])),
        ("On sources never seen", elsewhere(report)),
        ("Overall", overall),
    ]
    return [pair for pair in pairs if pair[1]]


def calibration_warning(calibration):
    """A sentence where the slope's interval lies wholly outside 0.8 to 1.25, else None."""
    slope = calibration and calibration["slope"]
    if not slope or not slope["interval"]:
        return None
    low, high = slope["interval"]
    if high >= 0.8 and low <= 1.25:
        return None
    fault = "overconfident" if slope["value"] < 1 else "underconfident"
    return (
        f"calibration slope {words(slope)}: the probabilities are {fault} on these images;"
        " train again on images like these"
    )


# ---- files ----


def tables(report):
    """Report -> {file name: (header, rows)} of its CSV tables."""
    parts = [{"images": part, **report[part]} for part in PARTS if report.get(part)]
    names = ("source", "label", "known", "paired", "n")
    written = {
        "overall.csv": csv_table(parts, ("images", "n"), METRICS),
        "sources.csv": csv_table(report["by_source"], names, METRICS),
    }
    for key in ("robustness", "arms"):
        if report.get(key):
            written[f"{key}.csv"] = csv_table(report[key], ("panel", "level", "n"), CONDITION)
    if report.get("operating"):
        written["operating.csv"] = csv_table(report["operating"], *OPERATING)
    if review := report.get("review"):
        written["review.csv"] = csv_table(review["rows"], *REVIEW)
    if rows := report.get("leave_one_source_out"):
        rows = [{**row, "share_right": row} for row in rows]
        written["left_out.csv"] = csv_table(rows, ("source", "label", "n"), ("share_right",))
    return written


def csv_table(rows, names, metric_names):
    """Rows -> (header, rows) with plain columns, then value, low and high of each metric."""

    def cells(metric):
        ends = (metric or {}).get("interval") or (None, None)
        return [None if metric is None else metric["value"], *ends]

    return (
        [*names, *(f"{name}{end}" for name in metric_names for end in ("", "_low", "_high"))],
        [
            [*(row[name] for name in names), *(c for m in metric_names for c in cells(row[m]))]
            for row in rows
        ],
    )


def staged(folder):
    """Context of a place to `fill`, which becomes the report in `folder`, whole or not at all."""
    from detector.evaluation.plots import PLOTS

    return atomic_folder(folder, [*(f"{plot}.png" for plot in PLOTS), *PARTIAL, "hardest.png"])


def fill(folder, report, predictions=()):
    """Write metrics.json, and from it the CSV tables, the plots, report.html and MODEL_CARD.md.

    report.html holds its plots. `predictions`: rows of predictions.csv, of which report.html shows
    the first SHOWN_IMAGES.
    """
    folder, report, predictions = Path(folder), all_printable(report), all_printable(predictions)
    pictures = draw(report)
    for name, data in pictures.items():
        with atomic_write(folder / f"{name}.png") as file:
            file.write(data)
    if (folder / "hardest.png").is_file() and report.get("hardest"):
        pictures["hardest"] = (folder / "hardest.png").read_bytes()
    texts = {
        "report.html": render("report.html", report, pictures, predictions),
        "MODEL_CARD.md": render("model_card.md", report),
        "metrics.json": json.dumps(report, indent=1),
    }
    written = tables(report)
    if predictions:
        header = list(predictions[0])
        written["predictions.csv"] = header, [[row[name] for name in header] for row in predictions]
    write(folder, written, texts)


def write(folder, tables, texts):
    """Write CSV tables {file name: (header, rows)} and texts {file name: text} into a folder."""
    for name, (header, rows) in tables.items():
        with atomic_write(folder / name, "w") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    for name, text in texts.items():
        with atomic_write(folder / name, "w") as file:
            file.write(text)


def draw(report):
    """Report -> {name: PNG bytes} of its plots."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a source may be called c$x$
    from matplotlib import pyplot

    from detector.evaluation.plots import PLOTS

    pictures = {}
    for name, plot in PLOTS.items():
        if figure := plot(report):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
            pyplot.close(figure)
            pictures[name] = buffer.getvalue()
    return pictures


def render(template, report, pictures=(), predictions=()):
    """Fill a template from a report; `pictures` {name: PNG bytes} go into the page itself."""
    import jinja2

    from detector.evaluation.audit import leak_sentence, sentences
    from detector.evaluation.rules import TELLING_AUC
    from detector.evaluation.sampling import QUESTIONS

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {
        "words": words,
        "point": point,
        "METRICS": NAMES,
        "sentences": sentences,
        "leak_sentence": leak_sentence,
        "TELLING_AUC": TELLING_AUC,
        "headline": headline,
        "WORST": WORST,
        "QUESTIONS": QUESTIONS,
    }
    environment.filters["cell"] = lambda text: " ".join(
        str(text).replace("|", "\\|").replace("<", "&lt;").split()
    )
    embedded = {name: base64.b64encode(data).decode() for name, data in dict(pictures).items()}
    return environment.get_template(template).render(
        r=dict.fromkeys(OPTIONAL) | report,
        pictures=embedded,
        predictions=predictions[:SHOWN_IMAGES],
        images=len(predictions),
    )
