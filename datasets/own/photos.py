"""Your photos, with positions and more from file names, EXIF data or a csv."""

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags
from tqdm import tqdm

from utils.system.files import read_text
from utils.system.signals import mapped

from ..photos.exif import gps_position, opened, orientation
from ..photos.listing import PHOTO_SUFFIXES, identity, scan
from ..photos.positions import known, like_degrees, named_positions, several_zones
from ..photos.transforms import read_reduced
from .utm import to_utm

SPLITS = ("train", "val", "test")
LARGEST = 2e7  # metres; no map reaches farther
METRES, DEGREES, LABELS = "metres", "degrees", "labels"
COLUMNS = {METRES: ("east", "north"), DEGREES: ("lat", "lon"), LABELS: ("label",)}  # of a csv, by what it gives
WANTED = "a csv starts with the columns path, and east,north or lat,lon or label; heading, time and label may follow"


@dataclass
class Photo:
    """A photo, and what its source says of it."""

    path: str
    position: tuple[float, float] = (np.nan, np.nan)  # east and north, or latitude and longitude: as in its source
    degrees: tuple[float, float] = (np.nan, np.nan)  # latitude and longitude, of -180 to 180 once collected
    heading: float = np.nan  # degrees from north, clockwise
    time: datetime | None = None
    label: str | None = None  # of its place; None if positions define places
    turn: int = 1  # see `exif.orientation_of`


@dataclass
class Collection:
    """Usable photos, and those that were dropped."""

    photos: list[Photo]  # in the order of the sources, and of names within a folder
    metres: NDArray[np.float64]  # east and north, N x 2; made up, with places 1 km apart, if there are only labels
    kind: str  # how positions were given: METRES, DEGREES or LABELS
    dropped: dict[str, list[str]]  # paths by reason
    notes: list[str]  # lines about anything else to know


def parse_time(text: str) -> datetime:
    """Parses a time of EXIF data, ISO 8601, dataset file names (201405), or (milli-, micro-, nano-)seconds since 1970;
    the result is in UTC, or without a zone if the text has none."""
    if month := re.fullmatch(r"(\d{4})(?:-?(\d\d))?", text):
        return datetime(int(month[1]), int(month[2] or 1), 1)
    iso = re.sub(r"^(\d{4}):(\d\d):(\d\d)", r"\1-\2-\3", re.sub(r"^(\d{8})(\d{6})$", r"\1T\2", text))
    with suppress(ValueError):
        time = datetime.fromisoformat(iso)
        return time if time.tzinfo is None else time.astimezone(UTC)
    seconds = int(text) / 10 ** (len(text) - 10) if text.isdecimal() and len(text) in (13, 16, 19) else float(text)
    if not 10**8 <= seconds < 2**33:  # a smaller number is something else
        raise ValueError(f"{text} is not a time")
    return datetime.fromtimestamp(seconds, UTC)


def read_exif(photo: Photo) -> None:
    """Fills in what a photo's EXIF data has of position, heading and time."""
    photo.position = photo.degrees = gps_position(photo.path)
    with opened(photo.path) as image:
        with suppress(Exception):  # Pillow's errors on tags that are not as the standard says
            photo.heading = float(image.getexif().get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSImgDirection])
        with suppress(Exception):
            taken = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal]
            photo.time = parse_time(str(taken).strip("\0 "))


