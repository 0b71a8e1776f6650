"""EXIF data: how the camera was held, and where."""

import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

# Errors of Pillow, or of arithmetic, on tags that are missing or not as the standard says.
_NOT_AS_IT_SHOULD_BE = (
    LookupError, ValueError, TypeError, ArithmeticError, AttributeError, SyntaxError, struct.error,
)  # fmt: skip

_SIGNS = {"N": 1, "S": -1, "E": 1, "W": -1}


def cannot_read(path: str | os.PathLike[str], error: Exception) -> ValueError:
    """The error for a photo that cannot be read, with the file and the remedy."""
    return ValueError(
        f"cannot read the image {os.fspath(path)} ({str(error) or type(error).__name__}); replace or remove it, or run "
        "eval.py with --skip_unreadable to leave it out"
    )


def orientation(path: str | os.PathLike[str]) -> int:
    """How to turn the image that Pillow reads, 1 to 8 as in the EXIF standard; 1, not at all, if the file does not say,
    or is a TIFF, which Pillow turns itself.

    Raises:
        OSError, PIL.Image.DecompressionBombError: the file is not an image, or one that is too large.
    """
    with Image.open(path) as image:
        return orientation_of(image)


def orientation_of(image: Image.Image) -> int:
    """`orientation` of an open image."""
    if image.format == "TIFF":
        return 1
    try:
        found = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _NOT_AS_IT_SHOULD_BE:
        return 1
    return found if 1 <= found <= 8 else 1


def turned(pixels: Tensor, orientation: int) -> Tensor:
    """Turns stored pixels, C x H x W, upright: C x H x W, or C x W x H for orientations above 4."""
    if orientation > 4:
        pixels = pixels.transpose(1, 2)
    # Now the first stored row is at the top or the bottom, and the first column at the left or the right.
    axes = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return pixels.flip(axes).contiguous() if orientation != 1 else pixels


def gps_position(path: str) -> tuple[float, float]:
    """Latitude and longitude in degrees, north and east positive; NaN if the photo does not say.

    Raises:
        OSError, PIL.Image.DecompressionBombError: see `orientation`.
    """
    with Image.open(path) as image:
        try:
            gps = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
            latitude = _degrees(gps[ExifTags.GPS.GPSLatitude], gps[ExifTags.GPS.GPSLatitudeRef])
            longitude = _degrees(gps[ExifTags.GPS.GPSLongitude], gps[ExifTags.GPS.GPSLongitudeRef])
        except _NOT_AS_IT_SHOULD_BE:
            return np.nan, np.nan
    if not (abs(latitude) <= 90 and abs(longitude) <= 180) or latitude == longitude == 0:  # without a fix some write 0
        return np.nan, np.nan
    return latitude, longitude


def _degrees(sexagesimal: Sequence[float], reference: str) -> float:
    degrees, minutes, seconds = map(float, sexagesimal)
    return _SIGNS[reference.strip("\0 ").upper()] * (degrees + minutes / 60 + seconds / 3600)


def gps_positions(paths: Sequence[str]) -> NDArray[np.float64]:
    """`gps_position` of each photo, N x 2.

    Raises:
        ValueError: a file is not an image, or one that is too large; the message names it.
    """

    def of(path: str) -> tuple[float, float]:
        try:
            return gps_position(path)
        except Exception as error:  # decoders fail on damaged files in many ways
            raise cannot_read(path, error) from error

    with ThreadPoolExecutor() as pool:
        return np.array(list(pool.map(of, paths)), dtype=np.float64).reshape(-1, 2)
