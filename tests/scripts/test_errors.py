"""Bad input gives one clear message, exit status 2 and no traceback."""

import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch

import eval as eval_script
import train as train_script
from model import build_model
from utils.system import reading

SMALL = "--eval_dataset_name=toy_city --backbone=dino_tiny --device cpu --num_workers 0 --resize 56 56".split()


@pytest.fixture
def fails(tmp_path, capsys):
    """Runs a script and returns what it says when it refuses."""

    def run(script, *flags):
        with pytest.raises(SystemExit) as exit_:
            script.main([*SMALL, f"--save_dir={tmp_path}/run", *map(str, flags)])
        assert exit_.value.code == 2
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        (message,) = [line for line in shown.splitlines() if "ERROR" in line or "error:" in line]
        return message

    return run


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(build_model(backbone="dino_tiny").state_dict(), tmp_path / "model.pth")
    return f"--resume={tmp_path}/model.pth"


@pytest.fixture
def copied_city(city, tmp_path):
    shutil.copytree(city, tmp_path / "data")
    return tmp_path / "data"


def test_missing_folder(fails, checkpoint, city):
    message = fails(eval_script, "--eval_datasets_folder=/nowhere", checkpoint)
    assert "no folder /nowhere/toy_city/images/test/database: / has no nowhere, only " in message
    message = fails(train_script, f"--eval_datasets_folder={city}", "--train_dataset_folder=/nowhere")
    assert "no GSV-Cities in /nowhere: / has no nowhere, only " in message


def test_empty_split(fails, checkpoint, copied_city):
    for path in (copied_city / "toy_city/images/test/queries").iterdir():
        path.unlink()
    assert "no image" in fails(eval_script, f"--eval_datasets_folder={copied_city}", checkpoint)


def test_name_without_utm(fails, checkpoint, copied_city):
    shutil.copy(
        next((copied_city / "toy_city/images/test/queries").iterdir()),
        copied_city / "toy_city/images/test/queries/me.jpg",
    )
    message = fails(eval_script, f"--eval_datasets_folder={copied_city}", checkpoint)
    assert "file names have no UTM coordinates" in message and "me.jpg; name photos @<UTM east>" in message


def test_no_name_of_a_side_with_utm(fails, checkpoint, copied_city):
    """Where a side has no position at all, counting where they are known counts nothing."""
    queries = list((copied_city / "toy_city/images/test/queries").iterdir())
    total = len(queries) + len(list((copied_city / "toy_city/images/test/database").iterdir()))
    for n, path in enumerate(queries):
        path.rename(path.with_name(f"{n:04d}.jpg"))
    message = fails(eval_script, f"--eval_datasets_folder={copied_city}", checkpoint)
    assert f"{len(queries)} of {total} file names have no UTM coordinates, e.g. " in message
    assert "0000.jpg; name photos @<UTM east>@<UTM north>@...@.jpg, or " in message
    assert "--positives_file" in message and "--no_labels" in message and "--labels_where_known" not in message


def test_checkpoint_of_other_options(fails, checkpoint, city):
    message = fails(eval_script, f"--eval_datasets_folder={city}", checkpoint, "--supervlad_clusters=1")
    assert "has 5 clusters" in message and "use --supervlad_clusters=4" in message
    message = fails(eval_script, f"--eval_datasets_folder={city}", checkpoint, "--backbone=dino_small")
    assert "use --backbone=dino_tiny" in message


def test_a_file_that_is_no_checkpoint(fails, city, tmp_path):
    (tmp_path / "note.pth").write_text("Just a note")
    message = fails(eval_script, f"--eval_datasets_folder={city}", f"--resume={tmp_path}/note.pth")
    assert "note.pth is damaged or not a PyTorch weight file" in message


def test_a_backbone_file_where_a_checkpoint_is_expected(fails, city, tmp_path):
    torch.save(build_model(backbone="dino_tiny").backbone.state_dict(), tmp_path / "dinov2.pth")
    message = fails(eval_script, f"--eval_datasets_folder={city}", f"--resume={tmp_path}/dinov2.pth")
    assert "the official files go to train.py's --foundation_model_path" in message


def test_resize_off_the_patch_grid(fails, checkpoint, city):
    message = fails(eval_script, f"--eval_datasets_folder={city}", checkpoint, "--resize", "320", "320")
    assert "320 is not a multiple of the 14-pixel patch; use e.g. 322" in message


