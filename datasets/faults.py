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

from .evaluation.positives import Near
from .evaluation.tree import database_folder
from .photos.exif import why_unreadable
from .photos.listing import IMAGE_SUFFIXES, PHOTO_SUFFIXES, UNREAD_PHOTOS, Listing, identity, scan
from .photos.positions import known, like_degrees, named_positions, photo_positions, several_zones
from .photos.transforms import open_noted
from .training.gsv_cities import read_city, tables

SPLITS = ("train", "val", "test")


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
    with mapped(process_pool(workers), read_image, paths, chunksize=16) as results:
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


def name_notes(folder: Path, parts: dict[Path, list[str]]) -> list[Fault]:
    """Notes if the positions in the names of a part's photos seem to be degrees, and if the metres in the names of all
    that is below the folder are not of one map."""
    advice = "positions in the names look like degrees, but are read as metres; name photos by UTM metres"
    degrees = [part for part, paths in parts.items() if like_degrees(named_positions(paths))]
    notes = [Fault("degrees", str(part), advice, note=True) for part in degrees]
    if zones := several_zones(sum(parts.values(), [])):
        advice = f"names state {zones}: metres between them are wrong; evaluate each zone by itself"
        notes.append(Fault("zones", str(folder), advice, note=True))
    return notes


def is_tree(folder: Path) -> bool:
    """Whether the folder has `images/<split>/database`, `gallery`, `queries` or `queries_...` for any split."""
    return any(map(os.path.lexists, (part for split in SPLITS for part in parts_of(folder / "images" / split))))


def is_gsv_cities(folder: Path) -> bool:
    """Whether the folder has `Dataframes`."""
    return (folder / "Dataframes").is_dir()


def parts_of(split: Path) -> list[Path]:
    """The folders of a split, existing or not: the database and one or more query sets."""
    sets = sorted(path for path in split.glob("queries*") if path.is_dir() or path.is_symlink())
    return [database_folder(split), *(sets or [split / "queries"])]


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
    advice = f"no database image within {threshold:g} m, so it is always a miss; add one or remove the query"
    near = Near(positions[0], positions[1], geographic=False, distance=threshold)
    queries = zip(sides[1], known(positions[1]), near, strict=True)
    return faults + [Fault("no-positive", path, advice) for path, located, near in queries if located and not len(near)]


def check_tree(folder: Path, *, threshold: float, workers: int | None) -> tuple[int, list[Fault]]:
    """Prints how many images an evaluation dataset has, and returns the number of all and the faults, split by split:
    folders, names, queries without a database image within `threshold` metres, content; each sorted by path, database
    first. One folder under two names (as MSLS's test, a link to its val) is one split, "val = test"."""
    count, faults = 0, list[Fault]()
    same: dict[str, list[Path]] = {}
    for split in (folder / "images" / name for name in SPLITS):
        if os.path.lexists(split):
            same.setdefault(os.path.realpath(split), []).append(split)
    for split, *links in same.values():
        name = " = ".join(path.name for path in (split, *links))
        listings = {part: images_below(part) for part in parts_of(split)}
        parts = {part: listing.paths for part, listing in listings.items()}
        database, *others = parts.values()
        queries = sum(others, [])
        print(f"{folder}, {name}: {len(database)} database, {len(queries)} queries")
        count += len(database) + len(queries)
        for part, listing in listings.items():
            faults += folder_faults(part, listing)
        faults += name_notes(split, parts)
        faults += position_faults((database, queries), threshold)
        faults += content_faults(database + queries, workers=workers, name=f"{folder.name} {name}")[1]
    return count, faults


