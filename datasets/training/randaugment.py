"""RandAugment (Cubuk et al. 2020) on Pillow images: the same bits and random draws as torchvision, in less time.

It skips torchvision's bookkeeping, and resampling if an image is only moved by whole pixels. Fourteen operations at
magnitude 9 of 0 to 30, as in the recipe.
"""

import math

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF


def level_of(largest: float) -> float:
    """Magnitude 9 of 31 from 0 to the largest."""
    return float(torch.linspace(0.0, largest, 31)[9])


def applied(operation: str, image: Image.Image, level: float) -> Image.Image:
    """The image after an operation of torchvision's name; `level` in its units, with its sign."""
    match operation:
        case "ShearX" | "ShearY":
            angle = math.degrees(math.atan(level))
            shear = [angle, 0.0] if operation == "ShearX" else [0.0, angle]
            settings = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "center": [0, 0]}
            return TF.affine(image, shear=shear, interpolation=InterpolationMode.BILINEAR, **settings)
        case "TranslateX" | "TranslateY":
            canvas = Image.new(image.mode, image.size)
            canvas.paste(image, (int(level), 0) if operation == "TranslateX" else (0, int(level)))
            return canvas
        case "Rotate":
            return TF.rotate(image, level, interpolation=InterpolationMode.BILINEAR)
        case "Brightness":
            return TF.adjust_brightness(image, 1.0 + level)
        case "Color":
            return TF.adjust_saturation(image, 1.0 + level)
        case "Contrast":
            return TF.adjust_contrast(image, 1.0 + level)
        case "Sharpness":
            return TF.adjust_sharpness(image, 1.0 + level)
        case "Posterize":
            return TF.posterize(image, int(level))
        case "Solarize":
            return TF.solarize(image, 255.0 * level)
        case "AutoContrast":
            return TF.autocontrast(image)
        case "Equalize":
            return TF.equalize(image)
    return image


class TrainingTransform:
    """Pillow's bilinear resize to `size` (height, width) and `randaugment_ops` random operations: bytes, 3 x H x W.

    Random numbers come from torch's global generator.
    """

    def __init__(self, size: tuple[int, int], randaugment_ops: int = 3):
        self.size = size
        self.randaugment_ops = randaugment_ops
        height, width = size
        # In torchvision's order: the operation, its level, and whether the level's sign is drawn.
        self.operations = [
            ("Identity", 0.0, False),
            ("ShearX", level_of(0.3), True),
            ("ShearY", level_of(0.3), True),
            ("TranslateX", level_of(150.0 / 331.0 * width), True),
            ("TranslateY", level_of(150.0 / 331.0 * height), True),
            ("Rotate", level_of(30.0), True),
            ("Brightness", level_of(0.9), True),
            ("Color", level_of(0.9), True),
            ("Contrast", level_of(0.9), True),
            ("Sharpness", level_of(0.9), True),
            ("Posterize", 7.0, False),
            ("Solarize", float(torch.linspace(1.0, 0.0, 31)[9]), False),
            ("AutoContrast", 0.0, False),
            ("Equalize", 0.0, False),
        ]

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.size
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        for _ in range(self.randaugment_ops):
            operation, level, signed = self.operations[int(torch.randint(len(self.operations), ()))]
            if signed and torch.rand(()) <= 0.5:
                level = -level
            image = applied(operation, image, level)
        return TF.pil_to_tensor(image)
