"""Your photos, with positions and more from file names, EXIF data or a csv."""

import csv
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from tqdm import tqdm

from utils.system.signals import mapped

from ..evaluation.database_queries import like_degrees
from ..evaluation.positives import read_text
from ..photos.exif import gps_position, orientation
from ..photos.listing import PHOTO_SUFFIXES, identity, scan
from ..photos.transforms import read_reduced
from .utm import to_utm, zone_of

SPLITS = ("train", "val", "test")
ZONES_APART = 1e7  # metres east
LARGEST = 2e7  # metres; no map reaches farther
METRES, DEGREES, LABELS = "metres", "degrees", "labels"
TIMES = ("%Y:%m:%d %H:%M:%S", "%Y%m%d_%H%M%S", "%Y-%m")
DIGITS = {4: "%Y", 6: "%Y%m", 8: "%Y%m%d", 14: "%Y%m%d%H%M%S"}  # by length, since strptime takes one-digit months
SAME, MISSING, DAMAGED = "the same file as another photo", "there is no such file", "cannot be read"
NO_LABEL, NO_GPS, NO_POSITION = "no label", "no GPS position in EXIF data", "no position"
REMEDIES = {  # what to do about photos that are dropped for these reasons
    SAME: "name more photos",
    MISSING: "correct the paths in the csv",
    DAMAGED: "replace or repair those that cannot be read",
    NO_LABEL: "give each photo a label",
    NO_GPS: "give positions or labels in a csv",
    NO_POSITION: "give all photos positions",
}
WANTED = "a csv starts with the columns path, and east,north or lat,lon or label; heading, time and label may follow"


@dataclass(frozen=True, kw_only=True)
class Photo:
    """One photo.

    Attributes:
        path: path of its file.
        position: east and north in metres, or latitude and longitude in degrees, depending on its source; NaN if
            unknown.
        degrees: latitude and longitude; NaN if unknown.
        zone: UTM zone, and whether it is north of the equator, if the name says so.
        heading: degrees from north, clockwise, 0 to 360; None if unknown.
        time: when it was taken; None if unknown.
        label: label of its place; None if positions define places.
        turn: how to turn it, see `exif.orientation`.
    """

    path: str
    position: tuple[float, float] = (np.nan, np.nan)
    degrees: tuple[float, float] = (np.nan, np.nan)
    zone: tuple[int, bool] | None = None
    heading: float | None = None
    time: datetime | None = None
    label: str | None = None
    turn: int = 1


@dataclass
class Collection:
    """Usable photos, and those that were dropped.

    Attributes:
        photos: photos in the order of the sources, and of names within a folder.
        metres: east and north of each, N x 2; made up, with places 1 km apart, if there are only labels.
        kind: how positions were given: metres, degrees or labels.
        dropped: paths by reason.
        notes: lines about anything else to know.
        copies: paths of photos that equal another byte for byte, and the path of that one.
    """

    photos: list[Photo]
    metres: NDArray[np.float64]
    kind: str
    dropped: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)


def parse_time(text: str) -> datetime:
    """Parses a time of EXIF data, ISO 8601, dataset file names (201405), or seconds since 1970.

    Raises:
        ValueError: it is none of these.
    """
    text = text.strip()
    for form in [DIGITS[len(text)]] if text.isdecimal() and len(text) in DIGITS else TIMES:
        with suppress(ValueError):
            return datetime.strptime(text, form)
    with suppress(ValueError):
        found = datetime.fromisoformat(text)
        return found if found.tzinfo is None else found.astimezone(UTC).replace(tzinfo=None)
    seconds = float(text)
    if not 10**8 <= seconds < 2**33:  # a smaller number is something else
        raise ValueError(f"{text} is not a time")
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)


def _direction(degrees: float) -> float | None:
    return degrees % 360 if np.isfinite(degrees) else None


def from_name(path: str) -> Photo:
    """A photo whose name says where it was taken, and perhaps heading and time: @east@north@zone@letter@lat@lon@...

    Raises:
        ValueError: the name has no position.
    """
    fields = os.path.basename(path).split("@")
    _, east, north, *_ = fields
    photo = Photo(path=path, position=(float(east), float(north)))
    with suppress(ValueError, IndexError):
        photo = replace(photo, zone=(int(fields[3]), fields[4].upper() >= "N"))
    with suppress(ValueError, IndexError):
        photo = replace(photo, degrees=(float(fields[5]), float(fields[6])))
    with suppress(ValueError, IndexError):
        photo = replace(photo, heading=_direction(float(fields[9])))
    with suppress(ValueError, IndexError):
        photo = replace(photo, time=parse_time(fields[13]))
    return photo


