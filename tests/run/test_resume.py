"""A run that was stopped, however roughly, ends as if it had not been."""

import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from helpers import SMALL, only_run, refusal, results_of, rows_of

import train as train_script
from datasets.photos.positions import image_key
from datasets.training import similar_places
from datasets.training.gsv_cities import GSVCities, PlaceBatches
from model import loss
from utils.run import log
from utils.run.optimization import Optimization
from utils.run.progress import Progress
from utils.system import reading
from utils.system.seed import generator_states

pytestmark = pytest.mark.slow

# 16 places make 4 steps an epoch, with a checkpoint after every second.
FLAGS = [*SMALL, *"--eval_dataset_name=toy_city --crossimage_encoder --train_resize 56 56 --lr=0.001".split()]
FLAGS += "--train_batch_size=4 --epochs_num=3 --checkpoint_every=2 --encoder_training=every_step".split()


def outcome(save_dir):
    """What a finished run has come to: weights, best score, table."""
    (folder,) = [path.parent for path in save_dir.glob("[!l]*/results.json")]  # a killed run may leave another folder
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


def last_of(save_dir):
    """The path and the content of the only run's last_model.pth."""
    (path,) = save_dir.glob("[!l]*/last_model.pth")
    return path, torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def flags(city):
    return [*FLAGS, f"--eval_datasets_folder={city}"]


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("uninterrupted")
    train_script.main([*flags, f"--save_dir={save_dir}"])
    return outcome(save_dir)


@pytest.fixture
def train(flags, tmp_path):
    """Trains in tmp_path, with further flags."""
    return lambda *further: train_script.main([*flags, f"--save_dir={tmp_path}", *further])


def test_killed_at_ten_points(flags, uninterrupted, tmp_path):
    """Each process goes on from what the one before it left, and is killed in turn."""
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
    flags = [*flags, f"--save_dir={tmp_path}", "--resume=auto"]
    for point, count in points:
        run = warm.run("killed.py", point, count, *flags)
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
    _, content = last_of(tmp_path / "killed")
    assert (content["epoch_num"], len(content["losses"])) == (2, 2), "within the third epoch"
    train_script.main(flags)
    assert kept[0].tolist() == orders[1].tolist() and kept[-1] is None
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


@pytest.mark.parametrize(("signum", "step"), [(signal.SIGTERM, 1), (signal.SIGINT, 8)])
def test_a_preempted_run_finishes_its_step(train, uninterrupted, tmp_path, monkeypatch, signum, step):
    real, taken, handler = Optimization.step, [], signal.getsignal(signum)

    def preempted(self):
        taken.append(1)
        if len(taken) == step:
            os.kill(os.getpid(), signum)
        real(self)

    monkeypatch.setattr(Optimization, "step", preempted)
    with pytest.raises(SystemExit) as exit_:
        train("--resume=auto")
    assert exit_.value.code == 128 + signum and len(taken) == step
    assert signal.getsignal(signum) == handler
    train("--resume=auto")
    assert len(taken) == 12, "no step is taken twice"
    assert_same(outcome(tmp_path), uninterrupted)


@pytest.mark.parametrize("writable", [True, False])
def test_a_named_checkpoint_goes_on_in_its_folder_if_it_can(
    flags, uninterrupted, tmp_path, monkeypatch, caplog, writable
):
    """A --save_dir that it does not use is told; where its folder cannot be written to, it goes on there."""
    caplog.set_level("INFO")
    train_script.main([*flags, f"--save_dir={tmp_path}/a", "--epochs_num=1"])
    folder = only_run(tmp_path / "a")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(log.os, "access", lambda path, mode: writable or path != folder)
    train_script.main([*flags, f"--save_dir={tmp_path}/b", f"--resume={folder}/last_model.pth"])
    assert_same(outcome(tmp_path / ("a" if writable else "b")), uninterrupted)
    assert (f"--save_dir {tmp_path}/b is not used" in caplog.text) == writable == (not (tmp_path / "b").exists())
    assert writable or before == {path: path.read_bytes() for path in folder.iterdir()}
    caplog.clear()
    train_script.main([*flags, f"--save_dir={tmp_path}/{'a' if writable else 'b'}", "--resume=auto"])
    assert "is not used" not in caplog.text and "is finished" in caplog.text


