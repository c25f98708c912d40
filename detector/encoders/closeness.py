"""Compare two forms of the same encoder: `prepare_clip.py --compare FILE`."""

import numpy as np

from detector.base.errors import EncoderError
from detector.base.files import read_bytes
from detector.encoders import prepare
from detector.encoders.vit import numpy_forward
from detector.encoders.weights import architecture
from detector.images import decoding, preprocessing, samples


def cosines(a, b):
    """Two float arrays [n, d] -> the cosine of each pair of rows, float64 [n]."""
    a, b = np.float64(a), np.float64(b)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def compare(clip_model, checkpoint, weights=None):
    """Print the cosine of each matrix to the checkpoint's, and that of features of photographs.

    The photographs are those that installed packages bring. Raises EncoderError unless both are
    vision transformers of the same shape.
    """
    ours, theirs = prepare.read_weights(clip_model, weights), prepare.read_weights(checkpoint)
    arch = architecture(ours)
    if architecture(theirs) != arch or arch["kind"] != "VisionTransformer":
        raise EncoderError(
            f"--compare {checkpoint}: is not a vision transformer of the shape of {clip_model}; "
            "name another checkpoint"
        )
    for name in sorted(name for name, array in ours.items() if array.ndim > 1):
        print(f"{name}: {cosines(ours[name].reshape(1, -1), theirs[name].reshape(1, -1))[0]:.6f}")
    for path in samples.installed_photos():
        image = decoding.decode_image(read_bytes(path))
        pixels = preprocessing.preprocess(
            image, preprocessing.clip_transform(arch["input_resolution"])
        )[None]
        both = (numpy_forward(arrays, arch, "final", pixels) for arrays in (ours, theirs))
        print(f"features of {path.name}: {cosines(*both)[0]:.6f}")
