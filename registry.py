"""Versions of models in an MLflow registry: register, promote what is no worse, roll back, pull.

    python registry.py register detector model.joblib
    python registry.py promote detector v1.2.0 --golden golden.npz
    python registry.py list detector
    python registry.py rollback detector
    python registry.py pull detector@champion --out model.joblib

MLFLOW_TRACKING_URI names the registry. Without it the registry is mlflow.db in this folder.
The other commands and the service read model files only; `pull` writes such a file.
Needs the packages of requirements/mlflow.txt.
"""

import argparse
import re

from detector.base.console import Help, run
from detector.base.constants import MARGIN
from detector.base.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LONGEST_REASON = 500  # JSON may need 6 characters for each; MLflow's parameters hold 6,000


def add_command(commands, name, text, **options):
    """A subcommand that takes the name of a model."""
    parser = commands.add_parser(name, help=text, description=text, formatter_class=Help)
    parser.add_argument(
        "name", **{"metavar": "NAME", "help": "name of the registered model", **options}
    )
    return parser


def add_register(commands):
    parser = add_command(commands, "register", "store a model file and its report as a version")
    parser.add_argument(
        "model", metavar="FILE", help="model of train_model.py, with its report beside it"
    )
    parser.add_argument(
        "--allow_dirty",
        action="store_true",
        help="accept a model of uncommitted code, and record that",
    )


def add_promote(commands):
    text = "make a version the champion, unless it may be worse than the present champion"
    parser = add_command(commands, "promote", text)
    parser.add_argument(
        "version", metavar="VERSION", help="for example v1.2.0, or the registry's own number"
    )
    parser.add_argument(
        "--golden",
        metavar="PATH",
        help="labelled images that trained neither model: a features file or a folder",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        metavar="M",
        help="balanced accuracy by which it may be worse; the images must exclude a larger loss",
    )
    parser.add_argument(
        "--force", metavar="WHY", help="skip the comparison; the registry records who did and why"
    )


def add_pull(commands):
    text = "write a version's model file; NAME@champion, NAME@v1.2.0 or NAME@3"
    parser = add_command(commands, "pull", text, metavar="NAME@VERSION")
    parser.add_argument("--out", default="model.joblib", metavar="FILE", help="model to write")


def check_name(args):
    """Split NAME@VERSION of `pull` into `name` and `ref`. Raises UsageError."""
    if args.command == "pull":
        args.name, _, args.ref = args.name.partition("@")
        if not args.ref:
            raise UsageError(
                f"{args.name or 'NAME'!r}: name the version too, as in detector@champion"
            )
    if args.name is not None and not NAME.fullmatch(args.name):
        raise UsageError(
            f"{args.name or 'NAME'!r}: a name is of 1 to 64 letters, digits, '.', '_' and '-'"
        )


def check_promote(args):
    """Raises UsageError unless the margin is a share, and images or a short reason are given."""
    if not (args.golden or args.force):
        raise UsageError(
            "promote: name labelled images that trained neither model with --golden, "
            "or say why not with --force"
        )
    if not 0 < args.margin < 1:
        raise UsageError(f"--margin {args.margin:g}: must lie between 0 and 1, such as 0.03")
    if len(args.force or "") > LONGEST_REASON:
        raise UsageError(
            f"--force: a reason of {len(args.force)} characters; "
            f"say why in at most {LONGEST_REASON}"
        )


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)
    add_register(commands)
    add_promote(commands)
    add_command(commands, "rollback", "make the previous champion the champion again")
    add_pull(commands)
    text = "show the versions, their figures and commits, and the champion"
    add_command(commands, "list", text, nargs="?")
    args = parser.parse_args(argv)
    check_name(args)
    if args.command == "promote":
        check_promote(args)
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
