"""The options: the recipe by default, the released README's flags, clear refusals."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import refusal

from datasets.photos.transforms import TEST_METHODS
from model import BACKBONES
from model.sizes import fitted
from parser import REMOVED, EvalOptions, TrainOptions, parse
from parser import TEST_METHODS as METHODS
from utils.system import command_line

TRAIN = """--eval_datasets_folder=D --eval_dataset_name=pitts30k --foundation_model_path=dinov2_vitb14_pretrain.pth
--backbone=dino --supervlad_clusters=4 --crossimage_encoder --patience=3 --lr=0.00005 --epochs_num=20
--train_batch_size=120 --freeze_te 8"""
EVAL = "--eval_datasets_folder=D --eval_dataset_name=pitts30k --resume=SuperVLAD.pth --backbone=dino "
DATA = ["--eval_datasets_folder=D"]


def evaluation(flags, *others):
    return parse(EvalOptions, [*DATA, "--resume=x", *flags.split(), *others])


def training(flags, *others):
    return parse(TrainOptions, [*DATA, *flags.split(), *others])


@pytest.fixture
def refuses(capsys):
    """Parses a command line that is refused, and returns the message."""
    return lambda options_class, words: refusal(
        capsys, lambda: parse(options_class, words.split() if isinstance(words, str) else words)
    )


def test_defaults_are_the_recipe():
    recipe = parse(TrainOptions, TRAIN.split())
    flags = ["--crossimage_encoder", "--foundation_model_path=dinov2_vitb14_pretrain.pth"]
    assert parse(TrainOptions, [*DATA, *flags]) == recipe
    values = {"seed": 0, "eval_dataset_name": "pitts30k", "precision": "fp32", "val_precision": "fp32"}
    values |= {"freeze_te": 8, "train_batch_size": 120, "images_per_place": 4, "lr": 5e-5, "lr_encoder": 1e-4}
    values |= {"optim": "adam", "encoder_training": "released", "train_resize": (224, 224), "infer_batch_size": 16}
    values |= {"recall_values": (1, 5, 10, 20), "val_positive_dist_threshold": 25, "randaugment_ops": 3}
    assert (values | {"place_order": "fixed", "antialias": False}).items() <= recipe.flat.items()


@pytest.mark.parametrize(
    ("flags", "model"),
    [
        ("--supervlad_clusters=4 --crossimage_encoder", ("dino", 4, 1, True)),
        ("--supervlad_clusters=4", ("dino", 4, 1, False)),
        ("--supervlad_clusters=1 --ghost_clusters=2", ("dino", 1, 2, False)),
    ],
)
def test_released_evaluation_commands(flags, model):
    options = parse(EvalOptions, (EVAL + flags).split())
    assert options.model.resume == Path("SuperVLAD.pth") and set(METHODS) == set(TEST_METHODS)
    assert tuple(options.model.arguments.values()) == model


@pytest.mark.parametrize(
    ("backbone", "given", "size"),
    [
        ("dino", None, (322, 322)),
        ("dinov3_large", None, (320, 320)),
        ("dino", (480, 640), (476, 644)),
        ("dinov3", (476, 644), (480, 640)),
        ("dino", (56, 56), (56, 56)),
    ],
)
def test_images_are_of_whole_patches(caplog, backbone, given, size):
    """By default of the backbone's own size; sides that differ are rounded, with a warning."""
    assert fitted(given, BACKBONES[backbone]) == size
    assert ("{} {}".format(*size) in caplog.text) == (given not in (None, size))
    with pytest.raises(ValueError, match=r"resize 100 100 .* use e\.g\. "):
        fitted((100, 100), BACKBONES[backbone])


def test_what_depends_on_the_checkpoint_is_left_open():
    protocol = evaluation("").protocol
    assert protocol.resize is protocol.encoder_context is protocol.antialias is None
    assert evaluation("--no-antialias").protocol.antialias is False and training("").protocol.resize is None


def test_blocks_that_are_kept_go_into_the_checkpoint():
    assert training("--backbone=dinov3 --backbone_blocks=11").model.arguments["backbone_blocks"] == 11
    assert "backbone_blocks" not in training("--backbone=dinov3 --backbone_blocks=12").model.arguments


