"""From photos to descriptors: cluster vectors on disk, and descriptors computed from them in chunks.

Each image passes through the backbone once; the vectors before the cross-image encoder (N x crops x K x D) are stored.
Everything that depends on which images share a batch is computed from them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..system import distributed
from ..system.device import autocast, to_cpu
from .descriptor_store import DescriptorStore
from .search import Chunk

CHUNK_BYTES = 2**26  # of descriptors in memory at a time, roughly
ENCODED_TOGETHER = 256  # images, roughly


class DescriptorModel(Protocol):
    """A model to evaluate, in two parts; only the second looks across the images of a batch."""

    @property
    def vectors_shape(self) -> tuple[int, int]:
        """K and D."""

    def cluster_vectors(self, images: Tensor) -> Tensor:
        """Normalised images B x 3 x H x W to B x K x D, each image by itself."""

    def describe(self, vectors: Tensor, group: int | None = None) -> Tensor:
        """B x K x D to descriptors B x K*D, or fewer dimensions, looking across `group` neighbours."""

    def eval(self) -> nn.Module:
        """Switches dropout off."""


@dataclass(frozen=True)
class EncoderContext:
    """Which images share a batch in the cross-image encoder: part of the protocol, since descriptors depend on it."""

    batch_size: int  # 1 encodes each photo by itself
    seed: tuple[int, ...] | None = None  # of a random order of the images; None for the order of their file names
    shift: int = 0  # images in a short first batch; 0 for a full one


@torch.inference_mode()
def extract(
    model: DescriptorModel,
    paths: Sequence[str],
    store: DescriptorStore,
    read_images: Callable[[Sequence[str]], Iterable[Tensor]],
    precision: str = "fp32",
) -> None:
    """Runs backbone and aggregation, in evaluation mode, on the images that the store does not have yet.

    With several processes, each takes its share. The store is N x crops x K x D for N paths; `read_images` turns paths
    into batches, B x (crops x) 3 x H x W; `precision` is a name from `utils.system.device.autocast`.
    """
    model.eval()
    missing = store.missing()
    distributed.barrier()  # until all have read the same list
    missing = missing[distributed.shares(len(missing))[distributed.rank()]]

    def vectors() -> Iterator[Tensor]:
        for images in read_images([paths[index] for index in missing]):
            with autocast(images.device, precision):
                crop_vectors = model.cluster_vectors(images.flatten(0, -4))  # (B*crops, K, D)
            yield crop_vectors.float().view(len(images), *store.shape[1:])

    start = 0
    for rows in to_cpu(vectors()):
        store.write(missing[start : start + len(rows)], rows.numpy())
        start += len(rows)
    distributed.barrier()


@torch.inference_mode()
def descriptors(
    model: DescriptorModel, store: DescriptorStore, context: EncoderContext, *, device: torch.device
) -> Iterator[Chunk]:
    """Turns cluster vectors into descriptors by the model, which is in evaluation mode on the device.

    All crops in a batch attend to each other.

    Yields:
        A chunk in the context's order: indices (n) and descriptors (n*crops rows, the crops of an image together).
    """
    _, crops, K, D = store.shape
    batch = context.batch_size
    order = np.arange(len(store))
    if context.seed is not None:
        order = np.random.default_rng(context.seed).permutation(order)
    # Images that are encoded together, and that form a chunk: whole batches.
    together = max(batch, ENCODED_TOGETHER // batch * batch)
    in_chunk = max(together, CHUNK_BYTES // (crops * K * D * 4) // together * together)
    for start, end in pairwise([0, *range(context.shift or in_chunk, len(order), in_chunk), len(order)]):
        if start == end:
            continue
        indices = order[start:end]
        vectors = store.read(indices).reshape(-1, K, D)
        described = np.empty((0, 0), dtype=np.float32)
        whole = len(indices) // batch * batch  # images in whole batches, before the rest
        for first, last in pairwise([*range(0, whole, together), whole, len(indices)]):
            if first < last:
                rows = slice(first * crops, last * crops)
                group = min(batch, last - first) * crops
                encoded = model.describe(torch.from_numpy(vectors[rows]).to(device), group).cpu().numpy()
                if not len(described):
                    described = np.empty((len(vectors), encoded.shape[1]), dtype=np.float32)
                described[rows] = encoded
        yield indices, described
