"""SuperVLAD: compact global image descriptors for visual place recognition.

Shapes in this package: B images, H x W pixels, h x w patches (of 14 x 14 pixels in DINOv2, 16 x 16 in
DINOv3), D channels (768 for ViT-B), K clusters, G ghost clusters.

    images        B x 3 x H x W    dinov2.py       the backbone, or dinov3.py; vit.py has what they share
    features      B x D x h x w    supervlad.py    the aggregation
    vectors       B x K x D        cross_image.py  the encoder, optional
    descriptors   B x K*D          unit L2 norm; loss.py, in training

The modules import each other relatively, and nothing else from this repository; export.py, a command, does.
"""

from typing import TYPE_CHECKING, Any

from .sizes import BACKBONES

if TYPE_CHECKING:
    from .network import SuperVLADNet, build_model

__all__ = ["BACKBONES", "SuperVLADNet", "build_model"]


def __getattr__(name: str) -> Any:
    """Imports the network, and torch, on first use: command lines need the sizes of backbones alone."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import network

    return getattr(network, name)
