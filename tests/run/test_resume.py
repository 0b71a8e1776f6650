"""A run that was stopped, however roughly, ends as if it had not been."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm

import train as train_script
from datasets.training import similar_places
from model import loss
from utils.run.optimization import Optimization
from utils.run.progress import Progress
from utils.system import reading
from utils.system.seed import generator_states

# 16 places make 4 steps an epoch, with a checkpoint after every second.
FLAGS = (
    "--eval_dataset_name=toy_city --backbone=dino_tiny --crossimage_encoder --device=cpu --num_workers=0 "
    "--resize 56 56 --train_resize 56 56 --train_batch_size=4 --epochs_num=3 --checkpoint_every=2 --lr=0.001 "
    "--encoder_training=every_step"
).split()


def outcome(save_dir):
    """What a finished run has come to: weights, best score, table."""
    (folder,) = [path.parent for path in save_dir.glob("*/results.json")]
    last, best = (torch.load(folder / f"{name}_model.pth", weights_only=True) for name in ("last", "best"))
    return (
        last["model_state_dict"],
        best["model_state_dict"],
        (last["best_score"], best["epoch_num"], last["optimization"]["scheduler"]),
        (folder / "metrics.csv").read_text(),
    )


def assert_same(a, b):
    for one, other in zip(a[:2], b[:2], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert a[2:] == b[2:]


@pytest.fixture(scope="module")
def flags(city):
    return [*FLAGS, f"--eval_datasets_folder={city}"]


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("uninterrupted")
    train_script.main([*flags, f"--save_dir={save_dir}"])
    return outcome(save_dir)


def test_killed_at_ten_points(flags, uninterrupted, tmp_path):
    """Each process goes on from what the one before it left, and is killed in turn; the first starts from cold."""
    points = [
        ("write", 2),  # the first last_model.pth: nothing to go on from
        ("step", 1),  # before any checkpoint of a step
        ("step", 3),  # between two checkpoints
        ("move", 1),  # last_model.pth is to become previous_model.pth
        ("move", 2),  # it has, and the new one has not taken its place
        ("validation", 1),
        ("validation", 2),
        ("write", 2),  # best_model.pth or last_model.pth, after validation
        ("step", 3),
        ("write", 1),
    ]
    command = [sys.executable, str(Path(__file__).parents[1].joinpath("killed.py"))]
    flags = [*flags, f"--save_dir={tmp_path}", "--resume=auto"]
    for number, (point, count) in enumerate(points):
        if number:
            run = warm.run("killed.py", point, count, *flags)
        else:
            run = subprocess.run([*command, point, str(count), *flags], capture_output=True, text=True)
        assert run.returncode == -signal.SIGKILL, run.stderr
    train_script.main(flags)
    assert_same(outcome(tmp_path), uninterrupted)


def test_killed_while_similar_places_share_batches(flags, tmp_path, monkeypatch):
    """The second epoch's order is of the weights that it began with, which a checkpoint within it no longer has."""
    flags = [*flags, "--place_order=similar"]
    real, kept, orders = similar_places.order_by_similarity, [], []

    def watched(*args, **kwargs):
        before = generator_states()
        orders.append(real(*args, **kwargs))
        assert all(map(torch.equal, [before["torch"]], [generator_states()["torch"]]))
        assert {**before, "torch": 0} == {**generator_states(), "torch": 0}
        return orders[-1]

    monkeypatch.setattr(similar_places, "order_by_similarity", watched)
    train_script.main([*flags, f"--save_dir={tmp_path}/whole"])
    assert [sorted(order) for order in orders] == [list(range(16))] * 2 and orders[0].tolist() != orders[1].tolist()

    save = Progress.save_last
    monkeypatch.setattr(Progress, "save_last", lambda self: kept.append(self.order) or save(self))
    flags = [*flags, f"--save_dir={tmp_path}/killed", "--resume=auto"]
    for count in (7, 5):  # in the third step of the second epoch, and of the third
        run = warm.run("killed.py", "step", count, *flags)
        assert run.returncode == -signal.SIGKILL, run.stderr
    (last,) = (tmp_path / "killed").glob("*/last_model.pth")
    content = torch.load(last, weights_only=True)
    assert (content["epoch_num"], len(content["losses"])) == (2, 2), "within the third epoch"
    train_script.main(flags)
    assert kept[0].tolist() == orders[1].tolist() and kept[-1] is None
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 8])
def test_a_preempted_run_finishes_its_step_and_says_so(flags, uninterrupted, tmp_path, monkeypatch, signum, step):
    real, taken, handler = Optimization.step, [], signal.getsignal(signum)

    def preempted(self):
        taken.append(1)
        if len(taken) == step:
            os.kill(os.getpid(), signum)
        real(self)

    monkeypatch.setattr(Optimization, "step", preempted)
    flags = [*flags, f"--save_dir={tmp_path}", "--resume=auto"]
    with pytest.raises(SystemExit) as exit_:
        train_script.main(flags)
    assert exit_.value.code == 128 + signum and len(taken) == step
    assert signal.getsignal(signum) == handler
    train_script.main(flags)
    assert len(taken) == 12, "no step is taken twice"
    assert_same(outcome(tmp_path), uninterrupted)


