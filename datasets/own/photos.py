"""Your photos, with positions and more from file names, EXIF data or a csv."""

import csv
import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags
from tqdm import tqdm

from utils.system.files import read_text
from utils.system.signals import mapped

from ..photos.exif import gps_position, opened, orientation
from ..photos.listing import PHOTO_SUFFIXES, identity, scan
from ..photos.positions import like_degrees
from ..photos.transforms import read_reduced
from .utm import to_utm, zone_of

SPLITS = ("train", "val", "test")
LARGEST = 2e7  # metres; no map reaches farther
METRES, DEGREES, LABELS = "metres", "degrees", "labels"
TIMES = ("%Y:%m:%d %H:%M:%S", "%Y%m%d_%H%M%S", "%Y-%m")
DIGITS = {4: "%Y", 6: "%Y%m", 8: "%Y%m%d", 14: "%Y%m%d%H%M%S"}  # by length, since strptime takes one-digit months
PAIRS = {METRES: ("east", "north"), DEGREES: ("lat", "lon")}  # columns of a csv
COLUMNS = {"path", "label", "heading", "time"}.union(*PAIRS.values())
WANTED = "a csv starts with the columns path, and east,north or lat,lon or label; heading, time and label may follow"


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photo, and what its source says of it."""

    path: str
    position: tuple[float, float] = (np.nan, np.nan)  # east and north, or latitude and longitude: as in its source
    degrees: tuple[float, float] = (np.nan, np.nan)  # latitude and longitude
    zone: tuple[int, bool] | None = None  # UTM zone, and whether it is north of the equator
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
    copies: dict[str, str]  # of photos that equal another byte for byte, and the path of that one


def parse_time(text: str) -> datetime:
    """Parses a time of EXIF data, ISO 8601, dataset file names (201405), or (milli-, micro-, nano-)seconds since 1970;
    the result is in UTC, or without a zone if the text has none."""
    for form in [DIGITS[len(text)]] if text.isdecimal() and len(text) in DIGITS else TIMES:
        with suppress(ValueError):
            return datetime.strptime(text, form)
    with suppress(ValueError):
        time = datetime.fromisoformat(re.sub(r"^(\d{4}):(\d\d):(\d\d)", r"\1-\2-\3", text))
        return time if time.tzinfo is None else time.astimezone(UTC)
    seconds = int(text) / 10 ** (len(text) - 10) if text.isdecimal() and len(text) in (13, 16, 19) else float(text)
    if not 10**8 <= seconds < 2**33:  # a smaller number is something else
        raise ValueError(f"{text} is not a time")
    return datetime.fromtimestamp(seconds, UTC)


def _to_180(longitude: float) -> float:
    """A longitude of 0 to 360 as one of -180 to 180."""
    return longitude - 360 if 180 < longitude <= 360 else longitude


def from_name(path: str) -> Photo:
    """A photo by its name, @east@north@zone@letter@lat@lon@...; ValueError if that has no position."""
    fields = os.path.basename(path).split("@")
    _, east, north, *_ = fields
    photo = Photo(path=path, position=(float(east), float(north)))
    with suppress(ValueError, IndexError):
        photo = replace(photo, zone=(int(fields[3]), fields[4].upper() >= "N"))
    with suppress(ValueError, IndexError):
        photo = replace(photo, degrees=(float(fields[5]), _to_180(float(fields[6]))))
    with suppress(ValueError, IndexError):
        photo = replace(photo, heading=float(fields[9]))
    with suppress(ValueError, IndexError):
        photo = replace(photo, time=parse_time(fields[13]))
    return photo


def from_exif(path: str) -> Photo:
    """A photo with what its EXIF data has of position, heading and time."""
    position = gps_position(path)
    photo = Photo(path=path, position=position, degrees=position)
    with opened(path) as image:
        with suppress(Exception):  # Pillow's errors on tags that are not as the standard says
            gps = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
            photo = replace(photo, heading=float(gps[ExifTags.GPS.GPSImgDirection]))
        with suppress(Exception):
            taken = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal]
            photo = replace(photo, time=parse_time(str(taken).strip("\0 ")))
    return photo


def read_folder(folder: Path, notes: list[str]) -> tuple[str, list[Photo]]:
    """The photos below a folder, with positions from their names; if these have none, EXIF data are read later.

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
    named: dict[str, Photo] = {}
    for path in listing.paths:
        with suppress(ValueError):
            named[path] = from_name(path)
    if not named:
        return DEGREES, [Photo(path=path) for path in listing.paths]
    if unnamed := [path for path in listing.paths if path not in named]:
        raise ValueError(
            f"{folder}: only {len(named)} of {len(listing.paths)} names have UTM coordinates (@<east>@<north>@...), "
            f"unlike e.g. {unnamed[0]}; convert the two kinds separately, or list all in a csv"
        )
    return METRES, [*named.values()]


