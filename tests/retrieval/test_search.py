"""Nearest neighbours, merged crops and recall against plain loops; what is searched where; what stays if that fails."""

import logging
import shlex
import shutil
import signal
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import faiss
import numpy as np
import pytest
import torch
import warm
from helpers import SMALL, only_run, results_of

import eval as eval_script
from utils.retrieval import contexts as retrieval
from utils.retrieval import search
from utils.retrieval.indices import nearest_by_index
from utils.retrieval.search import CPU, correct_among, knn_by_torch, merge_crops, nearest, recall_of
from utils.system import device as device_module
from utils.system import distributed

GPU = torch.device("cuda")


def whole_numbers(queries, database, dim=12):
    """Descriptors whose distances are exact in any order of adding, and mostly equal to others."""
    rng = np.random.default_rng(queries * database)
    made = rng.integers(-1, 2, (queries + database, dim)).astype("f")
    made[queries + 7 :: 9] = made[queries]  # copies
    return made[:queries], made[queries:]


def by_hand(queries, database, k):
    distances = ((queries[:, None] - database[None]) ** 2).sum(axis=2)
    found = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, found, 1), found


def chunked(database, size, order=None):
    order = np.arange(len(database)) if order is None else order
    return [(part, database[part]) for part in np.split(order, range(size, len(order), size))]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# FAISS computes few queries (below 20) apart from many, and keeps few neighbours (1, below 100) otherwise than many.
@pytest.mark.parametrize("queries", [3, 19, 20, 300])
@pytest.mark.parametrize("k", [1, 20, 99, 100, 700])
def test_of_equal_distances_faiss_and_torch_take_the_lower_row(queries, k, monkeypatch):
    monkeypatch.setattr(search, "DISTANCES_TOGETHER", 5000)
    queries, database = whole_numbers(queries, 700)
    expected = by_hand(queries, database, k)
    assert k == 1 or (np.diff(expected[0], axis=1) == 0).mean() > 0.5, "ties"
    assert_same(faiss.knn(queries, database, k), expected)
    distances, rows = knn_by_torch(torch.from_numpy(queries), torch.from_numpy(database), k)
    assert (distances.dtype, rows.dtype) == (torch.float32, torch.int64)
    assert_same((distances.numpy(), rows.numpy()), expected)


def test_torch_finds_what_faiss_finds_among_unit_vectors():
    rng = np.random.default_rng(0)
    database = rng.standard_normal((900, 128)).astype("f")
    database /= np.linalg.norm(database, axis=1, keepdims=True)
    database[100::100] = database[0]
    queries = np.concatenate((database[:5], database[5:60] + 0.02 * rng.standard_normal((55, 128)).astype("f")))
    distances, rows = (t.numpy() for t in knn_by_torch(torch.from_numpy(queries), torch.from_numpy(database), 10))
    expected = faiss.knn(queries, database, 10)
    np.testing.assert_allclose(distances, expected[0], atol=2e-6)
    np.testing.assert_array_equal(rows, expected[1])
    assert rows[0, :9].tolist() == list(range(0, 900, 100)) and (distances >= 0).all()


