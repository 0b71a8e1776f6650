"""The database images within a distance of each query."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..photos.positions import EARTH_RADIUS, known

PAIRS_TOGETHER = 2**20  # pairs of a query and a database image at a time: all of them may be positives


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
