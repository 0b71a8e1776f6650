"""Verifies photos and their tables before hours are spent on them; no model is needed.

    python -m datasets.check data/toy_city data/gsv_cities

A folder is one evaluation dataset (`images/<split>/{database,queries}`) or GSV-Cities (`Dataframes` and `Images`).
Each fault is one line on stdout, `<kind>: <path>: <what and what to do>`. The exit status is 0 if there is none, 1 if
there is any, 2 for a folder that is neither.
"""

from pathlib import Path

from utils.command_line import Parser


def command_line() -> Parser:
    """What the command takes."""
    parser = Parser(
        prog="python -m datasets.check",
        usage="%(prog)s FOLDER [FOLDER ...] [--option value ...]; --help lists all options",
        description="Verify data without a model.",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="evaluation dataset, or GSV-Cities")
    parser.add_argument("--threshold", type=float, default=25.0, help="metres from a query to a positive (default: 25)")
    parser.add_argument("--workers", type=int, help="processes to read with (default: one for each core)")
    return parser


if __name__ == "__main__":
    command_line().parse()  # before the seconds of importing the rest: a mistake is answered at once

import csv
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from .database_queries import DatabaseQueries, list_images, utm_positions
from .gsv_cities import read_city
from .transforms import open_image

SPLITS = ("train", "val", "test")
PARTS = ("database", "queries")
IMAGES_PER_TASK = 16


@dataclass(frozen=True)
class Fault:
    """What is wrong with one file or folder, and what to do about it."""

    kind: str
    path: str
    message: str

    def __str__(self) -> str:
        line = f"{self.kind}: {self.path}: {self.message}"
        # A file name may hold a line break, or bytes that are not text.
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def read_image(path: str) -> bytes | Fault:
    """The digest of a file that decodes to its last pixel, or else its fault."""
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return Fault("zero-size", path, "the file is empty; replace or remove it")
            digest = hashlib.file_digest(file, "sha256").digest()
        open_image(path)
    except FileNotFoundError:
        return Fault("unreadable", path, "a link to a file that is not there; restore that file or remove the link")
    except OSError as error:
        return Fault("unreadable", path, f"{error.strerror}; mend, replace or remove it")
    except Exception as error:  # whatever a decoder stumbles over: one bad file must not end the check of the others
        return Fault("unreadable", path, f"{error.__cause__ or error}; replace or remove it")
    return digest


def read_images(paths: Sequence[str], *, workers: int | None, name: str) -> list[bytes | Fault]:
    """`read_image` of each path, in that order.

    Args:
        workers: processes to read with; None takes one for each core.
        name: stands at the progress bar.
    """
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        results = pool.map(read_image, paths, chunksize=IMAGES_PER_TASK)
        return list(tqdm(results, total=len(paths), unit="image", desc=name, disable=not paths))


def images_below(folder: Path) -> list[str]:
    """As `list_images`, but an empty list where that refuses."""
    try:
        return list_images(folder)
    except (FileNotFoundError, ValueError):
        return []


def has_position(path: str) -> bool:
    """Whether the file name holds finite UTM coordinates."""
    try:
        utm_positions([path])
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Split:
    """The images of one split, whatever their names and content.

    Attributes:
        names: of the split, and of later ones whose folder is a link to the same (as MSLS's test is to its val).
        folder: holds `database` and `queries`.
        database, queries: paths, sorted.
    """

    names: list[str]
    folder: Path
    database: list[str]
    queries: list[str]

    @property
    def image_count(self) -> int:
        """Of both parts."""
        return len(self.database) + len(self.queries)

    def __str__(self) -> str:
        return f"{' = '.join(self.names)}: {len(self.database)} database, {len(self.queries)} queries"


def is_tree(folder: Path) -> bool:
    """Whether the folder has `images/<split>/database` or `queries` for any split."""
    return any(os.path.lexists(folder / "images" / split / part) for split in SPLITS for part in PARTS)


def find_splits(folder: Path) -> list[Split]:
    """The splits of an evaluation dataset; one folder under two names is one split."""
    same: dict[str, list[str]] = {}
    for name in SPLITS:
        path = folder / "images" / name
        if os.path.lexists(path):
            same.setdefault(os.path.realpath(path), []).append(name)
    splits = []
    for names in same.values():
        path = folder / "images" / names[0]
        splits.append(Split(names, path, images_below(path / "database"), images_below(path / "queries")))
    return splits


