"""Search by signs, ranked exactly: what it finds, and how eval.py takes it."""

import numpy as np
import pytest
from helpers import results_of

from utils.retrieval.binary_codes import codes_of, nearest_by_codes
from utils.retrieval.search import nearest


def unit_rows(count, dim, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def in_chunks(rows, order, size):
    return lambda: ((order[start : start + size], rows[order[start : start + size]]) for start in range(0, 90, size))


def test_a_code_is_a_bit_for_each_number_above_0():
    codes = codes_of(np.array([[1, -1, 0, 2, -3, 5, 0, 1, 7], [-1] * 9], dtype=np.float32))
    assert codes.tolist() == [[0b10010101, 0b10000000], [0, 0]]


@pytest.mark.parametrize(("dim", "rerank"), [(64, 5), (61, 20), (61, 1000)])
def test_it_is_the_first_by_bits_ranked_exactly(monkeypatch, dim, rerank):
    monkeypatch.setattr("utils.retrieval.binary_codes.PAIRS_TOGETHER", 7)
    database, queries = unit_rows(90, dim), unit_rows(12, dim, seed=1)
    order = np.random.default_rng(2).permutation(90)
    distances, found, (agreement,) = nearest_by_codes(queries, in_chunks(database, order, 25), 90, 5, rerank=rerank)
    hamming = ((queries > 0)[:, None] != (database > 0)).sum(axis=2)
    exact = ((queries[:, None] - database) ** 2).sum(axis=2)
    reached = np.sort(hamming, axis=1)[:, min(rerank, 90) - 1]
    for query, images in enumerate(found):
        assert (hamming[query, images] <= reached[query]).all()
        surely = np.flatnonzero(hamming[query] < reached[query])  # of the last distance any may be taken
        best = surely[np.argsort(exact[query, surely])][:5]
        assert exact[query, images].max() <= exact[query, best].max() + 1e-6 or len(best) < 5
    np.testing.assert_allclose(distances, np.take_along_axis(exact, found, 1), rtol=1e-4)
    right = np.argsort(exact, axis=1)[:, :5]
    assert agreement["nearest"] == pytest.approx(100 * np.mean((found == right[:, :1]).any(axis=1)))
    assert agreement["queries"] == 12
    if rerank >= 90:
        np.testing.assert_array_equal(found, right)
        assert agreement["nearest"] == agreement["first_k"] == 100


def test_equal_descriptors_keep_the_order_of_exact_search():
    database = np.repeat(unit_rows(6, 16), 15, axis=0)
    chunks = in_chunks(database, np.arange(90)[::-1].copy(), 40)
    _, found, _ = nearest_by_codes(database[::15], chunks, 90, 4, rerank=30)
    np.testing.assert_array_equal(found, nearest(database[::15], chunks(), 4)[1])


def test_sets_are_told_apart():
    database, queries = unit_rows(90, 32), unit_rows(10, 32, seed=1)
    chunks = in_chunks(database, np.arange(90), 90)
    distances, found, agreements = nearest_by_codes(queries, chunks, 90, 3, rerank=9, sets=(7, 3))
    for part, agreement in zip((slice(0, 7), slice(7, 10)), agreements, strict=True):
        alone = nearest_by_codes(queries[part], chunks, 90, 3, rerank=9)
        np.testing.assert_array_equal(found[part], alone[1])
        np.testing.assert_array_equal(distances[part], alone[0])
        assert alone[2] == [agreement]


def test_descriptors_of_no_use_are_refused():
    queries = unit_rows(1500, 16)
    queries[1] = np.nan  # not among those that are compared with exact search
    with pytest.raises(ValueError, match="not finite"):
        nearest_by_codes(queries, in_chunks(unit_rows(90, 16), np.arange(90), 90), 90, 3, rerank=9)


def test_eval_takes_it_as_an_index(evaluated, capsys):
    """Of 15 images all are ranked exactly; each crop is a query."""
    results = results_of(evaluated("--index=binary", "--test_method=nearest_crop", "--rerank=20"))
    assert results["index_agreement"] == {"nearest": 100.0, "first_k": 100.0, "queries": 15 * 5}
    assert "index binary (48 bytes per image, the first 15 ranked exactly) finds" in capsys.readouterr().err
