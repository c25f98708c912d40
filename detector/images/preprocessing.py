"""RGB pixels -> CLIP's input, bit for bit CLIP's own transform."""

import numpy as np

# The plug-ins of the formats we take, by name: otherwise Pillow imports all forty at the first WebP.
from PIL import Image

# Channel mean and standard deviation of OpenAI's training images: clip/clip.py, _transform
MEAN = np.float32([0.48145466, 0.4578275, 0.40821073])
STD = np.float32([0.26862954, 0.26130258, 0.27577711])
R2 = 0.7548776662466927, 0.5698402909980532  # 1 / g and 1 / g^2 of the g with g^3 = g + 1


# ---- RGB -> CLIP's input ----


def preprocess(image, resolution):
    """PIL RGB image -> float32 [3, resolution, resolution], normalised, bit for bit what `clip.load`'s transform gives."""
    return normalise(resize_and_crop(image, resolution))


def resize_and_crop(image, resolution):
    """PIL RGB image -> uint8 [resolution, resolution, 3]: short side to `resolution` (bicubic), centre crop; the roundings
    are torchvision's (Resize, CenterCrop)."""
    width, height = image.size
    if width <= height:
        size = resolution, int(resolution * height / width)
    else:
        size = int(resolution * width / height), resolution
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (int(round((side - resolution) / 2.0)) for side in size)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def in_pieces(image, resolution, crops=0):
    """PIL RGB image -> uint8 [1 + crops, r, r, 3]: the whole as `resize_and_crop` gives it, then `native_crops`."""
    return np.concatenate(
        [
            resize_and_crop(image, resolution)[None],
            *([native_crops(image, resolution, crops)] if crops else []),
        ]
    )


def native_crops(image, resolution, number):
    """PIL RGB image -> uint8 [number, r, r, 3]: squares at the image's own resolution, which show what shrinking takes away.

    The first lies in the middle, the others as the R2 sequence (M. Roberts, 2018) spreads them, so fewer are the first of more. An
    image with a shorter side is enlarged to it (bicubic).
    """
    short = min(image.size)
    if short < resolution:
        image = image.resize(
            [max(resolution, round(side * resolution / short)) for side in image.size],
            Image.Resampling.BICUBIC,
        )
    corners = [
        [round((side - resolution) * ((0.5 + k * step) % 1)) for side, step in zip(image.size, R2)]
        for k in range(number)
    ]
    return np.stack(
        [np.asarray(image.crop((x, y, x + resolution, y + resolution))) for x, y in corners]
    )


def normalise(crops):
    """uint8 [..., r, r, 3] -> float32 [..., 3, r, r]: /255, minus CLIP's mean, by its standard deviation."""
    pixels = np.ascontiguousarray(np.moveaxis(crops, -1, -3)).astype(
        np.float32
    )  # turned while small, then in place
    pixels /= np.float32(255)
    pixels -= MEAN[:, None, None]
    pixels /= STD[:, None, None]
    return pixels
