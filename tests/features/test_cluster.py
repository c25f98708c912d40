"""extract_features.py --ray: the rows of the plain command, from a Ray started here, a cluster of two nodes and an object store,
whatever is killed on the way. The nodes are processes of one machine: ray.cluster_utils.Cluster.
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
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import small
from commands import ROOT, assert_one_line_error
from engines import until
from extracting import SETTINGS, extract
from live import free_port
from made_up import DIM, make_columns, other_encoder
from patience import PATIENCE
from PIL import Image

from detector.base.errors import UsageError
from detector.features import cluster, storage
from detector.features.columns import COLUMNS
from detector.features.extraction import read_row
from detector.features.file import load_features
from detector.images.folders import Entry

pytestmark = pytest.mark.usefixtures("settings")

long = pytest.mark.long
MANY = {"train/real/camera": 60, "train/fake/gan": 60, "test/real/camera": 20, "test/fake/gan": 20}
PARTS = 5  # of them, at 16 batches of 2


@pytest.fixture(scope="module")
def many(make_folder, tmp_path_factory):
    """160 images that no test changes."""
    return make_folder(tmp_path_factory.mktemp("many"), MANY, seed=1)


@pytest.fixture(scope="module")
def plain(many, tmp_path_factory):
    """Their columns, extracted without Ray, with two degraded copies each."""
    output = tmp_path_factory.mktemp("plain") / "f.npz"
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "extract_features.py"),
            "--data_dir",
            str(many),
            "--output_file",
            str(output),
            "--views",
            "2",
            "--batch_size",
            "2",
        ],
        env={**os.environ, **SETTINGS},
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    return load_features(output)


def command(data_dir, output, address, *flags):
    return [
        sys.executable,
        str(ROOT / "extract_features.py"),
        "--data_dir",
        str(data_dir),
        "--output_file",
        str(output),
        "--ray",
        address,
        "--batch_size",
        "2",
        *flags,
    ]


def run(data_dir, output, address, *flags, code=0, **env):
    done = subprocess.run(
        command(data_dir, output, address, *flags),
        env={**os.environ, **SETTINGS, **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == code, done.stderr
    return done


def assert_same_rows(found, wanted):
    """The same columns, rows and order; features as far as another number of threads may move them."""
    for name in COLUMNS[1:]:
        assert np.array_equal(found[name], wanted[name]), name
    cosine = (
        (found["features"] * wanted["features"]).sum(1)
        / np.linalg.norm(found["features"], axis=1)
        / np.linalg.norm(wanted["features"], axis=1)
    )
    assert cosine.min() > 0.99999 and np.abs(found["features"] - wanted["features"]).max() < 1e-3


# ---- without a cluster ----


def node(cpu=0, gpu=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": float(cpu)} | ({"GPU": float(gpu)} if gpu else {})}


@pytest.mark.parametrize(
    "nodes, device, wanted",
    [
        ([node(2)], "auto", ("cpu", 2, 0, 1)),
        ([node(1), node(1)], "auto", ("cpu", 1, 0, 2)),
        ([node(0), node(32), node(12), node(64, alive=False)], "auto", ("cpu", 8, 0, 5)),
        ([node(4), node(16, 2), node(8, 2)], "auto", ("cuda", 4, 1, 4)),
        ([node(4), node(16, 2)], "cpu", ("cpu", 8, 0, 2)),
    ],
)
def test_workers_follow_from_what_the_nodes_have(tmp_path, nodes, device, wanted):
    (tmp_path / "vision.safetensors").touch()
    assert cluster.plan(nodes, device, tmp_path) == wanted


def test_an_encoder_for_processors_alone_asks_for_no_gpu_and_a_gpu_that_is_not_there_is_told(
    tmp_path,
):
    assert cluster.plan([node(16, 2)], "auto", tmp_path) == ("cpu", 8, 0, 2)
    with pytest.raises(UsageError, match="--device cuda"):
        cluster.plan([node(16)], "cuda", tmp_path)
    with pytest.raises(UsageError, match="no node"):
        cluster.plan([node(0)], "auto", tmp_path)


def test_parts_are_named_by_what_is_in_them():
    entries = [Entry(f"train/real/{i}.jpg", 0, "train", "") for i in range(5)]
    stamps = {e.path: (i, 10 * i) for i, e in enumerate(entries)}
    parts = cluster.deal(entries, stamps, 2, first=7)
    assert [[e.path[-5] for e, _ in part] for part in parts.values()] == [
        ["0", "1"],
        ["2", "3"],
        ["4"],
    ]
    assert [cluster.number_of(name) for name in parts] == [7, 8, 9]
    again = cluster.deal(entries, {**stamps, entries[2].path: (2, 21)}, 2, first=7)
    assert [one == other for one, other in zip(parts, again)] == [True, False, True]


def test_a_worker_that_cannot_see_the_folder_says_on_which_machine(tmp_path):
    args = Namespace(
        data_dir=str(tmp_path / "nowhere"), output_file=str(tmp_path), precision="auto"
    )
    with pytest.raises(
        UsageError, match=r"--data_dir .*nowhere: not there on .*; every node must see it"
    ):
        cluster.Worker().open(({}, []), args, "cpu", 1)


def test_a_name_that_is_no_text_is_told_and_left_out(capsys):
    assert not cluster.can_be_stored(os.fsdecode(b"train/real/\xff.jpg"))
    assert "skipped train/real/\\udcff.jpg: its name is not UTF-8" in capsys.readouterr().err


def test_a_folder_of_other_things_is_left_alone(script, few, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    done = script(
        "extract_features.py",
        "--data_dir",
        few,
        "--output_file",
        "mine",
        "--ray",
        "local",
        CLIP_MODEL=str(small.CHECKPOINT),
    )
    assert_one_line_error(done, "mine", "other files")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


# ---- Ray started here ----


@long
def test_ray_here_gives_the_rows_of_the_plain_command_and_once_more_does_nothing(
    many, plain, tmp_path
):
    broken = shutil.copytree(many, tmp_path / "data") / "train/real/camera/zz.jpg"
    broken.write_bytes((many / "train/real/camera/000.jpg").read_bytes()[:900])
    done = run(tmp_path / "data", tmp_path / "f.parquet", "local", "--views", "2")
    assert_same_rows(load_features(tmp_path / "f.parquet"), plain)
    assert "skipped train/real/camera/zz.jpg: " in done.stderr
    assert done.stdout.endswith(
        f"160 images and 320 degraded copies, {DIM}-d features (test/real 20, test/fake 20,"
        " train/real 60, train/fake 60); 1 of 161 skipped\n"
    )
    meta = load_features(tmp_path / "f.parquet")["meta"]
    assert (
        meta["counts"] == {"images": 160, "bad": 1, "real": 80, "fake": 80}
        and len(meta["parts"]) == PARTS
    )
    before = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "f.parquet").glob("part-*")
    }
    again = run(tmp_path / "data", tmp_path / "f.parquet", "local", "--views", "2")
    assert "160 images are unchanged" in again.stderr and again.stdout == done.stdout
    assert before == {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "f.parquet").glob("part-*")
    }


@long
def test_no_cluster_at_an_address_is_one_line(few, tmp_path):
    assert_one_line_error(
        run(few, tmp_path / "f.parquet", f"127.0.0.1:{free_port()}", code=2),
        "--ray 127.0.0.1:",
        "local",
    )


@long
def test_what_a_worker_cannot_do_is_told_in_one_line_as_it_would_be_here(few, tmp_path):
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
    """A cluster of a node with one processor and another that has an encoder cache of its own; `order` changes it."""
    cache, head = (
        tmp_path_factory.mktemp("cache"),
        tmp_path_factory.mktemp("head"),
    )  # the head's: what is in no one's home
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

    def order(what):
        process.stdin.write(what + "\n")
        process.stdin.flush()
        assert line() == "done"

    yield SimpleNamespace(address=line(), order=order, cache=cache)
    process.stdin.close()
    process.wait(PATIENCE)
    process.stdout.close()


def parts_in(output):
    try:
        return [name for name in os.listdir(output) if name.startswith("part-")]
    except FileNotFoundError:
        return []


def wait_for_parts(process, output, count):
    deadline = time.monotonic() + PATIENCE
    while len(parts_in(output)) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def workers():
    """Process numbers of the cluster's workers, by their titles."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"MapWorker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@long
