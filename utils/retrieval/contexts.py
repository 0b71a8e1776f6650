"""Searches a database for queries by their descriptors, in one encoder context."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..outputs import report
from ..system import distributed
from ..system.device import usable_cores
from ..system.files import whole
from . import search
from .binary_codes import nearest_by_codes
from .descriptor_store import DescriptorStore, RowFile
from .extraction import EncoderContext, PlaceDescriber, descriptors
from .place_map import PlaceMap
from .search import Chunk

FLAT = 1e-8  # below this fraction of the largest variance, a direction has none in single precision
DRAWN_CONTEXTS = ("shuffled", "paired")  # in random orders
SEARCHED_BY_ALL = 100_000  # database images from which all processes share the search


def searched_by_all(database: int, index: str | None = None) -> bool:
    """Whether each process searches its share of a database of this size, rather than the main one all of it."""
    return distributed.world_size() > 1 and database >= SEARCHED_BY_ALL and index is None


class Search:
    """Searches a dataset's database for one or several query sets, in one encoder context.

    Args:
        model: the model to evaluate, in evaluation mode.
        stores: cluster vectors of `database`, of `pca` for a PCA, and of the query sets under any other names. A map,
            which holds final descriptors and any PCA, can take the place of `database`.
        test_method: how the queries were prepared, a name from `datasets.photos.transforms.TEST_METHODS`.
        context: which images share a batch in the encoder. "file_order": neighbours, as published; "unaligned": the
            same, but the queries' first batch is short; "shuffled": random ones, database and queries apart; "paired":
            random ones, in one order for both sides, which have equal lengths; "independent": each image by itself.
        infer_batch_size: images that share a batch.
        shift: queries in the first batch of the "unaligned" context, modulo the batch size.
        seed: seed of the shuffled orders and of the PCA.
        pca_dim: dimensions that a PCA reduces descriptors to; 0 for no PCA.
        pca_whiten: scale these to equal variance, and the descriptor to unit L2 norm.
        device: device of the model and of the search.
        by_all: all processes make this object and call `run` at the same points, each for its share of the database;
            otherwise one process searches alone, with all cores of the machine.
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
        self.agreements: list[dict[str, float]] = []  # of an approximate index with exact search, one per set
        self._counts = {name: len(store) for name, store in stores.items()}
        self._sets = [name for name in stores if name not in ("database", "pca")]
        self._crops = 1
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
            self._crops = store.shape[1] if is_query else self._crops
            # A photo in its own shape shares a batch with no other.
            batch = 1 if context == "independent" or (is_query and test_method == "single_query") else infer_batch_size
            side = 0 if name == "database" or context == "paired" else 1 if is_query else 2
            batches = EncoderContext(
                batch,
                (*seed, side) if context in DRAWN_CONTEXTS else None,
                shift % batch if context == "unaligned" and is_query else 0,
            )
            self._describe[name] = partial(descriptors, model, store, batches, device=device)
        self.pca: Any = None
        if self._place_map is not None:
            self.pca = self._place_map.pca
        elif pca_dim:
            from sklearn.decomposition import PCA  # takes nearly a second to import and is seldom needed

            def fit() -> Any:
                pca = PCA(pca_dim, whiten=pca_whiten, random_state=seed[0]).fit(self.rows("pca"))
                if pca_whiten and not pca.explained_variance_[-1] > FLAT * pca.explained_variance_[0]:
                    lively = int((pca.explained_variance_ > FLAT * pca.explained_variance_[0]).sum())
                    raise ValueError(
                        f"--pca_whiten would amplify noise: of {pca_dim} dimensions only {lively} vary over the "
                        f"images; use --pca_dim {lively} at most, or more varied images"
                    )
                return pca

            self.pca = distributed.on_main(fit) if by_all else fit()

    def chunks(self, name: str, *, shared: bool = False) -> Iterator[Chunk]:
        """Final descriptors of n images at a time: indices and n x D, or n*crops x D, the crops of an image together.

        Args:
            name: name of the images' store.
            shared: only this process's share of them.
        """
        if name == "database" and self._place_map is not None:
            yield from self._place_map.chunks(shared=shared)
            return
        for indices, rows in self._describe[name](shared=shared):
            if name in self._sets and self.test_method == "five_crops":
                rows = rows.reshape(len(indices), self._crops, -1).mean(axis=1)
            if self.pca is not None:
                rows = self.pca.transform(rows).astype(np.float32)
                if self.pca.whiten:
                    search.to_unit_norm(rows)
            yield indices, rows

    def projection(self) -> dict[str, Tensor]:
        """The PCA as a linear map: subtract `mean`, D, then multiply by `components`, d x D."""
        scale = np.sqrt(self.pca.explained_variance_)[:, None] if self.pca.whiten else 1.0
        found = {"mean": self.pca.mean_, "components": self.pca.components_ / scale}
        return {name: torch.from_numpy(np.asarray(value, dtype=np.float32)) for name, value in found.items()}

    def rows(self, name: str) -> NDArray[np.float32]:
        """All final descriptors, in the order of the images, the crops of an image together."""
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
        """Runs the search.

        Args:
            k: database images per query; more than there are finds them all.
            index: description of an approximate FAISS index, or "binary"; None searches exactly.
            index_parameters: search parameters of the index.
            rerank: images per query that the binary index ranks exactly.
            majority_weight: weight of the crops' votes in the test method `maj_voting`.

        Returns:
            For each query set, squared distances and database indices, each Q x k, best first; only in the main
            process if all search.
        """
        with search.cores(usable_cores(alone=not self._by_all)) if distributed.world_size() > 1 else nullcontext():
            distances, predictions = self._found(min(k, self._counts["database"]), index, index_parameters, rerank)
        helps = self._by_all and not distributed.is_main()
        if self.test_method in ("nearest_crop", "maj_voting") and not helps:
            weight = majority_weight if self.test_method == "maj_voting" else 0.0
            distances, predictions = search.merge_crops(
                distances, predictions, crops=self._crops, majority_weight=weight
            )
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
        """Writes final descriptors, e.g. of `database=`, to `<name>.npy`, N (x crops) x D, and the paths beside it.

        Raises:
            OSError: they cannot be written; nothing is left behind.
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
