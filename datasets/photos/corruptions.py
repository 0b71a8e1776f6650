"""Photos made worse as cameras and weather do, to measure what that costs.

The severities are those of ImageNet-C (make_imagenet_c.py in github.com/hendrycks/robustness at e0377d4; Hendrycks and
Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR 2019), except where the
table says so. It defines lengths in pixels of its images of 224 x 224; here they grow with a photo's shorter side.
Each kind is a function of the photo, its value in the table, pixels per pixel of ImageNet-C, and the generator.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

SIDE = 224  # of ImageNet-C's images, in pixels
FOG_SIDE = 256  # of its map of fog
Photo = NDArray[Any]  # float32, H x W x 3, in [0, 1]


def corrupt(pixels: Tensor, path: str, *, corruption: str, seed: int) -> Tensor:
    """Applies a corruption such as "blur:3" to a photo, bytes 3 x H x W of any size.

    What is drawn depends on the seed, the file's name without its folder, the kind and the severity alone.
    """
    kind, severity = corruption.split(":")
    words = map(os.fsencode, (str(seed), os.path.basename(path), kind, severity))
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(b"\0".join(words)).digest()))
    function, values = SEVERITIES[kind]
    photo = pixels.permute(1, 2, 0).numpy().astype(np.float32) / 255
    worse = function(photo, values[int(severity) - 1], min(photo.shape[:2]) / SIDE, rng)
    return torch.from_numpy(_bytes(worse)).permute(2, 0, 1).contiguous()


def _bytes(photo: Photo) -> NDArray[np.uint8]:
    return (photo.clip(0, 1) * 255).round().astype(np.uint8)


def noise(photo: Photo, deviation: float, scale: float, rng: Generator) -> Photo:
    """Gaussian noise, independent in every pixel of a photo of any size, as a sensor's."""
    return photo + deviation * rng.standard_normal(photo.shape, dtype=np.float32)


def blur(photo: Photo, deviation: float, scale: float, rng: Generator) -> Photo:
    """Gaussian blur, which Pillow makes of box blurs."""
    blurred = Image.fromarray(_bytes(photo)).filter(ImageFilter.GaussianBlur(deviation * scale))
    return np.asarray(blurred, dtype=np.float32) / 255


def motion_blur(photo: Photo, kernel: tuple[int, int], scale: float, rng: Generator) -> Photo:
    """Smears by half a Gaussian along a line, up to 45 degrees from the horizontal; the edge's pixels go on outside."""
    radius, deviation = kernel
    steps, angle = np.arange(1 + round(2 * radius * scale)), rng.uniform(-np.pi / 4, np.pi / 4)
    down, right = (np.rint(steps * part).astype(int) for part in (np.sin(angle), np.cos(angle)))
    (height, width, _), tall, wide = photo.shape, abs(int(down[-1])), int(right[-1])
    # By Fourier transforms, whose time does not grow with the line and is least for sides of small factors.
    more = [(tall, tall - (height + 2 * tall) % -32), (wide, -((width + wide) % -32)), (0, 0)]
    padded = np.pad(photo, more, mode="edge")
    line = np.zeros(padded.shape[:2], dtype=np.float32)
    np.add.at(line, (down, right), np.exp(-((steps / (deviation * scale)) ** 2) / 2))
    spectrum = np.fft.rfft2(line / line.sum())
    channels = [np.fft.irfft2(np.fft.rfft2(channel) * spectrum, line.shape) for channel in np.moveaxis(padded, 2, 0)]
    return np.stack(channels, axis=2)[tall : tall + height, wide : wide + width]


def jpeg(photo: Photo, quality: int, scale: float, rng: Generator) -> Photo:
    """Stored as a JPEG of low quality."""
    file = BytesIO()
    Image.fromarray(_bytes(photo)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), dtype=np.float32) / 255


def brightness(photo: Photo, added: float, scale: float, rng: Generator) -> Photo:
    """A higher value in HSV, which scales the three channels alike and makes black grey."""
    value = photo.max(axis=2, keepdims=True)
    brighter = (value + added).clip(max=1)
    return np.where(value > 0, photo * (brighter / value.clip(min=1 / 255)), brighter)


def contrast(photo: Photo, kept: float, scale: float, rng: Generator) -> Photo:
    """Less difference from each channel's mean."""
    mean = photo.mean(axis=(0, 1))
    return (photo - mean) * kept + mean


def fog(photo: Photo, settings: tuple[float, float], scale: float, rng: Generator) -> Photo:
    """Adds white fog, a plasma fractal of which the shorter side spans 224 pixels, and darkens the sum."""
    (density, decay), (height, width, _), most = settings, photo.shape, photo.max()
    rows, columns = np.arange(round(height / scale)) % FOG_SIDE, np.arange(round(width / scale)) % FOG_SIDE
    part = Image.fromarray(_plasma(decay, rng)[np.ix_(rows, columns)])
    cloud = np.asarray(part.resize((width, height), Image.Resampling.BILINEAR))[..., None]
    return (photo + density * cloud) * (most / (most + density))


def _plasma(decay: float, rng: Generator) -> NDArray[np.float32]:
    """A periodic map of heights in [0, 1] by the diamond-square algorithm: on each finer grid, new points are the mean
    of four neighbours and an offset, which is `decay` squared times smaller each time."""
    heights, most = np.zeros((1, 1)), 1.0
    while len(heights) < FOG_SIDE:
        below, right = np.roll(heights, -1, axis=0), np.roll(heights, -1, axis=1)
        finer = rng.uniform(-most, most, (2 * len(heights), 2 * len(heights)))
        middle = finer[1::2, 1::2]
        middle += (heights + below + right + np.roll(below, -1, axis=1)) / 4
        finer[::2, 1::2] += (heights + right + middle + np.roll(middle, 1, axis=0)) / 4
        finer[1::2, ::2] += (heights + below + middle + np.roll(middle, 1, axis=1)) / 4
        finer[::2, ::2] = heights
        heights, most = finer, most / decay**2
    return ((heights - heights.min()) / np.ptp(heights)).astype(np.float32)


def occlusion(photo: Photo, share: float, scale: float, rng: Generator) -> Photo:
    """A grey rectangle hides this share of both sides, at a random place."""
    worse, (tall, wide) = photo.copy(), (round(share * side) for side in photo.shape[:2])
    top, left = rng.integers(photo.shape[0] - tall + 1), rng.integers(photo.shape[1] - wide + 1)
    worse[top : top + tall, left : left + wide] = 0.5
    return worse


# Each kind, and its values for severities 1 to 5.
SEVERITIES: dict[str, tuple[Callable[..., Photo], Sequence[Any]]] = {
    "noise": (noise, (0.08, 0.12, 0.18, 0.26, 0.38)),  # standard deviation; its gaussian_noise
    "blur": (blur, (1, 2, 3, 4, 6)),  # standard deviation in pixels; its gaussian_blur
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),  # radius, deviation in pixels
    "jpeg": (jpeg, (25, 18, 15, 10, 7)),  # quality; its jpeg_compression
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),  # added to the value
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),  # share of the differences that stays
    "fog": (fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),  # thickness, decay
    "occlusion": (occlusion, (0.2, 0.3, 0.4, 0.5, 0.6)),  # share of both sides; ours
}
