"""Corrupted photos: what is drawn depends on little, severities grow, lengths follow the photo's size."""

import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.photos.corruptions import SEVERITIES, corrupt
from datasets.photos.transforms import read_pixels
from parser import CORRUPTIONS

DRAWN = ("noise", "motion_blur", "fog", "occlusion")


@pytest.fixture(scope="module")
def photos(city):
    """Three photos of 120 x 160, by path."""
    paths = sorted(map(str, (city / "toy_city/images/test/queries").iterdir()))[::5]
    return {path: read_pixels(Image.open(path).resize((160, 120))) for path in paths}


def bytes_of(pixels, path, corruption, seed=0):
    return corrupt(pixels, path, corruption=corruption, seed=seed).numpy().tobytes()


@pytest.mark.parametrize("kind", SEVERITIES)
def test_what_is_drawn_depends_on_seed_name_and_severity_alone(photos, kind):
    """A name need not be UTF-8, and its folder does not count."""
    pixels = next(iter(photos.values()))
    others = {bytes_of(pixels, name, f"{kind}:3", seed) for name in ("a.jpg", "\udcff.jpg") for seed in (0, 1)}
    assert len(others) == (4 if kind in DRAWN else 1)
    assert bytes_of(pixels, "/folder/a.jpg", f"{kind}:3") == bytes_of(pixels, "a.jpg", f"{kind}:3")
    assert bytes_of(pixels, "a.jpg", f"{kind}:2") not in others


@pytest.mark.parametrize("kind", SEVERITIES)
def test_severity_grows(photos, kind):
    distances = []
    for severity in range(1, 6):
        worse = [corrupt(pixels, path, corruption=f"{kind}:{severity}", seed=0) for path, pixels in photos.items()]
        differences = [each.float() - clean for each, clean in zip(worse, photos.values(), strict=True)]
        distances.append(np.mean([float(each.square().mean()) for each in differences]))
    assert distances == sorted(distances) and distances[0] > 1


@pytest.mark.parametrize("kind", ["blur", "motion_blur", "fog", "occlusion"])
def test_lengths_follow_the_shorter_side(photos, kind):
    """Twice as large, made worse and reduced is about as made worse when small."""
    for path, pixels in photos.items():
        large = pixels.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        reduced = corrupt(large, path, corruption=f"{kind}:4", seed=0).float().reshape(3, 120, 2, 160, 2).mean((2, 4))
        small = corrupt(pixels, path, corruption=f"{kind}:4", seed=0).float()
        assert (reduced - small).abs().mean() < 0.15 * (pixels - small).abs().mean()


@pytest.mark.parametrize(("mode", "size"), [("L", (40, 30)), ("P", (40, 30)), ("RGB", (8, 8)), ("RGB", (650, 250))])
def test_any_photo_will_do(tmp_path, mode, size):
    Image.effect_noise(size, 99).convert(mode).save(tmp_path / "a.png")
    pixels = read_pixels(tmp_path / "a.png")
    for kind in SEVERITIES:
        for photo in (pixels, torch.zeros_like(pixels)):
            worse = corrupt(photo, "a.png", corruption=f"{kind}:5", seed=0)
            assert worse.shape == photo.shape and worse.dtype == torch.uint8


def test_each_kind_is_what_it_says():
    """Of 224 x 224, the size of ImageNet-C."""
    black, pixels = torch.zeros(3, 224, 224, dtype=torch.uint8), torch.randint(0, 256, (3, 224, 224)).byte()
    pixels[:, :, 0] = 0
    x = pixels.numpy() / 255

    def worse(corruption, photo=pixels):
        return corrupt(photo, "a.jpg", corruption=corruption, seed=0).numpy() / 255

    assert np.std(worse("noise:2", black + 128)) == pytest.approx(0.12, rel=0.01)
    for column in (0, 1):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[:, 5, column])
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))
        np.testing.assert_allclose(worse("brightness:3")[:, 5, column], expected, atol=1 / 255)
    means = x.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(worse("contrast:1"), (x - means) * 0.4 + means, atol=1 / 255)
    hidden = (worse("occlusion:3", black) > 0).all(axis=0)
    assert {*hidden.sum(axis=0)} == {*hidden.sum(axis=1)} == {0, 90}  # 0.4 of the sides
    line = black.clone()
    line[:, :, 112] = 255
    weights = worse("motion_blur:2", line)[0, 112]  # smeared to one side, over 31 pixels along it at most
    assert weights[:112].max() == 0 and (weights > 0).sum() > 8 and weights[112 + 31 :].max() == 0
    assert weights.sum() == pytest.approx(1, abs=0.05)
    foggy = worse("fog:5", black + 255)  # (1 + 3 * plasma) / 4
    assert (foggy.min(), foggy.max()) == (pytest.approx(0.25, abs=0.1), pytest.approx(1, abs=0.1))


def test_the_table_of_the_page_is_that_of_the_code():
    assert tuple(SEVERITIES) == CORRUPTIONS
    lines = (Path(__file__).parents[2] / "docs/evaluation.md").read_text().splitlines()
    for kind, (_, values) in SEVERITIES.items():
        (row,) = [line for line in lines if line.startswith(f"| `{kind}` |")]
        written = [", ".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values]
        assert [cell.strip() for cell in row.split("|")[3].split(";")] == written
