"""95% intervals that respect groups: of shares, and of bootstrapped metrics.

    share(right, groups)            # {"value": 0.82, "interval": [0.76, 0.86], "n": 330}
    words(share(right, groups))     # '0.82 [0.76, 0.86]'

Images of one group (a source, copies of one picture) are not independent. Shares get Wilson's
interval for their effective number of images. All other metrics get a bootstrap interval that draws
whole groups.
"""

import numpy as np

# Resamples of a bootstrap. Many images have narrow intervals and get fewer, but at least 200.
RESAMPLES = 1000


def wilson(successes, n):
    """95% interval of a share (Wilson 1927): [low, high]; [0, 1] where n is 0.

    `successes` and `n` may be fractions.
    """
    if n == 0:
        return [0.0, 1.0]
    z, p = 1.959964, successes / n
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    # The ends 0 and 1 are exact, without rounding errors.
    return [0.0 if successes == 0 else float(low), 1.0 if successes == n else float(high)]


def few(number):
    """The factor by which Student's t widens an interval of `number` groups; inf below two."""
    from scipy.special import stdtrit

    return float(stdtrit(number - 1, 0.975) / 1.959964) if number > 1 else np.inf


def effective(mask, groups):
    """Effective number of independent images for the mean of `mask` [n] in groups [n]; at most n.

    `mask` holds booleans, or -1, 0 and 1. The variance of the mean between groups, against that of
    independent images (Kish's design effect, used for intervals of shares by Korn and Graubard
    1998), with Student's t for few groups. Where all images agree there is no variance, and each
    group counts as one image.
    """
    _, group = np.unique(groups, return_inverse=True)
    n, number, p = len(mask), group.max() + 1, np.mean(mask)
    variance = np.mean(np.abs(mask)) - p * p
    if variance <= 0 or number == n:
        return number
    if number == 1:
        return 0
    between = between_groups(mask, group)
    return min(n, variance / between / few(number) ** 2) if between else n


def between_groups(mask, group):
    """Variance of the mean of `mask` [n], estimated between group numbers [n]."""
    number = group.max() + 1
    squares = (np.bincount(group, mask - np.mean(mask)) ** 2).sum()
    return squares * number / max(1, number - 1) / len(mask) ** 2


def share(mask, groups=None):
    """Boolean [n], groups [n] -> {'value', 'interval', 'n'}; value None where n is 0.

    Without `groups`, each image is a group of its own.
    """
    mask = np.asarray(mask)
    n, p = len(mask), float(np.mean(mask)) if len(mask) else None
    worth = n if groups is None or not n else effective(mask, np.asarray(groups))
    return {"value": p, "interval": wilson(p * worth if n else 0, worth), "n": n}


def draw_groups(groups, seed=0, block=50):
    """Yield float64 [block, n] arrays: how often a bootstrap draws each row of groups [n].

    There are RESAMPLES rows in all, or fewer for many images.
    """
    _, group = np.unique(groups, return_inverse=True)
    number, rng = int(group.max()) + 1, np.random.default_rng(seed)
    even = np.full(number, 1 / number)
    for _ in range(0, min(RESAMPLES, max(200, RESAMPLES * 5000 // len(group))), block):
        yield rng.multinomial(number, even, size=block).astype(float)[:, group]


def interval(value, drawn, number, bottom=0.0, top=1.0):
    """95% interval of `value` from its bootstrap `drawn` [resamples] over `number` groups, or None.

    A bootstrap of few groups is too narrow (Cameron, Gelbach and Miller 2008). The percentiles are
    therefore stretched by sqrt(g / (g - 1)) times Student's t over the normal, within
    [bottom, top]. Where all resamples agree, as at an AUC of 1, Wilson's interval for `number`
    groups is used.
    """
    drawn = drawn[np.isfinite(drawn)]
    if value is None or number < 2 or not len(drawn):
        return None
    low, high = np.percentile(drawn, [2.5, 97.5])
    # A bootstrap of calibration errors may lie wholly above the error.
    low, high = min(low, value), max(high, value)
    if high - low < 1e-9 and (bottom, top) == (0, 1) and value in (0, 1):
        return wilson(value * number, number)
    stretch = np.sqrt(number / (number - 1)) * few(number)
    return [
        float(max(bottom, value - stretch * (value - low))),
        float(min(top, value + stretch * (high - value))),
    ]


def groups_of_rarer_class(labels, groups):
    """Number of groups of the class with fewer groups, for an interval of both classes."""
    return min(len(np.unique(groups[labels == label])) for label in (0, 1))


def words(metric, digits=2):
    """'0.82 [0.76, 0.86]'; 'n/a' without a value, no brackets without interval, never '-0.00'."""
    if metric is None or metric["value"] is None:
        return "n/a"
    text, ends = f"{metric['value']:z.{digits}f}", metric.get("interval")
    return f"{text} [{ends[0]:z.{digits}f}, {ends[1]:z.{digits}f}]" if ends else text
