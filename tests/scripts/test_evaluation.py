"""test.py: which images share a batch, what does not matter, and the test methods, against doing it by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import SMALL
from sklearn.decomposition import PCA
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2 import functional as TF

import train as train_script
from datasets.evaluation.tree import DatabaseQueries
from datasets.photos import transforms
from datasets.photos.batches import image_batches
from datasets.photos.transforms import CROPS, evaluation_transform, open_image, transform_sizes
from model import build_model
from parser import Machine, Protocol, TrainOptions, parse
from test import evaluate_split
from utils.retrieval import extraction, search
from utils.retrieval.contexts import Search
from utils.retrieval.descriptor_store import DescriptorStore
from utils.retrieval.extraction import EncoderContext, descriptors, extract

CPU = torch.device("cpu")
SIZE = (56, 56)
TRAIN = [*SMALL, *"--eval_dataset_name=toy_city --train_resize 56 56 --train_batch_size=4 --epochs_num=1".split()]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return build_model(backbone="dino_tiny", clusters=2, crossimage_encoder=True).eval()


@pytest.fixture(scope="module")
def dataset(city):
    return DatabaseQueries.from_folder(city, "toy_city", "test")


def reader(batch_size, num_workers=0, test_method="hard_resize"):
    transform = evaluation_transform(SIZE, test_method=test_method)
    return partial(image_batches, transform=transform, batch_size=batch_size, num_workers=num_workers, device=CPU)


@pytest.fixture
def stored(model, tmp_path):
    """Runs the backbone over paths, and returns the store."""

    def run(paths, batch_size=8, num_workers=0, test_method="hard_resize", name="vectors"):
        store = DescriptorStore(tmp_path / "stores", name, (len(paths), CROPS[test_method], *model.vectors_shape))
        extract(model, paths, store, partial(reader(batch_size, num_workers, test_method), progress=""))
        return store

    return run


@pytest.fixture
def both(dataset, stored):
    """Stores of the database and, prepared by a test method, of the queries; and of others by name."""

    def make(test_method="hard_resize", **others):
        batch = 1 if test_method == "single_query" else 8
        stores = {"database": stored(dataset.database_paths, name="database")}
        stores["queries"] = stored(dataset.queries_paths, batch, 0, test_method, name="queries")
        return stores | {name: stored(paths, name=name) for name, paths in others.items()}

    return make


def described(model, store, context):
    """In the order of the images, whatever the order of the chunks."""
    indices, rows = zip(*descriptors(model, store, context, device=CPU), strict=True)
    rows = np.concatenate(rows).reshape(len(store), -1)
    return rows[np.argsort(np.concatenate(indices))]


@torch.inference_mode()
def by_hand(model, paths, batch_size, test_method="hard_resize"):
    """The released way: the whole model over batches in file order, the last one short; N*crops x D."""
    transform = evaluation_transform(SIZE, test_method=test_method)
    images = [transform(pil_to_tensor(open_image(path))[None])[0] for path in paths]
    batches = [torch.stack(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
    return torch.cat([model(batch.flatten(0, -4)) for batch in batches]).numpy()


def distances_between(queries, database):
    return ((queries[:, None] - database[None]) ** 2).sum(axis=2)


@pytest.mark.parametrize("infer_batch_size", [1, 4, 16])
@pytest.mark.parametrize(("extraction_batch_size", "num_workers"), [(1, 0), (7, 2), (15, 0)])
def test_descriptors_are_those_of_the_released_batching(
    model, dataset, stored, infer_batch_size, extraction_batch_size, num_workers
):
    store = stored(dataset.database_paths, extraction_batch_size, num_workers)
    assert store.shape == (15, 1, 2, 96)
    rows = described(model, store, EncoderContext(infer_batch_size))
    np.testing.assert_allclose(rows, by_hand(model, dataset.database_paths, infer_batch_size), atol=1e-6)


@pytest.mark.parametrize("chunk_bytes", [1, 5000])
def test_chunks_do_not_change_who_shares_a_batch(model, dataset, stored, monkeypatch, chunk_bytes):
    monkeypatch.setattr("utils.retrieval.extraction.CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("utils.retrieval.extraction.ENCODED_TOGETHER", 1)
    store = stored(dataset.database_paths)
    assert len(list(descriptors(model, store, EncoderContext(4), device=CPU))) > 1
    few, many = (by_hand(model, dataset.database_paths, size) for size in (4, 16))
    np.testing.assert_allclose(described(model, store, EncoderContext(4)), few, atol=1e-6)
    assert np.abs(few - many).max() > 1e-3, "the encoder does look across its batch"


def test_shuffled_is_any_order(model, dataset, stored):
    context = EncoderContext(4, seed=(3, 1))
    order = np.random.default_rng((3, 1)).permutation(15)
    assert sorted(order) == list(range(15)) and order.tolist() != list(range(15))
    rows = described(model, stored(dataset.database_paths), context)
    expected = by_hand(model, [dataset.database_paths[index] for index in order], 4)
    np.testing.assert_allclose(rows[order], expected, atol=1e-6)


@pytest.mark.parametrize("context", ["file_order", "independent"])
@pytest.mark.parametrize("test_method", CROPS)
def test_test_methods_by_hand(model, dataset, both, test_method, context):
    run = Search(model, both(test_method), test_method=test_method, context=context, infer_batch_size=4, device=CPU)
    ((distances, predictions),) = run.run(4)
    batch = 4 if context == "file_order" else 1
    database = by_hand(model, dataset.database_paths, batch)
    queries = by_hand(model, dataset.queries_paths, 1 if test_method == "single_query" else batch, test_method)
    if test_method == "five_crops":
        queries = queries.reshape(15, 5, -1).mean(axis=1)
        assert np.linalg.norm(queries, axis=1).max() < 0.9999, "not normalised again"
    expected = distances_between(queries, database)
    order = np.argsort(expected, axis=1, kind="stable")[:, :4]
    lengths = np.take_along_axis(expected, order, 1)
    if test_method in ("nearest_crop", "maj_voting"):
        weight = 0.01 if test_method == "maj_voting" else 0.0
        lengths, order = search.merge_crops(lengths, order, majority_weight=weight)
    np.testing.assert_array_equal(predictions, order)
    np.testing.assert_allclose(distances, lengths, atol=1e-5)


def test_database_and_queries_are_shuffled_apart(model, both):
    """They have the same number of images here, and would get the same order from the same seed."""
    stores = both()
    run, again, other = (
        Search(model, stores, context="shuffled", infer_batch_size=4, seed=(0, order), device=CPU)
        for order in (1, 1, 2)
    )
    first, second = (next(iter(run.chunks(name)))[0] for name in stores)
    assert sorted(first) == sorted(second) == list(range(15)) and first.tolist() != second.tolist()
    np.testing.assert_array_equal(run.rows("queries"), again.rows("queries"))
    assert np.abs(run.rows("queries") - other.rows("queries")).max() > 1e-4


@pytest.mark.parametrize("whiten", [False, True])
def test_pca_by_hand(model, dataset, both, whiten):
    """Whitened components vary alike, and descriptors are normalised again; an exported file carries the linear map."""
    fitted_on = dataset.database_paths[::-1]
    run = Search(model, both(pca=fitted_on), infer_batch_size=4, pca_dim=5, pca_whiten=whiten, device=CPU)
    pca = PCA(5, whiten=whiten, random_state=0).fit(by_hand(model, fitted_on, 4))
    sides = [by_hand(model, paths, 4) for paths in (dataset.database_paths, dataset.queries_paths)]
    database, queries = (pca.transform(rows) for rows in sides)
    projection = run.pca.tensors()
    mapped = (torch.from_numpy(sides[0]) - projection["mean"]) @ projection["components"].T
    np.testing.assert_allclose(mapped, database, atol=1e-3)
    if whiten:
        assert pca.transform(by_hand(model, fitted_on, 4)).std(axis=0, ddof=1) == pytest.approx(1, rel=1e-3)
        database, queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (database, queries))
    assert run.rows("queries").shape == (15, 5)
    np.testing.assert_allclose(run.rows("queries"), queries, atol=1e-3)
    expected = distances_between(queries, database)
    ((distances, predictions),) = run.run(3)
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :3], rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(predictions, np.argsort(expected, axis=1)[:, :3])


def test_whitening_what_does_not_vary_is_refused(model, dataset, both):
    few = dataset.database_paths[:4] * 2
    with pytest.raises(ValueError, match="pca_whiten .* of 5 dimensions only 3 .* pca_dim 3"):
        Search(model, both(pca=few), infer_batch_size=1, pca_dim=5, pca_whiten=True, device=CPU)


SETTINGS = {"positive_distance": 25.0, "recall_values": [1, 5, 10], "device": CPU, "machine": Machine(num_workers=0)}
SETTINGS["protocol"] = Protocol(resize=SIZE, infer_batch_size=8)


def test_database_and_queries_share_no_batch(model, dataset, tmp_path):
    """The recall of a validation, which removes its descriptors, and nothing else."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    database, queries = (by_hand(model, paths, 8) for paths in (dataset.database_paths, dataset.queries_paths))
    predictions = np.argsort(distances_between(queries, database), axis=1)
    expected = search.recall_of(search.correct_among(predictions, dataset.positives(25.0)), [1, 5, 10])
    for folder in (tmp_path / "descriptors", tmp_path / "mine"):
        assert evaluate_split(model, dataset, folder=folder, **SETTINGS) == expected
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_a_validation_can_be_stopped(model, dataset, tmp_path):
    with pytest.raises(ZeroDivisionError):
        evaluate_split(model, dataset, folder=tmp_path / "some", stop=lambda: 1 / 0, **SETTINGS)
    assert not (tmp_path / "some").exists()


