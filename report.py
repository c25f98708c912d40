"""Metrics with intervals, and the plots, all from one metrics.json.

    metrics = measure(labels, p_fake, threshold, groups)
    write_report("model_report", metrics)
"""
import json
from pathlib import Path

import numpy as np

from audit import auc
from common import CLASSES, atomic_write

RESAMPLES = 1000


def wilson(successes, n):
    """95% interval of a share (Wilson 1927): [low, high]; [0, 1] where n is 0."""
    if n == 0:
        return [0.0, 1.0]
    z, p = 1.959964, successes / n
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return [0.0 if successes == 0 else float(low), 1.0 if successes == n else float(high)]  # exact, without rounding


def share(mask):
    """Boolean [n] -> {'value', 'interval', 'n'}; value None where n is 0."""
    n, k = len(mask), int(np.sum(mask))
    return {"value": k / n if n else None, "interval": wilson(k, n), "n": n}


def bootstrap(function, groups, *arrays, seed=0):
    """95% interval of `function(*arrays)`, resampling whole groups: images of one group are not independent.

    Resamples without both classes are left out. -> [low, high]; [0, 1] where there are none.
    """
    rng = np.random.default_rng(seed)
    _, inverse = np.unique(groups, return_inverse=True)
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
    values = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        value = function(*(a[rows] for a in arrays))
        if value is not None:
            values.append(value)
    return [float(v) for v in np.percentile(values, [2.5, 97.5])] if values else [0.0, 1.0]


def balanced_accuracy(labels, fake):
    """Mean of the accuracies on reals and on fakes; None without both."""
    if len(np.unique(labels)) < 2:
        return None
    return float((np.mean(~fake[labels == 0]) + np.mean(fake[labels == 1])) / 2)


def area(labels, p_fake):
    return auc(p_fake, labels) if len(np.unique(labels)) == 2 else None


def measure(labels, p_fake, threshold, groups):
    """Labels int [n], probability of fake [n], one threshold, groups [n] -> dict of metrics, each with a 95% interval.

    Wilson's interval where images count one by one; where groups matter (AUC, balanced accuracy) a bootstrap over them.
    """
    labels, fake = np.asarray(labels), np.asarray(p_fake) >= threshold
    metrics = {"n": len(labels), "threshold": threshold, "accuracy": share(fake == labels),
               "confusion": [[int(((labels == i) & (fake == j)).sum()) for j in (0, 1)] for i in (0, 1)]}
    for i, name in enumerate(CLASSES):
        metrics[f"recall_{name}"] = share(fake[labels == i] == i)
        metrics[f"precision_{name}"] = share(labels[fake == i] == i)
    metrics["balanced_accuracy"] = {"value": balanced_accuracy(labels, fake), "n": len(labels),
                                    "interval": bootstrap(balanced_accuracy, groups, labels, fake)}
    metrics["auc"] = {"value": area(labels, p_fake), "n": len(labels),
                      "interval": bootstrap(area, groups, labels, np.asarray(p_fake))}
    return metrics


def by_source(labels, p_fake, threshold, sources):
    """-> list of rows {source, label, n, accuracy with Wilson's interval}, worst first."""
    rows = []
    for source in np.unique(sources):
        for i, name in enumerate(CLASSES):
            mask = (sources == source) & (labels == i)
            if mask.any():
                rows.append({"source": str(source), "label": name, **share((p_fake[mask] >= threshold) == i)})
    return sorted(rows, key=lambda r: (r["value"], -r["n"]))


def table(metrics):
    """The metrics that a training prints, one a line: value, interval, n."""
    lines = [f"{'':18}{'value':>7}  {'95% interval':14}  n"]
    for name in ("accuracy", "balanced_accuracy", "auc", "precision_real", "recall_real", "precision_fake", "recall_fake"):
        m = metrics[name]
        value = "    n/a" if m["value"] is None else f"{m['value']:7.3f}"
        lines.append(f"{name.replace('_', ' '):18}{value}  {m['interval'][0]:.3f} .. {m['interval'][1]:.3f}  {m['n']}")
    return "\n".join(lines)


# ---- files ----

def write_report(folder, metrics):
    """metrics.json and the plots made from it: confusion_matrix.png, roc.png, calibration.png. -> the folder"""
    import matplotlib
    matplotlib.use("Agg")
    folder = Path(folder)
    with atomic_write(folder / "metrics.json", "w") as file:
        json.dump(metrics, file, indent=1)
    for name, plot in (("confusion_matrix", plot_confusion), ("roc", plot_roc), ("calibration", plot_calibration)):
        figure = plot(metrics)
        with atomic_write(folder / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
        matplotlib.pyplot.close(figure)
    return folder


def axes(title, x, y):
    from matplotlib import pyplot
    figure, ax = pyplot.subplots(figsize=(5, 4.5))
    ax.set(title=title, xlabel=x, ylabel=y)
    return figure, ax


def encoder(metrics):
    """Its name as every plot has it: a demonstration is called one."""
    return metrics["encoder"] + (" (a demonstration)" if metrics.get("notice") else "")


def plot_confusion(metrics):
    import seaborn
    figure, ax = axes(f"{encoder(metrics)}, {metrics['test']['n']} test images", "answered", "is")
    seaborn.heatmap(metrics["test"]["confusion"], annot=True, fmt="d", cmap="Blues", cbar=False, square=True,
                    xticklabels=CLASSES, yticklabels=CLASSES, ax=ax)
    ax.set(xlabel="answered", ylabel="is")
    return figure


def plot_roc(metrics):
    """ROC of the test images from their stored probabilities, the operating point marked."""
    labels, p_fake = np.array(metrics["scores"]["labels"]), np.array(metrics["scores"]["p_fake"])
    order = np.argsort(-p_fake, kind="stable")
    last = np.append(np.diff(p_fake[order]) != 0, True)  # ties move together
    fpr, tpr = (np.append(0, np.cumsum(labels[order] == i)[last] / max(1, (labels == i).sum())) for i in (0, 1))
    area = metrics["test"]["auc"]
    figure, ax = axes(f"ROC, {encoder(metrics)}, {len(labels)} test images", "reals called fake", "fakes called fake")
    ax.plot([0, 1], [0, 1], color="grey", linestyle=":")
    if area["value"] is not None:  # a test set of one class has no curve
        ax.plot(fpr, tpr, label=f"AUC {area['value']:.3f} [{area['interval'][0]:.3f}, {area['interval'][1]:.3f}]")
        ax.plot(1 - metrics["test"]["recall_real"]["value"], metrics["test"]["recall_fake"]["value"], "o", label="threshold")
        ax.legend(loc="lower right")
    return figure


def plot_calibration(metrics):
    """Share of fakes against stated probability, in ten bins of equal numbers, with Wilson's intervals."""
    labels, p_fake = np.array(metrics["scores"]["labels"]), np.array(metrics["scores"]["p_fake"])
    figure, ax = axes(f"Calibration, {encoder(metrics)}, {len(labels)} test images", "stated probability of fake",
                      "share of fakes")
    ax.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for rows in np.array_split(np.argsort(p_fake, kind="stable"), min(10, len(labels))):
        k, x = int(labels[rows].sum()), p_fake[rows].mean()
        low, high = wilson(k, len(rows))
        ax.plot([x, x], [low, high], color="C0")
        ax.plot(x, k / len(rows), "o", color="C0")
    return figure
