"""The search of queries in a database by their descriptors, in one encoder context."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import distributed, report, search
from .binary_codes import nearest_by_codes
from .descriptor_store import DescriptorStore, RowFile
from .device import usable_cores
from .extraction import EncoderContext, PlaceDescriber, descriptors
from .outputs import whole
from .place_map import PlaceMap
from .search import Chunk

FLAT = 1e-8  # a direction's variance is none below so much of the largest, in single precision
DRAWN_CONTEXTS = ("shuffled", "paired")  # in random orders
SEARCHED_BY_ALL = 100_000  # database images, from which all processes take part in the search


def searched_by_all(database: int, index: str | None = None) -> bool:
    """Whether every process searches its share of so many database images, rather than the main one all of them."""
    return distributed.world_size() > 1 and database >= SEARCHED_BY_ALL and index is None


class Search:
    """The search of a dataset's queries, of one set or several, in its database, in one encoder context.

    Args:
        model: what is evaluated, in evaluation mode.
        stores: cluster vectors of `database`, for a PCA of `pca`, and of the sets of queries under any other names. In
            place of the first may be a map, which holds the descriptors themselves and any PCA.
        test_method: how the queries were prepared, a name from `datasets.transforms.TEST_METHODS`.
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
            # A photo in its own shape shares a batch with none.
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
                rows = rows.reshape(len(indices), self._crops, -1).mean(axis=1)
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
