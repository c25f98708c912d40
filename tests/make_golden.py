"""Store what the shipped encoder sees in the installed photographs: python tests/make_golden.py (part of `make ship`)."""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import samples  # noqa: E402
from classify import SHIPPED_MODEL, Detector  # noqa: E402
from imaging import decode_image  # noqa: E402

GOLDEN = Path(__file__).with_name("golden_photos.npz")


def features_of(photos):
    """Paths -> float32 [n, d] by the shipped encoder."""
    detector = Detector(SHIPPED_MODEL)
    return detector.encoder.encode(np.stack([detector.pixels(decode_image(p.read_bytes())) for p in photos]))


if __name__ == "__main__":
    photos = samples.installed_photos()
    with common.atomic_write(GOLDEN) as file:
        np.savez(file, names=np.array([p.name for p in photos]), features=features_of(photos))
