"""From scores to a report: what a model does on labelled images, as one metrics.json, and everything that is made from it.

report = {**names, **assess(model, columns, rows, groups, twins)}
write_report("model_report", report)      # metrics.json, CSV tables, plots, report.html, MODEL_CARD.md
"""

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np

from detector.base.console import all_printable
from detector.base.constants import CLASSES
from detector.base.files import atomic_folder, atomic_write
from detector.evaluation import metrics
from detector.evaluation.metrics import METRICS, words
from detector.model.score import decision, probability

# What a training alone or an evaluation alone has; a template finds None for the others.
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
LEAST_IMAGES = 10  # of a source whose share is worth telling
NAMES = {name: text for name, (text, _) in METRICS.items()}


# ---- from scores to numbers ----


def about(model):
    """What every report says of the model first."""
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
    """Columns -> {part: boolean [n]} of a report: overall, known and unseen are images as they are, degraded are copies."""
    whole, known = columns["view"] == 0, known_rows(model, columns["sources"])
    named = columns["sources"] != ""  # of images without a source nobody knows whether it was seen
    return {
        "overall": whole,
        "known": whole & known & named,
        "unseen": whole & ~known & named,
        "degraded": ~whole,
    }


def assess(model, columns, rows, groups, twins):
    """Row numbers of labelled images (and their degraded copies) -> the part of a report that scores alone give.

    `groups`: what intervals over several sources rest on; `twins`: copies of one picture.
    """
    scores = decision(model, columns["features"][rows])
    p_fake, labels = probability(model, scores), columns["labels"][rows].astype(int)
    parts = parts_of(model, {name: columns[name][rows] for name in ("view", "sources")})
    whole = parts["overall"]

    def measured(mask):
        return (
            metrics.measure(labels[mask], p_fake[mask], model["threshold"], groups[rows][mask])
            if mask.any()
            else None
        )

    def banded(mask):
        return (
            metrics.abstention(
                labels[mask],
                p_fake[mask],
                model["threshold"],
                model["band"].tolist(),
                groups[rows][mask],
            )
            if mask.any()
            else None
        )

    found = {name: measured(mask) for name, mask in parts.items()}
    sources = metrics.by_source(
        labels[whole],
        p_fake[whole],
        model["threshold"],
        columns["sources"][rows][whole],
        twins[rows][whole],
        model["training_data"]["sources"],
    )
    raw = 0.5 * (1 + np.tanh(0.5 * scores[whole]))  # the decision value taken for a logit
    return {
        **found,
        "base_rates": metrics.base_rates(found["overall"]),
        "calibration": metrics.calibration(labels[whole], p_fake[whole], groups[rows][whole]),
        "uncalibrated": metrics.calibration(labels[whole], raw, groups[rows][whole]),
        "by_source": sources,
        "over_sources": {
            name: metrics.over_sources([r for r in sources if r["known"] == (name == "known")])
            for name in ("known", "unseen")
        },
        "band_error": model["threshold_rule"]["band_error"],
        "abstention": {name: banded(parts[name]) for name in ("overall", "known", "unseen")},
        "risk_coverage": metrics.risk_coverage(labels[whole], p_fake[whole], model["threshold"]),
        "scores": {"labels": labels[whole].tolist(), "p_fake": p_fake[whole].round(6).tolist()},
    }


def known_rows(model, sources):
    """Boolean [n]: images of sources that the model was trained on."""
    return np.isin(sources, model["training_data"]["sources"])


# ---- in words ----


def table(found):
    """The metrics that a training prints, one a line: value, interval, n."""
    lines = [f"{'':18}{'value':>7}  {'95% interval':14}  n"]
    for name in ("accuracy", *NAMES, "precision_real", "precision_fake"):
        m = found[name]
        value = "    n/a" if m["value"] is None else f"{m['value']:z7.3f}"
        ends = (
            "none"
            if m["interval"] is None
            else f"{m['interval'][0]:z.3f} .. {m['interval'][1]:z.3f}"
        )
        lines.append(f"{NAMES.get(name, name.replace('_', ' ')):18}{value}  {ends:14}  {m['n']}")
    return "\n".join(lines)


