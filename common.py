"""What every script does alike: errors, files, exit codes. Imports nothing that takes time.

Errors that a user can cause, each told in one line with exit code 2 (the service: a fitting status):

    DetectorError
      |- UsageError         a flag, a folder, a file or a setting
      |- EncoderError       CLIP weights or a prepared encoder
      |- ModelError         a model file
      |- ImageError         one image; `status` is the HTTP status that fits
           |- UnsupportedImage   415: not a format we take
           |- BrokenImage        422: truncated or corrupt
           |- ImageTooLarge      413: too many pixels
"""
import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import unicodedata
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLASSES = ("real", "fake")      # labels 0 and 1
SPLITS = ("train", "val", "test", "external", "extra")
MAX_PIXELS = 200_000_000        # on the command line: the Kaggle set has sides of 14,000
VERSION = re.compile(r"[!-~]{1,64}")  # of a model: it goes into a header of every verdict
NOTICE = re.compile(r"[ -~]{1,200}")   # of a model: so does this
SOON = 2                        # seconds after which a loop that may be quick shows its progress
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control, surrogate, line, paragraph
MAX_VIEWS = 20                  # degraded copies of an image: those of three batches are in memory at a time
MAX_CROPS = 32                  # squares of it in full resolution, each a forward pass more


class DetectorError(Exception):
    """Something the user can mend; the message names the value and the remedy."""


class UsageError(DetectorError):
    pass


class EncoderError(DetectorError):
    pass


class ModelError(DetectorError):
    pass


class ImageError(DetectorError):
    status = 422


class UnsupportedImage(ImageError):
    status = 415


class BrokenImage(ImageError):
    status = 422


class ImageTooLarge(ImageError):
    status = 413


# ---- what every script does ----

@contextmanager
def atomic_write(path, mode="wb"):
    """Write to a temporary name beside `path`, rename at the end: a reader sees the old file or the whole new one."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; name another place") from None
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}  # whatever the locale, whatever a name
        with os.fdopen(handle, mode, **text) as file:
            yield file
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_folder(path, given):
    """The folder is made where it is missing; one that cannot be written to is told before the work, not after.

    `given`: the flag and value that it comes from. Raises UsageError.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UsageError(f"{given}: cannot be written ({error.strerror}); name another place") from None


def read_bytes(path):
    """The bytes of a file; UsageError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def code_commit():
    """Commit of this code (CODE_COMMIT where there is no git, as in a container), '-dirty' with uncommitted changes."""
    try:
        git = ["git", "-C", str(HERE)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
        return commit + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CODE_COMMIT", "unknown")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the defaults, where there is one to tell."""

    def _get_help_string(self, action):
        shown = isinstance(action.default, (str, int, float)) and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def say(message):
    """Progress and warnings go to stderr; results to stdout."""
    print(message, file=sys.stderr, flush=True)


def printable(text):
    """Text with control characters, line ends and bytes that are not UTF-8 as backslash escapes."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in UNPRINTABLE else c
                   for c in str(text))


def all_printable(value):
    """The same for every text in dicts and lists."""
    if isinstance(value, dict):
        return {all_printable(key): all_printable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [all_printable(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value


def is_remote(path):
    """Is it in an object store, as s3://bucket/folder is?"""
    return "://" in str(path)


def need_folder(path):
    """Raises UsageError unless --data_dir is a folder; of an object store that is seen when it is listed."""
    if not is_remote(path) and not Path(path).is_dir():
        raise UsageError(f"--data_dir {path}: no such folder")


def need_features(path):
    """Raises UsageError unless --features_file is there; of an object store that is seen when it is read."""
    if not is_remote(path) and not Path(path).exists():
        raise UsageError(f"--features_file {path}: no such file; make it with extract_features.py --data_dir DIR")


def run(main):
    """Call a script's main() and exit with what it returns."""
    answered(lambda _: sys.exit(main()))


def answered(function):
    """Call function(None), a script's parse_args; a DetectorError becomes one line and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        function(None)
    except DetectorError as error:
        say(f"error: {error}")
        sys.exit(2)
    except BrokenPipeError:  # `classify.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
