"""What a camera wrote beside the pixels: where a photo was taken."""

import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

# What Pillow, or the arithmetic, makes of tags that are absent or not as the standard says.
_NOT_AS_IT_SHOULD_BE = (
    LookupError, ValueError, TypeError, ArithmeticError, AttributeError, SyntaxError, struct.error,
)  # fmt: skip


def gps_position(path: str) -> tuple[float, float]:
    """Latitude and longitude in degrees, north and east positive; not a number where the photo does not say.

    Raises:
        OSError: no image can be recognised in the file.
    """
    with Image.open(path) as image:
        try:
            gps = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
            latitude = _degrees(gps[ExifTags.GPS.GPSLatitude], gps[ExifTags.GPS.GPSLatitudeRef], "NS")
            longitude = _degrees(gps[ExifTags.GPS.GPSLongitude], gps[ExifTags.GPS.GPSLongitudeRef], "EW")
        except _NOT_AS_IT_SHOULD_BE:
            return np.nan, np.nan
    if not (abs(latitude) <= 90 and abs(longitude) <= 180) or latitude == longitude == 0:  # no fix: some write zeros
        return np.nan, np.nan
    return latitude, longitude


def _degrees(sexagesimal: Sequence[float], reference: str, positive_negative: str) -> float:
    degrees, minutes, seconds = map(float, sexagesimal)
    sign = 1 - 2 * positive_negative.index(reference.strip("\0 ").upper())
    return sign * (degrees + minutes / 60 + seconds / 3600)


def gps_positions(paths: Sequence[str]) -> NDArray[np.float64]:
    """`gps_position` of each photo, N x 2.

    Raises:
        ValueError: no image can be recognised in one of the files; the message names it.
    """

    def of(path: str) -> tuple[float, float]:
        try:
            return gps_position(path)
        except OSError as error:
            raise ValueError(f"cannot read the image {path} ({error}); replace or remove it") from error

    with ThreadPoolExecutor() as pool:
        return np.array(list(pool.map(of, paths)), dtype=np.float64).reshape(-1, 2)
