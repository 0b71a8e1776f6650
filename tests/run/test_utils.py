"""Search, recall, optimisation, checkpoints and logs."""

import copy
import json
import logging
import os
import random
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim import lr_scheduler
from tqdm import tqdm

from model import build_model
from model.loss import MinedMultiSimilarity
from model.weights import read_file
from utils.outputs import report
from utils.retrieval.descriptor_store import DescriptorStore, digest
from utils.retrieval.index_trial import require_index
from utils.retrieval.search import merge_crops, nearest, nearest_by_index, recall_at
from utils.run import checkpoint, metrics
from utils.run import log as run_log
from utils.run.optimization import Optimization
from utils.system import distributed
from utils.system.device import estimated_hours, pick_device
from utils.system.seed import generator_states, restore_generators, seed_everything


def in_chunks(database, sizes, order=None):
    order = np.arange(len(database)) if order is None else order
    return [(part, database[part]) for part in np.split(order, np.cumsum(sizes)[:-1])]


@pytest.mark.parametrize("sizes", [[50], [20, 20, 10], [3, 40, 7]])
def test_search_is_exact_however_the_database_comes(sizes):
    rng = np.random.default_rng(0)
    queries, database = rng.standard_normal((7, 12)).astype("f"), rng.standard_normal((50, 12)).astype("f")
    distances, predictions = nearest(queries, in_chunks(database, sizes, rng.permutation(50)), 10)
    expected = ((queries[:, None] - database[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(predictions, np.argsort(expected, axis=1)[:, :10])
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :10], rtol=1e-5)


def test_search_in_a_database_smaller_than_the_answer():
    distances, predictions = nearest(np.eye(3, dtype="f"), in_chunks(np.eye(3, dtype="f")[:2], [1, 1]), 20)
    assert predictions.shape == distances.shape == (3, 2)


def test_recall_counts_every_query():
    predictions = np.array([[4, 0, 2], [1, 2, 3], [3, 4, 0], [0, 1, 2]])
    positives = [np.array([2, 3]), np.array([], dtype=int), np.array([3]), np.array([4])]
    recalls = recall_at(predictions, positives, [1, 2, 3, 50])
    assert recalls == {1: 25.0, 2: 25.0, 3: 50.0, 50: 50.0}


def test_recall_against_plain_loops():
    rng = np.random.default_rng(3)
    predictions = np.array([rng.permutation(40)[:20] for _ in range(30)])
    positives = [rng.choice(40, size=rng.integers(0, 4), replace=False) for _ in range(30)]
    for n, recall in recall_at(predictions, positives, [1, 5, 10, 20]).items():
        hits = sum(
            any(p in set(good) for p in row[:n]) for row, good in zip(predictions.tolist(), positives, strict=True)
        )
        assert recall == pytest.approx(100 * hits / 30)


def test_merging_keeps_the_nearest_occurrence():
    predictions = np.array([[1, 2], [3, 1]])
    distances = np.array([[0.5, 0.6], [0.1, 0.2]], dtype="f")
    lengths, merged = merge_crops(distances, predictions, crops=2)
    assert merged.tolist() == [[3, 1]] and lengths.ravel().tolist() == pytest.approx([0.1, 0.2])


def test_merging_what_an_index_did_not_fill():
    predictions = np.array([[1, -1], [1, -1]])
    distances = np.array([[0.5, np.inf], [0.1, np.inf]], dtype="f")
    for weight in (0.0, 0.01):
        lengths, merged = merge_crops(distances, predictions, crops=2, majority_weight=weight)
        assert merged.tolist() == [[1, -1]] and np.isinf(lengths[0, 1])


def test_agreeing_crops_move_an_image_up():
    predictions = np.array([[1, 2], [3, 1], [4, 2], [5, 6], [7, 8]])
    distances = np.array([[0.500, 0.9], [0.495, 0.501], [0.9, 0.9], [0.9, 0.9], [0.9, 0.9]], dtype="f")
    assert merge_crops(distances, predictions)[1].tolist() == [[3, 1]]
    # Image 1 stands twice among the first 5 columns: 0.500 - 0.01 * 2/5 - 0.01 * 2/10 = 0.494.
    assert merge_crops(distances, predictions, majority_weight=0.01)[1].tolist() == [[1, 3]]


class Small(nn.Module):
    def __init__(self, encoder=True):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.encoder = nn.Linear(3, 3) if encoder else None

    def forward(self, x):
        x = self.body(x)
        return x if self.encoder is None else self.encoder(x)


def steps(model, optimization, count):
    moved = []
    for _ in range(count):
        before = [p.detach().clone() for p in model.parameters()]
        optimization.backward((model(torch.ones(2, 3)) ** 2).sum())
        optimization.step()
        moved.append([(p - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True)])
    return moved


def test_released_encoder_training_is_one_step():
    model = Small()
    optimization = Optimization(model, lr=5e-5, lr_encoder=1e-4, steps_per_epoch=10)
    first, second, _ = steps(model, optimization, 3)
    assert first == pytest.approx([5e-5, 5e-5, 1.5e-4, 1.5e-4], rel=1e-2)
    assert second[0] > 0 and second[2:] == [0, 0]
    assert optimization.encoder_retired


def test_encoder_is_not_stepped_again_after_a_resume():
    model = Small()
    first = Optimization(model, lr=5e-5, lr_encoder=1e-4, steps_per_epoch=10)
    steps(model, first, 1)
    again = Small()
    again.load_state_dict(model.state_dict())
    second = Optimization(again, lr=5e-5, lr_encoder=1e-4, steps_per_epoch=10)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert steps(again, second, 2)[1][2:] == [0, 0]
    steps(model, first, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_every_step_has_its_own_rate_and_one_owner_a_parameter():
    model = Small()
    optimization = Optimization(model, lr=5e-5, lr_encoder=1e-4, encoder_training="every_step", steps_per_epoch=10)
    for moved in steps(model, optimization, 3):
        assert moved[0] > 0 and moved[2] > 0
    owned = [id(p) for group in optimization.optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) == 4
    assert [group["lr"] for group in optimization.optimizer.param_groups] == [5e-5, 1e-4]


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_released_encoder_training_is_for_adam(optim):
    rates = {"lr": 1e-3, "lr_encoder": 1e-3, "steps_per_epoch": 1}
    with pytest.raises(ValueError, match=f"not for --optim {optim}; use --encoder_training every_step"):
        Optimization(Small(), optim=optim, **rates)
    steps(model := Small(False), Optimization(model, optim=optim, **rates), 1)
    steps(model := Small(), Optimization(model, optim=optim, encoder_training="every_step", **rates), 1)


def test_learning_rates_halve_every_third_epoch():
    model = Small()
    optimization = Optimization(model, lr=8e-5, lr_encoder=4e-4, encoder_training="every_step", steps_per_epoch=2)
    rates = []
    for _ in range(13):
        rates.append(tuple(group["lr"] for group in optimization.optimizer.param_groups))
        steps(model, optimization, 1)
    np.testing.assert_allclose(rates, [(8e-5, 4e-4)] * 6 + [(4e-5, 2e-4)] * 6 + [(2e-5, 1e-4)])


TORCH_SCHEDULES = {  # of 12 steps less the warm-up, four an epoch
    ("halving", 0.0): lambda optimizer, _: lr_scheduler.StepLR(optimizer, 12, 0.5),
    ("linear", 0.0): lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps),
    ("linear", 0.2): lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, 1.0, 0.2, steps),
    ("cosine", 0.0): lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps),
    ("cosine", 0.2): lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(
        optimizer, steps, eta_min=0.2 * optimizer.param_groups[0]["lr"]
    ),
}


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize(("name", "end"), TORCH_SCHEDULES)
def test_schedules_are_those_of_pytorch(name, end, warmup, recwarn):
    """Each group apart, since PyTorch's cosine has one end for all groups."""
    model = Small()
    settings = {"lr": 8e-5, "lr_encoder": 4e-4, "encoder_training": "every_step", "steps_per_epoch": 4, "epochs": 3}
    settings |= {"lr_schedule": name, "warmup_steps": warmup, "lr_end_factor": end}
    optimization = Optimization(model, **settings)
    theirs = []
    for lr in (8e-5, 4e-4):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        main = TORCH_SCHEDULES[name, end](optimizer, 12 - warmup)
        if warmup:
            rising = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
            main = lr_scheduler.SequentialLR(optimizer, [rising, main], [warmup])
        theirs.append((optimizer, main))
    for step in range(12):
        expected = [optimizer.param_groups[0]["lr"] for optimizer, _ in theirs]
        found = [group["lr"] for group in optimization.optimizer.param_groups]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        if step < warmup:
            np.testing.assert_allclose(found[0], 8e-5 * (step + 1) / (warmup + 1))
        steps(model, optimization, 1)
        for optimizer, scheduler in theirs:
            optimizer.step()
            scheduler.step()
        if step == 6:  # goes on in another process
            state = optimization.state_dict()
            optimization = Optimization(model, **settings)
            optimization.load_state_dict(state)
    if name != "halving":
        np.testing.assert_allclose(optimization.lr, 8e-5 * end, atol=1e-18)
        steps(model, optimization, 3)  # steps that were skipped before may leave the schedule behind, never ahead
        np.testing.assert_allclose(optimization.lr, 8e-5 * end, atol=1e-18)
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_skipped_step_is_none_of_any_schedule(name):
    model = Small()
    optimization = Optimization(
        model, lr=8e-5, lr_encoder=1e-4, steps_per_epoch=4, epochs=1, lr_schedule=name, scale_gradients=True
    )
    for factor in (float("inf"), 1.0, float("nan"), 1.0):
        optimization.backward(model(torch.ones(2, 3)).sum() * factor)
        optimization.step()
    assert optimization.skipped == 2 and optimization.lr == pytest.approx(4e-5), "half of four steps"


