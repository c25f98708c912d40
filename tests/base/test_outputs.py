"""Where outputs land: links are followed, modes follow the umask, devices stay devices, nothing is half-written."""

import errno
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
    """Function: sets the umask; it is put back afterwards."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


# ---- one file ----


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path, umask, mask):
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


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
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
        (lambda folder: "/dev/full", "device"),
        (make_pipe, "pipe"),
        (lambda folder: folder, "folder"),
    ],
    ids=["null", "full", "pipe", "folder"],
)
def test_what_is_no_file_is_refused_and_stays(tmp_path, place, word):
    path = place(tmp_path)
    before = os.stat(path).st_mode
    with pytest.raises(UsageError, match=f"cannot write {path}.*{word}"):
        write(path)
    assert os.stat(path).st_mode == before


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out" / "m.joblib"
    write(path, b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"half")
        1 / 0
    assert os.listdir(path.parent) == ["m.joblib"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["n" * 255, "\u753b" * 85])
def test_a_name_as_long_as_the_system_takes_can_be_written(tmp_path, name):
    with only_writer(tmp_path / "out" / name, ""):
        write(tmp_path / "out" / name)
    assert os.listdir(tmp_path / "out") == [name]


# ---- the commands ----


@pytest.fixture
def data(make_folder, tmp_path):
    return make_folder(
        tmp_path / "data", {"train/real": 8, "train/fake": 8, "test/real": 4, "test/fake": 4}
    )


@pytest.mark.parametrize(
    "command",
    [
        ["extract_features.py", "--data_dir", "data", "--output_file", "link"],
        ["train_model.py", "--features_file", "f.npz", "--model_output_path", "link"],
    ],
    ids=lambda words: words[0],
)
def test_a_command_writes_through_a_link_with_the_umask_of_its_user(
    command, script, data, tmp_path
):
    write_features(tmp_path / "f.npz", make_columns())
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place/target")
    result = script(*command, CLIP_MODEL=str(small.CHECKPOINT), first=lambda: os.umask(0o077))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "link").is_symlink() and mode(tmp_path / "place" / "target") == 0o600


@pytest.mark.parametrize(
    "command",
    [
        ["extract_features.py", "--data_dir", "data", "--output_file", "/dev/null"],
        ["train_model.py", "--features_file", "f.npz", "--model_output_path", "/dev/null"],
    ],
    ids=lambda words: words[0],
)
def test_a_device_stays_a_device(command, script, data, tmp_path):
    write_features(tmp_path / "f.npz", make_columns())
    assert_one_line_error(script(*command, CLIP_MODEL=str(small.CHECKPOINT)), "/dev/null", "device")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and not os.path.exists("/dev/null.parts")


def test_a_pipe_behind_dev_stdout_is_called_one(script, data):
    command = ["extract_features.py", "--data_dir", "data", "--output_file", "/dev/stdout"]
    assert_one_line_error(script(*command), "--output_file /dev/stdout: it is a device or a pipe")


# ---- what the system refuses ----


def small_files():
    """No file may be larger than 8 kB: as on a full disk, writing fails in the middle of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))


@pytest.mark.parametrize(
    "command",
    [
        ["extract_features.py", "--data_dir", "data", "--output_file", "out/f.npz"],
        ["prepare_clip.py", "--clip_model", str(small.CHECKPOINT), "--layers", "1"],
        ["train_model.py", "--features_file", "f.npz", "--model_output_path", "out/model.joblib"],
    ],
    ids=lambda words: words[0],
)
def test_a_write_that_the_system_refuses_is_one_line_and_leaves_nothing_half_written(
    command, script, data, tmp_path
):
    write_features(tmp_path / "f.npz", make_columns(150, 150, dim=64))
    cache = sorted((tmp_path / "home/.clip/encoders").iterdir())
    result = script(*command, CLIP_MODEL=str(small.CHECKPOINT), first=small_files)
    assert_one_line_error(result, "cannot write", "File too large", "ulimit -f")
    assert sorted((tmp_path / "home/.clip/encoders").iterdir()) == cache
    for path in (tmp_path / "out").rglob("*.*"):  # whole parts stay, for the run that resumes
        assert path.suffix == ".parts" or path.name == "key.json" or len(np.load(path)["paths"]), (
            path
        )


def test_a_report_that_the_system_refuses_is_told_of_its_own_place(tmp_path):
    with pytest.raises(UsageError, match=f"cannot write {tmp_path}/report/a.png: No space left"):
        with atomic_folder(tmp_path / "report") as place:
            with atomic_write(place / "a.png"):
                raise OSError(errno.ENOSPC, "No space left on device")