def test_a_photo_that_cannot_be_read_loses_no_step(flags, uninterrupted, city, tmp_path, capsys):
    """Those before it are saved; once the file is replaced, the run goes on as if nothing had happened."""
    shutil.copytree(city / "gsv_cities", tmp_path / "gsv_cities")
    places = GSVCities(tmp_path / "gsv_cities", transform=lambda image: image)
    third = PlaceBatches(places, batch_size=4).order(0)[9]  # a place of the third step
    photos = {Path(path): Path(path).read_bytes() for path in places.image_paths(third)}
    for path in photos:
        path.write_bytes(b"<html>")
    flags = [*flags, f"--train_dataset_folder={tmp_path}/gsv_cities", f"--save_dir={tmp_path}/run", "--resume=auto"]
    flags += ["--num_workers=2", "--checkpoint_every=0"]
    message = refusal(capsys, lambda: train_script.main(flags))
    assert any(str(path) in message for path in photos)
    assert "datasets.check" in message and "skip_unreadable" not in message
    assert len(last_of(tmp_path / "run")[1]["losses"]) == 2
    for path, content in photos.items():
        path.write_bytes(content)
    train_script.main(flags)
    assert_same(outcome(tmp_path / "run"), uninterrupted)


def test_validation_by_the_test_split_is_told(flags, city, tmp_path, caplog):
    """By the files, as where a dataset's test split is a link to val; and the keys of the queries decide the run."""
    images = tmp_path / "data/toy_city/images"
    images.mkdir(parents=True)
    for name in ("train", "val"):
        (images / name).symlink_to(city / "toy_city/images" / name)
    (images / "test").symlink_to("val")
    queries = sorted((images / "val/queries").iterdir())
    keys = tmp_path / "keys.txt"
    keys.write_text("\n".join(image_key(str(path)) for path in queries[:3]))
    flags = [*flags, f"--eval_datasets_folder={tmp_path}/data", f"--train_dataset_folder={city}/gsv_cities"]
    flags += [f"--save_dir={tmp_path}/run", "--epochs_num=0", f"--query_keys={keys}"]
    train_script.main(flags)
    assert "3 of the 3 queries of toy_city val are the same files as queries of toy_city test" in caplog.text
    results = results_of(only_run(tmp_path / "run"))
    assert results["validation"]["queries_also_in_test"] == 3 == results["dataset"]["queries"]
    keys.write_text("\n".join(image_key(str(path)) for path in queries[:4]))
    with pytest.raises(SystemExit):
        train_script.main([*flags, "--resume=auto"])
    assert "the digest of --query_keys was" in caplog.text


def test_what_a_checkpoint_of_other_versions_says(train, tmp_path, capsys):
    """1.0.0 wrote a removed option into each, as 0 where it was not given; the newer options were as released."""
    train("--epochs_num=1")
    last, content = last_of(tmp_path)
    assert content["training"].items() >= {"seed": 0, "lr": 0.001, "train_batch_size": 4}.items()
    assert torch.load(last.with_name("best_model.pth"), weights_only=True)["training"] == content["training"]
    for name in ("training", "started"):
        del content[name]
    for name in ("lr_schedule", "warmup_steps", "weight_decay"):
        del content["decisive"][f"--{name}"]
    content["decisive"]["--lr_end_factor"] = 0.2
    torch.save(content, last)
    assert "--lr_end_factor 0.2" in refusal(capsys, lambda: train("--epochs_num=1", "--resume=auto"))
    content["decisive"]["--lr_end_factor"] = 0.0
    torch.save(content, last)
    message = refusal(capsys, lambda: train("--resume=auto", "--lr_schedule=cosine"))
    assert "--lr_schedule was halving and is now cosine" in message
    train("--epochs_num=1", "--resume=auto")