def read_csv(path: Path, notes: list[str]) -> tuple[str, list[Photo]]:
    """The photos that a csv names, each once; paths are relative to the csv's folder unless absolute."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; {WANTED}") from error
    if len(rows) < 2:
        raise ValueError(f"{path} has no row; {WANTED}")
    header = [name.lower() for name in rows[0][1]]
    pairs = [kind for kind, pair in PAIRS.items() if {*pair} <= {*header}]
    if len(pairs) > 1 or len(set(header)) < len(header):
        wrong = "both east,north and lat,lon" if len(pairs) > 1 else "a column appears twice"
        raise ValueError(f"{path}, line 1: {wrong}; keep only the columns to use")
    if "path" not in header or (not pairs and "label" not in header):
        raise ValueError(f"{path}, line 1: {','.join(header)[:80]!r}: {WANTED}, separated by commas")
    kind = pairs[0] if pairs else LABELS
    if ignored := [name for name in header if name not in COLUMNS]:
        notes.append(f"{path}: columns ignored: {', '.join(ignored)}")
    photos: list[Photo] = []
    lines: dict[str, int] = {}
    for line, row in rows[1:]:
        where = f"{path}, line {line}"
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} fields for {len(header)} columns; quote fields that hold a comma")
        cells = dict(zip(header, row, strict=True))
        if not cells["path"]:
            raise ValueError(f"{where}: no path; name the photo or remove the row")
        cells["path"] = os.path.join(path.parent, cells["path"])
        first = lines.setdefault(os.path.realpath(cells["path"]), line)
        if first != line:
            raise ValueError(f"{where}: {cells['path']} is already in line {first}; name each photo once")
        photos.append(_from_cells(cells, kind, where))
    return kind, photos


def _from_cells(cells: dict[str, str], kind: str, where: str) -> Photo:
    def number(name: str) -> float:
        try:
            if "_" in cells[name]:  # float() takes 1_0 too
                raise ValueError(cells[name])
            return float(cells[name]) if cells[name] else np.nan
        except ValueError as error:
            raise ValueError(f"{where}: {name} {cells[name]!r} is not a number; correct or empty it") from error

    photo = Photo(path=cells["path"], label=cells.get("label"))
    if kind != LABELS:
        a, b = map(number, PAIRS[kind])
        photo = replace(photo, position=(a, b), degrees=(a, _to_180(b)) if kind == DEGREES else photo.degrees)
    if cells.get("heading"):
        photo = replace(photo, heading=number("heading"))
        if abs(photo.heading) > 360:
            raise ValueError(f"{where}: heading {cells['heading']} is out of range; give degrees from north, 0 to 360")
    if cells.get("time"):
        try:
            photo = replace(photo, time=parse_time(cells["time"]))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{where}: time {cells['time']!r} is not understood; write 2024-05-31T12:00:00") from error
    return photo


def collect(sources: Sequence[Path], notes: list[str]) -> Collection:
    """The photos of all sources, folders and csv files, under a progress bar; ValueError if they cannot be used.

    `notes` becomes the collection's, so that what was noted is known after an error too.
    """
    dropped: dict[str, list[str]] = defaultdict(list)
    kinds: dict[str, Path] = {}
    photos: dict[object, Photo] = {}
    by_exif: set[str] = set()
    for source in sources:
        if source.is_dir():
            kind, listed = read_folder(source, notes)
            by_exif |= {photo.path for photo in listed} if kind == DEGREES else set()
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
    (kind,) = kinds
    zones = Counter(
        "unknown" if photo.zone is None else f"{photo.zone[0]} {'north' if photo.zone[1] else 'south'}"
        for photo in photos.values()
    )
    if len(zones) > 1:
        counts = ", ".join(f"{zone}: {count} photos" for zone, count in sorted(zones.items()))
        raise ValueError(f"names are in several UTM zones ({counts}), which are not on one map; convert each apart")

    def look(photo: Photo) -> tuple[Photo, bytes] | str:
        """The photo with what its file says, and a digest of its bytes; or why it cannot be used."""
        if not os.path.isfile(photo.path):  # reading a pipe would block
            return "a link to a file that is not there" if os.path.islink(photo.path) else "there is no such file"
        exif = photo.path in by_exif
        try:
            read_reduced(photo.path, 64)
            photo = replace(from_exif(photo.path) if exif else photo, turn=orientation(photo.path))
            with open(photo.path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except Exception:  # decoders fail on damaged files in many ways
            return "cannot be read"
        if photo.label == "":
            return "no label"
        if kind != LABELS and (np.isnan(photo.position).any() or (kind == DEGREES and photo.position == (0.0, 0.0))):
            return "no GPS position in EXIF data" if exif else "no position"
        return photo, content

    kept = []
    first: dict[bytes, str] = {}
    copies: dict[str, str] = {}
    with mapped(ThreadPoolExecutor(os.cpu_count()), look, list(photos.values())) as looked:
        for photo, result in zip(photos.values(), tqdm(looked, total=len(photos), unit="photo"), strict=True):
            if isinstance(result, str):
                dropped[result].append(photo.path)
            else:
                kept.append(result[0])
                if (original := first.setdefault(result[1], photo.path)) != photo.path:
                    copies[photo.path] = original
    if not kept:
        reasons = ", ".join(f"{len(paths)} {reason}" for reason, paths in dropped.items())
        raise ValueError(f"no photo of {len(photos)} can be used ({reasons}); repair them, or give positions in a csv")
    times = [photo.time for photo in kept if photo.time]
    if 0 < (zoned := sum(time.tzinfo is not None for time in times)) < len(times):
        notes.append(f"{zoned} of {len(times)} times have a zone, the others none: they are taken for UTC")
    kept = [replace(photo, time=photo.time and photo.time.replace(tzinfo=None)) for photo in kept]
    return Collection(kept, _metres(kept, kind), kind, dict(dropped), notes, copies)


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
            return to_utm(positions, *zone_of(positions))
        except ValueError as error:
            farthest = int(np.abs(positions - np.median(positions, axis=0)).max(axis=1).argmax())
            raise ValueError(f"{error}; farthest from the others is {photos[farthest].path}") from error
    farthest = int(np.abs(positions).max(axis=1).argmax())
    if np.abs(positions[farthest]).max() > LARGEST:
        raise ValueError(f"east, north {at(farthest)} is beyond any map in metres; correct it")
    if like_degrees(positions):
        remedy = "give a csv with columns lat,lon, or add 1000 to metres on a map as small as that"
        raise ValueError(f"positions look like degrees, e.g. {at(0)}, but metres are expected; {remedy}")
    if (positions[:, 0] > 1e6).all() and ((positions[:, 1] >= 1e5) & (positions[:, 1] <= 9e5)).all():
        raise ValueError(f"positions look swapped, e.g. {at(0)}: UTM east lies between 100,000 and 900,000; swap them")
    return positions