def test_a_named_checkpoint_goes_on_in_its_folder(flags, uninterrupted, tmp_path):
    train_script.main([*flags, f"--save_dir={tmp_path}", "--epochs_num=1"])
    (folder,) = tmp_path.iterdir()
    train_script.main([*flags, f"--save_dir={tmp_path}/unused", f"--resume={folder}/last_model.pth"])
    assert_same(outcome(tmp_path), uninterrupted)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_checkpoint_is_passed_over(flags, uninterrupted, tmp_path, caplog, damage):
    train_script.main([*flags, f"--save_dir={tmp_path}", "--epochs_num=2"])
    (folder,) = tmp_path.iterdir()
    data = bytearray((folder / "last_model.pth").read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    (folder / "last_model.pth").write_bytes(bytes(data))
    train_script.main([*flags, f"--save_dir={tmp_path}", "--resume=auto"])
    assert "last_model.pth is damaged" in caplog.text and "trying the one before" in caplog.text
    assert_same(outcome(tmp_path), uninterrupted)


def test_contradicting_options_are_named(flags, tmp_path, capsys):
    train_script.main([*flags, f"--save_dir={tmp_path}", "--epochs_num=1"])
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.pth")}
    other = ["--lr=0.002", "--seed=5", "--epochs_num=9", "--patience=7", "--num_workers=1"]
    with pytest.raises(SystemExit) as exit_:
        train_script.main([*flags, f"--save_dir={tmp_path}", "--resume=auto", *other])
    message = next(line for line in capsys.readouterr().err.splitlines() if "ERROR" in line)
    assert exit_.value.code == 2
    assert "--seed was 0 and is now 5; --lr was 0.001 and is now 0.002;" in message
    assert "epochs_num" not in message and "patience" not in message and "num_workers" not in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pth")} == kept


def test_a_schedule_with_an_end_fixes_it(flags, tmp_path, capsys):
    """--epochs_num may change where nothing depends on it: not the end of a linear schedule."""
    flags = [*flags, "--lr_schedule=linear", "--warmup_steps=2"]
    train_script.main([*flags, f"--save_dir={tmp_path}/whole"])
    with pytest.raises(SystemExit):
        train_script.main([*flags, f"--save_dir={tmp_path}/whole", "--epochs_num=4", "--resume=auto"])
    assert "--epochs_num was 3 and is now 4; give the same ones" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(train_script, "evaluate", lambda *_, **__: sys.exit(3))
        with pytest.raises(SystemExit):
            train_script.main([*flags, f"--save_dir={tmp_path}/cut"])
    train_script.main([*flags, f"--save_dir={tmp_path}/cut", "--resume=auto"])
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
    (table,) = (tmp_path / "whole").glob("*/metrics.csv")
    rates = [float(line.split(",")[3]) for line in table.read_text().splitlines()[1:]]
    assert rates == pytest.approx([0.001 * share for share in (0.9, 0.5, 0.1)]), "of steps 4, 8 and 12"


def test_a_checkpoint_from_before_there_were_schedules_is_of_the_released_one(flags, tmp_path, capsys):
    train_script.main([*flags, f"--save_dir={tmp_path}", "--epochs_num=1"])
    (last,) = tmp_path.glob("*/last_model.pth")
    content = torch.load(last, weights_only=True)
    for name in ("lr_schedule", "warmup_steps", "lr_end_factor", "weight_decay"):
        del content["decisive"][f"--{name}"]
    torch.save(content, last)
    with pytest.raises(SystemExit):
        train_script.main([*flags, f"--save_dir={tmp_path}", "--resume=auto", "--lr_schedule=cosine"])
    assert "--lr_schedule was halving and is now cosine" in capsys.readouterr().err
    train_script.main([*flags, f"--save_dir={tmp_path}", "--epochs_num=2", "--resume=auto"])


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        train_script.main([*flags, f"--save_dir={tmp_path}", "--lr=1e30", "--checkpoint_every=1"])
    message = next(line for line in capsys.readouterr().err.splitlines() if "ERROR" in line)
    assert exit_.value.code == 2 and "epoch 1 at a learning rate of 1e+30; lower --lr" in message
    (folder,) = tmp_path.iterdir()
    assert f"the newest good checkpoint is {folder}/last_model.pth" in message
    state = torch.load(folder / "last_model.pth", weights_only=True)["model_state_dict"]
    assert all(value.isfinite().all() for value in state.values())


@pytest.fixture
def read_late(monkeypatch):
    """As on a GPU: losses are read every third step, and before anything is written."""
    monkeypatch.setattr(
        train_script, "Progress", lambda *args, **kwargs: Progress(*args, **{**kwargs, "read_every": 3})
    )


def test_deterministic_kernels_are_asked_for(flags, uninterrupted, tmp_path):
    """On a CPU they are the same, with the position embedding frozen."""
    try:
        train_script.main([*flags, f"--save_dir={tmp_path}", "--deterministic"])
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(outcome(tmp_path), uninterrupted)


def test_reading_losses_late_changes_nothing(flags, uninterrupted, read_late, tmp_path):
    train_script.main([*flags, f"--save_dir={tmp_path}"])
    assert_same(outcome(tmp_path), uninterrupted)


def test_a_loss_read_late_reaches_no_checkpoint(flags, read_late, tmp_path, monkeypatch, capsys):
    real, steps = Progress.record_step, []

    def poisoned(self, loss):
        steps.append(loss)
        real(self, loss * float("nan") if len(steps) == 7 else loss)  # the third of the second epoch

    monkeypatch.setattr(Progress, "record_step", poisoned)
    with pytest.raises(SystemExit) as exit_:
        train_script.main([*flags, f"--save_dir={tmp_path}", "--checkpoint_every=4"])
    message = next(line for line in capsys.readouterr().err.splitlines() if "ERROR" in line)
    assert exit_.value.code == 2 and "the loss became nan in step 3 of epoch 2 at a learning rate of 0.001" in message
    (folder,) = tmp_path.iterdir()
    last = torch.load(folder / "last_model.pth", weights_only=True)
    assert (last["epoch_num"], last["losses"]) == (1, []) and len(steps) == 7


def test_a_finished_run_is_only_evaluated_again(flags, tmp_path, caplog):
    caplog.set_level("INFO")
    train_script.main([*flags, f"--save_dir={tmp_path}", "--epochs_num=1"])
    before = outcome(tmp_path)
    train_script.main([*flags, f"--save_dir={tmp_path}", "--epochs_num=1", "--resume=auto"])
    assert_same(outcome(tmp_path), before)
    assert "last_model.pth is finished: only the test split is evaluated again" in caplog.text


def test_small_shared_memory_changes_nothing_but_the_time(flags, uninterrupted, tmp_path, monkeypatch, caplog):
    """Batches of 150 kB from places of 38 kB, through 400 kB: places come singly, and last batches are short too."""
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda _: SimpleNamespace(free=400_000))
    train_script.main([*flags, f"--save_dir={tmp_path}", "--num_workers=2"])
    assert "/dev/shm is too small for 2 processes that read batches of 0.2 MB: they pass single" in caplog.text
    assert "--shm-size=8g or --ipc=host" in caplog.text
    assert_same(outcome(tmp_path), uninterrupted)


