"""Optimisers, schedules and the cross-image encoder's one step, against PyTorch's own and by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from model.loss import MinedMultiSimilarity
from parser import Recipe
from utils.run.optimization import Optimization

RATES = {"lr": 8e-5, "lr_encoder": 4e-4}


class Small(nn.Module):
    def __init__(self, encoder=True):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.encoder = nn.Linear(3, 3) if encoder else None

    def forward(self, x):
        x = self.body(x)
        return x if self.encoder is None else self.encoder(x)


def optimization_of(model=None, *, steps_per_epoch=10, scale_gradients=False, encoder_retired=False, **recipe):
    others = {"scale_gradients": scale_gradients, "encoder_retired": encoder_retired}
    return Optimization(model or Small(), Recipe(**RATES | recipe), steps_per_epoch=steps_per_epoch, **others)


def steps(model, optimization, count):
    """Takes steps; by how much each parameter moved at most, step for step."""
    moved = []
    for _ in range(count):
        before = [p.detach().clone() for p in model.parameters()]
        optimization.backward((model(torch.ones(2, 3)) ** 2).sum())
        optimization.step()
        moved.append([(p - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True)])
    return moved


def overflowing(model, optimization, factors):
    """Steps whose loss is multiplied: infinity and NaN overflow."""
    for factor in factors:
        optimization.backward(model(torch.ones(2, 3)).sum() * factor)
        optimization.step()


def test_released_encoder_training_is_one_step_also_after_a_resume():
    model = Small()
    optimization = optimization_of(model, lr=5e-5, lr_encoder=1e-4)
    ((*body, weight, bias),) = steps(model, optimization, 1)
    assert [*body, weight, bias] == pytest.approx([5e-5, 5e-5, 1.5e-4, 1.5e-4], rel=1e-2)
    assert optimization.encoder_retired
    again = Small()
    again.load_state_dict(model.state_dict())
    resumed = optimization_of(again, lr=5e-5, lr_encoder=1e-4, encoder_retired=True)
    resumed.load_state_dict(copy.deepcopy(optimization.state_dict()))
    for moved in steps(again, resumed, 2):
        assert moved[0] > 0 and moved[2:] == [0, 0]
    steps(model, optimization, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_every_step_has_its_own_rate_and_one_owner_a_parameter():
    model = Small()
    optimization = optimization_of(model, encoder_training="every_step")
    for moved in steps(model, optimization, 3):
        assert moved[0] > 0 and moved[2] > 0
    owned = [id(p) for group in optimization.optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) == 4
    assert [group["lr"] for group in optimization.optimizer.param_groups] == [8e-5, 4e-4]


def test_rates_halve_every_third_epoch():
    model = Small()
    optimization = optimization_of(model, encoder_training="every_step", steps_per_epoch=2)
    rates = []
    for _ in range(13):
        rates.append(tuple(group["lr"] for group in optimization.optimizer.param_groups))
        steps(model, optimization, 1)
    np.testing.assert_allclose(rates, [(8e-5, 4e-4)] * 6 + [(4e-5, 2e-4)] * 6 + [(2e-5, 1e-4)])


TORCH_SCHEDULES = {  # of 12 steps less the warm-up, four an epoch
    "halving": lambda optimizer, _: lr_scheduler.StepLR(optimizer, 12, 0.5),
    "linear": lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps),
    "cosine": lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps),
}


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("name", TORCH_SCHEDULES)
def test_schedules_are_those_of_pytorch(name, warmup, recwarn):
    model = Small()
    settings = {"encoder_training": "every_step", "steps_per_epoch": 4, "epochs_num": 3}
    settings |= {"lr_schedule": name, "warmup_steps": warmup}
    optimization = optimization_of(model, **settings)
    theirs = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in RATES.values()])
    scheduler = TORCH_SCHEDULES[name](theirs, 12 - warmup)
    if warmup:
        rising = lr_scheduler.LinearLR(theirs, 1 / (warmup + 1), total_iters=warmup)
        scheduler = lr_scheduler.SequentialLR(theirs, [rising, scheduler], [warmup])
    for step in range(12):
        expected = [group["lr"] for group in theirs.param_groups]
        rates = [group["lr"] for group in optimization.optimizer.param_groups]
        np.testing.assert_allclose(rates, expected, rtol=1e-12)
        if step < warmup:
            np.testing.assert_allclose(rates[0], 8e-5 * (step + 1) / (warmup + 1))
        steps(model, optimization, 1)
        theirs.step()
        scheduler.step()
        if step == 6:  # goes on in another process
            state = optimization.state_dict()
            optimization = optimization_of(model, **settings)
            optimization.load_state_dict(state)
    if name != "halving":
        assert optimization.lr == pytest.approx(0, abs=1e-18)
        steps(model, optimization, 3)  # steps that were skipped before may leave the schedule behind, never ahead
        assert optimization.lr == pytest.approx(0, abs=1e-18)
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_skipped_step_is_none_of_any_schedule(name):
    model = Small()
    optimization = optimization_of(model, steps_per_epoch=4, epochs_num=1, lr_schedule=name, scale_gradients=True)
    overflowing(model, optimization, (float("inf"), 1.0, float("nan"), 1.0))
    assert optimization.skipped == 2 and optimization.lr == pytest.approx(4e-5), "half of four steps"


def test_a_skipped_step_is_counted_also_after_a_resume_and_retires_no_encoder(caplog, recwarn):
    model = Small()
    optimization = optimization_of(model, steps_per_epoch=1, scale_gradients=True)
    caplog.set_level("INFO")
    overflowing(model, optimization, [float("inf")])
    assert not optimization.encoder_retired
    overflowing(model, optimization, (1.0, float("nan"), 1.0, 1.0))
    assert optimization.encoder_retired
    assert optimization.skipped == 2 and "step skipped (2 so far): its gradients overflowed" in caplog.text
    assert optimization.lr == 4e-5, "three steps of one an epoch"
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]
    again = optimization_of(steps_per_epoch=1, scale_gradients=True, encoder_retired=True)
    again.load_state_dict(optimization.state_dict())
    assert again.skipped == 2 and again.lr == 4e-5


def test_a_warm_up_that_leaves_no_step():
    settings = {"steps_per_epoch": 4, "epochs_num": 2, "lr_schedule": "cosine"}
    with pytest.raises(ValueError, match="warmup_steps 8 "):
        optimization_of(**settings, warmup_steps=8)
    optimization_of(**{**settings, "epochs_num": 0}, warmup_steps=8)  # nothing is trained
    optimization_of(**settings, warmup_steps=7)


@pytest.mark.parametrize(("optim", "default"), [("adam", 0), ("adamw", 9.5e-9), ("sgd", 1e-3)])
def test_weight_decay_is_of_all_weights(optim, default):
    for given, decay in ({"weight_decay": 0.05}, 0.05), ({"weight_decay": 0.0}, 0), ({}, default):
        groups = optimization_of(optim=optim, encoder_training="every_step", **given).optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [decay, decay]
        assert optim != "sgd" or groups[0]["momentum"] == 0.9


def test_the_machine_says_which_kernels_step_not_the_file():
    """A checkpoint of a CPU is gone on from with fused steps on a GPU, and the other way round."""
    for fused_there, fused_here in ((True, None), (None, True)):
        there, here = (optimization_of(encoder_training="every_step") for _ in range(2))
        for optimization, fused in ((there, fused_there), (here, fused_here)):
            for group in optimization.optimizer.param_groups:
                group["fused"] = fused
        state = there.state_dict()
        here.load_state_dict(state)
        assert [group["fused"] for group in here.optimizer.param_groups] == [fused_here] * 2
        assert [group["fused"] for group in state["optimizer"]["param_groups"]] == [fused_there] * 2


def test_a_large_loss_does_not_overflow_the_scale():
    """65,536 at the start, times the number of processes: fp16 would hold neither."""
    descriptors = nn.functional.normalize(torch.randn(8, 16), dim=1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = MinedMultiSimilarity()(descriptors, torch.arange(4).repeat_interleave(2))
    torch.amp.GradScaler("cpu").scale(loss * 2).backward()
    assert loss > 0.5 and descriptors.grad.isfinite().all()


def test_gradients_are_clipped_to_their_norm():
    model = Small(False)
    optimization = optimization_of(model, optim="sgd", lr=1.0, clip_grad_norm=0.01)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    steps(model, optimization, 1)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert moved.norm().item() == pytest.approx(0.01, rel=0.1)  # weight decay moves a little too
