"""Folder of labelled images -> the list of what is in it: labels, splits and sources from folder names."""
import os
from pathlib import Path

from common import UsageError

LABELS = {**dict.fromkeys("real 0_real nature natural human photo photos".split(), 0),
          **dict.fromkeys("fake 1_fake ai generated synthetic ai_generated".split(), 1)}
SPLITS = "train,val,test,external,extra"


def describe(path, split_names):
    """Relative path 'test/progan/cat/0_real/1.png' -> (label 0 | 1 | -1, split 'test', source 'progan/cat').

    Raises UsageError where two folders of the path name different labels.
    """
    folders = path.split("/")[:-1]
    found = [(i, LABELS[f.lower()]) for i, f in enumerate(folders) if f.lower() in LABELS]
    if len({label for _, label in found}) > 1:
        names = "' and '".join(folders[i] for i, _ in found)
        raise UsageError(f"{path}: the folders '{names}' name both labels; rename one of them")
    above = folders[:found[0][0]] if found else folders
    split = next((i for i, f in enumerate(above) if f.lower() in split_names), None)
    skip = {split, *(i for i, _ in found)}
    source = "/".join(f for i, f in enumerate(folders) if i not in skip)
    return found[0][1] if found else -1, "" if split is None else folders[split].lower(), source


def list_files(data_dir):
    """Sorted paths of all files below `data_dir`, relative and '/'-separated; names that start with a dot left out."""
    root = Path(data_dir)
    if not root.is_dir():
        raise UsageError(f"--data_dir {data_dir}: no such folder")
    paths = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        paths += [Path(folder, f).relative_to(root).as_posix() for f in files if not f.startswith(".")]
    return sorted(paths)
