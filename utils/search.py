"""Nearest neighbours of descriptors, and what is counted and merged from them."""

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

from . import distributed
from .device import without_tf32
from .faiss_index import add_to_index, new_index, search_index, train_index, training_step, without_place

logger = logging.getLogger(__name__)

# A part of the database: indices (n) and descriptors (n x D).
Chunk = tuple[NDArray[np.int64], NDArray[np.float32]]

Number = TypeVar("Number", np.float32, np.int64)

PAIRS_TOGETHER = 2**20  # of a query and a correct image, about
CHECKED_QUERIES = 1000  # that an approximate index is compared with exact search on, at most
FAISS_GPU_NEIGHBOURS = 2048  # a query, at most, that FAISS finds on a GPU
DISTANCES_TOGETHER = 2**24  # that `knn_by_torch` holds at a time, about
CPU = torch.device("cpu")


class UselessDescriptors(ValueError):
    """Descriptors that nothing can be found with, and that nobody needs to keep."""


def nearest(
    queries: NDArray[np.float32],
    chunks: Iterable[Chunk],
    k: int,
    device: torch.device = CPU,
    sets: Sequence[int] = (),
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Exact nearest neighbours by L2 distance; the database passes by in chunks.

    FAISS searches, on the CPU or on a CUDA GPU. Where it sees no GPU and PyTorch does, `knn_by_torch` searches; where
    the GPU fails, FAISS goes on on the CPU. The ways by GPU have been tested with stand-ins only, never on a GPU.

    Args:
        queries: Q x D.
        chunks: the database, every index once, in any order.
        k: neighbours a query; all N where there are fewer.
        device: to search on; any but a CUDA GPU is the CPU.
        sets: the number of queries in each of several sets, which follow each other; each finds what it would find
            alone, to the last bit, which the size of matrix products decides.

    Returns:
        Squared distances and database indices, each Q x min(k, N), nearest first; of equal distances the one that came
        first.

    Raises:
        ValueError: a descriptor is not finite; FAISS would answer with nonsense.
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
    """Where each of several sets of the given sizes is among the rows of all, which follow each other."""
    ends = np.cumsum([0, *sets]).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def first(
    distances: NDArray[np.float32], found: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k nearest of what was found, each Q x n, nearest first; of equal distances the one that stands first."""
    best = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, best, 1), np.take_along_axis(found, best, 1)


class _Gpu:
    """A CUDA GPU to search on, until it fails once: what it had no memory for, it would have none for again."""

    def __init__(self, device: torch.device):
        self.device = device
        self.works = True
        self._resources: Any = None

    def knn(self, queries: Tensor, descriptors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `knn_by_torch`, by FAISS where it sees a GPU."""
        if not _faiss_sees_a_gpu():
            return knn_by_torch(queries, descriptors, k)
        import faiss.contrib.torch_utils  # teaches FAISS tensors; it wraps FAISS's functions, so not without need

        if self._resources is None:
            self._resources = faiss.StandardGpuResources()
            self._resources.setTempMemory(2**28)  # in bytes; chunks are small, and so is what they need beside them
        number = torch.cuda.current_device()  # CUDA 12, FAISS's, need not know what CUDA 13, PyTorch's, was told
        distances, rows = faiss.knn_gpu(self._resources, queries, descriptors, k, device=number)
        # FAISS leaves the order of equal distances open on a GPU (and which of those at the k-th one it takes).
        by_row = rows.argsort(dim=1)
        rows, distances = rows.gather(1, by_row), distances.gather(1, by_row)
        order = distances.argsort(dim=1, stable=True)
        return distances.gather(1, order), rows.gather(1, order)


_gpu = cache(_Gpu)


def _faiss_sees_a_gpu() -> bool:
    return bool(getattr(faiss, "get_num_gpus", int)())  # FAISS for CPUs has no such function


@cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)


class _ChunkSearch:
    """The search of one part of the database after another, on the GPU as long as that works.

    Args:
        queries: Q x D.
        device: to search on.
    """

    def __init__(self, queries: NDArray[np.float32], device: torch.device):
        self._queries = queries
        self._gpu = _gpu(device) if device.type == "cuda" else None
        self._on_gpu: Tensor | None = None  # the queries, which stay there

    def __call__(self, descriptors: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Squared distances and rows of the n x D descriptors, each Q x k, k at most n."""
        if self._gpu is not None and self._gpu.works and self._can_find(k):
            try:
                return self._by_gpu(self._gpu, descriptors, k)
            except (RuntimeError, AssertionError, MemoryError) as error:
                self._gpu.works, self._on_gpu = False, None
                logger.debug("the search left the GPU here", exc_info=error)
                _warn_once(f"the search goes on on the CPU, since the GPU cannot: {_reason(error)}")
        try:
            return faiss.knn(self._queries, descriptors, k)
        except (RuntimeError, AssertionError, MemoryError) as error:
            raise ValueError(f"FAISS cannot search exactly: {_reason(error)}") from error

    def _can_find(self, k: int) -> bool:
        if k <= FAISS_GPU_NEIGHBOURS or not _faiss_sees_a_gpu():
            return True
        _warn_once(
            f"{k} matches a query are searched on the CPU, since FAISS finds {FAISS_GPU_NEIGHBOURS} at most on a GPU"
        )
        return False

    def _by_gpu(
        self, gpu: _Gpu, descriptors: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self._on_gpu is None:
            torch.cuda.empty_cache()  # FAISS takes memory of its own, beside what PyTorch keeps for later
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
        k: neighbours a query, at most n.

    Returns:
        Squared distances (fp32) and rows (int64), each Q x k, nearest first; of equal distances the lower row first, as
        FAISS on a CPU has it.
    """
    squares = database.square().sum(dim=1)
    rows = torch.arange(len(database), device=database.device)
    best = []
    with without_tf32():
        for some in queries.split(max(1, DISTANCES_TOGETHER // len(database))):
            distances = some.square().sum(dim=1, keepdim=True) + squares - 2 * (some @ database.T)
            # The bits of a float that is not negative count up with it, so that one number ranks distance, then row.
            bits = distances.clamp_(min=0).view(torch.int32).long()
            best.append((bits << 32 | rows).topk(k, largest=False).values)
    ranked = torch.cat(best)
    return (ranked >> 32).int().view(torch.float32), ranked & 0xFFFFFFFF


def first_of_all(
    own: Callable[[], tuple[NDArray[np.float32], NDArray[np.int64]]], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Merges what each process finds in its part of the database; parts follow each other as the processes do.

    All processes call it at the same point.

    Args:
        own: gives squared distances and database indices as `nearest`, Q x at most k.
        k: neighbours a query, at most as many as the whole database has.

    Returns:
        The k nearest of all, as `nearest`, in the main process; a process's own in the others.

    Raises:
        ValueError: a process could not search.
        SystemExit: in the processes that could have.
    """
    failed: Exception | None = None
    try:
        near, rows = own()
    except Exception as error:  # whatever it is, the others must not wait for ever
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
    missing = ((0, 0), (0, k - near.shape[1]))  # where a part has fewer than k, or nothing
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
    """Within the block, FAISS and PyTorch compute on so many CPU cores; each has an OpenMP library of its own."""
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    try:
        faiss.omp_set_num_threads(count)
        torch.set_num_threads(count)
        yield
    finally:
        faiss.omp_set_num_threads(before[0])
        torch.set_num_threads(before[1])


def require_finite(descriptors: NDArray[np.float32]) -> None:
    """Raises UselessDescriptors unless all n x D numbers are finite."""
    if not np.isfinite(descriptors).all():
        raise UselessDescriptors(
            "descriptors are not finite, so the model's weights are of no use; use another checkpoint"
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
        chunks: gives the database anew each time it is called, as `nearest` takes it.
        count: descriptors in it, N.
        k: neighbours a query, at most N.
        factory: FAISS's description of the index, e.g. "IVF4096,PQ64".
        parameters: of its search, e.g. "nprobe=32".
        device: of the exact search, as in `nearest`; the index is on the CPU.
        sets: as in `nearest`.

    Returns:
        As `nearest`, -1 where the index found fewer than k; and for each set the index's share of what exact search
        finds first ("nearest") and among its first k ("first_k"), in percent, with the number of queries this was seen
        on.

    Raises:
        ValueError: as `new_index`, `train_index`, `add_to_index` and `search_index`.
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
    """The queries of a set, by their rows, that an approximate search is compared with exact search on."""
    return rows[:: max(1, -(-len(rows) // CHECKED_QUERIES))]


def log_agreement(name: str, found: Sequence[NDArray[np.int64]], exact: NDArray[np.int64]) -> list[dict[str, float]]:
    """Says how much of what exact search finds an index does.

    Args:
        name: of the index.
        found: database indices of each set of queries, Q x k each.
        exact: those of the `checked_queries` of all sets, which follow each other.

    Returns:
        For each set the shares, in percent, of what is first ("nearest") and among the first k ("first_k"), and the
        number of "queries".
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
