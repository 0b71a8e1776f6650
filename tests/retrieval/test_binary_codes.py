"""Search by signs, ranked exactly: what it finds, and how eval.py takes it."""

import json

import numpy as np
import pytest
import torch

import eval as eval_script
from model import build_model
from utils.retrieval.binary_codes import codes_of, nearest_by_codes
from utils.retrieval.search import CPU, UselessDescriptors, nearest


def rows_of(count, dim, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def in_chunks(rows, order, size):
    return lambda: ((order[start : start + size], rows[order[start : start + size]]) for start in range(0, 90, size))


def test_a_code_is_a_bit_for_each_number_above_0():
    codes = codes_of(np.array([[1, -1, 0, 2, -3, 5, 0, 1, 7], [-1] * 9], dtype=np.float32))
    assert codes.tolist() == [[0b10010101, 0b10000000], [0, 0]]


@pytest.mark.parametrize("dim", [64, 61])
@pytest.mark.parametrize("rerank", [5, 20, 90, 1000])
def test_it_is_the_first_by_bits_ranked_exactly(monkeypatch, dim, rerank):
    monkeypatch.setattr("utils.retrieval.binary_codes.PAIRS_TOGETHER", 7)
    database, queries = rows_of(90, dim), rows_of(12, dim, seed=1)
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
    database = np.repeat(rows_of(6, 16), 15, axis=0)
    order = np.arange(90)[::-1].copy()
    _, found, _ = nearest_by_codes(database[::15], in_chunks(database, order, 40), 90, 4, rerank=30)
    _, right = nearest(database[::15], in_chunks(database, order, 40)(), 4)
    np.testing.assert_array_equal(found, right)


def test_sets_are_told_apart():
    database, queries = rows_of(90, 32), rows_of(10, 32, seed=1)
    chunks = in_chunks(database, np.arange(90), 90)
    distances, found, agreements = nearest_by_codes(queries, chunks, 90, 3, rerank=9, sets=(7, 3))
    for part, agreement in zip((slice(0, 7), slice(7, 10)), agreements, strict=True):
        alone = nearest_by_codes(queries[part], chunks, 90, 3, rerank=9)
        np.testing.assert_array_equal(found[part], alone[1])
        np.testing.assert_array_equal(distances[part], alone[0])
        assert alone[2] == [agreement]


def test_descriptors_of_no_use_are_told():
    queries = rows_of(1500, 16)
    queries[1] = np.nan  # not among those that are compared with exact search
    for some in (np.full((2, 16), np.nan, dtype=np.float32), queries):
        with pytest.raises(UselessDescriptors, match="not finite"):
            nearest_by_codes(some, in_chunks(rows_of(90, 16), np.arange(90), 90), 90, 3, rerank=9, device=CPU)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "encoder.pth"
    torch.manual_seed(1)
    torch.save(build_model(backbone="dino_tiny", crossimage_encoder=True).state_dict(), file)
    return file


@pytest.fixture
def evaluated(city, checkpoint, tmp_path):
    def run(*flags):
        save_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        small = "--backbone=dino_tiny --crossimage_encoder --device=cpu --resize 56 56 --eval_dataset_name=toy_city"
        eval_script.main(
            [
                *small.split(),
                f"--eval_datasets_folder={city}",
                f"--resume={checkpoint}",
                f"--save_dir={save_dir}",
                *flags,
            ]
        )
        (folder,) = save_dir.iterdir()
        return json.loads((folder / "results.json").read_text())

    return run


def test_eval_takes_it_as_an_index(evaluated, capsys):
    contexts = "--encoder_context file_order shuffled --context_seeds=2".split()
    exact = evaluated(*contexts)
    capsys.readouterr()
    found = evaluated(*contexts, "--index=binary")
    for context, of_context in exact["contexts"].items():
        assert found["contexts"][context]["recalls"] == of_context["recalls"], "of 15 images all are ranked exactly"
    assert found["index_agreement"] == {"nearest": 100.0, "first_k": 100.0, "queries": 15}
    said = "index binary (48 bytes per image, the first 15 ranked exactly) finds the nearest image of 100.0% and the"
    assert said in capsys.readouterr().err
    assert evaluated("--index=binary", "--test_method=nearest_crop", "--rerank=20")["index_agreement"]["queries"] > 15


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rerank=50", "--rerank works only with --index binary"),
        (
            "--index=binary --index_parameters=nprobe=3",
            "--index_parameters works only with a FAISS --index, e.g. IVF4096,PQ64",
        ),
        ("--index=binary --rerank=19", "--rerank 19 is less than the 20 images per query asked for; use more"),
        ("--index=binary --save_predictions=200", "--rerank 100 is less than the 200 images per query asked for"),
        ("--index=binary --save_submission", "--save_submission: an approximate --index may find fewer"),
    ],
)
def test_refusals(evaluated, capsys, flags, message):
    with pytest.raises(SystemExit) as exit_:
        evaluated(*flags.split())
    assert exit_.value.code == 2 and message in capsys.readouterr().err
