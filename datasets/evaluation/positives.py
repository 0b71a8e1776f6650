"""Which database images are correct for each query: those within a distance, or those that a file says.

A file has one of three forms. An index in it counts the photos of its side by name or, if all names of a side are plain
numbers, by number, as in VPR-Bench.
"""

import csv
import io
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.system.files import read_text

from ..photos.positions import EARTH_RADIUS, known
from .object_arrays import object_rows

logger = logging.getLogger(__name__)

PAIRS_TOGETHER = 2**20  # pairs of a query and a database image at a time: all of them may be positives
FORMS = (
    "give positives_file a .csv with the header `query,database` and a row of names or indices for each correct pair, "
    "a .npy with a boolean matrix, queries x database, or with each query's indices, padded by -1, or VPR-Bench's .npy"
)


class Near(Sequence[NDArray[np.int64]]):
    """For each query, the database images within a distance; computed at each pass, since dense ones fill the memory.

    Args:
        database: N x 2 positions, NaN where unknown; at least one is known.
        queries: Q x 2, likewise.
        geographic: whether these are latitude and longitude in degrees rather than metres.
        distance: in metres, inclusive.
    """

    def __init__(
        self, database: NDArray[np.float64], queries: NDArray[np.float64], *, geographic: bool, distance: float
    ):
        from sklearn.neighbors import BallTree, KDTree  # takes nearly a second to import

        self._images = np.flatnonzero(known(database))
        located = database[self._images]
        self._tree: Any
        if geographic:
            self._tree = BallTree(np.radians(located), leaf_size=30, metric="haversine")
            self._queries, self._radius = np.radians(queries), distance / EARTH_RADIUS
        else:
            self._tree = KDTree(located, leaf_size=30)
            self._queries, self._radius = queries, distance

    def __len__(self) -> int:
        return len(self._queries)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        step = max(1, PAIRS_TOGETHER // len(self._images))
        for start in range(0, len(self), step):
            yield from self._of(slice(start, start + step))

    def __getitem__(self, query: Any) -> Any:
        index = range(len(self))[query]
        return next(self._of(slice(index, index + 1)))

    def _of(self, some: slice) -> Iterator[NDArray[np.int64]]:
        queries = self._queries[some]
        located = known(queries)
        images = iter(self._tree.query_radius(queries[located], self._radius) if located.any() else ())
        for is_located in located:
            yield self._images[next(images)] if is_located else self._images[:0]


def read_positives(
    path: Path,
    database_paths: Sequence[str],
    queries_paths: Sequence[str],
    folders: tuple[Path, Path] = (Path(), Path()),
) -> list[NDArray[np.int64]]:
    """Reads from a file which database images are correct for each query.

    Args:
        path: in one of the `FORMS`, of shape Q x N for a matrix and Q x P for indices, which count from 0; names may
            have folders. For VPR-Bench's form see `object_rows`.
        database_paths, queries_paths: the N images of the database and the Q queries, sorted.
        folders: folders of database and queries, to which paths in the file may be relative.

    Returns:
        For each query, in the order of `queries_paths`, sorted indices of `database_paths`.

    Raises:
        ValueError: it is missing, has another form, or names missing photos; the message says where.
    """
    sides = _Side("database image", database_paths, folders[0]), _Side("query", queries_paths, folders[1])
    read = {".csv": _of_pairs, ".npy": _of_array}.get(path.suffix.lower())
    try:
        if read is None:
            raise ValueError("neither .csv nor .npy")
        positives = read(path, *sides)
        if not any(map(len, positives)):
            raise ValueError("it has no correct image for any query")
    except Exception as error:  # a damaged file fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0][:400]
        raise ValueError(f"{path}: {reason}; {FORMS}") from error
    query, image = next((query, images[0]) for query, images in enumerate(positives) if len(images))
    counts, example = (sum(map(len, positives)), len(positives)), (queries_paths[query], database_paths[image])
    logger.info("%s: %d correct images for %d queries; for %s the first is %s", path, *counts, *example)
    return positives


def counted(paths: Sequence[str], what: str) -> NDArray[np.int64]:
    """What the indices 0, 1, 2, ... in a file mean, as indices of sorted paths: their order, or that of the numbers if
    every name is one. These count photos in several folders through, unless a number appears twice. The log says which,
    where the two differ."""
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    plain = all(re.fullmatch("[0-9]+", stem) for stem in stems)
    through = plain and len(set(map(int, stems))) == len(stems)

    def numbers(index: int) -> list[int | str]:
        parts = re.split("([0-9]+)", stems[index] if through else paths[index].replace(os.sep, "\0"))
        return [int(part) if number % 2 else part for number, part in enumerate(parts)]  # every second one is a number

    as_text = range(len(paths))
    as_numbers = sorted(as_text, key=numbers)
    order, other = np.array((as_numbers, as_text) if plain else (as_text, as_numbers), dtype=np.int64)
    if (order != other).any():
        index = int(np.argmax(order != other))
        level, kind = (logging.INFO, "a number") if plain else (logging.WARNING, "text")
        names = (os.path.basename(paths[photos[index]]) for photos in (order, other))
        wording = "the positives file counts each %s by its name as %s: %d is %s, not %s"
        logger.log(level, wording, what, kind, index, *names)
    return order


class _Side:
    """The photos that a column of names or indices refers to."""

    def __init__(self, what: str, paths: Sequence[str], folder: Path):
        self.what, self.paths, self.folder = what, paths, folder
        self.by_name: dict[str, list[int]] = defaultdict(list)
        for index, path in enumerate(paths):
            self.by_name[os.path.basename(path)].append(index)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        return counted(self.paths, self.what)

    def index(self, cell: str) -> int:
        """The photo of an index, or of a file name with or without folders above it."""
        if re.fullmatch("[0-9]{1,18}", cell):
            if int(cell) >= len(self.paths):
                raise ValueError(f"{self.what} {cell} of {len(self.paths)}, counted from 0")
            return int(self.order[int(cell)])
        path, ending = os.path.abspath(self.folder / cell), os.sep + os.path.normpath(cell)
        named = {i: os.path.abspath(self.paths[i]) for i in self.by_name.get(os.path.basename(path), [])}
        matches = [i for i in named if named[i] == path] or [i for i in named if named[i].endswith(ending)]
        if len(matches) != 1:
            examples = "".join(f", {self.paths[i]}" for i in matches[:2])
            raise ValueError(f"{len(matches)} {self.what} files are named {cell[:200]!r}{examples}; give one's path")
        return matches[0]


def _of_pairs(path: Path, database: _Side, queries: _Side) -> list[NDArray[np.int64]]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    images: list[set[int]] = [set() for _ in queries.paths]
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if header != ["query", "database"]:
            raise ValueError(f"the header is {','.join(header)[:200]!r}")
        for query, image in filter(None, reader):
            images[queries.index(query.strip())].add(database.index(image.strip()))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    return [np.array(sorted(of_query), dtype=np.int64) for of_query in images]


def _of_array(path: Path, database: _Side, queries: _Side) -> list[NDArray[np.int64]]:
    content = io.BytesIO(path.read_bytes())
    version = np.lib.format.read_magic(content)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(content)
    count, images = len(queries.paths), len(database.paths)
    matrix = dtype.kind == "b"
    if dtype.kind == "O":
        rows: Any = object_rows(content.read(), count)
    elif dtype.kind not in "biu" or len(shape) != 2 or shape[0] != count or (matrix and shape[1] != images):
        raise ValueError(f"values of type {dtype}, shape {shape}, for {count} queries and {images} database images")
    else:  # of as many bytes as there are: a header may state any shape
        values = np.frombuffer(content.getbuffer()[content.tell() :], dtype)
        rows = values.reshape(shape, order="F" if fortran else "C")
    positives = {}
    for number, (query, row) in enumerate(zip(queries.order, rows, strict=True)):
        try:
            indices = np.flatnonzero(row) if matrix else _indices(row, images)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        positives[query] = np.sort(database.order[indices])
    return [positives[query] for query in range(count)]


def _indices(row: Sequence[Any] | NDArray[Any], database: int) -> NDArray[np.int64]:
    """The indices in a row, each once and below the number of database images, without what pads them."""
    if not isinstance(row, np.ndarray) or row.dtype == object:
        if len(row) > database or not all(type(value) in (int, float) for value in row):
            raise ValueError(f"not a list of numbers, or {len(row)} of them for {database} database images")
        row = np.array(row, dtype=np.float64)
    indices = row[row != -1]
    wrong = indices[~((indices >= 0) & (indices < database) & (indices == np.floor(indices)))]
    if row.dtype == bool or len(wrong):
        raise ValueError(f"{wrong[0] if len(wrong) else row[0]} is no index of {database} database images from 0")
    if len(np.unique(indices)) < len(indices):
        raise ValueError("it repeats an index, as a matrix of numbers does; save a matrix as booleans")
    return indices.astype(np.int64)
