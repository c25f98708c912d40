"""Run models over the same images, and compare two of them in a report."""

import json
from collections import namedtuple
from pathlib import Path

import numpy as np

from detector.base.console import all_printable, say
from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.base.files import atomic_folder, check_folder, read_bytes
from detector.evaluation import assess, paired, pictures, report
from detector.features.columns import COLUMNS, distinct
from detector.images.distort import CONDITIONS
from detector.images.facts import make_groups, twin_clusters
from detector.images.folders import draw_evenly
from detector.model.file import load_model
from detector.model.score import p_fake_of
from detector.verdict import Detector

# columns: of the labelled images, each once; p_fake: float64 [n]; detector: None without pictures
Judged = namedtuple("Judged", "model detector columns p_fake")
# p_fake: float64 [2, n]; right: are the verdicts right, bool [2, n]; kind: name of the groups
Pair = namedtuple("Pair", "columns labels p_fake thresholds right twins groups kind")
SOCIAL = "social media", "both, one after the other"  # of CONDITIONS
SOCIAL_IMAGES = 1000  # drawn with a fixed seed
SHEET = "disagreements.png"


# ---- the same images through both ----


def judge_images(paths, data_dir=None, features_files=None, device="auto"):
    """Model files, a folder or a features file for each -> ([Judged], number of unreadable files).

    A folder is encoded once for each encoder.
    """
    judged, tables = [], {}
    for path, features in zip(paths, features_files or [None] * len(paths), strict=True):
        model = load_model(path)
        detector = Detector(path, device, model=model) if data_dir else None
        key = features, model["encoder"]["identity"], model.get("crops", 0)
        if key not in tables:
            tables[key] = assess.columns_of(detector, model, data_dir, features, None)
        columns = tables[key][0]
        rows = distinct(columns, np.flatnonzero((columns["labels"] >= 0) & (columns["view"] == 0)))
        columns = {name: columns[name][rows] for name in COLUMNS}
        judged.append(Judged(model, detector, columns, p_fake_of(model, columns["features"])))
    return judged, max(unreadable for _, unreadable in tables.values())


def pair(judged):
    """Two Judged -> Pair of the images that both have, and that trained neither model or encoder.

    Raises UsageError unless both classes are left.
    """
    rows = [assess.split_rows(one.columns, one.model, [])[0] for one in judged]
    names = [
        np.char.add(one.columns["sha256"], one.columns["labels"].astype(str))[kept]
        for one, kept in zip(judged, rows, strict=True)
    ]
    _, first, second = np.intersect1d(*names, assume_unique=True, return_indices=True)
    rows = rows[0][first], rows[1][second]
    columns = {name: judged[0].columns[name][rows[0]] for name in COLUMNS}
    labels, thresholds = columns["labels"].astype(int), [one.model["threshold"] for one in judged]
    if alone := sum(map(len, names)) - 2 * len(labels):
        say(f"left out: {alone} images that only one of the models can be judged on")
    if len(np.unique(labels)) < 2:
        raise UsageError(
            f"{len(labels)} images are left that both models can be judged on, not of both classes:"
            " name labelled images that trained neither"
        )
    p_fake = np.stack([one.p_fake[kept] for one, kept in zip(judged, rows, strict=True)])
    scored = labels, p_fake, thresholds, paired.verdicts_right(labels, p_fake, thresholds)
    twins = twin_clusters(columns["thumb"], columns["sha256"])
    return Pair(columns, *scored, twins, *make_groups(columns, twins))


# ---- the report ----


def source_rows(images):
    """Pair -> a row of accuracy for each named source, the largest loss of model b first."""
    sources, rows = images.columns["sources"], []
    for source in np.setdiff1d(sources, [""]):
        own = sources == source
        data = images.labels[own], images.p_fake[:, own], images.thresholds, images.twins[own]
        rows += paired.measure(*data, str(source), drawn=False)
    return sorted(rows, key=lambda row: (row["difference"]["value"], -row["n"]))


def social_rows(judged, images, data_dir):
    """-> rows of all metrics on images that passed the social-media chain."""
    (chain,) = (change for *name, change in CONDITIONS if tuple(name) == SOCIAL)
    strata = list(zip(images.labels.tolist(), images.columns["sources"].tolist(), strict=True))
    rows = draw_evenly(strata, SOCIAL_IMAGES)
    drawn = {name: images.columns[name][rows] for name in ("paths", "labels", "sha256")}
    for one in judged:
        pictures.announce(
            one.detector, 2 * len(rows), "the social-media chain", "--features_files leaves it out"
        )
    p_fake = np.stack(
        [pictures.changed(one.detector, data_dir, drawn, [(chain, chain)])[:, 1] for one in judged]
    )
    labels, groups = images.labels[rows], images.groups[rows]
    return paired.measure(labels, p_fake, images.thresholds, groups, SOCIAL[0])


def disagreements(images):
    """Pair -> images with two verdicts, SHOWN of each class: [{path, label, a, b}].

    The largest distance of both probabilities of fake comes first.
    """
    order = np.argsort(-np.abs(images.p_fake[1] - images.p_fake[0]), kind="stable")
    order = order[images.right[0, order] != images.right[1, order]]
    return [
        {
            "path": str(images.columns["paths"][i]),
            "label": CLASSES[label],
            **dict(zip("ab", images.p_fake[:, i].round(4).tolist(), strict=True)),
        }
        for label in (0, 1)
        for i in order[images.labels[order] == label][: assess.SHOWN]
    ]


def describe(models, judged, images, data_dir):
    """-> the content of the report. `data_dir`: None without pictures."""
    decided = paired.judge(images.labels, images.right, images.groups)
    return {
        **dict(zip("ab", (report.about(one.model) for one in judged), strict=True)),
        "files": models,
        "groups": images.kind,
        "rows": [
            *paired.measure(images.labels, images.p_fake, images.thresholds, images.groups),
            *(social_rows(judged, images, data_dir) if data_dir else ()),
        ],
        "sources": source_rows(images),
        "disagreements": disagreements(images),
        "judged": decided,
        "sentence": paired.sentence(decided, *models),
        "without_pictures": not data_dir,
    }


def fill(place, content):
    """Write comparison.json, .csv and .html, which holds the sheet if any -> text to print."""
    rows, names = content["rows"] + content["sources"], "images metric n a b better only_a only_b p"
    sheet = {path.stem: path.read_bytes() for path in place.glob(SHEET)}
    texts = {
        "comparison.html": report.render("comparison.html", content, sheet),
        "comparison.json": json.dumps(content, indent=1),
    }
    tables = {"comparison.csv": report.csv_table(rows, names.split(), ["difference"])}
    report.write(place, tables, texts)
    return report.render("comparison.txt", content)


def compare(models, data_dir=None, features_files=None, report_dir="comparison", device="auto"):
    """The flags of compare.py -> (text to print, number of unreadable files).

    Writes the report. Raises DetectorError.
    """
    if read_bytes(models[0]) == read_bytes(models[1]):
        raise UsageError(f"{models[0]} and {models[1]} are the same model: name two")
    check_folder(report_dir, f"--report_dir {report_dir}")
    judged, unreadable = judge_images(models, data_dir, features_files, device)
    images = pair(judged)
    content = describe(models, judged, images, data_dir)
    with atomic_folder(report_dir, [SHEET]) as place:
        if data_dir:
            entries, caption = content["disagreements"], "{label}: a {a:.2f}, b {b:.2f}"
            pictures.contact_sheet(data_dir, images.columns, entries, place / SHEET, caption)
        text = fill(place, all_printable(content))
    return f"{text}report in {Path(report_dir)}/", unreadable
