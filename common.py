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
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import unicodedata
from contextlib import contextmanager, suppress
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
    """`is_image`: the bytes are an image's, by what they announce, and not a caption's or a program's."""
    status = 422
    is_image = True


class UnsupportedImage(ImageError):
    status = 415


class BrokenImage(ImageError):
    status = 422


class ImageTooLarge(ImageError):
    status = 413


# ---- what the system refuses ----

ANOTHER_PLACE = "name another place"
# What the user can do about a refusal of the system's; the same command then works, or resumes.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, and run the same command again"),
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), and run the same command again",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit on open files (ulimit -n)"),
    errno.ENOMEM: "free some memory, and run the same command again",
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENODEV),
                    "check the disk or network drive, and run the same command again"),
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ENOENT: "check the path",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
                     errno.EBUSY, errno.ETXTBSY, errno.ENXIO, errno.EINVAL), ANOTHER_PLACE),
}


def reason(error):
    """OSError -> 'No space left on device; free some space ...'."""
    words = "a folder of its path is a file" if error.errno == errno.EEXIST else error.strerror
    return f"{words or error}; {REMEDIES.get(error.errno, ANOTHER_PLACE)}"


def one_line(error):
    """An error's words in one line, of at most 300 characters."""
    return " ".join(str(error).split())[:300]


@contextmanager
def refusal(what):
    """An OSError becomes a UsageError: `what`, the reason, the remedy."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{what}: {reason(error)}") from None


@contextmanager
def atomic_write(path, mode="wb"):
    """Write beside `path`, rename at the end: a reader sees the old file or the whole new one.

    A symbolic link is followed. A new file's mode follows the umask, an existing file keeps its
    own. Raises UsageError where `path` is no regular file, and for what the system refuses.
    """
    refuse_place(path, f"cannot write {path}")
    given, path = Path(path), Path(os.path.realpath(path))
    temporary = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        with refusal(f"cannot write {given}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        # whatever the locale, whatever a name
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
        with unnamed_refusal(f"cannot write {given}"), os.fdopen(handle, mode, **text) as file:
            yield file
        with refusal(f"cannot write {given}"):
            put(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def put(temporary, path):
    """Rename a file to `path`; a file that was there leaves it its mode."""
    with suppress(FileNotFoundError):
        os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))
    os.replace(temporary, path)


@contextmanager
def unnamed_refusal(what):
    """`refusal` of a write; an OSError that names a file is of another file, and passes."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise UsageError(f"{what}: {reason(error)}") from None


def refuse_place(path, given):
    """Raises UsageError where `path` is there and is no regular file."""
    if Path(path).is_dir():
        raise UsageError(f"{given}: it is a folder; name a file in it")
    if Path(path).exists() and not Path(path).is_file():
        raise UsageError(f"{given}: it is a device or a pipe; name a file")


@contextmanager
def atomic_folder(folder, own=()):
    """Yields a new folder beside `folder`. At the end its files take their places in `folder`.

    Then what `folder` still has of the names `own` is removed. Raises UsageError.
    """
    folder = Path(os.path.realpath(folder))
    with refusal(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".part-"))
    try:
        yield scratch
        new = sorted(path.name for path in scratch.iterdir())
        with refusal(f"cannot write {folder}"):
            for name in new:
                put(scratch / name, folder / name)
            for name in set(own) - set(new):
                (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def only_writer(path, given):
    """Hold a lock beside `path` while this process writes there; `given`: the flag and its value.

    Raises UsageError where another process holds it. An object store, and a file system without
    locks, do without.
    """
    if is_remote(path):
        yield
        return
    path = Path(os.path.realpath(path))
    lock = path.with_name(f".{path.name[:200]}.lock")
    with refusal(f"{given}: cannot be written"):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(f"{given}: process {file.read() or 'of another machine'} is writing it; "
                             "wait until it ends, or name another place") from None
        except OSError:
            pass
        try:
            file.truncate(0)
            print(os.getpid(), end="", file=file, flush=True)
            yield
        finally:
            lock.unlink(missing_ok=True)


def reserve(folder, size):
    """Raises OSError unless `folder` has room for `size` bytes: some libraries do not say so."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)


def check_file(path, given):
    """A place where no file can be written is told before the work. Raises UsageError."""
    refuse_place(path, given)
    check_folder(Path(os.path.realpath(path)).parent, given)


def check_folder(path, given):
    """Make the folder where it is missing; a place that cannot be written is told before the work.

    `given`: the flag and value that it comes from. Raises UsageError.
    """
    with refusal(f"{given}: cannot be written"):
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


# ---- what every script does ----

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
    """One line of progress or warning on stderr; results go to stdout."""
    with suppress(OSError):  # a full disk behind stderr must not hide the exit code
        print(printable(message), file=sys.stderr, flush=True)


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


def masked(url):
    """An address without the password in it, to be shown."""
    return re.sub(r"(://[^/:@]*):[^/@]*@", r"\1:***@", url)


def behind_proxy(url, *also):
    """Words for the error of a connection to `url` where a proxy lies between: its address, its variable, the remedy. Else ''.

    `also`: 'all' for clients that follow ALL_PROXY.
    """
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass
    parts, proxies = urlsplit(url), getproxies()
    kinds = [kind for kind in (parts.scheme, *also) if kind in proxies]
    if parts.scheme not in ("http", "https") or not kinds or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    names = [name for name in (f"{kinds[0]}_proxy", f"{kinds[0]}_PROXY".upper()) if name in os.environ]
    name = names[0] if names else "the system's settings"
    return (f"; the proxy {masked(proxies[kinds[0]])} of {name} lies between: unset {name}, or set NO_PROXY={parts.hostname}, "
            "where it is not needed")


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
    """Call function(None), a script's parse_args; what a user can mend becomes one line and exit
    code 2."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by the shell
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            function(None)
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


def end(code, line=None):
    """Exit; what stdout still holds and cannot take goes nowhere."""
    if line:
        say(line)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
