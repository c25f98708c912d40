"""Hide parts of the encoder's input in turn, to see which parts moved a score.

    hidden = occluded(pixels)            # float32 [PASSES - 1, 3, r, r]
    rows = cell_means(score - scores)    # float64 [CELLS, CELLS]

After M. Zeiler and R. Fergus, "Visualizing and Understanding Convolutional Networks" (2014).
"""

import numpy as np

CELLS, WINDOW = 7, 3  # the map's cells a side, and the cells a side that are hidden at a time
SPANS = np.array(
    [[0 <= cell - first < WINDOW for cell in range(CELLS)] for first in range(CELLS - WINDOW + 1)]
)
# every place of the window, bool [PASSES - 1, CELLS, CELLS]
WINDOWS = (SPANS[:, None, :, None] & SPANS[:, None]).reshape(-1, CELLS, CELLS)
PASSES = 1 + len(WINDOWS)  # the picture as it is, and each window hidden
MEANING = "This map shows what the model looked at. It proves nothing about the picture."


def occluded(pixels):
    """float32 [3, r, r] -> float32 [PASSES - 1, 3, r, r], each with a window in the mean colour."""
    cell = np.arange(pixels.shape[-1]) * CELLS // pixels.shape[-1]  # of each row or column
    hidden = WINDOWS[:, None, cell[:, None], cell]
    return np.where(hidden, pixels.mean((1, 2), keepdims=True), pixels)


def cell_means(values):
    """Values of the windows, float64 [PASSES - 1] -> float64 [CELLS, CELLS].

    A cell has the mean of the windows that cover it.
    """
    return np.tensordot(values, WINDOWS, 1) / WINDOWS.sum(0)
