"""From an image file to a normalised tensor: the evaluation's ways of resizing, and the training augmentation.

Antialiasing is spelled out wherever an image is resized: the published numbers come from tensors resized WITHOUT it,
which today's torchvision would not do by default.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PATCH_SIZE = 14  # in pixels; an image's sides are multiples of it

Size = tuple[int, int]  # height, width in pixels
Transform = Callable[[Image.Image], Tensor]


def open_image(path: Path | str) -> Image.Image:
    """Reads an image file as RGB.

    Raises:
        ValueError: it cannot be read; the message names the file.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {path} ({error}); replace or remove it") from error


def normalize(image: Tensor) -> Tensor:
    """Takes out ImageNet's mean and standard deviation from values in [0, 1], ... x 3 x H x W."""
    return TF.normalize(image, IMAGENET_MEAN, IMAGENET_STD)


def to_unit_tensor(image: Image.Image) -> Tensor:
    """3 x H x W in [0, 1]."""
    return TF.pil_to_tensor(image).float().div_(255)


def _resize(image: Tensor, size: Size, antialias: bool) -> Tensor:
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=antialias)[0]


def shorter_side_to(image: Tensor, side: int, *, antialias: bool) -> Tensor:
    """Resizes 3 x H x W so that the shorter side has `side` pixels and the longer int(side * longer / shorter)."""
    height, width = image.shape[-2:]
    shorter = min(height, width)
    return _resize(image, (side * height // shorter, side * width // shorter), antialias)


def hard_resize(image: Image.Image, *, size: Size, antialias: bool) -> Tensor:
    """Both sides to `size`: 3 x H x W, normalised."""
    # Normalising after the resize is the same (both are linear) and has far fewer pixels to go over.
    return normalize(_resize(to_unit_tensor(image), size, antialias))


def single_query(image: Image.Image, *, size: Size, antialias: bool) -> Tensor:
    """The shorter side to min(size), the shape kept, then centre-cropped to whole patches: 3 x H' x W', normalised."""
    resized = shorter_side_to(to_unit_tensor(image), min(size), antialias=antialias)
    height, width = (side // PATCH_SIZE * PATCH_SIZE for side in resized.shape[-2:])
    return normalize(TF.center_crop(resized, [height, width]))


def central_crop(image: Image.Image, *, size: Size, antialias: bool) -> Tensor:
    """Scaled until it covers `size` (nearest neighbour, as the benchmark does), centre-cropped: 3 x H x W, normalised.

    `antialias` has no part in nearest-neighbour sampling.
    """
    pixels = normalize(to_unit_tensor(image))
    scale = max(size[0] / image.height, size[1] / image.width)
    scaled = F.interpolate(pixels[None], scale_factor=scale, mode="nearest")[0]
    # A side may come out one pixel short; the crop then pads with zeros, hence after the normalisation.
    return TF.center_crop(scaled, list(size))


def five_crops(image: Image.Image, *, size: Size, antialias: bool) -> Tensor:
    """The shorter side to S = min(size), then squares of that side: 5 x 3 x S x S, normalised.

    In the order top-left, top-right, bottom-left, bottom-right, centre.
    """
    side = min(size)
    resized = shorter_side_to(to_unit_tensor(image), side, antialias=antialias)
    return normalize(torch.stack(TF.five_crop(resized, [side, side])))


# How the benchmark prepares queries, by the name of the test method; the last two differ in what follows the search.
TEST_METHODS: dict[str, Callable[..., Tensor]] = {
    "hard_resize": hard_resize,
    "single_query": single_query,
    "central_crop": central_crop,
    "five_crops": five_crops,
    "nearest_crop": five_crops,
    "maj_voting": five_crops,
}

# Of a query, by test method.
CROPS = {name: 5 if transform is five_crops else 1 for name, transform in TEST_METHODS.items()}


def evaluation_transform(size: Size, antialias: bool = False, test_method: str = "hard_resize") -> Transform:
    """A test method with its `size` (height, width)."""
    return partial(TEST_METHODS[test_method], size=size, antialias=antialias)


class TrainingTransform:
    """Pillow's bilinear resize, RandAugment, normalisation: 3 x H x W.

    Args:
        size: height, width in pixels.
        randaugment_ops: operations an image; 0 leaves RandAugment out.

    RandAugment draws from torch's global generator.
    """

    def __init__(self, size: Size, randaugment_ops: int = 3):
        self.size = size
        self.augment = (
            v2.RandAugment(num_ops=randaugment_ops, interpolation=InterpolationMode.BILINEAR)
            if randaugment_ops
            else None
        )

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.size
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        if self.augment is not None:
            image = self.augment(image)
        return normalize(to_unit_tensor(image))
