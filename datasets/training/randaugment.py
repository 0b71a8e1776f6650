"""RandAugment (Cubuk et al. 2020) on Pillow images: the same bits and random draws as torchvision, in less time.

It skips torchvision's bookkeeping, and resampling if an image is only moved by whole pixels. Fourteen operations at
magnitude 9 of 0 to 30, as in the recipe.
"""

import math
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

BILINEAR = InterpolationMode.BILINEAR
Operation = Callable[[Image.Image, float], Image.Image]


def _shear_x(image: Image.Image, level: float) -> Image.Image:
    return _sheared(image, [math.degrees(math.atan(level)), 0.0])


def _shear_y(image: Image.Image, level: float) -> Image.Image:
    return _sheared(image, [0.0, math.degrees(math.atan(level))])


def _sheared(image: Image.Image, degrees: list[float]) -> Image.Image:
    return TF.affine(
        image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, interpolation=BILINEAR, center=[0, 0]
    )


def _moved(image: Image.Image, right: int, down: int) -> Image.Image:
    canvas = Image.new(image.mode, image.size)
    canvas.paste(image, (right, down))
    return canvas


def _same(image: Image.Image, _: float) -> Image.Image:
    return image


def _move_right(image: Image.Image, pixels: float) -> Image.Image:
    return _moved(image, int(pixels), 0)


def _move_down(image: Image.Image, pixels: float) -> Image.Image:
    return _moved(image, 0, int(pixels))


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return TF.rotate(image, degrees, interpolation=BILINEAR)


def _brightness(image: Image.Image, change: float) -> Image.Image:
    return TF.adjust_brightness(image, 1.0 + change)


def _saturation(image: Image.Image, change: float) -> Image.Image:
    return TF.adjust_saturation(image, 1.0 + change)


def _contrast(image: Image.Image, change: float) -> Image.Image:
    return TF.adjust_contrast(image, 1.0 + change)


def _sharpness(image: Image.Image, change: float) -> Image.Image:
    return TF.adjust_sharpness(image, 1.0 + change)


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    return TF.posterize(image, int(bits))


def _solarize(image: Image.Image, share: float) -> Image.Image:
    return TF.solarize(image, 255.0 * share)


def _autocontrast(image: Image.Image, _: float) -> Image.Image:
    return TF.autocontrast(image)


def _equalize(image: Image.Image, _: float) -> Image.Image:
    return TF.equalize(image)


class RandAugment:
    """Applies `num_ops` random operations to images of `size` (height, width), drawn from torch's global generator."""

    def __init__(self, num_ops: int, size: tuple[int, int]):
        height, width = size

        def level(largest: float) -> float:
            return float(torch.linspace(0.0, largest, 31)[9])

        # In torchvision's order: the operation, its level, and whether the level's sign is drawn.
        self.operations: list[tuple[Operation, float, bool]] = [
            (_same, 0.0, False),
            (_shear_x, level(0.3), True),
            (_shear_y, level(0.3), True),
            (_move_right, level(150.0 / 331.0 * width), True),
            (_move_down, level(150.0 / 331.0 * height), True),
            (_rotate, level(30.0), True),
            (_brightness, level(0.9), True),
            (_saturation, level(0.9), True),
            (_contrast, level(0.9), True),
            (_sharpness, level(0.9), True),
            (_posterize, 7.0, False),
            (_solarize, float(torch.linspace(1.0, 0.0, 31)[9]), False),
            (_autocontrast, 0.0, False),
            (_equalize, 0.0, False),
        ]
        self.num_ops = num_ops

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(self.num_ops):
            operation, level, signed = self.operations[int(torch.randint(len(self.operations), ()))]
            if signed and torch.rand(()) <= 0.5:
                level = -level
            image = operation(image, level)
        return image


class TrainingTransform:
    """Pillow's bilinear resize to `size` (height, width) and RandAugment: bytes, 3 x H x W."""

    def __init__(self, size: tuple[int, int], randaugment_ops: int = 3):
        self.size = size
        self.augment = RandAugment(randaugment_ops, size)

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.size
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return TF.pil_to_tensor(self.augment(image))
