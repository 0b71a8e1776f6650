"""Batches of images, read in order."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils import distributed
from utils.device import to_device
from utils.reading import packed, read_batches, unpacked

from .database_queries import ImageList
from .transforms import Transform, transform_sizes


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
