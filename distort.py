"""The stated degradations: what happens to a picture between a camera and an upload button.

Each takes a PIL RGB image and returns one; `rng` is a numpy Generator, so that the same seed gives the same pixels.
"""
import io

from PIL import Image, ImageEnhance, ImageFilter

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BOX)


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
    return image if scale >= 1 else image.resize([max(1, round(s * scale)) for s in image.size], resample)


def social_bytes(image, side, quality):
    """What a site that shrinks uploads to `side` pixels and saves them at `quality` hands out: bytes of a JPEG file."""
    return jpeg_bytes(fit(image, side), quality)


def blur(image, sigma):
    """Gaussian blur, `sigma` in pixels."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def random_view(image, rng, resolution):
    """A training view [resolution x resolution]: random crop, flip, JPEG, blur, resize filter, brightness.

    Every draw is blind to the label, so nothing here can tell the classes apart.
    """
    if rng.random() < 0.3:
        image = jpeg(fit(image, int(rng.integers(160, 400)), FILTERS[rng.integers(4)]), rng.integers(40, 96))
    width, height = image.size
    side = min(width, height) * rng.uniform(0.6, 1.0)
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    image = image.resize((resolution, resolution), FILTERS[rng.integers(4)], box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.2:
        image = blur(image, rng.uniform(0.2, 1.2))
    if rng.random() < 0.3:
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.3))
    if rng.random() < 0.3:
        image = jpeg(image, rng.integers(50, 100))
    return image
