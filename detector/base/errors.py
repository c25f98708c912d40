"""Errors that a user can cause. A command prints one line and exits with 2.

The service responds to an ImageError with its HTTP status.

DetectorError
 |- UsageError         a flag, a folder, a file or a setting
 |- EncoderError       CLIP weights or a prepared encoder
 |- ModelError         a model file
 |- ImageError         one image; `status` is the HTTP status
      |- UnsupportedImage   415: not a format that we accept
      |- BrokenImage        422: truncated or corrupt
      |- ImageTooLarge      413: too many pixels
"""


class DetectorError(Exception):
    """An error that the user can correct. The message names the value and the remedy."""


class UsageError(DetectorError):
    pass


class EncoderError(DetectorError):
    pass


class ModelError(DetectorError):
    pass


class ImageError(DetectorError):
    """`is_image`: the first bytes are those of an image format, not of a caption or a program."""

    status = 422
    is_image = True


class UnsupportedImage(ImageError):
    status = 415


class BrokenImage(ImageError):
    status = 422


class ImageTooLarge(ImageError):
    status = 413
