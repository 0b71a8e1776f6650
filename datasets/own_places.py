"""Places of photos by their positions: which photos make one, which places can be kept together, what is held out."""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN
from sklearn.neighbors import KDTree

from .own_photos import Photo


def cells_of(metres: NDArray[np.float64], cell: float) -> NDArray[np.int64]:
    """The cell of each of N positions, N: what stands together within `cell` metres, else squares of a grid."""
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
    """Which of `bins` directions each photo looks to, the first of them around north; -1 where it does not say."""
    headings = np.array([np.nan if photo.heading is None else photo.heading for photo in photos])
    found = np.floor((headings + 180 / bins) % 360 / (360 / bins))
    return np.where(np.isnan(found), -1, found).astype(np.int64) if bins > 1 else np.zeros(len(photos), dtype=np.int64)


def apart(
    metres: NDArray[np.float64], places: NDArray[np.int64], directions: NDArray[np.int64], gap: float, bins: int
) -> NDArray[np.bool_]:
    """Which of N photos are of places that stay: those with many photos first, each `gap` metres from those before.

    Places stay together at any distance if they look to directions that are not the same and no neighbours.

    Args:
        metres: of the photos, N x 2.
        places: of the photos, N.
        directions: of the photos, the same for all of a place, N.
        gap: between the nearest photos of two places.
        bins: directions that there are.
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
    """Which of N x 2 positions lie between two corners, given as one after the other."""
    low, high = np.sort(np.reshape(corners, (2, 2)), axis=0)
    return np.asarray(((positions >= low) & (positions <= high)).all(axis=1))


def connected_share(
    metres: NDArray[np.float64], cells: NDArray[np.int64], share: float, gap: float, rng: Generator
) -> NDArray[np.bool_]:
    """Which of N photos to hold out: those of cells that hang together, each within reach of one before.

    From a random cell the next is always the nearest to what is held out that lies within twice the gap; where there is
    none, another random cell begins.

    Args:
        metres: of the photos, N x 2.
        cells: of the photos, N.
        share: of the photos, about.
        gap: in metres.
        rng: draws the cells to begin with.
    """
    unique, inverse, counts = np.unique(cells, return_inverse=True, return_counts=True)
    centres = np.stack([np.bincount(inverse, metres[:, axis]) / counts for axis in (0, 1)], axis=1)
    held = np.zeros(len(unique), dtype=bool)
    distances = np.full(len(unique), np.inf)  # to what is held out
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
    """Which of N x 2 positions lie nearer than the gap to one of M x 2 others."""
    return np.asarray(KDTree(others).query(metres)[0][:, 0] < gap)
