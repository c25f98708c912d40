"""Store the shipped encoder's features of the installed photographs, as part of `make ship`.

python -m tests.make_golden
"""

from pathlib import Path

import numpy as np

from detector.base.files import atomic_write
from detector.encoders.runtime import Encoder
from detector.images import samples
from detector.images.decoding import decode_image
from detector.model.file import load_model
from detector.verdict import SHIPPED_MODEL, Detector, encoder_folder

GOLDEN = Path(__file__).with_name("golden_photos.npz")


def features_of(images, precision="float32"):
    """RGB images -> float32 [n, d] by the shipped encoder, in the same precision everywhere."""
    model = load_model(SHIPPED_MODEL)
    folder = encoder_folder(model["encoder"], SHIPPED_MODEL)
    detector = Detector(SHIPPED_MODEL, model=model, encoder=Encoder(folder, "cpu", precision))
    return detector.encoder.encode(np.stack([detector.pixels(image) for image in images]))


if __name__ == "__main__":
    photos = samples.installed_photos()
    names = np.array([path.name for path in photos])
    features = features_of([decode_image(path.read_bytes()) for path in photos])
    with atomic_write(GOLDEN) as file:
        np.savez(file, names=names, features=features)
