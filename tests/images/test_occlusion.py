"""Hidden windows of the encoder's input, and the map that their scores give."""

import numpy as np
import pytest

from detector.images.occlusion import CELLS, PASSES, WINDOW, cell_means, occluded


@pytest.mark.parametrize("side", [64, 224, 336])
def test_every_copy_hides_one_square_window_in_the_mean_colour(side):
    pixels = np.random.default_rng(0).normal(size=(3, side, side)).astype(np.float32)
    before, hidden = pixels.copy(), occluded(pixels)
    assert hidden.shape == (PASSES - 1, 3, side, side) and hidden.dtype == np.float32
    assert (pixels == before).all()
    changed = (hidden != pixels).all(1)
    sides = {tuple(np.ptp(np.argwhere(mask), axis=0) + 1) for mask in changed}
    exact = WINDOW * side / CELLS
    assert all(abs(length - exact) < 1 for pair in sides for length in pair)
    assert len(np.unique(changed, axis=0)) == len(hidden) and changed.any(0).all()
    for copy, mask in zip(hidden, changed, strict=True):
        assert copy[:, mask] == pytest.approx(
            np.repeat(pixels.mean((1, 2))[:, None], mask.sum(), 1), abs=1e-5
        )


@pytest.mark.parametrize("y", range(CELLS))
def test_a_score_of_one_cell_lights_up_that_cell_and_nothing_far_away(y):
    """Wherever the cell lies, also in a corner and in the middle."""
    scale = 16
    for x in range(CELLS):
        pixels = np.zeros((3, CELLS * scale, CELLS * scale), np.float32)
        cell = np.s_[:, y * scale : (y + 1) * scale, x * scale : (x + 1) * scale]
        pixels[cell] = 1
        scores = np.array([copy[cell].mean() for copy in occluded(pixels)])
        rows = cell_means(1 - scores)
        away = np.maximum(*np.abs(np.mgrid[:CELLS, :CELLS] - [[[y]], [[x]]]))
        assert rows[y, x] == pytest.approx(rows.max()) and rows.max() > 0.9
        assert (rows[away >= WINDOW] == 0).all()
        if (y, x) == (CELLS // 2, CELLS // 2):  # near an edge fewer windows tell cells apart
            assert np.isclose(rows, rows.max()).sum() == 1