def test_a_warm_up_that_leaves_no_step(caplog):
    settings = {"lr": 8e-5, "lr_encoder": 1e-4, "steps_per_epoch": 4, "epochs": 2, "lr_schedule": "cosine"}
    with pytest.raises(ValueError, match="--warmup_steps 8 leaves no steps for --lr_schedule cosine: the run has 8"):
        Optimization(Small(), **settings, warmup_steps=8)
    Optimization(Small(), **{**settings, "epochs": 0}, warmup_steps=8)  # nothing is trained
    caplog.clear()
    Optimization(Small(), **settings, warmup_steps=7)
    assert "--warmup_steps 7 lowers the encoder's rate too in its only step" in caplog.text


@pytest.mark.parametrize("optim", ["adam", "adamw", "sgd"])
def test_weight_decay_is_of_all_weights(optim):
    settings = {"optim": optim, "lr": 1e-3, "lr_encoder": 1e-3, "steps_per_epoch": 1, "encoder_training": "every_step"}
    groups = Optimization(Small(), **settings, weight_decay=0.05).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.05]
    assert Optimization(Small(), **settings, weight_decay=0.0).optimizer.param_groups[0]["weight_decay"] == 0


def test_optimiser_settings():
    sgd = Optimization(Small(False), optim="sgd", lr=1e-3, lr_encoder=1e-3, steps_per_epoch=1).optimizer.param_groups[0]
    assert (sgd["momentum"], sgd["weight_decay"]) == (0.9, 1e-3)
    adamw = Optimization(Small(False), optim="adamw", lr=1e-3, lr_encoder=1e-3, steps_per_epoch=1).optimizer
    assert adamw.param_groups[0]["weight_decay"] == 9.5e-9


