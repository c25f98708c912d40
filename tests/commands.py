"""Helpers for tests of commands: the project's folder, the form of errors, fewer rights."""

import ctypes
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPENAI_CACHE = ROOT / ".clip"  # `make test` fills it


def without_root():
    """Root gives up its right to ignore permissions, for tests of unreadable folders."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, by prctl(PR_CAPBSET_DROP)
        ctypes.CDLL(None).prctl(24, capability)


def assert_one_line_error(result, *words, code=2):
    """The command ended with `code` and one line on stderr with all `words`."""
    text = result.stderr if isinstance(result.stderr, str) else result.stderr.decode()
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert result.returncode == code, text
    assert "Traceback" not in text
    assert len(lines) == 1, text
    for word in words:
        assert str(word) in lines[0], lines[0]
