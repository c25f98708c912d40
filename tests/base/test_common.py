"""common.py loads CLIP and preprocesses like the scripts."""

import numpy as np
import small

from common import load_clip, preprocess, read_image
from detector.images.preprocessing import in_pieces, normalise


def test_the_features_of_common_py_are_those_of_the_scripts(photos):
    encoder = load_clip(str(small.CHECKPOINT))
    image = read_image(photos["china.jpg"])
    pixels = preprocess(image, encoder.transform)
    assert pixels.shape == (3, encoder.resolution, encoder.resolution)
    assert pixels.dtype == np.float32
    pieces = normalise(in_pieces(image, encoder.transform), encoder.transform)
    assert np.array_equal(encoder.encode(pixels[None]), encoder.encode(pieces))
