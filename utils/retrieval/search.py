"""Exact nearest neighbours of descriptors, recall, and the merging of crops."""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..system.device import without_tf32

logger = logging.getLogger(__name__)

# A part of the database: indices (n) and descriptors (n x D).
Chunk = tuple[NDArray[np.int64], NDArray[np.float32]]

DISTANCES_TOGETHER = 2**24  # that `knn_by_torch` holds at a time, roughly
CPU = torch.device("cpu")


def nearest(
    queries: NDArray[np.float32],
    chunks: Iterable[Chunk],
    k: int,
    device: torch.device = CPU,
    sets: Sequence[int] = (),
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Exact nearest neighbours by L2 distance; the database is read in chunks.

    FAISS searches on the CPU, `knn_by_torch` on a CUDA GPU; if the GPU fails, the CPU goes on. The GPU has been tested
    with stand-ins only.

    Args:
        queries: Q x D.
        chunks: the database, every index once, in any order.
        sets: the number of queries in each of several consecutive sets; each set finds what it would find alone, to the
            last bit, which depends on the size of matrix products.

    Returns:
        Squared distances and database indices, Q x min(k, N), nearest first; equal distances in the order of chunks.
    """
    require_finite(queries)
    distances = np.empty((len(queries), 0), dtype=np.float32)
    predictions = np.empty((len(queries), 0), dtype=np.int64)
    query_sets = [queries[part] for part in parts_of(sets or [len(queries)])]
    on_gpu: list[Tensor] = []  # the same, which stay there
    gpu = device.type == "cuda"  # until it fails once
    for indices, descriptors in chunks:
        require_finite(descriptors)
        count, answers = min(k, len(descriptors)), []
        if gpu:
            try:
                on_gpu = on_gpu or [_on(device, rows) for rows in query_sets]
                database = _on(device, descriptors)
                tensors = [knn_by_torch(rows, database, count) for rows in on_gpu]
                answers = [(near.cpu().numpy(), rows.cpu().numpy()) for near, rows in tensors]
            except RuntimeError as error:  # mostly for lack of memory
                gpu, on_gpu = False, []
                logger.debug("the search left the GPU here", exc_info=error)
                logger.warning("the search continues on the CPU, since it failed on the GPU: %s", reason(error))
        answers = answers or [faiss.knn(rows, descriptors, count) for rows in query_sets]
        near, rows = (np.concatenate(side) for side in zip(*answers, strict=True))
        distances = np.concatenate((distances, near), axis=1)
        predictions = np.concatenate((predictions, indices[rows]), axis=1)
        distances, predictions = first(distances, predictions, k)
    return distances, predictions


def parts_of(sets: Sequence[int]) -> list[slice]:
    """The rows of each of several consecutive sets of the given sizes."""
    ends = np.cumsum([0, *sets]).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def first(
    distances: NDArray[np.float32], predictions: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k nearest of n database images per query, each Q x n, nearest first; equal distances keep their order."""
    best = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, best, 1), np.take_along_axis(predictions, best, 1)


def _on(device: torch.device, rows: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows)).to(device)


def reason(error: BaseException) -> str:
    """What an error of FAISS or PyTorch says, in one line, without FAISS's function and line."""
    message = re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", str(error).strip(), flags=re.DOTALL)
    return " ".join(message.split()) or "no memory left"


@torch.inference_mode()
def knn_by_torch(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `faiss.knn` finds for Q x D queries in an n x D database, on their device: exact, in full fp32.

    Returns:
        Squared distances (fp32) and rows (int64), Q x k, nearest first; equal distances by row, as with FAISS on a CPU.
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


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Within the block, FAISS and PyTorch use `count` CPU cores; each may have an OpenMP library of its own."""
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
    """Raises ValueError if any of the n x D numbers is not finite."""
    if not np.isfinite(descriptors).all():
        raise ValueError("descriptors are not finite, so the model's weights are useless; use another checkpoint")


def correct_among(predictions: NDArray[np.int64], positives: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
    """Which of Q x k predictions, indices or -1 for none, are among the query's `positives`, which are read once."""
    return np.array([np.isin(row, images) for row, images in zip(predictions, positives, strict=True)])


def recall_of(correct: NDArray[np.bool_], recall_values: Sequence[int]) -> dict[int, float]:
    """Recall@N: percentage of ALL queries with a correct image among the first N; one without positives is a miss.

    `correct`, Q x k, is from `correct_among`.
    """
    return {n: 100.0 * float(correct[:, :n].any(axis=1).mean()) for n in recall_values}


def merge_crops(
    distances: NDArray[np.float32], predictions: NDArray[np.int64], *, crops: int = 5, majority_weight: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Merges the search results of several crops of each query into one.

    Args:
        distances: Q*crops x k, squared; the rows of a query's crops are consecutive.
        predictions: the database indices, likewise; -1 where an index found fewer than k.
        crops: rows per query.
        majority_weight: 0 ranks by distance (`nearest_crop`). Above 0, images that several crops agree on move up
            first (`maj_voting`): among the first 1, then 5, then 10 columns, each image that occurs more than once has
            its distances there lowered by weight * occurrences / columns.

    Returns:
        Distances, including lowered ones, and database indices, Q x k; an image counts at its first occurrence.

    Source: the Visual Geo-localization Benchmark (Berton et al. 2022).
    """
    k = predictions.shape[1]
    merged = np.full((len(predictions) // crops, k), -1, dtype=np.int64)
    merged_distances = np.full(merged.shape, np.inf, dtype=np.float32)
    for query in range(len(merged)):
        rows = slice(query * crops, (query + 1) * crops)
        images, squared = predictions[rows], distances[rows].copy()
        for columns in (1, 5, 10) if majority_weight else ():
            top_images, top_distances = images[:, :columns], squared[:, :columns]
            for image, count in zip(*np.unique(top_images, return_counts=True), strict=True):
                if count > 1 and image >= 0:
                    top_distances[top_images == image] -= majority_weight * count / columns
        order = np.argsort(squared, axis=None, kind="stable")
        order = order[images.ravel()[order] >= 0]
        ranked = images.ravel()[order]
        first = np.sort(np.unique(ranked, return_index=True)[1])[:k]
        merged[query, : len(first)] = ranked[first]
        merged_distances[query, : len(first)] = squared.ravel()[order][first]
    return merged_distances, merged
