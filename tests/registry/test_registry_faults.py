"""Faults of a registry in a file are one-line errors. Of two commands at once none is lost."""

import contextlib
import errno
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import ROOT, assert_one_line_error
from live import free_port
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from racing import one_of_two_is_promoted, one_of_two_is_registered
from standins import Stub

import registry
from detector.base.errors import UsageError
from detector.model.signature import signature_path
from detector.registry import champion, store, versions

pytestmark = [  # MLflow starts slowly, and calls functions that SQLAlchemy deprecates
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
]
CAPABILITIES = "-dac_override,-dac_read_search"
DROP = ["setpriv", f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}"]
PLAIN_USER = [] if os.geteuid() else DROP  # the permissions of files then hold for root, too


@pytest.fixture(autouse=True)
def here(address, monkeypatch, tmp_path):
    """The registry is a file in a folder of this test's own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    use(monkeypatch, tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def server():
    """None is needed here; test_registry.py tests a server."""
    return SimpleNamespace(address="")


def use(monkeypatch, folder):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")


@pytest.fixture
def refused(capfd):
    """Function: the command ends with one line that matches all of `words`, and logs nothing."""

    def call(command, *words):
        capfd.readouterr()
        with pytest.raises(UsageError) as error:
            registry.main(list(map(str, command)))
        line = str(error.value)
        assert len(line.splitlines()) == 1 and all(re.search(word, line) for word in words), line
        assert capfd.readouterr().err == ""

    return call


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


# ---- the address ----


@pytest.mark.parametrize(
    "uri",
    [
        "./mlruns",
        "file:./mlruns",
        "file:///tmp/mlruns",
        "mlflow.db",
        "nonsense",
        "ftp://host/x",
        "databricks",
        "sqlite:mlflow.db",
        "sqlite://mlflow.db",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///a?b=c",
        " sqlite:///mlflow.db",
        "SQLITE:///mlflow.db",
        "http://",
        "http://:5000",
        "http://host:port",
        "http://[::1",
    ],
)
def test_an_address_that_cannot_hold_a_registry_is_refused_before_mlflow_sees_it(
    uri, refused, monkeypatch, here
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    refused(
        ["list"], re.escape(f"MLFLOW_TRACKING_URI={uri}: "), "sqlite:///mlflow.db", "http://HOST"
    )
    assert files(here) == []


def test_a_missing_database_driver_is_named_and_the_password_is_masked(refused, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql+nodriver://me:secret@127.0.0.1/x")
    refused(["list"], r"registry mysql\+nodriver://me:\*\*\*@127.0.0.1/x: ")


def test_a_database_whose_driver_is_not_installed_says_what_to_do(refused, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql+mysqldb://me:secret@127.0.0.1/x")
    refused(["list"], "No module named 'MySQLdb'; pip install the driver of this database$")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
        sqlite3.OperationalError("database or disk is full"),
    ],
    ids=["disk", "limit", "database"],
)
def test_where_space_ends_the_remedy_is_to_free_some(error):
    with pytest.raises(UsageError, match="; free some space"), store.one_line(OSError):
        raise error


def test_an_address_where_nothing_listens_is_refused(refused, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    refused(["list"], "Connection refused; is MLFLOW_TRACKING_URI right.$")


@pytest.mark.parametrize("status", [200, 404])
def test_a_web_page_is_no_registry(refused, monkeypatch, status):
    with Stub(lambda *_: (status, {"Content-Type": "text/html"}, b"<html>hello</html>")) as stub:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", stub.url)
        refused(["list"], "web page", "no MLflow server")


def test_a_dead_proxy_is_named_with_its_variable_and_the_remedy(refused, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.test")
    for name in ("http_proxy", "ALL_PROXY"):
        with monkeypatch.context() as patch:
            patch.setenv(name, f"http://me:secret@127.0.0.1:{free_port()}")
            refused(
                ["list"],
                rf"me:\*\*\*@127.0.0.1:\d+ of {name}",
                f"unset {name}",
                "NO_PROXY=mlflow.test",
            )


# ---- the file ----


def test_neither_reading_nor_a_missing_model_makes_a_registry(refused, here):
    for command in (
        ["list"],
        ["pull", "d@champion"],
        ["rollback", "d"],
        ["promote", "d", "1", "--force", "x"],
    ):
        refused(command, "no registry at .*mlflow.db yet", "register NAME model.joblib makes it")
    refused(["register", "d", "nowhere.joblib"], "nowhere.joblib")
    assert files(here) == []


@pytest.fixture
def filled(here, place):
    """The folder, with two versions of `d`. v1.0.0 is the champion."""
    for name in ("good", "better"):
        registry.main(["register", "d", str(place / f"{name}.joblib")])
    registry.main(["promote", "d", "v1.0.0", "--force", "a start"])
    return here


def damage(path):
    data = path.read_bytes()
    path.write_bytes(data[:8192] + b"\xa5" * (len(data) - 8192))


def other(path):
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE birds(name)")


def newer(path):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda path: path.write_text("a text, and no database"), ["not a database", "damaged"]),
        (damage, ["malformed", "put a copy of it back"]),
        (lambda path: path.write_bytes(b""), ["no such table", "empty"]),
        (lambda path: (path.unlink(), path.mkdir()), ["unable to open"]),
        (other, ["no such table", "another program's"]),
        (newer, ["ffffffffffff", "requirements/mlflow.txt"]),
    ],
    ids=["text", "damaged", "empty", "folder", "another's", "newer"],
)
def test_a_file_that_holds_no_registry_is_refused_and_left_alone(
    filled, refused, tmp_path, monkeypatch, spoil, words
):
    copy = tmp_path / "copy"  # at an address that MLflow has not opened yet
    shutil.copytree(filled, copy)
    use(monkeypatch, copy)
    file = copy / "mlflow.db"
    spoil(file)
    before = file.is_file() and file.read_bytes()
    refused(["list"], "mlflow.db: ", *words)
    assert before == (file.is_file() and file.read_bytes())


def test_a_file_that_another_program_holds_is_refused_as_locked(filled, refused):
    with contextlib.closing(sqlite3.connect("mlflow.db")) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        refused(["list"], "mlflow.db: database is locked; another program holds it")


def process(*words, before=(*PLAIN_USER, sys.executable)):
    """registry.py as a process of a user whom the permissions of files bind."""
    return subprocess.run([*before, ROOT / "registry.py", *words], capture_output=True, text=True)


def assert_only_line(result, *words):
    assert_one_line_error(result, *words)
    assert len(result.stderr.splitlines()) == 1


def test_a_read_only_file_can_be_listed_and_not_changed(filled, place):
    Path("mlflow.db").chmod(0o444)
    before = files(filled)
    assert process("list").returncode == 0
    for words in (
        ["register", "d", place / "worse.joblib"],
        ["promote", "d", "v1.1.0", "--force", "x"],
    ):
        remedy = "readonly database; let this user write"
        assert_only_line(process(*words), remedy, "MLFLOW_TRACKING_URI")
    assert files(filled) == before


def test_a_read_only_folder_is_a_one_line_error(here, place):
    here.chmod(0o555)
    result = process("register", "d", place / "good.joblib")
    assert_only_line(result, "mlflow.db: Permission denied", "MLFLOW_TRACKING_URI")
    assert files(here) == []


@pytest.mark.parametrize("limit, folder", [(200_000, "here"), (20_000, "filled")])
def test_a_full_disk_registers_nothing(here, place, request, limit, folder):
    before = files(request.getfixturevalue(folder))
    code = (
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1));"
        " sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]);"
        " runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    model = place / "worse.joblib"
    result = process("register", "d", model, before=[sys.executable, "-c", code])
    words = ["free some space"] if folder == "here" else []  # SQLite calls a limit an I/O error
    assert_only_line(result, "the registry ", "mlflow.db", *words)
    assert [path for path in files(here) if path not in before and path != "mlruns"] == []


def test_a_full_disk_under_a_new_name_is_a_one_line_error(filled, place, refused, monkeypatch):
    def full(*_):
        raise MlflowException("database or disk is full")

    monkeypatch.setattr(MlflowClient, "create_experiment", full)
    refused(["register", "another", place / "good.joblib"], "free some space")


def test_a_file_that_is_replaced_while_it_is_registered_is_refused(
    here, place, tmp_path, refused, monkeypatch
):
    model, read = shutil.copy(place / "good.joblib", tmp_path), versions.parameters_of
    shutil.copytree(place / "good_report", tmp_path / "good_report")

    def replace(*args):
        shutil.copy(place / "better.joblib", model)
        return read(*args)

    monkeypatch.setattr(versions, "parameters_of", replace)
    refused(["register", "d", model], "good.joblib was replaced meanwhile: register it again")
    assert not list(here.glob("mlruns/d/*"))


# ---- users and places ----


def test_a_user_without_a_name_is_recorded_by_number(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    assert champion.who().startswith("uid4000000000@")


def test_a_moved_registry_is_read_and_written_in_its_new_place(
    filled, place, tmp_path, monkeypatch
):
    moved = tmp_path / "moved"
    filled.rename(moved)
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, moved)
    registry.main(["pull", "d@champion", "--out", "pulled.joblib"])
    assert Path("pulled.joblib").read_bytes() == (place / "good.joblib").read_bytes()
    registry.main(["register", "d", str(place / "worse.joblib")])
    registry.main(["pull", "d@v1.2.0", "--out", "pulled.joblib"])
    assert Path("pulled.joblib").read_bytes() == (place / "worse.joblib").read_bytes()
    assert not filled.exists() and not Path("mlruns").exists()


def test_missing_model_files_are_named_with_their_place(filled, refused, here):
    shutil.rmtree("mlruns")
    refused(["pull", "d@champion"], str(here / "mlruns"), "put the folder mlruns back")
    assert not Path("model.joblib").exists()


def test_a_pull_that_fails_keeps_the_previous_model_and_signature(filled, refused, monkeypatch):
    Path("m.joblib").write_text("before")
    signature_path("m.joblib").write_text("before")
    Path("folder.joblib").mkdir()
    refused(["pull", "d@champion", "--out", "folder.joblib"], "folder.joblib: it is a folder")
    monkeypatch.setattr(versions, "sha256", lambda data: "of another file")
    refused(["pull", "d@champion", "--out", "m.joblib"], "is not the one that was registered")
    assert Path("m.joblib").read_text() == signature_path("m.joblib").read_text() == "before"


def test_a_file_that_changes_after_its_check_is_not_pulled(filled, place, monkeypatch):
    def replaced(path):
        Path(path).write_text("planted")

    monkeypatch.setattr(versions, "load_model", replaced)
    registry.main(["pull", "d@champion"])
    assert Path("model.joblib").read_bytes() == (place / "good.joblib").read_bytes()


def test_a_reason_too_long_for_a_record_is_refused(refused):
    refused(
        ["promote", "d", "1", "--force", "x" * 501],
        "--force: a reason of 501 characters; .* at most 500",
    )


# ---- two at once ----


@pytest.mark.parametrize("attempt", [0, 1])
def test_two_first_registrations_at_once_both_succeed(race, place, here, attempt):
    commands = (["register", "d", place / f"{name}.joblib"] for name in ("good", "better"))
    results = race(here, *commands)
    assert [code for code, _ in results] == [0, 0], results
    assert sorted(path.name for path in here.iterdir()) == ["mlflow.db", "mlruns"]


def test_of_two_files_registered_as_one_version_at_once_one_is_refused(race, twins, filled):
    for attempt in range(2):
        one_of_two_is_registered(race, twins, filled, f"model{attempt}")
    assert len(list(filled.glob("mlruns/model*/*"))) == 2


def test_of_two_promotions_at_once_one_is_refused_and_rollback_goes_one_step(
    race, register_three, here
):
    for attempt in range(2):
        register_three(f"model{attempt}")
        one_of_two_is_promoted(race, here, f"model{attempt}")


@pytest.fixture
def meanwhile(monkeypatch):
    """Function: another file is registered between the check of a `register` and its act."""

    def call(name, path):
        log = versions.log_run

        def late(*args):
            monkeypatch.setattr(versions, "log_run", log)
            registry.main(["register", name, str(path)])
            log(*args)

        monkeypatch.setattr(versions, "log_run", late)

    return call


def test_a_file_that_is_registered_meanwhile_is_there_once(meanwhile, place, here, capsys):
    meanwhile("d", place / "good.joblib")
    registry.main(["register", "d", str(place / "good.joblib")])
    assert "is registered already" in capsys.readouterr().out.splitlines()[-1]
    assert len(store.connect().search_model_versions("name='d'")) == 1
    assert len(list(here.glob("mlruns/d/*"))) == 1


def test_a_version_that_another_file_takes_meanwhile_is_refused(meanwhile, twins, refused, here):
    meanwhile("d", twins[0])
    refused(["register", "d", str(twins[1])], "'d' has a v1.1.0 of another file")
    assert len(store.connect().search_model_versions("name='d'")) == 1
    assert len(list(here.glob("mlruns/d/*"))) == 1
