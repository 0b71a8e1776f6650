"""What is wrong with evaluation datasets, GSV-Cities and folders of photos, by the rules of the loaders themselves."""

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.system.command_line import printable
from utils.system.signals import mapped, process_pool

from .evaluation.tree import DatabaseQueries, database_folder
from .photos.exif import why_unreadable
from .photos.listing import IMAGE_SUFFIXES, PHOTO_SUFFIXES, UNREAD_PHOTOS, Listing, identity, scan
from .photos.positions import known, like_degrees, named_positions, photo_positions, several_zones
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
        return printable(f"{self.kind}: {self.path}: {self.message}")


def read_image(path: str) -> tuple[bytes | None, Fault | None]:
    """A digest of an image file, None if it does not decode to its last pixel; and its fault, or a note on its mode."""
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return None, Fault("zero-size", path, "the file is empty; replace or remove it")
            digest = hashlib.file_digest(file, "sha256").digest()
        _, how = open_noted(path)
    except (OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return None, Fault("unreadable", path, f"{why_unreadable(path, cause)}; replace or remove it")
    return digest, Fault("16-bit", path, how, note=True) if how else None


def content_faults(paths: Sequence[str], *, workers: int | None, name: str) -> tuple[list[str], list[Fault]]:
    """The photos that can be read; and in their order what is wrong with the others, repeats, and notes."""
    first: dict[bytes, str] = {}
    readable: list[str] = []
    faults: list[Fault] = []
    with mapped(process_pool(workers), read_image, paths, chunksize=IMAGES_PER_TASK) as results:
        shown = tqdm(results, total=len(paths), unit="image", desc=name, disable=not paths)
        for path, (digest, fault) in zip(paths, shown, strict=True):
            faults += [fault] if fault else []
            if digest is None:
                continue
            readable.append(path)
            if (original := first.setdefault(digest, path)) != path:
                faults.append(Fault("duplicate", path, f"the same picture as {original}; remove one of them"))
    return readable, faults


def images_below(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Listing:
    """What `scan` lists, or nothing if the folder is missing."""
    return scan(folder, suffixes) if folder.is_dir() else Listing([], Counter(), [])


def folder_faults(folder: Path, listing: Listing) -> list[Fault]:
    """Faults for a missing or empty folder and for photos that are not read; a note for other files."""
    faults = []
    if not folder.is_dir():
        faults.append(Fault("missing", str(folder), "no such folder, or a broken link; put the images there"))
    elif not listing.paths:
        faults.append(Fault("empty", str(folder), "no image in it; put the images there"))
    photos = Counter({suffix: n for suffix, n in listing.others.items() if suffix in PHOTO_SUFFIXES + UNREAD_PHOTOS})
    if photos:
        advice = f"{Listing([], photos, []).left_out} not read; convert them to JPEG or PNG, or remove them"
        faults.append(Fault("left-out", str(folder), advice))
    if rest := Listing([], listing.others - photos, listing.links).left_out:
        faults.append(Fault("left-out", str(folder), f"{rest} skipped", note=True))
    return faults


def zone_faults(folder: Path, paths: Sequence[str]) -> list[Fault]:
    """A note if the metres in the names of photos are not of one map."""
    if not (zones := several_zones(paths)):
        return []
    advice = f"names state {zones}: metres between them are wrong; evaluate each zone by itself"
    return [Fault("zones", str(folder), advice, note=True)]


def degree_faults(folder: Path, paths: Sequence[str]) -> list[Fault]:
    """A note if the positions in the names of a folder's photos seem to be degrees."""
    advice = "positions in the names look like degrees, but are read as metres; name photos by UTM metres"
    return [Fault("degrees", str(folder), advice, note=True)] if like_degrees(named_positions(paths)) else []


def is_tree(folder: Path) -> bool:
    """Whether the folder has `images/<split>/database`, `gallery`, `queries` or `queries_...` for any split."""
    return any(map(os.path.lexists, (part for split in SPLITS for part in parts_of(folder / "images" / split))))


def parts_of(split: Path) -> list[Path]:
    """The folders of a split, existing or not: the database and one or more query sets."""
    sets = sorted(path for path in split.glob("queries*") if path.is_dir() or path.is_symlink())
    return [database_folder(split), *(sets or [split / "queries"])]


def find_splits(folder: Path) -> dict[str, dict[Path, Listing]]:
    """The splits of an evaluation dataset, each with its folders as in `parts_of`; one folder under two names (as
    MSLS's test, a link to its val) is one split, called "val = test"."""
    same: dict[str, list[str]] = {}
    for name in SPLITS:
        path = folder / "images" / name
        if os.path.lexists(path):
            same.setdefault(os.path.realpath(path), []).append(name)
    return {
        " = ".join(names): {part: images_below(part) for part in parts_of(folder / "images" / names[0])}
        for names in same.values()
    }


def sides_of(split: dict[Path, Listing]) -> tuple[list[str], list[str]]:
    """Paths of the database images, and of all queries, each sorted within its folder."""
    database, *queries = (listing.paths for listing in split.values())
    return database, sum(queries, [])


def position_faults(sides: Sequence[list[str]], threshold: float) -> list[Fault]:
    """Names without coordinates, and queries with no database image within `threshold` metres (inclusive)."""
    positions = [named_positions(paths) for paths in sides]
    advice = "no finite UTM coordinates in the file name; name it @<UTM east>@<UTM north>@...@.jpg"
    faults = [
        Fault("name", path, advice)
        for paths, named in zip(sides, positions, strict=True)
        for path in compress(paths, ~known(named))
    ]
    if not all(known(named).any() for named in positions):
        return faults
    dataset = DatabaseQueries(
        name="",
        database_paths=sides[0],
        queries_paths=sides[1],
        database_positions=positions[0],
        queries_positions=positions[1],
    )
    advice = f"no database image within {threshold:g} m, so it is always a miss; add one or remove the query"
    queries = zip(sides[1], known(positions[1]), dataset.positives(threshold), strict=True)
    return faults + [Fault("no-positive", path, advice) for path, located, near in queries if located and not len(near)]


def check_tree(folder: Path, *, threshold: float = 25.0, workers: int | None = None) -> list[Fault]:
    """The faults of an evaluation dataset, split by split: folders, names, queries without a database image within
    `threshold` metres, content; each sorted by path, database first."""
    faults = []
    for name, split in find_splits(folder).items():
        sides = sides_of(split)
        for part, listing in split.items():
            faults += folder_faults(part, listing) + degree_faults(part, listing.paths)
        faults += zone_faults(folder / "images" / name.split(" ")[0], sum(sides, []))
        faults += position_faults(sides, threshold)
        faults += content_faults(sum(sides, []), workers=workers, name=f"{folder.name} {name}")[1]
    return faults


def is_gsv_cities(folder: Path) -> bool:
    """Whether the folder has `Dataframes`."""
    return (folder / "Dataframes").is_dir()


def read_tables(folder: Path) -> tuple[dict[Path, tuple[int, list[str]]], list[Fault]]:
    """The tables that parse and have rows, sorted by name, each with its number of places and each row's image below
    `Images`; and the faults of the others."""
    cities: dict[Path, tuple[int, list[str]]] = {}
    faults = []
    for path in tables(folder):
        try:
            places, images = read_city(folder, path.stem)
            if not len(images):
                raise ValueError("no row in it")
        except (OSError, ValueError, csv.Error) as error:
            what = str(error).removeprefix(str(path)).lstrip(", ")
            faults.append(Fault("table", str(path), f"{what}; repair it and check again: its images were left out"))
        else:
            cities[path] = len(np.unique(places)), [name.decode() for name in images]
    return cities, faults


def check_gsv_cities(folder: Path, *, workers: int | None = None) -> list[Fault]:
    """The faults of GSV-Cities: tables by name; repeated rows, missing images and unreadable ones in the order of the
    rows; images that no row names. A folder with all images missing, or that no row names, is one fault."""
    cities, faults = read_tables(folder)
    broken = {Path(fault.path).stem for fault in faults}
    if not cities and not faults:
        return [Fault("missing", str(folder / "Dataframes"), "no <City>.csv in it; download GSV-Cities' tables")]

    named: dict[str, None] = {}  # in the order of the rows
    for path, (_, names) in cities.items():
        for row, name in enumerate(names, 1):
            if name in named:
                again = f"row {row} below the header names {name} again; remove it"
                faults.append(Fault("repeated-row", str(path), again))
            named[name] = None

    images = folder / "Images"
    present = dict.fromkeys(path.removeprefix(f"{images}{os.sep}") for path in images_below(images).paths)

    def one_sided(kind: str, names: Sequence[str], others: dict[str, None], whole: str, single: str) -> list[Fault]:
        shared = set(map(os.path.dirname, others))
        counts = Counter(map(os.path.dirname, names))
        return [
            *(Fault(kind, str(images / f), whole.format(count)) for f, count in counts.items() if f not in shared),
            *(Fault(kind, str(images / name), single) for name in names if os.path.dirname(name) in shared),
        ]

    missing = [name for name in named if name not in present]
    advice = "no image in it, but {} rows name one there; put the images there"
    faults += one_sided("missing", missing, present, advice, "a row names it; put it there or remove the row")
    paths = [str(images / name) for name in named if name in present]
    _, content = content_faults(paths, workers=workers, name=folder.name)
    faults += [fault for fault in content if fault.kind != "duplicate"]  # of several places, perhaps
    unnamed = [name for name in present if name not in named and name.split("/")[0] not in broken]
    advice = "no row names any of its {} images; add the city's csv to Dataframes or remove it"
    return faults + one_sided("unnamed", unnamed, named, advice, "no row names it; add its row or remove it")


def is_photos(folder: Path) -> bool:
    """Whether the folder has files, and is neither the `images` of a dataset nor above datasets."""
    if not folder.is_dir() or (folder.name == "images" and is_tree(folder.parent)):
        return False
    if any(is_tree(below) or is_gsv_cities(below) for below in folder.iterdir() if below.is_dir()):
        return False
    listing = scan(folder, PHOTO_SUFFIXES)
    return bool(listing.paths or listing.others)


def check_photos(folders: Sequence[Path], *, workers: int | None = None) -> list[Fault]:
    """The faults of folders of plain photos, checked together, e.g. a database and queries: folder by folder, what is
    left out or also in an earlier folder; then `content_faults`; then photos without a position."""
    faults: list[Fault] = []
    first: dict[object, Path] = {}
    paths: dict[Path, list[str]] = {}
    for folder in folders:
        listing = images_below(folder, PHOTO_SUFFIXES)
        faults += folder_faults(folder, listing)
        owners = [first.setdefault(identity(path), folder) for path in listing.paths]
        paths[folder] = [path for path, owner in zip(listing.paths, owners, strict=True) if owner is folder]
        for earlier, count in Counter(owner for owner in owners if owner is not folder).items():
            advice = f"photos also in {earlier}: {count}; as queries they are left out of the database"
            faults.append(Fault("shared", str(folder), advice))
    name = " ".join(folder.name for folder in folders)
    readable, unreadable = content_faults(sum(paths.values(), []), workers=workers, name=name)
    return faults + unreadable + location_faults(paths, readable)


def location_faults(folders: dict[Path, list[str]], paths: list[str]) -> list[Fault]:
    """Those of `paths`, the readable photos of the folders, that have no position in names or EXIF data, whichever
    more have; the first says what to do about all."""
    if known(named_positions(paths)).all():
        degrees = [fault for folder, below in folders.items() for fault in degree_faults(folder, below)]
        return degrees + zone_faults(next(iter(folders)), paths)
    first = set(next(iter(folders.values())))  # the database, perhaps
    count = sum(path in first for path in paths)
    database, queries, _ = photo_positions(paths[:count], paths[count:])
    positions = np.concatenate((database, queries))
    if not known(positions).any():
        advice = "no photo has a position in its name or EXIF data; use --no_labels"
        return [Fault("no-position", str(folder), advice) for folder, below in folders.items() if below]
    lost = list(compress(paths, ~known(positions)))
    advice = "no position in its name or EXIF data, whichever more photos have"
    remedy = "; recall leaves such photos out; or name all photos @<UTM east>@<UTM north>@...@.jpg"
    return [Fault("no-position", path, advice + remedy * (path == lost[0])) for path in lost]


def totals(folder: Path) -> tuple[int, list[str]]:
    """The number of images to check, and a line for each split or city."""
    images, lines = 0, []
    for name, split in find_splits(folder).items() if is_tree(folder) else ():
        database, queries = map(len, sides_of(split))
        images += database + queries
        lines.append(f"{name}: {database} database, {queries} queries")
    if is_gsv_cities(folder):
        cities, _ = read_tables(folder)
        lines += [f"{path.stem}: {places} places, {len(names)} images" for path, (places, names) in cities.items()]
        rows = sum(len(names) for _, names in cities.values())
        lines.append(f"in all: {sum(places for places, _ in cities.values())} places, {rows} images")
        images += rows
    if not lines:
        images = len(images_below(folder, PHOTO_SUFFIXES).paths)
        lines.append(f"{images} photos")
    return images, lines


def check(folders: Sequence[Path], *, threshold: float, workers: int | None) -> int:
    """Checks folders, prints what it finds, and returns the number of faults; ValueError if one is of no known kind."""
    distinct: dict[str, Path] = {}
    again = [folder for folder in folders if distinct.setdefault(os.path.realpath(folder), folder) is not folder]
    folders = list(distinct.values())
    photos = [folder for folder in folders if not (is_tree(folder) or is_gsv_cities(folder))]
    if strange := [folder for folder in photos if not is_photos(folder)]:
        raise ValueError(
            f"{strange[0]} is neither an evaluation dataset (no images/<split>/database or queries in it) nor "
            "GSV-Cities (no Dataframes in it); name the folder that holds images, or Dataframes, or one of photos"
        )
    for folder in again:
        print(f"{folder}, the same folder as {distinct[os.path.realpath(folder)]}: checked once")
    fault_count = note_count = image_count = 0
    for folder in folders:
        images, lines = totals(folder)
        image_count += images
        print(*(f"{folder}, {line}" for line in lines), sep="\n")
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
    return fault_count
