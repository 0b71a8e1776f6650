"""A place-recognition dataset on disk: database and query photos with their positions in the file names.

<folder>/images/<split>/{database,queries}/**/@<UTM east>@<UTM north>@...@.jpg
"""

import csv
import logging
import os
import pickle
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from .exif import gps_positions
from .transforms import Transform, prepare, read_pixels

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
EARTH_RADIUS = 6_371_009.0  # the mean one, in metres


class ImageList(Dataset[Tensor]):
    """The images at the given paths, in that order, each through the transform; bytes 3 x H x W without one.

    With `upright`, they are turned as their EXIF data says.
    """

    def __init__(self, paths: Sequence[str], transform: Transform | None = None, *, upright: bool = False):
        self.paths = paths
        self.transform = transform
        self.upright = upright

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        if self.transform is None:
            return read_pixels(self.paths[index], upright=self.upright)
        return prepare(self.paths[index], self.transform, upright=self.upright)


def list_images(folder: Path) -> list[str]:
    """Paths of the images below a folder, sorted by name.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}; check --eval_datasets_folder and --eval_dataset_name, or --database_folder and "
            "--queries_folder"
        )
    paths = [
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not paths:
        raise ValueError(
            f"no image ({', '.join(IMAGE_SUFFIXES)}) in {folder}; put the photos there, other formats (HEIC) converted"
        )
    return sorted(paths)


def utm_positions(paths: Sequence[str]) -> NDArray[np.float64]:
    """UTM east and north of each image from its file name, N x 2, in metres.

    Raises:
        ValueError: a name has no coordinates.
    """
    positions = _named_positions(paths)
    nowhere = _first_nowhere(positions)
    if nowhere is not None:
        raise ValueError(
            f"no UTM coordinates in the file name {paths[nowhere]}; name it @<UTM east>@<UTM north>@...@.jpg"
        )
    return positions


def _named_positions(paths: Sequence[str]) -> NDArray[np.float64]:
    """As `utm_positions`, but not a number where a name has none."""
    positions = np.full((len(paths), 2), np.nan)
    for row, path in enumerate(paths):
        with suppress(ValueError):
            # The name alone: a folder above may hold an @ too.
            _, east, north, *_ = os.path.basename(path).split("@")
            positions[row] = float(east), float(north)
    return positions


def _first_nowhere(positions: NDArray[np.float64]) -> int | None:
    nowhere = np.flatnonzero(~np.isfinite(positions).all(axis=1))
    return int(nowhere[0]) if len(nowhere) else None


def photo_positions(
    database: Sequence[str], queries: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64], bool]:
    """Positions of photos from their names or, where one has none, of all photos from their EXIF data.

    Returns:
        Of the N database photos and the Q queries, N x 2 and Q x 2; and whether these are latitude and longitude in
        degrees, rather than UTM east and north in metres.

    Raises:
        ValueError: a photo has no position of the kind that the others have.
    """
    named = [_named_positions(paths) for paths in (database, queries)]
    unnamed = [_first_nowhere(positions) for positions in named]
    if unnamed == [None, None]:
        return named[0], named[1], False
    example = queries[unnamed[1]] if unnamed[0] is None and unnamed[1] is not None else database[unnamed[0] or 0]
    taken = [gps_positions(paths) for paths in (database, queries)]
    for what, paths, positions in (("database", database, taken[0]), ("query", queries, taken[1])):
        nowhere = _first_nowhere(positions)
        if nowhere is not None:
            missing = int((~np.isfinite(positions).all(axis=1)).sum())
            raise ValueError(
                f"{missing} of {len(paths)} {what} photos have no GPS position in their EXIF data, e.g. "
                f"{paths[nowhere]}, and not all names have UTM coordinates, e.g. {example}; leave such photos out, "
                "name all of them @<UTM east>@<UTM north>@...@.jpg, or search without positions by --no_labels"
            )
    return taken[0], taken[1], True


def read_positives(path: Path, database_paths: Sequence[str], queries_paths: Sequence[str]) -> list[NDArray[np.int64]]:
    """Which database images are correct for each query, from a file.

    Args:
        path: `.csv` with a header and two columns, query and database image, a row for each correct pair, both as
            indices (from 0, in the order of the names) or as file names; or `.npy` with the indices of each query's
            correct images, as integers Q x P (negative ones are left out) or as an object array of Q arrays or lists,
            perhaps behind the query's own index as in VPR-Bench's files.
        database_paths: the database.
        queries_paths: the queries.

    Raises:
        FileNotFoundError, ValueError: the file is missing, is neither, or names what is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; check --positives_file")
    count = len(queries_paths)
    if path.suffix == ".csv":
        found: list[list[int]] = [[] for _ in range(count)]
        columns = [{os.path.basename(p): i for i, p in enumerate(paths)} for paths in (queries_paths, database_paths)]
        with open(path, newline="") as file:
            for row in list(csv.reader(file))[1:]:
                try:
                    query, image = (int(v) if v.isdigit() else names[v] for v, names in zip(row, columns, strict=True))
                    found[query].append(image)
                except (ValueError, KeyError, IndexError):
                    raise ValueError(
                        f"{path}: the row {','.join(row)!r} is not a query and a database image of this dataset, "
                        "as indices or file names; correct it"
                    ) from None
        positives = [np.array(sorted(set(images)), dtype=np.int64) for images in found]
    else:
        rows = list(_read_npy(path))
        if len(rows) != count:
            raise ValueError(f"{path} has {len(rows)} rows for {count} queries; give the file of this dataset")
        if rows and all(np.ndim(row) == 1 and len(row) == 2 and np.ndim(row[1]) == 1 for row in rows):
            rows = [row[1] for row in rows]
        try:
            positives = [np.unique([int(image) for image in np.ravel(row) if image >= 0]) for row in rows]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} does not hold arrays of database indices ({error}); give such a file") from error
        positives = [row.astype(np.int64) for row in positives]
    largest = max((row.max(initial=0) for row in positives), default=0)
    if largest >= len(database_paths):
        raise ValueError(
            f"{path} names database image {largest}, but there are {len(database_paths)}, counted from 0; "
            "give the file of this dataset"
        )
    return positives


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays of arrays and nothing else: a pickle can run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise ValueError(f"it holds {module}.{name}")


