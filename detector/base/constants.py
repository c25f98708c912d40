"""Names and limits that commands and the library share. Imports nothing that takes time."""

import re

CLASSES = ("real", "fake")  # labels 0 and 1
SPLITS = ("train", "val", "test", "external", "extra")
MAX_PIXELS = 200_000_000  # on the command line: the Kaggle set has sides of 14,000
VERSION = re.compile(r"[!-~]{1,64}")  # of a model: it goes into a header of every verdict
NOTICE = re.compile(r"[ -~]{1,200}")  # of a model: so does this
MAX_VIEWS = 20  # degraded copies of an image: those of three batches are in memory at a time
MAX_CROPS = 32  # squares of it in full resolution, each a forward pass more
LEAST_INT8_IMAGES = 40  # that int8 is calibrated and proved on
