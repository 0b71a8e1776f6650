"""What DINOv2 and DINOv3 share: patch embedding, transformer blocks, and all that does not depend on the family.

Shapes: B images, H x W pixels, h x w patches, T tokens (class token, registers, h*w patches), C channels, nh heads of
hs channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .sizes import BackboneSize, require_patches


class PatchEmbed(nn.Module):
    """Cuts the image into square patches and projects each to C channels: B x 3 x H x W to B x h*w x C."""

    def __init__(self, channels: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, channels, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, h*w, C)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates each pair of channels (i, i + hs/2) of a head by the angle of its token, in fp32.

    Args:
        x: B x nh x T x hs.
        rotation: cosines and sines of the angles, 2 x T x hs/2.
    """
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)  # (B, nh, T, hs/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, B x T x C to B x T x C; queries and keys may be rotated by position.

    `qkv` is the class of the layer that computes queries, keys and values.
    """

    def __init__(self, channels: int, heads: int, qkv: type[nn.Linear] = nn.Linear):
        super().__init__()
        self.heads = heads
        self.qkv = qkv(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # 3 x (B, nh, T, hs)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, nh, T, hs)
        return self.proj(x.transpose(1, 2).reshape(B, T, C))


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Adds a branch to the residual stream, with a learned factor for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(x, branch, self.gamma)  # x + branch * gamma in one pass over memory


class Block(nn.Module):
    """A pre-norm transformer block, B x T x C to B x T x C."""

    def __init__(self, channels: int, *, attn: Attention, mlp: nn.Module, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=eps)
        self.attn = attn
        self.ls1 = LayerScale(channels)
        self.norm2 = nn.LayerNorm(channels, eps=eps)
        self.mlp = mlp
        self.ls2 = LayerScale(channels)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        x = self.ls1(x, self.attn(self.norm1(x), rotation))
        return self.ls2(x, self.mlp(self.norm2(x)))


def run_blocks(blocks: nn.ModuleList, x: Tensor, rotation: Tensor | None = None, *, checkpointing: bool) -> Tensor:
    """Runs tokens B x T x C through all blocks; with `checkpointing`, trained blocks keep only their input."""
    for block in blocks:
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in block.parameters())
        if trained and checkpointing:  # a block draws no random numbers
            x = checkpoint(block, x, rotation, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, rotation)
    return x


def grid_of(images: Tensor, size: BackboneSize) -> tuple[int, int]:
    """Number of patches h x w of images B x 3 x H x W; ValueError unless H and W are multiples of the patch size."""
    H, W = images.shape[-2:]
    require_patches("image size", (H, W), size)
    return H // size.patch_size, W // size.patch_size


class Backbone(nn.Module):
    """What both families do: images to a grid of local features. `size` is one of the values of `BACKBONES`."""

    blocks: nn.ModuleList
    mask_token: nn.Parameter  # only pre-training uses it; it is here because the official files have it

    def __init__(self, size: BackboneSize):
        super().__init__()
        self.size = size
        # Whether trained blocks keep only their input, and are recomputed in the backward pass: less memory, a quarter
        # more time.
        self.activation_checkpointing = False

    @property
    def channels(self) -> int:
        """Channels of a local feature, C."""
        return self.size.channels

    def freeze(self, freeze_te: int | None) -> None:
        """Trains the blocks from index `freeze_te` on; None trains everything but the mask token, which has no effect.

        Layers below the first trained block keep no activations.
        """
        count = len(self.blocks)
        if freeze_te is not None and not 0 <= freeze_te <= count:
            told = f"freeze_te {freeze_te} freezes more than the {count} blocks of this backbone"
            raise ValueError(f"{told}; use 0 to {count}, or none to train everything")
        self.requires_grad_(freeze_te is None)
        if freeze_te is not None:
            self.blocks[freeze_te:].requires_grad_(True)
        self.mask_token.requires_grad_(False)

    def compile_blocks(self) -> None:
        """Compiles the blocks with torch.compile at their first call; equal blocks share a compiled program.

        Inference, frozen blocks, trained blocks, batches of one and each precision are compiled separately.
        """
        torch._dynamo.config.recompile_limit = 32  # beyond it, blocks run uncompiled
        for block in self.blocks:
            block.compile(dynamic=True)

    def tokens(self, images: Tensor) -> Tensor:
        """The tokens after the final norm, for normalised images B x 3 x H x W: B x T x C, patches last."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Local features of images B x 3 x H x W, normalised by ImageNet's mean and standard deviation.

        Returns:
            B x C x h x w, the patch tokens after the final norm, on their grid.
        """
        h, w = grid_of(images, self.size)
        patches = self.tokens(images)[:, 1 + self.size.registers :]  # (B, h*w, C)
        return patches.transpose(1, 2).reshape(images.shape[0], self.channels, h, w)
