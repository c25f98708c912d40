"""RGB pixels -> CLIP's input, bit for bit CLIP's own transform."""

import numpy as np
from PIL import Image

# Channel mean and standard deviation of OpenAI's training images: clip/clip.py, _transform
MEAN = np.float32([0.48145466, 0.4578275, 0.40821073])
STD = np.float32([0.26862954, 0.26130258, 0.27577711])
R2 = 0.7548776662466927, 0.5698402909980532  # 1 / g and 1 / g^2 of the g with g^3 = g + 1


def preprocess(image, resolution):
    """PIL RGB image -> float32 [3, resolution, resolution], normalised.

    Equal bit for bit to the transform that `clip.load` returns.
    """
    return normalise(resize_and_crop(image, resolution))


def resize_and_crop(image, resolution):
    """PIL RGB image -> uint8 [resolution, resolution, 3].

    Bicubic resize of the short side to `resolution`, centre crop. The roundings are those of
    torchvision's Resize and CenterCrop.
    """
    short = min(image.size)
    size = tuple(int(resolution * side / short) for side in image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (int(round((side - resolution) / 2.0)) for side in size)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def in_pieces(image, resolution, crops=0):
    """PIL RGB image -> uint8 [1 + crops, r, r, 3]: `resize_and_crop`, then `native_crops`."""
    pieces = [resize_and_crop(image, resolution)[None]]
    if crops:
        pieces.append(native_crops(image, resolution, crops))
    return np.concatenate(pieces)


def native_crops(image, resolution, number):
    """PIL RGB image -> uint8 [number, r, r, 3]: square crops at full resolution.

    They keep details that `resize_and_crop` removes. The first crop lies in the middle. The R2
    sequence (M. Roberts, 2018) places the others, so a smaller number gives the first of a larger
    number. An image with a side below r is enlarged (bicubic).
    """
    short = min(image.size)
    if short < resolution:
        image = image.resize(
            [max(resolution, round(side * resolution / short)) for side in image.size],
            Image.Resampling.BICUBIC,
        )
    corners = [
        [
            round((side - resolution) * ((0.5 + k * step) % 1))
            for side, step in zip(image.size, R2, strict=True)
        ]
        for k in range(number)
    ]
    return np.stack(
        [np.asarray(image.crop((x, y, x + resolution, y + resolution))) for x, y in corners]
    )


def normalise(crops):
    """uint8 [..., r, r, 3] -> float32 [..., 3, r, r]: (x / 255 - mean) / deviation of CLIP."""
    # transposed as uint8, a quarter of the bytes, then computed in place
    pixels = np.ascontiguousarray(np.moveaxis(crops, -1, -3)).astype(np.float32)
    pixels /= np.float32(255)
    pixels -= MEAN[:, None, None]
    pixels /= STD[:, None, None]
    return pixels
