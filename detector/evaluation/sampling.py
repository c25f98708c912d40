"""Draw images to label, and estimate the figures of a whole folder from the labelled draw.

    probabilities = inclusion(closeness, 300)           # float64 [n], sums to 300
    rows = draw(probabilities, seed)                    # sorted row numbers
    figures = estimates(labels, fake, probabilities[rows], images)

Half of the draw is chance, and half prefers scores near the threshold. Each image keeps the
probability that it is drawn. The estimates weigh each image by the inverse, so the preference does
not bias them (Horvitz and Thompson 1952).
"""

import numpy as np

from detector.evaluation import intervals
from detector.evaluation.metrics import logit

CHANCE = 0.5  # share of the draw that ignores the scores
QUESTIONS = {
    "accuracy": "verdicts that are right",
    "false_positive_rate": "real images called fake",
    "prevalence": "images that are fake",
    "precision": "images called fake that are fake",
}


def closeness(p_fake, threshold):
    """Probabilities of fake [n] -> weights [n] in (0, 1], 1 at the threshold, falling in logits."""
    return np.exp(-np.abs(logit(p_fake) - logit(threshold)))


def inclusion(weights, number):
    """Weights [n] -> probability of each row in a draw of `number`, float64 [n]; 1 where it fits.

    A mix of chance and of the weights. A row whose share is above 1 is certain, and the others
    share the rest.
    """
    share = CHANCE / len(weights) + (1 - CHANCE) * weights / weights.sum()
    certain = np.full(len(weights), len(weights) <= number)
    while True:
        rest = share[~certain].sum()
        drawn = (number - certain.sum()) * share / rest if rest else share
        probabilities = np.where(certain, 1.0, drawn)
        if (probabilities <= 1).all():
            return probabilities
        certain |= probabilities > 1


def draw(probabilities, seed):
    """Probabilities [n] that sum to a whole number -> so many sorted row numbers.

    Systematic sampling of a random order (Madow 1949): each row is drawn with its probability.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(probabilities))
    ends = np.floor(np.cumsum(probabilities[order]) + rng.random())
    return np.sort(order[np.diff(ends, prepend=0) > 0])


def ratio(part, whole, probabilities):
    """Estimate sum(part) / sum(whole) over all images from drawn rows [n] -> {value, interval, n}.

    `part` and `whole` count the images of a row. The variance is Hajek's (1964) for draws of a
    fixed number, of the linearised ratio. The interval is Wilson's for the number of independent
    images that would have this variance (Korn and Graubard 1998). `n`: rows that count.
    """
    weights, n = 1 / probabilities, int((whole > 0).sum())
    total = (weights * whole).sum()
    if not n:
        return {"value": None, "interval": [0.0, 1.0], "n": 0}
    value = float((weights * part).sum() / total)
    error, missed = weights * (part - value * whole), 1 - probabilities
    centre = (missed * error).sum() / max(missed.sum(), 1e-12)
    variance = (missed * (error - centre) ** 2).sum() * len(part) / max(len(part) - 1, 1) / total**2
    worth = total**2 / ((weights * whole) ** 2).sum()
    if variance and 0 < value < 1:
        worth = value * (1 - value) / variance
    return {"value": value, "interval": intervals.wilson(value * worth, worth), "n": n}


def estimates(labels, fake, probabilities, images):
    """Labels and verdicts [n] of drawn rows, the probabilities and numbers of images [n] of each.

    -> {name of QUESTIONS: {value, interval, n, more: labels that would halve the interval}}
    """
    fake, real, everything = fake == 1, labels == 0, np.ones(len(labels), bool)
    questions = {
        "accuracy": (fake == ~real, everything),
        "false_positive_rate": (fake & real, real),
        "prevalence": (~real, everything),
        "precision": (fake & ~real, fake),
    }
    # The variance falls as 1 / n - 1 / N. A quarter of it halves the interval.
    n, whole = len(labels), (1 / probabilities).sum()
    more = int(np.ceil(1 / (1 / whole + (1 / n - 1 / whole) / 4) - n))
    return {
        name: ratio(part * images, of * images, probabilities) | {"more": more}
        for name, (part, of) in questions.items()
    }


def kappa(first, second):
    """Labels [n] of the same images by two people -> Cohen's kappa (1960), {value, interval, n}.

    The value is None where chance alone would make them agree.
    """
    words, both = np.unique([first, second], return_inverse=True)
    both = both.reshape(2, -1)
    n = both.shape[1]

    def of(weight):
        """Weight [b, n] -> kappa [b]."""
        total = weight.sum(axis=1)
        agreed = (weight * (both[0] == both[1])).sum(axis=1) / total
        shares = [
            [(weight * (own == k)).sum(axis=1) / total for k in range(len(words))] for own in both
        ]
        chance = sum(a * b for a, b in zip(*shares, strict=True))
        with np.errstate(invalid="ignore", divide="ignore"):
            return (agreed - chance) / (1 - chance)

    value = float(of(np.ones((1, n)))[0])
    value = value if np.isfinite(value) else None
    drawn = np.concatenate([of(weight) for weight in intervals.draw_groups(np.arange(n))])
    return {"value": value, "interval": intervals.interval(value, drawn, n, -1.0, 1.0), "n": n}


def lines(figures):
    """Figures of `estimates` as text."""
    n, more = (figures["accuracy"][name] for name in ("n", "more"))
    return [
        f"the whole folder, estimated from {n} labels ({more} more would halve the intervals):",
        *(f"  {text:36}{intervals.words(figures[name], 3)}" for name, text in QUESTIONS.items()),
    ]
