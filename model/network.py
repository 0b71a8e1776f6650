"""The whole network: photo to descriptor."""

from torch import Tensor, nn
from torch.nn import functional as F

from .cross_image import CrossImageEncoder
from .dinov2 import DINOv2
from .supervlad import SuperVLAD


class SuperVLADNet(nn.Module):
    """Backbone, aggregation and, perhaps, the encoder across the images of a batch.

    Args:
        backbone: images B x 3 x H x W to local features B x D x h x w.
        aggregation: local features to cluster vectors B x K x D.
        encoder: cluster vectors to cluster vectors, looking across the batch; None leaves it out.
    """

    def __init__(self, *, backbone: DINOv2, aggregation: SuperVLAD, encoder: CrossImageEncoder | None = None):
        super().__init__()
        self.backbone = backbone
        self.aggregation = aggregation
        self.encoder = encoder

    @property
    def descriptor_dim(self) -> int:
        """Numbers in a descriptor, K*D."""
        return self.aggregation.clusters * self.aggregation.dim

    def cluster_vectors(self, images: Tensor) -> Tensor:
        """What depends on each image alone: normalised images B x 3 x H x W to B x K x D."""
        return self.aggregation(self.backbone(images))

    def describe(self, vectors: Tensor) -> Tensor:
        """What depends on the batch: cluster vectors B x K x D to descriptors B x K*D of unit L2 norm."""
        if self.encoder is not None:
            vectors = self.encoder(vectors)
        return F.normalize(vectors.flatten(1), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images B x 3 x H x W (sides multiples of 14) to descriptors B x K*D of unit L2 norm."""
        return self.describe(self.cluster_vectors(images))
