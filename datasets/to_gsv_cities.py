"""Turns your photos into GSV-Cities' format, and a held-out area into an evaluation dataset.

    python -m datasets.to_gsv_cities photos --output my_city --name MyCity --val_share 0.15 --test_share 0.15

A source is a folder of photos with positions in their names (`@<UTM east>@<UTM north>@...`, as in evaluation datasets)
or in EXIF data (phones), or a csv with the columns path, and east,north (metres) or lat,lon (degrees) or label, and
optionally heading, time and label. Degrees become UTM metres, in one zone. The output holds

    gsv_cities/Dataframes/<Name>.csv, gsv_cities/Images/<Name>/...    what train.py trains on
    <Name>/images/{val,test}/{database,queries}/...                   what it is evaluated on, if an area is held out
    photos.csv, summary.txt, places.png                               what became of each photo: list, summary, plot

Photos are links to the originals, except those that EXIF data turn: they are written turned, since training does not
turn photos.
"""

import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.system.command_line import Parser, printable
from utils.system.signals import left_on_signals, quiet_ctrl_c

from .own import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 0, or 2 for bad input, raised as SystemExit."""
    parser = Parser(
        prog="python -m datasets.to_gsv_cities",
        usage="%(prog)s SOURCE [SOURCE ...] --output FOLDER [--option value ...]; --help lists all options",
        description="Turn photos into GSV-Cities' format.",
    )
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="folder of photos, or a csv")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_group(Settings)
    args = vars(parser.parse(argv))
    sources, output, notes = args.pop("sources"), args.pop("output"), list[str]()
    settings = Settings(**args)
    try:
        if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9-]*", settings.name):
            raise ValueError(f"--name {settings.name!r} becomes part of file names; use letters, digits and -")
        if (held_out := settings.val_share + settings.test_share) >= 1:
            raise ValueError(f"--val_share and --test_share, {held_out:g}, leave no photo to train on; use less than 1")
        if settings.queries and not (held_out or settings.val_area or settings.test_area):
            raise ValueError(f"--queries {settings.queries} needs held-out photos; give --val_area or --val_share")
        if math.isinf(settings.cell + settings.gap):
            raise ValueError(f"--cell {settings.cell:g} and --gap {settings.gap:g} are metres; give finite numbers")
        if output.exists() or output.is_symlink():
            raise ValueError(f"--output {output} already exists; remove it, or name another folder")
        for source in sources:
            if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
                raise ValueError(f"--output {output} lies in {source}, whose photos are read; name a folder outside")
        from .own.conversion import convert  # takes seconds: a mistake in the options is told before

        with left_on_signals():
            lines = convert(sources, output, settings, notes)
    except (OSError, ValueError) as error:
        for note in notes:  # such as that only a part was converted
            print(printable(note), flush=True)
        unwritten = f"; nothing was written to --output {output}" if isinstance(error, OSError) else ""
        parser.error(f"{error}{unwritten}")
    print("\n".join(lines))
    flags = f"--train_dataset_folder {shlex.quote(str(output / 'gsv_cities'))}"
    if (output / settings.name / "images").is_dir():
        flags = f"--eval_datasets_folder={shlex.quote(str(output))} --eval_dataset_name={settings.name}"
    print(printable(f"wrote {output}; train with {flags}"))
    return 0


if __name__ == "__main__":
    quiet_ctrl_c()
    sys.exit(main())
