"""A place-recognition dataset on disk: database and query photos with their positions in the file names.

<folder>/images/<split>/{database,queries}/**/@<UTM east>@<UTM north>@...@.jpg
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.utils.data import Dataset

from .transforms import Transform, open_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class ImageList(Dataset[Tensor]):
    """The images at the given paths, in that order, each through the transform."""

    def __init__(self, paths: Sequence[str], transform: Transform):
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(open_image(self.paths[index]))


def list_images(folder: Path) -> list[str]:
    """Paths of the images below a folder, sorted by name.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; check --eval_datasets_folder and --eval_dataset_name")
    paths = [
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not paths:
        raise ValueError(f"no image ({', '.join(IMAGE_SUFFIXES)}) in {folder}; put the photos there")
    return sorted(paths)


def utm_positions(paths: Sequence[str]) -> NDArray[np.float64]:
    """UTM east and north of each image from its file name, N x 2, in metres.

    Raises:
        ValueError: a name has no coordinates.
    """
    positions = np.empty((len(paths), 2))
    for row, path in enumerate(paths):
        try:
            # The name alone: a folder above may hold an @ too.
            _, east, north, *_ = os.path.basename(path).split("@")
            positions[row] = float(east), float(north)
        except ValueError:
            raise ValueError(
                f"no UTM coordinates in the file name {path}; name it @<UTM east>@<UTM north>@...@.jpg"
            ) from None
    return positions


@dataclass(frozen=True, kw_only=True)
class DatabaseQueries:
    """One split of a dataset; positions are N x 2 UTM east and north, in metres."""

    name: str
    database_paths: list[str]
    queries_paths: list[str]
    database_positions: NDArray[np.float64]
    queries_positions: NDArray[np.float64]

    @classmethod
    def from_folder(cls, datasets_folder: Path, name: str, split: str) -> "DatabaseQueries":
        """Lists `<datasets_folder>/<name>/images/<split>`.

        Raises:
            FileNotFoundError, ValueError: as `list_images` and `utm_positions`.
        """
        folder = datasets_folder / name / "images" / split
        database, queries = list_images(folder / "database"), list_images(folder / "queries")
        return cls(
            name=f"{name} {split}",
            database_paths=database,
            queries_paths=queries,
            database_positions=utm_positions(database),
            queries_positions=utm_positions(queries),
        )

    def __str__(self) -> str:
        return f"{self.name} ({len(self.database_paths)} database, {len(self.queries_paths)} queries)"

    @property
    def sizes(self) -> dict[str, Any]:
        """Name and number of images, for the record."""
        return {"name": self.name, "database": len(self.database_paths), "queries": len(self.queries_paths)}

    def covered_images(self, distance: float) -> list[str]:
        """Paths of the database images, and of the queries that have one of them within `distance` metres."""
        near = self.positives(distance)
        return self.database_paths + [path for path, found in zip(self.queries_paths, near, strict=True) if len(found)]

    def positives(self, distance: float) -> list[NDArray[np.int64]]:
        """For each query, the indices of the database images within `distance` metres of it (closed ball)."""
        index = NearestNeighbors().fit(self.database_positions)
        return list(index.radius_neighbors(self.queries_positions, radius=distance, return_distance=False))