def test_a_step_that_overflowed_does_not_retire_the_encoder():
    model = Small()
    optimization = Optimization(model, lr=5e-5, lr_encoder=1e-4, steps_per_epoch=10, scale_gradients=True)
    optimization.backward(model(torch.ones(2, 3)).sum() * float("inf"))
    optimization.step()
    assert not optimization.encoder_retired
    steps(model, optimization, 1)
    assert optimization.encoder_retired


def test_the_machine_says_which_kernels_step_not_the_file():
    """A checkpoint of a CPU is gone on from with fused steps on a GPU, and the other way round."""
    settings = {"lr": 5e-5, "lr_encoder": 1e-4, "steps_per_epoch": 10, "encoder_training": "every_step"}
    for fused_there, fused_here in ((True, None), (None, True)):
        there, here = (Optimization(Small(), **settings) for _ in range(2))
        for optimization, fused in ((there, fused_there), (here, fused_here)):
            for group in optimization.optimizer.param_groups:
                group["fused"] = fused
        state = there.state_dict()
        here.load_state_dict(state)
        assert [group["fused"] for group in here.optimizer.param_groups] == [fused_here] * 2
        assert [group["fused"] for group in state["optimizer"]["param_groups"]] == [fused_there] * 2


def test_a_skipped_step_is_counted_and_is_none_of_the_schedule(caplog, recwarn):
    model = Small()
    settings = {"lr": 5e-5, "lr_encoder": 1e-4, "steps_per_epoch": 1, "scale_gradients": True}
    optimization = Optimization(model, **settings)
    with caplog.at_level(logging.INFO):
        for factor in (float("inf"), 1.0, float("nan"), 1.0, 1.0):
            optimization.backward(model(torch.ones(2, 3)).sum() * factor)
            optimization.step()
    assert optimization.skipped == 2 and "step skipped (2 so far): its gradients overflowed" in caplog.text
    assert optimization.lr == 2.5e-5, "three steps of one an epoch"
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]
    again = Optimization(Small(), **settings)
    again.load_state_dict(optimization.state_dict())
    assert again.skipped == 2 and again.lr == 2.5e-5