def from_exif(path: str) -> Photo:
    """A photo with what its EXIF data has of position, heading and time."""
    position = gps_position(path)
    photo = Photo(path=path, position=position, degrees=position)
    with Image.open(path) as image:
        with suppress(Exception):  # Pillow's errors on tags that are not as the standard says
            gps = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
            photo = replace(photo, heading=_direction(float(gps[ExifTags.GPS.GPSImgDirection])))
        with suppress(Exception):
            taken = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal]
            photo = replace(photo, time=parse_time(str(taken).strip("\0 ")))
    return photo


def read_folder(folder: Path, notes: list[str]) -> tuple[str, list[Photo]]:
    """The photos below a folder, with positions from their names; if these have none, EXIF data are read later.

    In an evaluation dataset with a train split, only that counts: the others are for evaluation.

    Raises:
        ValueError: there is no photo, or only some names have coordinates.
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
    photos = []
    for path in listing.paths:
        with suppress(ValueError):
            photos.append(from_name(path))
    if not photos:
        return DEGREES, [Photo(path=path) for path in listing.paths]
    if len(photos) < len(listing.paths):
        named = {photo.path for photo in photos}
        example = next(path for path in listing.paths if path not in named)
        raise ValueError(
            f"{folder}: only {len(photos)} of {len(listing.paths)} names have UTM coordinates (@<east>@<north>@...), "
            f"unlike e.g. {example}; convert the two kinds separately, or list all in a csv"
        )
    return METRES, photos


def read_csv(path: Path, notes: list[str]) -> tuple[str, list[Photo]]:
    """The photos that a csv names, each once; paths are relative to the csv's folder unless absolute.

    Raises:
        ValueError: columns are missing or contradictory, or a row does not match them; the message names it.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((reader.line_num, [cell.strip() for cell in row]))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; {WANTED}") from error
    if len(rows) < 2:
        raise ValueError(f"{path} has no row below its header; {WANTED}")
    header = [name.lower() for name in rows[0][1]]
    kind = _kind_of(path, header)
    known = {"path", "east", "north", "lat", "lon", "label", "heading", "time"}
    if ignored := [name for name in header if name not in known]:
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


def _kind_of(path: Path, header: list[str]) -> str:
    """How a csv says where photos were taken."""
    if len(set(header)) < len(header):
        raise ValueError(f"{path}, line 1: a column appears twice; {WANTED}")
    kinds = [kind for kind, pair in ((METRES, {"east", "north"}), (DEGREES, {"lat", "lon"})) if pair <= {*header}]
    if len(kinds) > 1:
        raise ValueError(f"{path}, line 1: both east,north and lat,lon; keep only the columns to use")
    if "path" not in header or (not kinds and "label" not in header):
        shown = ",".join(header)
        raise ValueError(f"{path}, line 1: {shown[:80]!r}: {WANTED}, separated by commas")
    return kinds[0] if kinds else LABELS


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
        pair = ("east", "north") if kind == METRES else ("lat", "lon")
        position = number(pair[0]), number(pair[1])
        if np.isinf(position).any():
            raise ValueError(f"{where}: {pair[0]},{pair[1]} {position[0]},{position[1]} is infinite; correct it")
        photo = replace(photo, position=position, degrees=position if kind == DEGREES else photo.degrees)
    if cells.get("heading"):
        heading = number("heading")
        if not -360 <= heading <= 360:
            raise ValueError(f"{where}: heading {cells['heading']} is out of range; give degrees from north, 0 to 360")
        photo = replace(photo, heading=heading % 360)
    if cells.get("time"):
        try:
            photo = replace(photo, time=parse_time(cells["time"]))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{where}: time {cells['time']!r} is not understood; write 2024-05-31T12:00:00") from error
    return photo


