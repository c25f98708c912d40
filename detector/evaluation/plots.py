"""The plots of a report, each from one metrics.json: `figure = PLOTS["roc"](report)`; None where it has nothing to show."""

import numpy as np

from detector.base.constants import CLASSES
from detector.evaluation.metrics import BINS, wilson

COLOURS = ("#2c7fb8", "#e6550d")  # real, fake


def axes(title, x, y, size=(5, 4.5)):
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=size)
    ax.set(title=title, xlabel=x, ylabel=y)
    return figure, ax


def encoder(report):
    """Its name as every plot has it: a demonstration is called one."""
    return report["encoder"] + (" (a demonstration)" if report.get("notice") else "")


def scores_of(report):
    return np.array(report["scores"]["labels"]), np.array(report["scores"]["p_fake"])


def plot_confusion(report):
    import seaborn

    figure, ax = axes(f"{encoder(report)}, {report['overall']['n']} test images", "answered", "is")
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
    ax.set(xlabel="answered", ylabel="is")
    return figure


def plot_roc(report):
    """ROC of the test images from their stored probabilities, the operating point marked."""
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
    """Share of fakes against stated probability, in bins of equal numbers, with Wilson's intervals."""
    labels, p_fake = scores_of(report)
    weight = (1 / np.maximum(np.bincount(labels, minlength=2), 1))[
        labels
    ]  # the probability is stated for even shares
    figure, ax = axes(
        f"Calibration, {encoder(report)}, {len(labels)} test images",
        "stated probability of fake",
        "share of fakes, both classes even",
    )
    ax.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for rows in np.array_split(np.argsort(p_fake, kind="stable"), min(BINS, len(labels))):
        share, x = (
            np.average(labels[rows], weights=weight[rows]),
            np.average(p_fake[rows], weights=weight[rows]),
        )
        ax.plot([x, x], wilson(share * len(rows), len(rows)), color="C0")
        ax.plot(x, share, "o", color="C0")
    return figure


def plot_risk(report):
    """Errors among the images answered, against the share of images answered, surest first."""
    coverage, risk = report["risk_coverage"]
    figure, ax = axes(
        f"Risk and coverage, {encoder(report)}, {report['overall']['n']} test images",
        "share of images answered, surest first",
        "share of errors among them",
    )
    ax.plot(coverage, risk)
    here = report["abstention"]["overall"]
    if here["accuracy_answered"]["value"] is not None:
        ax.plot(
            here["answered"]["value"],
            1 - here["accuracy_answered"]["value"],
            "o",
            label="outside the 'uncertain' band",
        )
        ax.legend()
    ax.set(xlim=(0, 1), ylim=(0, None))
    return figure


def plot_sources(report):
    """One row a source, its own share right with its interval, unseen sources in bold colour."""
    rows = [r for r in report["by_source"] if r["source"]][
        :150
    ]  # the worst; all are in sources.csv
    if len(rows) < 2:
        return None
    figure, ax = axes(
        f"Accuracy by source, {encoder(report)}", "share right", "", (6, 0.16 * len(rows) + 1.2)
    )
    for y, row in enumerate(rows):
        own = row["own"]
        ax.plot(own["interval"], [y, y], color="C1" if not row["known"] else "C0", linewidth=1)
        ax.plot(own["value"], y, "o", color="C1" if not row["known"] else "C0", markersize=3)
    ax.set_yticks(
        range(len(rows)), [f"{r['source'][:32]} ({r['label']}, {r['n']})" for r in rows], fontsize=6
    )
    ax.set(xlim=(0, 1), ylim=(-1, len(rows)))
    ax.plot([], [], color="C0", label="known source")
    ax.plot([], [], color="C1", label="source never seen")
    ax.legend(loc="lower left", fontsize=7)
    return figure


def plot_robustness(report):
    """One small panel a distortion: accuracy on reals and on fakes, and verdicts flipped, by its strength."""
    if not report.get("robustness"):
        return None
    from matplotlib import pyplot

    untouched, *rows = report["robustness"]
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    figure, grid = pyplot.subplots(
        2,
        (len(panels) + 1) // 2,
        figsize=(2.6 * ((len(panels) + 1) // 2), 5),
        sharey=True,
        squeeze=False,
    )
    for ax in grid.ravel()[len(panels) :]:
        ax.axis("off")
    for ax, panel in zip(grid.ravel(), panels):
        own = [untouched, *(row for row in rows if row["panel"] == panel)]
        x = range(len(own))
        for name, colour in zip(CLASSES, COLOURS):
            value = [row[f"accuracy_{name}"]["value"] for row in own]
            low, high = zip(*(row[f"accuracy_{name}"]["interval"] for row in own))
            ax.fill_between(x, low, high, color=colour, alpha=0.15)
            ax.plot(x, value, "o-", color=colour, markersize=3, label=f"{name}s right")
        ax.plot(
            x,
            [0, *(row["flipped"]["value"] for row in own[1:])],
            "s--",
            color="grey",
            markersize=3,
            label="verdicts flipped",
        )
        ax.set_xticks(
            x,
            ["as is", *(row["level"].split(",")[0] for row in own[1:])],
            rotation=60,
            fontsize=6,
            ha="right",
        )
        ax.set_title(panel, fontsize=8)
        ax.set_ylim(0, 1)
    grid[0, 0].legend(fontsize=6, loc="lower left")
    figure.suptitle(f"At one threshold, {encoder(report)}, {untouched['n']} images", fontsize=9)
    figure.tight_layout()
    return figure


PLOTS = {
    "confusion_matrix": plot_confusion,
    "roc": plot_roc,
    "calibration": plot_calibration,
    "risk_coverage": plot_risk,
    "sources": plot_sources,
    "robustness": plot_robustness,
}
