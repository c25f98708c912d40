"""The plots of a report: `figure = PLOTS["roc"](report)`, None where there is nothing to show."""

import numpy as np

from detector.base.constants import CLASSES
from detector.evaluation.intervals import wilson
from detector.evaluation.metrics import BINS
from detector.images.occlusion import MEANING
from detector.images.preprocessing import colours

COLOURS = ("#2c7fb8", "#e6550d")  # real, fake


def axes(title, x, y, size=(5, 4.5)):
    """-> (figure, axes) with a title and labels."""
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=size)
    ax.set(title=title, xlabel=x, ylabel=y)
    return figure, ax


def encoder(report):
    """The encoder's name as plots show it; a demonstration is marked."""
    return report["encoder"] + (" (a demonstration)" if report.get("notice") else "")


def scores_of(report):
    """-> (labels [n], probabilities of fake [n]) of the test images."""
    return np.array(report["scores"]["labels"]), np.array(report["scores"]["p_fake"])


def plot_confusion(report):
    """Confusion matrix, the truth in rows."""
    import seaborn

    figure, ax = axes(f"{encoder(report)}, {report['overall']['n']} test images", "", "")
    seaborn.heatmap(
        report["overall"]["confusion"],
        annot=True,
        fmt="d",
        cmap="Blues",
        cbar=False,
        square=True,
        xticklabels=CLASSES,
        yticklabels=CLASSES,
        ax=ax,
    )
    ax.set(xlabel="verdict", ylabel="truth")
    return figure


def plot_roc(report):
    """ROC of the test images, with a mark at the threshold."""
    labels, p_fake = scores_of(report)
    order = np.argsort(-p_fake, kind="stable")
    last = np.append(np.diff(p_fake[order]) != 0, True)  # ties move together
    fpr, tpr = (
        np.append(0, np.cumsum(labels[order] == i)[last] / max(1, (labels == i).sum()))
        for i in (0, 1)
    )
    area = report["overall"]["auc"]
    figure, ax = axes(
        f"ROC, {encoder(report)}, {len(labels)} test images",
        "reals called fake",
        "fakes called fake",
    )
    ax.plot([0, 1], [0, 1], color="grey", linestyle=":")
    if area["value"] is not None:  # a test set of one class has no curve
        ends = "" if area["interval"] is None else " [{:.3f}, {:.3f}]".format(*area["interval"])
        ax.plot(fpr, tpr, label=f"AUC {area['value']:.3f}{ends}")
        ax.plot(
            1 - report["overall"]["accuracy_real"]["value"],
            report["overall"]["accuracy_fake"]["value"],
            "o",
            label="threshold",
        )
        ax.legend(loc="lower right")
    return figure


def plot_calibration(report):
    """Share of fakes against stated probability, in bins of equal size, with Wilson's intervals."""
    labels, p_fake = scores_of(report)
    # The probability is stated for equal shares of both classes.
    weight = (1 / np.maximum(np.bincount(labels, minlength=2), 1))[labels]
    figure, ax = axes(
        f"Calibration, {encoder(report)}, {len(labels)} test images",
        "stated probability of fake",
        "share of fakes, both classes even",
    )
    ax.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for rows in np.array_split(np.argsort(p_fake, kind="stable"), min(BINS, len(labels))):
        share, x = (np.average(v[rows], weights=weight[rows]) for v in (labels, p_fake))
        ax.plot([x, x], wilson(share * len(rows), len(rows)), color="C0")
        ax.plot(x, share, "o", color="C0")
    return figure


def plot_risk(report):
    """Share of errors against the share of images kept, surest first."""
    coverage, risk = report["risk_coverage"]
    figure, ax = axes(
        f"Risk and coverage, {encoder(report)}, {report['overall']['n']} test images",
        "share of images kept, surest first",
        "share of errors among them",
    )
    ax.plot(coverage, risk)
    band = report["abstention"]["overall"]
    accuracy = band["accuracy_answered"]["value"]
    if accuracy is not None:
        label = "outside the 'uncertain' band"
        ax.plot(band["answered"]["value"], 1 - accuracy, "o", label=label)
        ax.legend()
    ax.set(xlim=(0, 1), ylim=(0, None))
    return figure


