"""Reading images ahead: in threads of this process for evaluation, in processes of their own for training.

Decoding lets other threads of Python run, so that threads read as fast as processes do, and have nothing to hand over.
RandAugment does not: training needs processes, out of the way of signals and within the shared memory there is.
"""

import atexit
import copy
import logging
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .signals import signals_held_back

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # where worker processes leave what they have read
PREFETCHED = 2  # batches a worker, PyTorch's default
REMEDIES = (
    "give a container more by docker run --shm-size=8g or --ipc=host, or read with fewer processes, or none "
    "(--num_workers=0)"
)

Item = TypeVar("Item")
Batch = TypeVar("Batch")


def read_batches(
    read: Callable[[int], Item], pack: Callable[[list[Item]], Batch], batches: Iterable[Sequence[int]], *, threads: int
) -> Generator[Batch, None, None]:
    """Reads items and makes batches of them in threads of this process, in order and a little ahead.

    At least two batches are under way beside the one handed out, and two items a thread. The threads end with the
    generator; what they have not begun by then is not read.

    Args:
        read: an item by its key; it should let other threads run while it works.
        pack: makes a batch of its items.
        batches: keys, a sequence a batch.
        threads: that read, beside one that makes the batches; 0 does both in the caller's, when a batch is asked for.

    Raises:
        Exception: what `read` raised for the first item that it raised for, in the place of its batch.
    """
    if not threads:
        for keys in batches:
            yield pack([read(key) for key in keys])
        return
    torch.get_num_threads()  # settles the caller's number; what a thread sets below is the default of later ones
    readers = ThreadPoolExecutor(threads, "reading", torch.set_num_threads, (1,))
    packer = ThreadPoolExecutor(1, "reading-pack", torch.set_num_threads, (1,))  # waits, so it is none of the readers

    def begin(keys: Sequence[int]) -> Future[Batch]:
        items = [readers.submit(read, key) for key in keys]
        return packer.submit(lambda: pack([item.result() for item in items]))

    under_way: deque[Future[Batch]] = deque()
    try:
        for keys in batches:
            under_way.append(begin(keys))
            if len(under_way) > max(2, -(-2 * threads // len(keys))):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        readers.shutdown(cancel_futures=True)
        packer.shutdown(cancel_futures=True)


def packed(images: Sequence[Tensor], *, pinned: bool) -> tuple[Tensor, list[torch.Size]]:
    """Images of any sizes as one tensor, for one copy to the device; `unpacked` there undoes it.

    Args:
        images: bytes, 3 x H x W each.
        pinned: in memory from which a CUDA GPU copies while the program goes on.

    Returns:
        The pixels of all, one image after the other and in each the channels of a pixel side by side, as decoders
        leave them; and the shapes.
    """
    pixels = torch.empty(sum(image.numel() for image in images), dtype=torch.uint8, pin_memory=pinned)
    shapes = [image.shape for image in images]
    for image, place in zip(images, unpacked(pixels, shapes), strict=True):
        place.copy_(image)
    return pixels, shapes


def unpacked(pixels: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The images in what `packed` gave, 3 x H x W each, in the same memory."""
    parts = pixels.split([shape.numel() for shape in shapes])
    return [part.view(*shape[1:], shape[0]).permute(2, 0, 1) for part, shape in zip(parts, shapes, strict=True)]


class _Singly(Sampler[Any]):
    """The keys of some batches one by one; `lengths` says how many make up each batch under way."""

    def __init__(self, batches: Sampler[list[Any]]):
        self.batches = batches
        self.lengths: deque[int] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.lengths.clear()
        for batch in self.batches:
            self.lengths.append(len(batch))
            yield from batch


class ImageLoader(DataLoader[Any]):
    """A DataLoader for long runs: its workers outlive the signals that ask the run to stop, and fit in shared memory.

    A scheduler, Ctrl-C or torchrun signals all processes of a job. If the workers died of it, the main process could
    not finish its step; so they never get it, and end with the main process.

    Workers hand over whole batches. Where shared memory is too small for that (a container has 64 MB unless told
    otherwise), they hand over single items, which the main process puts together: the same batches, more slowly.

    Args:
        dataset: of items by key.
        batches: lists of keys, a list a batch.
        batch_size: keys in the longest of them.
        item_bytes: that an item takes.
        num_workers: processes that read; 0 reads in this one.
        device: where the batches go; for a CUDA GPU they are put in pinned memory.

    Raises:
        ValueError: shared memory is too small even for single items.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: Sampler[list[Any]],
        *,
        batch_size: int,
        item_bytes: int,
        num_workers: int,
        device: torch.device,
    ):
        whole = _fits_in_shared_memory(num_workers, batch_size * item_bytes, item_bytes)
        self._singly = None if whole else _Singly(batches)
        super().__init__(
            dataset,
            **({"batch_sampler": batches} if whole else {"sampler": self._singly, "batch_size": None}),  # type: ignore
            num_workers=num_workers,
            pin_memory=whole and device.type == "cuda",
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # of its own: how often it draws depends on workers and resumes
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_workers:
            atexit.unregister(_kill_children)
            atexit.register(_kill_children)
        with signals_held_back():
            read = super().__iter__()
        return self._batches(read)

    def _batches(self, read: Iterator[Any]) -> Iterator[Any]:
        if self._singly is None:
            yield from read
            return
        items = []
        for item in read:
            items.append(copy.deepcopy(item))  # out of shared memory
            if len(items) == self._singly.lengths[0]:
                self._singly.lengths.popleft()
                yield default_collate(items)
                items = []


def _fits_in_shared_memory(num_workers: int, batch_bytes: int, item_bytes: int) -> bool:
    """Whether whole batches do, rather than single items, which is a warning; an error where those do not either."""
    if not num_workers or not SHARED_MEMORY.is_dir():
        return True
    free = shutil.disk_usage(SHARED_MEMORY).free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes
    in_flight = PREFETCHED * num_workers + 1  # and one that the main process holds
    if in_flight * batch_bytes <= free:
        return True
    if in_flight * item_bytes > free:
        raise ValueError(
            f"{SHARED_MEMORY} has {free / 1e6:.2g} MB free, and {num_workers} processes that read images need "
            f"{in_flight * item_bytes / 1e6:.2g} MB; {REMEDIES}"
        )
    _warn_once(
        f"{SHARED_MEMORY} is too small for {num_workers} processes that read batches of {batch_bytes / 1e6:.1f} MB: "
        f"they hand over single items, which is slower; {REMEDIES}"
    )
    return False


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def end_of_a_worker(error: RuntimeError) -> str:
    """What happened to a worker, which PyTorch tells at length wherever the main process is; "" for other errors."""
    message = str(error)
    if "unable to allocate shared memory" in message or "killed by signal: Bus error" in message:
        return f"{SHARED_MEMORY} is full, through which reading processes hand over images; {REMEDIES}"
    if "DataLoader worker" in message and ("killed by signal" in message or "exited unexpectedly" in message):
        return (
            "a reading process was killed, as the kernel does when memory runs out; use fewer by --num_workers "
            f"({message.splitlines()[0]})"
        )
    return ""


def _kill_children() -> None:
    """Ends workers that are left at the end of the program: multiprocessing would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would complain
    for child in multiprocessing.active_children():
        child.kill()
