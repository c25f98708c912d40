"""The README's picture: a row for each kind of source that the shipped model has never seen.

python -m tools.draw_sources        # writes docs/sources.png
"""

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from detector.base.constants import CLASSES
from detector.base.files import atomic_write
from detector.base.project import HERE
from detector.features.file import load_features
from detector.model.file import load_model
from detector.model.score import p_fake_of

COLOURS = ("#2c7fb8", "#e6550d")
# What each source of `external` shows, in words that people know.
NAMES = {
    ("fake", "dexer"): "generator not named",
    ("fake", "eenx16-progan"): "ProGAN, 2018",
    ("fake", "flux-dev--Regional-Prompting-FLUX"): "FLUX.1",
    ("fake", "gpt-image-2--awesome-gpt-image-2"): "GPT-Image-2",
    ("fake", "hastings-dalle3"): "DALL-E 3",
    ("fake", "hunyuan-dit--HunyuanDiT"): "HunyuanDiT",
    ("fake", "infinity--Infinity"): "Infinity",
    ("fake", "kaivalya-pairs"): "generator not named",
    ("fake", "kolors--Kolors"): "Kolors",
    ("fake", "ml72-diffusion"): "diffusion, four generations",
    ("fake", "ml72-gan"): "GAN, not named",
    ("fake", "necenzurat-chatgpt"): "ChatGPT images",
    ("fake", "necenzurat-gemini"): "Gemini images",
    ("real", "necenzurat-gemini"): "photographs of views",
    ("real", "based-cooking-webp"): "food blog",
    ("real", "eenx16-progan"): "LSUN, scenes",
    ("real", "dexer"): "stock photographs",
    ("real", "kaivalya-pairs"): "stock photographs",
    ("real", "ml72-diffusion"): "stock photographs",
    ("real", "imagenet-samples"): "ImageNet",
    ("real", "karamudie"): "photographers' blogs",
    ("real", "larsphotos"): "photographers' blogs",
    ("real", "sunhays80"): "landscapes and buildings",
}


def rows_of(columns, p_fake):
    """[(name, label, probabilities)], fakes above photographs, each class by its median."""
    images = (columns["splits"] == "external") & (columns["view"] == 0)
    by_name = {}
    for i in np.flatnonzero(images):
        label = int(columns["labels"][i])
        name = NAMES[CLASSES[label], str(columns["sources"][i])]
        by_name.setdefault((label, name), []).append(p_fake[i])
    return sorted(
        ((name, label, np.array(values)) for (label, name), values in by_name.items()),
        key=lambda row: (-row[1], np.median(row[2])),
    )


def draw(ax, rows, threshold):
    """A dot for each image, in one row for each source."""
    rng, ticks = np.random.default_rng(0), []
    for y, (name, label, values) in enumerate(rows):
        heights = y + rng.uniform(-0.25, 0.25, len(values))
        ax.plot(values, heights, ".", color=COLOURS[label], alpha=0.6, markersize=6)
        right = np.mean((values >= threshold) == label)
        ticks.append(f"{name} ({len(values)} images, {right:.0%} right)")
    ax.axvline(threshold, color="black", linewidth=0.8)
    ax.set_yticks(range(len(rows)), ticks, fontsize=9)
    ax.set_ylim(-1, len(rows))
    ax.set_xlabel("calibrated probability of fake; line: the threshold", fontsize=9)
    for label, words in ((1, "generated images"), (0, "photographs")):
        ax.plot([], [], "o", color=COLOURS[label], label=words)
    ax.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


def main():
    models = HERE / "models"
    columns, model = load_features(models / "features.npz"), load_model(models / "baseline.joblib")
    rows = rows_of(columns, p_fake_of(model, columns["features"]))
    figure, ax = pyplot.subplots(figsize=(8, 0.26 * len(rows) + 1))
    draw(ax, rows, model["threshold"])
    figure.tight_layout()
    with atomic_write(HERE / "docs" / "sources.png") as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    main()
