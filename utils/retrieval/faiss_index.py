"""Approximate FAISS indices, with FAISS's errors as ours. Needs no PyTorch, which takes seconds to import."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

TRAINING_BYTES = 2**30  # of descriptors to train an approximate index on, at most


def new_index(dim: int, factory: str, parameters: str = "") -> Any:
    """An empty FAISS index.

    Args:
        dim: dimension of a descriptor.
        factory: FAISS's description, e.g. "IVF4096,PQ64".
        parameters: search parameters, e.g. "nprobe=32".

    Raises:
        ValueError: FAISS does not understand it.
    """
    with refusals(f"make --index {factory!r} {parameters!r} for descriptors of {dim} numbers"):
        index = faiss.index_factory(dim, factory)
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)  # type: ignore[arg-type]
    return index


def train_index(index: Any, sample: NDArray[np.float32], factory: str) -> None:
    """Trains an index, made from `factory`, on n x D descriptors.

    Raises:
        ValueError: FAISS fails, mostly since there are too few.
    """
    with refusals(f"train --index {factory!r} on {len(sample)} descriptors", len(sample)):
        index.train(sample)


def add_to_index(index: Any, descriptors: NDArray[np.float32], factory: str) -> None:
    """Adds n x D descriptors to an index.

    Raises:
        ValueError: FAISS fails.
    """
    with refusals(f"fill --index {factory!r}"):
        index.add(descriptors)


def search_index(
    index: Any, queries: NDArray[np.float32], k: int, factory: str, parameters: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Squared distances and rows of the index, each Q x k; -1 where it finds fewer.

    Raises:
        ValueError: FAISS fails.
    """
    with refusals(f"search --index {factory!r} {parameters!r}"):
        found: tuple[NDArray[np.float32], NDArray[np.int64]] = index.search(queries, k)
    return found


@contextmanager
def refusals(what: str, rows: int | None = None) -> Iterator[None]:
    """Within the block, an error of FAISS becomes a ValueError with FAISS's own reason and a remedy.

    Args:
        what: what FAISS cannot do.
        rows: number of descriptors to train on, if it trains.
    """
    try:
        yield
    except (RuntimeError, AssertionError, MemoryError, TypeError) as error:
        reason = without_place(str(error)) or type(error).__name__
        remedy = "see FAISS's page on the index factory"
        if rows is not None and "number of clusters" in reason:
            remedy = f"use one of at most {rows} lists and {rows} codewords"
        elif rows is not None and "PCA matrix cannot output" in reason:
            remedy = f"use one that reduces to at most {rows} numbers"
        raise ValueError(f"FAISS cannot {what}: {reason}; {remedy}, or leave out --index for exact search") from error


def without_place(message: str) -> str:
    """A message of FAISS without its function and line."""
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", message.strip(), flags=re.DOTALL)


def training_step(count: int, dim: int) -> int:
    """The step n such that an approximate index is trained on every n-th of `count` descriptors of `dim` numbers."""
    return max(1, -(-count * dim * 4 // TRAINING_BYTES))
