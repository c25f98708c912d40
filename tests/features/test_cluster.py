"""extract_features.py --ray gives the rows of the plain command, whatever is killed meanwhile.

Tests a Ray started here, a cluster of two nodes and an object store. The nodes are processes of
this machine (ray.cluster_utils.Cluster).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from commands import ROOT, assert_one_line_error
from engines import until
from extracting import extract, finish, names, start
from live import free_port
from made_up import DIM, make_columns, other_encoder
from patience import PATIENCE
from PIL import Image

from detector.base.errors import UsageError
from detector.encoders.closeness import cosines
from detector.features import cluster, storage
from detector.features.columns import COLUMNS
from detector.features.extraction import read_row
from detector.features.file import load_features
from detector.images.folders import Entry

pytestmark = pytest.mark.usefixtures("settings")

long = pytest.mark.long
PARTS = 5  # of `many`, at 16 batches of 2
STORE = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def plain(many, tmp_path_factory):
    """Columns of `many`, extracted without Ray, with two degraded copies each."""
    output = tmp_path_factory.mktemp("plain") / "f.npz"
    finish(many, output, "--views", "2")
    return load_features(output)


def run(data_dir, output, address, *flags, **options):
    return finish(data_dir, output, "--ray", address, *flags, **options)


def assert_same_rows(actual, expected):
    """The same columns, rows and order; another number of threads changes features a little."""
    for name in COLUMNS[1:]:
        assert np.array_equal(actual[name], expected[name]), name
    assert cosines(actual["features"], expected["features"]).min() > 0.99999
    assert np.abs(actual["features"] - expected["features"]).max() < 1e-3


# ---- without a cluster ----


def node(cpu=0, gpu=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": float(cpu)} | ({"GPU": float(gpu)} if gpu else {})}


@pytest.mark.parametrize(
    "nodes, device, expected",
    [
        ([node(2)], "auto", ("cpu", 2, 0, 1)),
        ([node(1), node(1)], "auto", ("cpu", 1, 0, 2)),
        ([node(0), node(32), node(12), node(64, alive=False)], "auto", ("cpu", 8, 0, 5)),
        ([node(4), node(16, 2), node(8, 2)], "auto", ("cuda", 4, 1, 4)),
        ([node(4), node(16, 2)], "cpu", ("cpu", 8, 0, 2)),
    ],
)
def test_workers_are_planned_from_the_resources_of_the_nodes(tmp_path, nodes, device, expected):
    (tmp_path / "vision.safetensors").touch()
    assert cluster.plan(nodes, device, tmp_path) == expected


def test_a_cpu_encoder_uses_no_gpu_and_missing_resources_are_refused(tmp_path):
    assert cluster.plan([node(16, 2)], "auto", tmp_path) == ("cpu", 8, 0, 2)
    with pytest.raises(UsageError, match="--device cuda"):
        cluster.plan([node(16)], "cuda", tmp_path)
    with pytest.raises(UsageError, match="no node"):
        cluster.plan([node(0)], "auto", tmp_path)


def test_part_names_follow_from_their_images():
    entries = [Entry(f"train/real/{i}.jpg", 0, "train", "") for i in range(5)]
    stamps = {e.path: (i, 10 * i) for i, e in enumerate(entries)}
    parts = cluster.deal(entries, stamps, 2, first=7)
    numbers = ["".join(entry.path[-5] for entry, _ in part) for part in parts.values()]
    assert numbers == ["01", "23", "4"]
    assert [cluster.number_of(name) for name in parts] == [7, 8, 9]
    again = cluster.deal(entries, {**stamps, entries[2].path: (2, 21)}, 2, first=7)
    changed = [one != other for one, other in zip(parts, again, strict=True)]
    assert changed == [False, True, False]


def test_a_worker_without_the_folder_names_its_machine(tmp_path):
    args = Namespace(data_dir=str(tmp_path / "nowhere"), output_file=str(tmp_path))
    message = r"--data_dir .*nowhere: not there on .*; every node must see it"
    with pytest.raises(UsageError, match=message):
        cluster.Worker().open(({}, []), args, "cpu", 1)


def test_a_file_name_that_is_no_text_is_reported_and_skipped(capsys):
    assert not cluster.can_be_stored(os.fsdecode(b"train/real/\xff.jpg"))
    assert "skipped train/real/\\udcff.jpg: its name is not UTF-8" in capsys.readouterr().err


def test_an_output_folder_with_other_files_is_refused(few, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    done = finish(few, tmp_path / "mine", "--ray", "local", code=2)
    assert_one_line_error(done, "mine", "other files")
    assert names(tmp_path / "mine") == ["letter.txt"]


# ---- Ray started here ----


@long
def test_local_ray_gives_the_plain_rows_and_a_second_run_changes_nothing(many, plain, tmp_path):
    broken = shutil.copytree(many, tmp_path / "data") / "train/real/camera/zz.jpg"
    broken.write_bytes((many / "train/real/camera/000.jpg").read_bytes()[:900])
    output = tmp_path / "f.parquet"
    done = run(tmp_path / "data", output, "local", "--views", "2")
    assert_same_rows(load_features(output), plain)
    assert "skipped train/real/camera/zz.jpg: " in done.stderr
    assert done.stdout.endswith(
        f"160 images and 320 degraded copies, {DIM}-d features (test/real 20, test/fake 20, "
        "train/real 60, train/fake 60); 1 of 161 skipped\n"
    )
    meta = load_features(output)["meta"]
    assert meta["counts"] == {"images": 160, "bad": 1, "real": 80, "fake": 80}
    before = part_times(output)
    assert len(meta["parts"]) == len(before) == PARTS
    again = run(tmp_path / "data", output, "local", "--views", "2")
    assert "160 images are unchanged" in again.stderr and again.stdout == done.stdout
    assert part_times(output) == before


@long
def test_an_address_without_a_cluster_is_a_one_line_error(few, tmp_path):
    done = run(few, tmp_path / "f.parquet", f"127.0.0.1:{free_port()}", code=2)
    assert_one_line_error(done, "--ray 127.0.0.1:", "local")


@long
def test_an_error_of_a_worker_is_one_line(few, tmp_path):
    folder = other_encoder(source="ViT-B/32")
    (folder / "encoder.bin").write_bytes((folder / "encoder.bin").read_bytes()[:1000])
    done = run(few, tmp_path / "f.parquet", "local", CLIP_MODEL="ViT-B/32", code=2)
    assert_one_line_error(done, folder, "cannot be read")


# ---- a cluster of two nodes ----

TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
small = {"num_cpus": 1, "object_store_memory": 80_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
node = cluster.add_node(**small, env_vars={"CLIP_CACHE": sys.argv[1]})
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for order in sys.stdin:
    if order.strip() == "lose a node":
        cluster.remove_node(node, allow_graceful=False)
    if order.strip() == "add a node":
        node = cluster.add_node(**small, env_vars={"CLIP_CACHE": sys.argv[1]})
        cluster.wait_for_nodes()
    print("done", flush=True)
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """A cluster of two nodes with one processor and an encoder cache each; `order` changes it."""
    cache, head = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("head")
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_NODES, str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CLIP_CACHE": str(head)},
    )

    def line():
        while not (text := process.stdout.readline()).startswith(("done", "127.", "1")) and text:
            pass
        return text.strip()

    def order(command):
        process.stdin.write(command + "\n")
        process.stdin.flush()
        assert line() == "done"

    yield SimpleNamespace(address=line(), order=order, cache=cache)
    process.stdin.close()
    process.wait(PATIENCE)
    process.stdout.close()


def part_times(output):
    """{name of a part: time of its last change}."""
    return {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}


def wait_for_parts(process, output, count):
    deadline = time.monotonic() + PATIENCE
    while len(part_times(output)) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def worker_ids():
    """Process ids of the cluster's workers, by their titles."""
    ids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"MapWorker" in (folder / "cmdline").read_bytes():
                ids.append(int(folder.name))
    return ids


