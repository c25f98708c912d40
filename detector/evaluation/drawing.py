"""Draw images of a folder and lay them out for people to label."""

import json
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from detector.base.console import say
from detector.base.errors import UsageError
from detector.base.files import atomic_folder, read_bytes, sha256
from detector.evaluation import sampling
from detector.evaluation.feedback import hashes_of
from detector.evaluation.pictures import encode_folder, read_picture
from detector.images.facts import twin_clusters
from detector.images.folders import list_images
from detector.model.file import trained_on
from detector.model.score import p_fake_of

TEMPLATE = Path(__file__).with_name("templates") / "labelling.html"
SIDE = 1600  # pixels of the long side of a picture on the page


def draw_sample(detector, data_dir, number, output_dir, seed=0, logs=None):
    """Draw `number` images and write index.html and their pictures -> a line on the result.

    `logs`: logs of the service; only files whose verdicts they hold are drawn from. Twins are one
    image of the draw. Raises UsageError.
    """
    columns, unreadable = candidates(detector, data_dir, logs)
    cluster = twin_clusters(columns["thumb"], columns["sha256"])
    _, first, images = np.unique(cluster, return_index=True, return_counts=True)
    p_fake = p_fake_of(detector.model, columns["features"][first])
    closeness = sampling.closeness(p_fake, detector.model["threshold"])
    probabilities = sampling.inclusion(closeness, number)
    rows = np.random.default_rng(seed).permutation(sampling.draw(probabilities, seed))
    drawn = [
        {
            "path": str(columns["paths"][first[row]]),
            "sha256": str(columns["sha256"][first[row]]),
            "probability": float(probabilities[row]),
            "images": int(images[row]),
        }
        for row in rows
    ]
    lay_out(data_dir, drawn, output_dir)
    total = f"{len(first)} different images of {len(cluster)}"
    return f"{Path(output_dir, 'index.html')}: {len(drawn)} of {total}", unreadable


def candidates(detector, data_dir, logs):
    """-> (columns of the images to draw from, number of unreadable files). Raises UsageError."""
    entries = list_images(data_dir, unlabelled=True)
    if logs:
        known = hashes_of(logs)
        files = (Path(data_dir, entry.path) for entry in entries)
        entries = [
            entry
            for entry, path in zip(entries, files, strict=True)
            if path.is_file() and sha256(read_bytes(path)) in known
        ]
        if not entries:
            raise UsageError(f"--log: no file of {data_dir} has a verdict there")
    columns, unreadable = encode_folder(detector, data_dir, entries)
    trained = trained_on(detector.model, columns["sha256"])
    if trained.any():
        say(f"left out: {trained.sum()} images that trained the model")
    if trained.all():
        raise UsageError(
            f"--data_dir {data_dir}: no readable image is left that did not train the model; name"
            " a folder of uploads"
        )
    return {name: values[~trained] for name, values in columns.items()}, unreadable


def lay_out(data_dir, drawn, output_dir):
    """Write the page and a JPEG of each drawn image. Its names and order tell no score."""
    draw = sha256(json.dumps(drawn).encode())[:16]
    with atomic_folder(output_dir) as place:
        for number, image in enumerate(drawn, 1):
            picture = read_picture(data_dir, image["path"], image.pop("sha256"))
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            image["picture"] = f"{number:05d}.jpg"
            picture.save(place / image["picture"], quality=92)
        page = jinja2.Template(TEMPLATE.read_text(), autoescape=True)
        text = page.render(images=drawn, draw=draw, number=len(drawn))
        (place / "index.html").write_text(text)
