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
from detector.evaluation.metrics import METRICS, words
from detector.model.score import decision, probability

# Keys that only a training or only an evaluation has. Templates get None for a missing key.
OPTIONAL = (
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


def table(measured):
    """The metrics of `measure` as text, one a line: value, interval, n."""
    lines = [f"{'':18}{'value':>7}  {'95% interval':14}  n"]
    for name in ("accuracy", *NAMES, "precision_real", "precision_fake"):
        m = measured[name]
        value = "    n/a" if m["value"] is None else f"{m['value']:z7.3f}"
        interval = "{:z.3f} .. {:z.3f}".format(*m["interval"]) if m["interval"] else "none"
        title = NAMES.get(name, name.replace("_", " "))
        lines.append(f"{title:18}{value}  {interval:14}  {m['n']}")
    return "\n".join(lines)


def comparison(rows):
    """Rows of `compare` as text: out-of-fold AUC (it chooses the classifier) and test metrics."""
    lines = [f"{'classifier':12}{'out-of-fold AUC':20}{'test AUC':20}balanced accuracy"]
    for row in rows:
        name, *shown = row["classifier"], words(row["out_of_fold"]), words(row["auc"])
        cells = "".join(f"{cell:20}" for cell in shown)
        lines.append(f"{name:12}{cells}{words(row['balanced_accuracy'])}")
    return "\n".join(lines)


def held_out(rows):
    """Leave-one-source-out rows as text, worst first."""
    lines = [f"{'source held out':44}{'label':7}{'n':>5}  share right"]
    for row in rows:
        lines.append(f"{row['source'][:43]:44}{row['label']:7}{row['n']:5}  {words(row)}")
    return "\n".join(lines)


def elsewhere(report):
    """The first sentence of a card: accuracy on unseen sources, and the worst of them.

    '' where no unseen source has a name. Sources below LEAST_IMAGES are not listed.
    """
    if report["unseen"]:
        # A source with both classes has its balanced accuracy as 'own'.
        unseen = [row for row in report["by_source"] if not row["known"]]
        rows = [{**row, "value": row["own"]["value"]} for row in unseen]
        head = (
            f"AUC {words(report['unseen']['auc'])}, balanced accuracy"
            f" {words(report['unseen']['balanced_accuracy'])} on {report['unseen']['n']} images of"
            f" {len(rows)} sources"
        )
    elif rows := report.get("leave_one_source_out"):
        share = sum(r["value"] for r in rows) / len(rows)
        number = len({r["source"] for r in rows})
        head = (
            f"with each of {number} sources left out of the training in turn, on average"
            f" {share:.0%} of its images of a class get the right verdict"
        )
    else:
        return ""
    worst = sorted((r for r in rows if r["n"] >= LEAST_IMAGES), key=lambda r: r["value"])[:4]
    named = ", ".join(
        f"{r['source']} ({r['label']}, {r['n']} images: {r['value']:.0%} right)" for r in worst
    )
    return head + (f"; worst on {named}" if named else "")


def training(report):
    """The report of a training as train_model.py prints it."""
    from detector.evaluation.audit import leak_sentence

    report = all_printable(report)
    lines = [
        f"{report['classifier']}, {point(report)}, on '{report['encoder']}'; threshold"
        f" {report['threshold']:.3f} ({report['threshold_rule']['words']})",
        *(f"WARNING  {line}" for line in report["warnings"]),
    ]
    if len(report["classifiers"]) > 1:
        lines += [comparison(report["classifiers"]), "the best out of fold was chosen:"]
    lines.append(table(report["overall"]))
    if degraded := report["degraded"]:
        lines += [f"on {degraded['n']} degraded copies of the test images:", table(degraded)]
    for name, images in (
        ("untouched", "real training images"),
        ("degraded", "degraded copies of them"),
    ):
        if alarm := report["false_alarms"].get(name):
            lines.append(f"called fake, out of fold: {words(alarm, 3)} of {alarm['n']} {images}")
    if calibration := report["calibration"]:
        lines.append(
            f"calibration slope {words(calibration['slope'])} (calibrated: 1); error"
            f" {calibration['error']:z.3f}, a perfect model's stays below"
            f" {calibration['expected_95']:.3f} in 95 of 100 draws"
        )
    if report["leak"]:
        lines.append(leak_sentence(report["leak"]))
    if report["leave_one_source_out"]:
        lines.append(held_out(report["leave_one_source_out"]))
    return "\n".join(lines)


def evaluation(report):
    """The report of an evaluation as evaluate.py prints it."""
    from detector.evaluation.audit import leak_sentence, sentences

    report = all_printable(report)
    lines = [
        f"{report['classifier']} {report['model_version']} on '{report['encoder']}', threshold"
        f" {report['threshold']:.3f} ({report['threshold_rule']['words']})",
        *(f"WARNING  {line}" for line in report["warnings"]),
    ]
    apart = report["known"] or report["unseen"]
    for part, title in (
        ("overall", "all"),
        ("known", "known sources"),
        ("unseen", "sources never seen"),
        ("degraded", "degraded copies"),
    ):
        if report[part] and not (part == "overall" and apart):
            lines += [f"{report[part]['n']} images, {title}:", table(report[part])]
    lines += [f"LEAK  {line}" for line in sentences(report["audit"])[0]]
    if report["leak"]:
        lines.append(leak_sentence(report["leak"]))
    for key in ("robustness", "arms"):
        if report.get(key):
            lines += robustness_table(report[key])
    if report.get("not_measured"):
        skipped = "; ".join(report["not_measured"])
        lines.append(f"not measured without pictures (use --data_dir): {skipped}")
    return "\n".join(lines)


def robustness_table(rows):
    """Rows of `pictures.condition` as lines of text."""
    images = f"{rows[0]['n']} images"
    lines = [
        f"{'':49}balanced accuracy",
        f"{images:49}{'known sources':20}{'never seen':20}verdicts flipped",
    ]
    for row in rows:
        shares = "".join(f"{words(row[part]):20}" for part in ("known", "unseen"))
        lines.append(f"{row['panel']:17}{row['level']:32}{shares}{words(row['flipped'])}")
    return lines


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

    return atomic_folder(
        folder, [*(f"{plot}.png" for plot in PLOTS), "robustness.csv", "arms.csv", "hardest.png"]
    )


def fill(folder, report):
    """Write metrics.json, and from it the CSV tables, the plots, report.html and MODEL_CARD.md.

    report.html holds its plots.
    """
    folder, report = Path(folder), all_printable(report)
    pictures = draw(report)
    for name, data in pictures.items():
        with atomic_write(folder / f"{name}.png") as file:
            file.write(data)
    if (folder / "hardest.png").is_file() and report.get("hardest"):
        pictures["hardest"] = (folder / "hardest.png").read_bytes()
    texts = {
        "report.html": render("report.html", report, pictures),
        "MODEL_CARD.md": render("model_card.md", report),
        "metrics.json": json.dumps(report, indent=1),
    }
    for name, (header, rows) in tables(report).items():
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


def render(template, report, pictures=()):
    """Fill a template from a report; `pictures` {name: PNG bytes} go into the page itself."""
    import jinja2

    from detector.evaluation.audit import leak_sentence, sentences
    from detector.evaluation.rules import TELLING_AUC

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
        "elsewhere": elsewhere,
    }
    environment.filters["cell"] = lambda text: " ".join(
        str(text).replace("|", "\\|").replace("<", "&lt;").split()
    )
    embedded = {name: base64.b64encode(data).decode() for name, data in dict(pictures).items()}
    return environment.get_template(template).render(
        r=dict.fromkeys(OPTIONAL) | report, pictures=embedded
    )
