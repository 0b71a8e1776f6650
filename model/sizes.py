"""The backbones of both families by name: the one table of them. It imports no torch, which takes seconds."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BackboneSize:
    """The settings that define a backbone."""

    channels: int  # of a local feature, C
    depth: int  # number of blocks
    heads: int  # of the attention
    family: str = "DINOv2"  # or "DINOv3"
    patch_size: int = 14  # side in pixels; the sides of images are multiples of it
    side: int = 322  # default side of an evaluated image in pixels
    swiglu: bool = False  # whether the MLPs are gated
    registers: int = 0  # tokens between the class token and the patches
    image_size: int = 518  # side in pixels of pre-training images, of which DINOv2's position embedding is
    blocks: int | None = None  # number of blocks to keep, counted from the first; None keeps all

    @property
    def kept_blocks(self) -> int:
        """Number of blocks after the cut."""
        return self.depth if self.blocks is None else self.blocks


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


def size_named(name: str) -> BackboneSize:
    """The settings of a backbone in `BACKBONES`; ValueError for another name."""
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; use one of {', '.join(BACKBONES)}")
    return BACKBONES[name]


# The arguments of `build_model` as files name them, and the command line's option for each.
MODEL_OPTIONS = {
    "backbone": "backbone",
    "backbone_blocks": "backbone_blocks",
    "clusters": "supervlad_clusters",
    "ghost_clusters": "ghost_clusters",
    "crossimage_encoder": "crossimage_encoder",
}


def require_patches(name: str, size: Sequence[int], backbone: BackboneSize) -> None:
    """Raises ValueError unless the height and width, of the parameter `name`, are multiples of the patch size."""
    patch, side = backbone.patch_size, backbone.side
    if len(size) != 2 or not all(length > 0 and length % patch == 0 for length in size):
        told = f"{name} {' '.join(map(str, size))} is not a multiple of the {patch}-pixel patch"
        raise ValueError(f"{told}; use e.g. {side} {side}")


def fitted(size: tuple[int, int] | None, backbone: BackboneSize) -> tuple[int, int]:
    """Height and width of evaluated images in pixels: the backbone's own for None.

    To keep a photo's shape, which seldom fits the patches, sides that differ are rounded to whole patches, with a
    warning.

    Raises:
        ValueError: equal sides are not whole patches.
    """
    if size is None or size[0] == size[1]:
        size = size or (backbone.side, backbone.side)
        require_patches("resize", size, backbone)
        return size
    patch = backbone.patch_size
    height, width = (max(patch, round(side / patch) * patch) for side in size)
    if (height, width) != size:
        logger.warning("--resize %d %d is rounded to whole patches, %d %d", *size, height, width)
    return height, width
