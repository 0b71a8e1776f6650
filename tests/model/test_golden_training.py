"""Loss, gradients and three training steps equal the released code's, the encoder's odd one step included."""

import numpy as np
import pytest
import torch
from formula import formula_model, golden, normal
from torch.nn import functional as F

from model.loss import MinedMultiSimilarity
from parser import Recipe
from utils.run.optimization import Optimization
from utils.system.device import allow_tf32

pytestmark = pytest.mark.slow

REFERENCE = golden("reference")
TRAINING = golden("training")


def test_loss_and_its_gradient():
    x = normal(31, (24, 64)) + 0.5 * normal(32, (6, 64)).repeat_interleave(4, dim=0)
    x = F.normalize(x, dim=1).requires_grad_()
    loss = MinedMultiSimilarity()(x, torch.arange(6).repeat_interleave(4))
    loss.backward()
    np.testing.assert_allclose(loss.item(), REFERENCE["loss/value"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), REFERENCE["loss/grad"], rtol=0, atol=1e-5)


def test_three_steps():
    """Without and with the encoder; the frozen blocks, which are the same, pass each batch once."""
    frozen = []
    for name in ("plain", "crossimage"):
        model = formula_model(crossimage_encoder=name == "crossimage").train()
        blocks = model.backbone.blocks
        if not frozen:
            hook = blocks[7].register_forward_hook(lambda *call: frozen.append(call[2]))
            take_three_steps(model, name)
            hook.remove()
        else:
            for block in blocks[:7]:
                block.forward = lambda x, _: x
            blocks[7].forward = lambda *_: frozen.pop(0)
            take_three_steps(model, name)


def take_three_steps(model, name):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    model.backbone.freeze(8)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    optimization = Optimization(model, Recipe(), steps_per_epoch=1000)
    loss_of = MinedMultiSimilarity()
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    losses, encoder_moved = [], []
    for step in range(3):
        scene = normal(500 + step, (3, 3, 224, 224)).repeat_interleave(2, dim=0)
        loss = loss_of(model(scene + 0.7 * normal(600 + step, (6, 3, 224, 224))), labels)
        optimization.backward(loss)
        if step == 0:
            require_close({key: p.grad for key, p in model.named_parameters() if p.grad is not None}, name, "grad")
        optimization.step()
        losses.append(loss.item())
        moved = {key: value.detach() - start[key] for key, value in model.named_parameters()}
        encoder_moved.append(max((d.abs().max().item() for key, d in moved.items() if "encoder" in key), default=0))
    np.testing.assert_allclose(losses, TRAINING[f"train/{name}/loss"], rtol=0, atol=1e-5)
    require_close({key: delta for key, delta in moved.items() if delta.any()}, name, "delta")
    if name == "crossimage":
        expected_moved = TRAINING["train/crossimage/encoder_max_delta_from_start"]
        np.testing.assert_allclose(encoder_moved, expected_moved, rtol=0, atol=1e-6)


def require_close(tensors, name, kind):
    """The same names, and their norms."""
    prefix = f"train/{name}/{kind}_norm/"
    expected = {key.removeprefix(prefix): float(norm) for key, norm in TRAINING.items() if key.startswith(prefix)}
    assert {key: tensor.norm().item() for key, tensor in tensors.items()} == pytest.approx(expected, rel=1e-3)


def trained_kind(places=24, images=4, dim=3072):
    """Descriptors as of a trained model: 0.66 alike within a place, 0.53 across; an untrained model hides what
    precision does."""
    shared, own = torch.randn(1, 1, dim), torch.randn(places, 1, dim)
    noise = torch.randn(places, images, dim)
    descriptors = F.normalize((0.53**0.5 * shared + 0.13**0.5 * own + 0.34**0.5 * noise).flatten(0, 1), dim=1)
    return descriptors, torch.arange(places).repeat_interleave(images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_mining_are_exact_in_mixed_precision(dtype):
    descriptors, labels = trained_kind()
    similarity = descriptors @ descriptors.T
    same = labels[:, None] == labels
    assert similarity[~same].mean() == pytest.approx(0.53, abs=0.02)
    assert similarity[same & ~torch.eye(96, dtype=bool)].mean() == pytest.approx(0.66, abs=0.02)

    def gradient(criterion, context):
        x = descriptors.clone().requires_grad_()
        with context:
            loss = criterion(x, labels)
        loss.backward()
        return loss, x.grad, getattr(criterion, "mined_pairs", None)

    mixed = torch.autocast("cpu", dtype=dtype)
    loss, expected, mined = gradient(MinedMultiSimilarity(), torch.autocast("cpu", enabled=False))
    inside = gradient(MinedMultiSimilarity(), mixed)
    assert inside[0].dtype == torch.float32 and inside[0] == loss and inside[2] == mined > 0
    assert torch.equal(inside[1], expected)
    # What it guards against is the library's loss under autocast.
    parts = MinedMultiSimilarity()
    _, off, _ = gradient(lambda x, y: parts.loss(x, y, parts.miner(x, y)), mixed)
    assert (off - expected).norm() > 0.05 * expected.norm()


def test_the_loss_takes_no_tf32_and_leaves_it_as_it_was():
    seen, criterion = [], MinedMultiSimilarity()
    criterion.loss.distance.register_forward_hook(lambda *_: seen.append(torch.backends.cuda.matmul.allow_tf32))
    allow_tf32(True)
    try:
        criterion(*trained_kind())
        assert seen == [False] and torch.backends.cuda.matmul.allow_tf32
    finally:
        allow_tf32(False)


def test_a_loss_without_a_gradient():
    assert MinedMultiSimilarity()(*trained_kind()) > 0
    far = torch.eye(6).requires_grad_()  # each place alike within itself, all others at a right angle
    criterion = MinedMultiSimilarity()
    loss = criterion(far[[0, 0, 1, 1, 2, 2]], torch.tensor([0, 0, 1, 1, 2, 2]))
    loss.backward()
    assert loss == 0 and criterion.mined_pairs == 0 and not far.grad.any()
