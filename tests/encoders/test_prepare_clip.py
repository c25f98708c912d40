"""prepare_clip.py stores an encoder atomically, and every failure is one line with a remedy.

A server on 127.0.0.1 replaces OpenAI's and serves a small archive with its own SHA-256.
test_encoder_parity.py tests the features.
"""

import gc
import hashlib
import http.server
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import clip
import numpy as np
import pytest
import small
import small_clip
import torch
from commands import ROOT, assert_one_line_error

from detector.base.errors import EncoderError
from detector.encoders import catalogue, prepare, runtime

# pooch leaves a failed download's connection to the garbage collector, called by `server`
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.usefixtures("one_thread"),
]
NAME, FILE = "ViT-L/14", "ViT-L-14.pt"
DEAD = "http://127.0.0.1:1/{sha256}/{file}"  # a port without a server


@pytest.fixture(autouse=True)
def empty_cache(clean_environment, monkeypatch, tmp_path):
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def archive(photos, tmp_path_factory):
    """Small checkpoints: {'archive': OpenAI's form, 'state dict': the same, 'other': weights}."""
    folder, images = tmp_path_factory.mktemp("checkpoints"), small_clip.crops(photos)
    tower, other = small_clip.small_vit(images), small_clip.small_vit(images, seed=1)
    return {
        "archive": small_clip.save_archive(tower, folder / "shipped.pt"),
        "state dict": small_clip.save_state_dict(tower, folder / "tuned.pt"),
        "other": small_clip.save_state_dict(other, folder / "other.pt"),
    }


def prepared_folders():
    """Folders in the cache that look like a prepared encoder."""
    return sorted(p.parent for p in runtime.cache_dir().glob("encoders/*/encoder.json"))


def assert_whole(folder, dim=32):
    assert {p.name for p in folder.iterdir()} == {
        "encoder.xml",
        "encoder.bin",
        "encoder.json",
        "vision.safetensors",
    }
    encoder = runtime.Encoder(folder, "cpu", "float32")
    assert encoder.encode(np.zeros((1, 3, 64, 64), np.float32)).shape == (1, dim)
    assert encoder.dim == dim


def files_in_cache():
    """All files in the cache, without the lock."""
    cache = runtime.cache_dir()
    files = {str(path.relative_to(cache)) for path in cache.rglob("*")}
    return files - {"encoders", "encoders.lock"}


