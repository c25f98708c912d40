"""Errors that a user can cause, each told in one line with exit code 2 (the service: a fitting status).

DetectorError
 |- UsageError         a flag, a folder, a file or a setting
 |- EncoderError       CLIP weights or a prepared encoder
 |- ModelError         a model file
 |- ImageError         one image; `status` is the HTTP status that fits
      |- UnsupportedImage   415: not a format we take
      |- BrokenImage        422: truncated or corrupt
      |- ImageTooLarge      413: too many pixels
"""


class DetectorError(Exception):
    """Something the user can mend; the message names the value and the remedy."""


class UsageError(DetectorError):
    pass


class EncoderError(DetectorError):
    pass


class ModelError(DetectorError):
    pass


class ImageError(DetectorError):
    """`is_image`: the bytes are an image's, by what they announce, and not a caption's or a program's."""

    status = 422
    is_image = True


class UnsupportedImage(ImageError):
    status = 415


class BrokenImage(ImageError):
    status = 422


class ImageTooLarge(ImageError):
    status = 413
