"""A run that was stopped, however roughly, ends as if it had not been."""

import os
import shutil
import signal
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
FLAGS = [*SMALL, *"--backbone_blocks=2 --freeze_te=1 --eval_dataset_name=toy_city --crossimage_encoder".split()]
FLAGS += "--train_resize 56 56 --lr=0.001 --train_batch_size=4 --epochs_num=3 --checkpoint_every=2".split()
FLAGS += ["--encoder_training=every_step"]


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


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Nothing waits for the disk, which takes a quarter of these short runs."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


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
        ("stepped", 1),  # before any checkpoint of a step
        ("stepped", 3),  # between two checkpoints
        ("move", 1),  # last_model.pth is to become previous_model.pth
        ("move", 2),  # it has, and the new one has not taken its place
        ("validation", 1),
        ("validation", 2),
        ("write", 2),  # best_model.pth or last_model.pth, after validation
        ("stepped", 3),
        ("write", 1),
    ]
    flags = [*flags, f"--save_dir={tmp_path}", "--resume=auto"]
    for point, count in points:
        run = warm.run("stopped.py", f"self SIGKILL {point} {count}", "train", *flags)
        assert run.returncode == -signal.SIGKILL, run.stderr
    train_script.main(flags)
    assert_same(outcome(tmp_path), uninterrupted)


