"""The members of the DINOv2 family, by name. A table without torch, which takes seconds to import."""

from dataclasses import dataclass, replace

PATCH_SIZE = 14  # in pixels


@dataclass(frozen=True, kw_only=True)
class BackboneSize:
    """What tells one member of the family from another; `image_size` is the side seen in pre-training, in pixels."""

    channels: int
    depth: int
    heads: int
    swiglu: bool = False
    registers: int = 0
    image_size: int = 518


_SMALL = BackboneSize(channels=384, depth=12, heads=6)
_BASE = BackboneSize(channels=768, depth=12, heads=12)
_LARGE = BackboneSize(channels=1024, depth=24, heads=16)
_GIANT = BackboneSize(channels=1536, depth=40, heads=24, swiglu=True)

BACKBONES = {
    "dino": _BASE,
    "dino_small": _SMALL,
    "dino_large": _LARGE,
    "dino_giant": _GIANT,
    "dino_reg": replace(_BASE, registers=4),
    "dino_small_reg": replace(_SMALL, registers=4),
    "dino_large_reg": replace(_LARGE, registers=4),
    "dino_giant_reg": replace(_GIANT, registers=4),
    # Ours, for the demo and the tests; as deep as ViT-B, so that --freeze_te means the same. No published weights.
    "dino_tiny": BackboneSize(channels=96, depth=12, heads=6, image_size=112),
}