@long
def test_two_nodes_give_the_plain_rows(many, plain, two_nodes, tmp_path):
    done = run(many, tmp_path / "f.parquet", two_nodes.address, "--views", "2")
    assert "room for 2 workers of 1 processors" in done.stderr
    assert_same_rows(load_features(tmp_path / "f.parquet"), plain)


@long
@pytest.mark.parametrize("blows", [1, 4])
def test_killed_workers_lose_and_repeat_nothing(many, plain, two_nodes, tmp_path, blows):
    output = tmp_path / "f.parquet"
    process = start(many, output, "--ray", two_nodes.address, "--views", "2")
    killed = 0
    for blow in range(blows):
        wait_for_parts(process, output, min(blow + 1, PARTS - 2))
        ids = worker_ids()
        for pid in random.sample(ids, min(len(ids), 1 + blow % 2)):
            os.kill(pid, signal.SIGKILL)
            killed += 1
        time.sleep(0.3)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and killed >= 1, stderr
    assert len(part_times(output)) == PARTS
    assert "160 images" in stdout and "worker died" not in stdout
    assert_same_rows(load_features(output), plain)


@long
def test_a_lost_node_loses_no_rows(many, plain, two_nodes, tmp_path):
    process = start(many, tmp_path / "f.parquet", "--ray", two_nodes.address, "--views", "2")
    try:
        wait_for_parts(process, tmp_path / "f.parquet", 1)
        two_nodes.order("lose a node")
        stderr = process.communicate(timeout=PATIENCE)[1]
    finally:
        two_nodes.order("add a node")
    assert process.returncode == 0, stderr
    assert_same_rows(load_features(tmp_path / "f.parquet"), plain)


