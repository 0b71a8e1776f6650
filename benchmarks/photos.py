"""Photos to measure with: 640 x 480 JPEGs as heavy as street photos, made from the toy city."""

from pathlib import Path

import numpy as np
from PIL import Image

from datasets.toy_city import write_toy_city


def made_photos(folder: Path, *, count: int, size: tuple[int, int] = (640, 480)) -> list[str]:
    """Writes `count` photos (width, height) with the noise of a camera, about 100 kB each; finds them the next time."""
    paths = [folder / f"{index:04d}_{size[0]}x{size[1]}.jpg" for index in range(count)]
    if not all(path.exists() for path in paths):
        write_toy_city(
            folder / "city",
            train_streets=1, places=1, visits=4, val_streets=1, cluster_streets=1, test_streets=2, spots=8, size=size,
            overwrite=True,
        )  # fmt: skip
        views = sorted((folder / "city").rglob("*.jpg"))
        rng = np.random.default_rng(0)
        for index, path in enumerate(paths):
            pixels = np.asarray(Image.open(views[index % len(views)]).resize(size), dtype=np.float32)
            noisy = pixels + rng.normal(0, 8, pixels.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=88)
    return [str(path) for path in paths]
