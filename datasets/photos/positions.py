"""Where photos were taken: by their names, `@east@north@zone@letter@latitude@longitude@key@...`, or EXIF data."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from .exif import gps_positions

logger = logging.getLogger(__name__)

EARTH_RADIUS = 6_371_009.0  # mean, in metres


def known(positions: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of N x 2 positions are known, N."""
    return np.asarray(np.isfinite(positions).all(axis=1))


def named_positions(paths: Sequence[str], field: int = 1) -> NDArray[np.float64]:
    """UTM east and north of each image from this field of its file name, N x 2, in metres; NaN for names without."""
    positions = np.full((len(paths), 2), np.nan)
    for row, path in enumerate(paths):
        with suppress(ValueError, IndexError):
            # Only the name: a folder above may contain an @ too.
            fields = os.path.basename(path).split("@")
            positions[row] = float(fields[field]), float(fields[field + 1])
    return positions


def named_degrees(paths: Sequence[str]) -> NDArray[np.float64]:
    """Latitude and longitude of each image from its file name, N x 2, in degrees; NaN for names without them."""
    positions = named_positions(paths, field=5)
    positions[(np.abs(positions) > (90, 180)).any(axis=1)] = np.nan
    return positions


def several_zones(paths: Sequence[str]) -> str:
    """The UTM zones, and the hemispheres, that file names state, in words; "" if neither are several."""
    fields = [part for part in {tuple(os.path.basename(path).split("@", 5)[3:5]) for path in paths} if len(part) == 2]
    zones = sorted({int(zone) for zone, _ in fields if zone.isdecimal()})
    hemispheres = {letter.upper() < "N" for _, letter in fields if len(letter) == 1 and letter.isalpha()}
    words = [f"the UTM zones {' and '.join(map(str, zones))}"] * (len(zones) > 1)
    return " and ".join(words + ["both hemispheres"] * (len(hemispheres) > 1))


def utm_positions(paths: Sequence[str]) -> NDArray[np.float64]:
    """`named_positions`, all of which are known; ValueError where they are not."""
    positions = named_positions(paths)
    unknown = np.flatnonzero(~known(positions))
    if len(unknown):
        raise ValueError(
            f"{len(unknown)} of {len(paths)} file names have no UTM coordinates, e.g. {paths[unknown[0]]}; name photos "
            "@<UTM east>@<UTM north>@...@.jpg, or run eval.py with --positives_file or --no_labels"
        )
    return positions


def photo_positions(
    database: Sequence[str], queries: Sequence[str], *, exif: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.float64], bool]:
    """Positions of photos in plain folders: from the names if all have one, or without `exif`; else from names or EXIF
    data, whichever more photos have, or from the names for as many.

    If a side has none of that kind, both are taken in degrees, from EXIF data, or else from the names.

    Returns:
        Positions of the database photos and the queries, N x 2 and Q x 2, NaN where unknown; and whether they are
        latitude and longitude in degrees rather than UTM east and north in metres.
    """
    named = named_positions(database), named_positions(queries)
    by_name = sum(int(known(positions).sum()) for positions in named)
    if not exif or by_name == len(database) + len(queries):
        return *named, False
    gps = gps_positions(database), gps_positions(queries)
    by_exif = sum(int(known(positions).sum()) for positions in gps)
    taken = gps if by_exif > by_name else named
    if not all(known(positions).any() for positions in taken):
        from_names = named_degrees(database), named_degrees(queries)
        degrees = [np.where(known(a)[:, None], a, b) for a, b in zip(gps, from_names, strict=True)]
        if all(known(positions).any() for positions in degrees):
            logger.warning("some photos have positions in their names, others in EXIF data: all are taken in degrees")
            return degrees[0], degrees[1], True
    if by_name and by_exif:
        counts = f"{by_name} photos have UTM coordinates in their names and {by_exif} a position in their EXIF data"
        logger.warning("%s; the more common is used: %s", counts, "EXIF" if taken is gps else "the names")
    return *taken, taken is gps


def like_degrees(positions: NDArray[np.float64]) -> bool:
    """Whether N x 2 numbers in metres look like latitude and longitude, in either order.

    That is, 9 of 10 lie within 90 and 180, so that an outlier does not hide the others, and these are not all whole
    numbers: metres on a small map often are, degrees never.
    """
    located = positions[known(positions)]
    within = [located[(np.abs(located) <= bounds).all(axis=1)] for bounds in ((90, 180), (180, 90))]
    return any(10 * len(some) >= 9 * len(located) and (some != np.floor(some)).any() for some in within)


def haversine_metres(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances on the mean sphere in metres between latitudes and longitudes in degrees, ... x 2 each."""
    a, b = np.radians(a), np.radians(b)
    squared = np.sin((b - a) / 2) ** 2  # of half the chord, along each axis
    along = squared[..., 0] + np.cos(a[..., 0]) * np.cos(b[..., 0]) * squared[..., 1]
    return 2 * EARTH_RADIUS * np.arcsin(np.sqrt(along.clip(0, 1)))


def image_key(path: str) -> str:
    """The image's own key, e.g. in MSLS: the seventh field of `@east@north@zone@letter@lat@lon@key@...`, or ""."""
    fields = os.path.basename(path).split("@")
    return fields[7] if len(fields) > 8 else ""