@pytest.mark.parametrize(
    ("flags", "words"),  # each message has the value and the option that helps
    [
        ("--backbone_blocks 0", "--backbone_blocks 0 1"),
        ("--recall_values 0 5", "--recall_values 0 1"),
        ("--ghost_clusters -1", "--ghost_clusters -1 0"),
        ("--save_predictions -1", "--save_predictions -1"),
        ("--majority_weight=nan", "--majority_weight nan"),
        ("--val_positive_dist_threshold 0", "--val_positive_dist_threshold above"),
        ("--queries_folder=q", "--database_folder --queries_folder"),
        ("--map=m", "--map --queries_folder"),
        ("--map=m --queries_folder=q --pca_dim=8 --index=Flat", "--pca_dim --index --map"),
        ("--pca_dim 8", "--pca_dim 8 --pca_dataset_folder"),
        ("--eval_dataset_name a b --positives_file f", "--positives_file --eval_dataset_name"),
        ("--queries_names a b --query_keys f", "--query_keys --queries_names"),
        ("--eval_dataset_name a b --save_map m", "--save_map --eval_dataset_name"),
        ("--eval_dataset_name a/b ./a//b", "--eval_dataset_name a/b"),
        ("--encoder_context shuffled shuffled", "--encoder_context shuffled once"),
        ("--queries_names other:a", "--queries_names other:a --eval_dataset_name"),
        ("--no_labels --positives_file f", "--no_labels --positives_file"),
        ("--positives_file f --val_positive_dist_threshold 9", "--positives_file --val_positive_dist_threshold"),
        ("--no_labels --encoder_context shuffled independent", "--encoder_context --no_labels shuffled"),
        ("--no_labels --encoder_context paired", "--encoder_context --no_labels paired"),
        ("--test_method maj_voting --recall_values 1 5 --save_predictions 9", "--recall_values 5 9"),
        ("--test_method maj_voting --recall_values 5 --save_submission", "--recall_values 5 20"),
        ("--test_method maj_voting --accept 0.5", "--accept 0.5 --test_method"),
        ("--rerank many", "--rerank 'many' whole 1"),
        ("--index binary --rerank 9", "--rerank 9 20"),
        ("--save_submission --skip_unreadable", "--save_submission --skip_unreadable"),
        ("--eval_dataset_name /data/x", "--eval_dataset_name '/data/x'"),
        ("--eval_dataset_name a/../../x", "--eval_dataset_name 'a/../../x'"),
        ("--queries_names a:./", "--queries_names './'"),
        ("--test_method ten_crops", "--test_method ten_crops"),
        ("--backbone resnet", "--backbone resnet"),
        ("--accept auto@99", "--accept 2.0.0 --eval_split"),
    ],
)
def test_refusals(flags, words, refuses):
    error = refuses(EvalOptions, [*DATA, "--resume=x", *flags.split()])
    assert all(word in error for word in words.split())


def test_what_is_missing(refuses):
    assert "--eval_datasets_folder" in refuses(EvalOptions, "--resume=x")
    assert "--resume" in refuses(EvalOptions, "--eval_datasets_folder=D")
    assert "--eval_datasets_folder" in refuses(TrainOptions, "")


@pytest.mark.parametrize(
    "flags",
    [
        "--freeze_te=-1",
        "--patience 0",
        "--images_per_place 1",
        "--cities Rome Rome",
        "--lr 0",
        "--weight_decay -0.1",
        "--lr_schedule step",
        "--eval_dataset_name /data/pitts30k",
        "--val_precision int8",
        "--mixed_precision --precision bf16",
    ],
)
def test_training_refusals(flags, refuses):
    assert flags.split()[0].split("=")[0] in refuses(TrainOptions, [*DATA, *flags.split()])


@pytest.mark.parametrize(
    ("options_class", "flags", "message"),
    [
        (EvalOptions, "--resum=x", "unknown option --resum=x, did you mean --resume?"),
        (EvalOptions, "--infer-batch-size 3", "unknown option --infer-batch-size, did you mean --infer_batch_size?"),
        (EvalOptions, "resume=x", "unknown option resume=x, did you mean --resume?"),
        (EvalOptions, "--eval_dataset_name=a b", "only one value can follow =; write --eval_dataset_name a b"),
        (TrainOptions, "--lr=1 --cities=Rome London --seed 3", "--cities=Rome London: only one value can follow ="),
        (EvalOptions, "--noantialias", "unknown option --noantialias, did you mean --no-antialias?"),
        (EvalOptions, "--train_batch_size 3", "unknown option --train_batch_size, it is an option of train.py"),
        (TrainOptions, "--save_predictions 3", "unknown option --save_predictions, it is an option of eval.py"),
        (TrainOptions, "--zzz 1 --epoch_num 3", "option --zzz; unknown option --epoch_num, did you mean --epochs_num"),
    ],
)
def test_a_misspelt_option_names_its_neighbour(options_class, flags, message, refuses):
    assert message in refuses(options_class, flags)


