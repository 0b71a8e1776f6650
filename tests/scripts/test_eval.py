"""eval.py as a user runs it: contexts, protocols, outputs, killed and continued, on several processes."""

import csv
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from matplotlib.figure import Figure
from PIL import Image

import eval as eval_script
import test as evaluation
from datasets.evaluation import protocols
from datasets.evaluation.database_queries import DatabaseQueries, image_key, read_positives
from datasets.evaluation.protocols import PROTOCOLS, Protocol, protocol_of
from model import build_model, export
from model.weights import size_of
from parser import EvalOptions, parse

SMALL = "--backbone=dino_tiny --device=cpu --num_workers=0 --resize 56 56".split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Checkpoints with and without the encoder, the rest of them equal, and another."""
    folder = tmp_path_factory.mktemp("weights")
    for name, encoder, seed in (("encoder", True, 1), ("plain", False, 1), ("other", False, 2)):
        torch.manual_seed(seed)
        torch.save(build_model(backbone="dino_tiny", crossimage_encoder=encoder).state_dict(), folder / f"{name}.pth")
    return folder


@pytest.fixture
def evaluated(city, weights, tmp_path):
    """Runs eval.py and returns the run's folder."""

    def run(*flags, model="plain", dataset=True):
        save_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        flags = [*SMALL, f"--save_dir={save_dir}", f"--resume={weights}/{model}.pth", *map(str, flags)]
        flags += ["--crossimage_encoder"] if model == "encoder" else []
        flags += [f"--eval_datasets_folder={city}"] if dataset else []
        flags += ["--eval_dataset_name=toy_city"] if dataset and "--eval_dataset_name" not in flags else []
        eval_script.main(flags)
        (folder,) = save_dir.iterdir()
        return folder

    return run


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def rows_of(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_size_is_the_checkpoints_unless_given(city, weights, tmp_path, capsys):
    """As backbone, clusters and encoder are; and so in a file of safetensors."""
    state = torch.load(weights / "plain.pth", weights_only=True)
    settings = {"backbone": "dino_tiny", "clusters": 4, "ghost_clusters": 1, "crossimage_encoder": False}
    torch.save({"model_state_dict": state, "model": settings, "resize": [56, 70]}, tmp_path / "best.pth")
    export.main(f"--resume {tmp_path}/best.pth --output {tmp_path}/best.safetensors".split())
    flags = f"--device=cpu --num_workers=0 --eval_datasets_folder={city} --eval_dataset_name=toy_city".split()

    def recalls(save_dir, file, *given):
        capsys.readouterr()
        found = eval_script.run(
            parse(EvalOptions, [*flags, f"--resume={tmp_path}/{file}", f"--save_dir={tmp_path}/{save_dir}", *given])
        )
        (folder,) = (tmp_path / save_dir).iterdir()
        assert {int(n): r for n, r in results_of(folder)["recalls"].items()} == found["toy_city test"]["file_order"]
        return results_of(folder)["options"]["resize"], found, capsys.readouterr().err

    size, found, log = recalls("own", "best.pth")
    assert size == [56, 70] and "from the checkpoint: --backbone dino_tiny," in log and ", --resize 56 70\n" in log
    assert recalls("safetensors", "best.safetensors")[:2] == (size, found)
    assert recalls("same", "best.pth", "--resize", "56", "70")[:2] == (size, found) and "validated at" not in log
    size, _, log = recalls("other", "best.safetensors", "--resize", "56", "56")
    assert size == [56, 56] and "WARNING: the model was validated at 56 70, but --resize is 56 56" in log


@pytest.mark.parametrize("entry", [None, 322, "322 322", [322], [56, 57], [0, 56], [56.0, 56.0], [True, True]])
def test_what_is_no_size_in_a_checkpoint_is_none(entry):
    assert size_of({"resize": entry}) is None and size_of({}) is None
    assert size_of({"resize": [56, 322]}) == size_of({"resize": (56, 322)}) == (56, 322)


def test_a_run_returns_recalls_and_main_its_status(city, weights, tmp_path, capsys):
    flags = [*SMALL, f"--resume={weights}/plain.pth", f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city"]
    found = eval_script.run(parse(EvalOptions, [*flags, f"--save_dir={tmp_path}/run"]))
    assert set(found["toy_city test"]["file_order"]) == {1, 5, 10, 20}
    assert eval_script.main([*flags, f"--save_dir={tmp_path}/main"]) == 0
    with pytest.raises(SystemExit) as exit_:
        eval_script.main([*flags, f"--save_dir={tmp_path}/bad", "--resume=/nowhere.pth"])
    assert exit_.value.code == 2


def test_options_are_readable_on_the_terminal_and_whole_in_the_debug_log(evaluated, capsys):
    folder = evaluated("--no_labels", "--no-antialias")
    shown = capsys.readouterr().err
    assert "\noptions given: --backbone dino_tiny --device cpu --num_workers 0 --resize 56 56 --save_dir " in shown
    assert " --no_labels --no-antialias " in shown and "{" not in shown.split("options given")[1].split("\n")[0]
    assert '"context_seeds": 5' not in shown + (folder / "info.log").read_text()
    assert '"context_seeds": 5' in (folder / "debug.log").read_text()


@pytest.mark.parametrize(
    ("values", "marked"), [((1, 5, 10, 20), [1, 5, 10, 15]), ((3,), [3]), ((7, 2, 2), [2, 7]), ((99,), [15])]
)
@pytest.mark.drawn
def test_the_curve_is_marked_at_the_recall_values(evaluated, monkeypatch, values, marked):
    """Of 15 database images; a recall at more is the recall at 15."""
    figures = []
    real = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **settings: figures.append(self) or real(self, *args, **settings)
    )
    evaluated("--recall_values", *values)
    (axes,) = figures[0].axes
    assert axes.get_xticks().tolist() == marked


def test_bars_with_nothing_to_do_are_hidden(evaluated, tmp_path, capsys):
    kept = f"--descriptors_folder={tmp_path}/kept"
    evaluated(kept)
    assert "toy_city test database: 100%" in capsys.readouterr().err
    evaluated(kept)
    assert "toy_city test database:" not in capsys.readouterr().err


def test_company_does_not_change_what_a_photo_of_ones_own_finds(city, evaluated, tmp_path, capsys):
    """With the encoder: plain folders are searched photo by photo, and the log says what else is not as published."""
    for side in ("database", "queries"):
        (tmp_path / side).mkdir()
        for path in sorted((city / "toy_city/images/test" / side).iterdir()):
            shutil.copy(path, tmp_path / side)
    (tmp_path / "alone").mkdir()
    shutil.copy(sorted((tmp_path / "queries").iterdir())[7], tmp_path / "alone")
    rows = []
    for queries in ("queries", "alone"):
        folders = [f"--database_folder={tmp_path}/database", f"--queries_folder={tmp_path}/{queries}", "--no_labels"]
        found = rows_of(evaluated(*folders, model="encoder", dataset=False))
        asked = sorted((tmp_path / "alone").iterdir())[0].name
        rows.append(
            [(r["database"], float(r["squared_descriptor_distance"])) for r in found if Path(r["query"]).name == asked]
        )
    shown = capsys.readouterr().err
    assert [image for image, _ in rows[0]] == [image for image, _ in rows[1]]
    np.testing.assert_allclose([d for _, d in rows[0]], [d for _, d in rows[1]], atol=1e-5)
    in_company = rows_of(evaluated(*folders, "--encoder_context=file_order", model="encoder", dataset=False))
    assert (
        max(abs(float(r["squared_descriptor_distance"]) - d) for r, (_, d) in zip(in_company, rows[1], strict=True))
        > 1e-3
    )
    capsys.readouterr()
    line = "plain folders, unlike published benchmarks: photos are turned as EXIF says"
    antialiased = "; the resize is antialiased (--no-antialias turns this off)"
    alone = "; the encoder sees each photo by itself (--encoder_context file_order: neighbours by name)"
    assert shown.count(f"{line}{antialiased}{alone}\n") == 2
    # What is switched off is not said, nor what the model has not got; a benchmark says nothing of the kind.
    evaluated(*folders, "--encoder_context=file_order", "--no-antialias", model="encoder", dataset=False)
    assert f"{line}\n" in capsys.readouterr().err
    evaluated(*folders, dataset=False)
    assert f"{line}{antialiased}\n" in capsys.readouterr().err
    evaluated(*folders, "--infer_batch_size=4", model="encoder", dataset=False)
    assert "WARNING: --infer_batch_size 4 has no effect with --encoder_context independent" in capsys.readouterr().err
    assert list(results_of(evaluated(model="encoder"))["contexts"]) == ["file_order"]
    assert "plain folders" not in capsys.readouterr().err


@pytest.mark.drawn
def test_three_contexts_from_one_pass(evaluated, capsys, monkeypatch):
    passed = []
    real = evaluation.extract
    monkeypatch.setattr("test.extract", lambda *args: passed.append(args[1]) or real(*args))
    contexts = "--encoder_context file_order shuffled independent --context_seeds=3 --infer_batch_size=4".split()
    folder = evaluated(*contexts, model="encoder")
    assert len(passed) == 2, "database and queries, once"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Recalls on")]
    name = "Recalls on toy_city test (15 database, 15 queries)"
    assert len(lines) == 3 and re.match(re.escape(name) + r": R@1: [\d.]+, R@5", lines[0])
    assert re.match(re.escape(name) + r", shuffled \(3 orders\): R@1: .*; deviations R@1: [\d.]+", lines[1])
    assert re.match(re.escape(name) + r", independent: R@1: ", lines[2])
    results = results_of(folder)
    assert set(results["contexts"]) == {"file_order", "shuffled", "independent"}
    assert results["recalls"] == results["contexts"]["file_order"]["recalls"]
    assert results["contexts"]["shuffled"]["orders"] == 3
    # Each is what a run of its own gives; batches of one are the independent context.
    ones = evaluated("--infer_batch_size=1", model="encoder")
    assert results_of(ones)["recalls"] == results["contexts"]["independent"]["recalls"]
    first = evaluated("--infer_batch_size=4", model="encoder")
    assert results_of(first)["recalls"] == results["recalls"]
    assert not (folder / "extracted").exists()


def test_without_the_encoder_every_context_is_the_same(evaluated, capsys):
    folder = evaluated("--encoder_context", "file_order", "shuffled", "independent")
    assert list(results_of(folder)["contexts"]) == ["file_order"]
    assert sum(line.startswith("Recalls on") for line in capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("method", ["single_query", "central_crop", "five_crops", "nearest_crop", "maj_voting"])
def test_every_test_method_runs_for_any_recall_values(evaluated, method):
    first, second = (evaluated(f"--test_method={method}", "--recall_values", 1, 3, 7) for _ in range(2))
    assert results_of(first)["recalls"] == results_of(second)["recalls"]
    assert results_of(first)["test_method"] == method and set(results_of(first)["recalls"]) == {"1", "3", "7"}
    assert (first / "predictions.csv").read_text() == (second / "predictions.csv").read_text()


@pytest.mark.drawn
def test_predictions_curve_and_descriptors(city, evaluated):
    folder = evaluated("--save_descriptors", "--recall_values", 1, 5)
    rows = rows_of(folder)
    assert len(rows) == 15 * 5
    database, queries = (np.load(folder / "descriptors" / f"{name}.npy") for name in ("database", "queries"))
    dataset = DatabaseQueries.from_folder(city, "toy_city", "test")
    assert (folder / "descriptors" / "queries.txt").read_text().split("\n")[:-1] == dataset.queries_paths
    squared = ((queries[:, None] - database[None]) ** 2).sum(axis=2)
    hits = {1: 0, 5: 0}
    for index, row in enumerate(rows):
        query, rank = dataset.queries_paths.index(row["query"]), int(row["rank"])
        image = dataset.database_paths.index(row["database"])
        assert rank == index % 5 + 1 and query == index // 5
        assert float(row["squared_descriptor_distance"]) == pytest.approx(np.sort(squared[query])[rank - 1], abs=1e-5)
        near = np.linalg.norm(dataset.queries_positions[query] - dataset.database_positions[image]) <= 25
        assert row["correct"] == str(int(near))
    for n in hits:
        hits[n] = sum(any(r["correct"] == "1" for r in rows[q * 5 : q * 5 + n]) for q in range(15))
        assert results_of(folder)["recalls"][str(n)] == pytest.approx(100 * hits[n] / 15)
    with Image.open(folder / "recalls.png") as image:
        assert image.size[0] > 300


def test_the_page_of_matches(evaluated):
    folder = evaluated("--save_predictions=3", "--recall_values", 1)
    page = (folder / "matches" / "index.html").read_text()
    assert "toy_city test" in page and page.count("<img") == 15 * 4
    assert len(rows_of(folder)) == 15 * 3


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_lower_precision_is_near(evaluated, precision):
    exact, near = evaluated("--save_descriptors"), evaluated("--save_descriptors", f"--precision={precision}")
    for name in ("database", "queries"):
        a, b = (np.load(folder / "descriptors" / f"{name}.npy") for folder in (exact, near))
        assert (a * b).sum(axis=1).min() > 0.999
        assert np.array_equal(a, b) == (precision == "tf32")  # which is fp32 on a CPU
    for n, recall in results_of(exact)["recalls"].items():
        assert results_of(near)["recalls"][n] == pytest.approx(recall, abs=100 / 15 + 0.01)


def test_pca(evaluated, city):
    folder = evaluated("--pca_dim=6", "--pca_dataset_folder=toy_city/images/train", "--save_descriptors")
    assert np.load(folder / "descriptors" / "database.npy").shape == (15, 6)
    assert results_of(folder)["descriptor_dim"] == 6


def test_a_pca_of_no_spare_direction_is_not_whitened(city, weights, tmp_path, capsys):
    flags = [*SMALL, f"--resume={weights}/plain.pth", f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city"]
    flags += [f"--save_dir={tmp_path}/run", "--pca_dim=20", "--pca_dataset_folder=toy_city/images/train"]
    with pytest.raises(SystemExit):
        eval_script.main([*flags, "--pca_whiten"])
    assert "--pca_whiten: 20 images vary in 19 directions; use --pca_dim 19 at most" in capsys.readouterr().err


def test_a_pca_of_too_many_numbers_leaves_no_folder(city, weights, tmp_path, capsys):
    flags = [*SMALL, f"--resume={weights}/plain.pth", f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city"]
    with pytest.raises(SystemExit):
        eval_script.main(
            [*flags, f"--save_dir={tmp_path}/run", "--pca_dim=99", "--pca_dataset_folder=toy_city/images/train"]
        )
    assert (
        "--pca_dim 99: descriptors have 384 numbers and toy_city/images/train has 20 images" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_an_approximate_index(evaluated, capsys):
    folder = evaluated("--index=IVF2,Flat", "--index_parameters=nprobe=2")
    assert results_of(folder)["index_agreement"]["nearest"] == 100
    assert "index IVF2,Flat finds the nearest image of 100.0%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason", "remedy"),
    [
        ("--index=IVX", "could not parse index string", "index factory"),
        ("--index=IVF2,Flat --index_parameters=probes=2", "could not set parameter probes", "index factory"),
        ("--index=IVF2,Flat --index_parameters=nprobe=0", "'cur_nprobe > 0' failed", "leave out --index"),
        ("--index=IDMap,Flat", "add does not make sense with IndexIDMap", "leave out --index"),
        ("--index=NSG8", "cannot build a graph smaller than 100", "leave out --index"),
        ("--index=PCA64,IVF2,Flat", "cannot output 64 dimensions", "use one that reduces to at most 15 numbers"),
        ("--index=IVF16,Flat", "at least as large as number of clusters (16)", "at most 15 lists and 15 codewords"),
        ("--index=PQ7", "should be a multiple of the number of subquantizers", "leave out --index"),
        ("--index=HNSW0", "Faiss assertion", "FAISS crashes with --index 'HNSW0'"),  # it would end this process
    ],
)
def test_an_index_that_cannot_be_is_refused_at_once(evaluated, tmp_path, capsys, monkeypatch, flags, reason, remedy):
    monkeypatch.setattr("test.extract", None)
    with pytest.raises(SystemExit) as exit_:
        evaluated(*flags.split())
    shown = capsys.readouterr().err
    (error,) = [line for line in shown.splitlines() if line.startswith("ERROR")]
    assert exit_.value.code == 2 and "Traceback" not in shown and not list(tmp_path.glob("run*"))
    assert "FAISS" in error and reason in error and remedy in error


def test_sigterm_leaves_nothing_temporary(evaluated, tmp_path, monkeypatch):
    real = evaluation.extract

    def killed_after(*args):
        real(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("test.extract", killed_after)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        evaluated()
    assert exit_.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    (folder,) = tmp_path.glob("run*/*")
    assert {path.name for path in folder.iterdir()} == {"info.log", "debug.log"}


def test_several_datasets_make_a_table(city, weights, tmp_path, capsys):
    for name in ("toy_city", "another"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "images").symlink_to(city / "toy_city" / "images")
    flags = [*SMALL, f"--resume={weights}/plain.pth", f"--eval_datasets_folder={tmp_path}/data"]
    eval_script.main([*flags, f"--save_dir={tmp_path}/run", "--eval_dataset_name", "toy_city", "another"])
    (folder,) = (tmp_path / "run").iterdir()
    recalls = [results_of(folder / name)["recalls"] for name in ("toy_city", "another")]
    assert recalls[0] == recalls[1]
    assert set(results_of(folder)["recalls"]) == {"toy_city test", "another test"}
    table = capsys.readouterr().err.split("dataset")[-1].splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["toy_city", "another"] and "R@20" in table[0]


@pytest.mark.drawn
def test_pictures_of_assignments(evaluated, capsys):
    folder = evaluated("--save_assignments=3")
    assert [path.name for path in sorted((folder / "assignments").iterdir())] == [
        "000000.png",
        "000007.png",
        "000014.png",
    ]
    assert f"soft assignments of 3 queries: {folder}/assignments" in capsys.readouterr().err


def test_two_plain_folders_without_labels(city, evaluated, tmp_path, capsys):
    for side in ("database", "queries"):
        (tmp_path / side / "deep").mkdir(parents=True)
        for number, path in enumerate(sorted((city / "toy_city/images/test" / side).iterdir())[:6]):
            shutil.copy(path, tmp_path / side / "deep" / f"IMG_{number}.jpg")
    folders = [f"--database_folder={tmp_path}/database", f"--queries_folder={tmp_path}/queries"]
    folder = evaluated(*folders, "--no_labels", "--save_predictions=2", dataset=False)
    assert {row["correct"] for row in rows_of(folder)} == {""} and "recalls" not in results_of(folder)
    assert "without labels: predictions.csv in" in capsys.readouterr().err
    (tmp_path / "right.csv").write_text("query,database\n" + "".join(f"IMG_{n}.jpg,{n}\n" for n in range(6)))
    folder = evaluated(*folders, f"--positives_file={tmp_path}/right.csv", dataset=False)
    rows = rows_of(folder)
    assert all((row["correct"] == "1") == (row["query"][-5] == row["database"][-5]) for row in rows)
    with pytest.raises(SystemExit):
        evaluated(*folders, dataset=False)
    assert (
        "6 of 6 database photos have no GPS position: neither EXIF nor the file name gives one, e.g. "
        in capsys.readouterr().err
    )


def object_array(rows):
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    return array


@pytest.mark.parametrize(
    "array",
    [
        np.array([[2, 0], [1, -1], [-1, -1]]),
        object_array([[0, 2], [1], []]),
        object_array([np.array([0, 2]), np.array([1]), np.array([], dtype=np.int64)]),
        np.array([[0, None], [1, None], [2, None]], dtype=object),
    ],
)
def test_positives_from_npy(tmp_path, array):
    if array.ndim == 2 and array.dtype == object:  # as in VPR-Bench: the query's index before its list
        array[:, 1] = [[0, 2], [1], []]
    np.save(tmp_path / "p.npy", array, allow_pickle=True)
    positives = read_positives(tmp_path / "p.npy", ["a", "b", "c"], ["x", "y", "z"])
    assert [row.tolist() for row in positives] == [[0, 2], [1], []]


def test_positives_that_do_not_fit(tmp_path):
    paths = (["a.jpg", "b.jpg"], ["x.jpg", "y.jpg"])
    for text, message in (
        ("q,d\n0,9\n", "names database image 9, but there are 2"),
        ("q,d\nx.jpg,no.jpg\n", "x.jpg,no"),
    ):
        (tmp_path / "p.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_positives(tmp_path / "p.csv", *paths)
    np.save(tmp_path / "p.npy", np.zeros((5, 1), dtype=int))
    with pytest.raises(ValueError, match="5 rows for 2 queries"):
        read_positives(tmp_path / "p.npy", *paths)
    for text in ("no array", ""):
        (tmp_path / "p.npy").write_text(text)
        with pytest.raises(ValueError, match="not a .npy file"):
            read_positives(tmp_path / "p.npy", *paths)
    with pytest.raises(FileNotFoundError, match="check --positives_file"):
        read_positives(tmp_path / "none.npy", *paths)


def test_positives_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    np.save(tmp_path / "p.npy", object_array([Evil(), [1]]), allow_pickle=True)
    with pytest.raises(ValueError, match="it holds .*mkdir"):
        read_positives(tmp_path / "p.npy", ["a", "b"], ["x", "y"])
    assert not (tmp_path / "harm").exists()
    pickle.dump([1], file := io.BytesIO())
    assert file.tell()


def test_keys_select_queries_and_make_a_submission(city, weights, tmp_path, capsys, caplog):
    folder = tmp_path / "data/msls/images/test"
    for side in ("database", "queries"):
        (folder / side).mkdir(parents=True)
        for number, path in enumerate(sorted((city / "toy_city/images/test" / side).iterdir())):
            fields = path.name.split("@")
            fields[7] = f"{side[0]}{number:02d}"
            shutil.copy(path, folder / side / "@".join(fields))
    (tmp_path / "keys.txt").write_text("\ufeffq03\nq05,q11\nq99\n")
    flags = [*SMALL, f"--resume={weights}/plain.pth", f"--eval_datasets_folder={tmp_path}/data"]
    flags += [f"--query_keys={tmp_path}/keys.txt", "--save_submission", "--recall_values", "1", "5"]
    eval_script.main([*flags, f"--save_dir={tmp_path}/run", "--eval_dataset_name=msls"])
    (run,) = (tmp_path / "run").iterdir()
    assert results_of(run)["dataset"]["queries"] == 3
    assert "1 of the 4 keys" in caplog.text
    assert "msls test has 15 database images, but published figures are for 18,871" in caplog.text
    assert "msls test has 3 queries, but published figures are for 11,084 or 740" in caplog.text
    with zipfile.ZipFile(run / "submission.zip") as archive:
        lines = archive.read("submission.csv").decode().splitlines()
    predicted = {}
    for row in rows_of(run):
        predicted.setdefault(image_key(row["query"]), []).append(image_key(row["database"]))
    assert lines == [" ".join([key, *keys]) for key, keys in predicted.items()] and len(lines) == 3
    with pytest.raises(SystemExit):
        (tmp_path / "keys.txt").write_text("nobody")
        eval_script.main([*flags, f"--save_dir={tmp_path}/run2", "--eval_dataset_name=msls"])
    assert "none of the 1 keys" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        (tmp_path / "keys.txt").write_bytes("q03\nq05\n".encode("utf-16"))
        eval_script.main([*flags, f"--save_dir={tmp_path}/run2", "--eval_dataset_name=msls"])
    assert "keys.txt, line 1: not text in UTF-8" in capsys.readouterr().err


def test_protocols(monkeypatch, city, caplog):
    assert protocol_of("pitts30k").database == 10_000 and protocol_of("svox_night") == PROTOCOLS["svox"]
    assert protocol_of("my_town") == Protocol() and {p.positive_distance for p in PROTOCOLS.values()} == {25.0}
    dataset = DatabaseQueries.from_folder(city, "toy_city", "test")
    protocols.warn_of_counts(dataset, Protocol(database=15, queries=(3, 15)))
    assert not caplog.text
    protocols.warn_of_counts(dataset, Protocol(database=16, queries=(3, 15)))
    assert "toy_city test has 15 database images, but published figures are for 16" in caplog.text


def test_frames_instead_of_metres(evaluated, monkeypatch, capsys):
    monkeypatch.setitem(PROTOCOLS, "toy_city", Protocol(metres_a_frame=10.0))
    assert results_of(evaluated("--positive_frames=2"))["positive_distance"] == 25.0
    assert results_of(evaluated("--val_positive_dist_threshold=3"))["positive_distance"] == 3.0
    monkeypatch.delitem(PROTOCOLS, "toy_city")
    with pytest.raises(SystemExit):
        evaluated("--positive_frames=2")
    assert "the positions of toy_city do not count frames" in capsys.readouterr().err


def test_kept_descriptors_are_used_again_or_refused(evaluated, tmp_path, monkeypatch, capsys):
    kept = f"--descriptors_folder={tmp_path}/kept"
    first = evaluated(kept)
    monkeypatch.setattr("test.image_batches", None)
    monkeypatch.setattr("test.image_batches", lambda paths, **_: iter(()) if not paths else 1 / 0)
    again = evaluated(kept, "--encoder_context", "file_order", "independent", "--recall_values", 1, 5, 10, 20)
    assert (first / "predictions.csv").read_text() == (again / "predictions.csv").read_text()
    for flags, what in (
        (["--antialias"], "--antialias was False and is now True"),
        (["--descriptor_dtype=float16"], "--descriptor_dtype was float32 and is now float16"),
    ):
        with pytest.raises(SystemExit):
            evaluated(kept, *flags)
        assert what in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluated(kept, model="other")
    message = capsys.readouterr().err
    assert "the weights are those of another model" in message and "another --descriptors_folder" in message
    evaluated(kept, model="encoder")  # which comes after what is kept


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import numpy as np
from utils.retrieval.descriptor_store import DescriptorStore
real, left = DescriptorStore.write, int(sys.argv[1])

def write(self, indices, rows):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    with open({log!r}, "a") as file:
        file.writelines(f"{{self.path.stem}} {{index}}\\n" for index in indices)
    real(self, indices, rows)

DescriptorStore.write = write
import eval
eval.main(sys.argv[2:])
"""


def test_killed_five_times_and_resumed(city, weights, tmp_path):
    """The script dies before a write, having done as many as the number says; the last starts from cold, as users'."""
    (tmp_path / "killed.py").write_text(
        KILLED.format(root=str(Path(__file__).parents[2]), log=str(tmp_path / "written.txt"))
    )
    flags = [*SMALL, f"--resume={weights}/plain.pth", f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city"]
    flags += ["--extraction_batch_size=2", f"--save_dir={tmp_path}/run"]

    kept = [*flags, f"--descriptors_folder={tmp_path}/kept"]
    for writes in (0, 3, 1, 5, 4):  # of 8 batches of the database and 8 of the queries
        assert warm.run(tmp_path / "killed.py", writes, *kept).returncode == -signal.SIGKILL
    command = [sys.executable, tmp_path / "killed.py", "100", *kept]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    written = (tmp_path / "written.txt").read_text().splitlines()
    assert sorted(written) == sorted(f"{side} {n}" for side in ("database", "queries") for n in range(15))
    eval_script.main([*flags, f"--descriptors_folder={tmp_path}/straight"])
    for name in ("database.npy", "queries.npy"):
        kept, straight = (next((tmp_path / f).rglob(name)).read_bytes() for f in ("kept", "straight"))
        assert kept == straight


def test_two_processes_find_what_one_finds(city, weights, evaluated, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [
        str(Path(eval_script.__file__)),
        *SMALL,
        f"--eval_datasets_folder={city}",
        "--eval_dataset_name=toy_city",
    ]
    command += [f"--resume={weights}/encoder.pth", "--crossimage_encoder", f"--save_dir={tmp_path}/two"]
    command += ["--save_descriptors", "--infer_batch_size=4", "--extraction_batch_size=2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    (two,) = (tmp_path / "two").iterdir()
    one = evaluated("--save_descriptors", "--infer_batch_size=4", "--extraction_batch_size=2", model="encoder")
    assert results_of(one)["recalls"] == results_of(two)["recalls"]
    for name in ("database", "queries"):
        a, b = (np.load(folder / "descriptors" / f"{name}.npy") for folder in (one, two))
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert [(r["query"], r["rank"], r["database"]) for r in rows_of(one)] == [
        (r["query"], r["rank"], r["database"]) for r in rows_of(two)
    ]
    assert run.stderr.count("Recalls on") == 1
