"""Checks photos and tables before hours are spent on them; needs no model.

    python -m datasets.check data/toy_city data/gsv_cities
    python -m datasets.check known asked

A folder is one evaluation dataset (`images/<split>/{database,queries}`; `gallery` for database and several
`queries_...` are fine), GSV-Cities (`Dataframes` and `Images`), or plain photos. Each fault is one line on stdout,
`<kind>: <path>: <what and what to do>`; notes, such as an image of 16 bits, are lines of the same form. The exit status
is 0 without faults, 1 with any, and 2 for a folder that is none of these.
"""

from pathlib import Path

from utils.system.command_line import Parser
from utils.system.signals import left_on_signals, mapped, process_pool, quiet_ctrl_c


def command_line() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog="python -m datasets.check",
        usage="%(prog)s FOLDER [FOLDER ...] [--option value ...]; --help lists all options",
        description="Check photos and tables without a model.",
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="evaluation dataset, GSV-Cities, or plain photos"
    )
    parser.add_argument("--threshold", type=float, default=25.0, help="metres from a query to a positive (default: 25)")
    parser.add_argument("--workers", type=int, help="processes that read photos (default: one per core)")
    return parser


if __name__ == "__main__":
    command_line().parse()  # before the slow imports, so that an error is reported at once
    quiet_ctrl_c()

import csv
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial

import numpy as np
from tqdm import tqdm

from .evaluation.database_queries import DatabaseQueries, database_folder, like_degrees, utm_positions
from .photos.exif import gps_position
from .photos.listing import IMAGE_SUFFIXES, PHOTO_SUFFIXES, UNREAD_PHOTOS, Listing, identity, scan
from .photos.pixel_modes import Depth
from .photos.transforms import open_noted
from .training.gsv_cities import read_city, tables

SPLITS = ("train", "val", "test")
IMAGES_PER_TASK = 16


@dataclass(frozen=True)
class Fault:
    """What is wrong with one file or folder, and what to do about it; or a note for information only."""

    kind: str
    path: str
    message: str
    note: bool = False

    def __str__(self) -> str:
        line = f"{self.kind}: {self.path}: {self.message}"
        # A file name may contain a line break, or bytes that are not text.
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


@dataclass(frozen=True)
class Photo:
    """A file that decodes to its last pixel.

    Attributes:
        digest: digest of the file.
        note: how it was converted to 8 bits per channel; None if it is stored so.
        located: whether its EXIF data says where it was taken; None if not read.
    """

    digest: bytes
    note: Fault | None
    located: bool | None


def read_image(path: str, *, exif: bool = False) -> Photo | Fault:
    """Reads an image file, with `exif` also its position; returns its content or its fault."""
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return Fault("zero-size", path, "the file is empty; replace or remove it")
            digest = hashlib.file_digest(file, "sha256").digest()
        _, depth, how = open_noted(path)
        located = not np.isnan(gps_position(path)[0]) if exif else None
    except FileNotFoundError:
        return Fault("unreadable", path, "a link to a missing file; restore that file or remove the link")
    except OSError as error:
        return Fault("unreadable", path, f"{error.strerror}; repair, replace or remove it")
    except Exception as error:  # any decoder failure: one bad file must not end the check of the others
        return Fault("unreadable", path, f"{error.__cause__ or error}; replace or remove it")
    note = None
    if depth is not Depth.STORED:
        note = Fault("16-bit" if depth is Depth.SIXTEEN else "guessed", path, how, note=True)
    return Photo(digest, note, located)


def read_images(paths: Sequence[str], *, workers: int | None, name: str, exif: bool = False) -> list[Photo | Fault]:
    """`read_image` of each path, in that order.

    Args:
        workers: processes that read photos; None uses one per core.
        name: name of the progress bar.
    """
    pool = process_pool(workers)
    with mapped(pool, partial(read_image, exif=exif), paths, chunksize=IMAGES_PER_TASK) as results:
        return list(tqdm(results, total=len(paths), unit="image", desc=name, disable=not paths))


