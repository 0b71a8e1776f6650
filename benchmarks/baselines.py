"""How the released code does each stage, written out to compare with: not used by anything but the benchmarks."""

import types

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms as T

from model.vit import rotated

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

TO_NORMALISED = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
TRAINING = T.Compose(
    [
        T.Resize((224, 224), interpolation=T.InterpolationMode.BILINEAR),
        T.RandAugment(num_ops=3, interpolation=T.InterpolationMode.BILINEAR),
        T.ToTensor(),
        T.Normalize(MEAN, STD),
    ]
)


def evaluation_input(path: str, size: tuple[int, int] = (322, 322)) -> Tensor:
    """Pillow, full-size floats, normalised, then resized."""
    with Image.open(path) as image:
        pixels = TO_NORMALISED(image.convert("RGB"))
    return T.functional.resize(pixels, list(size), antialias=False)


def evaluation_batch(paths: list[str], size: tuple[int, int]) -> Tensor:
    """Photos through the evaluation's pipeline, one by one."""
    return torch.stack([evaluation_input(path, size) for path in paths])


def training_input(path: str) -> Tensor:
    """Pillow, its resize, RandAugment, floats, normalised."""
    with Image.open(path) as image:
        return TRAINING(image.convert("RGB"))


def explicit_attention(self: nn.Module, x: Tensor, rotation: Tensor | None = None) -> Tensor:
    """In place of `model.vit.Attention.forward`: the attention matrix as a tensor."""
    B, tokens, C = x.shape
    qkv = self.qkv(x).reshape(B, tokens, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0] * (C // self.heads) ** -0.5, qkv[1], qkv[2]
    if rotation is not None:
        q, k = rotated(q, rotation), rotated(k, rotation)
    attention = (q @ k.transpose(-2, -1)).softmax(dim=-1)
    return self.proj((attention @ v).transpose(1, 2).reshape(B, tokens, C))


def attend_explicitly(backbone: nn.Module) -> None:
    """Gives all blocks of a backbone `explicit_attention`."""
    for block in backbone.blocks:
        block.attn.forward = types.MethodType(explicit_attention, block.attn)


def cluster_loop(features: Tensor, weight: Tensor, clusters: int) -> Tensor:
    """The VLAD layer, one cluster at a time: features B x D x h x w, weight (K+G) x D x 1 x 1, to B x K*D."""
    features = F.normalize(features, dim=1)
    assignment = F.conv2d(features, weight).flatten(2).softmax(dim=1)  # (B, K+G, h*w)
    features = features.flatten(2)  # (B, D, h*w)
    vlad = torch.zeros(len(features), len(weight), features.shape[1], device=features.device)
    for cluster in range(len(weight)):
        vlad[:, cluster] = (features * assignment[:, cluster, None]).sum(dim=2)
    return F.normalize(F.normalize(vlad[:, :clusters], dim=2).flatten(1), dim=1)
