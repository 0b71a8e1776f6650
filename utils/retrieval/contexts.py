"""Searches a database for queries by their descriptors, in one context of the cross-image encoder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..system import distributed
from ..system.device import usable_cores
from ..system.files import atomic_write, write_paths
from . import search
from .descriptor_store import DescriptorStore, RowFile
from .extraction import DescriptorModel, EncoderContext, descriptors
from .indices import nearest_by_index
from .place_map import PlaceMap
from .projection import Projection
from .search import Chunk

DRAWN_CONTEXTS = ("shuffled", "paired")  # in random orders
ORDERS = 5  # of these, over which recall is averaged

Stores = Mapping[str, DescriptorStore | PlaceMap]  # by name: database, query sets and perhaps pca


def encoder_context(name: str, side: str, *, batch_size: int, seed: tuple[int, ...]) -> EncoderContext:
    """Which images share a batch in the encoder.

    Args:
        name: "file_order": neighbours, as published; "unaligned": the same, but the queries' first batch is half as
            long; "shuffled": random ones, database and queries apart; "paired": random ones, in one order for both
            sides, which have equal lengths; "independent": each image by itself.
        side: "database", "queries" or "pca".
        batch_size: images that share a batch, unless they are independent.
        seed: of the random orders.
    """
    batch_size = 1 if name == "independent" else batch_size
    number = 0 if side == "database" or name == "paired" else 1 if side == "queries" else 2
    return EncoderContext(
        batch_size,
        (*seed, number) if name in DRAWN_CONTEXTS else None,
        batch_size // 2 if name == "unaligned" and side == "queries" else 0,
    )


class Search:
    """Searches a dataset's database for one or several query sets, in one encoder context.

    Args:
        model: the model to evaluate, in evaluation mode on the device.
        stores: cluster vectors of `database`, of `pca` for a PCA, and of the query sets under any other names. A map,
            which holds final descriptors and any PCA, can take the place of `database`.
        test_method: how the queries were prepared, a name from `datasets.photos.transforms.TEST_METHODS`.
        context: a name that `encoder_context` takes.
        infer_batch_size: images that share a batch.
        seed: of the random orders and of the PCA.
        pca_dim, pca_whiten: as the options.
    """

    def __init__(
        self,
        model: DescriptorModel,
        stores: Stores,
        *,
        test_method: str = "hard_resize",
        context: str = "file_order",
        infer_batch_size: int,
        seed: tuple[int, ...] = (0,),
        pca_dim: int = 0,
        pca_whiten: bool = False,
        device: torch.device,
    ):
        self.context = context
        self.test_method = test_method
        self.agreements: list[dict[str, float]] = []  # of an approximate index with exact search, one per set
        self.stores = stores
        self.sets = [name for name in stores if name not in ("database", "pca")]
        self._device = device
        self._describe = {}
        for name, store in stores.items():
            if isinstance(store, PlaceMap):
                continue
            side = "queries" if name in self.sets else name
            # A photo in its own shape shares a batch with no other.
            batch_size = 1 if side == "queries" and test_method == "single_query" else infer_batch_size
            batches = encoder_context(context, side, batch_size=batch_size, seed=seed)
            self._describe[name] = partial(descriptors, model, store, batches, device=device)
        self.pca: Projection | None = None
        if isinstance(place_map := stores["database"], PlaceMap):
            self.pca = place_map.pca
        elif pca_dim:
            self.pca = Projection.fit(self.rows("pca"), pca_dim, whiten=pca_whiten, seed=seed[0])

    def chunks(self, name: str) -> Iterator[Chunk]:
        """Final descriptors of n images of a store at a time: indices and n x D or, crops of an image together,
        n*crops x D."""
        store = self.stores[name]
        if isinstance(store, PlaceMap):
            yield from store.chunks()
            return
        for indices, rows in self._describe[name]():
            if name in self.sets and self.test_method == "five_crops":
                rows = rows.reshape(len(indices), store.shape[1], -1).mean(axis=1)
            yield indices, rows if self.pca is None else self.pca.transform(rows)

    def rows(self, name: str) -> NDArray[np.float32]:
        """All final descriptors, in the order of the images, the crops of an image together."""
        rows = np.empty((0, 0, 0), dtype=np.float32)
        for indices, described in self.chunks(name):
            described = described.reshape(len(indices), -1, described.shape[1])  # (n, crops, D)
            if not len(rows):
                rows = np.empty((len(self.stores[name]), *described.shape[1:]), dtype=np.float32)
            rows[indices] = described
        return rows.reshape(-1, rows.shape[2])

    def run(
        self, k: int, settings: Any = None, *, majority_weight: float = 0.01
    ) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Runs the search, with all cores of the machine.

        Args:
            k: database images per query; more than there are finds them all.
            settings: has `index`, `index_parameters` and `rerank`, like the group; None searches exactly.
            majority_weight: weight of the crops' votes in the test method `maj_voting`.

        Returns:
            For each query set, squared distances and database indices, each Q x k, best first.
        """
        count = len(self.stores["database"])
        several = distributed.world_size() > 1  # the others wait, or have ended
        with search.cores(usable_cores(alone=True)) if several else nullcontext():
            rows_of_sets = [self.rows(name) for name in self.sets]
            queries, sets, k = np.concatenate(rows_of_sets), [len(rows) for rows in rows_of_sets], min(k, count)
            if settings is None or settings.index is None:
                distances, predictions = search.nearest(queries, self.chunks("database"), k, self._device, sets)
            else:
                distances, predictions, self.agreements = nearest_by_index(
                    queries,
                    partial(self.chunks, "database"),
                    count,
                    k,
                    factory=settings.index,
                    parameters=settings.index_parameters,
                    rerank=settings.rerank,
                    device=self._device,
                    sets=sets,
                )
        crops = sets[0] // len(self.stores[self.sets[0]])  # whose distances are not averaged
        if crops > 1:
            weight = majority_weight if self.test_method == "maj_voting" else 0.0
            distances, predictions = search.merge_crops(distances, predictions, crops=crops, majority_weight=weight)
        parts = search.parts_of([rows // crops for rows in sets])
        return [(distances[part], predictions[part]) for part in parts]

    def save(self, folder: Path, **paths: Sequence[str]) -> None:
        """Writes final descriptors, e.g. of `database=`, to `<name>.npy`, N (x crops) x D, and the paths beside it."""
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            for name, images in paths.items():
                file: RowFile | None = None
                for indices, rows in self.chunks(name):
                    if len(rows) > len(indices):  # several crops
                        rows = rows.reshape(len(indices), -1, rows.shape[1])
                    if file is None:
                        file = RowFile(temporary / f"{name}.npy", (len(images), *rows.shape[1:]), rows.dtype)
                        file.create()
                    file.write(indices, rows)
                write_paths(temporary / f"{name}.txt", images)
