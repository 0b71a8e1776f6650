"""What an evaluation leaves: results first, each output by itself, answers in places, nothing of others' touched."""

import csv
import errno
import json
import logging
import os
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
import test as evaluation
import train as train_script
from datasets.evaluation.database_queries import DatabaseQueries
from model import build_model
from utils.outputs import match_page, report, results
from utils.outputs.assignments import AssignedPhoto, draw_assignments
from utils.retrieval import contexts as retrieval
from utils.retrieval.descriptor_store import DescriptorStore, RowFile, warn_of_leftovers
from utils.run import log as run_log
from utils.system.lock import FolderLock

SMALL = "--backbone=dino_tiny --device=cpu --num_workers=0 --resize 56 56".split()
ALL = ["--save_predictions=3", "--save_assignments=2", "--save_descriptors"]


@pytest.fixture
def tree(city, tmp_path):
    """Copies some photos of the test split into a dataset of that name, and returns the folder of datasets."""

    def copy(name, database=9, queries=4):
        for side, count in (("database", database), ("queries", queries)):
            folder = tmp_path / "data" / name / "images/test" / side
            folder.mkdir(parents=True)
            for path in sorted((city / "toy_city/images/test" / side).iterdir())[:count]:
                shutil.copy(path, folder)
        return tmp_path / "data"

    return copy


@pytest.fixture
def evaluate(city, tmp_path):
    """Runs eval.py on datasets below a folder and returns its exit status and the run's folder."""
    for name, encoder in (("plain", False), ("encoder", True)):
        torch.manual_seed(1)
        model = build_model(backbone="dino_tiny", crossimage_encoder=encoder)
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")

    def run(*flags, names=("toy_city",), data=city, model="plain", save_dir=None):
        save_dir = save_dir or tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        before = set(save_dir.glob("*"))
        flags = [*SMALL, f"--save_dir={save_dir}", f"--resume={tmp_path}/{model}.pth", *map(str, flags)]
        flags += ["--crossimage_encoder"] if model == "encoder" else []
        flags += [f"--eval_datasets_folder={data}", "--eval_dataset_name", *names] if data else []
        status = 0
        try:
            eval_script.main(flags)
        except SystemExit as exit_:
            status = exit_.code
        return status, next(iter(set(save_dir.glob("*")) - before), None)

    return run


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