@pytest.mark.parametrize("damage", ["gone", "flipped", "another"])
def test_a_best_model_that_is_gone_is_noticed_at_once(flags, tmp_path, capsys, damage, monkeypatch):
    one_epoch = [*flags, f"--save_dir={tmp_path}", "--epochs_num=1"]
    train_script.main(one_epoch)
    (best,) = tmp_path.glob("*/best_model.pth")
    content = best.read_bytes()

    def lose():
        if damage == "gone":
            best.unlink()
        elif damage == "another":
            torch.save({"model_state_dict": {"backbone.cls_token": torch.zeros(1, 1, 96)}}, best)
        else:
            best.write_bytes(content[:50_000] + bytes([content[50_000] ^ 1]) + content[50_001:])

    lose()
    train_script.main([*one_epoch, "--resume=auto"])
    assert "best_model.pth was missing or damaged: rewritten from the checkpoint" in capsys.readouterr().err
    written = torch.load(best, weights_only=True)["model_state_dict"]
    last = torch.load(best.with_name("last_model.pth"), weights_only=True)
    assert all(torch.equal(written[name], value) for name, value in last["model_state_dict"].items())

    last["not_improved_num"] = 1  # as if the best model were an older one
    torch.save(last, best.with_name("last_model.pth"))
    lose()
    monkeypatch.setattr(train_script, "train_one_epoch", None)
    with pytest.raises(SystemExit) as exit_:
        train_script.main([*flags, f"--save_dir={tmp_path}", "--resume=auto"])
    assert exit_.value.code == 2
    assert (
        f"ERROR: {best} is missing or damaged, and {best.with_name('last_model.pth')} is from"
        in capsys.readouterr().err
    )


