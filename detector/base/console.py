"""Output of a command, and its exit."""

import argparse
import os
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path

from detector.base.addresses import is_remote
from detector.base.errors import DetectorError, UsageError
from detector.base.files import REMEDIES, reason

SOON = 2  # seconds after which a loop shows its progress
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control, surrogate, line, paragraph
# bidirectional classes of the marks that reverse the text behind them: 'gpj.exe' reads 'exe.jpg'
TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def one_line(error):
    """The message of an error as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the defaults that are texts or numbers."""

    def _get_help_string(self, action):
        shown = isinstance(action.default, (str, int, float)) and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def say(message):
    """One line of progress or warning on stderr; results go to stdout."""
    with suppress(OSError):  # a full disk behind stderr must not hide the exit code
        print(printable(message), file=sys.stderr, flush=True)


def printable(text):
    """Text with backslash escapes in the place of characters that could mislead its reader.

    These are control characters, line ends, direction marks and bytes that are not UTF-8.
    """

    def misleads(c):
        return unicodedata.category(c) in UNPRINTABLE or unicodedata.bidirectional(c) in TURNING

    return "".join(c.encode("unicode_escape").decode() if misleads(c) else c for c in str(text))


def all_printable(value):
    """`printable` for every text in dicts and lists."""
    if isinstance(value, dict):
        return {all_printable(key): all_printable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [all_printable(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value


def need_folder(path):
    """Raises UsageError unless --data_dir is a folder. Object stores are checked when listed."""
    if not is_remote(path) and not os.path.isdir(path):  # Path("") would be the current folder
        raise UsageError(f"--data_dir {path}: no such folder")


def check_review(review, name="--review"):
    """Raises UsageError unless `review` is None or two probabilities in rising order."""
    if review and not 0 <= review[0] <= review[1] <= 1:
        raise UsageError(
            f"{name} {review[0]:g} {review[1]:g}: must be two probabilities, the lower first"
        )


def need_features(path, labels_file=None):
    """Raises UsageError unless --features_file exists. Object stores are checked when read.

    Raises UsageError as well for a --labels_file beside it, because features have labels already.
    """
    if labels_file:
        raise UsageError(
            f"--labels_file {labels_file}: the labels of {path} count already; leave it out, or "
            "leave out --features_file"
        )
    if not is_remote(path) and not Path(path).exists():
        raise UsageError(
            f"--features_file {path}: no such file; make it with extract_features.py --data_dir DIR"
        )


def run(main):
    """Call a script's main() and exit with its return value.

    An error that the user can correct becomes one line and exit code 2.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where the shell closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            sys.exit(main())
        finally:
            sys.stdout.flush()
    except DetectorError as error:
        end(2, f"error: {error}")
    except BrokenPipeError:  # `classify.py ... | head`
        end(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError:
        end(2, "error: not enough memory; free some, or give fewer or smaller images at a time")
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        end(2, f"error: {error.filename or 'the output'}: {reason(error)}")
    finally:
        drop_refused(sys.stderr)


def end(code, line=None):
    """Exit."""
    if line:
        say(line)
    drop_refused(sys.stdout)
    sys.exit(code)


def drop_refused(stream):
    """Drop what a full disk behind the stream refuses. Python would write it again and exit 120."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
