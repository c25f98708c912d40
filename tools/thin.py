"""Features as they ship: rounded to float16. Part of `make ship`.

    python -m tools.thin runs/ship/all.npz runs/ship/features.npz

The columns stay the same. Rounded numbers halve the size of the compressed file. Degraded copies
stay in the splits that train the model. Those of the others would add a tenth to the file.
"""

import json
import sys

import numpy as np

from detector.base.console import run
from detector.base.files import atomic_write
from detector.features.columns import COLUMNS
from detector.features.file import load_features


def main(source, target):
    columns = load_features(source)
    used = (columns["view"] == 0) | np.isin(columns["splits"], ["train", "extra"])
    kept = {name: columns[name][used] for name in COLUMNS}
    kept["features"] = kept["features"].astype(np.float16).astype(np.float32)
    meta = {**columns["meta"], "rounded": "float16"}
    with atomic_write(target) as file:
        np.savez_compressed(file, meta=np.array(json.dumps(meta)), **kept)


if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]))