def test_a_large_loss_does_not_overflow_the_scale():
    """65,536 at the start, times the number of processes: fp16 would hold neither."""
    descriptors = nn.functional.normalize(torch.randn(8, 16), dim=1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = MinedMultiSimilarity()(descriptors, torch.arange(4).repeat_interleave(2))
    torch.amp.GradScaler("cpu").scale(loss * 2).backward()
    assert loss > 0.5 and descriptors.grad.isfinite().all()


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last_model.pth"
    checkpoint.save(path, {"epoch_num": 1})

    def dies(content, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="cannot write .*last_model.pth .no space left.; earlier checkpoints are intact"):
        checkpoint.save(path, {"epoch_num": 2})
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"epoch_num": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last_model.pth"]


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path):
    """For real: /dev/full refuses every write."""
    path = tmp_path / "last_model.pth"
    checkpoint.save(path, {"epoch_num": 1})
    (tmp_path / f"last_model.pth.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot write"):
        checkpoint.save(path, {"weights": torch.zeros(100_000)})
    assert torch.load(path, weights_only=True) == {"epoch_num": 1}


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    def flip(path, place):
        data = bytearray(path.read_bytes())
        data[int(place * len(data))] ^= 1
        path.write_bytes(bytes(data))

    old, new = tmp_path / "a", tmp_path / "b"
    assert checkpoint.newest([old, new], read=read_file) is None
    for number, folder in enumerate((old, new, new)):
        folder.mkdir(exist_ok=True)
        checkpoint.save(folder / "last_model.pth", {"number": number, "weights": torch.randn(5000)})
    found = []
    for damaged in (None, new / "last_model.pth", new / "previous_model.pth", old / "last_model.pth"):
        if damaged:
            flip(damaged, 0.5)
        path = checkpoint.newest([old, new], read=read_file)
        found.append(path and read_file(path)["number"])
    assert found == [2, 1, 0, None]


def test_how_far_a_checkpoint_has_come_decides_not_the_clock(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for epoch, losses in ((1, [0.5]), (1, [0.5, 0.4])):
        checkpoint.save(folder / "last_model.pth", {"epoch_num": epoch, "losses": losses})
    os.utime(folder / "last_model.pth", (1, 1))  # as after a clock that went back
    assert checkpoint.newest([folder], read=read_file) == folder / "last_model.pth"
    (folder / "last_model.pth").rename(folder / "x")
    (folder / "previous_model.pth").rename(folder / "last_model.pth")
    (folder / "x").rename(folder / "previous_model.pth")
    assert checkpoint.newest([folder], read=read_file) == folder / "previous_model.pth"
    other = tmp_path / "other"  # a later run, however far
    other.mkdir()
    checkpoint.save(other / "last_model.pth", {"epoch_num": 0, "losses": []})
    assert checkpoint.newest([folder, other], read=read_file) == other / "last_model.pth"


def test_run_log_turns_bad_input_into_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_, run_log.RunLog() as log:
        logging.getLogger("anything").info("before the folder")
        folder = log.open(tmp_path / "x")
        logging.getLogger("anything").info("in the folder")
        raise ValueError("the value, the rule, the remedy")
    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert "ERROR: the value, the rule, the remedy" in shown and "Traceback" not in shown
    info = (folder / "info.log").read_text()
    assert info.index("before the folder") < info.index("in the folder") and "Traceback" not in info
    assert "Traceback" in (folder / "debug.log").read_text()


def test_other_errors_pass_and_are_in_the_log(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), run_log.RunLog() as log:
        folder = log.open(tmp_path)
        raise RuntimeError("out of memory")
    assert "out of memory" in (folder / "debug.log").read_text()


def test_bad_input_before_the_folder_makes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit), run_log.RunLog():
        raise ValueError("no")
    assert not list(tmp_path.iterdir())


def test_a_save_dir_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_, run_log.RunLog() as log:
        log.open(tmp_path / "file")
    assert exit_.value.code == 2 and "name another --save_dir" in capsys.readouterr().err


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path):
    folders = set()
    for _ in range(3):
        with run_log.RunLog() as log:
            folders.add(log.open(tmp_path))
    assert len(folders) == 3 == len(run_log.runs_of(tmp_path))


