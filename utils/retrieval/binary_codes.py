"""Searches by the signs of descriptors, one bit per number, and ranks the first images found exactly."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from .faiss_index import fill, log_agreement, refusals
from .search import CPU, Chunk, first, parts_of, require_finite

PAIRS_TOGETHER = 4096  # pairs of a query and an image whose exact distances are computed at a time


def codes_of(descriptors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The signs of n x D descriptors, n x ceil(D / 8): a bit is set if a number is above 0."""
    return np.packbits(descriptors > 0, axis=1)


def nearest_by_codes(
    queries: NDArray[np.float32],
    chunks: Callable[[], Iterable[Chunk]],
    count: int,
    k: int,
    *,
    rerank: int,
    device: torch.device = CPU,
    sets: Sequence[int] = (),
) -> tuple[NDArray[np.float32], NDArray[np.int64], list[dict[str, float]]]:
    """Nearest neighbours by L2 distance among the `rerank` with the smallest Hamming distance of the signs.

    Nothing is trained. The database is read twice, in the same order: for its codes, which stay in memory, D / 8 bytes
    per image, and for the exact distances of the images that these find; k is at most `rerank`. SelaVPR++ (Lu et al.
    2025) has two such stages, with trained codes.

    Other arguments and what is returned are those of `nearest_by_index`, without -1.
    """
    require_finite(queries)  # `nearest` sees only some of them
    dim = queries.shape[1]
    index: Any = faiss.IndexBinaryFlat(8 * codes_of(queries[:1]).shape[1])
    parts = parts_of(sets or [len(queries)])
    order, exact = fill(lambda rows: index.add(codes_of(rows)), queries, chunks, k, device, parts)
    _, rows = refusals("binary")(index.search)(codes_of(queries), min(rerank, count))
    distances = exact_distances(queries, rows, chunks)
    # Equal distances in the order of the images, as in exact search.
    by_row = np.argsort(rows, axis=1)
    rows, distances = np.take_along_axis(rows, by_row, 1), np.take_along_axis(distances, by_row, 1)
    distances, rows = first(distances, rows, k)
    predictions = order[rows]
    name = f"binary ({-(-dim // 8)} bytes per image, the first {min(rerank, count)} ranked exactly)"
    return distances, predictions, log_agreement(name, [predictions[part] for part in parts], exact)


def exact_distances(
    queries: NDArray[np.float32], rows: NDArray[np.int64], chunks: Callable[[], Iterable[Chunk]]
) -> NDArray[np.float32]:
    """Squared distances of queries to database images, Q x R, which are given by rows in the order of the chunks."""
    distances = np.empty(rows.size, dtype=np.float32)
    pairs = np.argsort(rows, axis=None, kind="stable")  # in the order of the chunks
    in_order = rows.ravel()[pairs]
    start = 0
    for _, descriptors in chunks():
        here = slice(*np.searchsorted(in_order, (start, start + len(descriptors))))
        for some in range(here.start, here.stop, PAIRS_TOGETHER):
            together = slice(some, min(some + PAIRS_TOGETHER, here.stop))
            difference = queries[pairs[together] // rows.shape[1]] - descriptors[in_order[together] - start]
            distances[pairs[together]] = np.einsum("nd,nd->n", difference, difference)
        start += len(descriptors)
    return distances.reshape(rows.shape)
