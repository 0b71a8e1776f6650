"""What is searched where: FAISS, a GPU (by stand-ins), several processes; and what stays if the search fails."""

import csv
import logging
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch
import warm

import eval as eval_script
import test as evaluation
from datasets.evaluation.database_queries import DatabaseQueries
from datasets.photos.transforms import evaluation_transform
from model import build_model
from utils.retrieval import contexts as retrieval
from utils.retrieval import extraction, search
from utils.retrieval.descriptor_store import DescriptorStore
from utils.retrieval.search import CPU, UselessDescriptors, first_of_all, knn_by_torch, nearest
from utils.system import device as device_module
from utils.system import distributed

GPU = torch.device("cuda")
SMALL = "--backbone=dino_tiny --device=cpu --num_workers=0 --resize 56 56 --no_labels --crossimage_encoder".split()


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
    return [
        (order[start : start + size], database[order[start : start + size]]) for start in range(0, len(order), size)
    ]


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


class StandIn:
    """A GPU whose memory is the main memory; FAISS sees `gpus` of it, and answers with ties in reverse order."""

    def __init__(self, monkeypatch, gpus):
        self.did, self.uploaded, self.fails_at = [], [], 0
        gpu = search._Gpu(CPU)
        monkeypatch.setattr(search, "_gpu", lambda device: gpu)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.did.append("freed"))
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: gpus, raising=False)
        monkeypatch.setattr(faiss, "knn_gpu", self.knn, raising=False)
        monkeypatch.setattr(faiss, "StandardGpuResources", self.resources, raising=False)
        monkeypatch.setitem(sys.modules, "faiss.contrib.torch_utils", SimpleNamespace())
        real = torch.from_numpy
        monkeypatch.setattr(torch, "from_numpy", lambda rows: self.uploaded.append(rows.shape) or real(rows))
        self.on_cpu, real_knn = 0, faiss.knn

        def knn(*given):
            self.on_cpu += 1
            return real_knn(*given)

        monkeypatch.setattr(faiss, "knn", knn)
        search._warn_once.cache_clear()

    def resources(self):
        self.did.append("resources")
        return SimpleNamespace(setTempMemory=lambda size: None)

    def knn(self, resources, queries, descriptors, k, device):
        self.did.append("searched")
        assert device == 3 and k <= 2048
        if self.did.count("searched") == self.fails_at:
            raise RuntimeError("Error in void faiss::f() at /x/GpuResources.cpp:7: Error: 'e' failed: out of\nmemory")
        distances, rows = (torch.from_numpy(side) for side in by_hand(queries.numpy(), descriptors.numpy(), k))
        order = (distances * 10_000 - rows).argsort(dim=1)
        return distances.gather(1, order), rows.gather(1, order)


@pytest.mark.parametrize("gpus", [1, 0])
def test_the_ways_by_gpu_find_what_the_cpu_finds(monkeypatch, gpus):
    queries, database = whole_numbers(30, 300)
    database[::40] = queries[0]
    chunks = chunked(database, 70, np.random.default_rng(1).permutation(300))
    expected = nearest(queries, chunks, 70)  # all of a chunk, so that none is left out among equals
    gpu = StandIn(monkeypatch, gpus)
    assert_same(nearest(queries, chunks, 70, GPU), expected)
    assert gpu.on_cpu == 0 and gpu.did == (["freed", "resources", *5 * ["searched"]] if gpus else ["freed"])
    assert gpu.uploaded.count(queries.shape) == 1, "the queries stay there"


def test_the_cpu_that_was_asked_for_is_used(monkeypatch, evaluate, tmp_path):
    gpu = StandIn(monkeypatch, 1)
    monkeypatch.setattr("test.require_index", lambda *_, **__: None)  # which takes seconds
    queries, database = whole_numbers(30, 300)
    nearest(queries, chunked(database, 100), 5, CPU)
    nearest(queries, chunked(database, 100), 5, torch.device("mps"))
    assert gpu.on_cpu == 6
    assert evaluate()[0] == 0  # --device=cpu
    assert evaluate("--index=Flat")[0] == 0
    assert gpu.on_cpu == 8 and gpu.did == []