def test_killed_while_similar_places_share_batches(flags, tmp_path, monkeypatch, capsys):
    """The second epoch's order is of the weights that it began with, which a checkpoint within it no longer has.

    The schedule has an end, which --epochs_num may not move then.
    """
    flags = [*flags, "--place_order=similar", "--lr_schedule=linear", "--warmup_steps=2"]
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
    rates = [float(row["lr"]) for row in rows_of(only_run(tmp_path / "whole"), "metrics.csv")]
    assert rates == pytest.approx([0.001 * share for share in (0.9, 0.5, 0.1)]), "of steps 4, 8 and 12"

    save = Progress.save_last
    monkeypatch.setattr(Progress, "save_last", lambda self: kept.append(self.order) or save(self))
    flags = [*flags, f"--save_dir={tmp_path}/killed", "--resume=auto"]
    for count in (7, 5):  # in the third step of the second epoch, and of the third
        run = warm.run("stopped.py", f"self SIGKILL stepped {count}", "train", *flags)
        assert run.returncode == -signal.SIGKILL, run.stderr
    _, content = last_of(tmp_path / "killed")
    assert (content["epoch_num"], len(content["losses"])) == (2, 2), "within the third epoch"
    message = refusal(capsys, lambda: train_script.main([*flags, "--epochs_num=4"]))
    assert "--epochs_num was 3 and is now 4;" in message
    train_script.main(flags)
    assert kept[0].tolist() == orders[1].tolist() and kept[-1] is None
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def test_a_preempted_run_finishes_its_step_and_a_damaged_checkpoint_is_passed_over(
    train, uninterrupted, tmp_path, monkeypatch, caplog
):
    real, taken, stops = Optimization.step, [], {1: signal.SIGTERM, 8: signal.SIGINT}

    def preempted(self):
        taken.append(1)
        if len(taken) in stops:
            os.kill(os.getpid(), stops[len(taken)])
        real(self)

    monkeypatch.setattr(Optimization, "step", preempted)
    for step, signum in stops.items():
        handler = signal.getsignal(signum)
        with pytest.raises(SystemExit) as exit_:
            train("--resume=auto")
        assert exit_.value.code == 128 + signum and len(taken) == step, "no step is taken twice"
        assert signal.getsignal(signum) == handler
    last, _ = last_of(tmp_path)
    os.truncate(last, last.stat().st_size // 2)
    train("--resume=auto")
    assert "last_model.pth is damaged" in caplog.text and "trying the one before" in caplog.text
    assert len(taken) == 12 + 2, "two since the checkpoint before"
    assert_same(outcome(tmp_path), uninterrupted)


def test_a_named_checkpoint_goes_on_in_its_folder_if_it_can(flags, uninterrupted, tmp_path, monkeypatch, caplog):
    """A --save_dir that it does not use is told; where its folder cannot be written to, it goes on there.

    A finished run is only evaluated again, and what a killed process left half written is removed.
    """
    caplog.set_level("INFO")
    train_script.main([*flags, f"--save_dir={tmp_path}/a", "--epochs_num=1"])
    folder = only_run(tmp_path / "a")
    (folder / "last_model.tmp.pth").write_bytes(b"half")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as unwritable:
        unwritable.setattr(log.os, "access", lambda path, mode: path != folder)
        train_script.main([*flags, f"--save_dir={tmp_path}/b", f"--resume={folder}/last_model.pth"])
    assert before == {path: path.read_bytes() for path in folder.iterdir()} and "is not used" not in caplog.text
    train_script.main([*flags, f"--save_dir={tmp_path}/c", f"--resume={folder}/last_model.pth"])
    assert f"--save_dir {tmp_path}/c is not used" in caplog.text and not (tmp_path / "c").exists()
    assert not list(folder.glob("*.tmp*"))
    for name in ("a", "b"):
        assert_same(outcome(tmp_path / name), uninterrupted)
    caplog.clear()
    train_script.main([*flags, f"--save_dir={tmp_path}/b", "--resume=auto"])
    assert "is not used" not in caplog.text
    assert "last_model.pth is finished: only the test split is evaluated again" in caplog.text
    assert_same(outcome(tmp_path / "b"), uninterrupted)


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


def test_what_decides_a_run_stays(flags, city, tmp_path, capsys):
    """Options, the content of GSV-Cities' tables, and an option of 1.0.0, which wrote 0 where it was not given."""
    shutil.copytree(city / "gsv_cities", tmp_path / "gsv_cities")
    flags = [*flags, f"--train_dataset_folder={tmp_path}/gsv_cities", f"--save_dir={tmp_path}/run", "--epochs_num=0"]
    train_script.main(flags)
    last, content = last_of(tmp_path / "run")
    assert content["training"].items() >= {"seed": 0, "lr": 0.001, "train_batch_size": 4}.items()
    assert torch.load(last.with_name("best_model.pth"), weights_only=True)["training"] == content["training"]
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.pth")}

    def refused(*others):
        return refusal(capsys, lambda: train_script.main([*flags, "--resume=auto", *others]))

    message = refused("--lr=0.002", "--seed=5", "--epochs_num=9", "--patience=7", "--num_workers=1")
    assert "--seed was 0 and is now 5;" in message and "--lr was 0.001 and is now 0.002;" in message
    assert not any(name in message for name in ("epochs_num", "patience", "num_workers"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pth")} == kept

    table = tmp_path / "gsv_cities/Dataframes/London.csv"
    rows = table.read_text()
    table.unlink()  # it may be a link
    table.write_text(f"{rows.rstrip()}x\n")
    assert "the digest of GSV-Cities' tables was" in refused()
    table.write_text(rows)

    for name in ("training", "started"):
        del content[name]
    del content["decisive"]["the digest of --query_keys"]
    content["decisive"]["--lr_end_factor"] = 0.2
    torch.save(content, last)
    assert "--lr_end_factor 0.2" in refused()
    content["decisive"]["--lr_end_factor"] = 0.0
    torch.save({**content, "generators": content["generators"] * 3}, last)
    (tmp_path / "keys.txt").write_text("")
    train_script.main([*flags, "--resume=auto"])
    assert "was written by 3 processes, but there are now 1: the encoder's dropout" in capsys.readouterr().err


@pytest.mark.parametrize("cause", ["the loss became nan in", "a weight became infinite before"])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(train, tmp_path, monkeypatch, capsys, cause):
    real = Optimization.step

    def infinite(self):
        real(self)
        torch.nn.init.constant_(self.optimizer.param_groups[0]["params"][0], float("inf"))

    if "weight" in cause:
        monkeypatch.setattr(Optimization, "step", infinite)
    message = refusal(capsys, lambda: train("--lr=1e30", "--checkpoint_every=1"))
    last, content = last_of(tmp_path)
    assert message.startswith(f"{cause} step 2 of epoch 1 at a learning rate of 1e+30; lower --lr")
    assert str(last) in message
    assert all(value.isfinite().all() for value in content["model_state_dict"].values())


def test_deterministic_kernels_and_small_shared_memory_change_nothing(
    train, uninterrupted, tmp_path, monkeypatch, caplog
):
    """On a CPU kernels are the same, with the position embedding frozen.

    Two processes need room for five batches of 150 kB: with less, the main process reads.
    """
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda _: SimpleNamespace(free=400_000))
    try:
        train("--num_workers=2", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    (warning,) = [record.message for record in caplog.records if "/dev/shm" in record.message]
    assert all(said in warning for said in ("0.4 MB free", "0.75 MB", "--shm-size=8g", "--ipc=host", "--num_workers"))
    assert_same(outcome(tmp_path), uninterrupted)


def test_a_best_model_that_is_gone_is_noticed_at_once(train, tmp_path, capsys, monkeypatch):
    train("--epochs_num=0")
    last, content = last_of(tmp_path)
    best = last.with_name("best_model.pth")
    written = best.read_bytes()

    def flip():
        best.write_bytes(written[:50_000] + bytes([written[50_000] ^ 1]) + written[50_001:])

    another = {"model_state_dict": {"backbone.cls_token": torch.zeros(1, 1, 96)}}
    for lose in (best.unlink, flip, lambda: torch.save(another, best)):
        lose()
        train("--epochs_num=0", "--resume=auto")
        assert "best_model.pth was missing or damaged: rewritten from the checkpoint" in capsys.readouterr().err
        state = torch.load(best, weights_only=True)["model_state_dict"]
        assert all(torch.equal(state[name], value) for name, value in content["model_state_dict"].items())

    torch.save({**last_of(tmp_path)[1], "not_improved_num": 1}, last)  # as if the best model were an older one
    flip()
    monkeypatch.setattr(train_script, "train_one_epoch", None)
    message = refusal(capsys, lambda: train("--resume=auto"))
    assert message.startswith(f"{best} is missing or damaged") and f"--resume={last}" in message


def test_an_epoch_in_which_nothing_is_mined_says_so(train, monkeypatch, caplog):
    real = loss.MultiSimilarityMiner
    monkeypatch.setattr(loss, "MultiSimilarityMiner", lambda epsilon, distance: real(-9, distance=distance))
    train("--epochs_num=1")
    assert "no pair of images was mined in epoch 1" in caplog.text


def test_fp16_takes_every_step_and_a_picture_that_cannot_be_drawn_ends_nothing(
    train, tmp_path, monkeypatch, caplog, recwarn
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_script.figures, "draw_training", full)
    train("--epochs_num=1", "--precision=fp16")
    state = last_of(tmp_path)[1]["optimization"]
    assert state["skipped"] == 0 and state["scaler"]["scale"] == 65536 and state["scheduler"]["last_epoch"] == 4
    assert "skipped" not in caplog.text and not [w for w in recwarn if "lr_scheduler" in str(w.message)]
    assert "training.png could not be written: [Errno 28]" in caplog.text and "was mined" not in caplog.text
    assert (only_run(tmp_path) / "results.json").exists()