def comparison(rows):
    """Rows of `compare` as a table: what out-of-fold AUC chose, and what that gives on the test images."""
    lines = [f"{'classifier':12}{'out-of-fold AUC':20}{'test AUC':20}balanced accuracy"]
    return "\n".join(
        [
            *lines,
            *(
                f"{r['classifier']:12}{words(r['out_of_fold']):20}{words(r['auc']):20}{words(r['balanced_accuracy'])}"
                for r in rows
            ),
        ]
    )


def held_out(rows):
    """Leave-one-source-out rows as a table, worst first."""
    lines = [f"{'source held out':44}{'label':7}{'n':>5}  share right"]
    return "\n".join(
        [*lines, *(f"{r['source'][:43]:44}{r['label']:7}{r['n']:5}  {words(r)}" for r in rows)]
    )


def elsewhere(found):
    """What a card says first of a report: how the model does on sources that it has not seen, and where it fails. '' where no such
    source is named; sources with fewer than LEAST_IMAGES are not spoken of one by one."""
    if found["unseen"]:
        rows = [
            {**r, "value": r["own"]["value"]} for r in found["by_source"] if not r["known"]
        ]  # of 'both': balanced
        head = (
            f"AUC {words(found['unseen']['auc'])}, balanced accuracy"
            f" {words(found['unseen']['balanced_accuracy'])} on {found['unseen']['n']} images of"
            f" {len(rows)} sources"
        )
    elif rows := found.get("leave_one_source_out"):
        share = sum(r["value"] for r in rows) / len(rows)
        number = len({r["source"] for r in rows})
        head = (
            f"with each of {number} sources left out of the training in turn, {share:.0%} of its"
            " images of a class are answered right on average"
        )
    else:
        return ""
    worst = sorted((r for r in rows if r["n"] >= LEAST_IMAGES), key=lambda r: r["value"])[:4]
    named = ", ".join(
        f"{r['source']} ({r['label']}, {r['n']} images: {r['value']:.0%} right)" for r in worst
    )
    return head + (f"; worst on {named}" if named else "")


def training(found):
    """What train_model.py prints of its report."""
    from detector.evaluation.audit import leak_sentence

    found = all_printable(found)
    lines = [
        f"{found['classifier']},"
        f" {', '.join(f'{k} {v:g}' for k, v in found['hyperparameters'].items())}, on"
        f" '{found['encoder']}'; threshold {found['threshold']:.3f}"
        f" ({found['threshold_rule']['words']})"
    ]
    if len(found["classifiers"]) > 1:
        lines += [comparison(found["classifiers"]), "the best out of fold was chosen:"]
    lines.append(table(found["overall"]))
    if found["degraded"]:
        lines += [
            f"on {found['degraded']['n']} degraded copies of the test images:",
            table(found["degraded"]),
        ]
    for name, what in (
        ("untouched", "real training images"),
        ("degraded", "degraded copies of them"),
    ):
        if name in found["false_alarms"]:
            alarm = found["false_alarms"][name]
            lines.append(f"called fake, out of fold: {words(alarm, 3)} of {alarm['n']} {what}")
    if slope := found["calibration"]:
        lines.append(
            f"calibration slope {words(slope['slope'])} (1: as sure as it should be); error"
            f" {slope['error']:z.3f}, a perfect model's stays below {slope['expected_95']:.3f} in"
            " 95 of 100 draws"
        )
    if found["leak"]:
        lines.append(leak_sentence(found["leak"]))
    if found["leave_one_source_out"]:
        lines.append(held_out(found["leave_one_source_out"]))
    return "\n".join(lines)


def evaluation(found):
    """What evaluate.py prints of its report."""
    from detector.evaluation.audit import leak_sentence, sentences

    found = all_printable(found)
    lines = [
        (
            f"{found['classifier']} {found['model_version']} on '{found['encoder']}', threshold"
            f" {found['threshold']:.3f} ({found['threshold_rule']['words']})"
        ),
        *(f"WARNING  {line}" for line in found["warnings"]),
    ]
    apart = found["known"] or found["unseen"]
    for part, title in (
        ("overall", "all"),
        ("known", "known sources"),
        ("unseen", "sources never seen"),
        ("degraded", "degraded copies"),
    ):
        if found[part] and not (part == "overall" and apart):
            lines += [f"{found[part]['n']} images, {title}:", table(found[part])]
    lines += [f"LEAK  {line}" for line in sentences(found["audit"])[0]]
    if found["leak"]:
        lines.append(leak_sentence(found["leak"]))
    for key in ("robustness", "arms"):
        if found.get(key):
            lines.append(f"{'':49}balanced accuracy")
            lines.append(
                f"{found[key][0]['n']}"
                f" images{'':{42 - len(str(found[key][0]['n']))}}{'known sources':20}{'never seen':20}verdicts"
                " flipped"
            )
            lines += [
                f"{r['panel']:17}{r['level']:32}{words(r['known']):20}{words(r['unseen']):20}{words(r['flipped'])}"
                for r in found[key]
            ]
    if found.get("not_measured"):
        lines.append(
            f"not measured without pictures (use --data_dir): {'; '.join(found['not_measured'])}"
        )
    return "\n".join(lines)


