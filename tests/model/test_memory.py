"""What saves memory computes the same step."""

import pytest
import torch
from torch import nn

from model import build_model
from model.loss import MinedMultiSimilarity


def step(images, labels, *, encoder, backbone="dino_tiny", freeze_te=8, chunk=0, activation_checkpointing=False):
    """Loss, gradients by name, and the most that the step kept for the backward pass at a time, in numbers."""
    torch.manual_seed(0)
    model = build_model(backbone=backbone, crossimage_encoder=encoder).train()
    model.backbone.freeze(freeze_te)
    model.backbone.activation_checkpointing = activation_checkpointing
    model.grad_cache_chunk = chunk
    seen = []
    model.backbone.register_forward_hook(lambda _, inputs, __: seen.append((len(inputs[0]), torch.is_grad_enabled())))
    torch.manual_seed(1)  # the encoder's dropout
    loss = MinedMultiSimilarity()(model(images), labels)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, seen


@pytest.mark.parametrize(("backbone", "side"), [("dino_tiny", 56), ("dinov3_tiny", 64)])
@pytest.mark.parametrize(("encoder", "freeze_te"), [(False, None), (True, 8)])
@pytest.mark.parametrize(
    "saving", [{"chunk": 5}, {"activation_checkpointing": True}, {"chunk": 8, "activation_checkpointing": True}]
)
def test_the_step_is_the_plain_one(backbone, side, encoder, freeze_te, saving):
    images, labels = torch.randn(24, 3, side, side), torch.arange(6).repeat_interleave(4)
    settings = {"backbone": backbone, "encoder": encoder, "freeze_te": freeze_te}
    loss, gradients, _ = step(images, labels, **settings)
    other_loss, other_gradients, seen = step(images, labels, **settings, **saving)
    assert other_loss == pytest.approx(loss, abs=1e-6)
    assert other_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (other_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name
    if chunk := saving.get("chunk"):
        sizes = [size for size, _ in seen]
        assert max(sizes) == chunk and sum(sizes) == 2 * 24, "each image twice, a chunk at a time"


@pytest.mark.parametrize("saving", [{"chunk": 4}, {"activation_checkpointing": True}])
def test_less_is_kept_for_the_backward_pass(saving):
    """Counts what autograd saves during the forward pass, weights left out."""
    images, labels = torch.randn(16, 3, 56, 56), torch.arange(4).repeat_interleave(4)

    def kept(**settings):
        storages = {}

        def pack(tensor):
            if not isinstance(tensor, nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step(images, labels, encoder=False, freeze_te=None, **settings)
        return sum(storages.values())

    assert kept(**saving) < 0.5 * kept()
