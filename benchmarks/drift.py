"""How many uploads until drift shows: a stream of known sources, then of one source that the model has never seen.

    python -m benchmarks.drift > benchmarks/drift.md

Stored features stand in for uploads (drawn with replacement: the sources are small), `telemetry.Drift` and the population
stability index of deploy/prometheus-rules.yaml do what they do in the service. The bars are those of the alerts there.
"""

import argparse
from pathlib import Path

import numpy as np

from detector.features.file import load_features
from detector.model.file import load_model
from detector.model.score import decision
from detector.service.telemetry import BINS, Drift

MODELS = Path(__file__).resolve().parent.parent / "models"
KNOWN, STREAM, DRAWS = 1000, 1000, 20  # uploads before, uploads of the new source, repetitions
PSI_BAR, DISTANCE_BAR, LEAST = 0.25, 0.3, 200  # the index is not looked at below so many verdicts
SMALL = 0.0001  # stands in for an empty bin's share, as in the recording rule


def psi(counts, reference):
    share, reference = np.maximum(counts / counts.sum(), SMALL), np.maximum(reference, SMALL)
    return float(((share - reference) * np.log(share / reference)).sum())


def stream(model, scores, features, rows, rng):
    """Rows of uploads one after the other -> (PSI of the last LEAST verdicts, distance) after each tenth upload."""
    drift, bins, found = Drift(model), [], []
    for number, row in enumerate(rows, 1):
        drift.add(features[row])
        bins.append(drift.bin(scores[row]))
        if number % 10 == 0:
            counts = np.bincount(bins[-LEAST:], minlength=BINS)
            found.append(
                (psi(counts, drift.reference) if number >= LEAST else 0.0, drift.distance())
            )
    return np.array(found)


def first_above(values, bar):
    """Uploads of the new source until a value first lies above the bar, or nan."""
    above = np.flatnonzero(values > bar)
    return 10 * (above[0] + 1) if len(above) else np.nan


def main(argv=None):
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(argv)
    columns, model = load_features(MODELS / "features.npz"), load_model(MODELS / "baseline.joblib")
    scores, rng = decision(model, columns["features"]), np.random.default_rng(0)
    whole = columns["view"] == 0
    known = np.flatnonzero(whole & (columns["splits"] == "test"))
    external = whole & (columns["splits"] == "external")
    print(
        f"{KNOWN} uploads like `test` ({len(known)} images), then {STREAM} of one source of"
        f" `external`; medians of {DRAWS} draws, encoder `{model['encoder']['name']}`. Thresholds:"
        f" PSI {PSI_BAR} over the last {LEAST} verdicts, distance {DISTANCE_BAR}.\n"
    )
    quiet = np.concatenate(
        [
            stream(model, scores, columns["features"], rng.choice(known, KNOWN), rng)[20:]
            for _ in range(DRAWS)
        ]
    )
    print(
        f"Known sources alone: PSI {np.median(quiet[:, 0]):.2f} (99% below"
        f" {np.quantile(quiet[:, 0], 0.99):.2f}), distance {np.median(quiet[:, 1]):.2f} (99% below"
        f" {np.quantile(quiet[:, 1], 0.99):.2f}).\n"
    )
    print(
        "| then only | images | PSI at the end | shown after | distance at the end | shown after"
        " |\n|---|---|---|---|---|---|"
    )
    sources, labels, test = (
        columns["sources"],
        columns["labels"],
        whole & (columns["splits"] == "test"),
    )
    largest = max(np.unique(sources[test]), key=lambda source: (test & (sources == source)).sum())
    streams = {
        "known: the reals of `test`": test & (labels == 0),
        "known: the fakes of `test`": test & (labels == 1),
        f"known: {largest}": test & (sources == largest),
        **{
            f"new: {source}": external & (sources == source)
            for source in np.unique(sources[external])
        },
    }
    for name, mask in streams.items():
        own = np.flatnonzero(mask)
        after = np.stack(
            [
                stream(
                    model,
                    scores,
                    columns["features"],
                    np.concatenate([rng.choice(known, KNOWN), rng.choice(own, STREAM)]),
                    rng,
                )[KNOWN // 10 :]
                for _ in range(DRAWS)
            ]
        )
        kinds = "/".join(sorted({("real", "fake")[label] for label in labels[own]}))
        cells = [
            f"{np.median(after[:, -1, 0]):.2f}",
            f"{np.median([first_above(a[:, 0], PSI_BAR) for a in after]):.0f}",
            f"{np.median(after[:, -1, 1]):.2f}",
            f"{np.median([first_above(a[:, 1], DISTANCE_BAR) for a in after]):.0f}",
        ]
        print(
            f"| {name} ({kinds}) | {len(own)} | {' | '.join(cells)} |".replace("nan", "not"),
            flush=True,
        )


if __name__ == "__main__":
    main()
