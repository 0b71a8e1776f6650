"""Batches of images, read in order."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils.system import distributed
from utils.system.device import to_device
from utils.system.reading import packed, read_batches, unpacked

from .transforms import Transform, prepare, read_noted, transform_sizes

logger = logging.getLogger(__name__)


def image_batches(
    paths: Sequence[str],
    *,
    transform: Transform,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    progress: str,
    upright: bool = False,
    change: Callable[[Tensor, str], Tensor] | None = None,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Reads images in order, under a progress bar.

    Args:
        transform: turns bytes B x 3 x H x W into the model's input B x (crops x) 3 x H' x W', of one size unless the
            batch size is 1. It runs on the device, or in the reading threads if the device is a CPU.
        num_workers: threads that read images ahead, and end with this generator; 0 reads in the caller's thread.
        progress: name of the progress bar.
        upright: turn the images as their EXIF data says. Such photos can be large, so the reading threads resize them:
            full-size ones would fill the memory.
        change: turns the bytes and the path of each image into other bytes, before the transform.
        stop: called before each batch; it may raise to stop.

    Yields:
        B x (crops x) 3 x H x W on the device.

    Raises:
        ValueError: an image cannot be read; the message names the first such file in order.
    """
    on_device = device.type != "cpu" and not upright
    deep = [False] * len(paths)  # those read so far that have more than 8 bits per channel

    def read(index: int) -> Tensor:
        pixels, deep[index] = read_noted(paths[index], upright=upright)
        if change is not None:
            pixels = change(pixels, paths[index])
        return pixels if on_device else prepare(pixels, transform)

    def pack(items: list[Tensor]) -> Sequence[Any]:
        if on_device:
            return packed(items, pinned=device.type == "cuda")
        batch = torch.stack(items)
        return [batch.pin_memory() if device.type == "cuda" else batch]

    keys = [range(start, min(start + batch_size, len(paths))) for start in range(0, len(paths), batch_size)]
    batches = read_batches(read, pack, keys, threads=num_workers)
    with (
        closing(batches),
        tqdm(total=len(paths), desc=progress, unit="image", disable=not (paths and distributed.is_main())) as bar,
    ):
        for batch in to_device(batches, device):
            stop()
            batch_images = transform_sizes(transform, unpacked(*batch)) if on_device else batch[0]
            yield batch_images
            bar.update(len(batch_images))
    if any(deep):
        count = f"{sum(deep)} image{'s' if sum(deep) > 1 else ''}"
        wording = "%s: %s read by the upper 8 of more bits per channel, e.g. %s; python -m datasets.check names each"
        logger.warning(wording, progress, count, paths[deep.index(True)])
