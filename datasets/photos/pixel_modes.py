"""Converts any image that Pillow opens to RGB, 8 bits per channel.

| mode | becomes |
|---|---|
| 1, L, RGB, HSV, YCbCr, LAB, CMYK | result of Pillow's `convert("RGB")`, as released |
| P, PA, LA, La, RGBA, RGBa, RGBX | the colours themselves, ignoring transparency |
| colour of 16 bits per channel | what Pillow reads: the upper 8 bits (PPM: rounded) |
| grey of 16 bits (PNG, TIFF, PGM, JPEG 2000) | value / 256, rounded down; of a TIFF of 12 bits, value / 16 |
| grey of 32 bits, or with a sign | refused: its scale is not known |

A TIFF whose zero is white is inverted in every mode.
"""

from typing import Any

import numpy as np
from PIL import Image

_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_PHOTOMETRIC = 262  # TIFF's tag for what 0 means: 0 for white


def to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """An open image as RGB, and how more than 8 bits per channel became 8, in words; "" if there are no more.

    Raises:
        ValueError: its values have no known scale.
        OSError, SyntaxError, ...: any decoder failure.
    """
    mode, stored = image.mode, _stored(image)  # known until the pixels are read
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        bits = 12 if "I;12" in stored else 16
        zero_is_white = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
        values = np.asarray(image)
        grey = (values >> (bits - 8)).astype(np.uint8)
        how = f"grey of {bits} bits, read as value / {2 ** (bits - 8)} (brightest: {values.max()} of {2**bits - 1})"
        return Image.fromarray(255 - grey if zero_is_white else grey).convert("RGB"), how
    if mode.startswith(("I", "F")):
        raise ValueError(f"mode {mode}, grey whose scale is not known; convert it to 8 or 16 bits")
    if mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[mode])
    elif mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; without it, Pillow warns for each such image
    deep = any(";16" in part if isinstance(part, str) else part > 255 for part in stored)
    return image.convert("RGB"), f"{mode} of 16 bits per channel, of which the upper 8 are read" if deep else ""


def _stored(image: Image.Image) -> list[Any]:
    """How the file stores the pixels, in the words of Pillow's decoder: e.g. "RGB;16B", or of a PPM its white."""
    arguments = [tile[3] for tile in getattr(image, "tile", [])]
    parts = [part for several in arguments for part in (several if isinstance(several, tuple) else (several,))]
    return [part for part in parts if isinstance(part, str) or (image.format == "PPM" and isinstance(part, int))]