def test_evaluating_moves_no_random_numbers_and_switches_dropout_off(model, dataset, stored):
    model.train()
    state = torch.get_rng_state()
    first, second = (stored(dataset.queries_paths, 4, num_workers=n) for n in (0, 2))
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    np.testing.assert_array_equal(first.read(np.arange(15)), second.read(np.arange(15)))


def test_only_what_is_missing_is_computed(model, dataset, stored):
    store = stored(dataset.queries_paths, 4)
    expected, missing = store.read(np.arange(15)), [3, 9, 10]
    np.lib.format.open_memmap(store.path, mode="r+")[missing] = 0
    done = store.path.with_suffix(".done")
    done.write_bytes(bytes(index not in missing for index in range(15)))
    batches = []
    extract(model, dataset.queries_paths, store, lambda paths: batches.append(paths) or reader(2)(paths, progress=""))
    assert batches == [[dataset.queries_paths[index] for index in missing]]
    np.testing.assert_allclose(store.read(np.arange(15)), expected, atol=1e-6)


def test_images_of_several_sizes_share_a_batch():
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((60, 80), (90, 70), (60, 80), (70, 90))]
    transform = evaluation_transform(SIZE)
    together = transform_sizes(transform, images)
    torch.testing.assert_close(together, torch.cat([transform(image[None]) for image in images]))


