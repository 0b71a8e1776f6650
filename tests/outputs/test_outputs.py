"""What an evaluation leaves: results first, each output by itself, answers in places, nothing of others' touched."""

import errno
import os
import shutil
import zipfile

import numpy as np
import pytest
from helpers import SMALL, only_run, refusal, results_of, rows_of

import eval as eval_script
import train as train_script
from datasets.evaluation.tree import DatabaseQueries
from utils.outputs import figures, match_page, results, tables
from utils.retrieval import contexts
from utils.retrieval.descriptor_store import warn_of_leftovers
from utils.run import log as run_log
from utils.system.lock import FolderLock

ALL = ["--save_predictions=3", "--save_assignments=2", "--save_descriptors"]
TWO_CONTEXTS = ["--encoder_context", "file_order", "independent"]
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def no_space(*_, **__):
    raise NO_SPACE


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
def failed(evaluated, tmp_path):
    """Runs eval.py as `evaluated` does, and returns the exit status and the run's folder."""

    def run(*flags, **settings):
        with pytest.raises(SystemExit) as ended:
            evaluated(*flags, **settings)
        return ended.value.code, only_run(tmp_path / "run0")

    return run


OUTPUTS = {  # what is written by which function
    "predictions.csv": (tables, "write_predictions"),
    "recalls.png": (figures, "draw_recalls"),
    "descriptors": (contexts.Search, "save"),
    "assignments/000000.png": (results, "draw_assignments"),
    "assignments/000014.png": (results, "draw_assignments"),
    "matches": (match_page, "write_match_page"),
}


@pytest.mark.parametrize("names", [["predictions.csv"], [*OUTPUTS]])
def test_an_output_that_fails_costs_one_line(failed, monkeypatch, capsys, names):
    """The result is there before, and all else after."""
    for name in names:
        monkeypatch.setattr(*OUTPUTS[name], no_space)
    status, folder = failed(*ALL)
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("ERROR")]
    assert status == 1 and "Traceback" not in lines
    assert errors == [f"ERROR: {folder / name} could not be written: {NO_SPACE}" for name in names]
    assert lines.index(errors[0]) > next(n for n, line in enumerate(lines) if line.startswith("Recalls on"))
    assert results_of(folder)["recalls"]
    assert [(folder / name).exists() for name in OUTPUTS] == [name not in names for name in OUTPUTS]
    assert not list(folder.rglob("*.tmp*"))


