"""Exact nearest neighbours, FAISS's indices beside them, merged crops and recall, against plain loops."""

import logging

import numpy as np
import pytest

from utils.retrieval.faiss_index import nearest_by_index
from utils.retrieval.search import merge_crops, nearest, recall_at


def in_chunks(database, sizes, order=None):
    order = np.arange(len(database)) if order is None else order
    return [(part, database[part]) for part in np.split(order, np.cumsum(sizes)[:-1])]


@pytest.mark.parametrize("sizes", [[50], [20, 20, 10], [3, 40, 7]])
@pytest.mark.parametrize("k", [10, 60])
def test_search_is_exact_however_the_database_comes(sizes, k):
    rng = np.random.default_rng(0)
    queries, database = rng.standard_normal((7, 12)).astype("f"), rng.standard_normal((50, 12)).astype("f")
    distances, predictions = nearest(queries, in_chunks(database, sizes, rng.permutation(50)), k)
    expected = ((queries[:, None] - database[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(predictions, np.argsort(expected, axis=1)[:, :k])
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :k], rtol=1e-5)


def test_descriptors_that_are_not_finite_are_refused():
    for queries, database in ((np.nan, 1), (1, np.inf)):
        with pytest.raises(ValueError, match="descriptors are not finite"):
            nearest(np.full((2, 3), queries, "f"), in_chunks(np.full((2, 3), database, "f"), [2]), 1)


def test_faiss_errors_of_exact_search_are_errors_of_ours(monkeypatch):
    def fails(*_):
        raise RuntimeError("Error in void* faiss::f(int) at /x/GpuResources.cpp:530: Error: 'err' failed: no memory")

    monkeypatch.setattr("faiss.knn", fails)
    with pytest.raises(ValueError, match="^FAISS cannot search exactly: 'err' failed: no memory"):
        nearest(np.eye(3, dtype="f"), in_chunks(np.eye(3, dtype="f"), [3]), 1)


@pytest.mark.parametrize(("factory", "exact"), [("Flat", True), ("HNSW16", False), ("IVF4,Flat", False)])
def test_an_index_is_compared_with_exact_search(factory, exact, caplog):
    rng = np.random.default_rng(0)
    database = rng.standard_normal((300, 16)).astype("f")
    queries = database[::3] + 0.01 * rng.standard_normal((100, 16)).astype("f")
    chunks = in_chunks(database, [100, 100, 100], rng.permutation(300))
    with caplog.at_level(logging.INFO):
        distances, predictions, (agreement,) = nearest_by_index(queries, lambda: chunks, 300, 5, factory=factory)
    _, expected = nearest(queries, chunks, 5)
    shared = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(predictions, expected, strict=True)])
    assert agreement["first_k"] == pytest.approx(100 * shared) and agreement["queries"] == 100
    assert (agreement["first_k"] == 100) == exact and agreement["nearest"] > 90
    assert f"index {factory} finds the nearest image of" in caplog.text
    filled = predictions >= 0
    squared = ((queries[:, None] - database[predictions]) ** 2).sum(axis=2)
    np.testing.assert_allclose(distances[filled], squared[filled], rtol=1e-3)


@pytest.mark.parametrize(("factory", "parameters"), [("IVF", ""), ("Flat", "nonsense=3"), ("IVF4096,Flat", "")])
def test_an_index_that_cannot_be_made(factory, parameters):
    database = np.random.default_rng(0).standard_normal((300, 16)).astype("f")
    with pytest.raises(ValueError, match=f"index '{factory}.* leave out index"):
        nearest_by_index(database, lambda: in_chunks(database, [300]), 300, 5, factory=factory, parameters=parameters)


def test_recall_counts_every_query():
    predictions = np.array([[4, 0, 2], [1, 2, 3], [3, 4, 0], [0, 1, 2]])
    positives = [np.array([2, 3]), np.array([], dtype=int), np.array([3]), np.array([4])]
    assert recall_at(predictions, positives, [1, 2, 3, 50]) == {1: 25.0, 2: 25.0, 3: 50.0, 50: 50.0}


def test_recall_against_plain_loops():
    rng = np.random.default_rng(3)
    predictions = np.array([rng.permutation(40)[:20] for _ in range(30)])
    positives = [rng.choice(40, size=rng.integers(0, 4), replace=False) for _ in range(30)]
    for n, recall in recall_at(predictions, positives, [1, 5, 10, 20]).items():
        hits = [not {*row[:n]}.isdisjoint(right) for row, right in zip(predictions.tolist(), positives, strict=True)]
        assert recall == pytest.approx(100 * sum(hits) / 30)


def test_merging_keeps_the_nearest_occurrence():
    predictions = np.array([[1, 2], [3, 1]])
    distances = np.array([[0.5, 0.6], [0.1, 0.2]], dtype="f")
    lengths, merged = merge_crops(distances, predictions, crops=2)
    assert merged.tolist() == [[3, 1]] and lengths.ravel().tolist() == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_merging_what_an_index_did_not_fill(weight):
    distances = np.array([[0.5, np.inf], [0.1, np.inf]], dtype="f")
    lengths, merged = merge_crops(distances, np.array([[1, -1], [1, -1]]), crops=2, majority_weight=weight)
    assert merged.tolist() == [[1, -1]] and np.isinf(lengths[0, 1])


def test_agreeing_crops_move_an_image_up():
    predictions = np.array([[1, 2], [3, 1], [4, 2], [5, 6], [7, 8]])
    distances = np.array([[0.500, 0.9], [0.495, 0.501], [0.9, 0.9], [0.9, 0.9], [0.9, 0.9]], dtype="f")
    assert merge_crops(distances, predictions)[1].tolist() == [[3, 1]]
    # Image 1 stands twice among the first 5 columns: 0.500 - 0.01 * 2/5 - 0.01 * 2/10 = 0.494.
    assert merge_crops(distances, predictions, majority_weight=0.01)[1].tolist() == [[1, 3]]
