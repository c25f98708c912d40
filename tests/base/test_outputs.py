"""Outputs: links are followed, modes follow the umask, devices are refused, files are whole."""

import errno
import fcntl
import os
import resource
import stat
import subprocess
import sys

import numpy as np
import pytest
import small
from commands import ROOT, assert_one_line_error
from made_up import BASELINE, make_columns, write_features

from detector.base.console import printable
from detector.base.errors import UsageError
from detector.base.files import atomic_folder, atomic_write, only_writer


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def write(path, data=b"new"):
    with atomic_write(path) as file:
        file.write(data)


@pytest.fixture
def umask():
    """Function: sets the umask until the end of the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


# ---- single files ----


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_of_a_new_file_follows_the_umask(tmp_path, umask, mask):
    umask(mask)
    write(tmp_path / "below" / "m.joblib")
    assert mode(tmp_path / "below" / "m.joblib") == 0o666 & ~mask
    assert mode(tmp_path / "below") == 0o777 & ~mask


@pytest.mark.parametrize("before", [0o600, 0o664, 0o640])
def test_an_existing_file_keeps_its_mode(tmp_path, before):
    (tmp_path / "m.joblib").touch()
    (tmp_path / "m.joblib").chmod(before)
    write(tmp_path / "m.joblib")
    assert mode(tmp_path / "m.joblib") == before and (tmp_path / "m.joblib").read_bytes() == b"new"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can change owners")
def test_an_existing_file_keeps_its_owner(tmp_path):
    (tmp_path / "file").touch(0o600)
    os.chown(tmp_path / "file", 12345, 12346)
    write(tmp_path / "file")
    after = os.stat(tmp_path / "file")
    assert (after.st_uid, after.st_gid, after.st_mode & 0o777) == (12345, 12346, 0o600)


@pytest.mark.parametrize("target", ["elsewhere/real.joblib", "elsewhere/not-there-yet.joblib"])
def test_a_link_is_followed_and_stays(tmp_path, target):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/real.joblib").write_bytes(b"old")
    (tmp_path / "m.joblib").symlink_to(target)
    write(tmp_path / "m.joblib")
    assert (tmp_path / "m.joblib").is_symlink() and (tmp_path / target).read_bytes() == b"new"


def make_pipe(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@pytest.mark.parametrize(
    "place, word",
    [
        (lambda folder: "/dev/null", "device"),
        (make_pipe, "pipe"),
        (lambda folder: folder, "folder"),
    ],
    ids=["device", "pipe", "folder"],
)
def test_a_path_that_is_no_file_is_refused_and_stays(tmp_path, place, word):
    path = place(tmp_path)
    before = os.stat(path).st_mode
    with pytest.raises(UsageError, match=f"cannot write {path}.*{word}"):
        write(path)
    assert os.stat(path).st_mode == before


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out" / "m.joblib"
    write(path, b"old")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"half")
        raise KeyError
    assert os.listdir(path.parent) == ["m.joblib"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["n" * 255, "\u753b" * 85])
def test_a_name_of_the_greatest_length_can_be_written(tmp_path, name):
    with only_writer(tmp_path / "out" / name, ""):
        write(tmp_path / "out" / name)
    assert os.listdir(tmp_path / "out") == [name]


# ---- the commands ----


EXTRACT = "extract_features.py", "--data_dir", "data"
TRAIN = "train_model.py", "--features_file", "f.npz", "--model_output_path"
BY_NAME = {"ids": lambda words: words[0]}


@pytest.fixture
def run(script, monkeypatch):
    """Function: `script` with the small encoder."""
    monkeypatch.setenv("CLIP_MODEL", str(small.CHECKPOINT))
    return script


@pytest.fixture
def data(make_folder, tmp_path):
    """Images in `data`, and made-up features in f.npz."""
    write_features(tmp_path / "f.npz", make_columns(150, 150, dim=64))
    counts = {"train/real": 8, "train/fake": 8, "test/real": 4, "test/fake": 4}
    return make_folder(tmp_path / "data", counts)


@pytest.mark.parametrize(
    "command", [(*EXTRACT, "--output_file", "link"), (*TRAIN, "link")], **BY_NAME
)
def test_a_command_writes_through_a_link_with_the_users_umask(command, run, data, tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place/target")
    result = run(*command, first=lambda: os.umask(0o077))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "link").is_symlink() and mode(tmp_path / "place" / "target") == 0o600


@pytest.mark.parametrize(
    "command", [(*EXTRACT, "--output_file", "/dev/null"), (*TRAIN, "/dev/null")], **BY_NAME
)
def test_a_device_stays_a_device(command, run, data):
    assert_one_line_error(run(*command), "/dev/null", "device")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and not os.path.exists("/dev/null.parts")


def test_a_pipe_behind_dev_stdout_is_named_as_a_pipe(run, data):
    result = run(*EXTRACT, "--output_file", "/dev/stdout")
    assert_one_line_error(result, "--output_file /dev/stdout: it is a device or a pipe")


# ---- errors of the system ----


def small_files():
    """Limit files to 8 kB, so that writing fails in the middle of a file, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))


