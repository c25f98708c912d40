"""What this project does, in three acts and four minutes, without torch: `make demo`.

    python -m tools.demo

Act 1 re-saves photographs and counts the verdicts that change. Act 2 measures accuracy on sources
never seen. Act 3 builds a data set with nothing to learn: its test accuracy is high all the same,
and the audit says why. Then one image goes through a live service.
"""

import argparse

from detector.base.console import run


def main(argv=None):
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(argv)
    from tools.acts import play

    play()


if __name__ == "__main__":
    run(main)
