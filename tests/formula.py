"""Weights and inputs that a formula gives, as the golden archives were made with (tests/golden)."""

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model import SuperVLADNet, build_model
from model.dinov2 import DINOv2
from model.dinov3 import DINOv3
from model.sizes import BackboneSize

GOLDEN = Path(__file__).parent / "golden"


def golden(archive: str) -> dict[str, np.ndarray]:
    """Outputs of the released code."""
    return dict(np.load(GOLDEN / f"{archive}.npz"))


def normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


@cache
def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith(".bias_mask"):
        return torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(shape[0] // 3)
    if name.endswith(".periods"):
        return torch.from_numpy(100 ** (2 * np.arange(16) / 32)).float()
    r = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    *_, owner, leaf = ("", *name.split("."))
    if leaf == "gamma" or (leaf == "weight" and "norm" in owner):
        r = 1 + np.float32(0.1) * r
    elif name == "aggregation.conv.weight":
        r = 3 * r
    elif name == "backbone.pos_embed":
        r = np.float32(0.1) * r
    else:
        r = np.float32(0.02 if r.ndim < 2 else 0.04) * r
    return torch.from_numpy(r)


def formula_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a module with the weights that its parameters' names, after `prefix`, give."""
    return {name: _weight(prefix + name, tuple(value.shape)).clone() for name, value in module.state_dict().items()}


def formula_model(**options) -> SuperVLADNet:
    """`build_model` with the formula's weights."""
    with torch.device("meta"):  # drawing random weights only to replace them takes seconds for ViT-B
        model = build_model(**options)
    model.load_state_dict(formula_state(model), assign=True)
    return model


@contextmanager
def each_batch_once() -> Iterator[None]:
    """Within the block, DINOv2 backbones of equal weights compute each batch of images once between them.

    The backbone is the same in all models that `formula_model` makes, and nearly all of a ViT-B's time.
    """
    seen, real = {}, DINOv2.tokens

    def tokens(self, images):
        weights = self.size, self.pos_embed.sum().item(), self.blocks[-1].attn.proj.weight.sum().item()
        batch = tuple(images.shape), hashlib.sha256(images.numpy()).digest()
        if (weights, batch) not in seen:
            seen[weights, batch] = real(self, images)
        return seen[weights, batch].clone()

    DINOv2.tokens = tokens
    try:
        yield
    finally:
        DINOv2.tokens = real


def formula_backbone(size: BackboneSize) -> DINOv2 | DINOv3:
    """A backbone by itself, with the weights that it has inside the whole model."""
    with torch.device("meta"):
        backbone = (DINOv3 if size.family == "DINOv3" else DINOv2)(size)
    backbone.load_state_dict(formula_state(backbone, "backbone."), assign=True)
    return backbone
