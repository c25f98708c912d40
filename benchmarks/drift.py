"""How many uploads until drift shows: a stream of known sources, then of one source never seen.

    python -m benchmarks.drift > benchmarks/drift.md

Stored features stand in for uploads. They are drawn with replacement, because the sources are
small. `telemetry.Drift` and the population stability index (PSI) of deploy/prometheus-rules.yaml
work as in the service. The thresholds are those of its alerts.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import heading, row
from detector.base.constants import CLASSES
from detector.features.file import load_features
from detector.model.file import load_model
from detector.model.score import decision
from detector.service.telemetry import BINS, Drift

MODELS = Path(__file__).resolve().parent.parent / "models"
KNOWN, STREAM, DRAWS = 1000, 1000, 20  # uploads before, uploads of the new source, repetitions
PSI_THRESHOLD, DISTANCE_THRESHOLD = 0.25, 0.3
LEAST = 200  # verdicts that the index needs
SMALL = 0.0001  # stands in for an empty bin's share, as in the recording rule


def psi(counts, reference):
    share, reference = np.maximum(counts / counts.sum(), SMALL), np.maximum(reference, SMALL)
    return float(((share - reference) * np.log(share / reference)).sum())


def stream(model, scores, features, rows):
    """Rows of uploads in order -> (PSI of the last LEAST verdicts, distance), float [n/10, 2].

    Measured after each tenth upload.
    """
    drift, bins, measured = Drift(model), [], []
    for number, upload in enumerate(rows, 1):
        drift.add(features[upload])
        bins.append(drift.bin(scores[upload]))
        if number % 10 == 0:
            counts = np.bincount(bins[-LEAST:], minlength=BINS)
            index = psi(counts, drift.reference) if number >= LEAST else 0.0
            measured.append((index, drift.distance()))
    return np.array(measured)


def first_above(values, threshold):
    """Uploads of the new source until a value first lies above the threshold, or nan."""
    above = np.flatnonzero(values > threshold)
    return 10 * (above[0] + 1) if len(above) else np.nan


def streams_of(columns):
    """{name: mask of the rows}: both classes and the largest source of `test`, then `external`."""
    sources, labels, whole = columns["sources"], columns["labels"], columns["view"] == 0
    test, external = (whole & (columns["splits"] == split) for split in ("test", "external"))
    largest = max(np.unique(sources[test]), key=lambda source: (test & (sources == source)).sum())
    streams = {
        "known: the reals of `test`": test & (labels == 0),
        "known: the fakes of `test`": test & (labels == 1),
        f"known: {largest}": test & (sources == largest),
    }
    for source in np.unique(sources[external]):
        streams[f"new: {source}"] = external & (sources == source)
    return streams


def print_quiet(index, distance):
    """The figures while only known sources are uploaded."""
    print(
        f"Known sources alone: PSI {np.median(index):.2f} (99% below"
        f" {np.quantile(index, 0.99):.2f}), distance {np.median(distance):.2f} (99% below"
        f" {np.quantile(distance, 0.99):.2f}).\n"
    )


def print_row(name, labels, measured):
    """A stream's row. `measured`: float [draws, n/10, 2] since the stream began."""
    cells = []
    for k, threshold in enumerate((PSI_THRESHOLD, DISTANCE_THRESHOLD)):
        uploads = np.median([first_above(draw[:, k], threshold) for draw in measured])
        cells += [
            f"{np.median(measured[:, -1, k]):.2f}",
            "not" if np.isnan(uploads) else f"{uploads:.0f}",
        ]
    classes = "/".join(sorted({CLASSES[label] for label in labels}))
    row(f"{name} ({classes})", len(labels), *cells)


def main(argv=None):
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(argv)
    columns, model = load_features(MODELS / "features.npz"), load_model(MODELS / "baseline.joblib")
    features, rng = columns["features"], np.random.default_rng(0)
    watch = partial(stream, model, decision(model, features), features)
    known = np.flatnonzero((columns["view"] == 0) & (columns["splits"] == "test"))
    print(
        f"{KNOWN} uploads like `test` ({len(known)} images), then {STREAM} of one source of"
        f" `external`; medians of {DRAWS} draws, encoder `{model['encoder']['name']}`. Thresholds:"
        f" PSI {PSI_THRESHOLD} over the last {LEAST} verdicts, distance {DISTANCE_THRESHOLD}.\n"
    )
    quiet = [watch(rng.choice(known, KNOWN))[LEAST // 10 :] for _ in range(DRAWS)]
    print_quiet(*np.concatenate(quiet).T)
    shown = "shown after"
    heading("then only", "images", "PSI at the end", shown, "distance at the end", shown)
    for name, mask in streams_of(columns).items():
        own, measured = np.flatnonzero(mask), []
        for _ in range(DRAWS):
            uploads = np.concatenate([rng.choice(known, KNOWN), rng.choice(own, STREAM)])
            measured.append(watch(uploads)[KNOWN // 10 :])
        print_row(name, columns["labels"][own], np.stack(measured))


if __name__ == "__main__":
    main()
