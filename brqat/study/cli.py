"""brqat-study: looks at a study, and runs its best settings with more seeds."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 for something that cannot be."""
    parser = argparse.ArgumentParser(prog="brqat-study", description=__doc__)
    words = parser.add_subparsers(required=True)
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("where", help="the sweep's folder, its study.db or study.journal, or a storage's address")
    where.add_argument("--study", help="the study's name, where the storage holds several")
    status = words.add_parser("status", parents=[where], help="where the study stands")
    status.set_defaults(command="status")
    export = words.add_parser("export", parents=[where], help="trials.csv and the like, written again")
    export.add_argument("--folder", type=Path, help="the sweep's folder, if `where` is an address")
    export.set_defaults(command="export")
    confirm = words.add_parser("confirm", parents=[where], help="the best settings again, with more seeds")
    confirm.add_argument("--best", type=int, default=3, metavar="K", help="settings to confirm (3)")
    confirm.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds for each (3)")
    confirm.add_argument("--folder", type=Path, help="the sweep's folder, if `where` is an address")
    confirm.add_argument("overrides", nargs="*", help="for all runs, as for brqat -m: threads=1, hydra/launcher=joblib")
    confirm.set_defaults(command="confirm")
    given, rest = parser.parse_known_args(arguments)
    if rest and (given.command != "confirm" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if given.command == "confirm":  # overrides behind an option are what argparse does not know
        given.overrides += rest
    # here: --help and a mistyped command have no use for Optuna and SQLAlchemy
    import optuna

    from brqat.study import commands

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return getattr(commands, given.command)(given)
    except ValueError as error:
        print(f"brqat-study: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
