"""Pixels as they are read, and as they are prepared for the model."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from datasets.photos.transforms import evaluation_transform, open_image, read_pixels

SIDEWAYS = Image.Exif()  # an orientation that neither way of reading applies
SIDEWAYS[0x0112] = 6


def test_evaluation_resize_does_not_antialias_unless_asked():
    photo = torch.randint(0, 256, (1, 3, 280, 280), dtype=torch.uint8)
    plain = evaluation_transform((28, 28))(photo)
    smooth = evaluation_transform((28, 28), antialias=True)(photo)
    assert plain.shape == smooth.shape == (1, 3, 28, 28)
    assert plain.std() > 2 * smooth.std()


@pytest.mark.parametrize("read", [open_image, read_pixels])
def test_unreadable_image_is_named(tmp_path, read):
    Image.new("RGB", (50, 50)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:300])
    (tmp_path / "text.jpg").write_bytes(b"not a photo")
    for name in ("cut.jpg", "text.jpg", "none.jpg"):
        with pytest.raises(ValueError, match=f"{name}.*--skip_unreadable"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("mode", "name", "settings"),
    [
        ("RGB", "a.jpg", {}),
        ("RGB", "a.JPEG", {"progressive": True, "quality": 40}),
        ("RGB", "a.jpg", {"subsampling": 0, "quality": 95}),
        ("RGB", "a.jpg", {"subsampling": 1}),
        ("RGB", "a.jpg", {"exif": SIDEWAYS}),
        ("L", "a.jpg", {}),
        ("CMYK", "a.jpg", {}),
        ("RGB", "a.png", {}),
        ("P", "a.png", {}),
        ("L", "png_in_truth.jpg", {"format": "PNG"}),
    ],
)
def test_pixels_are_those_of_pillow(city, tmp_path, mode, name, settings):
    photo = Image.open(next((city / "toy_city/images/test/queries").iterdir())).resize((97, 61))
    photo.convert(mode).save(tmp_path / name, **settings)
    pixels = read_pixels(tmp_path / name)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 61, 97)
    assert torch.equal(pixels, pil_to_tensor(open_image(tmp_path / name)))
