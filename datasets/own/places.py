"""Places from photo positions: which photos form one, which places can be kept together, and what to hold out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN
from sklearn.neighbors import KDTree

from .photos import Photo

LONGEST = 4.0  # sides of a map: a street that is longer for its width is drawn wider than it is
MOST_STRETCHED = 10.0
LONG_SIDE = 10.0  # inches


def cells_of(metres: NDArray[np.float64], cell: float) -> NDArray[np.int64]:
    """The cell of each of N positions, N: a group that fits within `cell` metres, else a square of a grid."""
    together = DBSCAN(eps=cell / 2, min_samples=1).fit_predict(metres)
    low, high = (np.full((int(together.max()) + 1, 2), value) for value in (np.inf, -np.inf))
    np.minimum.at(low, together, metres)
    np.maximum.at(high, together, metres)
    along_a_street = np.any(high - low > cell, axis=1)[together]
    squares = np.floor(metres / cell).astype(np.int64)
    keys = np.where(along_a_street[:, None], np.column_stack((np.full(len(metres), -1), squares)), 0)
    keys[~along_a_street, 0] = together[~along_a_street]
    return np.unique(keys, axis=0, return_inverse=True)[1].ravel()


def heading_bins(photos: Sequence[Photo], bins: int) -> NDArray[np.int64]:
    """Which of `bins` directions each photo faces, the first around north; -1 if its heading is unknown."""
    headings = np.array([np.nan if photo.heading is None else photo.heading for photo in photos])
    found = np.floor((headings + 180 / bins) % 360 / (360 / bins))
    return np.where(np.isnan(found), -1, found).astype(np.int64) if bins > 1 else np.zeros(len(photos), dtype=np.int64)


def apart(
    metres: NDArray[np.float64], places: NDArray[np.int64], directions: NDArray[np.int64], gap: float, bins: int
) -> NDArray[np.bool_]:
    """Which of N photos belong to places that stay: those with most photos first, each `gap` metres from those before.

    Places at any distance stay if their directions are neither the same nor neighbours.

    Args:
        metres: positions of the photos, N x 2.
        places: places of the photos, N.
        directions: directions of the photos, the same within a place, N.
        gap: metres between the nearest photos of two places.
        bins: number of directions.
    """
    stays = np.ones(len(places), dtype=bool)
    if not gap or not len(places):
        return stays
    tree = KDTree(metres)
    order = np.argsort(places, kind="stable")
    unique, first, counts = np.unique(places[order], return_index=True, return_counts=True)
    gone: set[int] = set()
    for place in np.lexsort((order[first], -counts)).tolist():
        if unique[place] in gone:
            continue
        own = order[first[place] : first[place] + counts[place]]
        near = np.unique(np.concatenate(tree.query_radius(metres[own], np.nextafter(gap, 0))))
        turned = np.abs(directions[near] - directions[own[0]])
        overlap = np.minimum(turned, bins - turned) <= 1
        gone |= {*places[near[overlap]].tolist()} - {int(unique[place])}
    return ~np.isin(places, list(gone))


def in_area(positions: NDArray[np.float64], corners: Sequence[float]) -> NDArray[np.bool_]:
    """Which of N x 2 positions lie between two corners, given as four numbers."""
    low, high = np.sort(np.reshape(corners, (2, 2)), axis=0)
    return np.asarray(((positions >= low) & (positions <= high)).all(axis=1))


def connected_share(
    metres: NDArray[np.float64], cells: NDArray[np.int64], share: float, gap: float, rng: Generator
) -> NDArray[np.bool_]:
    """Which of N photos to hold out: those of connected cells, each within reach of one before.

    From a random cell on, the next is the one nearest to the held-out cells, if within twice the gap; otherwise another
    random cell follows.

    Args:
        metres: positions of the photos, N x 2.
        cells: cells of the photos, N.
        share: approximate share of the photos.
        gap: in metres.
        rng: draws the random cells.
    """
    unique, inverse, counts = np.unique(cells, return_inverse=True, return_counts=True)
    centres = np.stack([np.bincount(inverse, metres[:, axis]) / counts for axis in (0, 1)], axis=1)
    held = np.zeros(len(unique), dtype=bool)
    distances = np.full(len(unique), np.inf)  # to the held-out cells
    starts = rng.permutation(len(unique)).tolist()
    while counts[held].sum() < share * len(metres) and not held.all():
        distances[held] = np.inf
        nearest = int(distances.argmin())
        if distances[nearest] > 2 * gap:
            nearest = next(cell for cell in starts if not held[cell])
        held[nearest] = True
        distances = np.minimum(distances, np.hypot(*(centres - centres[nearest]).T))
    return held[inverse]


def nearer(metres: NDArray[np.float64], others: NDArray[np.float64], gap: float) -> NDArray[np.bool_]:
    """Which of N x 2 positions are nearer than the gap to one of M x 2 others."""
    return np.asarray(KDTree(others).query(metres)[0][:, 0] < gap)


@dataclass(frozen=True)
class MapShape:
    """How to draw positions: the shape of their area, so that a street is neither lost in a square nor a bare line.

    Attributes:
        inches: width and height.
        limits: lowest and highest metre along each axis.
        stretch: how many times as large as the other axis each is drawn; 1 for a true map.
    """

    inches: tuple[float, float]
    limits: tuple[tuple[float, float], tuple[float, float]]
    stretch: tuple[float, float]


def map_shape(extent: NDArray[np.float64]) -> MapShape:
    """The shape of a map of positions from 0 to an extent east and north, in metres."""
    shown = extent * 1.1 + 2
    shown = np.maximum(shown, shown.max() / LONGEST / MOST_STRETCHED)
    drawn = np.maximum(shown, shown.max() / LONGEST)
    inches = drawn / drawn.max() * LONG_SIDE
    low, high = extent / 2 - shown / 2, extent / 2 + shown / 2
    (width, height), (east, north) = inches.tolist(), (drawn / shown).tolist()
    limits = ((float(low[0]), float(high[0])), (float(low[1]), float(high[1])))
    return MapShape((width + 1, height + 1.2), limits, (east, north))