@pytest.mark.parametrize(
    "command",
    [
        (*EXTRACT, "--output_file", "out/f.npz"),
        ("prepare_clip.py", "--clip_model", str(small.CHECKPOINT), "--layers", "1"),
        (*TRAIN, "out/model.joblib"),
    ],
    **BY_NAME,
)
def test_a_refused_write_is_one_line_and_leaves_no_half_file(command, run, data, tmp_path):
    cache = sorted((tmp_path / "home/.clip/encoders").iterdir())
    result = run(*command, first=small_files)
    assert_one_line_error(result, "cannot write", "File too large", "ulimit -f")
    assert sorted((tmp_path / "home/.clip/encoders").iterdir()) == cache
    for path in (tmp_path / "out").rglob("*.*"):  # whole parts stay, for the run that resumes
        is_part = path.suffix == ".parts" or path.name == "key.json"
        assert is_part or len(np.load(path)["paths"]), path


def test_the_error_of_a_report_names_the_report_and_no_scratch_folder(tmp_path):
    with pytest.raises(UsageError, match=f"cannot write {tmp_path}/report/a.png: No space left"):
        with atomic_folder(tmp_path / "report") as place:
            with atomic_write(place / "a.png"):
                raise OSError(errno.ENOSPC, "No space left on device")


def test_the_same_command_resumes_after_an_error(run, data, tmp_path):
    run(*EXTRACT, "--batch_size", "4", first=small_files)
    result = run(*EXTRACT, "--batch_size", "4")
    assert result.returncode == 0, result.stderr
    assert "24 images" in result.stdout and not (tmp_path / "features.npz.parts").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("audit.py", "--features_file", "f.npz"),
        ("classify.py", "--image_path", "data/test", "--model_path", str(BASELINE)),
    ],
    **BY_NAME,
)
def test_a_full_stdout_is_one_line(command, script, data):
    with open("/dev/full", "w") as full:
        result = script(*command, stdout=full)
    assert_one_line_error(result, "the output: No space left on device; free some")


def test_help_into_a_full_stdout_is_one_line(script):
    with open("/dev/full", "w") as full:
        result = script("classify.py", "--help", stdout=full, PYTHONUNBUFFERED=None)
    assert_one_line_error(result, "the output: No space left on device; free some")


@pytest.mark.parametrize(
    "words, code",
    [(["--help"], 0), (["--nonsense"], 2), (["--image_path", "nowhere"], 2)],
    ids=["help", "argparse", "ours"],
)
@pytest.mark.parametrize("target", ["/dev/full", None], ids=["full", "closed"])
def test_a_full_or_closed_stderr_keeps_the_exit_code(script, words, code, target):
    def first():
        os.dup2(os.open(target, os.O_WRONLY), 2) if target else os.close(2)

    result = script("classify.py", *words, first=first, PYTHONUNBUFFERED=None)
    assert result.returncode == code and "error" not in result.stdout


def test_a_closed_stdout_is_no_error(script, data):
    result = script("audit.py", "--features_file", "f.npz", first=lambda: os.close(1))
    assert "Traceback" not in result.stderr