def test_a_best_model_that_goes_while_the_run_lives_is_noticed_after_the_epoch(flags, tmp_path, capsys, monkeypatch):
    real = Progress.record_epoch

    def gone(self, recalls, score):
        for path in tmp_path.glob("*/best_model.pth") if self.epoch == 1 else ():
            path.unlink()
        return real(self, recalls, score=0.0)

    monkeypatch.setattr(Progress, "record_epoch", gone)
    with pytest.raises(SystemExit) as exit_:
        train_script.main([*flags, f"--save_dir={tmp_path}"])
    assert exit_.value.code == 2 and "best_model.pth is missing or damaged, and" in capsys.readouterr().err
    (last,) = tmp_path.glob("*/last_model.pth")
    assert torch.load(last, weights_only=True)["epoch_num"] == 2


def test_other_rows_of_the_same_number_of_places(flags, city, tmp_path, capsys):
    shutil.copytree(city / "gsv_cities", tmp_path / "gsv_cities")
    flags = [*flags, f"--train_dataset_folder={tmp_path}/gsv_cities", f"--save_dir={tmp_path}/run", "--epochs_num=1"]
    train_script.main(flags)
    table = tmp_path / "gsv_cities/Dataframes/London.csv"
    lines = table.read_text().splitlines()
    (tmp_path / "copy.csv").write_text("\n".join([*lines, lines[-1]]))  # one more row, of the same place
    (tmp_path / "copy.csv").replace(table)
    with pytest.raises(SystemExit) as exit_:
        train_script.main([*flags, "--resume=auto"])
    assert exit_.value.code == 2 and "the digest of GSV-Cities' tables was" in capsys.readouterr().err


