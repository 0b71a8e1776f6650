"""Checks photos and tables before hours are spent on them; needs no model.

    python -m datasets.check data/toy_city data/gsv_cities
    python -m datasets.check known asked

A folder is one evaluation dataset (`images/<split>/{database,queries}`; `gallery` for database and several
`queries_...` are fine), GSV-Cities (`Dataframes` and `Images`), or plain photos. Each fault is one line on stdout,
`<kind>: <path>: <what and what to do>`; notes, such as an image of 16 bits, are lines of the same form. The exit status
is 0 without faults, 1 with any, and 2 for a folder that is none of these.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.system.command_line import Parser, option
from utils.system.signals import left_on_signals, quiet_ctrl_c


@dataclass(frozen=True)
class Checks:
    """How to check."""

    threshold: float = option(25.0, "metres from a query to a positive", least=0)
    workers: int | None = option(None, "processes that read photos, by default one per core", least=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 1 if there is any fault."""
    parser = Parser(
        prog="python -m datasets.check",
        usage="%(prog)s FOLDER [FOLDER ...] [--option value ...]; --help lists all options",
        description="Check photos and tables without a model.",
    )
    kinds = "evaluation dataset, GSV-Cities, or plain photos"
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help=kinds)
    parser.add_group(Checks)
    args = vars(parser.parse(argv))
    from .faults import check  # takes seconds: a misspelt option is answered before

    try:
        with left_on_signals():
            return 1 if check(args.pop("folders"), **vars(Checks(**args))) else 0
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error}; make the folder readable")


if __name__ == "__main__":
    quiet_ctrl_c()
    sys.exit(main())
