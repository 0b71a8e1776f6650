"""EXIF data: how the camera was held, and where."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

_SIGNS = {"N": 1, "S": -1, "E": 1, "W": -1}

# First bytes of what is often called .jpg without being one, after four bytes of length for the first.
_HEIC, _POINTER, _PAGES = (b"ftyphe", b"ftypmif1", b"ftypmsf1"), b"version https://git-lfs", (b"<!doctype", b"<html")


def why_unreadable(path: str | os.PathLike[str], error: Exception) -> str:
    """Why a photo cannot be read: what the file is instead, if its first bytes tell, or else the decoder's error."""
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return f"a link to {os.readlink(path)}, which is not there"
    with suppress(OSError), open(path, "rb") as file:
        start = file.read(64)
        if start[4:].startswith(_HEIC):
            return "a HEIC photo, which is not read: convert it to JPEG"
        if start.startswith(_POINTER):
            return "a pointer of git-LFS in place of the photo: run `git lfs pull`"
        if start.lstrip().lower().startswith(_PAGES):
            return "an HTML page in place of the photo: download it again"
    return str(error) or type(error).__name__


def cannot_read(path: str | os.PathLike[str], error: Exception) -> ValueError:
    """The error for a photo that cannot be read, with the file and the remedy."""
    return ValueError(
        f"cannot read the image {os.fspath(path)} ({why_unreadable(path, error)}); replace or remove it, or run "
        "eval.py with --skip_unreadable to leave it out"
    )


def opened(path: str | os.PathLike[str]) -> Image.Image:
    """Opens an image file; a JPEG of any size, as torchvision reads it, where Pillow's `open` has a limit."""
    try:
        return JpegImageFile(path)
    except SyntaxError:
        return Image.open(path)


def orientation(path: str | os.PathLike[str]) -> int:
    """`orientation_of` a file."""
    with opened(path) as image:
        return orientation_of(image)


def orientation_of(image: Image.Image) -> int:
    """How to turn what Pillow reads, 1 to 8 as in the EXIF standard; 1, not at all, if the file does not say."""
    if image.format == "TIFF":  # which Pillow turns itself
        return 1
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # tags that are not as the standard says fail in many ways
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def turned(pixels: Tensor, orientation: int) -> Tensor:
    """Turns stored pixels, C x H x W, upright: C x H x W, or C x W x H for orientations above 4."""
    if orientation > 4:
        pixels = pixels.transpose(1, 2)
    # Now the first stored row is at the top or the bottom, and the first column at the left or the right.
    axes = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return pixels.flip(axes).contiguous() if orientation != 1 else pixels


def gps_position(path: str) -> tuple[float, float]:
    """Latitude and longitude in degrees, north and east positive; NaN if the photo does not say."""
    with opened(path) as image:
        try:
            gps = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
            latitude = _degrees(gps[ExifTags.GPS.GPSLatitude], gps[ExifTags.GPS.GPSLatitudeRef])
            longitude = _degrees(gps[ExifTags.GPS.GPSLongitude], gps[ExifTags.GPS.GPSLongitudeRef])
        except Exception:  # tags that are missing, or not as the standard says, fail in many ways
            return np.nan, np.nan
    if not (abs(latitude) <= 90 and abs(longitude) <= 180) or latitude == longitude == 0:  # without a fix some write 0
        return np.nan, np.nan
    return latitude, longitude


def _degrees(sexagesimal: Sequence[float], reference: str) -> float:
    degrees, minutes, seconds = map(float, sexagesimal)
    if min(degrees, minutes, seconds) < 0:
        raise ValueError("a sign, where the letter has it: which of them counts is not known")
    return _SIGNS[reference.strip("\0 ").upper()] * (degrees + minutes / 60 + seconds / 3600)


def gps_positions(paths: Sequence[str]) -> NDArray[np.float64]:
    """`gps_position` of each photo, N x 2; ValueError names a file that cannot be read."""

    def position(path: str) -> tuple[float, float]:
        try:
            return gps_position(path)
        except Exception as error:  # decoders fail on damaged files in many ways
            raise cannot_read(path, error) from error

    with ThreadPoolExecutor() as pool:
        return np.array(list(pool.map(position, paths)), dtype=np.float64).reshape(-1, 2)