def test_two_nodes_give_the_rows_of_the_plain_command(many, plain, two_nodes, tmp_path):
    done = run(many, tmp_path / "f.parquet", two_nodes.address, "--views", "2")
    assert "room for 2 workers of 1 processors" in done.stderr
    assert_same_rows(load_features(tmp_path / "f.parquet"), plain)


@long
@pytest.mark.parametrize("blows", [1, 4])
def test_workers_killed_on_the_way_lose_nothing_and_double_nothing(
    many, plain, two_nodes, tmp_path, blows
):
    process = subprocess.Popen(
        command(many, tmp_path / "f.parquet", two_nodes.address, "--views", "2"),
        env={**os.environ, **SETTINGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killed = 0
    for blow in range(blows):
        wait_for_parts(process, tmp_path / "f.parquet", min(blow + 1, PARTS - 2))
        for pid in random.sample(found := workers(), min(len(found), 1 + blow % 2)):
            os.kill(pid, signal.SIGKILL)
            killed += 1
        time.sleep(0.3)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and killed >= 1, err
    assert (
        len(parts_in(tmp_path / "f.parquet")) == PARTS
        and "160 images" in out
        and "worker died" not in out
    )
    assert_same_rows(load_features(tmp_path / "f.parquet"), plain)


@long
def test_a_node_lost_on_the_way_loses_nothing(many, plain, two_nodes, tmp_path):
    process = subprocess.Popen(
        command(many, tmp_path / "f.parquet", two_nodes.address, "--views", "2"),
        env={**os.environ, **SETTINGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_parts(process, tmp_path / "f.parquet", 1)
        two_nodes.order("lose a node")
        err = process.communicate(timeout=PATIENCE)[1]
    finally:
        two_nodes.order("add a node")
    assert process.returncode == 0, err
    assert_same_rows(load_features(tmp_path / "f.parquet"), plain)


@long
def test_a_command_that_was_killed_goes_on_and_makes_no_part_again(
    many, plain, two_nodes, tmp_path
):
    output = tmp_path / "f.parquet"
    process = subprocess.Popen(
        command(many, output, two_nodes.address, "--views", "2"),
        env={**os.environ, **SETTINGS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_parts(process, output, 2)
    process.kill()
    process.wait()
    until(lambda: not workers())  # they end with the command that started them
    before = {name: (output / name).stat().st_mtime_ns for name in parts_in(output)}
    with pytest.raises(UsageError, match="nor a finished data set"):
        load_features(output)
    done = run(many, output, two_nodes.address, "--views", "2")
    assert f"resuming: {len(before)} of {PARTS} parts are stored already" in done.stderr
    assert (
        before.items()
        <= {name: (output / name).stat().st_mtime_ns for name in parts_in(output)}.items()
    )
    assert_same_rows(load_features(output), plain)


@long
def test_a_node_that_lacks_the_encoder_gets_it(many, plain, two_nodes, tmp_path):
    other_encoder(source="ViT-B/32")  # with the weights of the small one
    run(many, tmp_path / "f.parquet", two_nodes.address, "--views", "2", CLIP_MODEL="ViT-B/32")
    assert (
        json.loads(next(two_nodes.cache.glob("encoders/*/encoder.json")).read_text())["identity"]
        == "cd" * 32
    )
    assert_same_rows(load_features(tmp_path / "f.parquet"), plain)


# ---- an object store ----


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A local server that speaks S3, with the bucket `pictures` -> the environment that leads to it."""
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
    yield {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }
    process.kill()
    process.wait()


@long
def test_from_an_object_store_into_one_and_a_training_on_it(
    many, plain, store, script, tmp_path, monkeypatch
):
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    for path in sorted(p.relative_to(many).as_posix() for p in many.rglob("*.jpg")):
        storage.write_bytes("s3://pictures/data", path, (many / path).read_bytes())
    storage.write_bytes("s3://pictures/data", ".hidden/real/x.jpg", b"no picture")
    done = run("s3://pictures/data", "s3://pictures/f.parquet", "local", "--views", "2")
    assert "s3://pictures/f.parquet: 160 images" in done.stdout
    assert_same_rows(load_features("s3://pictures/f.parquet"), plain)
    again = run("s3://pictures/data", "s3://pictures/f.parquet", "local", "--views", "2")
    assert "160 images are unchanged" in again.stderr
    assert_one_line_error(
        run("s3://pictures/data", "s3://pictures/f.parquet", "local", code=2),
        "s3://pictures/f.parquet",
        "other flags",
    )
    for flags in (
        ["train_model.py", "--features_file", "s3://pictures/f.parquet"],
        [
            "evaluate.py",
            "--model_path",
            "model.joblib",
            "--features_file",
            "s3://pictures/f.parquet",
        ],
    ):
        done = script(*flags)
        assert done.returncode == 0, done.stderr


@long
def test_an_object_store_that_does_not_answer_is_told_and_counts_no_picture_as_broken(
    script, tmp_path, monkeypatch
):
    there = {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
    }
    assert_one_line_error(
        run("s3://pictures/data", tmp_path / "f.parquet", "local", code=2, **there),
        "s3://pictures/data",
        "cannot be listed",
    )
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="s3://silent/data/a.jpg: cannot be read"):
        read_row("s3://silent/data", Entry("a.jpg", 0, "", ""), 160, 10_000)


@long
def test_a_picture_that_is_not_in_the_store_is_a_picture_that_cannot_be_read(store, monkeypatch):
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    _, crops, why = read_row("s3://pictures/nowhere", Entry("a.jpg", 0, "", ""), 160, 10_000)
    assert crops is None and "pictures/nowhere/a.jpg" in why[0]


# ---- a folder that grows ----


@long
def test_a_folder_that_grows_and_changes_gives_the_rows_of_the_plain_command(
    own, make_folder, two_nodes, tmp_path
):
    def both(*flags):
        columns = extract(own, tmp_path / "f.npz", "--batch_size", 2, *flags)
        return (
            columns,
            run(own, tmp_path / "f.parquet", two_nodes.address, *flags).stderr,
            load_features(tmp_path / "f.parquet"),
        )

    def assert_same(
        wanted, found
    ):  # the order of rows that were added at different times is not promised
        order = [np.lexsort((columns["view"], columns["paths"])) for columns in (wanted, found)]
        assert_same_rows(
            *(
                {name: columns[name][rows] for name in COLUMNS}
                for columns, rows in zip((found, wanted), order[::-1])
            )
        )

    wanted, _, found = both()
    assert_same_rows(found, wanted)
    make_folder(own, {"train/fake/other": 6}, seed=5)  # six are new
    Image.new("RGB", (90, 90), "red").save(own / "train/real/camera/001.jpg")  # one has other bytes
    os.rename(
        own / "test/fake/gan/000.jpg", own / "test/real/camera/found.jpg"
    )  # a label is put right
    os.unlink(own / "train/fake/gan/003.jpg")  # one is gone
    wanted, told, found = both()
    assert_same(wanted, found)
    assert "21 images are unchanged, 1 have changed, 2 are gone (--prune drops their rows)" in told
    assert (
        "new images: 6 (train/fake 6); changed: 1; moved: 1" in told
        and "from new sources: other 6" in told
    )
    wanted, told, found = both("--prune")
    assert_same(wanted, found)
    assert "train/fake/gan/003.jpg" not in found["paths"] and len(found["paths"]) == 29
    assert sorted(parts_in(tmp_path / "f.parquet")) == sorted(found["meta"]["parts"])


# ---- rows that go ----


def test_parts_lose_the_rows_that_went_and_others_are_left_as_they_are(tmp_path):
    columns = make_columns(real=6, fake=0)
    for i in range(3):
        part = {name: columns[name][2 * i : 2 * i + 2] for name in COLUMNS}
        storage.write_part(
            tmp_path,
            f"part-{i:06d}-00.parquet",
            part,
            cluster.describe(part, [(p, (1, 1)) for p in part["paths"].tolist()]),
        )
    abouts = storage.about_parts(tmp_path, [f"part-{i:06d}-00.parquet" for i in range(3)])
    args, paths = Namespace(output_file=str(tmp_path)), columns["paths"].tolist()
    kept = cluster.rewrite(args, abouts, drop={paths[1], paths[4], paths[5]}, gone=set(), new=[])
    assert [cluster.number_of(name) for name in kept] == [0, 1] and list(kept)[
        1
    ] == "part-000001-00.parquet"
    assert cluster.add_up(kept) == ({"train/real": 3}, 3)
    assert storage.read_part(tmp_path, list(kept)[0])["paths"].tolist() == paths[:1]
    assert (
        len(storage.list_stamps(tmp_path)) == 4
    )  # nothing is removed before _meta.json names others
    assert (
        cluster.rewrite(args, abouts, drop=set(), gone={paths[0]}, new=[]) == abouts
    )  # gone, and found nowhere else
    moved = cluster.rewrite(
        args, abouts, drop=set(), gone={paths[0]}, new=["part-000000-00.parquet"]
    )
    assert cluster.add_up(moved)[1] == 5
