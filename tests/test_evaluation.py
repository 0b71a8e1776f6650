"""test.py: which images share a batch, and what does not matter."""

from functools import partial

import numpy as np
import pytest
import torch

from datasets.database_queries import DatabaseQueries
from datasets.transforms import evaluation_transform, open_image
from model import build_model
from test import describe_in_batches, evaluate, extract_vectors, format_recalls, image_batches
from utils import search

CPU = torch.device("cpu")
TRANSFORM = evaluation_transform((56, 56))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return build_model(backbone="dino_tiny", clusters=2, crossimage_encoder=True).eval()


@pytest.fixture(scope="module")
def dataset(city):
    return DatabaseQueries.from_folder(city, "toy_city", "test")


def reader(batch_size, num_workers=0):
    return partial(image_batches, transform=TRANSFORM, batch_size=batch_size, num_workers=num_workers, device=CPU)


def vectors_of(model, paths, batch_size, num_workers=0):
    return extract_vectors(model, reader(batch_size, num_workers)(paths, progress=""), len(paths))


@torch.inference_mode()
def by_hand(model, paths, batch_size):
    """The released way: the whole model over batches in file order, the last one short."""
    images = torch.stack([TRANSFORM(open_image(path)) for path in paths])
    return torch.cat([model(batch) for batch in images.split(batch_size)]).numpy()


@pytest.mark.parametrize("infer_batch_size", [4, 16])
@pytest.mark.parametrize(("extraction_batch_size", "num_workers"), [(1, 0), (7, 2), (15, 0)])
def test_descriptors_are_those_of_the_released_batching(
    model, dataset, infer_batch_size, extraction_batch_size, num_workers
):
    vectors = vectors_of(model, dataset.database_paths, extraction_batch_size, num_workers)
    assert vectors.shape == (15, 2, 96) and vectors.dtype == np.float32
    descriptors = describe_in_batches(model, vectors, batch_size=infer_batch_size, device=CPU)
    np.testing.assert_allclose(descriptors, by_hand(model, dataset.database_paths, infer_batch_size), atol=1e-6)


def test_the_encoder_does_look_across_its_batch(model, dataset):
    """So that the test above can fail."""
    few, many = (by_hand(model, dataset.database_paths, size) for size in (4, 16))
    assert np.abs(few - many).max() > 1e-3


def test_database_and_queries_share_no_batch(model, dataset):
    recalls = evaluate(
        model,
        dataset,
        read_images=reader(4),
        recall_values=[1, 5, 10],
        positive_distance=25.0,
        infer_batch_size=8,
        device=CPU,
    )
    database, queries = (by_hand(model, paths, 8) for paths in (dataset.database_paths, dataset.queries_paths))
    distances = ((queries[:, None] - database[None]) ** 2).sum(axis=2)
    expected = search.recall_at(np.argsort(distances, axis=1), dataset.positives(25.0), [1, 5, 10])
    assert recalls == expected


def test_evaluating_moves_no_random_numbers_and_switches_dropout_off(model, dataset):
    model.train()
    state = torch.get_rng_state()
    first, second = (vectors_of(model, dataset.queries_paths, 4, num_workers=n) for n in (0, 2))
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    np.testing.assert_array_equal(first, second)


def test_format():
    assert format_recalls({1: 27.04, 5: 42.35}) == "R@1: 27.0, R@5: 42.4"