def test_a_damaged_checkpoint_is_passed_over(train, uninterrupted, tmp_path, caplog):
    train("--epochs_num=2")
    last, _ = last_of(tmp_path)
    os.truncate(last, last.stat().st_size // 2)
    train("--resume=auto")
    assert "last_model.pth is damaged" in caplog.text and "trying the one before" in caplog.text
    assert_same(outcome(tmp_path), uninterrupted)


def test_contradicting_options_are_named(train, tmp_path, capsys):
    train("--epochs_num=1")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.pth")}
    other = ["--lr=0.002", "--seed=5", "--epochs_num=9", "--patience=7", "--num_workers=1"]
    message = refusal(capsys, lambda: train("--resume=auto", *other))
    assert "--seed was 0 and is now 5;" in message and "--lr was 0.001 and is now 0.002;" in message
    assert not any(name in message for name in ("epochs_num", "patience", "num_workers"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pth")} == kept


@pytest.fixture
def ends_before_validation(monkeypatch):
    """A function that runs another, which is to end where validation would begin."""

    def call(other):
        with monkeypatch.context() as stopped, pytest.raises(SystemExit):
            stopped.setattr(train_script, "evaluate_split", lambda *_, **__: sys.exit(3))
            other()

    return call


def test_a_schedule_with_an_end_fixes_it(flags, tmp_path, capsys, ends_before_validation):
    """--epochs_num may change where nothing depends on it: not the end of a linear schedule."""
    flags = [*flags, "--lr_schedule=linear", "--warmup_steps=2"]
    whole, cut = ([*flags, f"--save_dir={tmp_path}/{name}", "--resume=auto"] for name in ("whole", "cut"))
    train_script.main(whole)
    message = refusal(capsys, lambda: train_script.main([*whole, "--epochs_num=4"]))
    assert "--epochs_num was 3 and is now 4;" in message
    ends_before_validation(lambda: train_script.main(cut))
    train_script.main(cut)
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
    rates = [float(row["lr"]) for row in rows_of(only_run(tmp_path / "whole"), "metrics.csv")]
    assert rates == pytest.approx([0.001 * share for share in (0.9, 0.5, 0.1)]), "of steps 4, 8 and 12"


def test_an_epoch_without_a_step_left_shows_no_bar(train, uninterrupted, tmp_path, ends_before_validation, capsys):
    """Stopped in its validation: the epoch's steps are all in the checkpoint."""
    ends_before_validation(lambda: train("--resume=auto"))
    assert "epoch 1: 100%" in capsys.readouterr().err
    train("--resume=auto")
    shown = capsys.readouterr().err
    assert "resuming from" in shown and "epoch 1:" not in shown and "epoch 2: 100%" in shown
    assert_same(outcome(tmp_path), uninterrupted)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(train, tmp_path, capsys):
    message = refusal(capsys, lambda: train("--lr=1e30", "--checkpoint_every=1"))
    last, content = last_of(tmp_path)
    assert "epoch 1 at a learning rate of 1e+30; lower --lr" in message and str(last) in message
    assert all(value.isfinite().all() for value in content["model_state_dict"].values())


@pytest.fixture
def read_late(monkeypatch):
    """As on a GPU: losses are read every third step, and before anything is written."""
    monkeypatch.setattr(
        train_script, "Progress", lambda *args, **kwargs: Progress(*args, **{**kwargs, "read_every": 3})
    )


def test_reading_losses_late_changes_nothing(train, uninterrupted, read_late, tmp_path):
    train()
    assert_same(outcome(tmp_path), uninterrupted)


def test_a_loss_read_late_reaches_no_checkpoint(train, read_late, tmp_path, monkeypatch, capsys):
    real, steps = Progress.record_step, []

    def poisoned(self, loss):
        steps.append(loss)
        real(self, loss * float("nan") if len(steps) == 7 else loss)  # the third of the second epoch

    monkeypatch.setattr(Progress, "record_step", poisoned)
    message = refusal(capsys, lambda: train("--checkpoint_every=4"))
    assert "nan in step 3 of epoch 2 at a learning rate of 0.001" in message
    _, last = last_of(tmp_path)
    assert (last["epoch_num"], last["losses"]) == (1, []) and len(steps) == 7


def test_deterministic_kernels_are_asked_for(train, uninterrupted, tmp_path):
    """On a CPU they are the same, with the position embedding frozen."""
    try:
        train("--deterministic")
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(outcome(tmp_path), uninterrupted)


def test_a_finished_run_is_only_evaluated_again(train, tmp_path, caplog):
    """What a killed process left half written is removed then."""
    caplog.set_level("INFO")
    train("--epochs_num=1")
    before = outcome(tmp_path)
    (only_run(tmp_path) / "last_model.pth.12345.tmp").write_bytes(b"half")
    train("--epochs_num=1", "--resume=auto")
    assert_same(outcome(tmp_path), before)
    assert "last_model.pth is finished: only the test split is evaluated again" in caplog.text
    assert not list(tmp_path.rglob("*.tmp"))


def test_small_shared_memory_changes_nothing_but_the_time(train, uninterrupted, tmp_path, monkeypatch, caplog):
    """Two processes need room for five batches of 150 kB: with less, the main process reads."""
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda _: SimpleNamespace(free=400_000))
    train("--num_workers=2")
    (warning,) = [record.message for record in caplog.records if "/dev/shm" in record.message]
    assert all(said in warning for said in ("0.4 MB free", "0.75 MB", "--shm-size=8g", "--ipc=host", "--num_workers"))
    assert_same(outcome(tmp_path), uninterrupted)


def test_a_best_model_that_is_gone_is_noticed_at_once(train, tmp_path, capsys, monkeypatch):
    train("--epochs_num=1")
    last, content = last_of(tmp_path)
    best = last.with_name("best_model.pth")
    written = best.read_bytes()

    def flip():
        best.write_bytes(written[:50_000] + bytes([written[50_000] ^ 1]) + written[50_001:])

    another = {"model_state_dict": {"backbone.cls_token": torch.zeros(1, 1, 96)}}
    for lose in (best.unlink, flip, lambda: torch.save(another, best)):
        lose()
        train("--epochs_num=1", "--resume=auto")
        assert "best_model.pth was missing or damaged: rewritten from the checkpoint" in capsys.readouterr().err
        state = torch.load(best, weights_only=True)["model_state_dict"]
        assert all(torch.equal(state[name], value) for name, value in content["model_state_dict"].items())

    torch.save({**last_of(tmp_path)[1], "not_improved_num": 1}, last)  # as if the best model were an older one
    flip()
    monkeypatch.setattr(train_script, "train_one_epoch", None)
    message = refusal(capsys, lambda: train("--resume=auto"))
    assert message.startswith(f"{best} is missing or damaged") and f"--resume={last}" in message


def test_a_best_model_that_goes_while_the_run_lives_is_noticed_after_the_epoch(train, tmp_path, capsys, monkeypatch):
    real = Progress.record_epoch

    def gone(self, recalls, score):
        if self.epoch == 1:
            (only_run(tmp_path) / "best_model.pth").unlink()
        return real(self, recalls, score=0.0)

    monkeypatch.setattr(Progress, "record_epoch", gone)
    assert "best_model.pth is missing or damaged" in refusal(capsys, train)
    assert last_of(tmp_path)[1]["epoch_num"] == 2


def test_other_rows_of_the_same_number_of_places(flags, city, tmp_path, capsys):
    shutil.copytree(city / "gsv_cities", tmp_path / "gsv_cities")
    flags = [*flags, f"--train_dataset_folder={tmp_path}/gsv_cities", f"--save_dir={tmp_path}/run", "--epochs_num=1"]
    train_script.main(flags)
    table = tmp_path / "gsv_cities/Dataframes/London.csv"
    lines = table.read_text().splitlines()
    (tmp_path / "copy.csv").write_text("\n".join([*lines, lines[-1] + "x"]))  # one more row, of the same place
    (tmp_path / "copy.csv").replace(table)
    message = refusal(capsys, lambda: train_script.main([*flags, "--resume=auto"]))
    assert "the digest of GSV-Cities' tables was" in message


def test_an_epoch_in_which_nothing_is_mined_says_so(train, monkeypatch, caplog):
    real = loss.MultiSimilarityMiner
    train("--epochs_num=1")
    assert "was mined" not in caplog.text
    monkeypatch.setattr(loss, "MultiSimilarityMiner", lambda epsilon, distance: real(-9, distance=distance))
    train("--epochs_num=1")
    assert "no pair of images was mined in epoch 1" in caplog.text


def test_fp16_takes_every_step(train, tmp_path, caplog, recwarn):
    caplog.set_level("INFO")
    train("--epochs_num=1", "--precision=fp16")
    state = last_of(tmp_path)[1]["optimization"]
    assert state["skipped"] == 0 and state["scaler"]["scale"] == 65536 and state["scheduler"]["last_epoch"] == 4
    assert "skipped" not in caplog.text and not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_a_picture_that_cannot_be_drawn_ends_nothing(train, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_script.figures, "draw_training", full)
    train("--epochs_num=1")
    assert "training.png ([Errno 28] No space left on device)" in caplog.text
    assert (only_run(tmp_path) / "results.json").exists()


@pytest.mark.parametrize("encoder", [True, False])
def test_other_processes_concern_the_encoder_where_there_is_one(flags, tmp_path, caplog, encoder):
    flags = [flag for flag in flags if encoder or flag not in ("--crossimage_encoder", "--encoder_training=every_step")]
    flags += [f"--save_dir={tmp_path}", "--epochs_num=0"]
    train_script.main(flags)
    last, content = last_of(tmp_path)
    torch.save({**content, "generators": content["generators"] * 3}, last)
    train_script.main([*flags, "--resume=auto"])
    (message,) = [each for each in caplog.messages if "was written by 3 processes, but there are now 1" in each]
    assert ("encoder" in message) == ("dropout" in message) == encoder
