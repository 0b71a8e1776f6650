"""Places from photo positions: which photos form one, which places can be kept together, and what to hold out."""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import KDTree


def chains(metres: NDArray[np.float64], reach: float) -> NDArray[np.int64]:
    """The chain of each of N positions, N: from each to some other of its chain it is at most `reach` metres."""
    # Positions in one square of the grid, whose diagonal is shorter than that, are linked without being compared, and
    # for a square beside it only the nearest position there counts: ten thousand photos at one spot take seconds.
    points, of_photo = np.unique(metres, axis=0, return_inverse=True)
    grid = np.floor(points / (0.7 * reach)).astype(np.int64)
    grid -= grid.min(axis=0) - 2
    width = int(grid[:, 1].max()) + 3  # two empty squares at each end of a row, so that no step leads into another row
    squares, square = np.unique(grid @ (width, 1), return_inverse=True)
    layer = 3 * reach  # a third coordinate parts the squares farther than two neighbours reach
    tree = KDTree(np.column_stack((points, layer * square)))
    links = [np.zeros((0, 2), dtype=np.int64)]
    for step in [1, 2, *(i * width + j for i in (1, 2) for j in range(-2, 3))]:
        beside = np.searchsorted(squares, squares[square] + step).clip(max=len(squares) - 1)
        rows = np.flatnonzero(squares[beside] == squares[square] + step)
        if len(rows):
            nearest = tree.query(np.column_stack((points[rows], layer * beside[rows])), return_distance=False)[:, 0]
            near = ((points[rows] - points[nearest]) ** 2).sum(axis=1) <= reach**2
            links.append(np.column_stack((square[rows], square[nearest]))[near])
    a, b = np.concatenate(links).T
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(len(squares), len(squares)))
    chain = connected_components(graph, directed=False)[1][square][of_photo.ravel()]
    _, first, chain = np.unique(chain, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[chain]  # numbered by their first positions


def cells_of(metres: NDArray[np.float64], cell: float) -> NDArray[np.int64]:
    """The cell of each of N positions, N: a group that fits within `cell` metres, else a square of a grid."""
    together = chains(metres, cell / 2)
    low, high = (np.full((int(together.max()) + 1, 2), value) for value in (np.inf, -np.inf))
    np.minimum.at(low, together, metres)
    np.maximum.at(high, together, metres)
    along_a_street = np.any(high - low > cell, axis=1)[together]
    squares = np.floor(metres / cell).astype(np.int64)
    keys = np.where(along_a_street[:, None], np.column_stack((np.full(len(metres), -1), squares)), 0)
    keys[~along_a_street, 0] = together[~along_a_street]
    return np.unique(keys, axis=0, return_inverse=True)[1].ravel()


def heading_bins(headings: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """Which of `bins` directions each of N headings faces, the first around north; -1 if it is unknown and counts."""
    directions = np.floor((headings + 180 / bins) % 360 / (360 / bins))
    return np.nan_to_num(directions, nan=-1 if bins > 1 else 0).astype(np.int64)


def apart(
    metres: NDArray[np.float64], places: NDArray[np.int64], directions: NDArray[np.int64], gap: float, bins: int
) -> NDArray[np.bool_]:
    """Which of N photos belong to places that stay: those with most photos first, each `gap` metres from those before.

    Places at any distance stay if their directions, of so many bins, are neither the same nor neighbours.
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
        middle = metres[own].mean(axis=0, keepdims=True)
        around = tree.query_radius(middle, 1.01 * (gap + np.hypot(*(metres[own] - middle).T).max()))[0]
        near = around[nearer(metres[around], metres[own], gap)]
        turned = np.abs(directions[near] - directions[own[0]])
        overlap = np.minimum(turned, bins - turned) <= 1
        gone |= {*places[near[overlap]].tolist()} - {int(unique[place])}
    return ~np.isin(places, list(gone))


def connected_share(
    metres: NDArray[np.float64], cells: NDArray[np.int64], share: float, gap: float, rng: Generator
) -> NDArray[np.bool_]:
    """Which of N photos to hold out, about a share of them: those of connected cells.

    From a random cell on, the next is the one nearest to the held-out cells, if within twice the gap; otherwise another
    random cell follows. A large cell by which twice the share would be held out is skipped.
    """
    unique, inverse, counts = np.unique(cells, return_inverse=True, return_counts=True)
    centres = np.stack([np.bincount(inverse, metres[:, axis]) / counts for axis in (0, 1)], axis=1)
    held = np.zeros(len(unique), dtype=bool)
    distances = np.full(len(unique), np.inf)  # to the held-out cells
    starts = rng.permutation(len(unique)).tolist()
    wanted = share * len(metres)
    while (taken := counts[held].sum()) < wanted:
        fits = ~held & ((taken + counts <= 2 * wanted) | (counts <= 2 * np.median(counts)))
        if not fits.any():
            break
        distances[~fits] = np.inf
        nearest = int(distances.argmin())
        if distances[nearest] > 2 * gap:
            nearest = next(cell for cell in starts if fits[cell])
        held[nearest] = True
        distances = np.minimum(distances, np.hypot(*(centres - centres[nearest]).T))
    return held[inverse]


def nearer(metres: NDArray[np.float64], others: NDArray[np.float64], gap: float) -> NDArray[np.bool_]:
    """Which of N x 2 positions are nearer than the gap to one of M x 2 others: N."""
    distances, _ = KDTree(np.unique(others, axis=0)).query(metres)  # to many at one position, each would be compared
    return np.asarray(distances[:, 0] < gap)
