"""The command line of the toy city."""

from collections.abc import Sequence
from pathlib import Path

from utils.system.command_line import Parser
from utils.system.signals import left_on_signals

from .layout import CITIES, write_toy_city


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 0, or 2 for bad input, raised as SystemExit."""
    parser = Parser(
        prog="python -m datasets.toy_city",
        usage="%(prog)s [--option value ...]; --help lists all options",
        description="Render a synthetic city for training and evaluation.",
    )
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder for gsv_cities and toy_city")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    parser.add_argument("--cities", nargs="+", default=["London", "Boston"], choices=sorted(CITIES))
    parser.add_argument("--train_streets", type=int, default=72, help="streets per training city")
    parser.add_argument("--places", type=int, default=8, help="places per training street")
    parser.add_argument("--visits", type=int, default=5, help="images per training place")
    parser.add_argument("--test_streets", type=int, default=22, help="streets of the test split")
    parser.add_argument("--val_streets", type=int, default=10, help="streets of the val split")
    parser.add_argument("--cluster_streets", type=int, default=12, help="streets of the train split (for k-means)")
    parser.add_argument("--spots", type=int, default=10, help="database images, and queries, per evaluation street")
    parser.add_argument("--size", type=int, nargs=2, default=(160, 120), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--workers", type=int, help="processes that render (default: one per core)")
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
