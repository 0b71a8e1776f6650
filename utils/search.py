"""Nearest neighbours of descriptors, and what is counted and merged from them."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# A part of the database: indices (n) and descriptors (n x D).
Chunk = tuple[NDArray[np.int64], NDArray[np.float32]]

TRAINING_BYTES = 2**30  # of descriptors that an approximate index is trained on, at most
PAIRS_TOGETHER = 2**20  # of a query and a correct image, about
CHECKED_QUERIES = 1000  # that an approximate index is compared with exact search on, at most


def nearest(
    queries: NDArray[np.float32], chunks: Iterable[Chunk], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Exact nearest neighbours by L2 distance (FAISS, on a GPU where it sees one); the database passes by in chunks.

    Args:
        queries: Q x D.
        chunks: the database, every index once, in any order.
        k: neighbours a query; all N where there are fewer.

    Returns:
        Squared distances and database indices, each Q x min(k, N), nearest first.

    Raises:
        ValueError: a descriptor is not finite; FAISS would answer with nonsense.
    """
    _require_finite(queries)
    distances = np.empty((len(queries), 0), dtype=np.float32)
    found = np.empty((len(queries), 0), dtype=np.int64)
    for indices, descriptors in chunks:
        _require_finite(descriptors)
        near, rows = _knn(queries, descriptors, min(k, len(descriptors)))
        distances = np.concatenate((distances, near), axis=1)
        found = np.concatenate((found, indices[rows]), axis=1)
        best = np.argsort(distances, axis=1, kind="stable")[:, :k]
        distances, found = np.take_along_axis(distances, best, 1), np.take_along_axis(found, best, 1)
    return distances, found


