"""The stated degradations: what happens to a picture between a camera and an upload button.

    for panel, level, change in CONDITIONS: degraded = change(image)
    view = degrade(image, view_rng(sha256, number))

Each takes a PIL RGB image and returns one; `rng` is a numpy Generator, so that the same seed gives the same pixels.
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


def jpeg_bytes(image, quality):
    """RGB image -> bytes of a JPEG file (4:2:0, as most sites save)."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(quality))
    return buffer.getvalue()


def jpeg(image, quality):
    """Saved as JPEG and opened again."""
    return Image.open(io.BytesIO(jpeg_bytes(image, quality))).convert("RGB")


def fit(image, side, resample=Image.Resampling.LANCZOS):
    """Shrunk so that the long side is at most `side` pixels; smaller images stay as they are."""
    scale = side / max(image.size)
    return (
        image
        if scale >= 1
        else image.resize([max(1, round(s * scale)) for s in image.size], resample)
    )


def social_bytes(image, side, quality):
    """What a site that shrinks uploads to `side` pixels and saves them at `quality` hands out: bytes of a JPEG file."""
    return jpeg_bytes(fit(image, side), quality)


def blur(image, sigma):
    """Gaussian blur, `sigma` in pixels."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def webp(image, quality):
    """Saved as WebP and opened again."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=int(quality))
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def png(image):
    """Saved as PNG and opened again: the same pixels, another file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


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
    return Image.fromarray(
        np.clip(np.rint(pixels + rng.normal(0, sigma, pixels.shape)), 0, 255).astype(np.uint8)
    )


def crop(image, share, left=0.5, top=0.5):
    """Cut to `share` of both sides; `left` and `top` say where in the room that leaves, 0.5 in the middle."""
    width, height = (max(1, round(side * share)) for side in image.size)
    x, y = round((image.width - width) * left), round((image.height - height) * top)
    return image.crop((x, y, x + width, y + height))


def square(image, side=224):
    """Cropped to the middle square and shrunk (or enlarged) to one size: the same shape for every picture."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.resize(
        (side, side), Image.Resampling.LANCZOS, box=(left, top, left + short, top + short)
    )


def social(image, *tiers):
    """Shared on one site after another: each shrinks to (side, quality) and saves as JPEG."""
    for side, quality in tiers:
        image = jpeg(fit(image, side), quality)
    return image


def resaved(image, share, quality):
    """Shrunk to `share` of its sides and saved as JPEG: as a site treats a picture larger than it shows."""
    return jpeg(resize(image, share), quality)


RESAVED = {"75%, quality 60": (0.75, 60), "50%, quality 40": (0.5, 40)}  # of the sides, of the JPEG
# What evaluate.py tries, as (panel, level, function).
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
    (
        "social media",
        "both, one after the other",
        lambda image: social(image, (768, 60), (512, 40)),
    ),
    *(
        ("re-saved", f"at {name}", lambda image, how=how: resaved(image, *how))
        for name, how in RESAVED.items()
    ),
]
# Files made alike in steps, as (name, change of reals, change of fakes): a detector that reads files shows here.
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
    """The picture as the distortions take it: WebP has no longer sides, and no comment or colour profile is to be saved
    with every copy."""
    image = fit(image, side).copy()
    image.info = {}
    return image


def view_rng(sha256, number):
    """Generator for view `number` of the image with this hash: the same for both classes, folders and file names."""
    return np.random.default_rng([int(sha256[:16], 16), number])


def degrade(image, rng):
    """One degraded copy: a random chain of one to three of the distortions above, then saved as JPEG or WebP."""
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
    """A training view [resolution x resolution]: random crop, flip, JPEG, blur, resize filter, brightness.

    Every draw is blind to the label, so nothing here can tell the classes apart.
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
