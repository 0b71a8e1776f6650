"""Approximate search, by FAISS's indices or by the signs of descriptors, compared with exact search."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from .search import CPU, Chunk, first, nearest, parts_of, reason, require_finite

logger = logging.getLogger(__name__)

TRAINING_BYTES = 2**30  # of descriptors to train an index on, at most
CHECKED_QUERIES = 1000  # queries of a set on which an index is compared with exact search, at most
PAIRS_TOGETHER = 4096  # pairs of a query and an image whose exact distances are computed at a time


def new_index(dim: int, factory: str, parameters: str = "") -> Any:
    """An empty FAISS index, e.g. "IVF4096,PQ64" with the search parameters "nprobe=32"; ValueError if there is none."""
    with refusals(f"{factory!r} {parameters!r} for {dim}-dimensional descriptors"):
        index = faiss.index_factory(dim, factory)
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)  # type: ignore[arg-type]
    return index


def require_index(factory: str, parameters: str, *, dim: int, count: int) -> None:
    """Checks before the extraction what can be known of an index then; FAISS may still refuse it later.

    Raises:
        ValueError: FAISS does not understand it, or `count` database images are too few to train it.
    """
    needed = _needed_for_training(new_index(dim, factory, parameters))
    trained_on = count // training_step(count, dim)
    if trained_on < needed:
        problem = f"index {factory!r} needs {needed} images to train on, and has {trained_on}"
        raise ValueError(f"{problem}; use one of fewer lists or codewords, or leave out index for exact search")


def _needed_for_training(index: Any) -> int:
    """The fewest descriptors that FAISS trains an index, and those within it, on."""
    kind: Any = faiss.downcast_index(index)  # the caller's `index` keeps it alive
    needed = [1, getattr(getattr(kind, "pq", None), "ksub", 1)]
    if isinstance(kind, faiss.IndexIVF) and kind.quantizer_trains_alone != "\1":
        needed.append(kind.nlist)
    if isinstance(kind, faiss.IndexPreTransform):
        chain: Any = kind.chain
        for transform in (faiss.downcast_VectorTransform(chain.at(number)) for number in range(chain.size())):
            if isinstance(transform, faiss.OPQMatrix):
                needed += [256, transform.d_out]  # its own codewords; with fewer than d_out, FAISS aborts the process
            elif isinstance(transform, faiss.PCAMatrix):
                needed.append(transform.d_out)
    within = (getattr(kind, name, None) for name in ("index", "base_index", "quantizer", "storage"))
    return max(needed + [_needed_for_training(part) for part in within if isinstance(part, faiss.Index)])


@contextmanager
def refusals(index: str) -> Iterator[None]:
    """Around a block, or as a decorator: an error of FAISS becomes a ValueError with its reason and a remedy."""
    try:
        yield
    except (RuntimeError, AssertionError, MemoryError, TypeError) as error:
        remedy = "see FAISS's page on the index factory, or leave out index for exact search"
        raise ValueError(f"FAISS refuses index {index}: {reason(error)}; {remedy}") from error


def training_step(count: int, dim: int) -> int:
    """The step n such that an index is trained on every n-th of `count` descriptors of dimension `dim`."""
    return max(1, -(-count * dim * 4 // TRAINING_BYTES))


def codes_of(descriptors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The signs of n x D descriptors, n x ceil(D / 8): a bit is set if a number is above 0."""
    return np.packbits(descriptors > 0, axis=1)


def nearest_by_index(
    queries: NDArray[np.float32],
    chunks: Callable[[], Iterable[Chunk]],
    count: int,
    k: int,
    *,
    factory: str,
    parameters: str = "",
    rerank: int = 100,
    device: torch.device = CPU,
    sets: Sequence[int] = (),
) -> tuple[NDArray[np.float32], NDArray[np.int64], list[dict[str, float]]]:
    """Approximate nearest neighbours by an index on the CPU, compared with exact search on some of the queries.

    An index of FAISS is trained on every n-th descriptor. "binary" needs no training: of the `rerank` images with the
    smallest Hamming distance of the signs, which take D / 8 bytes of memory each, it takes the nearest. The database is
    read twice, in the same order. SelaVPR++ (Lu et al. 2025) has two such stages, with trained codes.

    Args:
        queries, k, device, sets: as in `nearest`; for "binary", k is at most `rerank`.
        chunks: returns the database at each call, as for `nearest`.
        count: number of its descriptors.
        factory, parameters: "binary", or as in `new_index`.

    Returns:
        Like `nearest`, with -1 where the index found fewer than k; and for each set, how much of the exact result is
        found, of the first match ("nearest") and of the first k ("first_k"), in percent, on how many "queries".

    Raises:
        ValueError: FAISS refuses the index; or see `nearest`.
    """
    require_finite(queries)  # `nearest` sees only some of them
    dim, k, parts = queries.shape[1], min(k, count), parts_of(sets or [len(queries)])
    refusing = refusals(f"{factory!r} {parameters!r}")
    binary = factory == "binary"
    if binary:
        index: Any = faiss.IndexBinaryFlat(8 * codes_of(queries[:1]).shape[1])
        name = f"binary ({index.code_size} bytes per image, the first {min(rerank, count)} ranked exactly)"
    else:
        index, name = new_index(dim, factory, parameters), factory
        step = training_step(count, dim)
        sample = np.concatenate([descriptors[::step].copy() for _, descriptors in chunks()])
        require_finite(sample)
        refusing(index.train)(sample)
        del sample
    order = []

    def added() -> Iterator[Chunk]:
        for indices, descriptors in chunks():
            refusing(index.add)(codes_of(descriptors) if binary else descriptors)
            order.append(indices)
            yield indices, descriptors

    compared = [_compared(queries[part]) for part in parts]
    counts = [len(rows) for rows in compared]
    _, exact = nearest(np.concatenate(compared), added(), k, device, counts)  # while the index is filled
    if binary:
        _, rows = refusing(index.search)(codes_of(queries), min(rerank, count))
        rows.sort(axis=1)  # equal distances in the order of the images, as in exact search
        distances, rows = first(exact_distances(queries, rows, chunks), rows, k)
    else:
        answers = [refusing(index.search)(queries[part], k) for part in parts]
        distances, rows = (np.concatenate(side) for side in zip(*answers, strict=True))
    predictions = np.where(rows < 0, -1, np.concatenate(order)[rows])
    agreements = [
        _agreement(name, _compared(predictions[part]), exact[those])
        for part, those in zip(parts, parts_of(counts), strict=True)
    ]
    return distances, predictions, agreements


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


def _compared(rows: NDArray[Any]) -> NDArray[Any]:
    """The rows of those queries of a set on which an index is compared with exact search."""
    return rows[:: max(1, -(-len(rows) // CHECKED_QUERIES))]


def _agreement(name: str, ours: NDArray[np.int64], exact: NDArray[np.int64]) -> dict[str, float]:
    """Logs and returns how much of the exact result for Q queries an index finds, both Q x k."""
    nearest_found = 100.0 * float((ours == exact[:, :1]).any(axis=1).mean())
    first_k_found = 100.0 * float(np.mean([np.isin(*pair).mean() for pair in zip(exact, ours, strict=True)]))
    shares = f"the nearest image of {nearest_found:.1f}% and the first {exact.shape[1]} to {first_k_found:.1f}%"
    logger.info("index %s finds %s (against exact search, %d queries)", name, shares, len(exact))
    return {"nearest": nearest_found, "first_k": first_k_found, "queries": len(exact)}
