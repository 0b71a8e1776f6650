"""Initial weights of the SuperVLAD layer, by k-means over local features of the target domain."""

import logging
import math
from collections.abc import Iterable
from functools import partial

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .network import SuperVLADNet
from .supervlad import SuperVLAD

logger = logging.getLogger(__name__)

PER_IMAGE = 100  # local features sampled of an image, or all of them if its grid has fewer


def layer_weights(centroids: Tensor, descriptors: Tensor) -> tuple[float, Tensor]:
    """The 1x1 convolution whose softmax gives the nearest centroid, on average, 100 times the weight of the second.

    Args:
        centroids: (K+G) x D, any norm.
        descriptors: N x D local features, L2-normalised.

    Returns:
        alpha, the sharpness of the assignment, and the convolution's weight, (K+G) x D x 1 x 1.

    Source: NetVLAD (Arandjelovic et al. 2016), section 3.1; with a single centroid, alpha is 1.
    """
    centroids = F.normalize(centroids, dim=1)
    alpha = 1.0
    if len(centroids) > 1:
        first, second = (descriptors @ centroids.T).topk(2, dim=1).values.unbind(dim=1)
        alpha = -math.log(0.01) / (first - second).mean().item()
    return alpha, (alpha * centroids)[:, :, None, None]


@torch.inference_mode()
def sample_local_features(
    model: SuperVLADNet, batches: Iterable[Tensor], *, generator: np.random.Generator, skip: int = 0
) -> Tensor:
    """Samples local features of each image without replacement.

    Args:
        model: its backbone is used.
        batches: normalised images, each B x 3 x H x W, on the model's device.
        generator: source of the random draws.
        skip: earlier images that another process samples; their draws are made and thrown away.

    Returns:
        N x D, L2-normalised, on the CPU.
    """
    sampled = [torch.empty(0, model.backbone.channels)]
    for images in batches:
        features = F.normalize(model.backbone(images), dim=1).flatten(2)  # (B, D, h*w)
        patches = features.shape[2]
        draw = partial(generator.choice, patches, size=min(PER_IMAGE, patches), replace=False)
        for _ in range(skip):
            draw()
        skip = 0
        sampled += [image_features[:, draw()].T for image_features in features.cpu()]
    return torch.cat(sampled)


def initialize_layer(model: SuperVLADNet, descriptors: Tensor) -> None:
    """Sets the layer's weights by k-means over sampled local features N x D (FAISS, 100 iterations, its own seed)."""
    if not isinstance(model.aggregation, SuperVLAD):
        return  # another layer has no clusters to find
    conv = model.aggregation.conv
    clusters = conv.out_channels
    if len(descriptors) < clusters:
        told = f"k-means for {clusters} clusters, with ghost clusters, got {len(descriptors)} local features, too few"
        raise ValueError(f"{told}; add images or lower supervlad_clusters")
    kmeans = faiss.Kmeans(descriptors.shape[1], clusters, niter=100)
    kmeans.train(descriptors.numpy())
    alpha, weight = layer_weights(torch.from_numpy(kmeans.centroids), descriptors)
    with torch.no_grad():
        conv.weight.copy_(weight)
    logger.info("SuperVLAD layer initialised from %d local features, alpha %.2f", len(descriptors), alpha)
