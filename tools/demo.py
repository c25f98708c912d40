"""What this project does, in three acts and four minutes, without torch: `make demo`.

    python -m tools.demo

Act 1: do verdicts stay put when a photograph is re-saved? Act 2: how good are they on sources never seen? Act 3: how a
data set with nothing in it yields a fine test accuracy, and who notices. Then one image through a live service.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from detector.base.console import run
from detector.base.project import HERE
from detector.encoders.catalogue import EIGHT_BIT


def parse_args(argv):
    return argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(argv)


OUT = HERE / "demo"
BASELINE = HERE / "models" / "baseline.joblib"
FEATURES = HERE / "models" / "features.npz"
LOCAL = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # no proxy stands before this machine
COPIES = 10
DRAWS = 8


def title(text):
    print(f"\n== {text}", flush=True)


def command(*words, quiet=False):
    """Run one of the project's commands, shown as a user would type it, with its progress and what it prints."""
    print("$ python " + " ".join(map(str, words)), flush=True)
    result = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=HERE,
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "CLIP_MODEL": EIGHT_BIT},
    )
    if result.returncode not in ((0, 1) if words[0] == "audit.py" else (0,)):
        sys.exit(1)
    if not quiet:
        print(result.stdout.rstrip())


def stay_put(detector, photos):
    """Act 1: verdict on each photograph, and on what a site would hand out of it."""
    import numpy as np

    from detector.images import decoding, distort

    title(
        f"1. Verdicts that stay put, or not: {len(photos)} photographs, all real, by the shipped"
        f" model on {detector.encoder.name}"
    )
    tiers = {"768 px q60": (768, 60), "512 px q40": (512, 40)}
    print(f"{'':22}{'as it is':>12}" + "".join(f"{name:>14}" for name in tiers))
    wrong, flips = np.zeros(3, int), dict.fromkeys(tiers, 0)
    for path in photos:
        data = path.read_bytes()
        rgb = decoding.decode_image(data)
        answers = [
            detector.classify(d)
            for d in (data, *(distort.social_bytes(rgb, *t) for t in tiers.values()))
        ]
        wrong += [a[0] == "fake" for a in answers]
        for name, again in zip(tiers, answers[1:]):
            flips[name] += again[0] != answers[0][0]
        cells = [f"{c} {p:.2f}" + ("*" if c != answers[0][0] else " ") for c, p in answers]
        print(f"{path.name:22}{cells[0]:>12}" + "".join(f"{cell:>14}" for cell in cells[1:]))
    print(
        "called fake: "
        + ", ".join(f"{k} of {len(photos)}" for k in wrong)
        + "; verdicts flipped (*): "
        + ", ".join(f"{k} at {name}" for name, k in flips.items())
    )


def never_seen():
    """Act 2: train on the shipped features as the shipped model was, then accuracy by source, known and unseen apart."""
    from detector.evaluation.audit import sentences
    from detector.evaluation.metrics import words

    title(
        "2. Sources never seen: trained live on `train` of the shipped features (numbers; no"
        " picture ships)"
    )
    features = FEATURES.relative_to(HERE)
    command(
        "train_model.py",
        "--features_file",
        features,
        "--model_output_path",
        "demo/model.joblib",
        "--classifier",
        "logistic",
        quiet=True,
    )
    command(
        "evaluate.py",
        "--model_path",
        "demo/model.joblib",
        "--features_file",
        features,
        "--report_dir",
        "demo/evaluation",
        quiet=True,
    )
    found = json.loads((OUT / "evaluation" / "metrics.json").read_text())
    for part, text in (
        ("known", "known sources, images not trained on"),
        ("unseen", "sources never seen"),
    ):
        m = found[part]
        print(
            f"{text}: n {m['n']}, balanced accuracy {words(m['balanced_accuracy'])}, AUC"
            f" {words(m['auc'])}"
        )
        print("  the worst five of its sources with at least five images:")
        for row in [
            r for r in found["by_source"] if r["known"] == (part == "known") and r["n"] >= 5
        ][:5]:
            print(
                f"    {row['source'][:38]:38} {row['label']}  n {row['n']:3}  accuracy"
                f" {words(row['own'])}"
            )
    for line in sentences(metrics_report("model")["audit"])[0]:
        print(f"LEAK  {line}")
    print(
        "These images are a leak by the audit's rule: judge the model by the row of sources never"
        " seen."
    )


def call_half_fake(pictures, rng):
    """Numbers of the pictures called fake: one, by a coin, of each two that are alike in colour, so that neither
    colour nor grey gives the label away."""
    import numpy as np

    colour = [np.ptp(np.asarray(rgb).astype(int), axis=2).mean() for rgb in pictures]
    return {pair[rng.integers(2)] for pair in np.argsort(colour).reshape(-1, 2)}


def build_trap(photos, folder):
    """Call half of the photographs fake, re-save each COPIES times at random sizes and qualities, put the copies at
    random into train and test: there is nothing to find."""
    import numpy as np

    from detector.images import decoding, distort

    rng = np.random.default_rng(0)
    shutil.rmtree(folder, ignore_errors=True)
    pictures = [decoding.decode_image(path.read_bytes()) for path in photos]
    fake = call_half_fake(pictures, rng)
    for i, (path, rgb) in enumerate(zip(photos, pictures)):
        for k in range(COPIES):
            place = (
                folder
                / ("train" if rng.random() < 0.8 else "test")
                / ("fake" if i in fake else "real")
            )
            place.mkdir(parents=True, exist_ok=True)
            data = distort.social_bytes(rgb, int(rng.integers(160, 512)), int(rng.integers(30, 96)))
            (place / f"{path.stem}-{k:02d}.jpg").write_bytes(data)


