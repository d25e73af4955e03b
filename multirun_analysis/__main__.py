"""python -m multirun_analysis PATH... [--out FOLDER]: run folders -> tables, figures and a report that answers."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 if there is no run, 2 for something that cannot be."""
    parser = argparse.ArgumentParser(prog="brqat-report", description=__doc__.partition(": ")[2])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run folders, or any folder above them")
    parser.add_argument("--out", type=Path, help="where to write (default: report/ in the first PATH)")
    parser.add_argument("--by", nargs="+", metavar="KEY", help="what makes a setting (default: all keys that differ)")
    parser.add_argument(
        "--storage", metavar="URL", help="of studies that no file keeps: postgresql://USER@HOST/DATABASE"
    )
    parser.add_argument("--no-figures", action="store_true", help="tables and the report without figures")
    given = parser.parse_args(argv)
    for path in given.paths:
        if not path.is_dir():
            parser.error(f"{path} is not a folder")
    from .write import write  # here: --help and a mistyped PATH have no use for pandas and matplotlib

    out = given.out or given.paths[0] / "report"
    return write(given.paths, out, given.by, given.storage, with_figures=not given.no_figures)


if __name__ == "__main__":
    sys.exit(main())
