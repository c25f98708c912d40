"""Names and limits that commands and the library share. Imports nothing slow."""

import re

CLASSES = ("real", "fake")  # labels 0 and 1
SPLITS = ("train", "val", "test", "external", "extra")
MAX_PIXELS = 200_000_000  # on the command line; the Kaggle set has sides of 14,000
VERSION = re.compile(r"[!-~]{1,64}")  # of a model; an HTTP header of every verdict carries it
NOTICE = re.compile(r"[ -~]{1,200}")  # of a model; an HTTP header carries it too
MAX_VIEWS = 20  # degraded copies of an image; memory holds those of three batches at a time
MAX_CROPS = 32  # full-resolution crops of an image; each costs one forward pass
MARGIN = 0.03  # of balanced accuracy, by which a promoted version may be worse than the champion
CROP_MODES = ("center", "squash")  # how a picture becomes a square