@long
def test_a_killed_command_resumes_and_makes_no_part_again(many, plain, two_nodes, tmp_path):
    output = tmp_path / "f.parquet"
    process = start(many, output, "--ray", two_nodes.address, "--views", "2")
    wait_for_parts(process, output, 2)
    process.kill()
    process.communicate()
    until(lambda: not worker_ids())  # workers end with the command that started them
    before = part_times(output)
    with pytest.raises(UsageError, match="nor a finished data set"):
        load_features(output)
    done = run(many, output, two_nodes.address, "--views", "2")
    assert f"resuming: {len(before)} of {PARTS} parts are stored already" in done.stderr
    assert before.items() <= part_times(output).items()
    assert_same_rows(load_features(output), plain)


@long
def test_a_node_that_lacks_the_encoder_gets_it(many, plain, two_nodes, tmp_path):
    other_encoder(source="ViT-B/32")  # has the weights of the small encoder
    run(many, tmp_path / "f.parquet", two_nodes.address, "--views", "2", CLIP_MODEL="ViT-B/32")
    manifests = two_nodes.cache.glob("encoders/*/encoder.json")
    assert "cd" * 32 in {json.loads(path.read_text())["identity"] for path in manifests}
    assert_same_rows(load_features(tmp_path / "f.parquet"), plain)


# ---- an object store ----


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Start a local S3 server with the bucket `pictures` -> the environment that names it."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    while True:
        try:
            requests.put(f"{address}/pictures", timeout=1)
            break
        except requests.RequestException:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    yield {**STORE, "AWS_ENDPOINT_URL": address}
    process.kill()
    process.wait()


