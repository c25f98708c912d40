"""Store what the shipped encoder sees in the installed photographs: python -m tests.make_golden (part of `make ship`)."""

from pathlib import Path

import numpy as np

from detector.base.files import atomic_write
from detector.images import samples
from detector.images.decoding import decode_image
from detector.verdict import SHIPPED_MODEL, Detector

GOLDEN = Path(__file__).with_name("golden_photos.npz")


def features_of(photos):
    """Paths -> float32 [n, d] by the shipped encoder."""
    detector = Detector(SHIPPED_MODEL)
    return detector.encoder.encode(
        np.stack([detector.pixels(decode_image(p.read_bytes())) for p in photos])
    )


if __name__ == "__main__":
    photos = samples.installed_photos()
    with atomic_write(GOLDEN) as file:
        np.savez(file, names=np.array([p.name for p in photos]), features=features_of(photos))