# ---- downloads ----


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    mode, requests = "good", 0

    def __init__(self, body):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = body

    def handle_error(self, request, address):
        pass  # clients hang up in these tests


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        mode, body = self.server.mode, self.server.body
        if mode == "good at the second time":
            mode = "good" if self.server.requests > 1 else "not found"
        if mode == "not found":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if mode == "wrong file":
            body = body[:-1] + b"?"
        if mode in ("cut short", "reset"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        if mode == "reset":  # the client gets an error instead of an end
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(archive, monkeypatch):
    """Serves ViT-L/14. `.mode` sets its behaviour, `.requests` counts the requests."""
    body = archive["archive"].read_bytes()
    server = Server(body)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setitem(catalogue.OPENAI, NAME, (FILE, hashlib.sha256(body).hexdigest()))
    monkeypatch.setattr(
        catalogue, "ADDRESS", f"http://127.0.0.1:{server.server_port}/{{sha256}}/{{file}}"
    )
    monkeypatch.setattr(catalogue, "RETRIES", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    gc.collect()


def test_a_name_is_downloaded_checked_and_prepared_once(server, archive):
    folder = prepare.ensure_encoder(NAME)
    assert_whole(folder)
    assert (runtime.cache_dir() / FILE).read_bytes() == archive["archive"].read_bytes()
    assert runtime.read_manifest(folder)["name"] == NAME and folder.name.startswith("ViT-L-14-")
    assert prepare.ensure_encoder(NAME) == folder
    assert server.requests == 1


def test_a_prepared_encoder_needs_neither_the_download_nor_the_server(server):
    folder = prepare.ensure_encoder(NAME)
    (runtime.cache_dir() / FILE).unlink()
    server.mode = "not found"
    assert prepare.ensure_encoder(NAME) == folder and server.requests == 1


def test_a_file_copied_into_the_cache_is_used_without_the_server(server, archive):
    runtime.cache_dir().mkdir(parents=True)
    (runtime.cache_dir() / FILE).write_bytes(archive["archive"].read_bytes())
    assert_whole(prepare.ensure_encoder(NAME))
    assert server.requests == 0


def test_a_cached_file_with_a_wrong_hash_is_fetched_again(server):
    runtime.cache_dir().mkdir(parents=True)
    (runtime.cache_dir() / FILE).write_bytes(b"half of it")
    assert_whole(prepare.ensure_encoder(NAME))
    assert server.requests == 1


def test_a_download_that_fails_once_is_tried_again(server, monkeypatch):
    monkeypatch.setattr(catalogue, "RETRIES", 1)
    server.mode = "good at the second time"
    assert_whole(prepare.ensure_encoder(NAME))
    assert server.requests == 2


def test_the_weights_may_come_from_a_mirror_or_a_file(server, archive):
    mirror = f"http://127.0.0.1:{server.server_port}/mirror.pt"
    catalogue.ADDRESS = DEAD  # `server` restores it
    folder = prepare.ensure_encoder(NAME, weights=mirror)
    assert_whole(folder)
    assert server.requests == 1
    (runtime.cache_dir() / FILE).unlink()
    weights = str(archive["archive"])
    assert_whole(prepare.ensure_encoder(NAME, layers="penultimate", weights=weights), 128)
    assert FILE not in files_in_cache() and server.requests == 1


@pytest.mark.parametrize(
    "weights, words",
    [
        ("other", ["its SHA-256 is", "name another file"]),
        ("nowhere.pt", ["cannot read nowhere.pt"]),
        ("ftp2://x/y", ["cannot download ViT-L/14 from ftp2://x/y"]),
    ],
)
def test_weights_with_another_hash_are_refused(archive, weights, words):
    with pytest.raises(EncoderError) as error:
        prepare.ensure_encoder(NAME, weights=str(archive.get(weights, weights)))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert files_in_cache() == set()


def test_weights_flag_with_a_checkpoint_is_refused(script):
    result = script("prepare_clip.py", "--clip_model", "mine.pt", "--weights", "a.pt")
    assert_one_line_error(result, "--weights a.pt", "--clip_model is mine.pt")


@pytest.mark.parametrize(
    "mode, reason",
    [
        ("wrong file", "SHA-256"),
        ("cut short", "IncompleteRead"),
        ("reset", "reset"),
        ("not found", "404"),
        ("refused", "refused"),
    ],
)
def test_a_failed_download_names_both_remedies_and_leaves_nothing(
    server, mode, reason, monkeypatch
):
    server.mode = mode
    with monkeypatch.context() as patch:
        if mode == "refused":
            patch.setattr(catalogue, "ADDRESS", DEAD)
        with pytest.raises(EncoderError) as error:
            prepare.ensure_encoder(NAME)
    message = str(error.value)
    assert "\n" not in message and NAME in message and reason in message
    assert f"put {FILE} (SHA-256 " in message and f"into {runtime.cache_dir()}, or run" in message
    assert f"prepare_clip.py --clip_model {NAME} --weights FILE_OR_URL" in message
    assert len(message) < 900
    assert files_in_cache() == set()
    server.mode = "good"
    assert_whole(prepare.ensure_encoder(NAME))


def test_a_good_download_is_kept_if_the_preparation_fails(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("detector.encoders.vit.openvino_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.ensure_encoder(NAME)
    assert files_in_cache() == {FILE}
    prepare.ensure_encoder(NAME)
    assert server.requests == 1


# ---- the user's checkpoints ----


@pytest.mark.parametrize("form", ["archive", "state dict"])
def test_a_checkpoint_is_prepared_by_name_and_looked_up_by_hash(archive, form, tmp_path):
    folder = prepare.ensure_encoder(str(archive[form]))
    assert_whole(folder)
    manifest = runtime.read_manifest(folder)
    assert manifest["name"] == archive[form].stem
    assert manifest["preprocessing"] == runtime.PREPROCESSING
    assert runtime.find_encoder(identity=manifest["identity"]) == folder
    copy = tmp_path / "a copy.pt"
    copy.write_bytes(archive[form].read_bytes())
    before = (folder / "encoder.json").stat().st_mtime_ns
    assert prepare.ensure_encoder(str(copy)) == folder
    assert (folder / "encoder.json").stat().st_mtime_ns == before


def test_a_changed_checkpoint_is_prepared_again(archive, tmp_path):
    path = tmp_path / "mine.pt"
    folders = []
    for form in ("state dict", "other"):
        path.write_bytes(archive[form].read_bytes())
        folders.append(prepare.ensure_encoder(str(path)))
    assert len(set(folders)) == 2 == len({runtime.read_manifest(f)["identity"] for f in folders})


def test_the_card_of_a_checkpoint_goes_into_its_encoder(archive, tmp_path):
    (tmp_path / "mine.pt").write_bytes(archive["state dict"].read_bytes())
    (tmp_path / "mine.json").write_text('{"seen": ["0123456789abcdef"], "name": "no"}')
    encoder = runtime.Encoder(prepare.ensure_encoder(str(tmp_path / "mine.pt")), "cpu")
    assert encoder.manifest["seen"] == ["0123456789abcdef"]
    assert encoder.name == "mine"


def test_another_user_can_read_the_prepared_folder(archive):
    folder = prepare.ensure_encoder(str(archive["state dict"]))
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


def test_a_vit_is_stored_in_half_precision_and_in_one_copy_per_runtime(archive):
    folder = prepare.ensure_encoder(str(archive["state dict"]))
    tower = prepare.load_visual(str(archive["state dict"]))
    size = 2 * sum(p.numel() for p in tower.parameters())
    for name in ("encoder.bin", "vision.safetensors"):
        assert size * 0.98 < (folder / name).stat().st_size < size * 1.05 + 8192


@pytest.mark.parametrize("content", [{"a": torch.zeros(3)}, {"state_dict": {}, "epoch": 3}])
def test_a_file_that_is_no_checkpoint_is_a_one_line_error(content, tmp_path):
    path = tmp_path / "strange.pt"
    torch.save(content, path)
    with pytest.raises(EncoderError) as error:
        prepare.ensure_encoder(str(path))
    assert "\n" not in str(error.value) and f"{path} is not a CLIP checkpoint" in str(error.value)
    assert files_in_cache() == set()


# ---- names and errors of the command ----


def test_openais_names_urls_and_hashes_match_the_clip_package():
    urls = {
        name: catalogue.ADDRESS.format(sha256=sha256, file=file)
        for name, (file, sha256) in catalogue.OPENAI.items()
    }
    assert urls == clip.clip._MODELS


@pytest.mark.parametrize("name", ["ViT-L/15", "no-such-file.pt", "vit-l/14", "."])
def test_an_unknown_name_lists_the_known_ones(script, name):
    result = script("prepare_clip.py", "--clip_model", name)
    assert_one_line_error(result, f"'{name}'", *catalogue.NAMES, "CLIP_MODEL")
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ""


def test_clip_model_of_the_environment_is_the_default(script):
    assert_one_line_error(script("prepare_clip.py", CLIP_MODEL="ViT-X"), "'ViT-X'")
    flags = "--clip_model", "ViT-Y"
    assert_one_line_error(script("prepare_clip.py", *flags, CLIP_MODEL="ViT-X"), "'ViT-Y'")


def test_the_command_reports_a_file_that_is_no_checkpoint(script, tmp_path):
    (tmp_path / "strange.pt").write_bytes(b"no checkpoint")
    result = script("prepare_clip.py", "--clip_model", "strange.pt")
    assert_one_line_error(result, "strange.pt", "not a CLIP checkpoint")
    assert files_in_cache() == set()


def test_an_unwritable_cache_error_names_the_setting(script, archive, tmp_path):
    cache = tmp_path / "file" / "cache"
    cache.parent.write_text("not a folder")
    flags = "--clip_model", archive["state dict"]
    result = script("prepare_clip.py", *flags, CLIP_CACHE=str(cache))
    assert_one_line_error(result, cache, "CLIP_CACHE")


# ---- parallel and killed processes ----


def start(*args, **popen):
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env=os.environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **popen,
    )


@pytest.mark.slow
def test_two_processes_at_once_prepare_it_once(archive):
    both = [start(ROOT / "prepare_clip.py", "--clip_model", archive["archive"]) for _ in range(2)]
    outcomes = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], outcomes
    assert len({out for out, _ in outcomes}) == 1  # the same folder
    assert sorted("preparing" in err for _, err in outcomes) == [False, True]
    assert prepared_folders() == [Path(outcomes[0][0].strip())]
    assert_whole(prepared_folders()[0])


KILLED = {
    "before the converted form is stored": "import openvino as place; name = 'save_model'",
    "when only the last step is missing": "import os as place; name = 'replace'",
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_preparation_leaves_no_prepared_folder(archive, moment):
    process = start(
        "-c",
        f"import os, sys, signal, prepare_clip; {KILLED[moment]}\n"
        "setattr(place, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))\n"
        "prepare_clip.main(sys.argv[1:])",
        "--clip_model",
        archive["archive"],
    )
    process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL
    (leftover,) = runtime.cache_dir().glob(".preparing-*")
    assert (leftover / "vision.safetensors").is_file()
    assert list((runtime.cache_dir() / "encoders").iterdir()) == []
    # the lock is free; the next run works and removes the leftover
    assert_whole(prepare.ensure_encoder(str(archive["archive"])))
    assert not leftover.exists()


# ---- without torch ----


@pytest.fixture
def no_torch(tmp_path):
    """Environment in which importing torch, torchvision or clip fails, as if not installed."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(
        "import sys\nsys.modules.update(torch=None, torchvision=None, clip=None)\n"
    )
    return {"PYTHONPATH": str(tmp_path / "blocked")}


def test_a_vit_is_prepared_and_used_without_torch(script, no_torch, make_folder, tmp_path):
    make_folder(tmp_path / "data", {"train/real/a": 3, "train/fake/b": 3})
    settings = {"CLIP_MODEL": str(small.CHECKPOINT), **no_torch}
    result = script("extract_features.py", "--data_dir", "data", **settings)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "features.npz") as file:
        assert file["features"].shape[0] == 6 and np.isfinite(file["features"]).all()


@pytest.mark.parametrize("clip_model", ["RN50", "a file"])
def test_a_resnet_without_torch_says_what_to_install(
    clip_model, script, no_torch, photos, tmp_path
):
    if clip_model == "a file":
        tower = small_clip.small_resnet(small_clip.crops(photos))
        clip_model = small_clip.save_archive(tower, tmp_path / "resnet.pt")
    result = script("prepare_clip.py", "--clip_model", clip_model, **no_torch)
    assert_one_line_error(result, "ResNet", "needs torch", "pip install -r requirements.txt")
    assert "fetching" not in result.stderr and files_in_cache() == set()


def test_fine_tuning_without_torch_says_what_to_install(script, no_torch, make_folder, tmp_path):
    make_folder(tmp_path / "data", {"train/real/a": 3, "train/fake/b": 3})
    flags = "--clip_model", small.CHECKPOINT, "--data_dir", "data"
    result = script("finetune_clip.py", *flags, **no_torch)
    remedy = "pip install -r requirements.txt"
    assert_one_line_error(result, "training an encoder needs torch", remedy)