def folder_faults(split: Split) -> list[Fault]:
    """A missing or empty `database` or `queries`."""
    faults = []
    for part, paths in zip(PARTS, (split.database, split.queries), strict=True):
        path = split.folder / part
        if not path.is_dir():
            faults.append(Fault("missing", str(path), "no such folder, or a broken link; put the images there"))
        elif not paths:
            faults.append(Fault("empty", str(path), "no image in it; put the images there"))
    return faults


def position_faults(split: Split, threshold: float) -> list[Fault]:
    """Names without coordinates, and queries with no database image within `threshold` metres (closed ball)."""
    nowhere = {path for path in split.database + split.queries if not has_position(path)}
    advice = "no finite UTM coordinates in the file name; name it @<UTM east>@<UTM north>@...@.jpg"
    faults = [Fault("name", path, advice) for path in split.database + split.queries if path in nowhere]
    database = [path for path in split.database if path not in nowhere]
    queries = [path for path in split.queries if path not in nowhere]
    if not database or not queries:
        return faults
    located = DatabaseQueries(
        name=str(split.folder),
        database_paths=database,
        queries_paths=queries,
        database_positions=utm_positions(database),
        queries_positions=utm_positions(queries),
    )
    advice = f"no database image within {threshold:g} m, so it is always a miss; add one or remove the query"
    near = located.positives(threshold)
    return faults + [
        Fault("no-positive", path, advice) for path, found in zip(queries, near, strict=True) if not len(found)
    ]


def content_faults(split: Split, *, workers: int | None, name: str) -> list[Fault]:
    """Files that cannot be read, and files that repeat an earlier one, database before queries."""
    paths = split.database + split.queries
    faults = []
    first: dict[bytes, str] = {}
    for path, result in zip(paths, read_images(paths, workers=workers, name=name), strict=True):
        if isinstance(result, Fault):
            faults.append(result)
        elif (original := first.setdefault(result, path)) != path:
            faults.append(Fault("duplicate", path, f"the same picture as {original}; remove one of them"))
    return faults


def check_tree(folder: Path, *, threshold: float = 25.0, workers: int | None = None) -> list[Fault]:
    """The faults of an evaluation dataset.

    Args:
        folder: holds `images/<split>/{database,queries}`.
        threshold: in metres; how near a query needs a database image.
        workers: processes to read with; None takes one for each core.

    Returns:
        Split by split: folders, names, queries without a positive, content; each sorted by path, database first.
    """
    if not is_tree(folder):
        return [Fault("missing", str(folder / "images"), "no <split>/database or <split>/queries in it; put it there")]
    faults = []
    for split in find_splits(folder):
        faults += folder_faults(split)
        faults += position_faults(split, threshold)
        faults += content_faults(split, workers=workers, name=f"{folder.name} {split.names[0]}")
    return faults


@dataclass(frozen=True)
class City:
    """One table of GSV-Cities: its name, its number of places, and each row's image below `Images`."""

    name: str
    places: int
    images: list[str]

    def __str__(self) -> str:
        return f"{self.name}: {self.places} places, {len(self.images)} images"


def is_gsv_cities(folder: Path) -> bool:
    """Whether the folder has `Dataframes`."""
    return (folder / "Dataframes").is_dir()


def read_tables(folder: Path) -> tuple[list[City], list[Fault]]:
    """The tables that parse and hold a row, and the faults of the others, each by name."""
    cities, faults = [], []
    for path in sorted((folder / "Dataframes").glob("*.csv")):
        try:
            places, images = read_city(folder, path.stem)
            if not len(images):
                raise ValueError("no row in it")
        except (OSError, ValueError, csv.Error) as error:
            what = str(error).removeprefix(str(path)).lstrip(", ")
            faults.append(Fault("table", str(path), f"{what}; mend it and check again: its images were left out"))
        else:
            cities.append(City(path.stem, len(np.unique(places)), [name.decode() for name in images]))
    return cities, faults