def test_the_same_command_resumes_after_a_refusal(script, data, tmp_path):
    command = ["extract_features.py", "--data_dir", "data", "--batch_size", "4"]
    script(*command, CLIP_MODEL=str(small.CHECKPOINT), first=small_files)
    result = script(*command, CLIP_MODEL=str(small.CHECKPOINT))
    assert result.returncode == 0, result.stderr
    assert "24 images" in result.stdout and not (tmp_path / "features.npz.parts").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["audit.py", "--features_file", "f.npz"],
        ["classify.py", "--image_path", "data/test", "--model_path", str(BASELINE)],
    ],
    ids=lambda words: words[0],
)
def test_a_full_stdout_is_one_line(command, script, data, tmp_path):
    write_features(tmp_path / "f.npz", make_columns())
    with open("/dev/full", "w") as full:
        assert_one_line_error(
            script(*command, stdout=full), "the output: No space left on device; free some"
        )


def test_a_closed_stdout_is_no_error(script, tmp_path):
    write_features(tmp_path / "f.npz", make_columns())
    result = script("audit.py", "--features_file", "f.npz", first=lambda: os.close(1))
    assert "Traceback" not in result.stderr


def test_without_home_and_a_name_a_cache_that_is_named_suffices(script, data, tmp_path):
    nobody = {"HOME": None, "CLIP_MODEL": str(small.CHECKPOINT)}
    as_nobody = lambda: (
        (os.setgroups([]), os.setgid(12345), os.setuid(12345)) if os.getuid() == 0 else None
    )  # noqa: E731
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                f"import sys; sys.path.insert(0, {str(ROOT)!r}); from detector.base.console import"
                " run; from detector.encoders.runtime import cache_dir\nrun(lambda:"
                " print(cache_dir()))"
            ),
        ],
        capture_output=True,
        text=True,
        preexec_fn=as_nobody,
        env={"PATH": os.environ["PATH"]},
        cwd="/",
    )
    assert_one_line_error(result, "neither HOME nor CLIP_CACHE is set", "set CLIP_CACHE")
    result = script("extract_features.py", "--data_dir", data, **nobody)
    assert result.returncode == 0, result.stderr


# ---- two at once ----


def test_the_second_run_with_an_output_says_who_holds_it(script, data, tmp_path):
    (tmp_path / "link.npz").symlink_to("features.npz")
    with only_writer(tmp_path / "features.npz", "--output_file features.npz"):
        for name in ("features.npz", "link.npz"):
            result = script(
                "extract_features.py",
                "--data_dir",
                data,
                "--output_file",
                name,
                CLIP_MODEL=str(small.CHECKPOINT),
            )
            assert_one_line_error(
                result, f"--output_file {name}: process {os.getpid()} is writing it", "wait"
            )
    assert not list(tmp_path.glob(".features*"))
    assert (
        script(
            "extract_features.py", "--data_dir", data, CLIP_MODEL=str(small.CHECKPOINT)
        ).returncode
        == 0
    )


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
def test_control_characters_and_bytes_that_are_no_utf_8_are_escaped(name, shown):
    assert printable(name) == shown


def test_one_verdict_is_one_line_whatever_the_name(script, data):
    picture = (data / "test/real/000.jpg").read_bytes()
    for name, content in (
        ("a\nb.jpg", picture),
        (os.fsdecode(b"c\xff.jpg"), picture),
        ("broken\r.jpg", picture[:500]),
    ):
        (data / "test/real" / name).write_bytes(content)
    result = script("classify.py", "--image_path", data / "test/real", "--model_path", BASELINE)
    lines = result.stdout.splitlines()
    assert len(lines) == 6 and all(": real (" in line or ": fake (" in line for line in lines)
    assert any(r"a\nb.jpg: " in line for line in lines) and any(
        r"c\udcff.jpg: " in line for line in lines
    )
    assert r"broken\r.jpg: error" in result.stderr and result.returncode == 1


@pytest.mark.parametrize(
    "command", [["extract_features.py", "--max_bad_fraction", "1"], ["audit.py"]]
)
def test_a_file_that_cannot_be_read_is_one_line_whatever_its_name(command, script, data):
    (data / "test/real/a\x1b[31m\nb.jpg").write_bytes(b"\xff\xd8\xff")
    result = script(*command, "--data_dir", data, CLIP_MODEL=str(small.CHECKPOINT))
    assert r"test/real/a\x1b[31m\nb.jpg: " in result.stderr
