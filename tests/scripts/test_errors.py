"""Bad input gives one clear message, exit status 2 and no traceback."""

import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from helpers import SMALL, only_run, refusal

import train as train_script
from model import build_model

SMALL = [*SMALL, "--eval_dataset_name=toy_city"]


@pytest.fixture
def fails(city, tmp_path, capsys):
    """Runs train.py, unless flags say otherwise on the small city, and returns what it says when it refuses."""
    given = [*SMALL, f"--save_dir={tmp_path}/run", "--train_resize", "56", "56", f"--eval_datasets_folder={city}"]
    return lambda *flags: refusal(capsys, lambda: train_script.main([*given, *map(str, flags)]))


@pytest.fixture
def evaluation_fails(evaluated, capsys):
    """Runs eval.py with weights."""
    return lambda *flags, **data: refusal(capsys, lambda: evaluated(*flags, **data))


@pytest.fixture
def copied_city(city, tmp_path):
    shutil.copytree(city, tmp_path / "data")
    return tmp_path / "data"


def test_missing_folder(fails, evaluation_fails, city):
    message = evaluation_fails(data="/nowhere")
    assert "no folder /nowhere/toy_city/images/test/database: / has no folder nowhere, only " in message
    assert f"give {city}/gsv_cities with --train_dataset_folder" in fails(f"--train_dataset_folder={city}")


def test_names_without_utm(evaluation_fails, copied_city):
    """Where a side has no position at all, counting where they are known counts nothing."""
    queries = sorted((copied_city / "toy_city/images/test/queries").iterdir())
    total = len(queries) + len(list((copied_city / "toy_city/images/test/database").iterdir()))
    shutil.copy(queries[0], queries[0].with_name("me.jpg"))
    message = evaluation_fails(data=copied_city)
    assert f"1 of {total + 1} file names have no UTM coordinates" in message and "me.jpg; name photos @" in message
    queries[0].with_name("me.jpg").unlink()
    for n, path in enumerate(queries):
        path.rename(path.with_name(f"{n:04d}.jpg"))
    message = evaluation_fails(data=copied_city)
    assert f"{len(queries)} of {total} file names have no UTM coordinates, e.g. " in message and "0000.jpg" in message
    assert "--positives_file" in message and "--no_labels" in message and "--labels_where_known" not in message


def test_checkpoint_of_other_options(evaluation_fails):
    message = evaluation_fails("--supervlad_clusters=1")
    assert "has 5 clusters" in message and "use --supervlad_clusters=4" in message
    assert "use --backbone=dino_tiny" in evaluation_fails("--backbone=dino_small")


@pytest.mark.parametrize("flags", ["--resize 57 57", "--backbone_blocks 13", "--train_resize 56 57", "--freeze_te 13"])
def test_what_the_backbone_cannot_do(fails, flags):
    message = fails(*flags.split())
    assert message.startswith(flags) and "; use " in message


def test_files_that_are_no_checkpoints(evaluation_fails, tmp_path):
    (tmp_path / "note.pth").write_text("Just a note")
    assert "note.pth is damaged or not a" in evaluation_fails(f"--resume={tmp_path}/note.pth")
    torch.save(build_model(backbone="dino_tiny").backbone.state_dict(), tmp_path / "dinov2.pth")
    assert "--foundation_model_path" in evaluation_fails(f"--resume={tmp_path}/dinov2.pth")


def test_unreadable_training_image(fails, copied_city):
    for path in (copied_city / "gsv_cities/Images/London").iterdir():
        path.write_bytes(b"")
    flags = ["--epochs_num=1", "--train_batch_size=8"]
    for workers in (0, 2):
        message = fails(f"--eval_datasets_folder={copied_city}", *flags, f"--num_workers={workers}")
        assert "cannot read the image" in message and "London_" in message
        assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_loss_that_is_not_finite(fails):
    flags = ["--epochs_num=3", "--train_batch_size=8", "--freeze_te=none", "--lr=1e30"]
    for workers in (0, 2):
        message = fails(*flags, f"--num_workers={workers}")
        assert "the loss became nan" in message and not multiprocessing.active_children()


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_in_which_nothing_can_be_found(fails, copied_city, tmp_path, split):
    for path in (copied_city / f"toy_city/images/{split}/queries").iterdir():
        path.rename(path.with_name(path.name.replace("@5", "@8", 1)))  # 300 km to the east
    message = fails(f"--eval_datasets_folder={copied_city}")
    assert f"toy_city {split}" in message and "25 m" in message and "--val_positive_dist_threshold" in message
    assert not (tmp_path / "run").exists()


def test_nothing_to_tell_a_place_from(fails, copied_city):
    message = fails("--train_batch_size=1")
    assert "--train_batch_size 1 is too small" in message and "use 2" in message
    table = copied_city / "gsv_cities/Dataframes/London.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(line for line in lines if line.split(",")[0] in ("place_id", lines[1].split(",")[0])))
    message = fails(f"--eval_datasets_folder={copied_city}", "--cities", "London")
    assert "1 places (5 images, London)" in message and "add cities" in message


@pytest.mark.parametrize("flags", [["--resume=auto"], []])
def test_a_run_that_another_process_has(fails, city, tmp_path, flags):
    training = [f"--eval_datasets_folder={city}", "--train_resize", "56", "56", "--epochs_num=0"]
    train_script.main([*SMALL, f"--save_dir={tmp_path}/run", *training])
    folder = only_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.glob("[!.]*")}
    flags = flags or [f"--resume={folder}/last_model.pth"]
    held = folder if "auto" not in flags[0] else tmp_path / "run"
    code = "from pathlib import Path; from utils.system.lock import FolderLock; "
    code += f"l = FolderLock(Path({str(held)!r}), ''); print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, cwd=Path(train_script.__file__).parent
    )
    other.stdout.readline()
    try:
        message = fails(*training, *flags)
    finally:
        other.communicate(b"\n")
    assert f"{held} is in use by process {other.pid} on " in message and "name another --save_dir" in message
    assert {path: path.read_bytes() for path in folder.glob("[!.]*")} == before
    train_script.main([*SMALL, f"--save_dir={tmp_path}/run", *training, *flags])
