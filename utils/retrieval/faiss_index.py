"""Approximate search by FAISS's indices, compared with exact search."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from .search import CPU, Chunk, nearest, parts_of, reason, require_finite

logger = logging.getLogger(__name__)

TRAINING_BYTES = 2**30  # of descriptors to train an index on, at most
CHECKED_QUERIES = 1000  # queries of a set on which an index is compared with exact search, at most


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


def nearest_by_index(
    queries: NDArray[np.float32],
    chunks: Callable[[], Iterable[Chunk]],
    count: int,
    k: int,
    *,
    factory: str,
    parameters: str = "",
    device: torch.device = CPU,
    sets: Sequence[int] = (),
) -> tuple[NDArray[np.float32], NDArray[np.int64], list[dict[str, float]]]:
    """Approximate nearest neighbours by a FAISS index, compared with exact search on some of the queries.

    The index is on the CPU, trained on every n-th descriptor.

    Args:
        queries, k, device, sets: as in `nearest`.
        chunks: returns the database at each call, as for `nearest`.
        count: number of its descriptors.
        factory, parameters: as in `new_index`.

    Returns:
        Like `nearest`, with -1 where the index found fewer than k; and for each set, what `log_agreement` returns.

    Raises:
        ValueError: FAISS refuses the index; or see `nearest`.
    """
    require_finite(queries)
    dim = queries.shape[1]
    step = training_step(count, dim)
    index = new_index(dim, factory, parameters)
    sample = np.concatenate([descriptors[::step].copy() for _, descriptors in chunks()])
    require_finite(sample)
    refusing = refusals(f"{factory!r} {parameters!r}")
    refusing(index.train)(sample)
    del sample
    parts = parts_of(sets or [len(queries)])
    order, exact = fill(refusing(index.add), queries, chunks, min(k, count), device, parts)
    answers = [refusing(index.search)(queries[part], min(k, count)) for part in parts]
    distances, rows = (np.concatenate(side) for side in zip(*answers, strict=True))
    predictions = np.where(rows < 0, -1, order[rows])
    return distances, predictions, log_agreement(factory, [predictions[part] for part in parts], exact)


def fill(
    add: Callable[[NDArray[np.float32]], Any],
    queries: NDArray[np.float32],
    chunks: Callable[[], Iterable[Chunk]],
    k: int,
    device: torch.device,
    parts: Sequence[slice],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fills an index with the database, while exact search reads it for the `checked` queries of all parts.

    Returns:
        The database index of each row, N, and the exact matches of these queries, one part after another, x k.
    """
    order = []

    def added() -> Iterator[Chunk]:
        for indices, descriptors in chunks():
            add(descriptors)
            order.append(indices)
            yield indices, descriptors

    some = [checked(queries[part]) for part in parts]
    _, exact = nearest(np.concatenate(some), added(), k, device, [len(rows) for rows in some])
    return np.concatenate(order), exact


def checked(rows: NDArray[Any]) -> NDArray[Any]:
    """The rows of those queries of a set on which an approximate search is compared with exact search."""
    return rows[:: max(1, -(-len(rows) // CHECKED_QUERIES))]


def log_agreement(name: str, sets: Sequence[NDArray[np.int64]], exact: NDArray[np.int64]) -> list[dict[str, float]]:
    """Logs how much of the result of exact search, as `fill` returns it, an index finds for sets of Q x k predictions.

    Returns:
        For each set, how much is found of the first match ("nearest") and of the first k ("first_k"), in percent, and
        the number of "queries".
    """
    agreements = []
    approximate = [checked(predictions) for predictions in sets]
    for ours, part in zip(approximate, parts_of([len(rows) for rows in approximate]), strict=True):
        right = exact[part]
        first_match = 100.0 * float((ours == right[:, :1]).any(axis=1).mean())
        first_k = 100.0 * float(np.mean([np.isin(*pair).mean() for pair in zip(right, ours, strict=True)]))
        agreements.append({"nearest": first_match, "first_k": first_k, "queries": len(right)})
        shares = f"the nearest image of {first_match:.1f}% and the first {exact.shape[1]} to {first_k:.1f}%"
        logger.info("index %s finds %s (against exact search, %d queries)", name, shares, len(right))
    return agreements
