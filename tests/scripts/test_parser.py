"""The options: the recipe by default, the released README's flags, clear refusals."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import parser
from datasets.photos.transforms import TEST_METHODS
from model import BACKBONES
from parser import GROUPS, OF_A_CHECKPOINT, EvalOptions, TrainOptions, parse
from utils.retrieval.contexts import DRAWN_CONTEXTS

TRAIN = """--eval_datasets_folder=D --eval_dataset_name=pitts30k --foundation_model_path=dinov2_vitb14_pretrain.pth
--backbone=dino --supervlad_clusters=4 --crossimage_encoder --patience=3 --lr=0.00005 --epochs_num=20
--train_batch_size=120 --freeze_te 8"""
EVAL = "--eval_datasets_folder=D --eval_dataset_name=pitts30k --resume=SuperVLAD.pth --backbone=dino "


def test_defaults_are_the_recipe():
    recipe = parse(TrainOptions, TRAIN.split())
    flags = ["--crossimage_encoder", "--foundation_model_path=dinov2_vitb14_pretrain.pth"]
    assert parse(TrainOptions, ["--eval_datasets_folder=D", *flags]) == recipe
    assert (recipe.freeze_te, recipe.train_batch_size, recipe.images_per_place) == (8, 120, 4)
    assert (recipe.lr, recipe.lr_encoder, recipe.optim, recipe.encoder_training) == (5e-5, 1e-4, "adam", "released")
    assert (recipe.resize, recipe.train_resize, recipe.infer_batch_size) == ((322, 322), (224, 224), 16)
    assert (recipe.recall_values, recipe.val_positive_dist_threshold) == ((1, 5, 10, 20), 25)
    assert (recipe.randaugment_ops, recipe.place_order, recipe.antialias) == (3, "fixed", False)


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
    assert options.resume == Path("SuperVLAD.pth")
    assert tuple(options.model.values()) == model


def test_names_are_those_of_the_parts():
    assert {name: (of.patch_size, of.side, of.depth) for name, of in BACKBONES.items()} == parser.BACKBONES
    assert set(parser.TEST_METHODS) == set(TEST_METHODS)
    assert parser.DRAWN_CONTEXTS == DRAWN_CONTEXTS


def test_other_shapes_are_rounded_to_whole_patches(caplog):
    flags = ["--eval_datasets_folder=D", "--resume=x", "--resize", "480", "640"]
    assert parse(EvalOptions, flags).resize == (476, 644)
    assert "--resize 480 640 is rounded to whole patches, 476 644" in caplog.text


@pytest.mark.parametrize(
    ("backbone", "resize", "blocks"),
    [
        ("dino", (322, 322), 12),
        ("dino_giant_reg", (322, 322), 40),
        ("dinov3", (320, 320), 12),
        ("dinov3_large", (320, 320), 24),
    ],
)
def test_sizes_and_blocks_are_the_backbones_own(backbone, resize, blocks):
    """In what decides a training run, too, which is real numbers."""
    train = parse(TrainOptions, ["--eval_datasets_folder=D", f"--backbone={backbone}"])
    assert (train.resize, train.train_resize, train.backbone_blocks) == (resize, (224, 224), blocks)
    assert (train.decisive["--resize"], train.decisive["--backbone_blocks"]) == (resize, blocks)
    assert "backbone_blocks" not in train.model and train.given == ("eval_datasets_folder", "backbone")
    evaluation = parse(EvalOptions, ["--eval_datasets_folder=D", "--resume=x", f"--backbone={backbone}"])
    assert (evaluation.resize, evaluation.backbone_blocks) == (resize, blocks)


def test_blocks_that_are_kept_go_into_the_checkpoint():
    options = parse(TrainOptions, ["--eval_datasets_folder=D", "--backbone=dinov3", "--backbone_blocks=11"])
    assert options.model["backbone_blocks"] == options.decisive["--backbone_blocks"] == 11


def test_other_shapes_are_rounded_to_the_backbones_patches(caplog):
    flags = ["--eval_datasets_folder=D", "--backbone=dinov3", "--resize", "476", "644"]
    assert parse(TrainOptions, flags).resize == (480, 640)
    assert "--resize 476 644 is rounded to whole patches, 480 640" in caplog.text


def test_a_checkpoint_may_be_of_a_backbone_with_other_patches(tmp_path):
    """So that --resize can be judged only once it is read; not so where the backbone is known."""
    (tmp_path / "best.pth").touch()
    flags = ["--eval_datasets_folder=D", f"--resume={tmp_path}/best.pth"]
    assert parse(EvalOptions, [*flags, "--resize", "320", "320"]).resize == (320, 320)
    assert parse(EvalOptions, flags).resize is None
    for known in ("--backbone=dino", "--resume=SuperVLAD"):
        with pytest.raises(SystemExit):
            parse(EvalOptions, [*flags, known, "--resize", "320", "320"])


def test_a_training_that_leaves_the_backbone_as_it_is_is_told(caplog):
    flags = ["--eval_datasets_folder=D", "--backbone_blocks=8"]
    parse(TrainOptions, flags)
    assert "--freeze_te 8 freezes all 8 blocks, so the backbone is not trained" in caplog.text
    caplog.clear()
    parse(TrainOptions, [*flags, "--freeze_te=7"])
    assert not caplog.text


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("12", 12), ("none", None)])
def test_freeze_te(text, value):
    assert parse(TrainOptions, ["--eval_datasets_folder=D", "--freeze_te", text]).freeze_te == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--eval_datasets_folder is missing"),
        ("--eval_datasets_folder=D", "--resume is missing"),
        (
            "--eval_datasets_folder=D --resume=x --resize 320 320",
            "320 is not a multiple of the 14-pixel patch; use e.g. 322",
        ),
        (
            "--eval_datasets_folder=D --resume=x --backbone=dinov3_small --resize 322 322",
            "322 is not a multiple of the 16-pixel patch; use e.g. 320",
        ),
        (
            "--eval_datasets_folder=D --resume=x --backbone_blocks 13",
            "--backbone_blocks 13: --backbone=dino has 12 blocks; use 1 to 12",
        ),
        (
            "--eval_datasets_folder=D --resume=x --backbone=dinov3_large --backbone_blocks 0",
            "--backbone_blocks 0: --backbone=dinov3_large has 24 blocks",
        ),
        ("--eval_datasets_folder=D --resume=x --recall_values 0 5", "--recall_values 0"),
        ("--eval_datasets_folder=D --resume=x --infer_batch_size 0", "--infer_batch_size 0 is not above 0"),
        ("--eval_datasets_folder=D --resume=x --ghost_clusters -1", "--ghost_clusters"),
        ("--eval_datasets_folder=D --resume=x --seed -1", "--extraction_batch_size cannot be negative"),
        ("--resume=x --queries_folder=q", "--database_folder and --queries_folder go together"),
        ("--eval_datasets_folder=D --resume=x --pca_whiten", "--pca_whiten works only with --pca_dim"),
        ("--eval_datasets_folder=D --resume=x --pca_dim 8", "--pca_dim and --pca_dataset_folder go together"),
        ("--eval_datasets_folder=D --resume=x --eval_dataset_name a b --positives_file f", "apply to one dataset"),
        ("--eval_datasets_folder=D --resume=x --eval_dataset_name a a", "names a dataset twice"),
        (
            "--eval_datasets_folder=D --resume=x --positive_frames 1 --val_positive_dist_threshold 9",
            "each define what is correct",
        ),
        ("--eval_datasets_folder=D --resume=x --val_positive_dist_threshold 0", "--val_positive_dist_threshold 0.0"),
        ("--eval_datasets_folder=D --resume=x --context_seeds 0", "--context_seeds 0 is not above 0"),
        ("--eval_datasets_folder=D --resume=x --save_predictions -1", "--save_predictions -1 is negative"),
        (
            "--eval_datasets_folder=D --resume=x --test_method=maj_voting --majority_weight=nan",
            "--majority_weight nan is not a number",
        ),
        ("--eval_datasets_folder=D --resume=x --seed=4294967296", "--seed 4294967296 is larger than NumPy allows"),
        (
            "--eval_datasets_folder=D --resume=x --save_submission --skip_unreadable",
            "--skip_unreadable leaves some out",
        ),
        ("--eval_datasets_folder=D --resume=x --no_labels --positives_file f", "--no_labels and --positives_file each"),
        (
            "--eval_datasets_folder=D --resume=x --no_labels --positive_frames 1",
            "--no_labels and --positive_frames each",
        ),
        (
            "--eval_datasets_folder=D --resume=x --positives_file f --val_positive_dist_threshold 9",
            "--positives_file and --val_positive_dist_threshold each",
        ),
        ("--eval_datasets_folder=D --resume=x --encoder_context shuffled shuffled", "names a context twice"),
        (
            "--eval_datasets_folder=D --resume=x --no_labels --encoder_context shuffled independent",
            "no recalls to compare",
        ),
        (
            "--eval_datasets_folder=D --resume=x --majority_weight 0.1",
            "--majority_weight works only with --test_method maj_voting",
        ),
        (
            "--eval_datasets_folder=D --resume=x --context_seeds 3",
            "--context_seeds works only with --encoder_context shuffled",
        ),
        (
            "--eval_datasets_folder=D --resume=x --no_labels --encoder_context shuffled --context_seeds 3",
            "--context_seeds works only with labels",
        ),
        (
            "--eval_datasets_folder=D --resume=x --test_method maj_voting --recall_values 1 5 --save_predictions 9",
            "the largest of --recall_values (5); give no more",
        ),
        ("--eval_datasets_folder=D --resume=x --save_submission --index Flat", "leave out --index"),
        (
            "--eval_datasets_folder=D --resume=x --save_submission --test_method maj_voting --recall_values 5",
            "give --recall_values up to 20",
        ),
        (
            "--eval_datasets_folder=D --resume=x --eval_dataset_name /data/x",
            "'/data/x' is not the name of a folder below",
        ),
        (
            "--eval_datasets_folder=D --resume=x --eval_dataset_name a/../../x",
            "'a/../../x' is not the name of a folder",
        ),
        ("--eval_datasets_folder=D --resume=x --eval_dataset_name ./", "'./' is not the name of a folder"),
        ("--eval_datasets_folder=D --resume=x --eval_dataset_name toy_city toy_city/", "names a dataset twice"),
        ("--eval_datasets_folder=D --resume=x --eval_dataset_name a/b ./a//b", "names a dataset twice"),
        ("--eval_datasets_folder=D --resume=x --test_method ten_crops", "ten_crops"),
        ("--eval_datasets_folder=D --resume=x --backbone resnet", "resnet"),
        ("--eval_datasets_folder=D --resume=x --no_such_flag", "no_such_flag"),
    ],
)
def test_refusals(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(EvalOptions, flags.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        "--train_resize 224 225",
        "--train_resize 238 238 --backbone=dinov3",
        "--freeze_te 9 --backbone_blocks=8",
        "--freeze_te=-1",
        "--patience 0",
        "--images_per_place 1",
        "--cities Rome Rome",
        "--clip_grad_norm -1",
        "--lr 0",
        "--epochs_num -1",
        "--warmup_steps -1",
        "--weight_decay -0.1",
        "--weight_decay nan",
        "--lr_end_factor 1.5",
        "--lr_schedule step",
        "--eval_dataset_name /data/pitts30k",
        "--eval_dataset_name ../pitts30k",
    ],
)
def test_training_refusals(flags, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(TrainOptions, ["--eval_datasets_folder=D", *flags.split()])
    assert exit_.value.code == 2
    assert flags.split()[0].split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options_class", "flags", "message"),
    [
        (EvalOptions, "--resum=x", "unknown option --resum, did you mean --resume?"),
        (EvalOptions, "--infer-batch-size 3", "unknown option --infer-batch-size, did you mean --infer_batch_size?"),
        (EvalOptions, "-resume x", "unknown option -resume, did you mean --resume?"),
        (EvalOptions, "resume=x", "unknown option resume=x, did you mean --resume?"),
        (EvalOptions, "--seed=3 x", "unknown option x"),
        (EvalOptions, "--eval_dataset_name=a b", "only one value can follow =; write --eval_dataset_name a b"),
        (TrainOptions, "--train_dataset_folder=a b/c d", "one value can follow =; write --train_dataset_folder a b/c"),
        (TrainOptions, "--lr=1 --cities=Rome London --seed 3", "--cities=Rome London: only one value can follow ="),
        (EvalOptions, "--noantialias", "unknown option --noantialias, did you mean --no-antialias?"),
        (EvalOptions, "--train_batch_size 3", "unknown option --train_batch_size, it is an option of train.py"),
        (TrainOptions, "--save_predictions 3", "unknown option --save_predictions, it is an option of eval.py"),
        (TrainOptions, "--eval_dataset_folder D", "did you mean --eval_datasets_folder?"),
        (
            TrainOptions,
            "--zzz 1 --epoch_num 3",
            "unknown option --zzz; unknown option --epoch_num, did you mean --epochs",
        ),
    ],
)
def test_a_misspelt_option_names_its_neighbour(options_class, flags, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(options_class, flags.split())
    usage, error = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and message in error
    assert usage.startswith("usage: ") and "--help lists all options" in usage


def test_one_process_a_machine_speaks(capsys, caplog, monkeypatch):
    """Of those of torchrun; a rank that another launcher left in the environment silences nobody."""
    monkeypatch.setattr(parser.time, "sleep", lambda _: None)
    for launched, local, speaks in (("job", "0", True), ("job", "1", False), (None, "1", True)):
        monkeypatch.setenv("LOCAL_RANK", local)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        if launched:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", launched)
        for flags, status in (("--resum=x", 2), ("", 2), ("--help", 0), ("--version", 0)):
            with pytest.raises(SystemExit) as exit_:
                parse(EvalOptions, flags.split())
            assert exit_.value.code == status
            shown = capsys.readouterr()
            assert bool(shown.out + shown.err) == speaks, flags
        caplog.clear()
        parse(EvalOptions, "--eval_datasets_folder=D --resume=x --resize 480 640".split())
        assert ("is rounded to whole patches" in caplog.text) == speaks


def test_plain_folders_are_searched_photo_by_photo():
    plain, tree = (
        ["--resume=x", "--database_folder=a", "--queries_folder=b"],
        ["--resume=x", "--eval_datasets_folder=d"],
    )
    context = "--encoder_context=file_order"
    assert parse(EvalOptions, plain).encoder_context == ("independent",)
    assert parse(EvalOptions, [*plain, context]).encoder_context == ("file_order",)
    assert parse(EvalOptions, tree).encoder_context == ("file_order",)


def test_help_shows_every_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        parse(TrainOptions, ["--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and "(default: 322 322; DINOv3: 320 320)" in out and "(default: 5e-05)" in out


def test_names_of_datasets_are_paths_below_their_folder():
    names = ["nordland/", "./a//b/", "svox_night"]
    options = parse(EvalOptions, ["--eval_datasets_folder=D", "--resume=x", "--eval_dataset_name", *names])
    assert options.eval_dataset_name == ("nordland", "a/b", "svox_night")
    assert (
        parse(TrainOptions, ["--eval_datasets_folder=D", "--eval_dataset_name=nordland/"]).eval_dataset_name
        == "nordland"
    )


def test_options_without_a_part_are_told(caplog):
    given = ["--resume=x", "--eval_datasets_folder=D", "--infer_batch_size=8"]
    without = parse(EvalOptions, [*given, "--encoder_context", "shuffled", "independent"]).unused(encoder=False)
    assert [line.split()[0] for line in without] == ["--infer_batch_size", "--encoder_context"]
    alone = parse(EvalOptions, [*given, "--encoder_context", "independent"])
    assert [line.split()[0] for line in alone.unused(encoder=True)] == ["--infer_batch_size"]
    plain = parse(EvalOptions, [*given[:2], "--database_folder=a", "--queries_folder=b"])
    assert [line.split()[0] for line in plain.unused(encoder=True)] == ["--eval_datasets_folder"]
    assert parse(EvalOptions, given).unused(encoder=True) == parse(EvalOptions, given[:2]).unused(encoder=False) == []
    parse(TrainOptions, ["--eval_datasets_folder=D", "--resume=r.pth", "--foundation_model_path=f"])
    assert "--foundation_model_path has no effect" in caplog.text
    parse(TrainOptions, ["--eval_datasets_folder=D", "--lr_encoder=1e-3", "--encoder_training=every_step"])
    assert "--lr_encoder has no effect" in caplog.text and "--encoder_training has no effect" in caplog.text
    parse(TrainOptions, ["--eval_datasets_folder=D", "--lr_end_factor=0.2"])
    assert "--lr_end_factor has no effect with --lr_schedule halving" in caplog.text


def test_the_home_folder_behind_an_equals_sign(monkeypatch):
    """Which a shell does not replace."""
    monkeypatch.setenv("HOME", "/home/me")
    options = parse(EvalOptions, ["--eval_datasets_folder=~/data", "--resume=~/a.pth", "--save_dir=~/out"])
    assert (options.eval_datasets_folder, options.resume) == (Path("/home/me/data"), Path("/home/me/a.pth"))
    assert options.save_dir == Path("/home/me/out")
    assert parse(TrainOptions, ["--eval_datasets_folder=D", "--resume=~/a.pth"]).resume == "/home/me/a.pth"
    folders = parse(
        TrainOptions, ["--eval_datasets_folder=D", "--train_dataset_folder", "~/a", "b"]
    ).train_dataset_folder
    assert folders == (Path("/home/me/a"), Path("b"))
    nobody = parse(EvalOptions, ["--eval_datasets_folder=~nobody-here/data", "--resume=~nobody-here/a.pth"])
    assert str(nobody.eval_datasets_folder) == "~nobody-here/data", "as a shell leaves it"


def test_where_files_lie_does_not_decide_a_run():
    given = ["--eval_datasets_folder=D", "--train_dataset_folder", "a", "b"]
    assert "--train_dataset_folder" not in parse(TrainOptions, given).decisive
    assert parse(TrainOptions, given[:1]).decisive["--train_dataset_folder"] is None, "as ever"


def test_a_python_without_pytorch_is_told_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("parser.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        parse(EvalOptions, ["--eval_datasets_folder=d", "--resume=r"])
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and "has no PyTorch; run `make .venv/ready` once, then `source .venv/bin/" in message


def test_help_says_what_a_checkpoint_decides(capsys):
    for options, count in ((EvalOptions, len(OF_A_CHECKPOINT)), (TrainOptions, 0)):
        with pytest.raises(SystemExit):
            parse(options, ["--help"])
        assert " ".join(capsys.readouterr().out.split()).count("(default: the checkpoint's, else ") == count


def test_help_has_each_option_once_in_a_group(capsys):
    grouped = [name for names in GROUPS.values() for name in names.split()]
    assert len(grouped) == len({*grouped})
    for options in (EvalOptions, TrainOptions):
        names = [entry.name for entry in fields(options) if entry.metadata]
        assert {*names} <= {*grouped}
        with pytest.raises(SystemExit):
            parse(options, ["--help"])
        shown = re.findall(r"^  --(?:no-)?(\w+)", capsys.readouterr().out, re.MULTILINE)
        assert sorted(shown) == sorted([*names, "version"])
        assert [name for name in shown if name in grouped] == [name for name in grouped if name in names]
    assert {*grouped} <= {entry.name for options in (EvalOptions, TrainOptions) for entry in fields(options)}
