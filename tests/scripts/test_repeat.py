"""--options: a run is repeated from its results.json, and the command line has the last word."""

import json
import os
import re
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

import eval as eval_script
import parser
import train as train_script
from model import build_model, weights
from parser import EvalOptions, TrainOptions, parse

SMALL = "--device=cpu --num_workers=0".split()
OF_THE_REPETITION = ("options", "notes", "started_in")


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def options_of(folder):
    return {name: value for name, value in results_of(folder)["options"].items() if name not in OF_THE_REPETITION}


@pytest.fixture
def run(tmp_path):
    """Runs a script, and returns the new folder of the run and its log."""

    def run(main, *flags, save_dir="run"):
        before = set((tmp_path / save_dir).glob("*"))
        main([*map(str, flags), f"--save_dir={tmp_path / save_dir}"] if save_dir == "run" else [*map(str, flags)])
        (folder,) = set((tmp_path / save_dir).glob("*")) - before
        return folder, (folder / "info.log").read_text()

    return run


def checkpoint(path, *, resize=(56, 70), **settings):
    """A checkpoint that knows its model and its size."""
    settings = {"backbone": "dino_tiny", "clusters": 4, "ghost_clusters": 1, "crossimage_encoder": True, **settings}
    torch.manual_seed(1)
    state = build_model(**settings).state_dict()
    torch.save({"model_state_dict": state, "model": settings, "resize": list(resize)}, path)
    return path


def written(path, options, **environment):
    """A results.json with these options."""
    content = {"recalls": {}, "options": json.loads(json.dumps(options, default=str)), "environment": environment}
    path.write_text(json.dumps(content))
    return path


def warnings_in(log):
    return [line.split(" WARNING ")[1] for line in log.splitlines() if " WARNING " in line]


def test_a_repeated_evaluation_is_the_same(city, tmp_path, run):
    """Of two datasets and several contexts; what the checkpoint says is asked of it again."""
    for name in ("one", "two"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "images").symlink_to(city / "toy_city/images")
    file = checkpoint(tmp_path / "best.pth")
    given = [*SMALL, f"--resume={file}", f"--eval_datasets_folder={tmp_path}/data", "--eval_dataset_name", "one", "two"]
    given += ["--encoder_context", "file_order", "shuffled", "--context_seeds=2", "--seed=3", "--infer_batch_size=4"]
    first, log = run(eval_script.main, *given)
    assert options_of(first)["resize"] == [56, 70] and options_of(first)["backbone"] == "dino_tiny"
    second, again = run(eval_script.main, f"--options={first}/two/results.json", save_dir="run/.")
    assert results_of(second)["recalls"] == results_of(first)["recalls"]
    assert options_of(second) == options_of(first)
    for name in ("one", "two"):
        one, other = results_of(first / name), results_of(second / name)
        assert {**one, "options": {}} == {**other, "options": {}}
        assert (first / name / "predictions.csv").read_text() == (second / name / "predictions.csv").read_text()
    assert warnings_in(again) == warnings_in(log)
    # The log of the repetition says what was given, and whence.
    shown = [line.split(" INFO ")[1] for line in again.splitlines()[:3]]
    assert shown[0].startswith("command: ")
    as_given = [line.split(" INFO ")[1] for line in log.splitlines() if "options given: " in line]
    assert shown[1:2] == as_given and "--encoder_context file_order shuffled" in shown[1]
    assert shown[2].startswith(f"options from {first}/two/results.json, version {parser.version()} (")
    assert shown[2].endswith(": --device --num_workers --resume --eval_datasets_folder --eval_dataset_name "
                             "--encoder_context --context_seeds --seed --infer_batch_size --save_dir")  # fmt: skip
    # A repetition is repeated as the first run is.
    third = parse(EvalOptions, [f"--options={second}/results.json"])
    assert third.given == tuple(options_of(first)["given"]) and third.eval_dataset_name == ("one", "two")