@pytest.mark.parametrize("name", REMOVED)
def test_removed_options_say_what_to_use(name, refuses):
    for options_class in (EvalOptions, TrainOptions):
        error = refuses(options_class, f"--{name} 5")
        assert f"--{name}" in error and "removed in 2.0.0" in error and REMOVED[name] in error


def test_one_process_a_machine_speaks(capsys, monkeypatch):
    """Of those of torchrun; a rank that another launcher left in the environment silences nobody."""
    monkeypatch.setattr(command_line.time, "sleep", lambda _: None)
    for launched, local, speaks in (("job", "0", True), ("job", "1", False), (None, "1", True)):
        monkeypatch.setenv("LOCAL_RANK", local)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        if launched:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", launched)
        for flags, status in (("--resum=x", 2), ("", 2), ("@none.txt", 2), ("--help", 0), ("--version", 0)):
            with pytest.raises(SystemExit) as exit_:
                parse(EvalOptions, flags.split())
            assert exit_.value.code == status
            shown = capsys.readouterr()
            assert bool(shown.out + shown.err) == speaks, flags


def test_names_of_datasets_are_paths_below_their_folder():
    options = evaluation("--eval_dataset_name nordland/ ./a//b/ svox --queries_names queries/ svox:night/")
    assert options.data.eval_dataset_name == ("nordland", "a/b", "svox")
    assert options.data.queries_of("nordland") == ("queries",) and options.data.queries_of("svox")[1] == "night"
    assert training("--eval_dataset_name=nordland/").data.eval_dataset_name == "nordland"


@pytest.mark.parametrize(
    ("options_class", "flags", "idle"),
    [
        (EvalOptions, "--rerank 3 --index binary --recall_values 1", ""),
        (EvalOptions, "--rerank 300 --pca_whiten --majority_weight=0.1", "pca_whiten majority_weight rerank"),
        (EvalOptions, "--index=binary --index_parameters=nprobe=3", "index_parameters"),
        (EvalOptions, "--database_folder=a --queries_folder=b --eval_split=val", "eval_split eval_datasets_folder"),
        (TrainOptions, "--lr_encoder=1e-3 --encoder_training=every_step", "lr_encoder encoder_training"),
        (TrainOptions, "--lr_encoder=1e-3 --crossimage_encoder", ""),
        (TrainOptions, "--resume=r.pth --foundation_model_path=f", "foundation_model_path"),
        (TrainOptions, "--resume=auto --foundation_model_path=f", ""),
        (TrainOptions, "--epochs_num=1 --place_order=similar", "place_order"),
    ],
)
def test_options_without_effect_are_named_in_one_line(options_class, flags, idle):
    notes = parse(options_class, [*DATA, *["--resume=x"] * (options_class is EvalOptions), *flags.split()]).notes
    assert re.findall(r"--(\w+) \(needs", " ".join(notes)) == idle.split() and len(notes) == bool(idle)


def test_the_home_folder_behind_an_equals_sign(monkeypatch):
    """Which a shell does not replace."""
    monkeypatch.setenv("HOME", "/home/me")
    options = parse(EvalOptions, ["--eval_datasets_folder=~/data", "--resume=~/a.pth", "--save_dir=~/out"])
    paths = (options.data.eval_datasets_folder, options.model.resume, options.outputs.save_dir)
    assert paths == (Path("/home/me/data"), Path("/home/me/a.pth"), Path("/home/me/out"))
    assert training("--train_dataset_folder ~/a b").data.train_dataset_folder == (Path("/home/me/a"), Path("b"))
    assert str(evaluation("--database_folder=~nobody-here/a --queries_folder=b").data.database_folder) == (
        "~nobody-here/a"
    ), "as a shell leaves it"


def test_a_python_without_pytorch_is_told_how_to_get_it(monkeypatch, refuses):
    monkeypatch.setattr("parser.find_spec", lambda name: None)
    message = refuses(EvalOptions, "--eval_datasets_folder=d --resume=r")
    assert "no PyTorch" in message and "make .venv/ready" in message


@pytest.mark.parametrize("options_class", [EvalOptions, TrainOptions])
def test_help_has_each_option_once_in_its_group(options_class, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        parse(options_class, ["--help"])
    text = capsys.readouterr().out
    names = [entry.name for group in options_class.groups().values() for entry in fields(group)]
    assert exit_.value.code == 0 and len(names) == len({*names}) > 30
    assert re.findall(r"^  --(?:no-)?(\w+)", text, re.MULTILINE) == ["version", *names]
    assert all(f"\n{group.__doc__.rstrip('.')}:\n" in text for group in options_class.groups().values())
    assert "(default: 1 5 10 20)" in text and "(default: 16)" in text