def parent(name: str) -> str:
    """The folder of an image below `Images`."""
    return name.rpartition("/")[0]


def check_gsv_cities(folder: Path, *, workers: int | None = None) -> list[Fault]:
    """The faults of GSV-Cities.

    Args:
        folder: holds `Dataframes` and `Images`.
        workers: processes to read with; None takes one for each core.

    Returns:
        Tables by name; repeated rows, missing images and unreadable ones in the order of the rows; images that no row
        names, sorted. A folder of which all images are missing, or which no row names, is one fault.
    """
    cities, faults = read_tables(folder)
    broken = {Path(fault.path).stem for fault in faults}
    if not cities and not faults:
        advice = "no <City>.csv in it; download GSV-Cities' tables"
        return [Fault("missing", str(folder / "Dataframes"), advice)]

    named: dict[str, None] = {}  # in the order of the rows
    for city in cities:
        for row, name in enumerate(city.images, 1):
            if name in named:
                advice = f"row {row} below the header names {name} once more; remove it"
                faults.append(Fault("repeated-row", str(folder / "Dataframes" / f"{city.name}.csv"), advice))
            named[name] = None

    images = folder / "Images"
    present = dict.fromkeys(path.removeprefix(f"{images}{os.sep}") for path in images_below(images))
    rows_in, files_in = Counter(map(parent, named)), Counter(map(parent, present))
    for name, rows in rows_in.items():
        if name not in files_in:
            advice = f"no image in it, but {rows} rows name one there; put the images there"
            faults.append(Fault("missing", str(images / name), advice))
    for name in named:
        if name not in present and parent(name) in files_in:
            faults.append(Fault("missing", str(images / name), "a row names it; put it there or remove the row"))

    paths = [str(images / name) for name in named if name in present]
    results = read_images(paths, workers=workers, name=folder.name)
    faults += [result for result in results if isinstance(result, Fault)]

    unnamed = [name for name in present if name not in named and name.split("/")[0] not in broken]
    for name, files in Counter(map(parent, unnamed)).items():
        if name not in rows_in:
            advice = f"no row names any of its {files} images; add the city's csv to Dataframes or remove it"
            faults.append(Fault("unnamed", str(images / name), advice))
    for name in unnamed:
        if parent(name) in rows_in:
            faults.append(Fault("unnamed", str(images / name), "no row names it; add its row or remove it"))
    return faults


def totals(folder: Path) -> tuple[int, list[str]]:
    """How many images there are to check, and a line for each split or city."""
    images, lines = 0, []
    if is_tree(folder):
        splits = find_splits(folder)
        images += sum(split.image_count for split in splits)
        lines += [str(split) for split in splits]
    if is_gsv_cities(folder):
        cities, _ = read_tables(folder)
        rows, places = sum(len(city.images) for city in cities), sum(city.places for city in cities)
        images += rows
        lines += [*map(str, cities), f"in all: {places} places, {rows} images"]
    return images, lines


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 1 if there is any fault.
    """
    parser = command_line()
    args = parser.parse(argv)
    if not args.threshold >= 0:
        parser.error(f"--threshold {args.threshold} is not a distance; give metres, 0 or more")
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers {args.workers} cannot read; give 1 or more")
    for folder in args.folders:
        if not is_tree(folder) and not is_gsv_cities(folder):
            parser.error(
                f"{folder} is neither an evaluation dataset (no images/<split>/database or queries in it, for a split "
                "of train, val, test) nor GSV-Cities (no Dataframes in it); name the folder that holds images, or the "
                "one that holds Dataframes and Images"
            )

    fault_count = image_count = 0
    for folder in args.folders:
        images, lines = totals(folder)
        for line in lines:
            print(f"{folder}, {line}")
        faults = check_tree(folder, threshold=args.threshold, workers=args.workers) if is_tree(folder) else []
        if is_gsv_cities(folder):
            faults += check_gsv_cities(folder, workers=args.workers)
        for fault in faults:
            print(fault)
        fault_count, image_count = fault_count + len(faults), image_count + images
    print(f"{fault_count or 'no'} fault{'s' if fault_count > 1 else ''} in {image_count} images")
    return 1 if fault_count else 0


if __name__ == "__main__":
    sys.exit(main())