def check_gsv_cities(folder: Path, *, workers: int | None) -> tuple[int, list[Fault]]:
    """Prints what GSV-Cities' tables have, and returns the number of their rows and the faults: tables by name, rows
    that repeat others; missing images and unreadable ones in the order of the rows; images that no row names. A folder
    with all images missing, or that no row names, is one fault."""
    faults, broken = list[Fault](), set[str]()
    named: dict[str, None] = {}  # the images below `Images`, in the order of the rows
    row_count = place_count = 0
    for path in tables(folder):
        try:
            places, names = read_city(folder, path.stem)
            if not len(names):
                raise ValueError("no row in it")
        except (OSError, ValueError, csv.Error) as error:
            what = str(error).removeprefix(str(path)).lstrip(", ")
            faults.append(Fault("table", str(path), f"{what}; repair it and check again: its images were left out"))
            broken.add(path.stem)
            continue
        print(f"{folder}, {path.stem}: {len(np.unique(places))} places, {len(names)} images")
        row_count += len(names)
        place_count += len(np.unique(places))
        for row, name in enumerate(map(bytes.decode, names.tolist()), 1):
            if name in named:
                again = f"row {row} below the header names {name} again; remove it"
                faults.append(Fault("repeated-row", str(path), again))
            named[name] = None
    if not named and not faults:
        return 0, [Fault("missing", str(folder / "Dataframes"), "no <City>.csv in it; download GSV-Cities' tables")]
    print(f"{folder}, in all: {place_count} places, {row_count} images")

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
    return row_count, faults + one_sided("unnamed", unnamed, named, advice, "no row names it; add its row or remove it")


def is_photos(folder: Path) -> bool:
    """Whether the folder has files, and is neither the `images` of a dataset nor above datasets."""
    if not folder.is_dir() or (folder.name == "images" and is_tree(folder.parent)):
        return False
    if any(is_tree(below) or is_gsv_cities(below) for below in folder.iterdir() if below.is_dir()):
        return False
    listing = scan(folder, PHOTO_SUFFIXES)
    return bool(listing.paths or listing.others)


def check_photos(folders: Sequence[Path], *, workers: int | None) -> tuple[int, list[Fault]]:
    """Prints how many photos plain folders have, which are checked together, e.g. a database and queries, and returns
    the number of all and the faults: folder by folder, what is left out or also in an earlier folder; then
    `content_faults`; then photos without a position."""
    count, faults = 0, list[Fault]()
    first: dict[object, Path] = {}
    paths: dict[Path, list[str]] = {}
    for folder in folders:
        listing = images_below(folder, PHOTO_SUFFIXES)
        print(f"{folder}, {len(listing.paths)} photos")
        count += len(listing.paths)
        faults += folder_faults(folder, listing)
        owners = [first.setdefault(identity(path), folder) for path in listing.paths]
        paths[folder] = [path for path, owner in zip(listing.paths, owners, strict=True) if owner is folder]
        for earlier, number in Counter(owner for owner in owners if owner is not folder).items():
            advice = f"photos also in {earlier}: {number}; as queries they are left out of the database"
            faults.append(Fault("shared", str(folder), advice))
    name = " ".join(folder.name for folder in folders)
    readable, unreadable = content_faults(sum(paths.values(), []), workers=workers, name=name)
    return count, faults + unreadable + location_faults(paths, readable)


def location_faults(folders: dict[Path, list[str]], paths: list[str]) -> list[Fault]:
    """Those of `paths`, the readable photos of the folders, that have no position in names or EXIF data, whichever
    more have; the first says what to do about all."""
    if known(named_positions(paths)).all():
        return name_notes(next(iter(folders)), folders)
    count = len(set(paths) & set(next(iter(folders.values()))))  # of the database, perhaps
    positions = np.concatenate(photo_positions(paths[:count], paths[count:])[:2])
    if not known(positions).any():
        advice = "no photo has a position in its name or EXIF data; use --no_labels"
        return [Fault("no-position", str(folder), advice) for folder, below in folders.items() if below]
    lost = list(compress(paths, ~known(positions)))
    advice = "no position in its name or EXIF data, whichever more photos have"
    remedy = "; recall leaves such photos out; or name all photos @<UTM east>@<UTM north>@...@.jpg"
    return [Fault("no-position", path, advice + remedy * (path == lost[0])) for path in lost]


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
    totals: Counter[str] = Counter()

    def report(images: int, faults: list[Fault]) -> None:
        for fault in faults:
            print(fault)
            totals["notes" if fault.note else "faults"] += 1
        totals["images"] += images

    for folder in folders:
        if is_tree(folder):
            report(*check_tree(folder, threshold=threshold, workers=workers))
        if is_gsv_cities(folder):
            report(*check_gsv_cities(folder, workers=workers))
    if photos:
        report(*check_photos(photos, workers=workers))
    faults, notes = totals["faults"], totals["notes"]
    end = f", {notes} note{'s' * (notes > 1)}" if notes else ""
    print(f"{faults or 'no'} fault{'s' * (faults > 1)} in {totals['images']} images{end}")
    return faults