def test_freezing_above_the_depth(fails, city):
    message = fails(train_script, f"--eval_datasets_folder={city}", "--freeze_te=13")
    assert "--freeze_te 13 freezes more than the 12 blocks of this backbone; use 0 to 12, or none" in message


def test_evaluation_without_a_checkpoint(fails, city):
    assert "--resume is missing" in fails(eval_script, f"--eval_datasets_folder={city}")


def test_no_foundation_weights_and_no_network(fails, city, tmp_path, monkeypatch):
    def download(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    message = fails(train_script, f"--eval_datasets_folder={city}", "--backbone=dino")
    assert "could not be downloaded (<urlopen error no network>); get https://" in message
    assert "--foundation_model_path=dinov2_vitb14_pretrain.pth, or put it at" in message


def test_unreadable_training_image(fails, copied_city):
    for path in (copied_city / "gsv_cities/Images/London").iterdir():
        path.write_bytes(b"")
    flags = ["--train_resize", "56", "56", "--epochs_num=1", "--train_batch_size=8"]
    for workers in (0, 2):
        message = fails(train_script, f"--eval_datasets_folder={copied_city}", *flags, f"--num_workers={workers}")
        assert "cannot read the image" in message and "London_" in message
        assert not multiprocessing.active_children()


def test_a_loss_that_is_not_finite(fails, city):
    flags = ["--train_resize", "56", "56", "--epochs_num=3", "--train_batch_size=8", "--freeze_te=none", "--lr=1e30"]
    for workers in (0, 2):
        message = fails(train_script, f"--eval_datasets_folder={city}", *flags, f"--num_workers={workers}")
        assert "the loss became nan" in message and not multiprocessing.active_children()


def test_released_encoder_training_without_adam(fails, city):
    message = fails(train_script, f"--eval_datasets_folder={city}", "--optim=sgd", "--crossimage_encoder")
    assert "use --encoder_training every_step" in message


def test_nothing_to_tell_a_place_from(fails, city, copied_city):
    message = fails(train_script, f"--eval_datasets_folder={city}", "--train_batch_size=1")
    assert "--train_batch_size 1 leaves the loss no negatives (the other places of a batch); use 2" in message
    table = copied_city / "gsv_cities/Dataframes/London.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(line for line in lines if line.split(",")[0] in ("place_id", lines[1].split(",")[0])))
    message = fails(train_script, f"--eval_datasets_folder={copied_city}", "--cities", "London")
    assert "1 places (5 images, London): training needs at least two places; add cities" in message


@pytest.mark.parametrize("flags", [["--resume=auto"], []])
def test_a_run_that_another_process_has(fails, city, tmp_path, flags):
    training = [f"--eval_datasets_folder={city}", "--train_resize", "56", "56", "--epochs_num=0"]
    train_script.main([*SMALL, f"--save_dir={tmp_path}/run", *training])
    (folder,) = (tmp_path / "run").iterdir()
    before = {path: path.read_bytes() for path in folder.glob("[!.]*")}
    flags = flags or [f"--resume={folder}/last_model.pth"]
    held = folder if "auto" not in flags[0] else tmp_path / "run"
    code = "from pathlib import Path; from utils.system.lock import FolderLock; "
    code += f"l = FolderLock(Path({str(held)!r}), ''); "
    code += "print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, cwd=Path(train_script.__file__).parent
    )
    other.stdout.readline()
    try:
        message = fails(train_script, *training, *flags)
    finally:
        other.communicate(b"\n")
    assert f"{held} is in use by process {other.pid} on " in message and "name another --save_dir" in message
    assert {path: path.read_bytes() for path in folder.glob("[!.]*")} == before
    train_script.main([*SMALL, f"--save_dir={tmp_path}/run", *training, *flags])


def test_shared_memory_too_small(fails, city, monkeypatch):
    flags = [f"--eval_datasets_folder={city}", "--train_resize", "56", "56", "--num_workers=2"]
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    message = fails(train_script, *flags)
    assert message.endswith(
        "/dev/shm has 0.1 MB free, but 2 processes that read images need 0.19 MB; give a container more with docker "
        "run --shm-size=8g or --ipc=host, or read with fewer processes or none (--num_workers=0)"
    )
