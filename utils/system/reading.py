"""Reads images ahead: in threads for evaluation, in separate processes for training.

Decoding releases Python's interpreter lock, so threads read as fast as processes, and have nothing to transfer.
RandAugment does not: training needs processes, shielded from signals and within the available shared memory.
"""

import atexit
import logging
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .signals import signals_held_back

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # where worker processes put what they have read
PREFETCHED = 2  # batches per worker, PyTorch's default
REMEDIES = "give a container more with docker run --shm-size=8g or --ipc=host, or use fewer with --num_workers"

Item = TypeVar("Item")
Batch = TypeVar("Batch")


def read_batches(
    read: Callable[[int], Item], pack: Callable[[list[Item]], Batch], batches: Iterable[Sequence[int]], *, threads: int
) -> Generator[Batch, None, None]:
    """Reads items by their keys and packs them into batches in threads of this process, in order and a little ahead.

    Besides the batch yielded, at least two batches and two items per thread are in progress; an error of `read` is
    raised in place of the batch. The threads end with the generator; items not started by then are not read.

    Args:
        read: reads an item; it should release the interpreter lock meanwhile.
        pack: makes a batch from its items.
        batches: sequences of keys, one per batch.
        threads: threads that read, besides one that packs; 0 does both in the caller's thread, on demand.
    """
    if not threads:
        for keys in batches:
            yield pack([read(key) for key in keys])
        return
    torch.get_num_threads()  # fixes the caller's number; what a thread sets below is the default of later ones
    readers = ThreadPoolExecutor(threads, "reading", torch.set_num_threads, (1,))
    packer = ThreadPoolExecutor(1, "reading-pack", torch.set_num_threads, (1,))  # mostly waits, so not a reader

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
    """Packs images, bytes of 3 x H x W, into one tensor for one copy to the device; `unpacked` reverses it there.

    Returns:
        The pixels of all images, one after another, channels last, as decoders store them; and the shapes. From pinned
        memory a CUDA GPU copies asynchronously.
    """
    pixels = torch.empty(sum(image.numel() for image in images), dtype=torch.uint8, pin_memory=pinned)
    shapes = [image.shape for image in images]
    for image, place in zip(images, unpacked(pixels, shapes), strict=True):
        place.copy_(image)
    return pixels, shapes


def unpacked(pixels: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The images in the result of `packed`, 3 x H x W each, in the same memory."""
    parts = pixels.split([shape.numel() for shape in shapes])
    return [part.view(*shape[1:], shape[0]).permute(2, 0, 1) for part, shape in zip(parts, shapes, strict=True)]


class ImageLoader(DataLoader[Any]):
    """A DataLoader for long runs: its workers survive signals that ask the run to stop, and fit in shared memory.

    A scheduler, Ctrl-C or torchrun signals all processes of a job. If that killed the workers, the main process could
    not finish its step; so they never receive the signals, and end with the main process or the `with` block.

    Args:
        dataset: items by key.
        batches: lists of keys, one per batch; `batch_bytes` is the size of the longest.
        num_workers: processes that read. None do if shared memory is too small (Docker's default is 64 MB).
        device: for a CUDA GPU the batches are put in pinned memory.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: Sampler[list[Any]],
        *,
        batch_bytes: int,
        num_workers: int,
        device: torch.device,
    ):
        if not _fits_in_shared_memory(num_workers, batch_bytes):
            num_workers = 0
        super().__init__(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # its own, since how often it draws depends on workers and resumes
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_workers:
            atexit.unregister(_kill_children)
            atexit.register(_kill_children)
        with signals_held_back():
            return super().__iter__()

    def __enter__(self) -> "ImageLoader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends the workers, unless the program ends, which kills them.

        The error of a failed run holds on to the iterator. When both are collected as garbage, its queues may go first;
        its workers then wait for ever, and ending them takes PyTorch 5 s each or more.
        """
        iterator, self._iterator = self._iterator, None
        if iterator is not None and (kind is None or issubclass(kind, Exception)):
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _fits_in_shared_memory(num_workers: int, batch_bytes: int) -> bool:
    """Whether the batches of all workers fit in shared memory at once; warns if not."""
    if not num_workers or not SHARED_MEMORY.is_dir():
        return True
    free = shutil.disk_usage(SHARED_MEMORY).free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes
    needed = (PREFETCHED * num_workers + 1) * batch_bytes  # one more is in the main process
    if needed > free:
        logger.warning(
            f"{SHARED_MEMORY} has {free / 1e6:.2g} MB free, but {num_workers} reading processes need "
            f"{needed / 1e6:.2g} MB: the main process reads the images, which is slower; {REMEDIES}"
        )
    return needed <= free


def end_of_a_worker(error: RuntimeError) -> str:
    """What happened to a worker, in short, for PyTorch's long errors in the main process; "" for other errors."""
    message = str(error)
    if "unable to allocate shared memory" in message or "killed by signal: Bus error" in message:
        return f"{SHARED_MEMORY}, through which reading processes pass images, is full; {REMEDIES}"
    if "DataLoader worker" in message and ("killed by signal" in message or "exited unexpectedly" in message):
        advice = "a reading process was killed, as the kernel does when memory runs out; use fewer with --num_workers"
        return f"{advice} ({message.splitlines()[0]})"
    return ""


def _kill_children() -> None:
    """Kills workers left at the program's end, for which multiprocessing would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would complain
    for child in multiprocessing.active_children():
        child.kill()
