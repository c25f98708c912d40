"""Features as they ship: untouched images, rounded to float16. Part of `make ship`.

    python models/thin.py runs/ship/all.npz runs/ship/features.npz

The columns stay what they are. Rounded numbers take half of the room in a compressed file.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from dataset import COLUMNS  # noqa: E402
from features import load_features  # noqa: E402


def main(source, target):
    columns = load_features(source)
    whole = columns["view"] == 0
    kept = {name: columns[name][whole] for name in COLUMNS}
    kept["features"] = kept["features"].astype(np.float16).astype(np.float32)
    meta = {**columns["meta"], "rounded": "float16"}
    with common.atomic_write(target) as file:
        np.savez_compressed(file, meta=np.array(json.dumps(meta)), **kept)


if __name__ == "__main__":
    common.run(lambda: main(*sys.argv[1:]))
