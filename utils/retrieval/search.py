"""Nearest neighbours of descriptors, recall, and the merging of crops."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..system import distributed
from ..system.device import without_tf32
from .faiss_index import add_to_index, new_index, search_index, train_index, training_step, without_place

logger = logging.getLogger(__name__)

# A part of the database: indices (n) and descriptors (n x D).
Chunk = tuple[NDArray[np.int64], NDArray[np.float32]]

Number = TypeVar("Number", np.float32, np.int64)

PAIRS_TOGETHER = 2**20  # pairs of a query and a correct image in memory at a time, roughly
CHECKED_QUERIES = 1000  # queries on which an approximate index is compared with exact search, at most
FAISS_GPU_NEIGHBOURS = 2048  # the most per query that FAISS finds on a GPU
DISTANCES_TOGETHER = 2**24  # that `knn_by_torch` holds at a time, roughly
CPU = torch.device("cpu")


class UselessDescriptors(ValueError):
    """Descriptors that cannot be searched and are not worth keeping."""


def nearest(
    queries: NDArray[np.float32],
    chunks: Iterable[Chunk],
    k: int,
    device: torch.device = CPU,
    sets: Sequence[int] = (),
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Exact nearest neighbours by L2 distance; the database is read in chunks.

    FAISS searches, on the CPU or on a CUDA GPU. If only PyTorch sees the GPU, `knn_by_torch` searches; if the GPU
    fails, FAISS continues on the CPU. The GPU paths have been tested with stand-ins only, never on a GPU.

    Args:
        queries: Q x D.
        chunks: the database, every index once, in any order.
        k: neighbours per query; all N if there are fewer.
        device: device of the search; any but a CUDA GPU means the CPU.
        sets: the number of queries in each of several consecutive sets; each set finds what it would find alone, to the
            last bit, which depends on the size of matrix products.

    Returns:
        Squared distances and database indices, each Q x min(k, N), nearest first; equal distances in the order of the
        chunks.

    Raises:
        ValueError: a descriptor is not finite; FAISS would return nonsense.
    """
    require_finite(queries)
    distances = np.empty((len(queries), 0), dtype=np.float32)
    found = np.empty((len(queries), 0), dtype=np.int64)
    searches = [_ChunkSearch(queries[part], device) for part in parts_of(sets or [len(queries)])]
    for indices, descriptors in chunks:
        require_finite(descriptors)
        of_sets = [search_chunk(descriptors, min(k, len(descriptors))) for search_chunk in searches]
        near, rows = (np.concatenate(side) for side in zip(*of_sets, strict=True))
        distances = np.concatenate((distances, near), axis=1)
        found = np.concatenate((found, indices[rows]), axis=1)
        distances, found = first(distances, found, k)
    return distances, found


def parts_of(sets: Sequence[int]) -> list[slice]:
    """The rows of each of several consecutive sets of the given sizes."""
    ends = np.cumsum([0, *sets]).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def first(
    distances: NDArray[np.float32], found: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k nearest of the found ones, each Q x n, nearest first; equal distances keep their order."""
    best = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, best, 1), np.take_along_axis(found, best, 1)


class _Gpu:
    """A CUDA GPU to search on, until it fails once: if its memory was too small, it would be again."""

    def __init__(self, device: torch.device):
        self.device = device
        self.works = True
        self._resources: Any = None

    def knn(self, queries: Tensor, descriptors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Like `knn_by_torch`, by FAISS if it sees a GPU."""
        if not _faiss_sees_a_gpu():
            return knn_by_torch(queries, descriptors, k)
        import faiss.contrib.torch_utils  # lets FAISS take tensors; it wraps FAISS's functions, so only if needed

        if self._resources is None:
            self._resources = faiss.StandardGpuResources()
            self._resources.setTempMemory(2**28)  # in bytes; chunks are small, and so is their temporary memory
        number = torch.cuda.current_device()  # FAISS's CUDA 12 may not know what PyTorch's CUDA 13 was told
        distances, rows = faiss.knn_gpu(self._resources, queries, descriptors, k, device=number)
        # On a GPU, FAISS does not define the order of equal distances (or which of those at rank k it takes).
        by_row = rows.argsort(dim=1)
        rows, distances = rows.gather(1, by_row), distances.gather(1, by_row)
        order = distances.argsort(dim=1, stable=True)
        return distances.gather(1, order), rows.gather(1, order)


_gpu = cache(_Gpu)


def _faiss_sees_a_gpu() -> bool:
    return bool(getattr(faiss, "get_num_gpus", int)())  # FAISS for CPUs lacks this function


@cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)