def read_folder(folder: Path, notes: list[str]) -> tuple[str, list[Photo]]:
    """The photos below a folder, with what their names say, @east@north@zone@letter@lat@lon@...; if these have no
    position, EXIF data are read later.

    In an evaluation dataset with a train split, only that counts: the others are for evaluation.
    """
    splits = [split for split in SPLITS if (folder / "images" / split).is_dir()]
    if "train" in splits and len(splits) > 1:
        notes.append(f"{folder}: only its train split is converted; {' and '.join(splits[1:])} are for evaluation")
        folder = folder / "images" / "train"
    elif splits and splits != ["train"]:
        notes.append(f"{folder} has no train split: do not evaluate models trained on it on its {' and '.join(splits)}")
    listing = scan(folder, PHOTO_SUFFIXES)
    if listing.left_out:
        notes.append(f"{folder}: left out {listing.left_out}; convert other formats (HEIC) to JPEG")
    if not listing.paths:
        raise ValueError(f"no photo in {folder}; put photos there, other formats (HEIC) converted to JPEG")
    named, photos = named_positions(listing.paths), [Photo(path) for path in listing.paths]
    if not known(named).any():
        return DEGREES, photos
    if unnamed := list(compress(listing.paths, ~known(named))):
        raise ValueError(
            f"{folder}: only {len(named) - len(unnamed)} of {len(named)} names have UTM coordinates "
            f"(@<east>@<north>@...), unlike e.g. {unnamed[0]}; convert the two kinds separately, or list all in a csv"
        )
    for photo, position, degrees in zip(photos, named, named_positions(listing.paths, field=5), strict=True):
        photo.position, photo.degrees = (position[0], position[1]), (degrees[0], degrees[1])
        fields = os.path.basename(photo.path).split("@")
        with suppress(ValueError, IndexError):
            photo.heading = float(fields[9])
        with suppress(ValueError, IndexError):
            photo.time = parse_time(fields[13])
    return METRES, photos


