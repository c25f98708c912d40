"""RGB pixels -> an encoder's input, bit for bit the transform that the encoder's authors state.

pixels = preprocess(image, clip_transform(224))  # as the transform that `clip.load` returns
pixels = preprocess(image, encoder.transform)    # that of any prepared encoder
"""

import math
from collections import namedtuple

import numpy as np
from PIL import Image

# resolution: side of the input; mean, std: of each channel, of values from 0 to 1; interpolation:
# a key of INTERPOLATIONS; crop_share: share of the resized side that is kept; crop_mode:
# 'center' resizes the short side and crops the middle, 'squash' resizes both sides alike
Transform = namedtuple(
    "Transform", "resolution mean std interpolation crop_share crop_mode", defaults=(1.0, "center")
)
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
R2 = 0.7548776662466927, 0.5698402909980532  # 1 / g and 1 / g^2 of the g with g^3 = g + 1


def clip_transform(resolution):
    """CLIP's own. Mean and deviation are those of OpenAI's images (clip/clip.py, _transform)."""
    mean = (0.48145466, 0.4578275, 0.40821073)
    return Transform(resolution, mean, (0.26862954, 0.26130258, 0.27577711), "bicubic")


def preprocess(image, transform):
    """PIL RGB image -> float32 [3, resolution, resolution], normalised.

    Equal bit for bit to what `clip.load` and `timm.data.create_transform` return.
    """
    return normalise(resize_and_crop(image, transform), transform)


def resize_and_crop(image, transform):
    """PIL RGB image -> uint8 [resolution, resolution, 3].

    The roundings are those of torchvision's Resize and CenterCrop.
    """
    resolution, side = transform.resolution, math.floor(transform.resolution / transform.crop_share)
    size = (side, side)
    if transform.crop_mode == "center":
        short = min(image.size)
        size = tuple(int(side * length / short) for length in image.size)
    if size != image.size:
        image = image.resize(size, INTERPOLATIONS[transform.interpolation])
    left, top = (int(round((length - resolution) / 2.0)) for length in size)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


def in_pieces(image, transform, crops=0):
    """PIL RGB image -> uint8 [1 + crops, r, r, 3]: `resize_and_crop`, then `native_crops`."""
    pieces = [resize_and_crop(image, transform)[None]]
    if crops:
        pieces.append(native_crops(image, transform, crops))
    return np.concatenate(pieces)


def native_crops(image, transform, number):
    """PIL RGB image -> uint8 [number, r, r, 3]: square crops at full resolution.

    They keep details that `resize_and_crop` removes. The first crop lies in the middle. The R2
    sequence (M. Roberts, 2018) places the others, so a smaller number gives the first of a larger
    number. An image with a side below r is enlarged.
    """
    resolution, short = transform.resolution, min(image.size)
    if short < resolution:
        image = image.resize(
            [max(resolution, round(side * resolution / short)) for side in image.size],
            INTERPOLATIONS[transform.interpolation],
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


def normalise(crops, transform):
    """uint8 [..., r, r, 3] -> float32 [..., 3, r, r]: (x / 255 - mean) / deviation."""
    # transposed as uint8, a quarter of the bytes, then computed in place
    pixels = np.ascontiguousarray(np.moveaxis(crops, -1, -3)).astype(np.float32)
    pixels /= np.float32(255)
    pixels -= np.float32(transform.mean)[:, None, None]
    pixels /= np.float32(transform.std)[:, None, None]
    return pixels


def colours(pixels, transform):
    """The inverse of `normalise` for a picture: float32 [3, r, r] -> [r, r, 3], from 0 to 1."""
    return (np.moveaxis(pixels, 0, -1) * transform.std + transform.mean).clip(0, 1)
