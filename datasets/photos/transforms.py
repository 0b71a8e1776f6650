"""From an image file to a normalised tensor: the test methods of evaluation.

Antialiasing is explicit wherever an image is resized: the published numbers come from tensors resized WITHOUT it, while
today's torchvision antialiases by default.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from .exif import cannot_read, opened, orientation, orientation_of, turned
from .pixel_modes import to_rgb

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Size = tuple[int, int]  # height, width in pixels
Transform = Callable[[Tensor], Tensor]


def open_image(path: Path | str) -> Image.Image:
    """Reads an image file of any mode as RGB, see `pixel_modes`; ValueError names a file that cannot be read."""
    return open_noted(path)[0]


def open_noted(path: Path | str) -> tuple[Image.Image, str]:
    """Like `open_image`, and how more than 8 bits per channel became 8, see `pixel_modes.to_rgb`."""
    try:
        with opened(path) as image:
            return to_rgb(image)
    except Exception as error:  # decoders fail on damaged files in many ways
        raise cannot_read(path, error) from error


def read_pixels(photo: Path | str | Image.Image, *, upright: bool = False) -> Tensor:
    """Reads a file, or a Pillow image, as RGB: bytes, 3 x H x W; `upright`: turned as its EXIF data says.

    torchvision reads JPEGs in colour or grey, which gives the same bytes as Pillow in less time. Pillow reads all else,
    and what torchvision cannot.

    Raises:
        ValueError: it cannot be read; the message names the file.
    """
    if isinstance(photo, Image.Image):
        pixels = TF.pil_to_tensor(to_rgb(photo)[0])
        return turned(pixels, orientation_of(photo)) if upright else pixels
    return read_noted(photo, upright=upright)[0]


def read_noted(path: Path | str, *, upright: bool = False) -> tuple[Tensor, bool]:
    """Like `read_pixels`, and whether the file has more than 8 bits per channel."""
    pixels, deep = _decoded(os.fspath(path))
    if upright:
        try:
            pixels = turned(pixels, orientation(path))
        except Exception as error:  # Pillow refuses some files that torchvision reads
            raise cannot_read(path, error) from error
    return pixels, deep


def _decoded(path: str) -> tuple[Tensor, bool]:
    if path.lower().endswith((".jpg", ".jpeg")):
        try:
            # What torchvision.io calls, which adds a warning that it will move; as in the file, and not turned.
            pixels = torch.ops.image.decode_jpeg(torch.ops.image.read_file(path), 0, False)
            if len(pixels) < 4:  # else they are CMYK, which Pillow converts differently
                # Grey is copied, since memory shared by channels cannot be pinned.
                return (pixels if len(pixels) == 3 else pixels.repeat(3, 1, 1)), False
        except (RuntimeError, AttributeError):  # the latter where torchvision is built without JPEG
            pass  # Pillow reads it, or reports what is wrong
    image, how = open_noted(path)
    return TF.pil_to_tensor(image), bool(how)


def read_reduced(path: Path | str, side: int, *, upright: bool = False) -> Image.Image:
    """Like `read_pixels`, for display with sides of at most `side` pixels: JPEGs are decoded no larger than needed."""
    with suppress(OSError, SyntaxError), JpegImageFile(path) as file:  # the latter for any other format
        if file.mode != "CMYK":
            file.draft("RGB", (side, side))
            pixels = TF.pil_to_tensor(file.convert("RGB"))
            return TF.to_pil_image(turned(pixels, orientation_of(file)) if upright else pixels)
    return TF.to_pil_image(read_pixels(path, upright=upright))


def normalize(image: Tensor, inplace: bool = False) -> Tensor:
    """Normalises values in [0, 1], ... x 3 x H x W, by ImageNet's mean and standard deviation."""
    mean, std = _statistics(image.device, image.dtype)
    return (image.sub_(mean) if inplace else image.sub(mean)).div_(std)


