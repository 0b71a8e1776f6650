"""A synthetic city: rendered street views in the layouts of GSV-Cities (training) and of evaluation datasets.

It is a small substitute for the large datasets, some of which need a licence. Streets are rows of houses that differ in
structure (rooflines, window grids, doors, shop fronts), while all colours come from one shared palette, and every visit
has its own camera pose, light, weather and passers-by: a model must learn what stays, the buildings. Numbers measured
here show that the code works; they say nothing about real cities.

World frame of a street, in metres: x runs east along the facades, y up from the pavement, z north; the facades stand
in the plane z = 0 and the camera south of it, so a heading of 0 degrees looks straight at them.
"""

from collections.abc import Sequence
from pathlib import Path

from utils.system.command_line import Parser
from utils.system.signals import left_on_signals

from .layout import CITIES, write_toy_city

__all__ = ["main", "write_toy_city"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 0, or 2 for bad input, raised as SystemExit."""
    parser = Parser(
        prog="python -m datasets.toy_city",
        usage="%(prog)s [--option value ...]; --help lists all options",
        description="Render a synthetic city for training and evaluation.",
    )
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder for gsv_cities and toy_city")
    parser.add_argument("--cities", nargs="+", default=["London", "Boston"], choices=sorted(CITIES))
    for name, default, text in (
        ("seed", 0, "seed of all random numbers"),
        ("train_streets", 72, "streets per training city"),
        ("places", 8, "places per training street"),
        ("visits", 5, "images per training place"),
        ("test_streets", 22, "streets of the test split"),
        ("val_streets", 10, "streets of the val split"),
        ("cluster_streets", 12, "streets of the train split (for k-means)"),
        ("spots", 10, "database images, and queries, per evaluation street"),
        ("workers", None, "processes that render (default: one per core)"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--size", type=int, nargs=2, default=(160, 120), metavar=("WIDTH", "HEIGHT"), help="in pixels")
    parser.add_argument("--overwrite", action="store_true", help="replace the two folders if they exist")
    args = vars(parser.parse(argv))
    args["size"] = tuple(args["size"])
    try:
        with left_on_signals():
            gsv, trees = write_toy_city(args.pop("output"), progress=True, **args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {gsv} and {trees}")
    return 0