def trap(photos, layers):
    """Act 3: the user's three commands on that folder, the audit, and the same again with an honest split."""
    import numpy as np

    title("3. The trap. There is nothing to find: chance is 0.5")
    print(
        f"The same photographs, all real. Half of them are called fake. Each is re-saved {COPIES}"
        " times, and its copies lie in train and in test."
    )
    build_trap(photos, OUT / "trap")
    (OUT / "trap.npz").unlink(missing_ok=True)
    command(
        "extract_features.py",
        "--data_dir",
        "demo/trap",
        "--output_file",
        "demo/trap.npz",
        "--layers",
        layers,
    )
    command(
        "train_model.py",
        "--features_file",
        "demo/trap.npz",
        "--model_output_path",
        "demo/trap.joblib",
        quiet=True,
    )
    believed = metrics_of("trap")
    command(
        "classify.py",
        "--image_path",
        f"demo/trap/test/fake/{next((OUT / 'trap/test/fake').iterdir()).name}",
        "--model_path",
        "demo/trap.joblib",
    )
    command("audit.py", "--data_dir", "demo/trap")
    command(
        "train_model.py",
        "--features_file",
        "demo/trap.npz",
        "--model_output_path",
        "demo/resplit.joblib",
        "--resplit",
        quiet=True,
    )
    resplit, honest = metrics_of("resplit")["balanced_accuracy"], other_draws(photos)
    m = believed["balanced_accuracy"]
    print(
        f"split as the folders have it:          balanced accuracy {m['value']:.2f} on {m['n']}"
        " images"
    )
    print(
        f"--resplit, no picture on both sides:   balanced accuracy {resplit['value']:.2f} on"
        f" {resplit['n']} copies of three pictures"
    )
    print(
        f"the same, {DRAWS} other halves called fake:  balanced accuracy {np.mean(honest):.2f} on"
        f" average ({', '.join(f'{h:.2f}' for h in honest)})"
    )
    print("Without the audit, the first figure would have been believed.")


def other_draws(photos):
    """The same training with other halves of the pictures called fake, because a fifth of fourteen pictures is three and
    one draw of labels says little. -> DRAWS balanced accuracies"""
    import numpy as np
    from tqdm import tqdm

    from detector.evaluation import metrics
    from detector.images import decoding
    from detector.training.recipe import build, p_of, set_threshold
    from detector.training.rows import Rows, choose_rows

    pictures = [decoding.decode_image(path.read_bytes()) for path in photos]
    columns, found = dict(np.load(OUT / "trap.npz")), []
    picture = [Path(path).stem[:-3] for path in columns["paths"]]
    for draw in tqdm(range(1, DRAWS + 1), desc="other halves called fake"):
        fake = [photos[i].stem for i in call_half_fake(pictures, np.random.default_rng(draw))]
        columns["labels"] = np.isin(picture, fake).astype(np.int8)
        train, test, groups, twins, _ = choose_rows(
            columns, argparse.Namespace(train_splits="train", resplit=True), seed=0
        )
        model = set_threshold(
            build("svm", Rows(columns, train, groups, twins), seed=0), max_fpr=None
        )
        measured = metrics.measure(
            columns["labels"][test].astype(int),
            p_of(model, columns, test),
            model["threshold"],
            groups[test],
        )
        found.append(measured["balanced_accuracy"]["value"])
    return found


def metrics_report(name):
    return json.loads((OUT / f"{name}_report" / "metrics.json").read_text())


def metrics_of(name):
    return metrics_report(name)["overall"]


def serve(photo):
    """One image through a live service, stopped again."""
    title("One image through a live service")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"MODEL_PATH": str(BASELINE), "ALLOW_DEMO_MODEL": "1", "PORT": str(port)}
    with open(OUT / "service.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=HERE,
            env={**os.environ, **settings},
            stdout=log,
            stderr=log,
        )
        try:
            wait_ready(server, f"http://127.0.0.1:{port}/readyz")
            print(f"$ curl -F image=@{photo.name} http://127.0.0.1:{port}/classify")
            print(post(f"http://127.0.0.1:{port}/classify", photo))
        finally:
            server.terminate()
            server.wait(30)


def wait_ready(server, url):
    for _ in range(300):
        try:
            return LOCAL.open(url, timeout=5)
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.1)
    sys.exit(f"the service did not start; see {OUT / 'service.log'}")


def post(url, photo):
    """Multipart upload with the standard library alone; -> the answer as text."""
    boundary = "photograph"
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="image";'
        f' filename="{photo.name}"\r\n\r\n'.encode()
        + photo.read_bytes()
        + f"\r\n--{boundary}--\r\n".encode()
    )
    request = urllib.request.Request(
        url, body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )
    with LOCAL.open(request, timeout=60) as answer:
        return answer.read().decode().strip()


def main(argv=None):
    parse_args(argv)
    from detector.images.samples import installed_photos
    from detector.verdict import Detector

    OUT.mkdir(exist_ok=True)
    photos, detector = installed_photos(), Detector(BASELINE)
    print(f"note: {detector.model['notice']}")
    stay_put(detector, photos)
    never_seen()
    trap(photos, detector.model["encoder"]["layers"])
    serve(next(p for p in photos if p.name == "china.jpg"))
    print("\nPlots and metrics: demo/model_report/, demo/trap_report/, demo/resplit_report/")
    print("Your own folder: make demo DATA=DIR CLIP_MODEL=ViT-L/14")


if __name__ == "__main__":
    run(main)
