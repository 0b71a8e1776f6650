"""k-means initialisation of the layer."""

import numpy as np
import pytest
import torch
from helpers import tiny
from torch.nn import functional as F

from model.initialization import initialize_layer, layer_weights, sample_local_features


def test_sampling_is_without_replacement_and_takes_what_there_is():
    model = tiny()
    images = torch.randn(2, 3, 154, 140)  # 110 patches
    with torch.inference_mode():
        features = F.normalize(model.backbone(images), dim=1).flatten(2)
    sampled = sample_local_features(model, [images], generator=np.random.default_rng(0))
    assert sampled.shape == torch.unique(sampled, dim=0).shape == (200, 96)
    for index, row in enumerate(sampled):
        assert (row == features[index // 100].T).all(dim=1).sum() == 1
    few = sample_local_features(model, [images[..., :42, :56]], generator=np.random.default_rng(0))
    assert few.shape == (24, 96)


def test_one_cluster_has_alpha_one():
    alpha, weight = layer_weights(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
    assert alpha == 1 and weight.flatten().tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(("clusters", "ghost_clusters"), [(4, 1), (1, 0)])
def test_initialisation_is_repeatable(clusters, ghost_clusters):
    model = tiny(clusters=clusters, ghost_clusters=ghost_clusters)
    images = torch.randn(8, 3, 112, 112)
    weights = []
    for _ in range(2):
        batches = [images[:5], images[5:]]
        initialize_layer(model, sample_local_features(model, batches, generator=np.random.default_rng(1)))
        weights.append(model.aggregation.conv.weight.detach().clone())
    assert torch.equal(*weights) and weights[0].norm() > 0


def test_too_few_features():
    with pytest.raises(ValueError, match="65 clusters.* got 4 .*lower supervlad_clusters"):
        initialize_layer(tiny(clusters=64), torch.randn(4, 96))
