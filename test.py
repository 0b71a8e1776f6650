"""Extracts descriptors and measures recall@N: the evaluation that train.py and eval.py share.

Each image passes the backbone once, and what comes out before the cross-image encoder is kept (N x crops x K x D).
Everything that depends on which images share a batch is computed from that, a chunk at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from datasets.database_queries import DatabaseQueries, ImageList
from datasets.transforms import CROPS, Transform, transform_sizes
from utils import distributed, report, search
from utils.binary_codes import nearest_by_codes
from utils.descriptor_store import DescriptorStore, RowFile
from utils.device import autocast, to_cpu, to_device, usable_cores
from utils.outputs import whole
from utils.place_map import PlaceMap
from utils.reading import packed, read_batches, unpacked
from utils.search import Chunk

CHUNK_BYTES = 2**26  # of descriptors in memory at a time, about
ENCODED_TOGETHER = 256  # images, about
FLAT = 1e-8  # a direction's variance is none below so much of the largest, in single precision
SEARCHED_BY_ALL = 100_000  # database images, from which all processes take part in the search


class PlaceDescriber(Protocol):
    """What is evaluated: a model in two parts, of which only the second looks across the images of a batch."""

    @property
    def vectors_shape(self) -> tuple[int, int]:
        """K and D."""

    def cluster_vectors(self, images: Tensor) -> Tensor:
        """Normalised images B x 3 x H x W to B x K x D, each image by itself."""

    def describe(self, vectors: Tensor, group: int | None = None) -> Tensor:
        """B x K x D to descriptors B x K*D, or fewer numbers, looking across `group` neighbours."""

    def eval(self) -> nn.Module:
        """Switches dropout off."""


@dataclass(frozen=True)
class EncoderContext:
    """Which images share a batch in the cross-image encoder: part of the protocol, since descriptors depend on it.

    Attributes:
        batch_size: images that share a batch; 1 gives what each photo gives by itself.
        seed: of the order that the images are taken in; None for the order of their file names.
        shift: images of the first batch, a short one; 0 for a whole one.
    """

    batch_size: int
    seed: tuple[int, ...] | None = None
    shift: int = 0

    def order(self, count: int) -> NDArray[np.int64]:
        """The images 0 to count - 1 in the order in which they are taken."""
        if self.seed is None:
            return np.arange(count)
        return np.random.default_rng(self.seed).permutation(count)


def image_batches(
    paths: Sequence[str],
    *,
    transform: Transform,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    progress: str,
    upright: bool = False,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Reads images in order, under a progress bar.

    Args:
        paths: the images.
        transform: bytes B x 3 x H x W to what the model takes, B x (crops x) 3 x H' x W', of one size unless the batch
            size is 1. It runs where the images are read, or on the device where that is no CPU.
        batch_size: images at a time.
        num_workers: threads that read images ahead, and end with this generator; 0 reads in the caller's.
        device: where the batches go.
        progress: the bar's name.
        upright: turn the images as their EXIF data says. Such photos can be large, and are resized where they are
            read: whole ones would fill the memory.
        stop: called before each batch, to leave by an exception.

    Yields:
        B x (crops x) 3 x H x W on the device.

    Raises:
        ValueError: an image cannot be read, the first in order; the message names the file.
    """
    on_device = device.type != "cpu" and not upright
    images = ImageList(paths, None if on_device else transform, upright=upright)

    def pack(items: list[Tensor]) -> Sequence[Any]:
        if on_device:
            return packed(items, pinned=device.type == "cuda")
        batch = torch.stack(items)
        return [batch.pin_memory() if device.type == "cuda" else batch]

    keys = [range(start, min(start + batch_size, len(paths))) for start in range(0, len(paths), batch_size)]
    read = read_batches(images.__getitem__, pack, keys, threads=num_workers)
    with (
        closing(read),
        tqdm(total=len(paths), desc=progress, unit="image", disable=not (paths and distributed.is_main())) as bar,
    ):
        for batch in to_device(read, device):
            stop()
            batch_images = transform_sizes(transform, unpacked(*batch)) if on_device else batch[0]
            yield batch_images
            bar.update(len(batch_images))
    images.log_depths(progress)