def test_a_relative_save_dir_lies_below_logs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with run_log.RunLog() as log:
        assert log.open(run_log.Path("mine")).parent.parts == ("logs", "mine")


def test_without_git_the_revision_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert run_log.git_revision() == "unknown"


def test_rows_past_a_checkpoint_are_cut(tmp_path):
    for epoch in (1, 2, 3):
        metrics.append_row(tmp_path, {"epoch": epoch, "loss": epoch / 10})
    metrics.cut_rows(tmp_path, 1)
    metrics.append_row(tmp_path, {"epoch": 2, "loss": 0.5})
    assert (tmp_path / "metrics.csv").read_text().split() == ["epoch,loss", "1,0.1", "2,0.5"]
    (tmp_path / "metrics.csv").write_text("epo")
    metrics.cut_rows(tmp_path, 0)
    metrics.append_row(tmp_path, {"epoch": 1, "loss": 0.5})
    assert (tmp_path / "metrics.csv").read_text().split() == ["epoch,loss", "1,0.5"]


def test_each_epoch_keeps_one_row(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"epoch,loss\r\n1,0.1\r\n1,0.1\r\n2,0.2\r\n3,0.3\r\n4,0.")
    metrics.cut_rows(tmp_path, 3)
    assert path.read_bytes() == b"epoch,loss\r\n1,0.1\r\n2,0.2\r\n3,0.3\r\n"
    metrics.cut_rows(tmp_path, 3)
    metrics.append_row(tmp_path, {"epoch": 4, "loss": 0.4})
    assert path.read_bytes().endswith(b"3,0.3\r\n4,0.4\r\n")
    metrics.cut_rows(tmp_path / "nowhere", 3)


