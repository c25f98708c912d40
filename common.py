"""CLIP loading and preprocessing, for the scripts here and for those you write yourself.

from common import load_clip, preprocess, read_image
encoder = load_clip("ViT-B/16-8bit")                         # prepared at the first use
pixels = preprocess(read_image("photo.jpg"), encoder.transform)
features = encoder.encode(pixels[None])                      # float32 [1, 768]
"""

from detector.base.files import read_bytes
from detector.encoders.prepare import ensure_encoder
from detector.encoders.runtime import Encoder
from detector.images.decoding import decode_image
from detector.images.preprocessing import preprocess

__all__ = ["load_clip", "preprocess", "read_image"]


def load_clip(clip_model, layers="final", device="auto", precision="auto"):
    """Name (docs/encoders.md), checkpoint or prepared folder -> Encoder.

    `encoder.encode` takes float32 [n, 3, r, r]. Missing weights are fetched and prepared.
    Raises EncoderError.
    """
    return Encoder(ensure_encoder(clip_model, layers), device, precision)


def read_image(path):
    """File -> PIL image, RGB, upright. Raises UsageError and ImageError's kinds."""
    return decode_image(read_bytes(path))