@pytest.mark.parametrize("gpus", [1, 0])
def test_more_neighbours_than_faiss_finds_on_a_gpu(monkeypatch, caplog, gpus):
    queries, database = whole_numbers(3, 2200)
    expected = nearest(queries, chunked(database, 2100), 2050)
    gpu = StandIn(monkeypatch, gpus)
    for _ in range(2):
        assert_same(nearest(queries, chunked(database, 2100), 2050, GPU), expected)
    said = [record.message for record in caplog.records]
    if gpus:
        assert said == ["the 2050 matches per query are searched on the CPU, since FAISS on a GPU finds at most 2048"]
    assert gpu.on_cpu == (2 if gpus else 0) and len(said) == gpus
    assert_same(nearest(queries, chunked(database, 2100), 2048, GPU), [side[:, :2048] for side in expected])
    assert len(caplog.records) == gpus


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_gpu_that_fails_leaves_the_search_to_the_cpu(monkeypatch, caplog, fails_at):
    queries, database = whole_numbers(30, 300)
    chunks = chunked(database, 60)
    expected = nearest(queries, chunks, 60)
    gpu = StandIn(monkeypatch, 1)
    gpu.fails_at = fails_at
    for _ in range(2):
        assert_same(nearest(queries, chunks, 60, GPU), expected)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "the search continues on the CPU, since it failed on the GPU: 'e' failed: out of memory"
    ]
    assert gpu.did.count("searched") == fails_at and gpu.on_cpu == 5 - (fails_at - 1) + 5


def test_a_gpu_without_room_for_the_queries(monkeypatch, caplog):
    """As without FAISS's own GPU code; another error, at another place."""
    queries, database = whole_numbers(30, 300)
    expected = nearest(queries, chunked(database, 60), 9)
    gpu = StandIn(monkeypatch, 0)

    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.Tensor, "to", full)
    assert_same(nearest(queries, chunked(database, 60), 9, GPU), expected)
    assert "it failed on the GPU: CUDA out of memory." in caplog.text and gpu.on_cpu == 5


@pytest.mark.parametrize(("processes", "images"), [(2, 90), (3, 90), (5, 25)])
def test_what_processes_find_is_merged_into_what_one_finds(monkeypatch, processes, images):
    """Uneven shares, and of 25 images in chunks of 10 two processes have none."""
    queries, database = whole_numbers(25, images)
    expected = by_hand(queries, database, 20)
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    shares = [(np.arange(images)[part], database[part]) for part in distributed.shares(images, 10)]
    own = [nearest(queries, chunked(rows, 10, None) if len(rows) else [], 20) for _, rows in shares]
    own = [
        (near, indices[rows] if len(indices) else rows) for (indices, _), (near, rows) in zip(shares, own, strict=True)
    ]
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value] * processes)

    def gather_rows(rows):
        return np.concatenate(
            [
                np.pad(
                    o[rows.dtype.kind == "i"],
                    ((0, 0), (0, 20 - o[0].shape[1])),
                    constant_values=-1 if rows.dtype.kind == "i" else np.inf,
                )
                for o in own
            ]
        )

    monkeypatch.setattr(distributed, "gather_rows", gather_rows)
    assert_same(first_of_all(lambda: own[0], 20), expected)


def test_a_process_that_cannot_search_ends_all(monkeypatch):
    found = np.zeros((2, 1), dtype="f"), np.zeros((2, 1), dtype=np.int64)
    for useless, kind in ((False, ValueError), (True, UselessDescriptors)):
        monkeypatch.setattr(
            distributed, "gather_objects", lambda value, useless=useless: [value, (useless, "no memory")]
        )
        with pytest.raises(kind, match="^process 1 could not search its part of the database: no memory$") as error:
            first_of_all(lambda: found, 1)
        assert type(error.value) is kind
    monkeypatch.setattr(distributed, "rank", lambda: 2)
    with pytest.raises(SystemExit):
        first_of_all(lambda: found, 1)

    def fails():
        raise OSError("database.npy is cut short")

    told = []
    monkeypatch.setattr(distributed, "gather_objects", lambda value: told.append(value) or [None, None, value])
    with pytest.raises(OSError, match="cut short"):
        first_of_all(fails, 1)
    assert told == [(False, "database.npy is cut short")]