def test_a_row_is_written_whole_or_not_at_all(tmp_path):
    """For real: the process may write no file beyond some bytes."""
    metrics.append_row(tmp_path, {"epoch": 1, "loss": 0.1})
    before = (tmp_path / "metrics.csv").read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*metrics.csv .*free space and resume with --resume auto"):
            metrics.append_row(tmp_path, {"epoch": 2, "loss": 0.2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    """For real: /dev/full refuses every write."""
    with run_log.RunLog() as log:
        for name in ("info.log", "debug.log"):
            (tmp_path / name).symlink_to("/dev/full")
        folder = log.open(tmp_path, tmp_path)
        for number in range(20):
            logging.getLogger("utils").info("line %d", number)
    shown = capsys.readouterr().err
    assert "line 19" in shown and "Traceback" not in shown and shown.count("the run continues without it") == 2
    assert f"WARNING: cannot write {folder}/info.log ([Errno 28] No space left on device)" in shown


def test_a_log_that_cannot_be_opened_is_one_warning(tmp_path, capsys):
    (tmp_path / "info.log").mkdir()
    with run_log.RunLog() as log:
        log.open(tmp_path, tmp_path)
        logging.getLogger("utils").info("a line")
    assert f"WARNING: cannot write {tmp_path}/info.log (Is a directory); the run" in capsys.readouterr().err
    assert "a line" in (tmp_path / "debug.log").read_text()


def test_a_table_that_lost_rows_is_told_and_one_that_is_right_is_left_alone(tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    for text, lost in (("epoch,loss\r\n1,0.1\r\n2,0.2\r\n", 0), ("epoch,loss\r\n2,0.2\r\n", 1), ("garbage", 2)):
        caplog.clear()
        path.write_bytes(text.encode())
        before = path.stat().st_ino
        metrics.cut_rows(tmp_path, 2)
        assert (f"lacks rows for {lost} of the 2 epochs" in caplog.text) == (lost > 0)
        assert (path.stat().st_ino == before) == (lost < 2)
    (tmp_path / f"metrics.csv.{os.getpid()}.tmp").symlink_to("/dev/full")
    path.write_bytes(b"epoch,loss\r\n1,0.1\r\n2,0.2\r\n")
    with pytest.raises(OSError, match="cannot write .*metrics.csv .*free space and resume with --resume auto"):
        metrics.cut_rows(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_an_error_in_another_process_has_a_log_and_a_line_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    monkeypatch.setattr(distributed, "broadcast", lambda value: tmp_path / "run")
    with pytest.raises(SystemExit) as exit_, run_log.RunLog() as log:
        logging.getLogger("utils").info("before the folder")
        log.open(tmp_path)
        sys.stderr.write("epoch 1:  50%|#####     |")  # the main process's bar, on the same terminal
        raise ValueError("the value, the rule, the remedy")
    assert exit_.value.code == 2
    assert "\nrank 3: ERROR: the value, the rule, the remedy\n" in capsys.readouterr().err
    text = (tmp_path / "run" / "rank3.log").read_text()
    assert "before the folder" in text and "Traceback" in text and "ERROR the value, the rule" in text
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["rank3.log"]


def test_an_error_that_only_says_that_another_process_ended_is_one_line(tmp_path, monkeypatch, capsys):
    for error in ("[gloo/transport/tcp/pair.cc] Connection closed by peer [::1]", "NCCL: remote process exited"):
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as exit_, run_log.RunLog() as log:
            folder = log.open(tmp_path)
            patched.setattr(distributed, "world_size", lambda: 2)
            raise RuntimeError(error)
        assert exit_.value.code == 1 and error in (folder / "debug.log").read_text()
        assert capsys.readouterr().err == "ERROR: another process of the run has ended, so this one ends too\n"


def test_a_line_moves_the_progress_bar_out_of_its_way(capsys):
    with run_log.RunLog(), tqdm(total=9, desc="epoch 1", file=sys.stderr, mininterval=0) as bar:
        bar.update(3)
        logging.getLogger("utils").info("a line")
    assert "\ra line\n" in capsys.readouterr().err.replace(" ", "").replace("aline", "a line")


def test_generators_go_on_where_they_stood():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(3)
    draw()
    states = generator_states()
    expected = draw()
    seed_everything(4)
    restore_generators(states)
    assert draw() == expected


def test_a_gpu_keeps_the_state_of_its_own_generator(monkeypatch):
    """Of the process's own GPU, whatever the number of GPUs of the machine; one that is not there is told."""
    assert generator_states()["cuda"] is None and restore_generators(generator_states())
    state, put_back = torch.arange(16, dtype=torch.uint8), []
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        gpu.setattr(torch.cuda, "get_rng_state", lambda: state)
        gpu.setattr(torch.cuda, "set_rng_state", put_back.append)
        gpu.setattr(distributed, "local_rank", lambda: 1)
        states = generator_states()
        assert restore_generators(states) and torch.equal(put_back[0], state)
        assert restore_generators({**states, "cuda": [state[:8], state[8:]]}) and torch.equal(put_back[1], state[8:])
        assert not restore_generators({**states, "cuda": [state]}), "an earlier version's file, of one GPU"
        assert not restore_generators({**states, "cuda": None}) and len(put_back) == 2
    assert not restore_generators(states)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee ..."),
            "Tried to allocate 2 GiB.); in",
        ),
        (MemoryError(), "out of memory (main memory); in training, --precision bf16, --activation"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--extraction_batch_size 4"),
    ],
)
def test_out_of_memory_is_one_line(tmp_path, capsys, error, words):
    with pytest.raises(SystemExit) as exit_, run_log.RunLog() as log:
        folder = log.open(tmp_path)
        raise error
    shown = capsys.readouterr().err
    assert exit_.value.code == 1 and shown.startswith("ERROR: out of memory (") and shown.count("\n") == 1
    assert words in shown and "Traceback" in (folder / "debug.log").read_text()


def test_gradients_are_clipped_to_their_norm():
    model = Small(False)
    optimization = Optimization(model, optim="sgd", lr=1.0, lr_encoder=1.0, steps_per_epoch=9, clip_grad_norm=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    optimization.backward((model(torch.ones(2, 3)) ** 2).sum())
    optimization.step()
    moved = sum(((p - b) ** 2).sum().item() for p, b in zip(model.parameters(), before, strict=True)) ** 0.5
    assert moved == pytest.approx(0.01, rel=0.1)  # weight decay moves a little too


def test_descriptors_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="descriptors are not finite"):
        nearest(np.full((2, 3), np.nan, dtype="f"), in_chunks(np.eye(3, dtype="f"), [3]), 1)
    with pytest.raises(ValueError, match="descriptors are not finite"):
        nearest(np.eye(3, dtype="f"), in_chunks(np.full((2, 3), np.inf, dtype="f"), [2]), 1)


@pytest.mark.parametrize(("factory", "exact"), [("Flat", True), ("HNSW16", False), ("IVF4,Flat", False)])
def test_an_index_is_compared_with_exact_search(factory, exact, caplog):
    rng = np.random.default_rng(0)
    database = rng.standard_normal((300, 16)).astype("f")
    queries = database[::3] + 0.01 * rng.standard_normal((100, 16)).astype("f")
    chunks = in_chunks(database, [100, 100, 100], rng.permutation(300))
    with caplog.at_level(logging.INFO):
        distances, predictions, (agreement,) = nearest_by_index(queries, lambda: chunks, 300, 5, factory=factory)
    _, expected = nearest(queries, chunks, 5)
    shared = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(predictions, expected, strict=True)])
    assert agreement["first_k"] == pytest.approx(100 * shared) and agreement["queries"] == 100
    assert (agreement["first_k"] == 100) == exact and agreement["nearest"] > 90
    assert f"index {factory} finds the nearest image of" in caplog.text
    found = predictions >= 0
    squared = ((queries[:, None] - database[predictions]) ** 2).sum(axis=2)
    np.testing.assert_allclose(distances[found], squared[found], rtol=1e-3)


