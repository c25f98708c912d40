"""Store what `tiny` sees in the installed photographs: python tests/make_golden.py (part of `make ship`)."""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import encoders  # noqa: E402
import imaging  # noqa: E402
import demo  # noqa: E402

GOLDEN = Path(__file__).with_name("golden_photos.npz")


def features_of(photos):
    """Paths -> float32 [n, d] by the shipped encoder."""
    encoder = encoders.Encoder(encoders.SHIPPED)
    return encoder.encode(np.stack([imaging.preprocess(imaging.decode_image(p.read_bytes()), encoder.resolution) for p in photos]))


if __name__ == "__main__":
    photos = demo.installed_photos()
    with common.atomic_write(GOLDEN) as file:
        np.savez(file, names=np.array([p.name for p in photos]), features=features_of(photos))
