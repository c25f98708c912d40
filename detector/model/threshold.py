"""Probability -> verdict and decision: threshold, 'uncertain' band, and how both are chosen."""

import numpy as np

from detector.base.constants import CLASSES
from detector.model.score import probability

DECISIONS = ("pass", "review", "reject")


def verdict(model, p_fake):
    """Probability of fake -> ('real' | 'fake', probability of that class to four places).

    With a threshold other than 0.5 the confidence may be below 0.5.
    """
    fake = bool(p_fake >= model["threshold"])
    return CLASSES[fake], round(float(p_fake if fake else 1 - p_fake), 4)


def decide(p_fake, review):
    """Probability of fake, (low, high) -> 'pass' below low, 'reject' from high on, else 'review'.

    None without `review`.
    """
    return review and DECISIONS[int(p_fake >= review[0]) + int(p_fake >= review[1])]


def outside(p_fake, band):
    """Probabilities [n], band [low, high] -> bool [n]. Inside the band a verdict is 'uncertain'."""
    return (p_fake < band[0]) | (p_fake > band[1])


# ---- threshold and band, from out-of-fold probabilities ----


def choose_threshold(p_fake, labels, max_fpr=None, view=None, given=0.5):
    """Out-of-fold probabilities, labels, views [n] -> the threshold.

    Without `max_fpr` it is `given`. Else it is the lowest threshold that calls at most that share
    of the real images fake. It lies halfway between two of them. The share holds for untouched
    images and for degraded copies, each on their own.
    """
    if max_fpr is None:
        return given
    if view is not None and (view > 0).any():
        return max(
            choose_threshold(p_fake[mask], labels[mask], max_fpr) for mask in (view == 0, view > 0)
        )
    real = np.sort(p_fake[labels == 0])[::-1]
    allowed = int(np.floor(max_fpr * len(real) + 1e-9))
    # the highest probability that must not be called fake
    edge = real[allowed] if allowed < len(real) else 0.0
    above = real[real > edge].min(initial=1.0)
    return float(max((edge + above) / 2, np.nextafter(edge, 2)))


def choose_review(p_fake, labels, view, max_false_reject, max_missed):
    """Out-of-fold probabilities, labels, views [n] -> (low, high) of `decide`.

    At most the share `max_false_reject` of the reals lies at `high` or above, and at most
    `max_missed` of the fakes below `low`. Where a single threshold does both, low equals high.
    """
    high = choose_threshold(p_fake, labels, max_false_reject, view)
    low = 1 - choose_threshold(1 - p_fake, 1 - labels, max_missed, view)
    return min(low, high), high


def training_scores(model):
    """-> (out-of-fold probabilities float64, labels, views, groups) [n] of the training rows.

    A model of an earlier version states no groups. Each row is then a group of its own.
    """
    stored = model["out_of_fold"]
    p_fake = probability(model, stored["scores"].astype(np.float64))
    groups = stored.get("groups", np.arange(len(p_fake)))
    return p_fake, stored["labels"].astype(int), stored.get("view"), groups


def choose_band(p_fake, labels, threshold, error):
    """Out-of-fold probabilities -> [low, high], float64: between them a verdict is 'uncertain'.

    Split conformal prediction for each class (Vovk, Gammerman and Shafer 2005). Of new images like
    these, about the share `error` of the reals lies above `high`, and of the fakes below `low`.
    The share would be an upper bound for a single classifier. Here the classifiers of several folds
    stand for the final one (Barber et al. 2021). The band always holds the threshold, so that a
    verdict outside the band never contradicts it.
    """

    def quantile(scores):
        rank = int(np.ceil((len(scores) + 1) * (1 - error)))
        return np.sort(scores)[rank - 1] if rank <= len(scores) else 1.0

    ends = quantile(p_fake[labels == 0]), 1 - quantile(1 - p_fake[labels == 1])
    return np.array([min(*ends, threshold), max(*ends, threshold)], np.float64)


def stale_threshold(model):
    """None if threshold and band follow from the stored scores and rule, else the difference."""
    rule, (p_fake, labels, view, _) = model["threshold_rule"], training_scores(model)
    threshold = choose_threshold(p_fake, labels, rule.get("max_fpr"), view, rule.get("given", 0.5))
    if abs(threshold - model["threshold"]) > 1e-6:
        return (
            f"its threshold is {model['threshold']:.6g}, its own scores and rule give"
            f" {threshold:.6g}"
        )
    band = choose_band(p_fake, labels, threshold, rule["band_error"])
    if np.abs(band - model["band"]).max() > 1e-6:
        return (
            f"its band is {model['band'].round(6).tolist()}, its own scores and rule give"
            f" {band.round(6).tolist()}"
        )
    return None