@pytest.mark.parametrize(("factory", "parameters"), [("IVF", ""), ("Flat", "nonsense=3"), ("IVF4096,Flat", "")])
def test_an_index_that_cannot_be_made(factory, parameters):
    database = np.random.default_rng(0).standard_normal((300, 16)).astype("f")
    with pytest.raises(ValueError, match=f"FAISS cannot (make|train) --index '{factory}'"):
        nearest_by_index(database, lambda: in_chunks(database, [300]), 300, 5, factory=factory, parameters=parameters)


@pytest.mark.parametrize(("name", "photos"), [("queries", "query"), ("database", "database"), ("pca", "PCA")])
def test_what_changed_since_descriptors_were_kept_is_said_in_words(tmp_path, name, photos):
    """No digests, and no shapes that follow from them."""
    was = {"weights": "1f", "images": "2e", "upright": False, "resize": [56, 56]}
    DescriptorStore(tmp_path, name, (9, 1, 4, 8), fingerprint=was)

    def said(count, **change):
        with pytest.raises(ValueError) as error:
            DescriptorStore(tmp_path, name, (count, 1, 4, 8), fingerprint={**was, **change})
        return str(error.value).split("does not match: ")[1].split("; use the same")[0]

    assert said(9, images="3d") == said(8, images="3d") == f"the {photos} photos have changed"
    assert (
        said(9, weights="0a", images="3d")
        == f"the weights are those of another model; the {photos} photos have changed"
    )
    assert said(9, upright=True) == f"the {photos} photos were not turned as EXIF says and are now"
    assert said(9, resize=[56, 70]) == "--resize was 56 56 and is now 56 70"


@pytest.mark.parametrize(
    ("factory", "parameters", "count", "chunks", "message"),
    [
        ("IVF2000,Flat", "nprobe=3", 5000, 1, ""),  # needs more than are tried at first
        ("IVF65536,PQ8", "", 1_000_000, 50, ""),  # and more than are ever tried
        ("PCA16,IVF4,SQ8", "nprobe=2", 40, 1, ""),
        ("NSG8", "", 5000, 1, ""),
        ("NSG8", "", 5000, 2, "does not support incremental addition"),
        ("IVF6000,Flat", "", 5000, 1, "at most 5000 lists"),
        ("IVF4,Flat", "nprobe=-1", 5000, 1, "nprobe"),
    ],
)
def test_an_index_is_tried_as_it_will_be_used(factory, parameters, count, chunks, message):
    settings = {"dim": 32, "count": count, "chunks": chunks, "k": 5}
    if not message:
        require_index(factory, parameters, **settings)
    else:
        with pytest.raises(ValueError, match=message):
            require_index(factory, parameters, **settings)