def test_an_epoch_in_which_nothing_is_mined_says_so(flags, tmp_path, monkeypatch, caplog):
    real = loss.MultiSimilarityMiner
    train_script.main([*flags, f"--save_dir={tmp_path}/mined", "--epochs_num=1"])
    assert "was mined" not in caplog.text
    monkeypatch.setattr(loss, "MultiSimilarityMiner", lambda epsilon, distance: real(-9, distance=distance))
    train_script.main([*flags, f"--save_dir={tmp_path}/not", "--epochs_num=1"])
    assert "no pair of images was mined in epoch 1, so nothing was learnt" in caplog.text


def test_fp16_takes_every_step(flags, tmp_path, caplog, recwarn):
    with caplog.at_level("INFO"):
        train_script.main([*flags, f"--save_dir={tmp_path}", "--epochs_num=1", "--precision=fp16"])
    (last,) = tmp_path.glob("*/last_model.pth")
    state = torch.load(last, weights_only=True)["optimization"]
    assert state["skipped"] == 0 and state["scaler"]["scale"] == 65536 and state["scheduler"]["last_epoch"] == 4
    assert "skipped" not in caplog.text and not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_a_picture_that_cannot_be_drawn_ends_nothing(flags, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_script.report, "draw_training", full)
    train_script.main([*flags, f"--save_dir={tmp_path}", "--epochs_num=1"])
    assert "training.png ([Errno 28] No space left on device)" in caplog.text
    assert list(tmp_path.glob("*/results.json"))


def test_what_a_killed_process_left_half_written_is_removed(flags, tmp_path):
    train_script.main([*flags, f"--save_dir={tmp_path}", "--epochs_num=0"])
    (folder,) = tmp_path.iterdir()
    (folder / "last_model.pth.12345.tmp").write_bytes(b"half")
    train_script.main([*flags, f"--save_dir={tmp_path}", "--epochs_num=0", "--resume=auto"])
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("encoder", [True, False])
def test_other_processes_concern_the_encoder_where_there_is_one(flags, tmp_path, caplog, encoder):
    flags = [flag for flag in flags if encoder or flag not in ("--crossimage_encoder", "--encoder_training=every_step")]
    train_script.main([*flags, f"--save_dir={tmp_path}", "--epochs_num=0"])
    (last,) = tmp_path.glob("*/last_model.pth")
    content = torch.load(last, weights_only=True)
    torch.save({**content, "generators": content["generators"] * 3}, last)
    train_script.main([*flags, f"--save_dir={tmp_path}", "--epochs_num=0", "--resume=auto"])
    (message,) = [
        message for message in caplog.messages if "was written by 3 processes, but there are now 1" in message
    ]
    assert ("encoder" in message) == ("dropout" in message) == encoder


def test_an_epoch_without_a_step_left_shows_no_bar(flags, uninterrupted, tmp_path, monkeypatch, capsys):
    """Stopped in its validation: the epoch's steps are all in the checkpoint."""
    flags = [*flags, f"--save_dir={tmp_path}", "--resume=auto"]
    with monkeypatch.context() as stopped:
        stopped.setattr(train_script, "evaluate", lambda *_, **__: sys.exit(3))
        with pytest.raises(SystemExit):
            train_script.main(flags)
    assert "epoch 1: 100%" in capsys.readouterr().err
    train_script.main(flags)
    shown = capsys.readouterr().err
    assert "resuming from" in shown and "epoch 1:" not in shown and "epoch 2: 100%" in shown
    assert_same(outcome(tmp_path), uninterrupted)
