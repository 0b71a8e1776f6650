"""The model equals the released code, ViT-B included, and the backbones other code (reference, backbones, dinov3)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from formula import each_batch_once, formula_backbone, formula_model, golden, normal

from model import BACKBONES
from model.initialization import layer_weights
from model.supervlad import SuperVLAD

pytestmark = pytest.mark.slow

REFERENCE = golden("reference")
IMAGES = {224: normal(224, (3, 3, 224, 224)), 322: normal(322, (2, 3, 322, 322))}


@pytest.fixture(scope="module")
def once():
    with each_batch_once():
        yield


@pytest.mark.parametrize(
    ("name", "clusters", "ghost_clusters", "encoder"),
    [("crossimage", 4, 1, True), ("plain", 4, 1, False), ("onecluster", 1, 2, False)],
)
def test_descriptors(once, name, clusters, ghost_clusters, encoder):
    model = formula_model(clusters=clusters, ghost_clusters=ghost_clusters, crossimage_encoder=encoder).eval()
    with torch.inference_mode():
        for side, images in IMAGES.items():
            np.testing.assert_allclose(model(images).numpy(), REFERENCE[f"forward/{name}/{side}"], rtol=0, atol=1e-5)


def test_backbone(once):
    backbone = formula_backbone(BACKBONES["dino"]).eval()
    with torch.inference_mode():
        tokens = backbone.tokens(IMAGES[224])
        np.testing.assert_allclose(tokens[:, 0].numpy(), REFERENCE["backbone/cls/224"], rtol=0, atol=5e-5)
        np.testing.assert_allclose(tokens[:, 1::37].numpy(), REFERENCE["backbone/patch/224"], rtol=0, atol=5e-5)
        tokens = backbone.tokens(IMAGES[322])
        np.testing.assert_allclose(tokens[:, 1::61].numpy(), REFERENCE["backbone/patch/322"], rtol=0, atol=5e-5)
        positions = backbone.position_embedding(23, 23)[:, ::53].numpy()
        np.testing.assert_allclose(positions, REFERENCE["backbone/pos/322"].reshape(positions.shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("archive", "key"), [(a, key) for a in ("backbones", "dinov3") for key in golden(a)])
def test_backbone_sizes(archive, key):
    """Some whole, the others cut to their first two blocks; on square and other grids."""
    variant, size = key.split("/")
    parts = variant.split("_") if archive == "dinov3" else ["dino", *variant.split("_")]
    name = "_".join(part for part in parts if part != "base")
    whole = variant in ("small", "base", "small_reg", "base_reg", "dinov3_small")
    backbone = formula_backbone(replace(BACKBONES[name], blocks=None if whole else 2)).eval()
    height, width = map(int, size.split("x"))
    with torch.inference_mode():
        patches = backbone(normal(width, (1, 3, height, width))).flatten(2).transpose(1, 2)
    expected = golden(archive)[key]
    np.testing.assert_allclose(patches[0, ::23].numpy(), expected.reshape(-1, expected.shape[-1]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("key", ["4-1-32", "1-2-32", "64-1-16"])
def test_layer_and_its_gradients(key):
    K, G, D = map(int, key.split("-"))
    layer = SuperVLAD(D, K, G)
    weight = layer.conv.weight
    weight.data = 5 * normal(100 * K + G, (K + G, D, 1, 1))
    features = normal(7 * K + D, (2, D, 5, 5)).requires_grad_()
    out = layer(features).flatten(1)
    (out * normal(11, tuple(out.shape))).sum().backward()
    for name, value in (("out", out.detach()), ("grad_x", features.grad), ("grad_w", weight.grad)):
        np.testing.assert_allclose(value.numpy(), REFERENCE[f"layer/{key}/{name}"], rtol=0, atol=1e-5)


def test_layer_initialisation():
    descriptors = torch.nn.functional.normalize(normal(22, (200, 16)), dim=1)
    alpha, weight = layer_weights(normal(21, (5, 16)), descriptors)
    np.testing.assert_allclose(alpha, REFERENCE["init/alpha"], rtol=1e-5)
    np.testing.assert_allclose(weight.numpy(), REFERENCE["init/weight"], rtol=1e-5, atol=1e-6)