def calibration_warning(found):
    """A sentence where the slope's interval lies wholly outside 0.8 to 1.25, else None."""
    slope = found and found["slope"]
    if (
        not slope
        or not slope["interval"]
        or (slope["interval"][1] >= 0.8 and slope["interval"][0] <= 1.25)
    ):
        return None
    return (
        f"calibration slope {words(slope)}: the probabilities are too"
        f" {'sure' if slope['value'] < 1 else 'timid'} on these images; train again on images like"
        " these"
    )


# ---- files ----


def tables(report):
    """Report -> {file name: (header, rows)} of its CSV tables."""

    def cells(metric):
        ends = (metric or {}).get("interval") or (None, None)
        return [None if metric is None else metric["value"], *ends]

    spread = [f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")]
    found = {
        "overall.csv": (
            ["images", "n", *spread],
            [
                [
                    part,
                    report[part]["n"],
                    *(c for name in METRICS for c in cells(report[part][name])),
                ]
                for part in ("overall", "known", "unseen", "degraded")
                if report.get(part)
            ],
        ),
        "sources.csv": (
            ["source", "label", "known", "paired", "n", *spread],
            [
                [
                    r["source"],
                    r["label"],
                    r["known"],
                    r["paired"],
                    r["n"],
                    *(c for name in METRICS for c in cells(r[name])),
                ]
                for r in report["by_source"]
            ],
        ),
    }
    names = (
        "accuracy_real",
        "accuracy_fake",
        "balanced_accuracy",
        "auc",
        "known",
        "unseen",
        "flipped",
    )
    ends = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    for key in ("robustness", "arms"):
        if report.get(key):
            found[f"{key}.csv"] = (
                ["panel", "level", "n", *ends],
                [
                    [r["panel"], r["level"], r["n"], *(c for name in names for c in cells(r[name]))]
                    for r in report[key]
                ],
            )
    return found


def staged(folder):
    """Yields a place to `fill`; at the end it becomes the report in `folder`, whole or not at all."""
    from detector.evaluation.plots import PLOTS

    return atomic_folder(
        folder, [*(f"{plot}.png" for plot in PLOTS), "robustness.csv", "arms.csv", "hardest.png"]
    )


def fill(folder, report):
    """metrics.json, and from it the CSV tables, the plots, report.html (self-contained) and MODEL_CARD.md."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a source may be called c$x$
    from matplotlib import pyplot

    from detector.evaluation.plots import PLOTS

    folder, pictures, report = Path(folder), {}, all_printable(report)
    for name, plot in PLOTS.items():
        if figure := plot(report):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
            pyplot.close(figure)
            pictures[name] = buffer.getvalue()
    for name, data in pictures.items():
        with atomic_write(folder / f"{name}.png") as file:
            file.write(data)
    if (folder / "hardest.png").is_file() and report.get("hardest"):
        pictures["hardest"] = (folder / "hardest.png").read_bytes()
    pages = {
        name: render(template, report, pictures)
        for name, template in (("report.html", "report.html"), ("MODEL_CARD.md", "model_card.md"))
    }
    for name, (header, rows) in tables(report).items():
        with atomic_write(folder / name, "w") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    for name, text in {**pages, "metrics.json": json.dumps(report, indent=1)}.items():
        with atomic_write(folder / name, "w") as file:
            file.write(text)


def render(template, report, pictures=()):
    """One of templates/ filled from a report; `pictures`: {name: PNG bytes}, put into the page itself."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=template.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    from detector.evaluation.audit import leak_sentence, sentences
    from detector.evaluation.rules import TELLING_AUC

    environment.globals |= {
        "words": words,
        "METRICS": NAMES,
        "CLASSES": CLASSES,
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
