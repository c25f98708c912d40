"""The three acts of the demo.

Act 1 re-saves photographs and counts the verdicts that change. Act 2 measures accuracy on sources
never seen. Act 3 builds a data set with nothing to learn: its test accuracy is high all the same,
and the audit says why. Then one image goes through a live service.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import numpy as np
import requests
from tqdm import tqdm

from detector.base.project import HERE
from detector.encoders.catalogue import EIGHT_BIT
from detector.evaluation import intervals, metrics
from detector.evaluation.audit import sentences
from detector.images import decoding, distort
from detector.images.samples import installed_photos
from detector.training.recipe import build, p_of, set_threshold
from detector.training.rows import Rows, choose_rows
from detector.verdict import Detector

OUT = HERE / "demo"
BASELINE = HERE / "models" / "baseline.joblib"
FEATURES = "models/features.npz"
TIERS = {"768 px q60": (768, 60), "512 px q40": (512, 40)}  # longer side and JPEG quality
PARTS = {"known": "known sources, images not trained on", "unseen": "sources never seen"}
COPIES = 10
DRAWS = 8


def title(text):
    print(f"\n== {text}", flush=True)


def command(*words, quiet=False):
    """Run one of the project's commands, shown as a user would type it. `quiet`: without stdout."""
    print("$ python " + " ".join(words), flush=True)
    env = {**os.environ, "CLIP_MODEL": EIGHT_BIT}
    result = subprocess.run(
        [sys.executable, *words], cwd=HERE, text=True, stdout=subprocess.PIPE, env=env
    )
    if result.returncode not in ((0, 1) if words[0] == "audit.py" else (0,)):
        sys.exit(1)
    if not quiet:
        print(result.stdout.rstrip())


def train(features, model, *flags):
    files = ("--features_file", features, "--model_output_path", model)
    command("train_model.py", *files, *flags, quiet=True)


def read_metrics(folder):
    return json.loads((OUT / folder / "metrics.json").read_text())


# ---- act 1 ----


def stay_put(detector, photos):
    """Act 1: verdicts on each photograph, and on the copies that a web site would make of it."""
    title(
        f"1. Verdicts that stay put, or not: {len(photos)} photographs, all real, by the shipped "
        f"model on {detector.encoder.name}"
    )
    print(f"{'':22}{'as it is':>12}" + "".join(f"{name:>14}" for name in TIERS))
    rows = []
    for path in photos:
        verdicts = verdicts_on(detector, path.read_bytes())
        first, *others = [f"{label} {p:.2f}{star}" for label, p, star in verdicts]
        print(f"{path.name:22}{first:>12}" + "".join(f"{cell:>14}" for cell in others))
        rows.append([label for label, *_ in verdicts])
    labels = np.array(rows)
    wrong = ", ".join(f"{n} of {len(photos)}" for n in (labels == "fake").sum(0))
    counts = (labels[:, 1:] != labels[:, :1]).sum(0)
    flips = ", ".join(f"{n} at {name}" for n, name in zip(counts, TIERS, strict=True))
    print(f"called fake: {wrong}; verdicts flipped (*): {flips}")


def verdicts_on(detector, data):
    """(class, confidence, '*' if the class differs from the first) of a file and its copies."""
    rgb = decoding.decode_image(data)
    files = [data, *(distort.social_bytes(rgb, *tier) for tier in TIERS.values())]
    verdicts = [detector.classify(file) for file in files]
    first, _ = verdicts[0]
    return [(label, p, "*" if label != first else " ") for label, p in verdicts]


# ---- act 2 ----


def never_seen():
    """Act 2: train on the shipped features, then measure known and unseen sources apart."""
    title(
        "2. Sources never seen: trained live on `train` of the shipped features "
        "(numbers; no picture ships)"
    )
    model, folder = "demo/model.joblib", "demo/evaluation"
    train(FEATURES, model, "--classifier", "logistic")
    files = ("--model_path", model, "--features_file", FEATURES, "--report_dir", folder)
    command("evaluate.py", *files, quiet=True)
    measured = read_metrics("evaluation")
    for part, text in PARTS.items():
        sources = [row for row in measured["by_source"] if row["known"] == (part == "known")]
        print_part(text, measured[part], [row for row in sources if row["n"] >= 5][:5])
    leaks, _ = sentences(read_metrics("model_report")["audit"])
    for line in leaks:
        print(f"LEAK  {line}")
    print(
        "These images are a leak by the audit's rule: "
        "judge the model by the row of sources never seen."
    )


def print_part(text, part, worst):
    balanced, auc = (intervals.words(part[name]) for name in ("balanced_accuracy", "auc"))
    print(f"{text}: n {part['n']}, balanced accuracy {balanced}, AUC {auc}")
    print("  the worst five of its sources with at least five images:")
    for row in worst:
        source, accuracy = row["source"][:38], intervals.words(row["own"])
        print(f"    {source:38} {row['label']}  n {row['n']:3}  accuracy {accuracy}")


# ---- act 3 ----


def call_half_fake(pictures, rng):
    """Numbers of the pictures to call fake.

    Of each two pictures alike in colour a coin takes one, so colour does not give the label away.
    """
    colour = [np.ptp(np.asarray(rgb).astype(int), axis=2).mean() for rgb in pictures]
    return {pair[rng.integers(2)] for pair in np.argsort(colour).reshape(-1, 2)}