def test_faiss_errors_of_exact_search_are_errors_of_ours(monkeypatch):
    def fails(*_):
        raise RuntimeError(
            "Error in virtual void* faiss::f(int) at /x/GpuResources.cpp:530: Error: 'err' failed: no memory"
        )

    monkeypatch.setattr("faiss.knn", fails)
    with pytest.raises(ValueError, match="^FAISS cannot search exactly: 'err' failed: no memory"):
        nearest(np.eye(3, dtype="f"), in_chunks(np.eye(3, dtype="f"), [3]), 1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_store_gives_back_what_was_written(tmp_path, dtype):
    rows = np.random.default_rng(0).standard_normal((9, 2, 3)).astype(dtype).astype("f")
    settings = {"shape": (9, 2, 3), "dtype": dtype, "fingerprint": {"weights": "a"}}
    store = DescriptorStore(tmp_path / "s", "database", **settings)
    assert store.missing().tolist() == list(range(9)) and len(store) == 9
    store.write(np.array([4, 5, 8]), rows[[4, 5, 8]])
    again = DescriptorStore(tmp_path / "s", "database", **settings)
    assert again.missing().tolist() == [0, 1, 2, 3, 6, 7]
    again.write(again.missing(), rows[again.missing()])
    for indices in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 3, 4, 5, 0], [2]):
        np.testing.assert_array_equal(again.read(np.array(indices)), rows[indices])
    np.testing.assert_array_equal(np.load(tmp_path / "s" / "database.npy"), rows)
    assert np.load(tmp_path / "s" / "database.npy").dtype == dtype
    for change, words in (
        ({"shape": (8, 2, 3)}, "the shape was 9 2 3 and is now 8 2 3"),
        ({"dtype": "int8"}, f"--descriptor_dtype was {dtype} and is now int8"),
        ({"fingerprint": {"weights": "b"}}, "the weights are those of another model"),
    ):
        with pytest.raises(ValueError, match=f"database.npy does not match: {words}; use the same"):
            DescriptorStore(tmp_path / "s", "database", **{**settings, **change})
    assert not DescriptorStore(tmp_path / "s", "database", **settings).missing().size, "refusing touched nothing"


def test_a_store_without_a_fingerprint_starts_empty(tmp_path):
    for _ in range(2):
        store = DescriptorStore(tmp_path, "x", (3, 2))
        assert len(store.missing()) == 3
        store.write(np.arange(3), np.ones((3, 2), dtype="f"))


def test_digests_tell_weights_and_paths_apart():
    state = {"a": torch.ones(2), "b": torch.zeros(1, dtype=torch.int64)}
    assert digest(state) == digest({name: value.clone() for name, value in state.items()})
    assert (
        len({digest(state), digest({**state, "a": torch.tensor([1.0, 2.0])}), digest(["x", "y"]), digest(["xy"])}) == 4
    )


def test_results_hold_what_they_depend_on(tmp_path):
    run_log.write_results(tmp_path, {"recalls": {1: 27.0}}, {"seed": 0, "path": tmp_path}, torch.device("cpu"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["recalls"] == {"1": 27.0} and results["options"] == {"seed": 0, "path": str(tmp_path)}
    assert {"torch", "faiss", "device", "version", "git"} <= results["environment"].keys()


def test_seeding_covers_every_generator():
    draws = []
    for _ in range(2):
        seed_everything(5)
        draws.append((np.random.rand(), torch.rand(1).item(), random.random()))
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    ("value", "flag"),
    [
        (True, "--name"),
        (False, "--no-name"),
        (None, "--name none"),
        ((56, 70), "--name 56 70"),
        (Path("my photos"), "--name 'my photos'"),
        (1e-4, "--name 0.0001"),
    ],
)
def test_options_are_shown_as_they_are_typed(value, flag):
    assert run_log.as_flag("name", value) == flag


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="--device cuda: PyTorch sees no CUDA GPU"):
        pick_device("cuda")


def test_estimated_hours_grow_with_the_images():
    backbone = build_model(backbone="dino_tiny").backbone
    assert estimated_hours(backbone, size=(56, 56), images=3_600_000) > 0.1


@pytest.mark.drawn
def test_the_curves_of_a_run(tmp_path):
    for epoch in (1, 2):
        metrics.append_row(tmp_path, {"epoch": epoch, "steps": 4, "loss": 1 / epoch, "lr": 1e-5, "R@1": 40.0 * epoch})
        report.draw_training(tmp_path)
    with Image.open(tmp_path / "training.png") as image:
        assert image.size == (1080, 432) and len(image.convert("RGB").getcolors(100_000)) > 10


def test_shares_are_neighbours_and_keep_units_whole(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert distributed.shares(7) == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert distributed.shares(2) == [slice(0, 1), slice(1, 2), slice(2, 2)]
    assert distributed.shares(0) == 3 * [slice(0, 0)]
    assert distributed.shares(70, unit=16) == [slice(0, 32), slice(32, 64), slice(64, 70)]
    assert distributed.shares(10, unit=16) == [slice(0, 10), slice(10, 10), slice(10, 10)]


@pytest.mark.parametrize(
    ("rank", "unit", "own"), [(0, 1, [0, 1, 2, 3]), (1, 1, [4, 5, 6]), (1, 4, [4, 5, 6]), (1, 7, [])]
)
def test_each_process_computes_the_rows_of_its_share(monkeypatch, rank, unit, own):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "gather_rows", lambda rows: rows)  # as it does in all but the main process
    assert distributed.gather_shares(7, lambda share: np.arange(7)[share], unit).tolist() == own
