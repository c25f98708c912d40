"""A checkpoint that `clip.load` reads, for the benchmarks that compare with OpenAI's loop."""

from pathlib import Path

from detector.encoders.prepare import load_visual
from tests.small_clip import rounded, save_archive


def checkpoint_of(clip_model, folder):
    """A file is its own checkpoint; a named encoder's weights are written to a file in `folder`."""
    if Path(clip_model).is_file():
        return clip_model
    return save_archive(rounded(load_visual(clip_model)), Path(folder, "checkpoint.pt"))
