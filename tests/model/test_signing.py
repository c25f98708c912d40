"""Signed model files: with MODEL_PUBLIC_KEY only a file that the key's owner signed is read."""

import base64
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, assert_one_line_error
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from engines import engine_on, lines, model_file, reload, versions
from made_up import BASELINE, make_columns

from detector.base.errors import ModelError, UsageError
from detector.model import signature
from detector.model.file import load_model, save_model
from detector.service.engine import check, read_model
from detector.service.settings import read_settings

pytestmark = pytest.mark.usefixtures("compiled_once")


def private_pem(key, encryption):
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )


def write_keys(folder, name="key", key=None):
    """A pair of keys as openssl writes them -> (private, public) paths."""
    key = key or ed25519.Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.public.pem"
    private.write_bytes(private_pem(key, serialization.NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture
def signed(tmp_path):
    """The small model, signed -> paths of (model, private key, public key)."""
    private, public = write_keys(tmp_path)
    path = shutil.copy(BASELINE, tmp_path / "model.joblib")
    signature.sign(path, Path(path).read_bytes(), signature.read_key(private, "--sign", "private"))
    return path, private, public


def test_a_signed_model_loads_with_its_key_and_without_a_key(signed, monkeypatch):
    path, _, public = signed
    expected = load_model(BASELINE)["sha256"]
    assert load_model(path)["sha256"] == load_model(path, public)["sha256"] == expected
    monkeypatch.setenv("MODEL_PUBLIC_KEY", str(public))
    assert load_model(path)["sha256"] == expected


def unsigned(path):
    signature.signature_path(path).unlink()


def another_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_file_put_there_since_gets_no_signature(tmp_path):
    private, public = write_keys(tmp_path)
    path = tmp_path / "m.joblib"
    written, _ = (save_model(path, load_model(BASELINE) | versions(v)) for v in ("v1", "v2"))
    signature.sign(path, written, signature.read_key(private, "--sign", "private"))
    with pytest.raises(ModelError, match="is no signature of it"):
        load_model(path, public)


def another_key(path):
    signature.sign(path, path.read_bytes(), ed25519.Ed25519PrivateKey.generate())


def another_model(path):
    """The owner signed another model."""
    model_file(path, **versions("v2"))


def cut(path):
    signature.signature_path(path).write_text(signature.signature_path(path).read_text()[:40])


def junk(path):
    signature.signature_path(path).write_bytes(b"\xff\x00 no signature \n")


def with_junk(path):
    signature.signature_path(path).write_text("!" + signature.signature_path(path).read_text())


WRONG = "model.joblib.sig is no signature of it by MODEL_PUBLIC_KEY=.*key.public.pem"


@pytest.mark.parametrize(
    "attack, words",
    [
        (unsigned, "it is not signed: .*model.joblib.sig cannot be read .No such file"),
        (another_byte, WRONG),
        (another_key, WRONG),
        (another_model, WRONG),
        (cut, WRONG),
        (junk, WRONG),
        (with_junk, WRONG),
    ],
)
def test_a_file_that_the_owner_did_not_sign_is_refused_with_the_remedy(signed, attack, words):
    path, _, public = signed
    attack(path)
    message = f"model.joblib is refused: .*{words}.*; sign it with train_model.py --sign, or"
    with pytest.raises(ModelError, match=message) as error:
        load_model(path, public)
    assert len(str(error.value).splitlines()) == 1


def test_the_signature_is_checked_before_the_file_is_unpickled(signed):
    path, _, public = signed
    path.write_bytes(b"no pickle at all")
    with pytest.raises(ModelError, match="is no signature of it"):
        load_model(path, public)


def test_a_signature_is_the_64_bytes_of_openssl_in_base64(signed):
    path, private, _ = signed
    command = ["openssl", "pkeyutl", "-sign", "-inkey", private, "-rawin", "-in", path]
    expected = subprocess.run(command, capture_output=True, check=True).stdout
    assert len(expected) == 64
    assert signature.signature_path(path).read_bytes() == base64.b64encode(expected) + b"\n"


def test_without_the_variable_cryptography_is_not_imported():
    code = (
        "import sys; from detector.model import file; file.load_model(sys.argv[1]);"
        " print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, BASELINE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = result.stdout.split()
    assert "detector.model.signature" in modules and "cryptography" not in modules


def test_an_empty_variable_requires_no_signature(signed, monkeypatch):
    unsigned(signed[0])
    monkeypatch.setenv("MODEL_PUBLIC_KEY", "")
    assert load_model(signed[0])


@pytest.mark.parametrize("kind, given", [("public", "MODEL_PUBLIC_KEY"), ("private", "--sign")])
def test_without_cryptography_the_error_says_how_to_install_it(tmp_path, monkeypatch, kind, given):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    message = f"{given} .*key.pem: needs cryptography .*pip install -r requirements-serve.txt"
    with pytest.raises(UsageError, match=message):
        signature.read_key(tmp_path / "key.pem", given, kind)


def test_a_file_that_is_no_public_key_is_named(signed, tmp_path):
    path, private, _ = signed
    _, of_rsa = write_keys(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    wrong, missing = "is no public Ed25519 key .* openssl", "cannot read .*: No such file .*; make"
    keys = {private: wrong, of_rsa: wrong, path: wrong, tmp_path / "nowhere.pem": missing}
    for key, words in keys.items():
        with pytest.raises(UsageError, match=f"MODEL_PUBLIC_KEY {key}: {words}"):
            load_model(path, key)


def test_train_model_signs_and_removes_an_old_signature(train, quick, tmp_path):
    private, public = write_keys(tmp_path)
    train(make_columns(), sign=private)
    assert load_model(tmp_path / "model.joblib", public)
    train(make_columns())
    assert not (tmp_path / "model.joblib.sig").exists()


def with_a_password(folder):
    encryption = serialization.BestAvailableEncryption(b"secret")
    path = folder / "locked.pem"
    path.write_bytes(private_pem(ed25519.Ed25519PrivateKey.generate(), encryption))
    return path


BAD_KEYS = {
    "public": lambda folder: write_keys(folder)[1],
    "password": with_a_password,
    "missing": lambda folder: folder / "nowhere.pem",
    "RSA": lambda folder: write_keys(folder, "rsa", rsa.generate_private_key(65537, 2048))[0],
}


@pytest.mark.parametrize("key", BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_key_that_cannot_sign_is_refused_before_the_training(train, tmp_path, key):
    path = key(tmp_path)
    with pytest.raises(UsageError, match=f"^--sign {path}: .*; make one with openssl"):
        train(make_columns(), sign=path)
    assert not (tmp_path / "model.joblib").exists()


def test_a_key_that_cannot_sign_is_a_one_line_error(command, tmp_path):
    _, public = write_keys(tmp_path)
    result = command("--sign", public)
    assert_one_line_error(result, f"--sign {public}: is no private Ed25519 key")
    assert "images to train" not in result.stderr


def test_classify_refuses_an_unsigned_model_in_one_line(script, signed, photos):
    path, _, public = signed
    command = "classify.py", "--image_path", photos["chelsea.png"], "--model_path", path
    assert script(*command, MODEL_PUBLIC_KEY=str(public)).returncode == 0
    unsigned(path)
    assert_one_line_error(script(*command, MODEL_PUBLIC_KEY=str(public)), "it is not signed")
    assert script(*command).returncode == 0


def test_the_service_refuses_an_unsigned_model(signed):
    path, _, public = signed
    settings = read_settings(
        {"MODEL_PATH": str(path), "MODEL_PUBLIC_KEY": str(public), "ALLOW_DEMO_MODEL": "1"}
    )
    assert read_model(settings)["sha256"] == load_model(path)["sha256"]
    another_byte(path)
    for refuses in (read_model, check):
        with pytest.raises(ModelError, match="is no signature of it"):
            refuses(settings)


def test_after_a_reload_the_old_model_serves_until_the_new_model_is_signed(signed, caplog):
    path, private, public = signed
    caplog.set_level("INFO")
    engine = engine_on(MODEL_PATH=path, MODEL_PUBLIC_KEY=public)
    old = engine.ready()
    model_file(path, **versions("v2"))
    assert reload(engine) == "failed" and engine.ready() is old
    (line,) = lines(caplog, "load_failed")
    assert line["old_model_serves"] is True and "is no signature of it" in line["message"]
    signature.sign(path, Path(path).read_bytes(), signature.read_key(private, "--sign", "private"))
    assert reload(engine) == "ok" and engine.ready().model["versions"]["model"] == "v2"
