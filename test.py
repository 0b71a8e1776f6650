"""Extracts descriptors and measures recall@N: the evaluation that train.py and eval.py share."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.database_queries import DatabaseQueries, ImageList
from datasets.transforms import Transform
from utils import distributed, search


class PlaceDescriber(Protocol):
    """What is evaluated: a model in two parts, of which only the second looks across the images of a batch."""

    def cluster_vectors(self, images: Tensor) -> Tensor:
        """Normalised images B x 3 x H x W to B x K x D, each image by itself."""

    def describe(self, vectors: Tensor) -> Tensor:
        """B x K x D to descriptors B x K*D."""

    def eval(self) -> nn.Module:
        """Switches dropout off."""


def image_batches(
    paths: Sequence[str],
    *,
    transform: Transform,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    progress: str,
) -> Iterator[Tensor]:
    """Reads images in order, under a progress bar.

    Args:
        paths: the images.
        transform: gives tensors of one shape, 3 x H x W.
        batch_size: images at a time.
        num_workers: processes that read images; 0 reads them in this one.
        device: where the batches go.
        progress: the bar's name.

    Yields:
        B x 3 x H x W on the device.
    """
    loader = DataLoader(
        ImageList(paths, transform),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # of its own, so that evaluating moves nobody's random numbers
    )
    with tqdm(total=len(paths), desc=progress, unit="image", disable=not distributed.is_main()) as bar:
        for images in loader:
            yield images.to(device, non_blocking=True)
            bar.update(len(images))


@torch.inference_mode()
def extract_vectors(model: PlaceDescriber, batches: Iterator[Tensor], count: int) -> NDArray[np.float32]:
    """Runs backbone and aggregation over `count` images in batches B x 3 x H x W, in evaluation mode: N x K x D."""
    model.eval()
    vectors = np.empty((0, 0, 0), dtype=np.float32)
    start = 0
    for images in batches:
        batch = model.cluster_vectors(images).float().cpu().numpy()
        if start == 0:
            vectors = np.empty((count, *batch.shape[1:]), dtype=np.float32)
        vectors[start : start + len(batch)] = batch
        start += len(batch)
    assert start == count
    return vectors


@torch.inference_mode()
def describe_in_batches(
    model: PlaceDescriber, vectors: NDArray[np.float32], *, batch_size: int, device: torch.device
) -> NDArray[np.float32]:
    """Turns cluster vectors N x K x D into descriptors N x K*D, `batch_size` neighbours in file order at a time.

    With the cross-image encoder these batches are part of the protocol: a descriptor depends on who shares its batch.
    The descriptors take the place of the vectors in memory.
    """
    descriptors = vectors.reshape(len(vectors), vectors.shape[1] * vectors.shape[2])
    for start in range(0, len(vectors), batch_size):
        rows = slice(start, start + batch_size)
        descriptors[rows] = model.describe(torch.from_numpy(vectors[rows]).to(device)).float().cpu().numpy()
    return descriptors


def evaluate(
    model: PlaceDescriber,
    dataset: DatabaseQueries,
    *,
    read_images: Callable[..., Iterator[Tensor]],
    recall_values: Sequence[int],
    positive_distance: float,
    infer_batch_size: int,
    device: torch.device,
) -> dict[int, float]:
    """Recall@N of a model on a dataset: `{N: percent of the queries}`.

    Database and queries are described in two passes, so that no batch mixes them. Of several processes each describes
    its share, in the same batches as a single one would, and the main one searches; all get the result.

    Args:
        model: what is evaluated.
        dataset: database and queries.
        read_images: `image_batches` but for the paths and the name of the bar; no recall depends on its batch size.
        recall_values: the N.
        positive_distance: a database image this near to a query is correct, in metres.
        infer_batch_size: images that share a batch in `describe`.
        device: where the model is.
    """
    descriptors = {}
    for name, all_paths in (("database", dataset.database_paths), ("queries", dataset.queries_paths)):
        paths = all_paths[distributed.shares(len(all_paths), infer_batch_size)[distributed.rank()]]
        vectors = extract_vectors(model, read_images(paths, progress=name), len(paths))
        described = describe_in_batches(model, vectors, batch_size=infer_batch_size, device=device)
        descriptors[name] = distributed.gather_rows(described)
    recalls: dict[int, float] = {}
    if distributed.is_main():
        _, predictions = search.nearest(descriptors["queries"], descriptors["database"], max(recall_values))
        recalls = search.recall_at(predictions, dataset.positives(positive_distance), recall_values)
    return distributed.broadcast(recalls)


def format_recalls(recalls: dict[int, float]) -> str:
    """`R@1: 27.0, R@5: 42.3, ...`"""
    return ", ".join(f"R@{n}: {recall:.1f}" for n, recall in recalls.items())
