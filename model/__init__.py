"""SuperVLAD: a compact global descriptor of a photo for visual place recognition.

Legend of the shapes in this package: B images, H x W pixels, h x w patches (of 14 x 14 pixels in DINOv2, 16 x 16 in
DINOv3), D channels (768 for ViT-B), K clusters, G ghost clusters.

    images        B x 3 x H x W    dinov2.py       the backbone, or dinov3.py; vit.py is what they share
    features      B x D x h x w    supervlad.py    the aggregation
    vectors       B x K x D        cross_image.py  the encoder, optional
    descriptors   B x K*D          unit L2 norm; loss.py, in training

The modules of this package import each other relatively and nothing else of the repository.
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
    """Loads the parts, and torch with them, once one is asked for: `python -m model.export --help` asks for none."""
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
        backbone_blocks: how many of its blocks are kept, the first ones; the final norm stays. None keeps all.
        clusters: K >= 1.
        ghost_clusters: G >= 0.
        crossimage_encoder: whether the encoder across the batch is part of it.

    Raises:
        ValueError: an unknown backbone, more blocks than it has, or a number of clusters that makes no layer.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"unknown backbone {backbone!r}; use one of {', '.join(BACKBONES)}")
    if clusters < 1 or ghost_clusters < 0:
        raise ValueError(
            f"{clusters} clusters with {ghost_clusters} ghost clusters make no VLAD layer; "
            "use --supervlad_clusters >= 1 and --ghost_clusters >= 0"
        )
    size = BACKBONES[backbone]
    if backbone_blocks is not None:
        if not 1 <= backbone_blocks <= size.depth:
            raise ValueError(
                f"--backbone_blocks {backbone_blocks} cannot be kept of the {size.depth} that --backbone={backbone} "
                f"has; use 1 to {size.depth}"
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