class _ChunkSearch:
    """Searches one chunk of the database after another, on the GPU as long as that works.

    Args:
        queries: Q x D.
        device: device of the search.
    """

    def __init__(self, queries: NDArray[np.float32], device: torch.device):
        self._queries = queries
        self._gpu = _gpu(device) if device.type == "cuda" else None
        self._on_gpu: Tensor | None = None  # the queries; they stay there

    def __call__(self, descriptors: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Squared distances and rows of the n x D descriptors, each Q x k, k at most n."""
        if self._gpu is not None and self._gpu.works and self._can_find(k):
            try:
                return self._by_gpu(self._gpu, descriptors, k)
            except (RuntimeError, AssertionError, MemoryError) as error:
                self._gpu.works, self._on_gpu = False, None
                logger.debug("the search left the GPU here", exc_info=error)
                _warn_once(f"the search continues on the CPU, since it failed on the GPU: {_reason(error)}")
        try:
            return faiss.knn(self._queries, descriptors, k)
        except (RuntimeError, AssertionError, MemoryError) as error:
            raise ValueError(f"FAISS cannot search exactly: {_reason(error)}") from error

    def _can_find(self, k: int) -> bool:
        if k <= FAISS_GPU_NEIGHBOURS or not _faiss_sees_a_gpu():
            return True
        _warn_once(
            f"the {k} matches per query are searched on the CPU, since FAISS on a GPU finds at most "
            f"{FAISS_GPU_NEIGHBOURS}"
        )
        return False

    def _by_gpu(
        self, gpu: _Gpu, descriptors: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self._on_gpu is None:
            torch.cuda.empty_cache()  # FAISS allocates its own memory, besides what PyTorch caches
            self._on_gpu = torch.from_numpy(np.ascontiguousarray(self._queries)).to(gpu.device)
        database = torch.from_numpy(np.ascontiguousarray(descriptors)).to(gpu.device)
        distances, rows = gpu.knn(self._on_gpu, database, k)
        return distances.cpu().numpy(), rows.cpu().numpy()


def _reason(error: BaseException) -> str:
    return " ".join(without_place(str(error)).split()) or "no memory left"


@torch.inference_mode()
def knn_by_torch(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `faiss.knn` finds, on the device of the tensors: exact, in full fp32.

    Args:
        queries: Q x D, fp32.
        database: n x D, fp32.
        k: neighbours per query, at most n.

    Returns:
        Squared distances (fp32) and rows (int64), each Q x k, nearest first; equal distances by row, as with FAISS on a
        CPU.
    """
    squares = database.square().sum(dim=1)
    rows = torch.arange(len(database), device=database.device)
    best = []
    with without_tf32():
        for some in queries.split(max(1, DISTANCES_TOGETHER // len(database))):
            distances = some.square().sum(dim=1, keepdim=True) + squares - 2 * (some @ database.T)
            # The bits of non-negative floats sort like the floats, so one integer ranks by distance, then by row.
            bits = distances.clamp_(min=0).view(torch.int32).long()
            best.append((bits << 32 | rows).topk(k, largest=False).values)
    ranked = torch.cat(best)
    return (ranked >> 32).int().view(torch.float32), ranked & 0xFFFFFFFF


def first_of_all(
    own: Callable[[], tuple[NDArray[np.float32], NDArray[np.int64]]], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Merges what each process finds in its part of the database; the parts are in the order of the processes.

    All processes call it at the same point.

    Args:
        own: returns squared distances and database indices like `nearest`, Q x at most k.
        k: neighbours per query, at most the size of the database.

    Returns:
        The k nearest of all, like `nearest`, in the main process; the process's own in the others.

    Raises:
        ValueError: this process, or in the main process any, could not search.
        SystemExit: another process could not search.
    """
    failed: Exception | None = None
    try:
        near, rows = own()
    except Exception as error:  # any error: the others must not wait for ever
        failed = error
    useless = isinstance(failed, UselessDescriptors)
    failures = distributed.gather_objects(None if failed is None else (useless, _reason(failed)))
    if failed is not None:
        raise failed
    for number, failure in enumerate(failures):
        if failure is not None and not distributed.is_main():
            raise SystemExit(2)
        if failure is not None:
            kind = UselessDescriptors if failure[0] else ValueError
            raise kind(f"process {number} could not search its part of the database: {failure[1]}")
    missing = ((0, 0), (0, k - near.shape[1]))  # for a part with fewer than k, or none
    distances = distributed.gather_rows(np.pad(near, missing, constant_values=np.inf))
    found = distributed.gather_rows(np.pad(rows, missing, constant_values=-1))
    if not distributed.is_main():
        return near, rows
    # (processes * Q, k) -> (Q, processes * k)
    distances = distances.reshape(-1, len(near), k).transpose(1, 0, 2).reshape(len(near), -1)
    found = found.reshape(-1, len(near), k).transpose(1, 0, 2).reshape(len(near), -1)
    return first(distances, found, k)


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Within the block, FAISS and PyTorch use `count` CPU cores; each has an OpenMP library of its own."""
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    try:
        faiss.omp_set_num_threads(count)
        torch.set_num_threads(count)
        yield
    finally:
        faiss.omp_set_num_threads(before[0])
        torch.set_num_threads(before[1])


def to_unit_norm(rows: NDArray[np.float32]) -> None:
    """Scales rows, n x D, to unit L2 norm in place; a row of zeros stays as it is."""
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def require_finite(descriptors: NDArray[np.float32]) -> None:
    """Raises UselessDescriptors if any of the n x D numbers is not finite."""
    if not np.isfinite(descriptors).all():
        raise UselessDescriptors(
            "descriptors are not finite, so the model's weights are useless; use another checkpoint"
        )


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

    Args:
        queries: Q x D.
        chunks: returns the database at each call, as for `nearest`.
        count: number of its descriptors, N.
        k: neighbours per query, at most N.
        factory: FAISS's description of the index, e.g. "IVF4096,PQ64".
        parameters: search parameters, e.g. "nprobe=32".
        device: device of the exact search, as in `nearest`; the index is on the CPU.
        sets: as in `nearest`.

    Returns:
        Like `nearest`, with -1 where the index found fewer than k; and for each set, how much the index finds of exact
        search's first match ("nearest") and first k ("first_k"), in percent, with the number of queries compared.

    Raises:
        ValueError: see `new_index`, `train_index`, `add_to_index` and `search_index`.
    """
    require_finite(queries)
    k = min(k, count)
    dim = queries.shape[1]
    step = training_step(count, dim)
    index = new_index(dim, factory, parameters)
    sample = np.concatenate([descriptors[::step].copy() for _, descriptors in chunks()])
    require_finite(sample)
    train_index(index, sample, factory)
    del sample
    parts = parts_of(sets or [len(queries)])
    of_sets = [queries[part] for part in parts]
    checked = [checked_queries(rows) for rows in of_sets]
    order = []

    def added() -> Iterable[Chunk]:
        for indices, descriptors in chunks():
            add_to_index(index, descriptors, factory)
            order.append(indices)
            yield indices, descriptors

    _, exact = nearest(np.concatenate(checked), added(), k, device, [len(rows) for rows in checked])
    found = [search_index(index, rows, k, factory, parameters) for rows in of_sets]
    distances, rows = (np.concatenate(side) for side in zip(*found, strict=True))
    predictions = np.where(rows < 0, -1, np.concatenate(order)[rows])
    return distances, predictions, log_agreement(factory, [predictions[part] for part in parts], exact)


def checked_queries(rows: NDArray[Number]) -> NDArray[Number]:
    """The queries of a set on which an approximate search is compared with exact search."""
    return rows[:: max(1, -(-len(rows) // CHECKED_QUERIES))]


def log_agreement(name: str, found: Sequence[NDArray[np.int64]], exact: NDArray[np.int64]) -> list[dict[str, float]]:
    """Logs how much of the result of exact search an index finds.

    Args:
        name: name of the index.
        found: database indices of each query set, Q x k each.
        exact: those of exact search, for the `checked_queries` of all sets, one after another.

    Returns:
        For each set, how much is found of the first match ("nearest") and of the first k ("first_k"), in percent, and
        the number of "queries".
    """
    agreements = []
    checked = [checked_queries(of_set) for of_set in found]
    for approximate, part in zip(checked, parts_of([len(rows) for rows in checked]), strict=True):
        of_set = exact[part]
        of_k = [np.isin(right, given).mean() for right, given in zip(of_set, approximate, strict=True)]
        agreement = {
            "nearest": 100.0 * float((approximate == of_set[:, :1]).any(axis=1).mean()),
            "first_k": 100.0 * float(np.mean(of_k)),
            "queries": len(of_set),
        }
        agreements.append(agreement)
        logger.info(
            "index %s finds the nearest image of %.1f%% and the first %d to %.1f%% (against exact search, %d queries)",
            name,
            agreement["nearest"],
            exact.shape[1],
            agreement["first_k"],
            agreement["queries"],
        )
    return agreements


def correct_among(predictions: NDArray[np.int64], positives: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
    """Which predictions are correct.

    Args:
        predictions: Q x k database indices; -1 is none.
        positives: for each query, the indices of its correct database images, read once; at most about a million are in
            memory at a time.

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
    # Each (query, image) pair as one number, to look up all queries at once.
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
        positives: for each query, the indices of its correct database images.
        recall_values: values of N.
    """
    return recall_of(correct_among(predictions, positives), recall_values)


def recall_of(correct: NDArray[np.bool_], recall_values: Sequence[int]) -> dict[int, float]:
    """Recall@N like `recall_at`, from the result of `correct_among`, Q x k."""
    return {n: 100.0 * float(correct[:, :n].any(axis=1).mean()) for n in recall_values}


def merge_crops(
    distances: NDArray[np.float32], predictions: NDArray[np.int64], *, crops: int = 5, majority_weight: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Merges the search results of several crops of each query into one.

    Args:
        distances: Q*crops x k squared L2 distances; the rows of a query's crops are consecutive.
        predictions: the database indices, likewise.
        crops: rows per query.
        majority_weight: 0 ranks by distance (`nearest_crop`). Above 0, images that several crops agree on move up
            first (`maj_voting`): among the first 1, then 5, then 10 columns, each image that occurs more than once has
            its distances there lowered by weight * occurrences / columns.

    Returns:
        Distances, including lowered ones, and database indices, Q x k; an image counts at its first occurrence, and -1
        means that an index found fewer than k.

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
