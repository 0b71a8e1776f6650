"""Images for evaluation are read in threads of this process: in order, a little ahead, and with nothing left behind."""

import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.photos import batches as batches_module
from datasets.photos.batches import image_batches
from datasets.photos.transforms import evaluation_transform, read_pixels, transform_sizes
from utils.system import reading
from utils.system.reading import packed, read_batches, unpacked

CPU = torch.device("cpu")
TRANSFORM = evaluation_transform((56, 56))
SIZES = ((60, 80), (90, 70), (60, 80), (75, 61), (60, 80), (90, 70), (56, 56))


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


@pytest.fixture
def photos(tmp_path):
    """Of several sizes, formats and modes."""
    rng = np.random.default_rng(0)
    paths = []
    for index, size in enumerate(SIZES):
        path = tmp_path / f"{index}{('.jpg', '.png')[index % 2]}"
        grey = index == 4
        Image.fromarray(rng.integers(0, 256, size if grey else (*size, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture
def a_gpu(monkeypatch):
    """A device that is no CPU, in whose place the CPU computes; and what was asked to go there."""
    sent = []

    def to_device(batches, device):
        for batch in batches:
            sent.append((batch, device))
            yield batch

    monkeypatch.setattr(batches_module, "to_device", to_device)
    monkeypatch.setattr(batches_module, "packed", lambda images, pinned: (*packed(images, pinned=False), pinned))
    monkeypatch.setattr(batches_module, "unpacked", lambda pixels, shapes, pinned: unpacked(pixels, shapes))
    return sent


def batches_of(paths, batch_size=3, threads=2, device=CPU, **settings):
    settings = {"transform": TRANSFORM, "progress": "photos", **settings}
    return image_batches(paths, batch_size=batch_size, num_workers=threads, device=device, **settings)


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_batches_come_in_order_and_not_far_ahead(threads):
    begun, most = [], 0

    def read(key):
        begun.append(key)
        time.sleep(0.001 * (key % 3))  # the later ones of a batch are done first
        return key

    keys = [range(start, min(start + 4, 41)) for start in range(0, 41, 4)]
    got = []
    for batch in read_batches(read, list, keys, threads=threads):
        got += batch
        while threads and len(got) < 36 and len(begun) - len(got) <= 4:  # the threads begin more than the next batch
            time.sleep(0.001)
        most = max(most, len(begun) - len(got))
    assert got == list(range(41)) and sorted(begun) == got
    assert (most == 0) if threads == 0 else (4 < most <= max(2, -(-2 * threads // 4)) * 4)
    assert not reading_threads()


def test_single_images_keep_all_threads_reading():
    """Two batches of one are not enough for eight threads; each computes in itself, and the caller as before."""
    together, before = threading.Barrier(8, timeout=20), torch.get_num_threads()

    def read(key):
        together.wait()
        return torch.get_num_threads()

    torch.set_num_threads(2)
    try:
        assert [*read_batches(read, sum, [[key] for key in range(16)], threads=8)] == [1] * 16
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [0, 2])
def test_the_first_error_in_order_is_raised_in_its_place(photos, threads):
    paths = photos * 3
    for index in (8, 10, 16):
        bad = Path(paths[0]).with_name(f"bad{index}.jpg")
        bad.write_bytes(b"no image")
        paths[index] = str(bad)
    got = []
    with pytest.raises(ValueError, match="bad8.jpg"):
        for batch in batches_of(paths, threads=threads):
            got.append(len(batch))
    assert got == [3, 3] and not reading_threads()


def test_threads_end_with_the_generator_and_begin_nothing_more(photos):
    read = []

    def slow(key):
        read.append(key)
        time.sleep(0.01)
        return key

    batches = read_batches(slow, list, [range(n, n + 4) for n in range(0, 400, 4)], threads=2)
    assert next(batches) == [0, 1, 2, 3] and reading_threads()
    batches.close()
    count = len(read)
    assert not reading_threads() and count < 16
    time.sleep(0.05)
    assert len(read) == count
    batches = batches_of(photos, stop=[None].pop)  # called before each batch, the second time in vain
    next(batches)
    with pytest.raises(IndexError):
        next(batches)
    assert not reading_threads()


def test_threads_read_the_same_bits_without_a_process_or_shared_memory(photos, monkeypatch):
    monkeypatch.setattr(reading, "_fits_in_shared_memory", None)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", None)
    with torch.inference_mode():
        one, many = (list(batches_of(photos, threads=threads)) for threads in (0, 3))
    expected = [TRANSFORM(read_pixels(path)[None]) for path in photos]
    assert torch.equal(torch.cat(one), torch.cat(many)) and torch.equal(torch.cat(many), torch.cat(expected))


@pytest.mark.parametrize("threads", [0, 2])
def test_a_gpu_gets_one_pinned_tensor_a_batch_and_the_same_bits(photos, a_gpu, threads):
    cuda = torch.device("cuda")
    got = list(batches_of(photos, threads=threads, device=cuda))
    assert [len(batch) for batch in got] == [3, 3, 1] and len(a_gpu) == 3
    expected = [read_pixels(path) for path in photos]
    for start, batch, ((pixels, shapes, pinned), device) in zip((0, 3, 6), got, a_gpu, strict=True):
        assert pinned and device == cuda and pixels.dtype == torch.uint8 and pixels.dim() == 1
        assert [tuple(shape) for shape in shapes] == [(3, *size) for size in SIZES[start : start + 3]]
        assert torch.equal(batch, transform_sizes(TRANSFORM, expected[start : start + 3]))
        for image, again in zip(expected[start : start + 3], unpacked(pixels, shapes), strict=True):
            assert torch.equal(image, again) and again.stride(0) == 1  # side by side, as decoders leave them
            assert again.untyped_storage().data_ptr() == pixels.data_ptr()


def test_photos_that_are_turned_reach_a_gpu_resized_and_pinned(photos, monkeypatch):
    sent, pinned = [], []
    monkeypatch.setattr(batches_module, "to_device", lambda batches, device: (sent.append(b) or b for b in batches))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    got = list(batches_of(photos, device=torch.device("cuda"), upright=True))
    assert [tuple(of.shape) for (of,) in sent] == [(3, 3, 56, 56), (3, 3, 56, 56), (1, 3, 56, 56)]
    assert len(pinned) == 3 and torch.equal(torch.cat(got), torch.cat(list(batches_of(photos, upright=True))))
