"""Degradations that a picture meets between a camera and an upload.

    for panel, level, change in CONDITIONS: degraded = change(image)
    view = degrade(image, view_rng(sha256, number))

Each takes a PIL RGB image and returns a PIL RGB image. `rng` is a numpy Generator. The same seed
gives the same pixels.
"""

import io

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

FILTERS = (
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
    Image.Resampling.BOX,
)


def encoded(image, kind, **options):
    """RGB image -> bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg_bytes(image, quality):
    """RGB image -> bytes of a JPEG file (4:2:0, as most sites save)."""
    return encoded(image, "JPEG", quality=int(quality))


def opened(data):
    """Bytes of a file that we wrote -> RGB image."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def jpeg(image, quality):
    """Saved as JPEG and opened again."""
    return opened(jpeg_bytes(image, quality))


def fit(image, side, resample=Image.Resampling.LANCZOS):
    """Shrunk so that the long side is at most `side` pixels. Smaller images are not changed."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(s * scale)) for s in image.size], resample)


def social_bytes(image, side, quality):
    """Bytes of the JPEG file that a site makes of an upload: at most `side` pixels, `quality`."""
    return jpeg_bytes(fit(image, side), quality)


def blur(image, sigma):
    """Gaussian blur, `sigma` in pixels."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def webp(image, quality):
    """Saved as WebP and opened again."""
    return opened(encoded(image, "WEBP", quality=int(quality)))


def png(image):
    """Saved as PNG and opened again: the same pixels, another file."""
    return opened(encoded(image, "PNG", compress_level=1))


def resize(image, scale, resample=Image.Resampling.BICUBIC):
    """Shrunk to `scale` of its sides, at least 8 pixels."""
    return image.resize([max(8, round(side * scale)) for side in image.size], resample)


def there_and_back(image, scale):
    """Shrunk and enlarged again."""
    return resize(image, scale).resize(image.size, Image.Resampling.BICUBIC)


def noise(image, sigma, rng=None):
    """Gaussian noise on each channel, `sigma` in grey levels of 255."""
    rng = np.random.default_rng(0) if rng is None else rng
    pixels = np.asarray(image).astype(np.float32)
    noisy = np.rint(pixels + rng.normal(0, sigma, pixels.shape))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def crop(image, share, left=0.5, top=0.5):
    """Cut to `share` of both sides. `left`, `top`: 0 is that edge, 0.5 the middle, 1 the other."""
    width, height = (max(1, round(side * share)) for side in image.size)
    x, y = round((image.width - width) * left), round((image.height - height) * top)
    return image.crop((x, y, x + width, y + height))


def square(image, side=224):
    """Cropped to the middle square and resized to `side`: one shape for every picture."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.resize(
        (side, side), Image.Resampling.LANCZOS, box=(left, top, left + short, top + short)
    )


def social(image, *tiers):
    """Shared on several sites in turn. Each shrinks to a side and saves as JPEG of a quality."""
    for side, quality in tiers:
        image = jpeg(fit(image, side), quality)
    return image


def resaved(image, share, quality):
    """Shrunk to `share` of its sides and saved as JPEG, as sites treat large pictures."""
    return jpeg(resize(image, share), quality)


RESAVED = {"75%, quality 60": (0.75, 60), "50%, quality 40": (0.5, 40)}  # share, quality
# The conditions of evaluate.py: (panel, level, function).
CONDITIONS = [
    *(("JPEG", f"quality {q}", lambda image, q=q: jpeg(image, q)) for q in (95, 80, 60, 40, 30)),
    *(("WebP", f"quality {q}", lambda image, q=q: webp(image, q)) for q in (95, 80, 60, 40, 30)),
    *(("resize", f"to {s:g}", lambda image, s=s: resize(image, s)) for s in (0.75, 0.5, 0.25)),
    *(
        ("resize and back", f"to {s:g}", lambda image, s=s: there_and_back(image, s))
        for s in (0.75, 0.5, 0.25)
    ),
    *(("blur", f"sigma {s:g} px", lambda image, s=s: blur(image, s)) for s in (0.5, 1, 2)),
    *(("noise", f"sigma {s:g}", lambda image, s=s: noise(image, s)) for s in (2, 5, 10)),
    ("crop", "to 80%", lambda image: crop(image, 0.8)),
    ("social media", "1080 px q75", lambda image: social(image, (1080, 75))),
    ("social media", "768 px q60", lambda image: social(image, (768, 60))),
    ("social media", "512 px q40", lambda image: social(image, (512, 40))),
    ("social media", "both, one after the other", lambda i: social(i, (768, 60), (512, 40))),
    *(
        ("re-saved", f"at {name}", lambda image, step=step: resaved(image, *step))
        for name, step in RESAVED.items()
    ),
]
# Steps that make the files of both classes alike: (name, change of reals, change of fakes).
# They expose a detector that reads files instead of pictures.
ARMS = [
    ("fakes as JPEG 96", lambda image: image, lambda image: jpeg(image, 96)),
    ("both as JPEG 96", lambda image: jpeg(image, 96), lambda image: jpeg(image, 96)),
    ("both as PNG", png, png),
    (
        "both one square, then JPEG 96",
        lambda image: jpeg(square(image), 96),
        lambda image: jpeg(square(image), 96),
    ),
]


def manageable(image, side=8192):
    """A copy that the distortions can save: sides that WebP allows, no comment, no profile."""
    image = fit(image, side).copy()
    image.info = {}
    return image


def view_rng(sha256, number):
    """Generator for view `number` of the image with this hash, whatever its class and path."""
    return np.random.default_rng([int(sha256[:16], 16), number])


def degrade(image, rng):
    """A degraded copy: one to three random distortions of those above, saved as JPEG or WebP."""
    changes = [
        lambda i: resize(i, rng.uniform(0.4, 1), FILTERS[rng.integers(4)]),
        lambda i: there_and_back(i, rng.uniform(0.4, 1)),
        lambda i: blur(i, rng.uniform(0.2, 1.5)),
        lambda i: noise(i, rng.uniform(1, 8), rng),
        lambda i: crop(i, rng.uniform(0.75, 1), rng.random(), rng.random()),
        lambda i: social(i, (int(rng.integers(400, 1100)), rng.integers(40, 90))),
    ]
    for k in rng.permutation(len(changes))[: rng.integers(1, 4)]:
        image = changes[k](image)
    return (webp if rng.random() < 0.25 else jpeg)(image, rng.integers(30, 96))


def random_view(image, rng, resolution):
    """A training view [resolution x resolution].

    Crop, flip, JPEG, blur, resize filter and brightness are random and do not depend on the label.
    """
    if rng.random() < 0.3:
        image = jpeg(
            fit(image, int(rng.integers(160, 400)), FILTERS[rng.integers(4)]), rng.integers(40, 96)
        )
    width, height = image.size
    side = min(width, height) * rng.uniform(0.6, 1.0)
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    image = image.resize(
        (resolution, resolution), FILTERS[rng.integers(4)], box=(left, top, left + side, top + side)
    )
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.2:
        image = blur(image, rng.uniform(0.2, 1.2))
    if rng.random() < 0.3:
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.3))
    if rng.random() < 0.3:
        image = jpeg(image, rng.integers(50, 100))
    return image