def test_the_command_line_has_the_last_word(city, tmp_path, run):
    file = checkpoint(tmp_path / "best.pth")
    dataset = [f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city"]
    first, _ = run(eval_script.main, *SMALL, *dataset, f"--resume={file}", "--recall_values", 1, 5, "--antialias")
    flags = ["--recall_values", 2, 3, 4, "--no-antialias", "--skip_unreadable"]
    second, log = run(eval_script.main, *flags, f"--options={first}/results.json", save_dir="run/.")
    options = options_of(second)
    assert options["recall_values"] == [2, 3, 4] and list(results_of(second)["recalls"]) == ["2", "3", "4"]
    assert options["antialias"] is False and options["skip_unreadable"] and options["resume"] == str(file)
    assert "; the command line overrides --recall_values --antialias\n" in log
    assert "--recall_values 2 3 4" in log and "--recall_values 1 5" not in log
    plain, _ = run(eval_script.main, *SMALL, *dataset, f"--resume={file}", *flags)
    assert results_of(plain)["recalls"] == results_of(second)["recalls"]


def test_plain_folders_and_a_map_are_repeated(city, tmp_path, run):
    """Though most options have no part there, and are recorded all the same."""
    test = city / "toy_city/images/test"
    file = checkpoint(tmp_path / "best.pth")
    making = [f"--database_folder={test}/database", f"--queries_folder={test}/queries", f"--save_map={tmp_path}/m.npz"]
    asking = [f"--map={tmp_path}/m.npz", f"--queries_folder={test}/queries", "--save_pairs=2"]
    for flags in (making, asking):
        first, log = run(eval_script.main, *SMALL, f"--resume={file}", *flags)
        second, again = run(eval_script.main, f"--options={first}/results.json", save_dir="run/.")
        assert options_of(second) == options_of(first) and warnings_in(again) == warnings_in(log)
        assert (first / "predictions.csv").read_text() == (second / "predictions.csv").read_text()
        assert options_of(second)["resize"] == [56, 70] and options_of(second)["upright"]


def test_what_a_repetition_does_not_repeat_is_said(city, tmp_path, run):
    """Where the file at the checkpoint's path, the defaults of this version or its libraries are others."""
    file = checkpoint(tmp_path / "best.pth")
    dataset = [f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city", "--crossimage_encoder"]
    first, _ = run(eval_script.main, *SMALL, *dataset, f"--resume={file}")
    checkpoint(file, resize=(56, 56))
    content = results_of(first)
    content["environment"]["torch"] = "1.0"
    content["options"] |= {"majority_weight": 0.5, "resample": [1, 2]}
    (first / "results.json").write_text(json.dumps(content))
    _, log = run(eval_script.main, f"--options={first}/results.json", save_dir="run/.")
    assert f"{first}/results.json records options that this version does not have: --resample 1 2" in warnings_in(log)
    (line,) = [line for line in warnings_in(log) if "different from" in line]
    assert line == (
        f"different from {first}/results.json, by another checkpoint, version or option: --resize 56 56 (--resize 56 "
        "70 there), --majority_weight 0.01 (--majority_weight 0.5 there)"
    )
    assert f"different environment from {first}/results.json: torch {torch.__version__} (1.0 there)\n" in log


def test_a_repeated_training_is_the_same(city, tmp_path, run):
    given = f"--eval_datasets_folder={city} --eval_dataset_name=toy_city --backbone=dino_tiny --freeze_te none".split()
    given += "--resize 56 56 --train_resize 56 56 --train_batch_size=6 --epochs_num=1 --seed=5 --resume=auto".split()
    first, _ = run(train_script.main, *SMALL, *given)
    second, log = run(train_script.main, f"--options={first}/results.json", save_dir="run/.")
    assert (first / "metrics.csv").read_text() == (second / "metrics.csv").read_text()
    assert results_of(second)["recalls"] == results_of(first)["recalls"]
    assert options_of(second)["freeze_te"] is None
    differs = {name for name, value in options_of(first).items() if options_of(second)[name] != value}
    assert differs == {"resume", "given"} and not warnings_in(log)
    assert "--resume auto is left out: it resumed that run itself, which is now repeated from its start" in log
    # On demand the newest run of that --save_dir goes on, which is finished.
    assert train_script.main([f"--options={first}/results.json", "--resume=auto"]) == 0
    assert "is finished: only the test split is evaluated again" in (second / "info.log").read_text()


@pytest.mark.parametrize("resume", ["auto", "run/x/last_model.pth", "run/./x/previous_model.pth"])
def test_a_run_that_went_on_with_itself_is_repeated_from_its_start(tmp_path, monkeypatch, resume):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/x").mkdir(parents=True)
    options = parse(TrainOptions, ["--eval_datasets_folder=D", f"--resume={resume}", "--lr=0.001"])
    file = written(tmp_path / "run/x/results.json", asdict(options))
    again = parse(TrainOptions, [f"--options={file}"])
    assert (again.resume, again.lr, again.given) == (None, 0.001, ("eval_datasets_folder", "lr"))
    assert any(f"--resume {resume} is left out" in note for note in again.notes)
    assert parse(TrainOptions, [f"--options={file}", "--resume=w.pth"]).resume == "w.pth"
    assert not any("left out" in note for note in parse(TrainOptions, [f"--options={file}", "--resume=auto"]).notes)
    (tmp_path / "run/y").mkdir()
    shutil.copy(file, tmp_path / "run/y")
    other = parse(TrainOptions, [f"--options={tmp_path}/run/y/results.json"])
    assert other.resume == (None if resume == "auto" else resume), "weights of another run"


# What makes sense of an option beside others, and a value for it.
BESIDE = {
    "eval_dataset_name": "one two/three", "queries_names": "queries_night queries_rain", "resize": "70 70",
    "database_folder": "db --queries_folder q", "queries_folder": "q --database_folder db",
    "map": "m.npz --queries_folder q", "rerank": "40 --index binary", "accept": "auto@99.5",
    "recall_values": "1 30", "majority_weight": "0.25 --test_method maj_voting", "backbone": "dino_small",
    "encoder_context": "shuffled independent", "context_seeds": "3 --encoder_context shuffled",
    "context_shift": "3 --encoder_context unaligned", "pca_dim": "8 --pca_dataset_folder P/images",
    "pca_dataset_folder": "P --pca_dim 8", "pca_whiten": "--pca_dim 8 --pca_dataset_folder P", "index": "IVF4096,PQ64",
    "index_parameters": "nprobe=32 --index IVF4,Flat", "positives_file": "-odd.csv", "test_method": "five_crops",
    "train_dataset_folder": "g h/i", "cities": "Rome Oslo", "train_resize": "112 126", "freeze_te": "none",
    "lr_end_factor": "0.1 --lr_schedule cosine", "weight_decay": "1e-09", "lr": "2.5e-05",
    "encoder_training": "every_step --crossimage_encoder", "lr_encoder": "1e-3 --crossimage_encoder",
    "mixed_precision": "--precision fp16", "train_batch_size": "50", "backbone_blocks": "9",
}  # fmt: skip


@pytest.mark.parametrize("options_class", [EvalOptions, TrainOptions])
def test_every_option_comes_back_as_it_was_given(options_class, tmp_path):
    names = [entry.name for entry in fields(options_class) if entry.metadata and entry.name != "options"]
    assert len(names) > 40
    base = ["--eval_datasets_folder=D", "--resume=x.pth"]
    for name in names:
        (entry,) = [entry for entry in fields(options_class) if entry.name == name]
        choices = entry.metadata.get("choices")
        switch = isinstance(entry.default, bool) or "action" in entry.metadata
        value = BESIDE.get(name, "" if switch else list(choices)[-1] if choices else "7")
        if options_class is TrainOptions and name == "eval_dataset_name":
            value = "one/two"
        words = value.split()
        words = [f"--{name}={words[0]}", *words[1:]] if value.startswith("-odd") else [f"--{name}", *words]
        plain = {"--database_folder", "--map", "--queries_folder"} & {*words}
        options = parse(options_class, [*([base[1]] if plain else base), *words])
        assert name in options.given
        file = written(tmp_path / "results.json", asdict(options))
        again = parse(options_class, [f"--options={file}"])
        assert again.given == options.given and again.options == file
        assert replace(again, options=None) == options, name
        assert {n: type(v) for n, v in asdict(again).items() if n != "options"} == {
            n: type(v) for n, v in asdict(options).items() if n != "options"
        }
        assert again.notes[0].endswith(": " + " ".join(f"--{of}" for of in options.given))


def test_relative_paths_begin_where_the_run_was_started(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there / "data"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(there)
    flags = "--eval_datasets_folder=data --resume=logs/best.pth --query_keys=/keys.txt --save_dir=mine --pca_dim=8"
    options = parse(EvalOptions, [*flags.split(), "--pca_dataset_folder=pitts30k/images"])
    file = written(tmp_path / "results.json", asdict(options))
    same = parse(EvalOptions, [f"--options={file}"])
    assert str(same.eval_datasets_folder) == "data" and len(same.notes) == 1

    monkeypatch.chdir(here)
    moved = parse(EvalOptions, [f"--options={file}"])
    assert (moved.eval_datasets_folder, moved.resume) == (there / "data", there / "logs/best.pth")
    assert (moved.query_keys, moved.save_dir) == (Path("/keys.txt"), Path("mine"))
    assert moved.pca_dataset_folder == Path("pitts30k/images") and moved.started_in == str(here)
    assert moved.notes[1:] == (f"its relative paths start from {there}, where that run was started",)
    assert parse(EvalOptions, [f"--options={file}", "--resume=mine.pth"]).resume == Path("mine.pth")
    # What is asked of it once more is asked as it was found.
    again = written(tmp_path / "again.json", asdict(moved))
    monkeypatch.chdir(tmp_path)
    assert replace(parse(EvalOptions, [f"--options={again}"]), options=None) == replace(moved, options=None)

    shutil.rmtree(there)
    gone = parse(EvalOptions, [f"--options={file}"])
    assert str(gone.eval_datasets_folder) == "data"
    assert gone.notes[1:] == (
        f"no folder {there}, where that run was started: its relative paths start from the current one",
    )

    train = parse(TrainOptions, ["--eval_datasets_folder=/d", "--train_dataset_folder", "a", "/b", "--resume=w/x.pth"])
    file = written(tmp_path / "train.json", asdict(train))
    monkeypatch.chdir(here)
    moved = parse(TrainOptions, [f"--options={file}"])
    assert moved.train_dataset_folder == (tmp_path / "a", Path("/b")) and moved.resume == f"{tmp_path}/w/x.pth"


@pytest.mark.parametrize("name", weights.RELEASED)
def test_the_name_of_a_released_checkpoint_is_no_path(tmp_path, monkeypatch, name):
    options = parse(EvalOptions, ["--eval_datasets_folder=/d", f"--resume={name}"])
    file = written(tmp_path / "results.json", asdict(options))
    monkeypatch.chdir(tmp_path)
    assert parse(EvalOptions, [f"--options={file}"]).resume == Path(name)


def test_an_old_file_gives_what_is_not_the_default(tmp_path):
    """It says neither what was given nor where the run was started."""
    train = asdict(parse(TrainOptions, "--eval_datasets_folder=D --freeze_te none --lr=0.1 --deterministic".split()))
    for name in ("given", "started_in", "notes", "options", "deterministic", "warmup_steps"):
        train.pop(name)
    again = parse(TrainOptions, [f"--options={written(tmp_path / 'a.json', train)}", "--lr=0.2"])
    assert (again.freeze_te, again.lr, again.deterministic, again.warmup_steps) == (None, 0.2, False, 0)
    assert again.decisive == parse(TrainOptions, ["--eval_datasets_folder=D", "--freeze_te=none", "--lr=0.2"]).decisive
    assert ", version unknown (unknown): --eval_datasets_folder" in again.notes[0]
    assert "--freeze_te, those that differ from the default, since it does not say what was given" in again.notes[0]
    assert again.notes[1] == "it names no folder: its relative paths start from the current one"


def test_a_value_that_the_command_line_gives_need_not_be_one(tmp_path):
    file = written(tmp_path / "a.json", {"patience": "x", "given": ["patience"]})
    assert parse(TrainOptions, [f"--options={file}", "--patience=4", "--eval_datasets_folder=D"]).patience == 4


EVALUATION = {"eval_datasets_folder": "D", "resume": "x.pth", "test_method": None, "map": None}
ARE_OPTIONS = "holds no options of train.py or eval.py; name the results.json of an earlier run"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file; name the results.json of an earlier run"),
        ("folder", "is a folder; name the results.json of an earlier run"),
        ("pipe", "is not a file; name the results.json of an earlier run"),
        (b"", "is damaged or not JSON (Expecting value: line 1 column 1 (char 0)); name the results.json"),
        (b'{"options": {"seed": 1', "is damaged or not JSON (Expecting ',' delimiter"),
        (b"PK\x03\x04\x80\xff", "is damaged or not JSON ("),
        (b"[" * 100_000, "is damaged or not JSON (maximum recursion depth"),
        (b"7" * 5000, "is damaged or not JSON (Exceeds the limit"),
        (b"[1, 2]", ARE_OPTIONS),
        (b"null", ARE_OPTIONS),
        (b'{"options": ["--seed=3"]}', ARE_OPTIONS),
        (b'{"recalls": {"1": 27.0}}', ARE_OPTIONS),
        (b'{"options": {"seed": 1, "device": "cpu"}, "environment": 3}', ARE_OPTIONS),
        ("train", "is from train.py, whose options eval.py does not take; name the results.json of an earlier run of"),
        ({"given": "resume"}, 'its "given" is not a list of options'),
        ({"given": ["resume", ["seed"]]}, 'its "given" is not a list of options'),
        (
            {"given": ["resume", "resample"], "resample": 3},
            'that run, version 9.1 (abc), was given "resample", not an option of this version, ',
        ),
        ({"given": ["upright"], "upright": True}, 'was given "upright", not an option of this version'),
        ({"given": ["options"], "options": "a.json"}, 'was given "options", not an option of this version'),
        ({"given": ["seed"]}, "--seed was given but has no value"),
        ({"given": ["seed"], "seed": "3"}, '--seed cannot be "3", as the file says; give --seed on the command'),
        ({"given": ["seed"], "seed": 3.0}, "--seed cannot be 3.0, as the file says"),
        ({"given": ["seed"], "seed": True}, "--seed cannot be true, as the file says"),
        ({"given": ["seed"], "seed": None}, "--seed cannot be null, as the file says"),
        ({"given": ["seed"], "seed": [3]}, "--seed cannot be [3], as the file says"),
        ({"given": ["seed"], "seed": {"a": 1}}, '--seed cannot be {"a": 1}, as the file says'),
        ({"given": ["compile"], "compile": 1}, "--compile cannot be 1, as the file says"),
        ({"given": ["antialias"], "antialias": "yes"}, '--antialias cannot be "yes", as the file says'),
        ({"given": ["resume"], "resume": 5}, "--resume cannot be 5, as the file says"),
        ({"given": ["recall_values"], "recall_values": 5}, "--recall_values cannot be 5, as the file says"),
        ({"given": ["recall_values"], "recall_values": []}, "--recall_values cannot be [], as the file says"),
        (
            {"given": ["recall_values"], "recall_values": [1, [2]]},
            "--recall_values cannot be [1, [2]], as the file says",
        ),
        ({"given": ["resize"], "resize": [56, 56, 56]}, "--resize cannot be [56, 56, 56], as the file says"),
        (
            {"given": ["eval_dataset_name"], "eval_dataset_name": ["a", "--seed=3"]},
            '--eval_dataset_name cannot be ["a", "--',
        ),
        ({"given": ["test_method"], "test_method": "ten_crops"}, "argument --test_method: invalid choice: 'ten_crops'"),
        (
            {"given": [*EVALUATION][:2], "infer_batch_size": 4},
            None,
        ),
        (
            {"given": [*[*EVALUATION][:2], "seed", "context_seeds"], "seed": 4, "context_seeds": 0},
            '--context_seeds 0 is not above 0; give a positive number (--context_seeds: from --options {file}; to '
            'leave it out, remove it from "given" in a copy)',
        ),
        ({"given": ["resume"]}, "--eval_datasets_folder is missing"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_taken(tmp_path, capsys, content, message):
    file = tmp_path / "results.json"
    if content == "folder":
        file.mkdir()
    elif content == "pipe":
        os.mkfifo(file)
    elif content == "train":
        written(file, asdict(parse(TrainOptions, ["--eval_datasets_folder=D"])))
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        written(file, {**EVALUATION, **content}, version="9.1", git="abc")
    if message is None:
        assert parse(EvalOptions, [f"--options={file}"]).infer_batch_size == 16, "recorded, and not given"
        return
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        parse(EvalOptions, [f"--options={file}"])
    usage, error = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and usage.startswith("usage: ")
    assert message.replace("{file}", str(file)) in error
    assert f"--options {file}" in error or "is missing" in message


def test_an_evaluation_does_not_make_a_training(tmp_path, capsys):
    file = written(tmp_path / "results.json", asdict(parse(EvalOptions, ["--eval_datasets_folder=D", "--resume=x"])))
    with pytest.raises(SystemExit) as exit_:
        parse(TrainOptions, [f"--options={file}"])
    assert exit_.value.code == 2
    assert (
        f"--options {file} is from eval.py, whose options train.py does not take; name the" in capsys.readouterr().err
    )


def test_a_contradiction_says_what_comes_from_the_file(tmp_path, capsys):
    plain = ["--database_folder=/a", "--queries_folder=/b", "--resume=x"]
    file = written(tmp_path / "results.json", asdict(parse(EvalOptions, plain)))
    with pytest.raises(SystemExit):
        parse(EvalOptions, [f"--options={file}", "--eval_datasets_folder=D", "--eval_dataset_name=pitts30k"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"both say what to search; give one of the two \(--database_folder: from --options ", error)


def test_a_bad_file_is_said_once_a_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parser.time, "sleep", lambda _: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    for local in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(SystemExit) as exit_:
            parse(EvalOptions, [f"--options={tmp_path}/none.json"])
        assert exit_.value.code == 2 and bool(capsys.readouterr().err) == (local == "0")
