"""Versions of models in an MLflow registry: register, promote what is no worse, roll back, pull.

    python registry.py register detector model.joblib
    python registry.py promote detector v1.2.0 --golden golden.npz
    python registry.py list detector
    python registry.py rollback detector
    python registry.py pull detector@champion --out model.joblib

The registry is that of MLFLOW_TRACKING_URI, else mlflow.db in this folder. What classifies reads files only: `pull` writes one.
Needs what requirements/mlflow.txt names.
"""

import argparse
import re

from detector.base.console import Help, run
from detector.base.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LONGEST_WHY = 500  # six times that in JSON is still a parameter of MLflow's


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text):
        added = commands.add_parser(name, help=text, description=text, formatter_class=Help)
        added.add_argument(
            "name",
            metavar="NAME@VERSION" if name == "pull" else "NAME",
            help="of the registered model",
            nargs="?" if name == "list" else None,
        )
        return added

    register = command("register", "a model file and its report become a version")
    register.add_argument(
        "model", metavar="FILE", help="from train_model.py; its report is looked for beside it"
    )
    register.add_argument(
        "--allow_dirty", action="store_true", help="take one of uncommitted code; recorded"
    )
    promote = command(
        "promote", "make a version the champion, if it is no worse than the one before"
    )
    promote.add_argument(
        "version", metavar="VERSION", help="as v1.2.0, or the registry's own number"
    )
    promote.add_argument(
        "--golden",
        metavar="PATH",
        help="labelled images that trained neither: features file or folder",
    )
    promote.add_argument("--force", metavar="WHY", help="without looking; who and why are recorded")
    command("rollback", "make the champion before this one the champion again")
    pull = command("pull", "write a version's model file; NAME@champion, NAME@v1.2.0 or NAME@3")
    pull.add_argument("--out", default="model.joblib", metavar="FILE", help="model to write")
    command("list", "versions, their figures and commits, and which one is champion")
    args = parser.parse_args(argv)
    args.name, _, args.ref = (
        (args.name or "").partition("@") if args.command == "pull" else (args.name, "", None)
    )
    if args.name is not None and not NAME.fullmatch(args.name) or args.ref == "":
        raise UsageError(
            f"{args.name or 'NAME'!r}: "
            + (
                "name the version too, as in detector@champion"
                if args.ref == ""
                else "a name is of 1 to 64 letters, digits, '.', '_' and '-'"
            )
        )
    if args.command == "promote" and not (args.golden or args.force):
        raise UsageError(
            "promote: name labelled images that trained neither model with --golden, or say why not"
            " with --force"
        )
    if args.command == "promote" and len(args.force or "") > LONGEST_WHY:
        raise UsageError(
            f"--force: a reason of {len(args.force)} characters; say why in at most {LONGEST_WHY}"
        )
    return args


def main(argv=None):
    args = parse_args(argv)
    from detector.registry.store import one_line
    from detector.registry.versions import list_all, promote, pull, register, rollback

    commands = {
        "register": register,
        "promote": promote,
        "rollback": rollback,
        "pull": pull,
        "list": list_all,
    }
    with one_line():
        return commands[args.command](args)


if __name__ == "__main__":
    run(main)
