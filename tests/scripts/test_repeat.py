"""@FILE: a run is repeated from its options.txt, and the command line has the last word."""

import os
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import SMALL, refusal, results_of

import eval as eval_script
import train as train_script
from parser import EvalOptions, TrainOptions, parse
from utils.run import options_file


@pytest.fixture
def run(tmp_path):
    """Runs a script, and returns the new folder of the run and its log."""

    def run(main, *flags):
        before = set((tmp_path / "run").glob("[!l]*"))  # not the link to the latest
        main([*map(str, flags)])
        (folder,) = set((tmp_path / "run").glob("[!l]*")) - before
        return folder, (folder / "info.log").read_text()

    return run


def test_a_repeated_evaluation_is_the_same(city, weights, tmp_path, run, monkeypatch):
    """From another folder, though its paths were relative; the last word wins."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(city)
    (tmp_path / "best model.pth").symlink_to(weights / "plain.pth")
    given = [*SMALL[:-3], "--resume=best model.pth", "--eval_datasets_folder=data", "--eval_dataset_name", "toy_city"]
    given += ["--resize", 56, 70, "--recall_values", 1, 5, f"--save_dir={tmp_path}/run"]
    first, _ = run(eval_script.main, *given)
    lines = (first / "options.txt").read_text().splitlines()
    assert lines[0] == f"# started in {tmp_path}" and lines[1:4] == SMALL[:3]
    assert {"'--resume=best model.pth'", "--eval_datasets_folder=data"} < {*lines}
    second, _ = run(eval_script.main, f"@{first}/options.txt")
    assert results_of(second)["recalls"] == results_of(first)["recalls"]
    assert (first / "predictions.csv").read_text() == (second / "predictions.csv").read_text()
    assert (first / "options.txt").read_text() == (second / "options.txt").read_text(), "it is repeated as the first is"
    monkeypatch.chdir(city)
    third, log = run(eval_script.main, f"@{first}/options.txt", "--recall_values", 2, 3, "--no-antialias")
    options = results_of(third)["options"]
    assert options["recall_values"] == [2, 3] and options["antialias"] is False and options["resize"] == [56, 70]
    assert f"start from {tmp_path}" in log and options["resume"] == f"{tmp_path}/best model.pth"
    assert "--recall_values 2 3" in log and "--recall_values 1 5" not in log


@pytest.mark.slow
def test_a_repeated_training_is_the_same(city, tmp_path, run):
    given = f"--eval_datasets_folder={city} --eval_dataset_name=toy_city --freeze_te none".split()
    given += "--train_resize 56 56 --train_batch_size=6 --epochs_num=1 --seed=5 --resume=auto".split()
    first, _ = run(train_script.main, *SMALL, *given, f"--save_dir={tmp_path}/run")
    second, log = run(train_script.main, f"@{first}/options.txt")
    assert (first / "metrics.csv").read_text() == (second / "metrics.csv").read_text()
    assert results_of(second)["recalls"] == results_of(first)["recalls"]
    before, after = results_of(first)["options"], results_of(second)["options"]
    assert {name for name in before if before[name] != after[name]} == {"resume", "given"} and "--resume=auto" in log
    # On demand the newest run of that --save_dir goes on, which is finished.
    assert train_script.main([f"@{first}/options.txt", "--resume=auto"]) == 0
    assert "is finished: only the test split is evaluated again" in (second / "info.log").read_text()


def options_txt(folder, options):
    folder.mkdir(parents=True, exist_ok=True)
    options_file.write(folder, options.flat)
    return f"@{folder}/options.txt"


@pytest.mark.parametrize("resume", ["auto", "run/x/last_model.pth", "run/./x/previous_model.pth"])
def test_a_run_that_only_resumed_itself_is_repeated_from_its_start(tmp_path, monkeypatch, resume):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/x").mkdir(parents=True)
    for name in ("last_model.pth", "previous_model.pth"):
        (tmp_path / "run/x" / name).touch()
    options = parse(TrainOptions, ["--eval_datasets_folder=/D", f"--resume={resume}", "--lr=0.001"])
    file = options_txt(tmp_path / "run/x", options)
    again = parse(TrainOptions, [file])
    assert (again.model.resume, again.recipe.lr, again.given) == (None, 0.001, ("eval_datasets_folder", "lr"))
    assert any("--resume" in note and "left out" in note for note in again.notes)
    monkeypatch.chdir("/")
    assert parse(TrainOptions, [file]).model.resume is None
    assert parse(TrainOptions, [file, "--resume=w.pth"]).model.resume == Path("w.pth")
    monkeypatch.chdir(tmp_path)
    other = parse(TrainOptions, [options_txt(tmp_path / "run/y", options)])
    assert other.model.resume == (None if resume == "auto" else Path(resume)), "weights of another run"


# What makes sense of an option beside others, and a value for it.
BESIDE = {
    "eval_dataset_name": "one/two", "queries_names": "queries_night queries_rain", "resize": "70 70",
    "database_folder": "/db --queries_folder /q", "queries_folder": "/q --database_folder /db",
    "map": "/m.npz --queries_folder /q", "recall_values": "1 30", "encoder_context": "shuffled independent",
    "pca_dim": "8 --pca_dataset_folder P/images", "positives_file": "-odd.csv", "cities": "Rome Oslo",
    "train_dataset_folder": "/g /h/i", "train_resize": "112 126", "freeze_te": "none", "weight_decay": "1e-09",
    "mixed_precision": "--precision fp16", "rerank": "120", "backbone_blocks": "9", "query_corruptions": "blur jpeg:3",
}  # fmt: skip


@pytest.mark.parametrize("options_class", [EvalOptions, TrainOptions])
def test_every_option_comes_back_as_it_was_given(options_class, tmp_path):
    entries = [entry for group in options_class.groups().values() for entry in fields(group)]
    for entry in entries:
        choices, switch = entry.metadata.get("choices"), bool in getattr(entry.type, "__args__", (entry.type,))
        value = BESIDE.get(entry.name, "" if switch else list(choices)[-1] if choices else "7")
        words = value.split() if entry.name != "index_parameters" else ["a b=3", "--index=x"]
        words = [f"--{entry.name}={words[0]}"] if value.startswith("-odd") else [f"--{entry.name}", *words]
        folders = {"--database_folder", "--map"} & {*words}
        options = parse(options_class, ["--resume=x.pth", *["--eval_datasets_folder=D"] * (not folders), *words])
        again = parse(options_class, [options_txt(tmp_path, options)])
        assert entry.name in options.given == again.given and again.flat.keys() == options.flat.keys()
        assert again == options, entry.name


def test_relative_paths_start_where_the_run_was_started(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    monkeypatch.chdir(there)
    (there / "w.pth").touch()
    flags = "--eval_datasets_folder=data --train_dataset_folder a /b --resume=w.pth --save_dir=mine".split()
    file = options_txt(tmp_path / "run", options := parse(TrainOptions, flags))
    assert parse(TrainOptions, [file]) == options and not parse(TrainOptions, [file]).notes
    monkeypatch.chdir(here)
    moved = parse(TrainOptions, [file])
    assert (moved.data.eval_datasets_folder, moved.model.resume) == (there / "data", there / "w.pth")
    assert (moved.data.train_dataset_folder, moved.outputs.save_dir) == ((there / "a", Path("/b")), Path("mine"))
    assert any(str(there) in note for note in moved.notes)
    assert parse(TrainOptions, [file, "--resume=x.pth"]).model.resume == Path("x.pth")
    (there / "w.pth").unlink()
    there.rmdir()
    gone = parse(TrainOptions, [file])
    assert str(gone.data.eval_datasets_folder) == "data" and any(f"no folder {there}" in note for note in gone.notes)


def test_odd_names_come_back(tmp_path, monkeypatch):
    """Bytes that are no UTF-8, line ends, quotes; and a folder that is gone."""
    folder = tmp_path / os.fsdecode(b"a\xff b\r\n'#c")
    folder.mkdir()
    monkeypatch.chdir(folder)
    options = parse(EvalOptions, ["--eval_datasets_folder=d # e", "--resume=SuperVLAD"])
    file = options_txt(tmp_path / "run", options)
    monkeypatch.chdir("/")
    again = parse(EvalOptions, [file])
    assert again.data.eval_datasets_folder == folder / "d # e" and again.model.resume == Path("SuperVLAD")


@pytest.mark.parametrize(
    "content", [None, "folder", b"", b"--seed='3", b"PK\x03\x04\x80\xff", b'{"options": {"seed": 1}}', b"seed=3"]
)
def test_files_that_cannot_be_taken(tmp_path, capsys, content):
    file = tmp_path / "options.txt"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    error = refusal(capsys, lambda: parse(EvalOptions, [f"@{file}"]))
    assert f"@{file}" in error and "options.txt" in error.split(";")[-1]


def test_only_the_first_word_is_a_file(tmp_path, capsys):
    file = tmp_path / "mine.txt"
    file.write_text("--eval_datasets_folder=D\n--resume x --seed 3\n")
    options = parse(EvalOptions, [f"@{file}", "--index_parameters=@a", "--seed=4"])
    assert (options.machine.seed, options.search.index_parameters) == (4, "@a")
    assert f"unknown option @{file}" in refusal(capsys, lambda: parse(EvalOptions, ["--seed=4", f"@{file}"]))


def test_an_evaluation_does_not_make_a_training(tmp_path, capsys):
    file = options_txt(tmp_path, parse(EvalOptions, ["--eval_datasets_folder=D", "--resume=x", "--rerank=7"]))
    assert "--rerank=7, it is an option of eval.py" in refusal(capsys, lambda: parse(TrainOptions, [file]))
