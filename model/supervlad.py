"""The SuperVLAD layer: VLAD with few clusters, ghost clusters and no centroids (Lu et al., NeurIPS 2024).

`SuperVLAD` and `aggregate` are the layer. `_Aggregate` writes its gradient out, for speed and memory only: autograd
finds the same from `aggregate`, so the layer can be read without it.

Shapes: B images, N = h*w local features of D channels, K clusters kept, G ghost clusters dropped.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

EPSILON = 1e-12  # lower bound of every norm


class SuperVLAD(nn.Module):
    """Sums local features by their soft assignment to K clusters.

    NetVLAD sums residuals to centroids; this layer sums the features themselves, so it has no centroids to fit to the
    training domain, and a few clusters are enough. G ghost clusters take part in the softmax, absorb uninformative
    features, and are then dropped.

    Args:
        dim: channels D of a local feature.
        clusters: K, the clusters kept.
        ghost_clusters: G, the clusters dropped; may be 0.
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
            features: B x D x h x w, of any norm.

        Returns:
            B x K x D, one vector per cluster; the K*D numbers of an image have unit L2 norm.
        """
        x = features.flatten(2).transpose(1, 2)  # (B, N, D), as the backbone stores it
        weight = self.conv.weight.flatten(1)  # (K+G, D)
        # The products are small, so fp32 costs nothing, and EPSILON is 0 in fp16.
        precise = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x, w = x.to(precise), weight.to(precise)
            if torch.is_grad_enabled():
                vectors = _Aggregate.apply(x, w, self.clusters)
            else:
                vectors = aggregate(x, w, self.clusters)[0]
        return vectors.to(weight.dtype)


def aggregate(x: Tensor, weight: Tensor, clusters: int) -> tuple[Tensor, ...]:
    """The layer as a function: x B x N x D and weight (K+G) x D to B x K x D and what the gradient needs.

    Instead of normalising the features, which would copy them, it applies the inverse norms to the small tensors on
    either side, the logits and the assignment.
    """
    inverse = 1 / torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp_min(EPSILON)  # (B, N, 1)
    logits = x @ weight.T * inverse  # (B, N, K+G)
    assignment = logits.softmax(dim=2)
    # The first K, since ghosts come last; a slice [:-G] would be empty for G = 0.
    vectors = (assignment[:, :, :clusters] * inverse).transpose(1, 2) @ x  # (B, K, D)
    # Intra-normalisation: no cluster outweighs another.
    norms = torch.linalg.vector_norm(vectors, dim=2, keepdim=True).clamp_min(EPSILON)  # (B, K, 1)
    vectors = vectors / norms
    total = torch.linalg.vector_norm(vectors, dim=(1, 2), keepdim=True).clamp_min(EPSILON)  # (B, 1, 1)
    return vectors / total, inverse, logits, assignment, norms, total


class _Aggregate(torch.autograd.Function):
    """`aggregate` with a hand-written gradient: keeps only the small tensors, writes the features' gradient once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, clusters: int) -> Tensor:  # type: ignore[override]
        vectors, *small = aggregate(x, weight, clusters)
        ctx.save_for_backward(x, weight, vectors, *small)
        return vectors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, vectors, inverse, logits, assignment, norms, total = ctx.saved_tensors
        K, D = vectors.shape[1:]
        # Through the two normalisations: the component along a unit vector drops out.
        g = torch.addcmul(gradient, vectors, (gradient * vectors).sum(dim=(1, 2), keepdim=True), value=-1).div_(total)
        unit_part = (g * vectors).sum(dim=2, keepdim=True).mul_(total**2)
        g.addcmul_(vectors, unit_part, value=-1).div_(norms)  # (B, K, D), of the sums
        # Through the weighted sum and the softmax.
        scaled_grad = x @ g.transpose(1, 2)  # (B, N, K), of assignment * inverse
        assignment_grad = F.pad(scaled_grad * inverse, (0, assignment.shape[2] - K))
        logits_grad = assignment * (assignment_grad - (assignment_grad * assignment).sum(dim=2, keepdim=True))
        # Through the factors: they scale both the assignment and the logits.
        inverse_grad = (scaled_grad * assignment[:, :, :K]).sum(dim=2, keepdim=True)
        inverse_grad += (logits_grad * logits).sum(dim=2, keepdim=True) / inverse
        products_grad = logits_grad * inverse  # (B, N, K+G)
        x_grad = (x * (-inverse_grad * inverse**3)).contiguous()  # no copy, unless x is a view of B x D x h x w
        x_grad.view(-1, D).addmm_(products_grad.flatten(0, 1), weight)
        x_grad.baddbmm_(assignment[:, :, :K] * inverse, g)
        weight_grad = torch.bmm(products_grad.transpose(1, 2), x).sum(dim=0)
        return x_grad, weight_grad, None