OUTPUTS = {
    "predictions.csv": (report, "write_predictions"),
    "recalls.png": (report, "draw_recalls"),
    "descriptors": (retrieval.Search, "save"),
    "assignments/000000.png": (results, "draw_assignments"),
    "matches": (match_page, "write_match_page"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_fails_costs_one_line(evaluate, monkeypatch, capsys, name):
    monkeypatch.setattr(*OUTPUTS[name], no_space)
    status, folder = evaluate(*ALL)
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert status == 1 and "Traceback" not in shown
    failed = {f"{folder}/{name}"} | ({f"{folder}/assignments/000014.png"} if "assignments" in name else set())
    errors = [line for line in lines if line.startswith("ERROR")]
    assert errors == [
        f"ERROR: {path} could not be written: [Errno 28] No space left on device" for path in sorted(failed)
    ]
    # The result is there before, and all else after.
    assert lines.index(errors[0]) > next(n for n, line in enumerate(lines) if line.startswith("Recalls on"))
    assert results_of(folder)["recalls"]
    for other in {"predictions.csv", "recalls.png", "descriptors/database.npy", "matches/index.html"}:
        assert (folder / other).exists() == (not other.startswith(name))
    assert not list(folder.rglob("*.tmp*"))


def test_results_that_cannot_be_written_are_on_the_terminal(evaluate, monkeypatch, capsys):
    monkeypatch.setattr(run_log, "write_results", no_space)
    status, folder = evaluate(names=["toy_city"])
    lines = capsys.readouterr().err.splitlines()
    (recalls,) = [n for n, line in enumerate(lines) if line.startswith("Recalls on")]
    (failed,) = [n for n, line in enumerate(lines) if line.startswith("ERROR")]
    assert status == 1 and recalls < failed and "results.json could not be written" in lines[failed]
    assert (folder / "predictions.csv").exists()


def test_the_recalls_of_a_training_are_on_the_terminal(city, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_log, "write_results", no_space)
    flags = [*SMALL, f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city", "--train_batch_size=4"]
    with pytest.raises(SystemExit) as exit_:
        train_script.main([*flags, "--train_resize", "56", "56", "--epochs_num=0", f"--save_dir={tmp_path}/trained"])
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 1 and lines[-2].startswith("Recalls on toy_city test")
    assert lines[-1].startswith("ERROR: ") and "results.json could not be written: [Errno 28]" in lines[-1]


def test_all_results_come_before_the_first_output(evaluate, tree, monkeypatch):
    """Of two contexts and two datasets."""
    tree("a")
    seen = []

    def look(folder, *_, **__):
        seen.append([results_of(folder.parent / name)["contexts"].keys() for name in ("a", "b")])

    monkeypatch.setattr(report, "write_predictions", look)
    contexts = ["--encoder_context", "file_order", "independent"]
    status, folder = evaluate(*contexts, names=["a/", "b"], data=tree("b"), model="encoder")
    assert status == 0 and seen == [[{"file_order", "independent"}] * 2] * 2
    assert set(results_of(folder)["recalls"]) == {"a test", "b test"}


def test_the_first_context_is_written_before_the_second_is_searched(evaluate, monkeypatch):
    real, runs = retrieval.Search.run, []

    def fails(self, *args, **settings):
        runs.append(1)
        return real(self, *args, **settings) if len(runs) == 1 else no_space()

    monkeypatch.setattr(retrieval.Search, "run", fails)
    status, folder = evaluate("--encoder_context", "file_order", "independent", model="encoder")
    assert status == 2 and list(results_of(folder)["contexts"]) == ["file_order"]


@pytest.mark.drawn
def test_odd_names_and_shapes_lose_nothing(evaluate, tree, capsys):
    data = tree("$a$ $b", database=4, queries=2)
    for side in ("database", "queries"):
        folder = data / "$a$ $b/images/test" / side
        first, second, *_ = sorted(folder.iterdir())
        first.rename(f"{str(first)[:-4]}\udcff.jpg")  # a byte that is not UTF-8
        second.rename(f"{str(second)[:-4]}\n$x_{{$.jpg")
        Image.new("RGB", (9000, 6), (20, 90, 30)).save(folder / "@1@2@.jpg")
        Image.new("RGB", (6, 9000), (20, 90, 30)).save(folder / "@1@3@.png")
    status, folder = evaluate("--save_assignments=9", *ALL[::2], names=["$a$ $b"], data=data)
    assert status == 0 and "Traceback" not in (shown := capsys.readouterr().err)
    assert "database.txt: line breaks in 1 paths are written as \\n" in shown
    dataset = DatabaseQueries.from_folder(data, "$a$ $b", "test")
    with open(folder / "predictions.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert {row["query"] for row in csv.DictReader(file)} == set(dataset.queries_paths)
    lines = os.fsdecode((folder / "descriptors/database.txt").read_bytes()).split("\n")[:-1]
    assert [line.replace("\\n", "\n") for line in lines] == dataset.database_paths
    assert len(list((folder / "assignments").iterdir())) == 4 and (folder / "matches/index.html").exists()


def test_descriptors_are_saved_without_a_memory_map(evaluate, monkeypatch):
    """A full disk then ends in an error, where a map would end the process."""
    monkeypatch.setattr(np.lib.format, "open_memmap", None)
    status, folder = evaluate("--save_descriptors")
    assert status == 0 and np.load(folder / "descriptors/queries.npy").shape == (15, 384)
    monkeypatch.setattr(RowFile, "write", no_space)
    run_log.write_results(folder, {}, {}, torch.device("cpu"))
    with pytest.raises(OSError, match="No space left"):
        retrieval.Search.save(Saving(), folder / "again", database=["a", "b"])
    assert not list(folder.glob("again*"))


class Saving:
    """Two descriptors to save."""

    def chunks(self, _):
        yield np.arange(2), np.ones((2, 3), dtype=np.float32)


def test_a_log_takes_names_that_are_not_utf8(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    with run_log.RunLog() as log:
        log.open(tmp_path, tmp_path / "run")
        logging.getLogger("utils").debug("cannot read %s", "a\udcff.jpg")
    assert "cannot read a\\udcff.jpg" in (tmp_path / "run/debug.log").read_text()


def test_answers_in_places(evaluate, city):
    status, folder = evaluate("--save_predictions=2")
    dataset = DatabaseQueries.from_folder(city, "toy_city", "test")
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert status == 0 and list(rows[0])[:3] == ["query", "rank", "database"]
    for row in rows:
        found = dataset.database_positions[dataset.database_paths.index(row["database"])]
        asked = dataset.queries_positions[dataset.queries_paths.index(row["query"])]
        assert (float(row["database_east"]), float(row["database_north"])) == pytest.approx(found, abs=0.006)
        assert float(row["metres"]) == pytest.approx(np.linalg.norm(found - asked), abs=0.006)
        assert (float(row["metres"]) <= 25) == (row["correct"] == "1")
    page = (folder / "matches/index.html").read_text()
    first = 1 - float(rows[0]["squared_descriptor_distance"]) / 2
    assert f"similarity {first:.3f}" in page and "correct, within 25 m" in page


def test_the_last_line_is_an_address(evaluate, capsys):
    _, folder = evaluate("--save_predictions=2")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"open in a browser: {(folder / 'matches/index.html').as_uri()}" and "file:///" in last


@pytest.mark.drawn
def test_assignment_pictures_carry_file_names(evaluate, monkeypatch, city, tmp_path):
    titles = []
    monkeypatch.setattr(results, "draw_assignments", lambda _, photos, **__: titles.extend(p.title for p in photos))
    evaluate("--save_assignments=1")
    dataset = DatabaseQueries.from_folder(city, "toy_city", "test")
    assert titles[0] == f"query 0: {os.path.basename(dataset.queries_paths[0])}"
    verdict, _, name = titles[1].partition(": ")
    assert verdict in ("first match, correct", "first match, wrong")
    assert name in map(os.path.basename, dataset.database_paths)
    odd = AssignedPhoto(
        title="query 1: a$b$c\udcff\n" + "long" * 30 + ".jpg",
        pixels=np.zeros((6, 9000, 3), dtype=np.uint8),
        assignment=np.full((3, 4, 4), 1 / 3, dtype=np.float32),
    )
    draw_assignments(tmp_path / "odd.png", [odd], ghost_clusters=1)
    assert (tmp_path / "odd.png").exists()


def test_queries_with_nothing_to_find_are_counted(evaluate, tree, capsys):
    data = tree("town")
    for path in sorted((data / "town/images/test/queries").iterdir())[:3]:
        fields = path.name.split("@")
        path.rename(path.with_name("@".join(["", str(float(fields[1]) + 5000), *fields[2:]])))
    status, folder = evaluate("--save_predictions=1", names=["town"], data=data)
    assert status == 0
    assert "WARNING: town test: 3 of 4 queries have no database photo within 25 m" in capsys.readouterr().err
    results = results_of(folder)
    assert results["queries_without_positives"] == 3 and results["recalls"]["20"] == 25.0
    assert (folder / "matches/index.html").read_text().count("nothing to find within 25 m") == 3
    _, folder = evaluate(names=["town"], data=data)
    _, folder = evaluate()
    assert results_of(folder)["queries_without_positives"] == 0


def test_nothing_is_written_into_the_data_or_deleted(evaluate, tree, tmp_path, capsys):
    data = tree("town")
    theirs = data / "town/extracted/notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    before = sorted(data.rglob("*"))
    for names in ([f"{data}/town", "town"], ["../data/town"], ["town", "./town/"]):
        status, folder = evaluate(names=names, data=data)
        assert status == 2 and folder is None
        assert "eval_dataset_name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_script.main([*SMALL, f"--eval_datasets_folder={data}", f"--eval_dataset_name={data}/town"])
    assert evaluate(names=["town/"], data=data)[0] == 0
    assert sorted(data.rglob("*")) == before and theirs.read_text() == "mine"


def test_validation_deletes_its_own_files_only(city, tmp_path):
    torch.manual_seed(1)
    model = build_model(backbone="dino_tiny").eval()
    dataset = DatabaseQueries.from_folder(city, "toy_city", "val")
    folder = tmp_path / "descriptors"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")

    def read_images(paths, progress):
        yield torch.zeros(len(paths), 3, 56, 56)

    settings = {"recall_values": [1], "positive_distance": 25.0, "infer_batch_size": 16, "device": torch.device("cpu")}
    evaluation.evaluate(model, dataset, read_images=read_images, folder=folder, **settings)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_leftovers_of_a_killed_run_are_told(evaluate, tmp_path, monkeypatch, capsys):
    save_dir = tmp_path / "my runs"
    with monkeypatch.context() as killed:  # as a run that dies before it comes to that
        killed.setattr(DescriptorStore, "remove", lambda _: None)
        _, left = evaluate(save_dir=save_dir)
    (left / "descriptors").mkdir()  # results that --save_descriptors wrote are no leftovers
    (left / "descriptors/database.npy").touch()
    with FolderLock(left, "--save_dir"):  # as a live run holds it
        evaluate(save_dir=save_dir)
        assert "rm -r" not in capsys.readouterr().err
    evaluate(save_dir=save_dir)
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if "rm -r" in line]
    assert line.startswith("WARNING: interrupted runs left 0.1 MB of descriptors")
    command = line.split("to remove them: ")[1]
    assert shlex.split(command) == ["rm", "-r", str(left / "extracted")]
    subprocess.run(command, shell=True, check=True)
    evaluate(save_dir=save_dir)
    assert "rm -r" not in capsys.readouterr().err


def test_leftovers_of_every_kind(tmp_path, caplog):
    for name in ("a/extracted", "b/town/extracted", "c/sf_xl/small/extracted", "d/descriptors", "e/descriptors"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "queries.npy").write_bytes(bytes(5_000_000))
        if name[0] != "e":  # results of --save_descriptors
            (tmp_path / name / "queries.done").write_bytes(b"0")
    warn_of_leftovers(tmp_path.iterdir())
    (record,) = caplog.records
    assert "left 20.0 MB" in record.message
    removed = record.message.split("rm -r ")[1].split()
    assert [os.path.relpath(path, tmp_path)[0] for path in removed] == ["a", "b", "c", "d"]


def test_a_leftover_that_vanishes_stops_nobody(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "warn_of_leftovers", lambda _: no_space())
    assert evaluate()[0] == 0


def test_a_submission_has_as_many_keys_in_each_line(evaluate, tree, tmp_path, monkeypatch, capsys):
    data = tree("msls", database=15)
    for side in ("database", "queries"):
        for number, path in enumerate(sorted((data / "msls/images/test" / side).iterdir())):
            fields = path.name.split("@")
            fields[7] = f"{side[0]}{number:02d}"
            path.rename(path.with_name("@".join(fields)))
    flags = ["--save_submission", "--recall_values", "1", "5"]
    monkeypatch.setattr("parser.SUBMITTED", 12)
    status, folder = evaluate(*flags, names=["msls"], data=data)
    import zipfile

    lines = zipfile.ZipFile(folder / "submission.zip").read("submission.csv").decode().splitlines()
    assert status == 0 and [len(line.split()) for line in lines] == [13] * 4
    assert "--save_submission: the 12 images per query that are scored are submitted" in capsys.readouterr().err
    assert list(results_of(folder)["recalls"]) == ["1", "5"]
    status, folder = evaluate(*flags, "--index=IVF2,Flat", names=["msls"], data=data)
    assert status == 2 and folder is None and "leave out --index" in capsys.readouterr().err
    next((data / "msls/images/test/queries").iterdir()).rename(data / "msls/images/test/queries/@1@2@@@@@a b@@.jpg")
    assert evaluate(*flags, names=["msls"], data=data)[0] == 2
    assert "no image key without spaces" in capsys.readouterr().err