def read_csv(path: Path, notes: list[str]) -> tuple[str, list[Photo]]:
    """The photos that a csv names; paths are relative to the csv's folder unless absolute."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; {WANTED}") from error
    if len(rows) < 2:
        raise ValueError(f"{path} has no row; {WANTED}")
    header = [name.lower() for name in rows[0][1]]
    kinds = [kind for kind, columns in COLUMNS.items() if {"path", *columns} <= {*header}]
    if not kinds:
        raise ValueError(f"{path}, line 1: {','.join(header)[:80]!r}: {WANTED}, separated by commas")
    if kinds[:2] == [METRES, DEGREES] or len(set(header)) < len(header):
        raise ValueError(f"{path}, line 1: both east,north and lat,lon, or a column twice; keep the columns to use")
    if ignored := [name for name in header if name not in {"path", "heading", "time"}.union(*COLUMNS.values())]:
        notes.append(f"{path}: columns ignored: {', '.join(ignored)}")
    kind, photos = kinds[0], []
    pair = () if kind == LABELS else COLUMNS[kind]
    for line, row in rows[1:]:
        where = f"{path}, line {line}"
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} fields for {len(header)} columns; quote fields that hold a comma")
        cells = dict(zip(header, row, strict=True))
        values = {}
        for name in ("heading", *pair):
            try:
                values[name] = float(cells.get(name) or np.nan)
            except ValueError as error:
                raise ValueError(f"{where}: {name} {cells[name]!r} is not a number; correct or empty it") from error
        photo = Photo(os.path.join(path.parent, cells["path"]), heading=values["heading"], label=cells.get("label"))
        if pair:
            photo.position = values[pair[0]], values[pair[1]]
        if kind == DEGREES:
            photo.degrees = photo.position
        if abs(photo.heading) > 360:
            raise ValueError(f"{where}: heading {cells['heading']} is out of range; give degrees from north, 0 to 360")
        try:
            photo.time = parse_time(cells["time"]) if cells.get("time") else None
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{where}: time {cells['time']!r} is not understood; write 2024-05-31T12:00:00") from error
        photos.append(photo)
    return kind, photos


def collect(sources: Sequence[Path], notes: list[str]) -> Collection:
    """The photos of all sources, folders and csv files, under a progress bar; ValueError if they cannot be used.

    `notes` becomes the collection's, so that what was noted is known after an error too.
    """
    dropped: dict[str, list[str]] = defaultdict(list)
    kinds: dict[str, Path] = {}
    photos: dict[object, Photo] = {}
    in_folders: list[str] = []
    for source in sources:
        if source.is_dir():
            kind, listed = read_folder(source, notes)
            in_folders += [photo.path for photo in listed]
        elif source.suffix.lower() == ".csv" and source.is_file():
            kind, listed = read_csv(source, notes)
        else:
            raise ValueError(f"{source} is neither a folder nor an existing .csv file; name folders or csv files")
        kinds.setdefault(kind, source)
        for photo in listed:
            if photos.setdefault(identity(photo.path), photo) is not photo:
                dropped["the same file as another photo"].append(photo.path)
    if len(kinds) > 1:
        given = ", ".join(f"{source} has {kind}" for kind, source in kinds.items())
        raise ValueError(f"{given}, which cannot be combined; convert them one at a time")
    if kind == METRES and (zones := several_zones(in_folders)):
        raise ValueError(f"names state {zones}, which are not on one map; convert each apart")
    by_exif = set(in_folders) if kind == DEGREES else set()

    def why_dropped(photo: Photo) -> str | None:
        """Why a photo cannot be used, or None, with what its file says filled in."""
        if not os.path.isfile(photo.path):  # reading a pipe would block
            return "a link to a file that is not there" if os.path.islink(photo.path) else "there is no such file"
        try:
            read_reduced(photo.path, 64)
            if photo.path in by_exif:
                read_exif(photo)
            photo.turn = orientation(photo.path)
        except Exception:  # decoders fail on damaged files in many ways
            return "cannot be read"
        if photo.label == "":
            return "no label"
        if kind != LABELS and (np.isnan(photo.position).any() or (kind == DEGREES and photo.position == (0.0, 0.0))):
            return "no GPS position in EXIF data" if photo.path in by_exif else "no position"
        return None

    kept = []
    with mapped(ThreadPoolExecutor(os.cpu_count()), why_dropped, list(photos.values())) as reasons:
        for photo, reason in zip(photos.values(), tqdm(reasons, total=len(photos), unit="photo"), strict=True):
            if reason:
                dropped[reason].append(photo.path)
            else:
                kept.append(photo)
    if not kept:
        counts = ", ".join(f"{len(paths)} {reason}" for reason, paths in dropped.items())
        raise ValueError(f"no photo of {len(photos)} can be used ({counts}); repair them, or give positions in a csv")
    times = [photo.time for photo in kept if photo.time]
    if 0 < (zoned := sum(time.tzinfo is not None for time in times)) < len(times):
        notes.append(f"{zoned} of {len(times)} times have a zone, the others none: they are taken for UTC")
    for photo in kept:
        photo.time = photo.time and photo.time.replace(tzinfo=None)
        latitude, longitude = photo.degrees
        photo.degrees = latitude, longitude - 360 if 180 < longitude <= 360 else longitude
    return Collection(kept, _metres(kept, kind), kind, dict(dropped), notes)


def _metres(photos: Sequence[Photo], kind: str) -> NDArray[np.float64]:
    """East and north of each photo, N x 2; ValueError if positions cannot be of the given kind."""
    if kind == LABELS:
        _, places = np.unique([photo.label or "" for photo in photos], return_inverse=True)
        return np.stack((places * 1000.0, np.zeros(len(photos))), axis=1)
    positions = np.array([photo.degrees if kind == DEGREES else photo.position for photo in photos])

    def at(index: int) -> str:
        return f"{positions[index, 0]:g}, {positions[index, 1]:g} of {photos[index].path}"

    if kind == DEGREES:
        if (outside := (np.abs(positions) > (90, 180)).any(axis=1)).any():
            where = at(int(outside.argmax()))
            raise ValueError(f"lat,lon {where} is out of range; give lat,lon in this order, metres as east,north")
        try:
            return to_utm(positions)
        except ValueError as error:
            farthest = int(np.abs(positions - np.median(positions, axis=0)).max(axis=1).argmax())
            raise ValueError(f"{error}; farthest from the others is {photos[farthest].path}") from error
    farthest = int(np.abs(positions).max(axis=1).argmax())
    if np.abs(positions[farthest]).max() > LARGEST:
        raise ValueError(f"east, north {at(farthest)} is beyond any map in metres; correct it")
    if like_degrees(positions):
        remedy = "give a csv with columns lat,lon, or add 1000 to metres on a map as small as that"
        raise ValueError(f"positions look like degrees, e.g. {at(0)}, but metres are expected; {remedy}")
    return positions
