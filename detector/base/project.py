"""The project's folder, and the commit of its code."""

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


def git(*words):
    """Output of a git command in the project's folder."""
    command = ["git", "-C", str(HERE), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def code_commit():
    """Commit of this code, with '-dirty' where tracked files have changed.

    Without git, as in a container: the variable CODE_COMMIT.
    """
    try:
        changed = git("status", "--porcelain", "-uno")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CODE_COMMIT", "unknown")