@pytest.mark.parametrize("shape", [(3, 40, 50), (2, 3, 40, 50), (2, 5, 3, 28, 28)])
def test_normalising_is_torchvisions_and_can_overwrite(shape):
    values = torch.rand(shape)
    expected = TF.normalize(values, transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)
    assert torch.equal(transforms.normalize(values), expected) and values.max() <= 1
    overwritten = values.clone()
    again = transforms.normalize(overwritten, inplace=True)
    assert torch.equal(again, expected) and again.data_ptr() == overwritten.data_ptr()


def test_the_precision_of_validation(city, tmp_path, monkeypatch):
    """It is taken for the validation split alone."""
    taken, real = [], extraction.autocast
    monkeypatch.setattr(extraction, "autocast", lambda device, name: taken.append(name) or real(device, name))
    flags = [*TRAIN, "--extraction_batch_size=16", f"--eval_datasets_folder={city}", f"--save_dir={tmp_path}"]
    recalls = {}
    for precision in ("fp32", "bf16"):
        taken.clear()
        recalls[precision] = train_script.run(parse(TrainOptions, [*flags, f"--val_precision={precision}"]))
        half = len(taken) // 2
        assert half and taken == [precision] * half + ["fp32"] * half
    assert recalls["bf16"] == recalls["fp32"], "one epoch, so the best is the last; the test split is in fp32"
