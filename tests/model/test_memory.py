"""What saves memory computes the same step, and keeps less for the backward pass."""

import pytest
import torch
from torch import nn

from model import build_model
from model.loss import MinedMultiSimilarity


def step(images, labels, *, chunk=0, activation_checkpointing=False, freeze_te, **settings):
    """Loss, gradients by name, the backbone's batch sizes, and the bytes that the forward pass kept but for weights."""
    torch.manual_seed(0)
    model = build_model(backbone_blocks=4, **settings).train()
    model.backbone.freeze(freeze_te)
    model.backbone.activation_checkpointing = activation_checkpointing
    model.grad_cache_chunk = chunk
    sizes, storages = [], {}
    model.backbone.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)  # the encoder's dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = MinedMultiSimilarity()(model(images), labels)
    kept = sum(storages.values())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sizes, kept


@pytest.mark.parametrize(("backbone", "side"), [("dino_tiny", 56), ("dinov3_tiny", 64)])
@pytest.mark.parametrize(("crossimage_encoder", "freeze_te"), [(False, None), (True, 2)])
def test_the_step_is_the_plain_one(backbone, side, crossimage_encoder, freeze_te):
    images, labels = torch.randn(24, 3, side, side), torch.arange(6).repeat_interleave(4)
    settings = {"backbone": backbone, "crossimage_encoder": crossimage_encoder, "freeze_te": freeze_te}
    loss, gradients, _, kept = step(images, labels, **settings)
    for chunk, activation_checkpointing in ((5, False), (0, True), (8, True)):
        saving = {"chunk": chunk, "activation_checkpointing": activation_checkpointing}
        other_loss, other_gradients, sizes, other_kept = step(images, labels, **settings, **saving)
        assert other_loss == pytest.approx(loss, abs=1e-6)
        assert other_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (other_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name
        if chunk:
            assert max(sizes) == chunk and sum(sizes) == 2 * 24, "each image twice, a chunk at a time"
        if freeze_te is None:
            assert other_kept < 0.5 * kept