def build_trap(photos, pictures, folder):
    """Call half of the photographs fake, and put re-saved copies at random into train and test.

    Each photograph has COPIES copies of random sizes and qualities. Nothing can be learnt.
    """
    rng = np.random.default_rng(0)
    shutil.rmtree(folder, ignore_errors=True)
    fake = call_half_fake(pictures, rng)
    for i, (path, rgb) in enumerate(zip(photos, pictures, strict=True)):
        label = "fake" if i in fake else "real"
        for k in range(COPIES):
            place = folder / ("train" if rng.random() < 0.8 else "test") / label
            place.mkdir(parents=True, exist_ok=True)
            data = distort.social_bytes(rgb, int(rng.integers(160, 512)), int(rng.integers(30, 96)))
            (place / f"{path.stem}-{k:02d}.jpg").write_bytes(data)


def trap(photos, layers):
    """Act 3: the three commands on a folder with nothing to learn, then the audit and --resplit."""
    title("3. The trap. There is nothing to find: chance is 0.5")
    print(
        f"The same photographs, all real. Half of them are called fake. Each is re-saved {COPIES} "
        "times, and its copies lie in train and in test."
    )
    pictures = [decoding.decode_image(path.read_bytes()) for path in photos]
    build_trap(photos, pictures, OUT / "trap")
    features, model = "demo/trap.npz", "demo/trap.joblib"
    (HERE / features).unlink(missing_ok=True)
    data = ("--data_dir", "demo/trap")
    command("extract_features.py", *data, "--output_file", features, "--layers", layers)
    train(features, model)
    image = next((OUT / "trap/test/fake").iterdir()).relative_to(HERE)
    command("classify.py", "--image_path", str(image), "--model_path", model)
    command("audit.py", *data)
    train(features, "demo/resplit.joblib", "--resplit")
    print_trap(other_draws(photos, pictures))


def print_trap(honest):
    believed, resplit = (
        read_metrics(f"{name}_report")["overall"]["balanced_accuracy"]
        for name in ("trap", "resplit")
    )
    print(
        f"split as the folders have it:          balanced accuracy {believed['value']:.2f} "
        f"on {believed['n']} images"
    )
    print(
        f"--resplit, no picture on both sides:   balanced accuracy {resplit['value']:.2f} "
        f"on {resplit['n']} copies of three pictures"
    )
    draws = ", ".join(f"{value:.2f}" for value in honest)
    print(
        f"the same, {DRAWS} other halves called fake:  balanced accuracy {np.mean(honest):.2f} "
        f"on average ({draws})"
    )
    print("Without the audit, the first figure would have been believed.")


def other_draws(photos, pictures):
    """Balanced accuracies of DRAWS trainings, each with other pictures called fake.

    One draw of labels says little, because the test images show only three of the pictures.
    """
    columns, accuracies = dict(np.load(OUT / "trap.npz")), []
    stems = [path.rpartition("/")[2].rpartition("-")[0] for path in columns["paths"]]
    split = argparse.Namespace(train_splits="train", resplit=True)
    for draw in tqdm(range(1, DRAWS + 1), desc="other halves called fake"):
        fake = [photos[i].stem for i in call_half_fake(pictures, np.random.default_rng(draw))]
        columns["labels"] = np.isin(stems, fake).astype(np.int8)
        chosen, test, groups, twins, _ = choose_rows(columns, split, seed=0)
        rows = Rows(columns, chosen, groups, twins)
        model = set_threshold(build("svm", rows, seed=0), max_fpr=None)
        labels, p_fake = columns["labels"][test].astype(int), p_of(model, columns, test)
        measured = metrics.measure(labels, p_fake, model["threshold"], groups[test])
        accuracies.append(measured["balanced_accuracy"]["value"])
    return accuracies


# ---- the service ----


@contextmanager
def service():
    """Address of a live service of the shipped model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"MODEL_PATH": str(BASELINE), "ALLOW_DEMO_MODEL": "1", "PORT": str(port)}
    env = {**os.environ, **settings}
    with open(OUT / "service.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=HERE, env=env, stdout=log, stderr=log
        )
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def serve(photo):
    """One image through a live service."""
    title("One image through a live service")
    with service() as (server, address), requests.Session() as session:
        session.trust_env = False  # no proxy lies before this machine
        wait_ready(server, session, f"{address}/readyz")
        print(f"$ curl -F image=@{photo.name} {address}/classify")
        files = {"image": (photo.name, photo.read_bytes())}
        response = session.post(f"{address}/classify", files=files, timeout=60)
        response.raise_for_status()
        print(response.text.strip())


def wait_ready(server, session, url):
    for _ in range(300):
        with suppress(requests.RequestException):
            if session.get(url, timeout=5).ok:
                return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    sys.exit(f"the service did not start; see {OUT / 'service.log'}")


def play():
    OUT.mkdir(exist_ok=True)
    photos, detector = installed_photos(), Detector(BASELINE)
    print(f"note: {detector.model['notice']}")
    stay_put(detector, photos)
    never_seen()
    trap(photos, detector.model["encoder"]["layers"])
    serve(next(path for path in photos if path.name == "china.jpg"))
    print("\nPlots and metrics: demo/model_report/, demo/trap_report/, demo/resplit_report/")
    print("Your own folder: make demo DATA=DIR CLIP_MODEL=ViT-L/14")
