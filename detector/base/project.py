"""Where the project lies, and the commit of its code."""

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


def code_commit():
    """Commit of this code (CODE_COMMIT where there is no git, as in a container), '-dirty' with uncommitted changes."""
    try:
        git = ["git", "-C", str(HERE)]
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
        return commit + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CODE_COMMIT", "unknown")