def test_tf32_is_off_around_the_search_by_torch(monkeypatch):
    seen, real = [], torch.Tensor.__matmul__

    def product(a, b):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return real(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    device_module.allow_tf32(True)
    try:
        knn_by_torch(torch.eye(3), torch.eye(3), 2)
        assert seen == [False] and torch.backends.cuda.matmul.allow_tf32
    finally:
        device_module.allow_tf32(False)


@pytest.mark.parametrize("size", [50, 20, 3])
@pytest.mark.parametrize("k", [10, 60])
def test_search_is_exact_however_the_database_comes(size, k):
    rng = np.random.default_rng(0)
    queries, database = rng.standard_normal((7, 12)).astype("f"), rng.standard_normal((50, 12)).astype("f")
    distances, predictions = nearest(queries, chunked(database, size, rng.permutation(50)), k)
    expected = ((queries[:, None] - database[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(predictions, np.argsort(expected, axis=1)[:, :k])
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :k], rtol=1e-5)


def test_descriptors_that_are_not_finite_are_refused():
    for queries, database in ((np.nan, 1), (1, np.inf)):
        with pytest.raises(ValueError, match="descriptors are not finite"):
            nearest(np.full((2, 3), queries, "f"), chunked(np.full((2, 3), database, "f"), 2), 1)


@pytest.mark.parametrize(("factory", "exact"), [("Flat", True), ("HNSW16", False), ("IVF4,Flat", False)])
def test_an_index_is_compared_with_exact_search(factory, exact, caplog):
    rng = np.random.default_rng(0)
    database = rng.standard_normal((300, 16)).astype("f")
    queries = database[::3] + 0.01 * rng.standard_normal((100, 16)).astype("f")
    chunks = chunked(database, 100, rng.permutation(300))
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
        nearest_by_index(database, lambda: chunked(database, 300), 300, 5, factory=factory, parameters=parameters)


by_signs = partial(nearest_by_index, factory="binary")


def unit_rows(count, dim, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(("dim", "rerank"), [(64, 5), (61, 20), (61, 1000)])
def test_signs_find_the_first_by_bits_ranked_exactly(monkeypatch, dim, rerank):
    monkeypatch.setattr("utils.retrieval.indices.PAIRS_TOGETHER", 7)
    database, queries = unit_rows(90, dim), unit_rows(12, dim, seed=1)
    order = np.random.default_rng(2).permutation(90)
    distances, found, (agreement,) = by_signs(queries, lambda: chunked(database, 25, order), 90, 5, rerank=rerank)
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
    chunks = chunked(database, 40, np.arange(90)[::-1].copy())
    _, found, _ = by_signs(database[::15], lambda: chunks, 90, 4, rerank=30)
    np.testing.assert_array_equal(found, nearest(database[::15], chunks, 4)[1])


def test_no_query_that_is_not_finite_is_searched_by_signs():
    queries = unit_rows(1500, 16)
    queries[1] = np.nan  # not among those that are compared with exact search
    with pytest.raises(ValueError, match="not finite"):
        by_signs(queries, lambda: chunked(unit_rows(90, 16), 90), 90, 3, rerank=9)


def test_eval_takes_signs_as_an_index(evaluated, capsys):
    """Of 15 images all are ranked exactly; each crop is a query."""
    results = results_of(evaluated("--index=binary", "--test_method=nearest_crop", "--rerank=20"))
    assert results["index_agreement"] == {"nearest": 100.0, "first_k": 100.0, "queries": 15 * 5}
    assert "index binary (48 bytes per image, the first 15 ranked exactly) finds" in capsys.readouterr().err


def test_recall_against_plain_loops():
    rng = np.random.default_rng(3)
    predictions = np.array([rng.permutation(40)[:20] for _ in range(30)])
    positives = [rng.choice(40, size=rng.integers(0, 4), replace=False) for _ in range(30)]
    assert any(not len(right) for right in positives), "every query counts"
    for n, recall in recall_of(correct_among(predictions, positives), [1, 5, 10, 20]).items():
        hits = [not {*row[:n]}.isdisjoint(right) for row, right in zip(predictions.tolist(), positives, strict=True)]
        assert recall == pytest.approx(100 * sum(hits) / 30)


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


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose memory is the main memory, and full from the n-th time on that it searches; what it does is noted."""

    def make(full_from=None):
        real = search.knn_by_torch

        def by_torch(*given):
            if full_from is not None and made.searched.call_count >= full_from:
                raise torch.OutOfMemoryError("CUDA out of\nmemory.")
            return real(*given)

        made = SimpleNamespace(
            uploaded=Mock(side_effect=lambda device, rows: torch.from_numpy(rows)),
            searched=Mock(side_effect=by_torch),
            on_cpu=Mock(side_effect=faiss.knn),
        )
        monkeypatch.setattr(search, "_on", made.uploaded)
        monkeypatch.setattr(search, "knn_by_torch", made.searched)
        monkeypatch.setattr(faiss, "knn", made.on_cpu)
        return made

    return make


@pytest.mark.parametrize(("full_from", "sets"), [(None, ()), (None, (7, 23)), (1, ()), (3, ())])
def test_a_gpu_finds_what_the_cpu_finds_and_leaves_the_rest_to_it(gpu, caplog, full_from, sets):
    queries, database = whole_numbers(30, 300)
    database[::40] = queries[0]
    chunks = chunked(database, 60, np.random.default_rng(1).permutation(300))
    expected = nearest(queries, chunks, 60)
    made = gpu(full_from)
    assert_same(nearest(queries, chunks, 60, GPU, sets), expected)
    uploaded = [len(rows) for (_, rows), _ in made.uploaded.call_args_list]
    assert sum(rows != 60 for rows in uploaded) == max(1, len(sets)), "the queries stay there"
    assert made.on_cpu.call_count == (0 if full_from is None else 6 - full_from)
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == (full_from is not None) and all("CUDA out of memory." in line for line in warnings)
    nearest(queries, chunks, 5, torch.device("mps"))
    assert made.on_cpu.call_count >= 5, "no other device searches"


def test_the_search_has_the_cores_of_those_that_wait(monkeypatch):
    """And so has the encoder, on both sides: its last bits may depend on the number of threads."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(retrieval, "usable_cores", lambda alone: 6 if alone else 3)
    seen = []

    def rows_of(*_):
        seen.append((faiss.omp_get_max_threads(), torch.get_num_threads()))
        return np.zeros((1, 2), dtype="f")

    def nearest_of(queries, chunks, k, *_):
        return rows_of()[:, :k], np.zeros((1, k), dtype=np.int64)

    monkeypatch.setattr(search, "nearest", nearest_of)
    monkeypatch.setattr(retrieval.Search, "rows", rows_of)
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    searched = retrieval.Search(None, {"database": [0], "queries": [0]}, infer_batch_size=16, device=CPU)
    searched.run(1)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    searched.run(1)
    assert seen == [(6, 6)] * 2 + [before] * 2, "a process on its own is left as it is"


@pytest.fixture
def flags(city, weights, tmp_path):
    data = ["--no_labels", f"--eval_datasets_folder={city}"]
    return [*SMALL, *data, "--crossimage_encoder", f"--resume={weights}/encoder.pth", f"--save_dir={tmp_path}/runs"]


@pytest.fixture
def evaluate(flags, tmp_path, capsys):
    """Runs eval.py; returns the exit status, what it said, and the run's folder."""

    def run(*more, names=("toy_city",)):
        earlier = set(tmp_path.glob("runs/[!l]*"))  # not the link to the latest
        status = 0
        try:
            eval_script.main([*flags, "--eval_dataset_name", *names, *more])
        except SystemExit as exit_:
            status = exit_.code
        (folder,) = set(tmp_path.glob("runs/[!l]*")) - earlier
        return status, capsys.readouterr().err, folder

    return run


def test_a_search_that_fails_can_be_gone_on_with(evaluate, passed, city, monkeypatch, tmp_path):
    """The second one, of several datasets; a photo that has changed since is not taken for the old one."""
    (tmp_path / "data").mkdir()
    for name in ("a town", "b"):
        shutil.copytree(city / "toy_city", tmp_path / "data" / name)
    more = [f"--eval_datasets_folder={tmp_path}/data", "--pca_dim=5", "--pca_dataset_folder=b/images/train"]
    names = ["a town", "b"]
    status, _, right = evaluate(*more, names=names)
    assert status == 0 and len(passed) >= 60 and not (right / "extracted").exists()
    with monkeypatch.context() as failing:
        failing.setattr(faiss, "knn", Mock(side_effect=[faiss.knn(*[np.eye(15, 5, dtype="f")] * 2, 15), MemoryError()]))
        status, said, failed = evaluate(*more, names=names)
    kept = failed / "extracted"
    (line,) = [line for line in said.splitlines() if "what was extracted is kept" in line]
    (advice,) = [word for word in shlex.split(line.split(": ", 2)[-1]) if word.startswith("--descriptors_folder=")]
    assert status == 1 and advice == f"--descriptors_folder={kept}" and "Traceback" not in said
    stores = {str(path.relative_to(kept)) for path in kept.rglob("*.npy")}
    sides = ("database", "queries", "pca")
    assert stores == {f"{town}_test/{side}.npy" for town in ("a_town", "b") for side in sides}
    passed.clear()
    status, said, again = evaluate(*more, advice, names=names)
    assert status == 0 and passed == [] and "computed again" not in said
    for name in names:
        assert (again / name / "predictions.csv").read_text() == (right / name / "predictions.csv").read_text()
    next((tmp_path / "data/b/images/test/queries").iterdir()).write_bytes(b"another")
    status, said, _ = evaluate(*more, advice, names=names)
    assert status == 2 and "the photos of queries have changed" in said and "another --descriptors_folder" in said


@pytest.mark.slow
def test_descriptors_outlive_the_process(evaluate, flags, passed, tmp_path):
    """As when FAISS aborts it in the search: the next run names them and goes on from them."""
    run = warm.run("aborted.py", *flags, "--eval_dataset_name=toy_city")
    assert run.returncode == -signal.SIGABRT, run.stderr
    aborted = only_run(tmp_path / "runs")
    status, said, _ = evaluate("--recall_values=1")
    (line,) = [line for line in said.splitlines() if "interrupted run" in line]
    advice = next(word.rstrip(";") for word in line.split() if word.startswith("--descriptors_folder="))
    assert status == 0 and advice == f"--descriptors_folder={aborted}/extracted"
    assert f"rm -r {aborted}/extracted" in line
    passed.clear()
    assert evaluate(advice)[0] == 0 and passed == []
