"""What a threshold, or the two of a review queue, would do to a day of uploads.

    rows = operating_table(model, parts, uploads=1000, prevalences=(0.01,))
    rows = review_table(parts, (0.2, 0.9), uploads=1000, prevalences=(0.01,))

`parts` are {name: (labels int [n], probability of fake [n], groups [n])}. Each row is flat: texts,
numbers, and metrics {'value', 'interval', 'n'}. Thresholds come from the scores of the training
alone, so the images that are measured choose nothing.
"""

import numpy as np

from detector.base.console import say
from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.evaluation import intervals, metrics
from detector.evaluation.report import known_rows
from detector.model.threshold import choose_review, choose_threshold, training_scores

RATES = (0.005, 0.01, 0.02, 0.05, 0.1)  # false positive rates of the table


def thresholds(model):
    """-> [(words, threshold)]: of each of RATES, and the model's own."""
    p_fake, labels, view, _ = training_scores(model)
    chosen = [(f"FPR {rate:g}", choose_threshold(p_fake, labels, rate, view)) for rate in RATES]
    return [*chosen, ("the model's own", model["threshold"])]


def at_threshold(part, threshold):
    """-> (share of the reals at or above the threshold, share of the fakes), with intervals."""
    labels, p_fake, groups = part
    return [
        intervals.share(p_fake[labels == label] >= threshold, groups[labels == label])
        for label in range(len(CLASSES))
    ]


def a_day(uploads, prevalence, reals, fakes):
    """Expected number of a day's uploads, from the shares of reals and of fakes that count.

    The interval adds the ends of both, so it is rather too wide.
    """

    def number(real, fake):
        return uploads * ((1 - prevalence) * real + prevalence * fake)

    ends = [number(*pair) for pair in zip(reals["interval"], fakes["interval"], strict=True)]
    return {"value": number(reals["value"], fakes["value"]), "interval": ends}


def parts_of(model, columns, p_fake, groups, words=""):
    """Columns of images and p_fake, groups [n] -> the parts in which both classes occur.

    Known sources and sources never seen are apart. Without named sources all images are one part.
    `words`: what was done to the images, for the names of the parts.
    """
    labels, named = columns["labels"].astype(int), columns["sources"] != ""
    known = known_rows(model, columns["sources"])
    masks = {"known sources": known & named, "sources never seen": ~known & named}
    if not named.any():
        masks = {"all": ~named}
    return {
        f"{name}{words}": (labels[mask], p_fake[mask], groups[mask])
        for name, mask in masks.items()
        if len(np.unique(labels[mask])) == 2
    }


NONE = {"value": 0.0, "interval": [0.0, 0.0], "n": 0}  # a share of images that do not count


def operating_table(model, parts, uploads, prevalences):
    """-> a row for each part with both classes, threshold and prevalence."""
    return [
        {
            "images": name,
            "rule": rule,
            "threshold": threshold,
            "prevalence": prevalence,
            "false_positives": reals,
            "caught": fakes,
            "precision": metrics.precision_at(prevalence, reals, fakes),
            "alarms": a_day(uploads, prevalence, reals, fakes),
            "false_alarms": a_day(uploads, prevalence, reals, NONE),
        }
        for name, part in parts.items()
        for rule, threshold in thresholds(model)
        for reals, fakes in [at_threshold(part, threshold)]
        for prevalence in prevalences
    ]


def review_table(parts, review, uploads, prevalences):
    """-> a row for each part with both classes and each prevalence.

    `queue`: images a day to review. `passed_fakes`, `rejected_reals`: shares of their class.
    `fakes_in_pass`, `reals_in_reject`: shares of the images that pass, or are rejected.
    """
    rows = []
    for name, part in parts.items():
        above_low, above_high = (at_threshold(part, threshold) for threshold in review)
        between = [
            intervals.share((p >= review[0]) & (p < review[1]), groups)
            for p, groups in ((part[1][part[0] == i], part[2][part[0] == i]) for i in (0, 1))
        ]
        passed = [metrics.complement(share) for share in above_low]
        for prevalence in prevalences:
            rejected = metrics.precision_at(prevalence, *above_high)
            rows.append(
                {
                    "images": name,
                    "prevalence": prevalence,
                    "queue": a_day(uploads, prevalence, *between),
                    "passed_fakes": passed[1],
                    "rejected_reals": above_high[0],
                    "fakes_in_pass": metrics.precision_at(prevalence, *passed),
                    "reals_in_reject": metrics.complement(rejected),
                }
            )
    return rows


def tables(model, parts, review, uploads, prevalences):
    """-> the report's `operating` table, and with `review` (low, high) its `review` table."""
    days = uploads, prevalences
    return {
        "uploads_per_day": uploads,
        "operating": operating_table(model, parts, *days),
        "review": review
        and {"low": review[0], "high": review[1], "rows": review_table(parts, review, *days)},
    }


def unfit(limit, n, useful, nothing):
    """Why a threshold at the share `limit` of `n` images is of no use, or None.

    `useful`: share of the other class on its far side; `nothing`: the words for a share of 0.
    """
    if limit * n < 1:
        return f"{n} images are too few, it takes {int(np.ceil(1 / limit))}"
    return None if useful["value"] else nothing


def suggest_review(model, max_false_reject, max_missed):
    """-> (low, high), and says both rates. Raises UsageError where a limit cannot be had.

    Both thresholds come from the scores out of fold, on untouched images and on degraded copies.
    """
    p_fake, labels, view, groups = training_scores(model)
    review = choose_review(p_fake, labels, view, max_false_reject, max_missed)
    whole = slice(None) if view is None else view == 0
    part = labels[whole], p_fake[whole], groups[whole]
    rejected, caught = at_threshold(part, review[1])
    passed, missed = (metrics.complement(share) for share in at_threshold(part, review[0]))
    faults = [
        f"--{flag} {limit:g} ({problem})"
        for flag, limit, n, useful, nothing in (
            ("max_false_reject", max_false_reject, rejected["n"], caught, "it rejects no fake"),
            ("max_missed", max_missed, missed["n"], passed, "it passes no real image"),
        )
        if (problem := unfit(limit, n, useful, nothing))
    ]
    if faults:
        raise UsageError(f"this model cannot have {' nor '.join(faults)}; name a larger share")
    say(
        f"suggested: --review {review[0]:.4g} {review[1]:.4g}; out of fold this rejects"
        f" {intervals.words(rejected, 3)} of the reals and passes {intervals.words(missed, 3)} of"
        " the fakes"
    )
    return review
