"""SuperVLAD: compact global image descriptors for visual place recognition.

Shapes in this package: B images, H x W pixels, h x w patches (of 14 x 14 pixels in DINOv2, 16 x 16 in
DINOv3), D channels (768 for ViT-B), K clusters, G ghost clusters.

    images        B x 3 x H x W    dinov2.py       the backbone, or dinov3.py; vit.py has what they share
    features      B x D x h x w    supervlad.py    the aggregation
    vectors       B x K x D        cross_image.py  the encoder, optional
    descriptors   B x K*D          unit L2 norm; loss.py, in training

The modules import each other relatively, and nothing else from this repository.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .sizes import BACKBONES

if TYPE_CHECKING:
    from .cross_image import CrossImageEncoder
    from .dinov2 import DINOv2
    from .dinov3 import DINOv3
    from .network import SuperVLADNet
    from .supervlad import SuperVLAD

__all__ = ["BACKBONES", "SuperVLADNet", "build_model"]


def __getattr__(name: str) -> Any:
    """Imports the parts, and torch, on first use: `python -m model.export --help` needs neither."""
    if name not in ("CrossImageEncoder", "DINOv2", "DINOv3", "SuperVLAD", "SuperVLADNet", "build_model"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .cross_image import CrossImageEncoder
    from .dinov2 import DINOv2
    from .dinov3 import DINOv3
    from .network import SuperVLADNet
    from .supervlad import SuperVLAD

    for part in (CrossImageEncoder, DINOv2, DINOv3, SuperVLAD, SuperVLADNet):
        globals().setdefault(part.__name__, part)
    globals()["build_model"] = _build_model
    return globals()[name]


def _build_model(
    *,
    backbone: str = "dino",
    backbone_blocks: int | None = None,
    clusters: int = 4,
    ghost_clusters: int = 1,
    crossimage_encoder: bool = False,
) -> "SuperVLADNet":
    """Builds the network with random weights; `model.weights` loads published ones.

    Args:
        backbone: a name from `BACKBONES`.
        backbone_blocks: number of blocks to keep, counted from the first; the final norm stays. None keeps all.
        clusters: K >= 1.
        ghost_clusters: G >= 0.
        crossimage_encoder: whether to add the encoder across the batch.

    Raises:
        ValueError: the backbone is unknown or has fewer blocks, or the numbers of clusters are too small.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"unknown backbone {backbone!r}; use one of {', '.join(BACKBONES)}")
    if clusters < 1 or ghost_clusters < 0:
        raise ValueError(
            f"{clusters} clusters and {ghost_clusters} ghost clusters are too few for a VLAD layer; "
            "use --supervlad_clusters >= 1 and --ghost_clusters >= 0"
        )
    size = BACKBONES[backbone]
    if backbone_blocks is not None:
        if not 1 <= backbone_blocks <= size.depth:
            raise ValueError(
                f"--backbone_blocks {backbone_blocks}: --backbone={backbone} has {size.depth} blocks; "
                f"use 1 to {size.depth}"
            )
        size = replace(size, blocks=backbone_blocks if backbone_blocks < size.depth else None)
    features: DINOv2 | DINOv3 = DINOv3(size) if size.family == "DINOv3" else DINOv2(size)
    return SuperVLADNet(
        backbone=features,
        aggregation=SuperVLAD(features.channels, clusters, ghost_clusters),
        encoder=CrossImageEncoder(features.channels) if crossimage_encoder else None,
    )


if TYPE_CHECKING:
    build_model = _build_model