@pytest.mark.parametrize("script", ["eval", "train"])
def test_results_that_cannot_be_written_are_on_the_terminal(failed, city, tmp_path, monkeypatch, capsys, script):
    monkeypatch.setattr(run_log, "write_results", no_space)
    if script == "eval":
        status, folder = failed()
        assert (folder / "predictions.csv").exists()
    else:
        flags = [*SMALL, f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city", "--train_batch_size=4"]
        with pytest.raises(SystemExit) as ended:
            train_script.main(
                [*flags, "--train_resize", "56", "56", "--epochs_num=0", f"--save_dir={tmp_path}/trained"]
            )
        status = ended.value.code
    lines = capsys.readouterr().err.splitlines()
    (recalls,) = [n for n, line in enumerate(lines) if line.startswith("Recalls on toy_city test")]
    (error,) = [n for n, line in enumerate(lines) if line.startswith("ERROR")]
    assert status == 1 and recalls < error and "results.json could not be written: [Errno 28]" in lines[error]


def test_all_results_come_before_the_first_output(evaluated, tree, monkeypatch):
    """Of two contexts and two datasets."""
    tree("a")
    seen = []

    def look(evaluation, *_, **__):
        seen.append([results_of(evaluation.folder.parent / name)["contexts"].keys() for name in ("a", "b")])

    monkeypatch.setattr(tables, "write_predictions", look)
    folder = evaluated(*TWO_CONTEXTS, "--eval_dataset_name", "a/", "b", data=tree("b"), model="encoder")
    assert seen == [[{"file_order", "independent"}] * 2] * 2
    assert set(results_of(folder)["recalls"]) == {"a test", "b test"}


def test_the_first_context_is_written_before_the_second_is_searched(failed, monkeypatch):
    real, runs = contexts.Search.run, []

    def fails(self, *args, **settings):
        runs.append(1)
        return real(self, *args, **settings) if len(runs) == 1 else no_space()

    monkeypatch.setattr(contexts.Search, "run", fails)
    status, folder = failed(*TWO_CONTEXTS, model="encoder")
    assert status == 2 and list(results_of(folder)["contexts"]) == ["file_order"]


@pytest.mark.drawn
def test_odd_names_lose_nothing(evaluated, tree, capsys):
    data = tree("$a$ $b", database=4, queries=2)
    for side in ("database", "queries"):
        first, second, *_ = sorted((data / "$a$ $b/images/test" / side).iterdir())
        first.rename(f"{str(first)[:-4]}\udcff.jpg")  # a byte that is not UTF-8
        second.rename(f"{str(second)[:-4]}\n$x_{{$.jpg")
    folder = evaluated("--save_assignments=1", *ALL[::2], "--eval_dataset_name=$a$ $b", data=data)
    assert "database.txt: line breaks in 1 paths are written as \\n" in capsys.readouterr().err
    dataset = DatabaseQueries.from_folder(data, "$a$ $b", "test")
    table = (folder / "predictions.csv").read_bytes()
    assert all(os.fsencode(path) in table for path in dataset.queries_paths)
    lines = os.fsdecode((folder / "descriptors/database.txt").read_bytes()).split("\n")[:-1]
    assert [line.replace("\\n", "\n") for line in lines] == dataset.database_paths
    assert len(list((folder / "assignments").iterdir())) == 1 and (folder / "matches/index.html").exists()


def test_answers_in_places(evaluated, city, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(results, "draw_assignments", lambda _, photos, **__: drawn.extend(photos))
    flags = "--save_predictions=2 --save_assignments=1 --accept=1 --encoder_context independent".split()
    folder = evaluated(*flags, model="encoder")
    assert capsys.readouterr().err.splitlines()[-1].endswith(f" {(folder / 'matches/index.html').as_uri()}")
    dataset = DatabaseQueries.from_folder(city, "toy_city", "test")
    rows = rows_of(folder)
    for row in rows:
        match = dataset.database_positions[dataset.database_paths.index(row["database"])]
        query = dataset.queries_positions[dataset.queries_paths.index(row["query"])]
        assert (float(row["database_east"]), float(row["database_north"])) == pytest.approx(match, abs=0.006)
        assert float(row["metres"]) == pytest.approx(np.linalg.norm(match - query), abs=0.006)
        assert (float(row["metres"]) <= 25) == (row["correct"] == "1")
        assert list(row.items())[-1] == ("context", "independent")
    names = [os.path.basename(rows[0][side]) for side in ("query", "database")]
    verdict = "correct" if rows[0]["correct"] == "1" else "wrong"
    assert [title for title, *_ in drawn] == [f"query 0: {names[0]}", f"first match, {verdict}: {names[1]}"]
    page = (folder / "matches/index.html").read_text()
    first = 1 - float(rows[0]["squared_descriptor_distance"]) / 2
    assert f"similarity {first:.3f}" in page and "correct, within 25 m" in page


def test_queries_with_nothing_to_find_are_counted(evaluated, tree, caplog):
    data = tree("town")
    for path in sorted((data / "town/images/test/queries").iterdir())[:3]:
        fields = path.name.split("@")
        path.rename(path.with_name("@".join(["", str(float(fields[1]) + 5000), *fields[2:]])))
    folder = evaluated("--save_predictions=1", "--eval_dataset_name=town", data=data)
    assert "town test: 3 of 4 queries have no database photo within 25 m" in caplog.text
    left = results_of(folder)
    assert left["queries_without_positives"] == 3 and left["recalls"]["20"] == 25.0
    first = left["contexts"]["file_order"]["first_match"]  # false alarms, but for one
    assert (first["queries"], first["queries_with_positives"]) == (4, 1)
    assert first["distance"]["curve"]["precision"][-1] <= 25
    assert (folder / "matches/index.html").read_text().count("nothing to find within 25 m") == 3


def test_nothing_is_written_into_the_data_or_deleted(evaluated, tree, capsys):
    data = tree("town")
    theirs = data / "town/extracted/notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    before = sorted(data.rglob("*"))
    for names in ([f"{data}/town", "town"], ["../data/town"], ["town", "./town/"]):
        told = refusal(capsys, lambda names=names: evaluated("--eval_dataset_name", *names, data=data))
        assert "eval_dataset_name" in told
    evaluated("--eval_dataset_name=town/", data=data)
    assert sorted(data.rglob("*")) == before and theirs.read_text() == "mine"


def test_leftovers_of_every_kind(tmp_path, caplog):
    """Of eval.py, whose datasets may have names of several folders, and of train.py; not of a live run."""
    for name in ("a/extracted/town", "b/extracted/sf_xl/small", "c/descriptors", "d/descriptors", "e/descriptors"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "queries.npy").write_bytes(bytes(5_000_000))
        if name[0] != "d":  # results of --save_descriptors
            (tmp_path / name / "queries.done").write_bytes(b"0")
    with FolderLock(tmp_path / "e", "--save_dir"):
        warn_of_leftovers(tmp_path.iterdir())
    assert all("left 5.0 MB" in message for message in caplog.messages)
    removed = [message.split("rm -r ")[1] for message in caplog.messages]
    assert removed == [f"{tmp_path}/{name}" for name in ("a/extracted", "b/extracted", "c/descriptors")]


def test_a_submission_has_as_many_keys_in_each_line(evaluated, tree, monkeypatch, capsys):
    data = tree("msls", database=15)
    for side in ("database", "queries"):
        for number, path in enumerate(sorted((data / "msls/images/test" / side).iterdir())):
            fields = path.name.split("@")
            path.rename(path.with_name("@".join([*fields[:7], f"{side[0]}{number:02d}", *fields[8:]])))
    monkeypatch.setattr(eval_script, "SUBMITTED", 12)
    flags = ["--save_submission", "--recall_values", 1, 5, "--eval_dataset_name=msls"]
    folder = evaluated(*flags, data=data)
    lines = zipfile.ZipFile(folder / "submission.zip").read("submission.csv").decode().splitlines()
    assert [len(line.split()) for line in lines] == [13] * 4 and list(results_of(folder)["recalls"]) == ["1", "5"]
    assert "--index" in refusal(capsys, lambda: evaluated(*flags, "--index=IVF2,Flat", data=data))
    next((data / "msls/images/test/queries").iterdir()).rename(data / "msls/images/test/queries/@1@2@@@@@a b@@.jpg")
    assert "@1@2@@@@@a b@@.jpg" in refusal(capsys, lambda: evaluated(*flags, data=data))
