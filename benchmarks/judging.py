"""Runs one detector over images, for peers.py, by the Python of the detector's own environment.

    python -P benchmarks/judging.py sahu65 paths.json
    python -P benchmarks/judging.py ours paths.json models/baseline.joblib

Prints a line of JSON for each image, [result, seconds], then its peak MB. A result is
[probability of fake, called fake, uncertain], or the text of an error. Imports nothing that a peer
lacks.
"""

import json
import resource
import sys
import time
from pathlib import Path


def ours(model_path):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from detector.images.decoding import decode_image
    from detector.verdict import Detector

    detector = Detector(model_path, device="cpu")

    def judge(path):
        pixels = detector.pixels(decode_image(Path(path).read_bytes()))
        (verdict,) = detector.judge(pixels[None])
        return verdict.p_fake, verdict.classification == "fake", verdict.uncertain

    return judge


def sahu65():
    import sahu65

    sahu65.warm()  # raises where the weights cannot be loaded

    def judge(path):
        result = sahu65.detect(path)
        return result.ai_probability, result.is_ai, result.is_inconclusive

    return judge


def judge_all(judge, file):
    for path in json.loads(Path(file).read_text()):
        started = time.perf_counter()
        try:
            result = [float(value) for value in judge(path)]
        except Exception as error:  # a peer may raise anything
            result = str(error)
        print(json.dumps([result, time.perf_counter() - started]), flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


if __name__ == "__main__":
    detector, paths, *more = sys.argv[1:]
    judge_all({"ours": ours, "sahu65": sahu65}[detector](*more), paths)
