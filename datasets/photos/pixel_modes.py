"""Converts any image that Pillow opens to RGB, 8 bits per channel.

| mode | e.g. | becomes |
|---|---|---|
| 1, L, RGB, HSV, YCbCr, LAB, CMYK | any file of 8 bits per channel | result of Pillow's `convert("RGB")`, as released |
| P, PA, LA, RGBA, RGBX | palettes, transparency | likewise: the colours themselves, ignoring transparency |
| La, RGBa | TIFF with colours multiplied by opacity | the colours themselves |
| RGB, RGBA, CMYK of 16 bits per channel | PNG, TIFF, SGI, PPM | what Pillow reads: the upper 8 bits (PPM: rounded) |
| I;16, I;16B, I;16L, I;16N | grey of 16 bits: PNG, TIFF, JPEG 2000 | value / 256 |
| I;16 of a TIFF of 12 bits | | value / 16 |
| I from PGM | grey of 9 to 16 bits, which Pillow scales to 16 | value / 256 |
| I from others | TIFF of 32 bits, or of 16 with a sign | GUESSED: value if none is above 255, else value / 256 |
| F | TIFF and PFM of real numbers | GUESSED: 255 value if none is above 1, value up to 255, else value / 256 |

A TIFF whose zero is white is inverted in every mode. I and F with values below 0 or above 65,535, or F with values that
are not finite, have no scale that could be guessed, and are refused. Whole numbers are rounded down, as Pillow does by
taking the upper bits; real ones to the nearest.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_PHOTOMETRIC = 262  # TIFF's tag for what 0 means: 0 for white


class Depth(IntEnum):
    """How an image was converted to 8 bits per channel."""

    STORED = 0
    SIXTEEN = 1  # reduced by a known scale
    GUESSED = 2


def to_rgb(image: Image.Image) -> tuple[Image.Image, Depth, str]:
    """An open image as RGB, how it was converted, and that in words, "" if its bits are as stored.

    Raises:
        ValueError: its values have no scale that could be guessed.
        OSError, SyntaxError, ...: any decoder failure.
    """
    mode, deep = image.mode, _is_deep(image)
    if mode in _PREMULTIPLIED:
        return image.convert(_PREMULTIPLIED[mode]).convert("RGB"), Depth.STORED, ""
    if mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; without it, Pillow warns for each such image
    if not mode.startswith(("I", "F")):
        if deep:
            return image.convert("RGB"), Depth.SIXTEEN, f"{mode} of 16 bits per channel, of which the upper 8 are read"
        return image.convert("RGB"), Depth.STORED, ""

    zero_is_white = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    of_12 = "I;12" in _decoder_arguments(image)
    values = np.asarray(image)
    if mode.startswith("I;16") or image.format == "PPM" and mode == "I":
        bits = 12 if of_12 else 16
        grey = (values >> (bits - 8)).astype(np.uint8)
        how = (
            f"grey of {bits} bits, read as value / {2 ** (bits - 8)} (its brightest is {values.max()} of {2**bits - 1})"
        )
        depth = Depth.SIXTEEN
    else:
        grey, scale = _guessed(values)
        how, depth = (
            f"mode {mode}, whose scale is guessed: values up to {values.max():g} read as {scale}",
            Depth.GUESSED,
        )
    return Image.fromarray(255 - grey if zero_is_white else grey).convert("RGB"), depth, how


def _decoder_arguments(image: Image.Image) -> list[Any]:
    """How the file stores the pixels, in Pillow's words, e.g. "RGB;16B"; known until they are read."""
    arguments = [tile[3] for tile in getattr(image, "tile", [])]
    return [part for of in arguments for part in (of if isinstance(of, tuple) else (of,))]


def _is_deep(image: Image.Image) -> bool:
    """Whether the file has 16 bits per channel, or is a PPM whose white is above 255."""
    return any(
        ";16" in part if isinstance(part, str) else image.format == "PPM" and isinstance(part, int) and part > 255
        for part in _decoder_arguments(image)
    )


def _guessed(values: NDArray[Any]) -> tuple[NDArray[np.uint8], str]:
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 65_535:  # false for NaN, too
        raise ValueError(f"values from {low:g} to {high:g}, whose scale is unknown: convert it to 8 or 16 bits")
    if values.dtype.kind == "f" and high <= 1:
        return np.rint(255 * values).astype(np.uint8), "255 x value"
    if high <= 255:
        return np.rint(values).astype(np.uint8), "they are"
    return (values / 256).astype(np.uint8), "value / 256"
