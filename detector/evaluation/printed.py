"""A report as the commands print it: `print(training(report))`, `print(evaluation(report))`."""

from itertools import groupby
from operator import itemgetter

from detector.base.console import all_printable
from detector.evaluation import sampling
from detector.evaluation.intervals import words
from detector.evaluation.report import NAMES, point

WORST = 5  # sources left out of the training that are printed


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
    if rows := report["leave_one_source_out"]:
        lines.append(held_out(rows[:WORST]))
        lines += [f"all {len(rows)} are in left_out.csv of the report"] * (len(rows) > WORST)
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
    if report.get("whole_folder"):
        lines += sampling.lines(report["whole_folder"])
    lines += operating_lines(report["operating"], report["uploads_per_day"])
    if report["review"]:
        lines += review_lines(report["review"], report["uploads_per_day"])
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


def operating_lines(rows, uploads):
    """Rows of `operating.operating_table` as text, at their first prevalence."""
    rows = [row for row in rows if row["prevalence"] == rows[0]["prevalence"]]
    lines = [
        f"of {uploads} uploads a day a share of {row['prevalence']:g} is fake; the thresholds come"
        " from the training's scores:"
        for row in rows[:1]
    ]
    for images, of_part in groupby(rows, itemgetter("images")):
        heading = f"{'reals called fake':22}{'fakes caught':22}{'alarms right':18}a day (false)"
        lines.append(f"{images:42}{heading}")
        for row in of_part:
            shares = "".join(f"{words(row[name], 3):22}" for name in ("false_positives", "caught"))
            rule = f"{row['rule']}: from {row['threshold']:.3f}"
            alarms, false = (row[name]["value"] for name in ("alarms", "false_alarms"))
            right = f"{words(row['precision']):18}"
            lines.append(f"  {rule:40}{shares}{right}{alarms:.0f} ({false:.0f})")
    return lines


def review_lines(review, uploads):
    """The report's `review` as text: a line for each part and prevalence."""
    lines = [
        f"pass below {review['low']:.4g}, reject from {review['high']:.4g}, of {uploads} uploads a"
        " day:",
        f"{'':42}{'fake':6}{'to review a day':18}{'fakes that pass':22}reals rejected",
    ]
    for row in review["rows"]:
        queue = words(row["queue"], 0)
        shares = "".join(
            f"{words(row[name], 3):22}" for name in ("passed_fakes", "rejected_reals")
        ).rstrip()
        lines.append(f"{row['images']:42}{row['prevalence']:<6g}{queue:18}{shares}")
    return lines