def plot_sources(report):
    """One row a source, its own share right with its interval, unseen sources in bold colour."""
    rows = [r for r in report["by_source"] if r["source"]][:150]  # the worst; sources.csv has all
    if len(rows) < 2:
        return None
    size = (6, 0.16 * len(rows) + 1.2)
    figure, ax = axes(f"Accuracy by source, {encoder(report)}", "share right", "", size)
    for y, row in enumerate(rows):
        colour = "C0" if row["known"] else "C1"
        ax.plot(row["own"]["interval"], [y, y], color=colour, linewidth=1)
        ax.plot(row["own"]["value"], y, "o", color=colour, markersize=3)
    names = [f"{r['source'][:32]} ({r['label']}, {r['n']})" for r in rows]
    ax.set_yticks(range(len(rows)), names, fontsize=6)
    ax.set(xlim=(0, 1), ylim=(-1, len(rows)))
    ax.plot([], [], color="C0", label="known source")
    ax.plot([], [], color="C1", label="source never seen")
    ax.legend(loc="lower left", fontsize=7)
    return figure


def plot_robustness(report):
    """A small panel for each distortion: accuracy and flipped verdicts by its strength."""
    if not report.get("robustness"):
        return None
    from matplotlib import pyplot

    untouched, *rows = report["robustness"]
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    width = (len(panels) + 1) // 2
    figure, grid = pyplot.subplots(2, width, figsize=(2.6 * width, 5), sharey=True, squeeze=False)
    for ax in grid.ravel()[len(panels) :]:
        ax.axis("off")
    for ax, panel in zip(grid.ravel(), panels, strict=False):
        plot_panel(ax, panel, [untouched, *(row for row in rows if row["panel"] == panel)])
    grid[0, 0].legend(fontsize=6, loc="lower left")
    figure.suptitle(f"At one threshold, {encoder(report)}, {untouched['n']} images", fontsize=9)
    figure.tight_layout()
    return figure


def plot_panel(ax, title, rows):
    """Draw the rows of one distortion, the untouched images first."""
    x = range(len(rows))
    for name, colour in zip(CLASSES, COLOURS, strict=True):
        shares = [row[f"accuracy_{name}"] for row in rows]
        low, high = zip(*(share["interval"] for share in shares), strict=True)
        ax.fill_between(x, low, high, color=colour, alpha=0.15)
        values = [share["value"] for share in shares]
        ax.plot(x, values, "o-", color=colour, markersize=3, label=f"{name}s right")
    flipped = [0, *(row["flipped"]["value"] for row in rows[1:])]
    ax.plot(x, flipped, "s--", color="grey", markersize=3, label="verdicts flipped")
    levels = ["as is", *(row["level"].split(",")[0] for row in rows[1:])]
    ax.set_xticks(x, levels, rotation=60, fontsize=6, ha="right")
    ax.set_title(title, fontsize=8)
    ax.set_ylim(0, 1)


def plot_operating(report):
    """Fakes caught against reals called fake at each threshold, a curve for each set of images."""
    if not report.get("operating"):
        return None
    figure, ax = axes(
        f"Operating points, {encoder(report)}", "reals called fake", "fakes caught", (7, 4.5)
    )
    at = report["operating"][0]["prevalence"]
    rows = [row for row in report["operating"] if row["prevalence"] == at]
    for number, images in enumerate(dict.fromkeys(row["images"] for row in rows)):
        own = sorted(
            (row for row in rows if row["images"] == images), key=lambda row: -row["threshold"]
        )
        shares = [(row["false_positives"], row["caught"]) for row in own]
        x, y = ([share["value"] for share in column] for column in zip(*shares, strict=True))
        ax.plot(x, y, "o-", color=f"C{number}", markersize=3, label=images)
        for reals, fakes in shares:
            ax.plot(reals["interval"], [fakes["value"]] * 2, color=f"C{number}", alpha=0.3)
            ax.plot([reals["value"]] * 2, fakes["interval"], color=f"C{number}", alpha=0.3)
    ax.set(ylim=(0, 1), xlim=(0, None))
    ax.legend(fontsize=7, loc="lower right")
    return figure


def plot_map(pixels, transform, rows):
    """The encoder's input, float32 [3, r, r], beside its map of `Detector.explain` -> figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(colours(pixels, transform))
    left.set(title="the picture as the encoder sees it", xticks=[], yticks=[])
    most = max(np.abs(rows).max(), 1e-9)
    drawn = right.imshow(rows, cmap="PuOr_r", vmin=-most, vmax=most)
    right.set(title="what each part adds", xticks=[], yticks=[])
    figure.colorbar(drawn, ax=right, shrink=0.8, label="log-odds of fake")
    figure.supxlabel(MEANING, fontsize=10)
    return figure


PLOTS = {
    "operating": plot_operating,
    "confusion_matrix": plot_confusion,
    "roc": plot_roc,
    "calibration": plot_calibration,
    "risk_coverage": plot_risk,
    "sources": plot_sources,
    "robustness": plot_robustness,
}
