"""The whole network, from image to descriptor."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .cross_image import CrossImageEncoder
from .dinov2 import DINOv2
from .dinov3 import DINOv3
from .sizes import size_named
from .supervlad import SuperVLAD
from .vit import Backbone


def normalized(x: Tensor) -> Tensor:
    """Unit L2 norm over dimension 1, computed in fp32 for fp16, where the epsilon is 0: zeros stay zeros."""
    return F.normalize(x.float(), dim=1).to(x.dtype) if x.dtype == torch.float16 else F.normalize(x, dim=1)


class Projection(nn.Module):
    """A PCA of descriptors as a linear layer: B x inputs to B x outputs of unit L2 norm; loaded, never trained."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("components", torch.zeros(outputs, inputs))  # if whitened, divided by their deviations
        self.mean: Tensor
        self.components: Tensor

    def forward(self, descriptors: Tensor) -> Tensor:
        return normalized((descriptors - self.mean) @ self.components.T)


class SuperVLADNet(nn.Module):
    """Backbone, aggregation and, optionally, the encoder across the images of a batch.

    Args:
        backbone: images B x 3 x H x W to local features B x D x h x w.
        aggregation: a module, local features to cluster vectors B x K x D; it has K as `clusters` and D as `dim`.
        encoder: cluster vectors to cluster vectors, across the batch; None leaves it out.
    """

    def __init__(self, *, backbone: Backbone, aggregation: Any, encoder: CrossImageEncoder | None = None):
        super().__init__()
        self.backbone = backbone
        self.aggregation: Any = aggregation
        self.encoder = encoder
        self.projection: Projection | None = None  # the PCA of an exported file; never in training
        # Images whose activations the backward pass holds at a time; 0 for the whole batch. In chunks, the forward pass
        # keeps only cluster vectors, and the backward pass recomputes each chunk: the same gradient at the cost of one
        # more forward pass. Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited
        # Setup, 2021.
        self.grad_cache_chunk = 0

    @property
    def descriptor_dim(self) -> int:
        """Dimensions of a descriptor: K*D, or fewer after the projection."""
        return math.prod(self.vectors_shape) if self.projection is None else len(self.projection.components)

    @property
    def vectors_shape(self) -> tuple[int, int]:
        """Shape K x D of an image's cluster vectors."""
        return self.aggregation.clusters, self.aggregation.dim

    def cluster_vectors(self, images: Tensor) -> Tensor:
        """The part that depends on each image alone: normalised images B x 3 x H x W to B x K x D."""
        if self.grad_cache_chunk and torch.is_grad_enabled():
            chunks = images.split(self.grad_cache_chunk)
            # preserve_rng_state=False: neither part draws random numbers.
            encode = partial(checkpoint, self._encode, use_reentrant=False, preserve_rng_state=False)
            return torch.cat([encode(chunk) for chunk in chunks])
        return self._encode(images)

    def _encode(self, images: Tensor) -> Tensor:
        return self.aggregation(self.backbone(images))

    def assignments(self, images: Tensor) -> Tensor:
        """Soft assignment of each patch to each cluster: normalised images B x 3 x H x W to B x (K+G) x h x w."""
        return self.aggregation.assign(normalized(self.backbone(images)))

    def describe(self, vectors: Tensor, group: int | None = None) -> Tensor:
        """The part that depends on the batch: cluster vectors to descriptors of unit L2 norm.

        Args:
            vectors: B x K x D.
            group: number of consecutive images that the encoder attends across, a divisor of B; None for all.

        Returns:
            B x K*D, or fewer dimensions after the projection.
        """
        if self.encoder is not None:
            B, K, D = vectors.shape
            n = group or B
            sequences = vectors.view(B // n, n, K, D).transpose(0, 1).reshape(n, B // n * K, D)
            encoded: Tensor = self.encoder(sequences)
            vectors = encoded.view(n, B // n, K, D).transpose(0, 1).reshape(B, K, D)
        descriptors = normalized(vectors.flatten(1))
        return descriptors if self.projection is None else self.projection(descriptors)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images B x 3 x H x W (sides multiples of the patch) to descriptors B x K*D of unit L2 norm."""
        return self.describe(self.cluster_vectors(images))


def build_model(
    *,
    backbone: str = "dino",
    backbone_blocks: int | None = None,
    clusters: int = 4,
    ghost_clusters: int = 1,
    crossimage_encoder: bool = False,
) -> SuperVLADNet:
    """Builds the network with random weights; `model.weights` loads published ones.

    Args:
        backbone: a name from `BACKBONES`.
        backbone_blocks: number of blocks to keep, counted from the first; the final norm stays. None keeps all.
        clusters: K >= 1.
        ghost_clusters: G >= 0.
        crossimage_encoder: whether to add the encoder across the batch.
    """
    size = replace(size_named(backbone), blocks=backbone_blocks)
    if clusters < 1 or ghost_clusters < 0:
        told = f"{clusters} clusters and {ghost_clusters} ghost clusters are too few for a VLAD layer"
        raise ValueError(f"{told}; use supervlad_clusters >= 1 and ghost_clusters >= 0")
    if not 1 <= size.kept_blocks <= size.depth:
        told = f"backbone_blocks {backbone_blocks}: backbone={backbone} has {size.depth} blocks"
        raise ValueError(f"{told}; use 1 to {size.depth}")
    features = DINOv3(size) if size.family == "DINOv3" else DINOv2(size)
    layer = SuperVLAD(features.channels, clusters, ghost_clusters)
    encoder = CrossImageEncoder(features.channels) if crossimage_encoder else None
    return SuperVLADNet(backbone=features, aggregation=layer, encoder=encoder)
