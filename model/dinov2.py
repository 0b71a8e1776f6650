"""The DINOv2 vision transformers (Oquab et al. 2023) with the parameter names of the official weight files.

Shapes: B images, H x W pixels, h x w = H/14 x W/14 patches, T tokens (class token, registers, h*w patches), C channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .sizes import BackboneSize
from .vit import Attention, Backbone, Block, Mlp, PatchEmbed, grid_of, run_blocks


class SwiGlu(nn.Module):
    """The gated MLP of ViT-g: `w3(silu(first half of w12(x)) * second half)`."""

    def __init__(self, channels: int):
        super().__init__()
        # Two thirds of the plain MLP's width (three matrices then cost what two did), rounded up to a multiple of 8.
        hidden = (8 * channels // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(channels, 2 * hidden)
        self.w3 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class DINOv2(Backbone):
    """A DINOv2 vision transformer that turns images into a grid of local features.

    Source: https://github.com/facebookresearch/dinov2, whose `dinov2_vit*14*_pretrain.pth` files load with strict=True.
    """

    def __init__(self, size: BackboneSize):
        super().__init__(size)
        C, grid = size.channels, size.image_size // size.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, C))
        if size.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, size.registers, C))
        self.mask_token = nn.Parameter(torch.zeros(1, C), requires_grad=False)
        self.patch_embed = PatchEmbed(C, size.patch_size)
        mlp = SwiGlu if size.swiglu else Mlp
        self.blocks = nn.ModuleList(  # attention before MLP: the order decides the random weights
            Block(C, attn=Attention(C, size.heads), mlp=mlp(C), eps=1e-6) for _ in range(size.kept_blocks)
        )
        self.norm = nn.LayerNorm(C, eps=1e-6)
        # Published weights replace all of this. From scratch (dino_tiny), this standard deviation was measured to learn
        # faster than DINOv2's own 0.02.
        nn.init.trunc_normal_(self.pos_embed, std=0.2)

    def position_embedding(self, h: int, w: int) -> Tensor:
        """The position embedding resampled to h x w patches, with the class token's first: 1 x (1+h*w) x C."""
        grid = self.size.image_size // self.size.patch_size
        if (h, w) == (grid, grid):
            return self.pos_embed
        cls_position, positions = self.pos_embed.float().split([1, grid**2], dim=1)
        if torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled() and self.pos_embed.requires_grad:
            # On a GPU the gradient of the resampling is summed in no fixed order; that of a matrix product is.
            basis = torch.eye(grid**2, device=positions.device).view(1, grid**2, grid, grid)
            resampled = self._resample(basis, h, w).flatten(2).transpose(1, 2) @ positions  # (1, h*w, C)
        else:
            positions = positions.view(1, grid, grid, -1).permute(0, 3, 1, 2)  # (1, C, grid, grid)
            resampled = self._resample(positions, h, w).flatten(2).transpose(1, 2)
        return torch.cat((cls_position, resampled), dim=1).to(self.pos_embed.dtype)

    def _resample(self, positions: Tensor, h: int, w: int) -> Tensor:
        """1 x C x grid x grid to 1 x C x h x w."""
        grid = positions.shape[-1]
        if self.size.registers:
            return F.interpolate(positions, size=(h, w), mode="bicubic", antialias=True)
        # The weights were trained with this 0.1, which shifts the sampling positions; size= would give other features.
        scale = ((h + 0.1) / grid, (w + 0.1) / grid)
        return F.interpolate(positions, scale_factor=scale, mode="bicubic")

    def tokens(self, images: Tensor) -> Tensor:
        """See `Backbone`."""
        B = images.shape[0]
        h, w = grid_of(images, self.size)
        x = torch.cat((self.cls_token.expand(B, -1, -1), self.patch_embed(images)), dim=1)
        x = x + self.position_embedding(h, w)
        if self.size.registers:
            x = torch.cat((x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]), dim=1)
        return self.norm(run_blocks(self.blocks, x, checkpointing=self.activation_checkpointing))
