"""The README's picture, from the shipped features and model: one dot an image, a row a source, score across.

    python docs/draw_sources.py        # writes docs/sources.png
"""
import sys
from pathlib import Path

import matplotlib
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from common import CLASSES, atomic_write  # noqa: E402
from features import load_features  # noqa: E402
from model import decision, load_model, probability  # noqa: E402

COLOURS = ("#2c7fb8", "#e6550d")


def rows_of(columns, p_fake, split):
    """[(source, label, probabilities)] of one split, each class by its median, so that mistakes stand out."""
    found = []
    for label in (1, 0):
        mask = (columns["splits"] == split) & (columns["labels"] == label) & (columns["view"] == 0)
        of_class = [(s, label, p_fake[mask & (columns["sources"] == s)]) for s in np.unique(columns["sources"][mask])]
        found += sorted(of_class, key=lambda row: np.median(row[2]))
    return found


def main():
    columns, model = load_features(HERE.parent / "models" / "features.npz"), load_model(HERE.parent / "models" / "baseline.joblib")
    p_fake = probability(model, decision(model, columns["features"]))
    known, unseen = rows_of(columns, p_fake, "test"), rows_of(columns, p_fake, "external")
    heights = [len(known), len(unseen)]
    figure, panels = pyplot.subplots(2, 1, figsize=(8, 0.105 * sum(heights) + 1), height_ratios=heights, sharex=True)
    for ax, rows, words in zip(panels, (known, unseen), ("known sources (test images)", "sources never seen (external)")):
        for y, (source, label, values) in enumerate(rows):
            ax.plot(values, [y] * len(values), ".", color=COLOURS[label], alpha=0.6, markersize=4)
        ax.axvline(model["threshold"], color="black", linewidth=0.8)
        ax.set_yticks(range(len(rows)), [f"{source[:30]}" for source, _, _ in rows], fontsize=4.5)
        ax.set_ylim(-1, len(rows))
        ax.set_title(f"{words}: {sum(len(v) for _, _, v in rows)} images, {len(rows)} rows", fontsize=9)
        ax.tick_params(length=0)
    for label in (0, 1):
        panels[0].plot([], [], "o", color=COLOURS[label], label=f"{CLASSES[label]} image")
    panels[0].legend(fontsize=7, loc="upper left")
    panels[1].set_xlabel(f"calibrated probability of fake, encoder '{model['encoder']['name']}' (a demonstration); "
                         "line: the threshold", fontsize=8)
    figure.tight_layout()
    with atomic_write(HERE / "sources.png") as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    main()
