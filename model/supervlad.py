"""The SuperVLAD layer: VLAD with few clusters, ghost clusters and no centroids (Lu et al., NeurIPS 2024)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SuperVLAD(nn.Module):
    """Sums local features by their soft assignment to K clusters.

    NetVLAD sums residuals to a centroid; here the features themselves are summed, so that the layer has no centroids to
    fit to the training domain and a handful of clusters is enough. G ghost clusters take part in the softmax, drawing
    off uninformative features, and are then dropped.

    Args:
        dim: channels D of a local feature.
        clusters: K, the clusters kept.
        ghost_clusters: G, the clusters dropped; 0 is legal.
    """

    def __init__(self, dim: int, clusters: int = 4, ghost_clusters: int = 1):
        super().__init__()
        self.dim = dim
        self.clusters = clusters
        self.ghost_clusters = ghost_clusters
        self.conv = nn.Conv2d(dim, clusters + ghost_clusters, kernel_size=1, bias=False)

    def assign(self, features: Tensor) -> Tensor:
        """Soft assignment of L2-normalised local features B x D x h x w: B x (K+G) x h x w, summing to 1 over K+G."""
        return self.conv(features).softmax(dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Aggregates local features.

        Args:
            features: B x D x h x w.

        Returns:
            B x K x D, one vector a cluster; the K*D numbers of an image have unit L2 norm.
        """
        features = F.normalize(features, dim=1)
        # The first K: the ghosts come last, and a slice [:-G] would be empty for G = 0.
        assignment = self.assign(features)[:, : self.clusters]
        vectors = torch.einsum("bkhw,bdhw->bkd", assignment, features)
        vectors = F.normalize(vectors, dim=2)  # intra-normalisation: no cluster outweighs another
        return F.normalize(vectors.flatten(1), dim=1).view_as(vectors)
