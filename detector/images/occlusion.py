"""Hide parts of the encoder's input in turn, to see which parts moved a score.

    hidden = occluded(pixels)            # float32 [PASSES - 1, 3, r, r]
    rows = cell_means(score - scores)    # float64 [CELLS, CELLS]

After M. Zeiler and R. Fergus, "Visualizing and Understanding Convolutional Networks" (2014).
"""

import numpy as np

CELLS, WINDOW = 7, 3  # the map's cells a side, and the cells a side that are hidden at a time
WINDOWS = [(y, x) for y in range(CELLS - WINDOW + 1) for x in range(CELLS - WINDOW + 1)]
PASSES = 1 + len(WINDOWS)  # the picture as it is, and each window hidden
MEANING = "This map shows what the model looked at. It proves nothing about the picture."


def occluded(pixels):
    """float32 [3, r, r] -> float32 [PASSES - 1, 3, r, r], each with a window in the mean colour."""
    edges = np.arange(CELLS + 1) * pixels.shape[-1] // CELLS
    copies = np.repeat(pixels[None], len(WINDOWS), axis=0)
    for copy, (y, x) in zip(copies, WINDOWS, strict=True):
        rows, columns = (slice(edges[i], edges[i + WINDOW]) for i in (y, x))
        copy[:, rows, columns] = pixels.mean((1, 2), keepdims=True)
    return copies


def cell_means(values):
    """Values of the windows, float64 [PASSES - 1] -> float64 [CELLS, CELLS].

    A cell has the mean of the windows that cover it.
    """
    sums, counts = np.zeros((2, CELLS, CELLS))
    for value, (y, x) in zip(values, WINDOWS, strict=True):
        window = slice(y, y + WINDOW), slice(x, x + WINDOW)
        sums[window] += value
        counts[window] += 1
    return sums / counts
