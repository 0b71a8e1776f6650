"""Turns your photos into GSV-Cities' format, and a held-out area into an evaluation dataset.

    python -m datasets.to_gsv_cities photos --output my_city --name MyCity --val_share 0.15 --test_share 0.15

A source is a folder of photos with positions in their names (`@<UTM east>@<UTM north>@...`, as in evaluation datasets)
or in EXIF data (phones), or a csv with the columns path, and east,north (metres) or lat,lon (degrees) or label, and
optionally heading, time and label. Degrees become UTM metres, in one zone. The output holds

    gsv_cities/Dataframes/<Name>.csv, gsv_cities/Images/<Name>/...    what train.py trains on
    <Name>/images/{val,test}/{database,queries}/...                   what it is evaluated on, if an area is held out
    photos.csv, summary.txt, places.png                               what became of each photo: list, summary, plot

Photos are links to the originals, except those that EXIF data turn: they are written turned, since training does not
turn photos. A place lies within `--cell` metres: a group of photos that reaches no farther or, of photos that follow
each other along a street, those in one square of a grid. Of places closer than `--gap` only the one with more photos
stays, since a batch must not hold a place under two labels. Merging them instead would turn whole streets into places:
of a walk with a photo every 10 m, 111 cells, it made 1 place, while leaving out keeps 23.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.system.command_line import Parser, printable
from utils.system.signals import left_on_signals, quiet_ctrl_c


def command_line() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog="python -m datasets.to_gsv_cities",
        usage="%(prog)s SOURCE [SOURCE ...] --output FOLDER [--option value ...]; --help lists all options",
        description="Turn photos into GSV-Cities' format.",
    )
    add = parser.add_argument
    add("sources", type=Path, nargs="+", metavar="SOURCE", help="folder of photos, or a csv")
    add("--output", type=Path, required=True, help="folder to create")
    add("--name", default="Mine", help="name of the city and of the evaluation dataset (default: Mine)")
    add("--copy", action="store_true", help="copy photos instead of linking to them")
    add("--cell", type=float, default=10.0, help="largest extent of a place in metres (default: 10)")
    add("--min_images", type=int, default=4, help="fewest photos per place (default: 4)")
    add("--heading_bins", type=int, default=1, help="split places into so many directions (default: 1, no split)")
    add("--gap", type=float, default=50.0, help="metres between places, and around what is held out (default: 50)")
    two_corners = "hold out the area between two corners, given as positions in the source are, for"
    add("--val_area", type=float, nargs=4, metavar=("A", "B", "C", "D"), help=f"{two_corners} validation")
    add("--test_area", type=float, nargs=4, metavar=("A", "B", "C", "D"), help=f"{two_corners} the test")
    add("--val_share", type=float, default=0.0, help="or hold out connected cells with this share of the photos")
    add("--test_share", type=float, default=0.0, help="the same for the test")
    halves = "queries are the later half of what is held out, or a random half (default: time if all photos have one)"
    add("--queries", choices=("time", "random"), help=halves)
    add("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    return parser


def _require_sense(chosen: argparse.Namespace) -> None:
    """Raises ValueError for invalid options."""
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9-]*", chosen.name):
        raise ValueError(f"--name {chosen.name!r} becomes part of file names; use letters, digits and -")
    for option, least in {"cell": 0.01, "min_images": 2, "heading_bins": 1, "gap": 0, "seed": 0}.items():
        if not least <= (value := getattr(chosen, option)) < float("inf"):
            raise ValueError(f"--{option} {value:g} is too small or not a number; use {least:g} or more")
    val, test = chosen.val_share, chosen.test_share
    for split, area, share in (("val", chosen.val_area, val), ("test", chosen.test_area, test)):
        if not 0 <= share < 1:
            raise ValueError(f"--{split}_share {share:g} is not a share; use at least 0 and below 1, e.g. 0.15")
        if area and share:
            raise ValueError(f"--{split}_area and --{split}_share both say what to hold out; give one of them")
    if val + test >= 1:
        raise ValueError(f"--val_share {val:g} and --test_share {test:g} leave no photo to train on; use less than 1")
    if chosen.queries and not any((chosen.val_area, val, chosen.test_area, test)):
        raise ValueError(f"--queries {chosen.queries} needs held-out photos; give --val_area or --val_share")


def _require_new(output: Path, sources: Sequence[Path]) -> None:
    """Raises an error if the output exists, cannot be created, or lies in a source."""
    if output.exists() or output.is_symlink():
        raise ValueError(f"--output {output} already exists; remove it, or name another folder")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "is not writable" if above.is_dir() else "is not a folder"
        raise ValueError(f"--output {output} cannot be created: {above} {reason}; name another folder")
    for source in sources:
        if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"--output {output} lies in {source}, whose photos are converted; name a folder outside")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 0, or 2 for bad input, raised as SystemExit."""
    parser = command_line()
    args = parser.parse(argv)
    output, notes = args.output, list[str]()
    try:
        _require_sense(args)
        _require_new(output, args.sources)
        # These take seconds: a mistake in the options is told before.
        from .own.conversion import assign, write
        from .own.photos import collect

        with left_on_signals():
            collection = collect(args.sources, notes)
            uses, places, lines = assign(
                collection,
                areas={"val": args.val_area, "test": args.test_area},
                shares={"val": args.val_share, "test": args.test_share},
                cell=args.cell,
                min_images=args.min_images,
                bins=args.heading_bins,
                gap=args.gap,
                queries=args.queries,
                seed=args.seed,
            )
            lines = write(output, collection, uses, places, lines, name=args.name, copy=args.copy)
    except (OSError, ValueError) as error:
        for note in notes:  # such as that only a part was converted
            print(printable(note), flush=True)
        unwritten = f"; nothing was written to --output {output}" if isinstance(error, OSError) else ""
        parser.error(f"{error}{unwritten}")
    print("\n".join(lines))
    options = f"--train_dataset_folder {shlex.quote(str(output / 'gsv_cities'))}"
    if (output / args.name / "images").is_dir():
        options = f"--eval_datasets_folder={shlex.quote(str(output))} --eval_dataset_name={args.name}"
    print(printable(f"wrote {output}; train with {options}"))
    return 0


if __name__ == "__main__":
    quiet_ctrl_c()
    sys.exit(main())