def _read_npy(path: Path) -> NDArray[Any]:
    try:
        return np.load(path)
    except (ValueError, EOFError):
        pass  # an object array, which NumPy would read by running whatever it says
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            return _ArrayUnpickler(file).load()
    except (ValueError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is not a .npy file of index arrays ({error}); give one, or a .csv") from error


def haversine_metres(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances over the mean sphere, in metres, between latitudes and longitudes in degrees, ... x 2 each."""
    a, b = np.radians(a), np.radians(b)
    squared = np.sin((b - a) / 2) ** 2  # of half the chord, along each axis
    along = squared[..., 0] + np.cos(a[..., 0]) * np.cos(b[..., 0]) * squared[..., 1]
    return 2 * EARTH_RADIUS * np.arcsin(np.sqrt(along.clip(0, 1)))


def image_key(path: str) -> str:
    """The image's own key, e.g. MSLS's: the seventh field of `@east@north@zone@letter@lat@lon@key@...`; "" without."""
    fields = os.path.basename(path).split("@")
    return fields[7] if len(fields) > 8 else ""


@dataclass(frozen=True, kw_only=True)
class DatabaseQueries:
    """One split of a dataset.

    Attributes:
        name: to show.
        database_paths: N images.
        queries_paths: Q images.
        database_positions: N x 2 UTM east and north, in metres; None where nothing is known of them.
        queries_positions: Q x 2, likewise.
        geographic: whether positions are latitude and longitude, in degrees, instead.
        known_positives: for each query the indices of its correct database images, where a file says so.
    """

    name: str
    database_paths: list[str]
    queries_paths: list[str]
    database_positions: NDArray[np.float64] | None = None
    queries_positions: NDArray[np.float64] | None = None
    geographic: bool = False
    known_positives: list[NDArray[np.int64]] | None = None

    @classmethod
    def from_folder(cls, datasets_folder: Path, name: str, split: str, **settings: Any) -> "DatabaseQueries":
        """Lists `<datasets_folder>/<name>/images/<split>/{database,queries}`, as `from_folders`."""
        folder = datasets_folder / name / "images" / split
        return cls.from_folders(folder / "database", folder / "queries", name=f"{name} {split}", **settings)

    @classmethod
    def from_folders(
        cls,
        database_folder: Path,
        queries_folder: Path,
        *,
        name: str,
        labelled: bool = True,
        exif: bool = False,
        positives_file: Path | None = None,
        query_keys: Path | None = None,
    ) -> "DatabaseQueries":
        """Lists two folders of images.

        Args:
            database_folder: searched below, too.
            queries_folder: likewise.
            name: to show.
            labelled: whether the file names hold positions; without them and a file, nothing is known to be correct.
            exif: whether photos whose names hold none have them in their EXIF data.
            positives_file: says which images are correct, see `read_positives`.
            query_keys: a text file; of the queries, those whose `image_key` stands in it are kept.

        Raises:
            FileNotFoundError, ValueError: as `list_images`, `utm_positions`, `photo_positions` and `read_positives`.
        """
        database, queries = list_images(database_folder), list_images(queries_folder)
        if query_keys is not None:
            queries = _with_keys(queries, query_keys)
        if positives_file is not None:
            positives = read_positives(positives_file, database, queries)
            return cls(name=name, database_paths=database, queries_paths=queries, known_positives=positives)
        if not labelled:
            return cls(name=name, database_paths=database, queries_paths=queries)
        if exif:
            of_database, of_queries, geographic = photo_positions(database, queries)
        else:
            of_database, of_queries, geographic = utm_positions(database), utm_positions(queries), False
        return cls(
            name=name,
            database_paths=database,
            queries_paths=queries,
            database_positions=of_database,
            queries_positions=of_queries,
            geographic=geographic,
        )

    def __str__(self) -> str:
        return f"{self.name} ({len(self.database_paths)} database, {len(self.queries_paths)} queries)"

    @property
    def sizes(self) -> dict[str, Any]:
        """Name and number of images, for the record."""
        return {"name": self.name, "database": len(self.database_paths), "queries": len(self.queries_paths)}

    @property
    def labelled(self) -> bool:
        """Whether it is known what is correct."""
        return self.known_positives is not None or self.database_positions is not None

    def covered_images(self, distance: float) -> list[str]:
        """Paths of the database images, and of the queries that have one of them within `distance` metres."""
        near = self.positives(distance)
        return self.database_paths + [path for path, found in zip(self.queries_paths, near, strict=True) if len(found)]

    def positives(self, distance: float) -> list[NDArray[np.int64]]:
        """For each query, the indices of its correct database images: those of the file, else those within `distance`
        metres of it (closed ball)."""
        if self.known_positives is not None:
            return self.known_positives
        assert self.database_positions is not None and self.queries_positions is not None
        from sklearn.neighbors import NearestNeighbors  # nearly a second to import: not at every start

        if not self.geographic:
            index = NearestNeighbors().fit(self.database_positions)
            return list(index.radius_neighbors(self.queries_positions, radius=distance, return_distance=False))
        index = NearestNeighbors(algorithm="ball_tree", metric="haversine").fit(np.radians(self.database_positions))
        queries, radius = np.radians(self.queries_positions), distance / EARTH_RADIUS
        return list(index.radius_neighbors(queries, radius=radius, return_distance=False))

    def metres(self, predictions: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """How far each query is from its predicted database images, Q x k; None without positions."""
        if self.database_positions is None or self.queries_positions is None:
            return None
        found = self.database_positions[predictions]  # (Q, k, 2)
        if not self.geographic:
            return np.linalg.norm(found - self.queries_positions[:, None], axis=2)
        return haversine_metres(self.queries_positions[:, None], found)


def _with_keys(paths: list[str], keys_file: Path) -> list[str]:
    if not keys_file.is_file():
        raise FileNotFoundError(f"no file {keys_file}; check --query_keys")
    keys = set(keys_file.read_text().replace(",", " ").split())
    kept = [path for path in paths if image_key(path) in keys]
    if not kept:
        raise ValueError(
            f"none of the {len(keys)} keys in {keys_file} is that of a query, e.g. {image_key(paths[0])!r}; "
            "give a text file of keys"
        )
    if len(kept) < len(keys):
        logger.warning("%d of the %d keys in %s are of no query", len(keys) - len(kept), len(keys), keys_file)
    return kept