def images_below(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Listing:
    """Like `scan`, but an empty listing if the folder is missing."""
    return scan(folder, suffixes) if folder.is_dir() else Listing([], Counter(), [])


def left_out_faults(folder: Path, listing: Listing) -> list[Fault]:
    """A fault for photos that are not read, and a note for other files."""
    photos = Counter({suffix: n for suffix, n in listing.others.items() if suffix in PHOTO_SUFFIXES + UNREAD_PHOTOS})
    faults = []
    if photos:
        advice = f"{Listing([], photos, []).left_out} not read; convert them to JPEG or PNG, or remove them"
        faults.append(Fault("left-out", str(folder), advice))
    if rest := Listing([], listing.others - photos, listing.links).left_out:
        faults.append(Fault("left-out", str(folder), f"{rest} skipped", note=True))
    return faults


def has_position(path: str) -> bool:
    """Whether the file name has finite UTM coordinates."""
    try:
        utm_positions([path])
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Split:
    """The images of one split, with any names and content.

    Attributes:
        names: name of the split, and of later ones that link to the same folder (as MSLS's test to its val).
        listings: listings by folder; the database first, then one or more query sets.
    """

    names: list[str]
    listings: dict[Path, Listing]

    @property
    def database(self) -> list[str]:
        """Sorted paths."""
        return next(iter(self.listings.values())).paths

    @property
    def queries(self) -> list[str]:
        """Likewise."""
        _, *queries = self.listings.values()
        return [path for listing in queries for path in listing.paths]

    @property
    def image_count(self) -> int:
        """Number of images in database and queries."""
        return len(self.database) + len(self.queries)

    def __str__(self) -> str:
        return f"{' = '.join(self.names)}: {len(self.database)} database, {len(self.queries)} queries"


def is_tree(folder: Path) -> bool:
    """Whether the folder has `images/<split>/database`, `gallery`, `queries` or `queries_...` for any split."""
    return any(map(os.path.lexists, (part for split in SPLITS for part in parts_of(folder / "images" / split))))


def parts_of(split: Path) -> list[Path]:
    """The folders of a split, existing or not: the database and one or more query sets."""
    sets = sorted(path for path in split.glob("queries*") if path.is_dir() or path.is_symlink())
    return [database_folder(split), *(sets or [split / "queries"])]


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
        splits.append(Split(names, {part: images_below(part) for part in parts_of(path)}))
    return splits


def folder_faults(split: Split) -> list[Fault]:
    """Faults for a missing or empty `database` or `queries`, and for files that are left out."""
    faults = []
    for path, listing in split.listings.items():
        paths = listing.paths
        if not path.is_dir():
            faults.append(Fault("missing", str(path), "no such folder, or a broken link; put the images there"))
        elif not paths:
            faults.append(Fault("empty", str(path), "no image in it; put the images there"))
        faults += left_out_faults(path, listing)
    return faults


def degree_faults(folder: Path, paths: Sequence[str]) -> list[Fault]:
    """A note for names that seem to hold degrees."""
    if not like_degrees(utm_positions(paths)):
        return []
    advice = "positions in the names look like degrees, but are read as metres; name photos by UTM metres"
    return [Fault("degrees", str(folder), advice, note=True)]


def position_faults(split: Split, threshold: float) -> list[Fault]:
    """Names without coordinates, and queries with no database image within `threshold` metres (inclusive)."""
    nowhere = {path for path in split.database + split.queries if not has_position(path)}
    advice = "no finite UTM coordinates in the file name; name it @<UTM east>@<UTM north>@...@.jpg"
    faults = [Fault("name", path, advice) for path in split.database + split.queries if path in nowhere]
    database = [path for path in split.database if path not in nowhere]
    queries = [path for path in split.queries if path not in nowhere]
    for folder, listing in split.listings.items():
        faults += degree_faults(folder, [path for path in listing.paths if path not in nowhere])
    if not database or not queries:
        return faults
    located = DatabaseQueries(
        name=str(split),
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
    return result_faults(paths, read_images(paths, workers=workers, name=name))


def result_faults(paths: Sequence[str], results: Sequence[Photo | Fault], apart: Set[str] = frozenset()) -> list[Fault]:
    """Faults of what `read_images` returned, files that repeat an earlier one, and notes.

    Paths in `apart` are only compared with each other.
    """
    faults = []
    first: dict[tuple[bytes, bool], str] = {}
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, Fault):
            faults.append(result)
            continue
        if result.note:
            faults.append(result.note)
        if (original := first.setdefault((result.digest, path in apart), path)) != path:
            faults.append(Fault("duplicate", path, f"the same picture as {original}; remove one of them"))
    return faults


def check_tree(folder: Path, *, threshold: float = 25.0, workers: int | None = None) -> list[Fault]:
    """The faults of an evaluation dataset.

    Args:
        folder: folder with `images/<split>/{database,queries}`.
        threshold: metres within which a query needs a database image.
        workers: processes that read photos; None uses one per core.

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
    """The tables that parse and have rows, and the faults of the others, sorted by name."""
    cities, faults = [], []
    for path in tables(folder):
        try:
            places, images = read_city(folder, path.stem)
            if not len(images):
                raise ValueError("no row in it")
        except (OSError, ValueError, csv.Error) as error:
            what = str(error).removeprefix(str(path)).lstrip(", ")
            faults.append(Fault("table", str(path), f"{what}; repair it and check again: its images were left out"))
        else:
            cities.append(City(path.stem, len(np.unique(places)), [name.decode() for name in images]))
    return cities, faults


def parent(name: str) -> str:
    """The folder of an image below `Images`."""
    return name.rpartition("/")[0]


def check_gsv_cities(folder: Path, *, workers: int | None = None) -> list[Fault]:
    """The faults of GSV-Cities.

    Args:
        folder: folder with `Dataframes` and `Images`.
        workers: processes that read photos; None uses one per core.

    Returns:
        Tables by name; repeated rows, missing images and unreadable ones in the order of the rows; images that no row
        names, sorted. A folder with all images missing, or that no row names, is one fault.
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
                advice = f"row {row} below the header names {name} again; remove it"
                faults.append(Fault("repeated-row", str(folder / "Dataframes" / f"{city.name}.csv"), advice))
            named[name] = None

    images = folder / "Images"
    present = dict.fromkeys(path.removeprefix(f"{images}{os.sep}") for path in images_below(images).paths)
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
    faults += [fault for result in results if (fault := result if isinstance(result, Fault) else result.note)]

    unnamed = [name for name in present if name not in named and name.split("/")[0] not in broken]
    for name, files in Counter(map(parent, unnamed)).items():
        if name not in rows_in:
            advice = f"no row names any of its {files} images; add the city's csv to Dataframes or remove it"
            faults.append(Fault("unnamed", str(images / name), advice))
    for name in unnamed:
        if parent(name) in rows_in:
            faults.append(Fault("unnamed", str(images / name), "no row names it; add its row or remove it"))
    return faults


def is_photos(folder: Path) -> bool:
    """Whether the folder has files, and is neither the `images` of a dataset nor above datasets."""
    if not folder.is_dir() or (folder.name == "images" and is_tree(folder.parent)):
        return False
    if any(is_tree(below) or is_gsv_cities(below) for below in folder.iterdir() if below.is_dir()):
        return False
    listing = scan(folder, PHOTO_SUFFIXES)
    return bool(listing.paths or listing.others)


def check_photos(folders: Sequence[Path], *, workers: int | None = None) -> list[Fault]:
    """The faults of folders of plain photos, checked together, e.g. a database and queries.

    Returns:
        Folder by folder, what is left out or also in an earlier folder; then photos that cannot be read, repeat an
        earlier one, or have 16 bits or a guessed mode; then photos without a position. If one folder lies in another,
        copies in it of photos outside it are counted with the photos in both.
    """
    listings = [images_below(folder, PHOTO_SUFFIXES) for folder in folders]
    paths = []
    first: dict[object, tuple[Path, str]] = {}
    shared: dict[tuple[Path, Path], list[str]] = {}
    for folder, listing in zip(folders, listings, strict=True):
        for path in listing.paths:
            earlier, there = first.setdefault(identity(path), (folder, path))
            if earlier is folder:
                paths.append(path)
            else:
                shared.setdefault((folder, earlier), []).append(there)
    results = read_images(paths, workers=workers, name=" ".join(folder.name for folder in folders), exif=True)
    digests = {path: result.digest for path, result in zip(paths, results, strict=True) if isinstance(result, Photo)}
    roots = [os.path.join(os.path.realpath(folder), "") for folder in folders]
    # By folder: a link to a photo outside counts as inside.
    nested = {
        path for path in paths if sum(map(os.path.join(os.path.realpath(parent(path)), "").startswith, roots)) > 1
    }
    outside = {digest for path, digest in digests.items() if path not in nested}

    faults = []
    for folder, listing in zip(folders, listings, strict=True):
        if not listing.paths:
            faults.append(Fault("empty", str(folder), "no photo in it; put the photos there"))
        faults += left_out_faults(folder, listing)
        for (later, earlier), photos in shared.items():
            if later is folder:
                copies = sum(path in nested and digests.get(path) in outside for path in photos)
                of_them = f" ({copies} the same picture as one outside)" if copies else ""
                advice = f"photos also in {earlier}: {len(photos)}{of_them}; as queries they are left out of "
                faults.append(Fault("shared", str(folder), f"{advice}the database"))
    return faults + result_faults(paths, results, nested) + location_faults(folders, paths, results)


def location_faults(folders: Sequence[Path], paths: Sequence[str], results: Sequence[Photo | Fault]) -> list[Fault]:
    """Photos without a position in all names, or else in EXIF data; the first says what to do about all."""
    if all(map(has_position, paths)):
        return [fault for folder in folders for fault in degree_faults(folder, _below(folder, paths))]
    readable = {path: result for path, result in zip(paths, results, strict=True) if isinstance(result, Photo)}
    named = any(map(has_position, paths))
    if not any(photo.located for photo in readable.values()):
        lost = (
            "not all have one in their names, none in EXIF data" if named else "neither EXIF nor a file name gives one"
        )
        advice = f"no photo has a position: {lost}; use --no_labels"
        return [Fault("no-position", str(folder), advice) for folder in folders if _below(folder, paths)]
    lost = (
        "no GPS position in its EXIF data, and not all names have UTM coordinates"
        if named
        else "neither EXIF nor the file name gives a position"
    )
    nowhere = [path for path, photo in readable.items() if not photo.located]
    remedy = (
        "; leave out such photos, search with --labels_where_known or --no_labels, or name all photos "
        "@<UTM east>@<UTM north>@...@.jpg"
    )
    # The remedy once: it is the same for all of them.
    return [Fault("no-position", path, lost + remedy * (path == nowhere[0])) for path in nowhere]


def _below(folder: Path, paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path.startswith(os.path.join(folder, ""))]


def totals(folder: Path) -> tuple[int, list[str]]:
    """The number of images to check, and a line for each split or city."""
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
    if not lines:
        images = len(images_below(folder, PHOTO_SUFFIXES).paths)
        lines.append(f"{images} photos")
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
        parser.error(f"--workers {args.workers} is too few; give 1 or more")
    try:
        with left_on_signals():
            return check(parser, args.folders, threshold=args.threshold, workers=args.workers)
    except OSError as error:
        parser.error(f"{error}; make the folder readable")


def check(parser: Parser, folders: Sequence[Path], *, threshold: float, workers: int | None) -> int:
    """Checks folders and prints what it finds; the parser reports a folder of no known kind."""
    distinct: dict[str, Path] = {}
    again = [folder for folder in folders if distinct.setdefault(os.path.realpath(folder), folder) is not folder]
    folders = list(distinct.values())
    photos = []
    for folder in folders:
        if is_tree(folder) or is_gsv_cities(folder):
            continue
        if not is_photos(folder):
            parser.error(
                f"{folder} is neither an evaluation dataset (no images/<split>/database or queries in it, for a split "
                "train, val or test) nor GSV-Cities (no Dataframes in it); name the folder that holds images, the "
                "one that holds Dataframes and Images, or one of photos"
            )
        photos.append(folder)

    for folder in again:
        print(f"{folder}, the same folder as {distinct[os.path.realpath(folder)]}: checked once")
    fault_count = note_count = image_count = 0
    for folder in folders:
        images, lines = totals(folder)
        image_count += images
        for line in lines:
            print(f"{folder}, {line}")
        faults = check_tree(folder, threshold=threshold, workers=workers) if is_tree(folder) else []
        if is_gsv_cities(folder):
            faults += check_gsv_cities(folder, workers=workers)
        if photos and folder == photos[-1]:  # all are known now
            faults += check_photos(photos, workers=workers)
        for fault in faults:
            print(fault)
        note_count += sum(fault.note for fault in faults)
        fault_count += sum(not fault.note for fault in faults)
    notes = f", {note_count} note{'s' if note_count > 1 else ''}" if note_count else ""
    print(f"{fault_count or 'no'} fault{'s' if fault_count > 1 else ''} in {image_count} images{notes}")
    return 1 if fault_count else 0


if __name__ == "__main__":
    sys.exit(main())