@pytest.mark.parametrize(("by_all", "cores"), [(False, 6), (True, 3)])
def test_the_search_has_the_cores_of_those_that_wait(monkeypatch, by_all, cores):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(device_module.os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(device_module, "CPU_QUOTA", Path("/nowhere"))
    seen = []

    def found(*_):
        seen.append((faiss.omp_get_max_threads(), torch.get_num_threads()))
        return None, None

    monkeypatch.setattr(retrieval.Search, "_found", found)
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    searched = retrieval.Search(None, {}, infer_batch_size=16, device=CPU, by_all=by_all)
    searched._counts["database"] = 3
    searched.run(1)
    assert seen == [(cores, cores)] and before == (faiss.omp_get_max_threads(), torch.get_num_threads())
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    searched.run(1)
    assert seen[1] == before, "a process on its own is left as it is"


def test_all_processes_search_from_so_many_images_on(monkeypatch):
    assert not retrieval.searched_by_all(10**6)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert [retrieval.searched_by_all(count) for count in (99_999, 100_000)] == [False, True]
    assert not retrieval.searched_by_all(10**6, "IVF4096,PQ64")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(build_model(backbone="dino_tiny", crossimage_encoder=True).state_dict(), path)
    return path


@pytest.fixture
def flags(city, weights, tmp_path):
    return [*SMALL, f"--eval_datasets_folder={city}", f"--resume={weights}", f"--save_dir={tmp_path}/runs"]


@pytest.fixture
def evaluate(flags, tmp_path, capsys):
    """Runs eval.py; returns the exit status, what it said, and the run's folder."""

    def run(*more, names=("toy_city",)):
        earlier = set(tmp_path.glob("runs/*"))
        status = 0
        try:
            eval_script.main([*flags, "--eval_dataset_name", *names, *more])
        except SystemExit as exit_:
            status = exit_.code
        (folder,) = set(tmp_path.glob("runs/*")) - earlier
        return status, capsys.readouterr().err, folder

    return run


def matches(folder):
    return {path.relative_to(folder): path.read_text() for path in folder.rglob("predictions.csv")}


def test_all_processes_search_what_one_finds(evaluate, flags, tmp_path):
    """Bit for bit, on as many threads each, in every context."""
    more = [f"--descriptors_folder={tmp_path}/kept", "--eval_dataset_name=toy_city", "--infer_batch_size=4"]
    more += ["--test_method=nearest_crop"]
    with search.cores(max(1, device_module.usable_cores() // 2)):
        extraction.CHUNK_BYTES, chunk_bytes = 1, extraction.CHUNK_BYTES
        extraction.ENCODED_TOGETHER, together = 1, extraction.ENCODED_TOGETHER
        try:
            status, _, one = evaluate(*more, "--encoder_context=shuffled")
        finally:
            extraction.CHUNK_BYTES, extraction.ENCODED_TOGETHER = chunk_bytes, together
    run = warm.torchrun("searched_by_all.py", *flags, *more, "--encoder_context=shuffled")
    assert status == 0 and run.returncode == 0, run.stderr
    (several,) = set((tmp_path / "runs").iterdir()) - {one}
    assert matches(several) == matches(one) and len(list(csv.reader((one / "predictions.csv").open()))) == 1 + 15 * 15
    assert run.stderr.count("Searched toy_city") == 1


class Threads:
    """Threads that stand in for the processes of a run; what a process sends comes to all in order of their ranks."""

    def __init__(self, monkeypatch, count):
        self.own, self.barrier, self.sent = threading.local(), threading.Barrier(count, timeout=60), [None] * count
        monkeypatch.setattr(distributed, "rank", lambda: self.own.rank)
        monkeypatch.setattr(distributed, "world_size", lambda: count)
        monkeypatch.setattr(distributed, "gather_objects", self.gather)
        monkeypatch.setattr(distributed, "broadcast", lambda value: self.gather(value)[0])
        monkeypatch.setattr(distributed, "gather_rows", lambda rows: np.concatenate(self.gather(rows)))
        monkeypatch.setattr(retrieval, "usable_cores", lambda alone: 1)

    def gather(self, value):
        self.sent[self.own.rank] = value
        self.barrier.wait()
        found = list(self.sent)
        self.barrier.wait()
        return found

    def run(self, call):
        """What the call gives or raises in each."""

        def process(rank):
            self.own.rank = rank
            try:
                return call()
            except BaseException as error:
                return error

        with ThreadPoolExecutor(len(self.sent)) as pool:
            return list(pool.map(process, range(len(self.sent))))


@pytest.mark.parametrize("processes", [2, 3])
def test_validation_is_searched_by_all_too(monkeypatch, city, tmp_path, processes):
    torch.manual_seed(1)
    model = build_model(backbone="dino_tiny", crossimage_encoder=True).eval()
    dataset = DatabaseQueries.from_folder(city, "toy_city", "test")
    transform = evaluation_transform((56, 56))
    reading = {"transform": transform, "batch_size": 1, "num_workers": 0, "device": CPU}
    monkeypatch.setattr(extraction, "CHUNK_BYTES", 1)
    monkeypatch.setattr(extraction, "ENCODED_TOGETHER", 1)
    settings = {"recall_values": [1, 2, 5], "positive_distance": 25.0, "infer_batch_size": 4, "device": CPU}

    def validate():
        return evaluation.evaluate(
            model,
            dataset,
            read_images=partial(evaluation.image_batches, **reading),
            folder=tmp_path / "descriptors",
            **settings,
        )

    one = validate()
    threads = Threads(monkeypatch, processes)
    searched, real = [], search.nearest

    def nearest_of_few(queries, chunks, *more):
        chunks = list(chunks)
        searched.append(sum(len(indices) for indices, _ in chunks))
        return real(queries, chunks, *more)

    monkeypatch.setattr(search, "nearest", nearest_of_few)
    assert threads.run(validate) == processes * [one] and searched == [15], "the main process alone"
    monkeypatch.setattr(retrieval, "SEARCHED_BY_ALL", 15)
    assert threads.run(validate) == processes * [one]
    assert sorted(searched[1:]) == ([7, 8] if processes == 2 else [3, 4, 8])

    def fails_in_the_second(*given):
        if distributed.rank() == 1:
            raise MemoryError
        return real(*given)

    monkeypatch.setattr(search, "nearest", fails_in_the_second)
    main, second, *others = threads.run(validate)
    assert str(main) == "process 1 could not search its part of the database: no memory left"
    assert isinstance(second, MemoryError) and [type(other) for other in others] == (processes - 2) * [SystemExit]
    assert not (tmp_path / "descriptors").exists()


def test_a_pca_is_fitted_once_for_all(monkeypatch, tmp_path):
    torch.manual_seed(1)
    model = build_model(backbone="dino_tiny", clusters=2, crossimage_encoder=True).eval()
    rng = np.random.default_rng(0)
    stores = {}
    for name, count in (("database", 40), ("queries", 9), ("pca", 30)):
        stores[name] = DescriptorStore(tmp_path, name, (count, 1, *model.vectors_shape))
        stores[name].write(np.arange(count), rng.standard_normal(stores[name].shape).astype("f"))
    monkeypatch.setattr(extraction, "CHUNK_BYTES", 1)
    monkeypatch.setattr(extraction, "ENCODED_TOGETHER", 1)
    settings = {"context": "shuffled", "infer_batch_size": 4, "pca_dim": 6, "device": CPU}
    ((distances, predictions),) = retrieval.Search(model, stores, **settings).run(50)
    described, real = [], retrieval.Search.rows
    monkeypatch.setattr(
        retrieval.Search, "rows", lambda self, name: described.append((name, distributed.rank())) or real(self, name)
    )
    threads = Threads(monkeypatch, 2)
    found = threads.run(lambda: retrieval.Search(model, stores, **settings, by_all=True).run(50))
    assert sorted(described) == [("pca", 0), ("queries", 0), ("queries", 1)]
    np.testing.assert_array_equal(found[0][0][1], predictions)
    np.testing.assert_allclose(found[0][0][0], distances, rtol=1e-4)
    assert predictions.shape == (9, 40)


def fails_with(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.fixture
def passed(monkeypatch):
    """The photos that pass the backbone."""
    seen = []
    real = evaluation.image_batches
    monkeypatch.setattr(
        evaluation, "image_batches", lambda paths, **settings: seen.extend(paths) or real(paths, **settings)
    )
    return seen


@pytest.mark.parametrize(
    ("owner", "name", "error", "more"),
    [
        (faiss, "knn", RuntimeError("Error in void faiss::f() at /x/y.cpp:1: no memory"), []),
        (search, "search_index", ValueError("FAISS cannot search --index 'Flat'"), ["--index=Flat"]),
        (search, "merge_crops", MemoryError("no memory"), ["--test_method=five_crops", "--test_method=nearest_crop"]),
        (retrieval.Search, "rows", OSError("the disk"), ["--pca_dim=5", "--pca_dataset_folder=toy_city/images/train"]),
    ],
)
def test_a_search_that_fails_can_be_gone_on_with(evaluate, passed, monkeypatch, owner, name, error, more):
    monkeypatch.setattr("test.require_index", lambda *_, **__: None)  # which takes seconds
    status, _, right = evaluate(*more)
    assert status == 0 and len(passed) >= 30
    with monkeypatch.context() as failing:
        failing.setattr(owner, name, fails_with(error))
        status, said, failed = evaluate(*more)
    assert status in (1, 2) and "Traceback" not in said and not (failed / "extracted").exists()
    (line,) = [line for line in said.splitlines() if "the descriptors are kept" in line]
    advice = shlex.split(line.split("the same command with ")[1].split(" resumes")[0])
    assert advice == [f"--descriptors_folder={failed}/kept"]
    passed.clear()
    status, said, again = evaluate(*more, *advice)
    assert status == 0 and passed == [] and "computed again" not in said
    assert matches(again) == matches(right) and matches(right)
    with monkeypatch.context() as failing:
        failing.setattr(owner, name, fails_with(error))
        status, said, failed = evaluate(*more, *advice)
    assert status in (1, 2) and "kept: the same command resumes with the search" in said
    assert evaluate(*more, *advice)[0] == 0 and passed == []


def test_what_was_extracted_of_several_datasets_is_kept(evaluate, passed, city, monkeypatch, tmp_path):
    """The second search fails; the first dataset is kept too, but for a photo that has changed since."""
    (tmp_path / "data").mkdir()
    for name in ("a town", "b"):
        shutil.copytree(city / "toy_city", tmp_path / "data" / name)
    more = [f"--eval_datasets_folder={tmp_path}/data"]
    photo = next((tmp_path / "data/b/images/test/queries").iterdir())
    real, calls = search.nearest, []

    def fails(*given):
        calls.append(1)
        if len(calls) == 2:
            photo.touch()
            raise ValueError("no memory")
        return real(*given)

    with monkeypatch.context() as failing:
        failing.setattr(search, "nearest", fails)
        status, said, failed = evaluate(*more, names=["a town", "b"])
    assert status == 2 and f"queries of b test could not be kept: {photo} has changed since" in said
    kept = failed / "kept"
    stores = {str(path.relative_to(kept)) for path in kept.rglob("*.npy")}
    assert stores == {"a_town_test/database.npy", "a_town_test/queries.npy", "b_test/database.npy"}
    passed.clear()
    assert evaluate(*more, f"--descriptors_folder={kept}", names=["a town", "b"])[0] == 0
    assert len(passed) == 15 and all("/b/images/test/queries/" in path for path in passed)


def test_descriptors_of_no_use_are_not_kept(evaluate, weights, tmp_path):
    content = torch.load(weights)
    content["backbone.norm.weight" if "backbone.norm.weight" in content else next(iter(content))].fill_(float("nan"))
    torch.save(content, tmp_path / "nan.pth")
    status, said, folder = evaluate(f"--resume={tmp_path}/nan.pth")
    assert status == 2 and "not finite" in said and "is kept" not in said
    assert not list(folder.rglob("*.npy"))


def test_the_trial_of_an_index_does_not_wait_for_pytorch():
    code = "import sys, utils.retrieval.index_trial; assert 'faiss' in sys.modules and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(eval_script.__file__).parent).returncode == 0