def _knn(
    queries: NDArray[np.float32], descriptors: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    try:
        if getattr(faiss, "get_num_gpus", int)():
            return faiss.knn_gpu(_gpu_resources(), queries, descriptors, k)
        return faiss.knn(queries, descriptors, k)
    except (RuntimeError, AssertionError, MemoryError) as error:
        raise ValueError(f"FAISS cannot search exactly: {without_place(str(error)) or 'no memory left'}") from error


@cache
def _gpu_resources() -> Any:
    """What FAISS needs to search on a GPU, set up once: chunks are small, and so is what they need beside them."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(2**28)  # in bytes
    return resources


def _require_finite(descriptors: NDArray[np.float32]) -> None:
    if not np.isfinite(descriptors).all():
        raise ValueError("descriptors are not finite, so the model's weights are of no use; use another checkpoint")


def new_index(dim: int, factory: str, parameters: str = "") -> Any:
    """An empty FAISS index of descriptors of `dim` numbers.

    Args:
        dim: numbers in a descriptor.
        factory: FAISS's description, e.g. "IVF4096,PQ64".
        parameters: of its search, e.g. "nprobe=32".

    Raises:
        ValueError: FAISS does not understand it.
    """
    with refusals(f"make --index {factory!r} {parameters!r} for descriptors of {dim} numbers"):
        index = faiss.index_factory(dim, factory)
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)  # type: ignore[arg-type]
    return index


def train_index(index: Any, sample: NDArray[np.float32], factory: str) -> None:
    """Trains an index, made by `factory`, on n x D descriptors.

    Raises:
        ValueError: they are too few for it, mostly.
    """
    with refusals(f"train --index {factory!r} on {len(sample)} descriptors", len(sample)):
        index.train(sample)


def add_to_index(index: Any, descriptors: NDArray[np.float32], factory: str) -> None:
    """Adds n x D descriptors to an index.

    Raises:
        ValueError: it does not take them.
    """
    with refusals(f"fill --index {factory!r}"):
        index.add(descriptors)


def search_index(
    index: Any, queries: NDArray[np.float32], k: int, factory: str, parameters: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Squared distances and rows of the index, each Q x k; -1 where it finds fewer.

    Raises:
        ValueError: it does not search in this way.
    """
    with refusals(f"search --index {factory!r} {parameters!r}"):
        found: tuple[NDArray[np.float32], NDArray[np.int64]] = index.search(queries, k)
    return found


@contextmanager
def refusals(what: str, rows: int | None = None) -> Iterator[None]:
    """Within the block, an error of FAISS becomes a ValueError that gives FAISS's own reason and a remedy.

    Args:
        what: FAISS cannot do.
        rows: descriptors there are to train on, where it does that.
    """
    try:
        yield
    except (RuntimeError, AssertionError, MemoryError, TypeError) as error:
        reason = without_place(str(error)) or type(error).__name__
        remedy = "see FAISS's page on the index factory"
        if rows is not None and "number of clusters" in reason:
            remedy = f"use one of at most {rows} lists and {rows} codewords"
        elif rows is not None and "PCA matrix cannot output" in reason:
            remedy = f"use one that reduces to at most {rows} numbers"
        raise ValueError(f"FAISS cannot {what}: {reason}; {remedy}, or leave out --index for exact search") from error


def without_place(message: str) -> str:
    """What FAISS says, without the function and the line that says it."""
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", message.strip(), flags=re.DOTALL)


def training_step(count: int, dim: int) -> int:
    """An approximate index is trained on every so many-th of `count` descriptors of `dim` numbers."""
    return max(1, -(-count * dim * 4 // TRAINING_BYTES))


def nearest_by_index(
    queries: NDArray[np.float32],
    chunks: Callable[[], Iterable[Chunk]],
    count: int,
    k: int,
    *,
    factory: str,
    parameters: str = "",
) -> tuple[NDArray[np.float32], NDArray[np.int64], dict[str, float]]:
    """Approximate nearest neighbours by a FAISS index, compared with exact search on some of the queries.

    Args:
        queries: Q x D.
        chunks: gives the database anew each time it is called, as `nearest` takes it.
        count: descriptors in it, N.
        k: neighbours a query, at most N.
        factory: FAISS's description of the index, e.g. "IVF4096,PQ64".
        parameters: of its search, e.g. "nprobe=32".

    Returns:
        As `nearest`, -1 where the index found fewer than k; and the index's share of what exact search finds first
        ("nearest") and among its first k ("first_k"), with the number of queries this was seen on, in percent.

    Raises:
        ValueError: as `new_index`, `train_index`, `add_to_index` and `search_index`.
    """
    _require_finite(queries)
    k = min(k, count)
    dim = queries.shape[1]
    step = training_step(count, dim)
    index = new_index(dim, factory, parameters)
    sample = np.concatenate([descriptors[::step].copy() for _, descriptors in chunks()])
    _require_finite(sample)
    train_index(index, sample, factory)
    del sample
    checked = queries[:: -(-len(queries) // CHECKED_QUERIES)]
    order = []

    def added() -> Iterable[Chunk]:
        for indices, descriptors in chunks():
            add_to_index(index, descriptors, factory)
            order.append(indices)
            yield indices, descriptors

    _, exact = nearest(checked, added(), k)
    distances, rows = search_index(index, queries, k, factory, parameters)
    predictions = np.where(rows < 0, -1, np.concatenate(order)[rows])
    approximate = predictions[:: -(-len(queries) // CHECKED_QUERIES)]
    agreement = {
        "nearest": 100.0 * float((approximate == exact[:, :1]).any(axis=1).mean()),
        "first_k": 100.0 * float(np.mean([np.isin(e, a).mean() for e, a in zip(exact, approximate, strict=True)])),
        "queries": len(checked),
    }
    logger.info(
        "index %s finds the nearest image of %.1f%% and the first %d to %.1f%% (against exact search, %d queries)",
        factory,
        agreement["nearest"],
        k,
        agreement["first_k"],
        agreement["queries"],
    )
    return distances, predictions, agreement


def correct_among(predictions: NDArray[np.int64], positives: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
    """Which predictions are right.

    Args:
        predictions: Q x k database indices; -1 is none.
        positives: for each query the indices of its correct database images, gone over once; of dense ones, no more
            than about a million are in memory.

    Returns:
        Q x k.
    """
    correct = np.zeros(predictions.shape, dtype=bool)
    start, pairs = 0, 0
    waiting: list[NDArray[np.int64]] = []
    for query, found in enumerate(positives):
        waiting.append(found)
        pairs += len(found)
        if pairs >= PAIRS_TOGETHER or query == len(predictions) - 1:
            rows = slice(start, query + 1)
            correct[rows] = _correct_of_some(predictions[rows], waiting)
            start, pairs, waiting = query + 1, 0, []
    return correct


def _correct_of_some(predictions: NDArray[np.int64], positives: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
    # Each (query, image) pair as one number, so that all queries are looked up at once.
    images = 1 + max(predictions.max(initial=0), max((p.max(initial=0) for p in positives), default=0))
    query_of_positive = np.repeat(np.arange(len(positives)), [len(p) for p in positives])
    correct_pairs = query_of_positive * images + np.concatenate(positives)
    predicted_pairs = np.arange(len(predictions))[:, None] * images + predictions
    return np.isin(predicted_pairs, correct_pairs) & (predictions >= 0)


def recall_at(
    predictions: NDArray[np.int64], positives: Sequence[NDArray[np.int64]], recall_values: Sequence[int]
) -> dict[int, float]:
    """Recall@N: percentage of ALL queries with a correct image among the first N; one without positives is a miss.

    Args:
        predictions: Q x k database indices, best first.
        positives: for each query the indices of its correct database images.
        recall_values: the N.
    """
    return recall_of(correct_among(predictions, positives), recall_values)


def recall_of(correct: NDArray[np.bool_], recall_values: Sequence[int]) -> dict[int, float]:
    """Recall@N as `recall_at`, from what `correct_among` gave, Q x k."""
    return {n: 100.0 * float(correct[:, :n].any(axis=1).mean()) for n in recall_values}


def merge_crops(
    distances: NDArray[np.float32], predictions: NDArray[np.int64], *, crops: int = 5, majority_weight: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Merges the search results of several crops of each query into one.

    Args:
        distances: Q*crops x k squared L2 distances; the rows of a query's crops follow each other.
        predictions: the database indices beside them.
        crops: rows a query.
        majority_weight: 0 ranks by distance (`nearest_crop`). Above 0, images that several crops agree on move up
            first (`maj_voting`): among the first 1, then 5, then 10 columns, each image that occurs more than once has
            its distances there lowered by weight * occurrences / columns.

    Returns:
        Distances, lowered ones included, and database indices, Q x k; an image counts at its first occurrence, and -1
        stands where an index found fewer than k.

    Source: the Visual Geo-localization Benchmark (Berton et al. 2022).
    """
    k = predictions.shape[1]
    merged = np.full((len(predictions) // crops, k), -1, dtype=np.int64)
    lengths_of_merged = np.full(merged.shape, np.inf, dtype=np.float32)
    for query in range(len(merged)):
        rows = slice(query * crops, (query + 1) * crops)
        found, lengths = predictions[rows], distances[rows].copy()
        for columns in (1, 5, 10) if majority_weight else ():
            top_found, top_lengths = found[:, :columns], lengths[:, :columns]
            for image, count in zip(*np.unique(top_found, return_counts=True), strict=True):
                if count > 1 and image >= 0:
                    top_lengths[top_found == image] -= majority_weight * count / columns
        order = np.argsort(lengths, axis=None, kind="stable")
        order = order[found.ravel()[order] >= 0]
        ranked = found.ravel()[order]
        first = np.sort(np.unique(ranked, return_index=True)[1])[:k]
        merged[query, : len(first)] = ranked[first]
        lengths_of_merged[query, : len(first)] = lengths.ravel()[order][first]
    return lengths_of_merged, merged
