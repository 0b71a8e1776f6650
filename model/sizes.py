"""The backbones of both families by name. This file does without torch, which takes seconds to import."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class BackboneSize:
    """The settings that define a backbone.

    Attributes:
        channels: channels of a local feature, C.
        depth: number of blocks.
        heads: attention heads.
        family: "DINOv2" or "DINOv3".
        patch_size: side of a patch in pixels; the sides of images are multiples of it.
        side: default side of an evaluated image in pixels.
        swiglu: whether the MLPs are gated.
        registers: tokens between the class token and the patches.
        image_size: side in pixels of the pre-training images, for which the position embedding is made; DINOv3 has no
            position embedding.
        blocks: number of blocks to keep, counted from the first; None keeps all.
    """

    channels: int
    depth: int
    heads: int
    family: str = "DINOv2"
    patch_size: int = 14
    side: int = 322
    swiglu: bool = False
    registers: int = 0
    image_size: int = 518
    blocks: int | None = None

    @property
    def kept_blocks(self) -> int:
        """Number of blocks after the cut."""
        return self.depth if self.blocks is None else self.blocks

    @property
    def head_channels(self) -> int:
        """Channels of a head."""
        return self.channels // self.heads


_SMALL = BackboneSize(channels=384, depth=12, heads=6)
_BASE = BackboneSize(channels=768, depth=12, heads=12)
_LARGE = BackboneSize(channels=1024, depth=24, heads=16)
_GIANT = BackboneSize(channels=1536, depth=40, heads=24, swiglu=True)
# For the demo and the tests; as deep as ViT-B, so that --freeze_te means the same. There are no published weights.
_TINY = BackboneSize(channels=96, depth=12, heads=6, image_size=112)


def _dinov3(size: BackboneSize) -> BackboneSize:
    return replace(size, family="DINOv3", patch_size=16, side=320, registers=4)


BACKBONES = {
    "dino": _BASE,
    "dino_small": _SMALL,
    "dino_large": _LARGE,
    "dino_giant": _GIANT,
    "dino_reg": replace(_BASE, registers=4),
    "dino_small_reg": replace(_SMALL, registers=4),
    "dino_large_reg": replace(_LARGE, registers=4),
    "dino_giant_reg": replace(_GIANT, registers=4),
    "dino_tiny": _TINY,
    "dinov3": _dinov3(_BASE),
    "dinov3_small": _dinov3(_SMALL),
    "dinov3_large": _dinov3(_LARGE),
    "dinov3_tiny": _dinov3(_TINY),
}


def require_patches(flag: str, size: tuple[int, int], backbone: BackboneSize) -> None:
    """Raises ValueError, naming `flag`, unless height and width are whole patches, at least one each."""
    patch = backbone.patch_size
    if any(side < patch or side % patch for side in size):
        raise ValueError(
            f"{flag} {' '.join(map(str, size))} is not a multiple of the {patch}-pixel patch; "
            f"use e.g. {backbone.side} {backbone.side}"
        )