def collect(sources: Sequence[Path], *, notes: list[str] | None = None, progress: bool = False) -> Collection:
    """The photos of all sources: folders and csv files.

    Args:
        sources: their paths.
        notes: becomes the collection's; so they are also known after an error.
        progress: whether to show a progress bar.

    Raises:
        OSError: a source is missing or cannot be read.
        ValueError: a source is unusable, or the sources give positions in different ways.
    """
    notes = [] if notes is None else notes
    dropped: dict[str, list[str]] = defaultdict(list)
    kinds: dict[str, Path] = {}
    photos: dict[object, Photo] = {}
    by_exif: set[str] = set()
    for source in sources:
        if source.is_dir():
            kind, found = read_folder(source, notes)
            by_exif |= {photo.path for photo in found} if kind == DEGREES else set()
        elif source.suffix.lower() == ".csv" and source.is_file():
            kind, found = read_csv(source, notes)
        else:
            raise ValueError(
                f"{source} is neither a folder nor an existing .csv file; name folders of photos, or csv files"
            )
        kinds.setdefault(kind, source)
        for photo in found:
            if photos.setdefault(identity(photo.path), photo) is not photo:
                dropped[SAME].append(photo.path)
    if len(kinds) > 1:
        listed = ", ".join(f"{source} has {kind}" for kind, source in kinds.items())
        raise ValueError(f"{listed}, which cannot be combined; convert them one at a time")
    (kind,) = kinds

    def look(photo: Photo) -> tuple[Photo, bytes] | str:
        """The photo with what its file says, and a digest of its bytes; or why it cannot be used."""
        if not os.path.isfile(photo.path):  # reading a pipe would block
            return MISSING
        exif = photo.path in by_exif
        try:
            read_reduced(photo.path, 64)
            photo = replace(from_exif(photo.path) if exif else photo, turn=orientation(photo.path))
            with open(photo.path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except Exception:  # decoders fail on damaged files in many ways
            return DAMAGED
        if photo.label == "":
            return NO_LABEL
        if kind != LABELS and (np.isnan(photo.position).any() or (kind == DEGREES and photo.position == (0.0, 0.0))):
            return NO_GPS if exif else NO_POSITION
        return photo, content

    kept = []
    first: dict[bytes, str] = {}
    copies: dict[str, str] = {}
    with mapped(ThreadPoolExecutor(os.cpu_count()), look, list(photos.values())) as looked:
        seen = tqdm(looked, total=len(photos), unit="photo", disable=not progress)
        for photo, found_out in zip(photos.values(), seen, strict=True):
            if isinstance(found_out, str):
                dropped[found_out].append(photo.path)
            else:
                kept.append(found_out[0])
                if (original := first.setdefault(found_out[1], photo.path)) != photo.path:
                    copies[photo.path] = original
    if not kept:
        reasons = ", ".join(f"{len(paths)} {reason}" for reason, paths in dropped.items())
        most = max(dropped, key=lambda reason: len(dropped[reason]))
        raise ValueError(f"no photo of {len(photos)} can be used ({reasons}); {REMEDIES[most]}")
    metres = _metres(kept, kind)
    zones = sorted({photo.zone for photo in kept}, key=str)
    if len(zones) > 1:
        names = " ".join("unknown" if zone is None else f"{zone[0]}{'north' if zone[1] else 'south'}" for zone in zones)
        notes.append(
            f"names are in {len(zones)} UTM zones ({names}), whose metres cannot be compared: zones are put "
            f"{ZONES_APART / 1e3:g} km apart, so that places on both sides of a border are not compared"
        )
        metres[:, 0] += [zones.index(photo.zone) * ZONES_APART for photo in kept]
    return Collection(kept, metres, kind, dict(dropped), notes, copies)


def _metres(photos: Sequence[Photo], kind: str) -> NDArray[np.float64]:
    """East and north of each photo, N x 2.

    Raises:
        ValueError: positions cannot be of the given kind.
    """
    if kind == LABELS:
        _, places = np.unique([photo.label or "" for photo in photos], return_inverse=True)
        return np.stack((places * 1000.0, np.zeros(len(photos))), axis=1)
    positions = np.array([photo.position for photo in photos])
    if kind == DEGREES:
        for photo, (latitude, longitude) in zip(photos, positions, strict=True):
            if abs(latitude) > 90 or abs(longitude) > 180:
                swapped = abs(longitude) <= 90 and abs(latitude) <= 180
                raise ValueError(
                    f"{photo.path}: latitude {latitude:g}, longitude {longitude:g} is out of range"
                    + ("; are the columns lat and lon swapped?" if swapped else "; metres go into columns east,north")
                )
        try:
            zone = zone_of(positions)
        except ValueError as error:
            farthest = int(np.abs(positions - np.median(positions, axis=0)).max(axis=1).argmax())
            raise ValueError(f"{error}; farthest from the others is {photos[farthest].path}") from error
        return to_utm(positions, *zone)
    farthest = int(np.abs(positions).max(axis=1).argmax())
    if np.abs(positions[farthest]).max() > LARGEST:
        east, north = positions[farthest]
        raise ValueError(
            f"{photos[farthest].path}: east {east:g}, north {north:g} is beyond any map in metres; correct it"
        )
    if like_degrees(positions):
        raise ValueError(
            f"positions look like degrees, e.g. {positions[0, 0]:g}, {positions[0, 1]:g} of {photos[0].path}, but "
            "metres are expected; give a csv with columns lat,lon, or add 1000 to metres on a map as small as that"
        )
    if (positions[:, 0] > 1e6).all() and ((positions[:, 1] >= 1e5) & (positions[:, 1] <= 9e5)).all():
        raise ValueError(
            f"positions look swapped, e.g. east {positions[0, 0]:g}, north {positions[0, 1]:g} of {photos[0].path}: "
            "UTM east lies between 100,000 and 900,000; swap them"
        )
    return positions