def test_without_home_and_user_name_the_error_asks_for_clip_cache():
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from detector.base.console import run\n"
        "from detector.encoders.runtime import cache_dir\n"
        "if os.getuid() == 0:\n"
        "    os.setgroups([]); os.setgid(12345); os.setuid(12345)  # a user without a name\n"
        "run(lambda: print(cache_dir()))"
    )
    options = {"capture_output": True, "text": True, "env": {"PATH": os.environ["PATH"]}}
    result = subprocess.run([sys.executable, "-c", code], cwd="/", **options)
    assert_one_line_error(result, "neither HOME nor CLIP_CACHE is set", "set CLIP_CACHE")


def test_without_home_clip_cache_suffices(run, data):
    result = run(*EXTRACT, HOME=None)
    assert result.returncode == 0, result.stderr


# ---- two processes ----


def test_the_second_run_with_the_same_output_names_the_first(run, data, tmp_path):
    (tmp_path / "link.npz").symlink_to("features.npz")
    with only_writer(tmp_path / "features.npz", "--output_file features.npz"):
        for name in ("features.npz", "link.npz"):
            result = run(*EXTRACT, "--output_file", name)
            words = f"--output_file {name}: process {os.getpid()} is writing it"
            assert_one_line_error(result, words, "wait")
    assert not list(tmp_path.glob(".features*"))
    assert run(*EXTRACT).returncode == 0


def test_a_lock_is_taken_again_when_its_last_holder_removes_the_file(tmp_path, monkeypatch):
    output, lock, take = tmp_path / "f.npz", tmp_path / ".f.npz.lock", fcntl.flock

    def take_late(file, flags):  # the last holder ends between the opening and the lock
        monkeypatch.setattr(fcntl, "flock", take)
        lock.unlink()
        take(file, flags)

    monkeypatch.setattr(fcntl, "flock", take_late)
    with only_writer(output, "--output_file f.npz"):
        assert lock.read_text() == str(os.getpid())
        with pytest.raises(UsageError, match="is writing it"), only_writer(output, ""):
            pass


# ---- names ----


@pytest.mark.parametrize(
    "name, shown",
    [
        ("a\nb.jpg", r"a\nb.jpg"),
        ("a\x1b[31m.jpg", r"a\x1b[31m.jpg"),
        ("é 漢.jpg", "é 漢.jpg"),
        ("a\udcff.jpg", r"a\udcff.jpg"),
        ("a\u2028b", r"a\u2028b"),
        ("a\u2029b", r"a\u2029b"),
        ("a\u202egpj.b", r"a\u202egpj.b"),
        ("a\u2067b", r"a\u2067b"),
        ("👩\u200d🚀", "👩\u200d🚀"),
    ],
)
def test_control_characters_and_bytes_that_are_not_utf_8_are_escaped(name, shown):
    assert printable(name) == shown


def test_one_verdict_is_one_line_whatever_the_name(script, data):
    folder = data / "test/real"
    picture = (folder / "000.jpg").read_bytes()
    (folder / "a\nb.jpg").write_bytes(picture)
    (folder / os.fsdecode(b"c\xff.jpg")).write_bytes(picture)
    (folder / "broken\r.jpg").write_bytes(picture[:500])
    result = script("classify.py", "--image_path", folder, "--model_path", BASELINE)
    lines = result.stdout.splitlines()
    assert len(lines) == 6 and all(": real (" in line or ": fake (" in line for line in lines)
    assert r"a\nb.jpg: " in result.stdout and r"c\udcff.jpg: " in result.stdout
    assert r"broken\r.jpg: error" in result.stderr and result.returncode == 1


@pytest.mark.parametrize(
    "command", [["extract_features.py", "--max_bad_fraction", "1"], ["audit.py"]]
)
def test_a_file_that_cannot_be_read_is_one_line_whatever_its_name(command, script, data):
    (data / "test/real/a\x1b[31m\nb.jpg").write_bytes(b"\xff\xd8\xff")
    result = script(*command, "--data_dir", data, CLIP_MODEL=str(small.CHECKPOINT))
    assert r"test/real/a\x1b[31m\nb.jpg: " in result.stderr
