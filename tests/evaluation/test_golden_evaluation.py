"""Preprocessing and the merging of crops equal the released code's (evaluation.npz)."""

import numpy as np
import pytest
from formula import golden
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from datasets.photos import transforms
from datasets.training import randaugment
from utils.retrieval.search import merge_crops

EVALUATION = golden("evaluation")
PHOTO = Image.fromarray(np.random.default_rng(480).integers(0, 256, (480, 640, 3), dtype=np.uint8))
PIXELS = pil_to_tensor(PHOTO)[None]


@pytest.mark.parametrize(("name", "every"), [("hard_resize", 23), ("central_crop", 23), ("five_crops", 46)])
def test_query_preprocessing(name, every):
    out = getattr(transforms, name)(PIXELS, size=(322, 322), antialias=False)[0, ..., ::every, ::every]
    np.testing.assert_allclose(out.numpy(), EVALUATION[f"preprocess/{name}_322"], rtol=0, atol=1e-5)


def test_single_query_resizes_as_released_then_crops_to_whole_patches():
    resized = transforms.normalize(transforms.shorter_side_to(transforms.to_unit(PIXELS), 322, antialias=False))[0]
    expected = EVALUATION["preprocess/single_query_322"]
    np.testing.assert_allclose(resized[:, ::23, ::23].numpy(), expected, rtol=0, atol=1e-5)
    cropped = transforms.single_query(PIXELS, size=(322, 322), antialias=False)[0]
    assert cropped.shape == (3, 322, 420) and resized.shape == (3, 322, 429)
    np.testing.assert_allclose(cropped.numpy(), resized[:, :, 4:424].numpy(), rtol=0, atol=1e-6)


def test_training_resize():
    out = randaugment.TrainingTransform((224, 224), randaugment_ops=0)(PHOTO)
    out = transforms.normalize(transforms.to_unit(out))[:, ::16, ::16]
    np.testing.assert_allclose(out.numpy(), EVALUATION["preprocess/train_resize_224"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("method", "majority_weight"), [("nearest_crop", 0.0), ("maj_voting", 0.01)])
def test_merging_of_crops(method, majority_weight):
    distances, predictions = EVALUATION["crops/distances"], EVALUATION["crops/predictions"]
    untouched = distances.copy()
    _, merged = merge_crops(distances, predictions, majority_weight=majority_weight)
    np.testing.assert_array_equal(merged, EVALUATION[f"crops/{method}"])
    np.testing.assert_array_equal(distances, untouched)
