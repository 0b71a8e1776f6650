"""Hard batches of places that the model confuses.

Most pairs in a random batch are easy and teach nothing. Here the current model describes some of the places, and their
batches are composed of cliques: a place and those nearest to it. References: clique mining (Izquierdo and Civera,
Close, but not there, 2024) and global hard mining (Ali-bey et al., Global proxy-based hard mining, 2022); unlike there,
positions are not used, and the other places follow in random order.
"""

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from utils.system import distributed

from .gsv_cities import PlaceBatches

logger = logging.getLogger(__name__)

CLIQUE = 8  # places, at most
IMAGES = 2  # per place; their mean describes it
TOGETHER = 16  # images in the backbone at a time, always: other rounding could change the order
SHARE = 1 / 8  # of an epoch's images are described: one forward pass each, while training takes about three
BATCHES = 4  # described at least, since among few places none is near
MOST = 16_384  # places described at most: exact search takes seconds, and their 3072-dimensional descriptors 0.4 GB
NEIGHBOURS = 8 * CLIQUE  # considered for a clique: some already belong to another


def count_described(places: int, *, batch_size: int, images_per_place: int) -> int:
    """The number of places to describe, in whole batches."""
    wanted = min(int(places * images_per_place * SHARE / IMAGES), MOST)
    return min(max(wanted, BATCHES * batch_size), places) // batch_size * batch_size


def cliques(neighbours: NDArray[np.int64], rng: Generator) -> list[list[int]]:
    """Splits S places into cliques: in random order, each takes the nearest remaining of its neighbours, S x k."""
    left = np.ones(len(neighbours), dtype=bool)
    split = []
    for place in rng.permutation(len(neighbours)).tolist():
        if left[place]:
            left[place] = False
            near = neighbours[place]
            clique = [place, *near[left[near]][: CLIQUE - 1].tolist()]
            left[clique] = False
            split.append(clique)
    return split


def order_by_similarity(
    batches: PlaceBatches,
    describe: Callable[[Sequence[str]], NDArray[np.float32]],
    nearest: Callable[[NDArray[np.float32], int], NDArray[np.int64]],
) -> NDArray[np.int64]:
    """An order for the current epoch of `batches`, with hard batches at random positions among those of the other
    places, which keep their order; it depends only on seed, epoch and weights.

    With several processes, each describes its share of the photos, and all get the order.

    Args:
        batches: batches of the epoch, at least two.
        describe: turns paths of N photos into descriptors, N x D, `TOGETHER` photos at a time; N may be 0.
        nearest: the k nearest of S descriptors, S x D, which it may overwrite, to each of them by angle: S x k indices.
    """
    started = time.perf_counter()
    places, size, order = batches.dataset, batches.batch_size, batches.order(batches.epoch)
    count = count_described(len(places), batch_size=size, images_per_place=places.images_per_place)
    rng = np.random.default_rng((places.seed, batches.epoch, len(places)))
    described = rng.choice(len(places), size=count, replace=False)
    paths = [path for place in described for path in places.drawn_paths(place, IMAGES, rng)]
    # Each process has whole batches of those that one process alone would read.
    rows = distributed.gather_shares(len(paths), lambda share: describe(paths[share]), TOGETHER)

    def neighbours() -> NDArray[np.int64]:
        return nearest(rows.reshape(count, -1, rows.shape[1]).mean(axis=1), min(NEIGHBOURS, count))

    hard = described[np.concatenate(cliques(distributed.on_main(neighbours), rng))]
    others = order[~np.isin(order, described)]
    whole = len(others) // size * size
    together = np.concatenate((hard, others[:whole])).reshape(-1, size)
    order = np.concatenate((together[rng.permutation(len(together))].ravel(), others[whole:]))
    seconds = time.perf_counter() - started
    wording = "epoch %d: described %d of %d places in %.1f s; similar ones share a batch"
    logger.info(wording, batches.epoch + 1, count, len(places), seconds)
    return order