@cache
def _statistics(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and standard deviation, 3 x 1 x 1 each; cached, since copying them to a GPU waits for it."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(of, dtype=dtype, device=device) for of in (IMAGENET_MEAN, IMAGENET_STD))
        return mean.view(3, 1, 1), std.view(3, 1, 1)


def to_unit(pixels: Tensor) -> Tensor:
    """Bytes to [0, 1]."""
    return pixels.float().div_(255)


_resize = partial(F.interpolate, mode="bilinear", align_corners=False)


def shorter_side_to(images: Tensor, side: int, *, antialias: bool) -> Tensor:
    """Resizes B x 3 x H x W so that the shorter side has `side` pixels and the longer int(side * longer / shorter)."""
    height, width = images.shape[-2:]
    shorter = min(height, width)
    return _resize(images, (side * height // shorter, side * width // shorter), antialias=antialias)


def hard_resize(pixels: Tensor, *, size: Size, antialias: bool) -> Tensor:
    """Both sides to `size`: bytes B x 3 x H x W to B x 3 x H' x W', normalised."""
    # Resized before normalising: both are linear, so the result is the same with far fewer pixels. But not before the
    # conversion to float: bytes would be rounded.
    return normalize(_resize(to_unit(pixels), size, antialias=antialias), inplace=True)


def single_query(pixels: Tensor, *, size: Size, antialias: bool, patch_size: int = 14) -> Tensor:
    """The shorter side to min(size), the shape kept, centre-cropped to whole patches: B x 3 x H' x W', normalised."""
    resized = shorter_side_to(to_unit(pixels), min(size), antialias=antialias)
    height, width = (side // patch_size * patch_size for side in resized.shape[-2:])
    return normalize(TF.center_crop(resized, [height, width]))


def central_crop(pixels: Tensor, *, size: Size, antialias: bool) -> Tensor:
    """Scaled to cover `size`, then centre-cropped: B x 3 x H' x W', normalised; `antialias` has no effect."""
    height, width = pixels.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    # By nearest neighbour, as the benchmark does.
    scaled = F.interpolate(normalize(to_unit(pixels), inplace=True), scale_factor=scale, mode="nearest")
    # A side may be one pixel short; the crop then pads with zeros, so it follows the normalisation.
    return TF.center_crop(scaled, list(size))


def five_crops(pixels: Tensor, *, size: Size, antialias: bool) -> Tensor:
    """The shorter side to S = min(size), then its corners and centre: B x 5 x 3 x S x S, normalised."""
    side = min(size)
    resized = shorter_side_to(to_unit(pixels), side, antialias=antialias)
    return normalize(torch.stack(TF.five_crop(resized, [side, side]), dim=1), inplace=True)


# How the benchmark prepares queries, by test method; the last two differ in what follows the search.
TEST_METHODS: dict[str, Callable[..., Tensor]] = {
    "hard_resize": hard_resize,
    "single_query": single_query,
    "central_crop": central_crop,
    "five_crops": five_crops,
    "nearest_crop": five_crops,
    "maj_voting": five_crops,
}

# Crops per query, by test method.
CROPS = {name: 5 if transform is five_crops else 1 for name, transform in TEST_METHODS.items()}


def evaluation_transform(
    size: Size, antialias: bool = False, test_method: str = "hard_resize", *, patch_size: int = 14
) -> Transform:
    """A test method with its `size` (height, width): bytes B x 3 x H x W, on any device, to the model's input.

    `patch_size` is the backbone's, in pixels: `single_query` crops to whole patches.
    """
    transform = partial(TEST_METHODS[test_method], size=size, antialias=antialias)
    return partial(transform, patch_size=patch_size) if test_method == "single_query" else transform


def prepare(
    photo: Path | str | Image.Image | Tensor, transform: Transform | None = None, *, upright: bool = True
) -> Tensor:
    """Turns a photo into model input. eval.py and torch.hub's `prepare` call this, so that descriptors are the same.

    The defaults are those of eval.py for plain folders. A benchmark's photo, as published, is
    `prepare(photo, evaluation_transform((322, 322)), upright=False)`: neither antialiased nor turned.

    Args:
        photo: path of a file, a Pillow image, or pixels from `read_pixels`.
        transform: from `evaluation_transform`; by default both sides to 322 pixels (DINOv2's size), antialiased.
        upright: turn the photo as its EXIF data says.

    Returns:
        The transformed photo, normalised: (crops x) 3 x H x W.

    Raises:
        ValueError: it cannot be read; the message names the file.
    """
    transform = transform or evaluation_transform((322, 322), antialias=True)
    pixels = photo if isinstance(photo, Tensor) else read_pixels(photo, upright=upright)
    return transform(pixels[None])[0]


def transform_sizes(transform: Transform, images: Sequence[Tensor]) -> Tensor:
    """Applies a transform to images of several sizes, batched by size; B x ..., in the order of the images."""
    by_size: dict[torch.Size, list[int]] = {}
    for index, pixels in enumerate(images):
        by_size.setdefault(pixels.shape, []).append(index)
    done: dict[int, Tensor] = {}
    for indices in by_size.values():
        done.update(zip(indices, transform(torch.stack([images[index] for index in indices])), strict=True))
    return torch.stack([done[index] for index in range(len(images))])