def use_store(monkeypatch, settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


@long
def test_an_object_store_is_read_written_and_trained_from(
    many, plain, store, script, tmp_path, monkeypatch
):
    use_store(monkeypatch, store)
    for path in sorted(p.relative_to(many).as_posix() for p in many.rglob("*.jpg")):
        storage.write_bytes("s3://pictures/data", path, (many / path).read_bytes())
    storage.write_bytes("s3://pictures/data", ".hidden/real/x.jpg", b"no picture")
    output = "s3://pictures/f.parquet"
    done = run("s3://pictures/data", output, "local", "--views", "2")
    assert f"{output}: 160 images" in done.stdout
    assert_same_rows(load_features(output), plain)
    again = run("s3://pictures/data", output, "local", "--views", "2")
    assert "160 images are unchanged" in again.stderr
    other = run("s3://pictures/data", output, "local", code=2)
    assert_one_line_error(other, output, "other flags")
    for words in (["train_model.py"], ["evaluate.py", "--model_path", "model.joblib"]):
        done = script(*words, "--features_file", output)
        assert done.returncode == 0, done.stderr


@long
def test_a_silent_object_store_is_an_error_and_no_bad_image(tmp_path, monkeypatch):
    use_store(monkeypatch, {**STORE, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"})
    done = run("s3://pictures/data", tmp_path / "f.parquet", "local", code=2)
    assert_one_line_error(done, "s3://pictures/data", "cannot be listed")
    with pytest.raises(UsageError, match="s3://silent/data/a.jpg: cannot be read"):
        read_row("s3://silent/data", Entry("a.jpg", 0, "", ""), 160, 10_000)


@long
def test_an_image_missing_in_the_store_is_unreadable(store, monkeypatch):
    use_store(monkeypatch, store)
    _, pieces, reason = read_row("s3://pictures/nowhere", Entry("a.jpg", 0, "", ""), 160, 10_000)
    assert pieces is None and "pictures/nowhere/a.jpg" in reason[0]


# ---- a folder that grows ----


@long
def test_a_changed_folder_gives_the_plain_rows(own, make_folder, two_nodes, tmp_path):
    output = tmp_path / "f.parquet"

    def run_both(*flags):
        """-> (columns of the plain command, of the cluster, stderr of the cluster)."""
        expected = extract(own, tmp_path / "f.npz", "--batch_size", 2, *flags)
        done = run(own, output, two_nodes.address, *flags)
        return expected, load_features(output), done.stderr

    expected, actual, _ = run_both()
    assert_same_rows(actual, expected)
    change(own, make_folder)
    expected, actual, stderr = run_both()
    assert_same_rows(in_order(actual), in_order(expected))
    assert "21 images are unchanged, 1 have changed, 2 are gone (--prune drops their" in stderr
    assert "new images: 6 (train/fake 6); changed: 1; moved: 1" in stderr
    assert "from new sources: other 6" in stderr
    expected, actual, _ = run_both("--prune")
    assert_same_rows(in_order(actual), in_order(expected))
    assert "train/fake/gan/003.jpg" not in actual["paths"] and len(actual["paths"]) == 29
    assert sorted(part_times(output)) == sorted(actual["meta"]["parts"])


def change(own, make_folder):
    """Add six images, overwrite one, correct the label of one, and delete one."""
    make_folder(own, {"train/fake/other": 6}, seed=5)
    Image.new("RGB", (90, 90), "red").save(own / "train/real/camera/001.jpg")
    os.rename(own / "test/fake/gan/000.jpg", own / "test/real/camera/corrected.jpg")
    os.unlink(own / "train/fake/gan/003.jpg")


def in_order(columns):
    """Rows sorted by path and view; the order of rows added at different times may differ."""
    order = np.lexsort((columns["view"], columns["paths"]))
    return {name: columns[name][order] for name in COLUMNS}


# ---- rewritten parts ----


def test_only_parts_that_lose_rows_are_rewritten(tmp_path):
    columns = make_columns(real=6, fake=0)
    files = [f"part-{i:06d}-00.parquet" for i in range(3)]
    for i, name in enumerate(files):
        part = {column: columns[column][2 * i : 2 * i + 2] for column in COLUMNS}
        about = cluster.describe(part, [(path, (1, 1)) for path in part["paths"].tolist()])
        storage.write_part(tmp_path, name, part, about)
    abouts = storage.about_parts(tmp_path, files)
    args, paths = Namespace(output_file=str(tmp_path)), columns["paths"].tolist()
    kept = cluster.rewrite(args, abouts, drop={paths[1], paths[4], paths[5]}, gone=set(), new=[])
    rewritten, unchanged = kept
    assert cluster.number_of(rewritten) == 0 and unchanged == files[1]
    assert cluster.add_up(kept) == ({"train/real": 3}, 3)
    assert storage.read_part(tmp_path, rewritten)["paths"].tolist() == paths[:1]
    # nothing is deleted before _meta.json names other parts
    assert len(storage.list_stamps(tmp_path)) == 4
    # the row of a deleted file stays unless a new part has its bytes
    assert cluster.rewrite(args, abouts, drop=set(), gone={paths[0]}, new=[]) == abouts
    moved = cluster.rewrite(args, abouts, drop=set(), gone={paths[0]}, new=files[:1])
    assert cluster.add_up(moved)[1] == 5
