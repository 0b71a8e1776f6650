"""Nearest neighbours of descriptors, and what is counted and merged from them."""

from collections.abc import Sequence

import faiss
import numpy as np
from numpy.typing import NDArray


def nearest(
    queries: NDArray[np.float32], database: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Exact nearest neighbours by L2 distance (FAISS), without a second copy of the database.

    Args:
        queries: Q x D.
        database: N x D.
        k: neighbours a query; all N where there are fewer.

    Returns:
        Squared distances and database indices, each Q x min(k, N), nearest first.

    Raises:
        ValueError: a descriptor is not finite; FAISS would answer with nonsense.
    """
    if not (np.isfinite(queries).all() and np.isfinite(database).all()):
        raise ValueError("descriptors are not finite, so the model's weights are of no use; use another checkpoint")
    return faiss.knn(queries, database, min(k, len(database)))


def recall_at(
    predictions: NDArray[np.int64], positives: Sequence[NDArray[np.int64]], recall_values: Sequence[int]
) -> dict[int, float]:
    """Recall@N: percentage of ALL queries with a correct image among the first N; one without positives is a miss.

    Args:
        predictions: Q x k database indices, best first.
        positives: for each query the indices of its correct database images.
        recall_values: the N.
    """
    # Each (query, image) pair as one number, so that all queries are looked up at once.
    images = 1 + max(predictions.max(initial=0), max((p.max(initial=0) for p in positives), default=0))
    query_of_positive = np.repeat(np.arange(len(positives)), [len(p) for p in positives])
    correct_pairs = query_of_positive * images + np.concatenate(positives)
    predicted_pairs = np.arange(len(predictions))[:, None] * images + predictions
    correct = np.isin(predicted_pairs, correct_pairs)  # (Q, k)
    return {n: 100.0 * float(correct[:, :n].any(axis=1).mean()) for n in recall_values}


def merge_crops(
    distances: NDArray[np.float32], predictions: NDArray[np.int64], *, crops: int = 5, majority_weight: float = 0.0
) -> NDArray[np.int64]:
    """Merges the search results of several crops of each query into one.

    Args:
        distances: Q*crops x k squared L2 distances; the rows of a query's crops follow each other.
        predictions: the database indices beside them.
        crops: rows a query.
        majority_weight: 0 ranks by distance (`nearest_crop`). Above 0, images that several crops agree on move up
            first (`maj_voting`): among the first 1, then 5, then 10 columns, each image that occurs more than once has
            its distances there lowered by weight * occurrences / columns.

    Returns:
        Q x k database indices; an image counts at its first occurrence.

    Source: the Visual Geo-localization Benchmark (Berton et al. 2022).
    """
    k = predictions.shape[1]
    merged = np.empty((len(predictions) // crops, k), dtype=np.int64)
    for query in range(len(merged)):
        rows = slice(query * crops, (query + 1) * crops)
        found, lengths = predictions[rows], distances[rows].copy()
        for columns in (1, 5, 10) if majority_weight else ():
            top_found, top_lengths = found[:, :columns], lengths[:, :columns]
            for image, count in zip(*np.unique(top_found, return_counts=True), strict=True):
                if count > 1:
                    top_lengths[top_found == image] -= majority_weight * count / columns
        ranked = found.ravel()[np.argsort(lengths, axis=None, kind="stable")]
        first = np.sort(np.unique(ranked, return_index=True)[1])[:k]
        merged[query] = ranked[first]
    return merged
