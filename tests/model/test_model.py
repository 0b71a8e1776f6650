"""The model's parts against loops and rules, on small sizes."""

import pytest
import torch
from helpers import tiny
from torch.nn import functional as F

from model import BACKBONES
from model.cross_image import CrossImageEncoder
from model.dinov2 import DINOv2
from model.sizes import require_patches
from model.supervlad import SuperVLAD, _Aggregate


@pytest.mark.parametrize(("K", "G"), [(4, 1), (1, 2), (3, 0), (1, 0)])
def test_layer_against_plain_loops(K, G):
    layer = SuperVLAD(6, K, G)
    features = torch.randn(2, 6, 2, 3)
    out = layer(features)
    for b in range(2):
        sums = torch.zeros(K, 6)
        for y in range(2):
            for x in range(3):
                local = features[b, :, y, x] / features[b, :, y, x].norm()
                weights = torch.exp(layer.conv.weight[:, :, 0, 0] @ local)
                for k in range(K):
                    sums[k] += weights[k] / weights.sum() * local
        expected = torch.cat([v / v.norm() for v in sums])
        torch.testing.assert_close(out[b].flatten(), expected / expected.norm())


@pytest.mark.parametrize(("K", "G"), [(4, 1), (1, 2), (3, 0), (1, 0)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layer_gradient(K, G, channels_last):
    """Against differences, and against what autograd makes of the plain formula."""
    layer = SuperVLAD(6, K, G).double()
    features = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    features.requires_grad_()

    def call(features, weight):
        return _Aggregate.apply(features.flatten(2).transpose(1, 2), weight.flatten(1), K)

    assert torch.autograd.gradcheck(call, (features, layer.conv.weight), atol=1e-6)
    target = torch.randn(2, K, 6, dtype=torch.float64)
    normal = F.normalize(features, dim=1)
    vectors = torch.einsum("bkhw,bdhw->bkd", layer.assign(normal)[:, :K], normal)
    expected = F.normalize(F.normalize(vectors, dim=2).flatten(1), dim=1).view_as(vectors)
    inputs = (features, layer.conv.weight)
    torch.testing.assert_close(call(*inputs), expected)
    gradients = [torch.autograd.grad((vectors * target).sum(), inputs) for vectors in (expected, call(*inputs))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_is_exact_in_mixed_precision(dtype):
    layer, features = SuperVLAD(32, 4, 1), torch.randn(2, 32, 3, 4)
    with torch.autocast("cpu", dtype=dtype):
        mixed = layer(features)
    torch.testing.assert_close(mixed, layer(features))


def test_encoder_follows_a_permutation_of_the_batch():
    encoder = CrossImageEncoder(32).eval()
    vectors, order = torch.randn(5, 3, 32), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(encoder(vectors[order]), encoder(vectors)[order])


def test_encoder_mixes_images_of_a_batch_but_not_clusters():
    encoder = CrossImageEncoder(32).eval()
    vectors = torch.randn(5, 3, 32)
    changed = vectors.clone()
    changed[2, 1] += 1
    difference = (encoder(changed) - encoder(vectors)).abs().amax(dim=2)
    assert (difference[:, 1] > 1e-4).all() and (difference[:, [0, 2]] == 0).all()


def test_layer_difference_tells_an_untrained_encoder():
    encoder = CrossImageEncoder(32)
    assert encoder.layer_difference() == 0
    with torch.no_grad():
        encoder.layers[1].linear1.weight[3, 4] += 0.5
    assert encoder.layer_difference() == pytest.approx(0.5)


@pytest.fixture(params=["dino_tiny", "dinov3_tiny"])
def backbone(request):
    return tiny(backbone=request.param).backbone


def test_features_lie_where_their_patches_do(backbone):
    patch = backbone.size.patch_size
    images = torch.zeros(2, 3, 4 * patch, 6 * patch)
    images[1, :, patch : 2 * patch, 5 * patch :] = 3.0  # row 1, column 5
    features = backbone(images)
    difference = (features[1] - features[0]).norm(dim=0)
    assert features.shape == (2, 96, 4, 6) and divmod(difference.argmax().item(), 6) == (1, 5)
    with pytest.raises(ValueError, match=f"{patch}-pixel patch; use e.g. {backbone.size.side} "):
        backbone(images[..., :-1])


@pytest.mark.parametrize("freeze_te", [0, 8, 12, None])
def test_what_is_frozen_keeps_no_activations(backbone, freeze_te):
    backbone.freeze(0)
    backbone.freeze(freeze_te)
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    expected = {name for name, _ in backbone.named_parameters()} - {"mask_token"}
    if freeze_te is not None:
        expected = {n for n in expected if n.startswith("blocks.") and int(n.split(".")[1]) >= freeze_te}
    assert trained == expected
    kept = []
    before = [0] * 13
    for index, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda *_, i=index: before.__setitem__(i + 1, len(kept)))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(0) or tensor, lambda tensor: tensor):
        backbone(torch.randn(1, 3, 112, 112))
    for index in range(12):
        assert (before[index + 1] > before[index]) == (freeze_te is None or index >= freeze_te), index


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"backbone": "resnet"}, "resnet"), ({"clusters": 0}, "0 cl"), ({"ghost_clusters": -1}, "-1 gh")],
)
def test_impossible_models(settings, told):
    with pytest.raises(ValueError, match=f"{told}.*use"):
        tiny(**settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_of_zeros_give_zeros(dtype):
    model = tiny().to(dtype)
    features = torch.zeros(2, 96, 4, 4, dtype=dtype)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            vectors = model.aggregation(features)
            assert vectors.dtype == dtype and not vectors.any() and not model.describe(vectors).any()
    random = torch.randn(2, 96, 4, 4)
    exact = model.float().aggregation(random)
    near = model.to(dtype).aggregation(random.to(dtype))
    assert F.cosine_similarity(exact.flatten(1), near.float().flatten(1)).min() > 0.999


@pytest.mark.parametrize("backbone", ["dino_tiny", "dino_small_reg"])
def test_the_position_embedding_as_a_product(backbone):
    """What --deterministic takes in training, where the gradient of a resampling has no fixed order on a GPU."""
    model = DINOv2(BACKBONES[backbone])
    weights = torch.randn(1, 1 + 4 * 5, model.channels)
    embeddings, gradients = [], []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            embeddings.append(model.position_embedding(4, 5))
            gradients += torch.autograd.grad((embeddings[-1] * weights).sum(), model.pos_embed)
        finally:
            torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
    assert not torch.equal(*gradients) or backbone.endswith("reg"), "both ways were taken"


@pytest.mark.parametrize("size", [(322, 320), (0, 14), (-14, 14), (322,), (14, 14, 14)])
def test_a_size_that_a_model_does_not_take(size):
    with pytest.raises(ValueError, match="^resize .* 14-pixel patch; use e.g. 322 322$"):
        require_patches("resize", size, BACKBONES["dino"])
    require_patches("resize", [14, 28], BACKBONES["dino"])
