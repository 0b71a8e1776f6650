"""The DINOv3 vision transformers (Siméoni et al. 2025) with the parameter names of the official weight files.

Unlike DINOv2: patches of 16 x 16 pixels; rotary position embedding instead of a learned one, so that any grid works;
always registers; a mask on the bias of queries, keys and values. The random rescaling of coordinates in DINOv3's own
training is left out: blocks that are recomputed in the backward pass would see another one.

Shapes: B images, H x W pixels, h x w = H/16 x W/16 patches, T tokens (class token, registers, h*w patches),
C channels, heads of hs channels.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .sizes import BackboneSize
from .vit import Attention, Backbone, Block, Mlp, PatchEmbed, grid_of, run_blocks


class MaskedQkv(nn.Linear):
    """Queries, keys and values; the bias is multiplied by a mask from the weight file, so that keys have none."""

    bias_mask: Tensor

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels)
        queries, keys, values = torch.ones(3, channels).unbind()
        self.register_buffer("bias_mask", torch.cat((queries, 0 * keys, values)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class RotaryEmbedding(nn.Module):
    """The rotary angles of the patches of a grid, for heads of hs channels."""

    periods: Tensor

    def __init__(self, head_channels: int):
        super().__init__()
        exponents = torch.arange(head_channels // 4) * 4 / head_channels
        self.register_buffer("periods", 100.0**exponents)  # (hs/4,)

    def forward(self, h: int, w: int, unmoved: int) -> Tensor:
        """Cosines and sines for h x w patches after `unmoved` tokens, which are not rotated.

        Returns:
            2 x (unmoved + h*w) x hs/2, fp32: first the angles of the rows, then those of the columns.
        """
        device = self.periods.device
        rows, columns = (2 * (torch.arange(n, device=device) + 0.5) / n - 1 for n in (h, w))  # centres, in -1..1
        frequencies = 2 * math.pi / self.periods.float()
        y = (rows[:, None] * frequencies)[:, None].expand(h, w, -1)
        x = (columns[:, None] * frequencies)[None].expand(h, w, -1)
        angles = F.pad(torch.cat((y, x), dim=-1).flatten(0, 1), (0, 0, unmoved, 0))  # (unmoved + h*w, hs/2)
        return torch.stack((angles.cos(), angles.sin()))


class DINOv3(Backbone):
    """A DINOv3 vision transformer that turns images into a grid of local features.

    Source: the paper, and the names in the `dinov3_vit*16_pretrain_*.pth` files, which load with strict=True.
    """

    def __init__(self, size: BackboneSize):
        super().__init__(size)
        C = size.channels
        self.cls_token = nn.Parameter(torch.empty(1, 1, C))
        self.storage_tokens = nn.Parameter(torch.empty(1, size.registers, C))
        self.mask_token = nn.Parameter(torch.zeros(1, C), requires_grad=False)
        self.rope_embed = RotaryEmbedding(C // size.heads)
        self.patch_embed = PatchEmbed(C, size.patch_size)
        self.blocks = nn.ModuleList(
            Block(C, attn=Attention(C, size.heads, qkv=MaskedQkv), mlp=Mlp(C), eps=1e-5)
            for _ in range(size.kept_blocks)
        )
        self.norm = nn.LayerNorm(C, eps=1e-5)
        # Published weights replace these. Tokens that start equal would stay equal.
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.storage_tokens, std=0.02)

    def tokens(self, images: Tensor) -> Tensor:
        """See `Backbone`."""
        B = images.shape[0]
        h, w = grid_of(images, self.size)
        front = self.cls_token.expand(B, -1, -1), self.storage_tokens.expand(B, -1, -1)
        x = torch.cat((*front, self.patch_embed(images)), dim=1)
        rotation = self.rope_embed(h, w, unmoved=1 + self.size.registers)
        return self.norm(run_blocks(self.blocks, x, rotation, checkpointing=self.activation_checkpointing))