@torch.inference_mode()
def extract(
    model: PlaceDescriber,
    paths: Sequence[str],
    store: DescriptorStore,
    read_images: Callable[[Sequence[str]], Iterable[Tensor]],
    precision: str = "fp32",
) -> None:
    """Runs backbone and aggregation, in evaluation mode, over the images that the store does not have yet.

    Of several processes each takes its share.

    Args:
        model: what is evaluated.
        paths: N images.
        store: gets N x crops x K x D.
        read_images: turns paths into batches, B x (crops x) 3 x H x W.
        precision: of the arithmetic, a name from `utils.device.autocast`.
    """
    model.eval()
    missing = store.missing()
    distributed.barrier()  # all have seen the same
    missing = missing[distributed.shares(len(missing))[distributed.rank()]]

    def vectors() -> Iterator[Tensor]:
        for images in read_images([paths[index] for index in missing]):
            with autocast(images.device, precision):
                of_crops = model.cluster_vectors(images.flatten(0, -4))  # (B*crops, K, D)
            yield of_crops.float().view(len(images), *store.shape[1:])

    start = 0
    for rows in to_cpu(vectors()):
        store.write(missing[start : start + len(rows)], rows.numpy())
        start += len(rows)
    distributed.barrier()


def images_at_a_time(shape: tuple[int, ...], batch: int) -> tuple[int, int]:
    """How many images of a store N x crops x K x D go through the encoder together, and how many make a chunk; whole
    batches in both."""
    together = max(batch, ENCODED_TOGETHER // batch * batch)
    return together, max(together, CHUNK_BYTES // (int(np.prod(shape[1:])) * 4) // together * together)


@torch.inference_mode()
def descriptors(
    model: PlaceDescriber,
    store: DescriptorStore,
    context: EncoderContext,
    *,
    device: torch.device,
    shared: bool = False,
) -> Iterator[Chunk]:
    """Turns cluster vectors into descriptors, some neighbours in the context's order at a time.

    Args:
        model: what is evaluated, in evaluation mode.
        store: cluster vectors, N x crops x K x D.
        context: the crops of images that share a batch all look at each other.
        device: where the model is.
        shared: only this process's share of the images, in the chunks in which one process alone would take them.

    Yields:
        Indices (n) and descriptors (n*crops rows, the crops of an image below each other), on the CPU.
    """
    _, crops, K, D = store.shape
    batch = context.batch_size
    order = context.order(len(store))
    together, in_chunk = images_at_a_time(store.shape, batch)
    part = distributed.shares(len(order), in_chunk)[distributed.rank()] if shared else slice(0, len(order))
    starts = [part.start, *range(part.start + (context.shift or in_chunk), part.stop, in_chunk)]
    for start, end in pairwise([*starts, part.stop]):
        if start == end:
            continue
        indices = order[start:end]
        vectors = store.read(indices).reshape(-1, K, D)
        described = np.empty((0, 0), dtype=np.float32)
        whole = len(indices) // batch * batch
        # All whole batches, then what is left of the last one.
        bounds = [*range(0, whole, together), whole, len(indices)]
        for first, last in pairwise(bounds):
            if first < last:
                rows = slice(first * crops, last * crops)
                group = min(batch, last - first) * crops
                found = model.describe(torch.from_numpy(vectors[rows]).to(device), group).cpu().numpy()
                if not len(described):
                    described = np.empty((len(vectors), found.shape[1]), dtype=np.float32)
                described[rows] = found
        yield indices, described


def searched_by_all(database: int, index: str | None = None) -> bool:
    """Whether every process searches its share of so many database images, rather than the main one all of them."""
    return distributed.world_size() > 1 and database >= SEARCHED_BY_ALL and index is None


class Search:
    """The search of a dataset's queries, of one set or several, in its database, in one encoder context.

    Args:
        model: what is evaluated, in evaluation mode.
        stores: cluster vectors of `database`, for a PCA of `pca`, and of the sets of queries under any other names. In
            place of the first may be a map, which holds the descriptors themselves and any PCA.
        test_method: how the queries were prepared, a name from `transforms.TEST_METHODS`.
        context: images that share a batch in the encoder: "file_order" takes neighbours, as published; "unaligned"
            too, but the queries' first batch is a short one; "shuffled" any (database and queries apart); "paired" any,
            in one order for both sides, which are of one length; "independent" nobody but the image itself.
        infer_batch_size: images that share a batch.
        shift: queries in the first batch of the "unaligned" context, whole batches aside.
        seed: of the shuffled orders, and of the PCA.
        pca_dim: numbers that a PCA leaves of a descriptor; 0 for none.
        pca_whiten: scale these to the same variance, and the descriptor to unit L2 norm.
        device: where the model is, and what is searched on.
        by_all: all processes make this object and call `run` at the same points, each for its share of the database;
            else one alone has the cores of the machine.
    """

    def __init__(
        self,
        model: PlaceDescriber,
        stores: Mapping[str, DescriptorStore | PlaceMap],
        *,
        test_method: str = "hard_resize",
        context: str = "file_order",
        infer_batch_size: int,
        shift: int = 0,
        seed: tuple[int, ...] = (0,),
        pca_dim: int = 0,
        pca_whiten: bool = False,
        device: torch.device,
        by_all: bool = False,
    ):
        self.test_method = test_method
        self.agreements: list[dict[str, float]] = []  # of an approximate index with exact search, one for each set
        self._counts = {name: len(store) for name, store in stores.items()}
        self._sets = [name for name in stores if name not in ("database", "pca")]
        self._parts = search.parts_of([self._counts[name] for name in self._sets])
        self._device = device
        self._by_all = by_all
        self._describe: dict[str, Callable[..., Iterable[Chunk]]] = {}
        self._place_map: PlaceMap | None = None
        for name, store in stores.items():
            if isinstance(store, PlaceMap):
                self._place_map = store
                continue
            is_query = name in self._sets
            # A photo in its own shape shares a batch with none.
            batch = 1 if context == "independent" or (is_query and test_method == "single_query") else infer_batch_size
            side = 0 if name == "database" or context == "paired" else 1 if is_query else 2
            batches = EncoderContext(
                batch,
                (*seed, side) if context in ("shuffled", "paired") else None,
                shift % batch if context == "unaligned" and is_query else 0,
            )
            self._describe[name] = partial(descriptors, model, store, batches, device=device)
        self.pca: Any = None
        if self._place_map is not None:
            self.pca = self._place_map.pca
        elif pca_dim:
            from sklearn.decomposition import PCA  # nearly a second to import, and seldom asked for

            def fit() -> Any:
                pca = PCA(pca_dim, whiten=pca_whiten, random_state=seed[0]).fit(self.rows("pca"))
                if pca_whiten and not pca.explained_variance_[-1] > FLAT * pca.explained_variance_[0]:
                    lively = int((pca.explained_variance_ > FLAT * pca.explained_variance_[0]).sum())
                    raise ValueError(
                        f"--pca_whiten would scale noise: of the {pca_dim} numbers only {lively} vary over the images; "
                        f"use --pca_dim {lively} at most, or more images that differ"
                    )
                return pca

            self.pca = distributed.on_main(fit) if by_all else fit()

    def chunks(self, name: str, *, shared: bool = False) -> Iterator[Chunk]:
        """Final descriptors of n images at a time: indices and n x D, or n*crops x D with crops below each other.

        Args:
            name: of the images.
            shared: this process's share of them.
        """
        if name == "database" and self._place_map is not None:
            yield from self._place_map.chunks(shared=shared)
            return
        for indices, rows in self._describe[name](shared=shared):
            if name in self._sets and self.test_method == "five_crops":
                rows = rows.reshape(len(indices), CROPS[self.test_method], -1).mean(axis=1)
            if self.pca is not None:
                rows = self.pca.transform(rows).astype(np.float32)
                if self.pca.whiten:
                    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            yield indices, rows

    def projection(self) -> dict[str, Tensor]:
        """The PCA as a linear map: what to subtract, `mean`, D, and what to multiply by, `components`, d x D."""
        scale = np.sqrt(self.pca.explained_variance_)[:, None] if self.pca.whiten else 1.0
        found = {"mean": self.pca.mean_, "components": self.pca.components_ / scale}
        return {name: torch.from_numpy(np.asarray(value, dtype=np.float32)) for name, value in found.items()}

    def rows(self, name: str) -> NDArray[np.float32]:
        """All final descriptors, in the order of the images, crops below each other."""
        rows = np.empty((0, 0, 0), dtype=np.float32)
        for indices, described in self.chunks(name):
            described = described.reshape(len(indices), -1, described.shape[1])  # (n, crops, D)
            if not len(rows):
                rows = np.empty((self._counts[name], *described.shape[1:]), dtype=np.float32)
            rows[indices] = described
        return rows.reshape(-1, rows.shape[2])

    def run(
        self,
        k: int,
        *,
        index: str | None = None,
        index_parameters: str = "",
        rerank: int = 0,
        majority_weight: float = 0.01,
    ) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Searches.

        Args:
            k: database images a query, at most as many as there are.
            index: description of an approximate FAISS index, or "binary"; None searches exactly.
            index_parameters: of its search.
            rerank: images a query that the binary index ranks exactly.
            majority_weight: of agreement between crops, in the test method `maj_voting`.

        Returns:
            For each set of queries squared distances and database indices, each Q x k, best first; where all processes
            search, in the main one.
        """
        with search.cores(usable_cores(alone=not self._by_all)) if distributed.world_size() > 1 else nullcontext():
            distances, predictions = self._found(min(k, self._counts["database"]), index, index_parameters, rerank)
        helps = self._by_all and not distributed.is_main()
        if self.test_method in ("nearest_crop", "maj_voting") and not helps:
            weight = majority_weight if self.test_method == "maj_voting" else 0.0
            crops = CROPS[self.test_method]
            distances, predictions = search.merge_crops(distances, predictions, crops=crops, majority_weight=weight)
        return [(distances[part], predictions[part]) for part in self._parts]

    def _found(
        self, k: int, index: str | None, index_parameters: str, rerank: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        queries = [self.rows(name) for name in self._sets]
        sets = [len(rows) for rows in queries]

        def exactly() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            chunks = self.chunks("database", shared=self._by_all)
            return search.nearest(np.concatenate(queries), chunks, k, self._device, sets)

        if index is None:
            return search.first_of_all(exactly, k) if self._by_all else exactly()
        by_index = partial(search.nearest_by_index, factory=index, parameters=index_parameters)
        if index == "binary":
            by_index = partial(nearest_by_codes, rerank=rerank)
        chunks = partial(self.chunks, "database")
        distances, predictions, self.agreements = by_index(
            np.concatenate(queries), chunks, self._counts["database"], k, device=self._device, sets=sets
        )
        return distances, predictions

    def save(self, folder: Path, **paths: Sequence[str]) -> None:
        """Writes final descriptors, e.g. of `database=`, to `<name>.npy`, N (x crops) x D, with paths beside them.

        Raises:
            OSError: they cannot be written; nothing is left of them then.
        """
        with whole(folder) as temporary:
            temporary.mkdir()
            for name, images in paths.items():
                file: RowFile | None = None
                for indices, rows in self.chunks(name):
                    if file is None:
                        crops = len(rows) // len(indices)
                        shape = (len(images), *((crops,) if crops > 1 else ()), rows.shape[1])
                        file = RowFile(temporary / f"{name}.npy", shape, rows.dtype)
                        file.create()
                        file.open()
                    file.write(indices, rows.reshape(-1, *shape[1:]))
                report.write_paths(temporary / f"{name}.txt", images)


def evaluate(
    model: PlaceDescriber,
    dataset: DatabaseQueries,
    *,
    read_images: Callable[..., Iterator[Tensor]],
    recall_values: Sequence[int],
    positive_distance: float,
    infer_batch_size: int,
    device: torch.device,
    folder: Path,
    precision: str = "fp32",
) -> dict[int, float]:
    """Recall@N of a model on a dataset, by `hard_resize` and in file order: `{N: percent of the queries}`.

    Of several processes each describes its share, and the main one searches, or all do (`searched_by_all`); all get the
    result. A search that fails costs the extraction too: training can go on from its checkpoint, and does it anew.

    Args:
        model: what is evaluated.
        dataset: database and queries.
        read_images: `image_batches` but for the paths and the name of the bar; no recall depends on its batch size.
        recall_values: the N.
        positive_distance: a database image this near to a query is correct, in metres.
        infer_batch_size: images that share a batch in `describe`.
        device: where the model is.
        folder: for descriptors while they are needed, which are removed afterwards.
        precision: of the backbone, a name from `utils.device.autocast`.
    """
    recalls: dict[int, float] = {}
    stores: dict[str, DescriptorStore] = {}
    try:
        for name, paths in (("database", dataset.database_paths), ("queries", dataset.queries_paths)):
            stores[name] = DescriptorStore(folder, name, (len(paths), 1, *model.vectors_shape))
            extract(model, paths, stores[name], partial(read_images, progress=name), precision)
        by_all = searched_by_all(len(dataset.database_paths))
        if by_all or distributed.is_main():
            searched = Search(model, stores, infer_batch_size=infer_batch_size, device=device, by_all=by_all)
            ((_, predictions),) = searched.run(max(recall_values))
            if distributed.is_main():
                recalls = search.recall_at(predictions, dataset.positives(positive_distance), recall_values)
    finally:
        if distributed.is_main():
            for store in stores.values():
                store.remove()
    return distributed.broadcast(recalls)


def format_recalls(recalls: dict[int, float]) -> str:
    """`R@1: 27.0, R@5: 42.3, ...`"""
    return ", ".join(f"R@{n}: {recall:.1f}" for n, recall in recalls.items())
