"""Probability -> verdict: the threshold, the 'uncertain' band, and how both are chosen."""

import numpy as np

from detector.base.constants import CLASSES
from detector.model.score import probability


def verdict(model, p_fake):
    """Probability of fake -> ('real' | 'fake', calibrated probability of that class, rounded to four places).

    With a threshold other than 0.5 the confidence may be below 0.5.
    """
    fake = bool(p_fake >= model["threshold"])
    return CLASSES[fake], round(float(p_fake if fake else 1 - p_fake), 4)


def outside(p_fake, band):
    """Band [low, high] -> boolean [n]: a verdict is given; inside the band the answer is 'uncertain'."""
    return (p_fake < band[0]) | (p_fake > band[1])


# ---- threshold and band, from out-of-fold probabilities ----


def choose_threshold(p_fake, labels, max_fpr=None, view=None):
    """Out-of-fold probabilities, labels, views [n] -> the threshold: 0.5, or with `max_fpr` the lowest one at which at most
    that share of the real images is called fake (halfway between two of them), untouched and, where there are any,
    degraded copies each on their own."""
    if max_fpr is None:
        return 0.5
    if view is not None and (view > 0).any():
        return max(
            choose_threshold(p_fake[mask], labels[mask], max_fpr) for mask in (view == 0, view > 0)
        )
    real = np.sort(p_fake[labels == 0])[::-1]
    allowed = int(np.floor(max_fpr * len(real) + 1e-9))
    edge = real[allowed] if allowed < len(real) else 0.0  # the highest that must not be called fake
    above = real[real > edge].min(initial=1.0)
    return float(max((edge + above) / 2, np.nextafter(edge, 2)))


def choose_band(p_fake, labels, threshold, error):
    """Out-of-fold probabilities -> [low, high], float64: between them the answer is 'uncertain'.

    Split conformal prediction for each class (Vovk, Gammerman and Shafer 2005): of new images like these, about the share
    `error` of the reals lies above `high`, of the fakes below `low` ("at most" for one classifier; the scores of several
    folds stand for the final one here, Barber et al. 2021). Widened to hold the threshold, so that a verdict outside
    the band never contradicts it.
    """

    def quantile(scores):
        rank = int(np.ceil((len(scores) + 1) * (1 - error)))
        return np.sort(scores)[rank - 1] if rank <= len(scores) else 1.0

    ends = quantile(p_fake[labels == 0]), 1 - quantile(1 - p_fake[labels == 1])
    return np.array([min(*ends, threshold), max(*ends, threshold)], np.float64)


def stale_threshold(model):
    """What of a model's threshold or band does not follow from its own out-of-fold scores and rule, in words, or None."""
    stored, rule = model["out_of_fold"], model["threshold_rule"]
    p_fake, labels = probability(model, stored["scores"].astype(np.float64)), stored["labels"]
    threshold = choose_threshold(p_fake, labels, rule.get("max_fpr"), stored.get("view"))
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
