"""The device to compute on, its cores, precision and memory, and copies to it and back."""

import logging
import math
import os
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed

logger = logging.getLogger(__name__)

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of this container (cgroup v2)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device for `auto` (a CUDA GPU if available, else the CPU), `cuda`, `cpu` or `mps`.

    Raises:
        ValueError: it is not available.
    """
    distributed.warn_of_separate_runs()
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
        if name == "cpu" and Path("/dev/nvidiactl").exists():
            logger.warning(
                "PyTorch %s cannot use this machine's NVIDIA GPU, so the run uses the CPU; the driver may be too old, "
                "or the container was started without --gpus all",
                torch.__version__,
            )
    if not available[name]:
        raise ValueError(f"--device {name}: PyTorch sees no such device; use --device cpu or auto")
    if name == "cuda":
        gpu, count = distributed.local_rank(), torch.cuda.device_count()
        if gpu >= count:
            raise ValueError(f"process {gpu + 1} has no GPU: use torchrun --nproc_per_node={count} at most")
        torch.cuda.set_device(gpu)
    return torch.device(name)


def extraction_batch_size(device: torch.device) -> int:
    """Default batch size of the backbone in evaluation."""
    return 4 if device.type == "cpu" else 16  # on two CPU cores ViT-B/14 at 322 x 322 is 7% faster with 4 than with 16


def usable_cores(*, alone: bool = False) -> int:
    """Cores for this process: its share of the usable ones, among the processes that torchrun started here.

    With `alone`, the other processes wait, and this one uses all of them. A container may see more cores than its quota
    lets it use (docker run --cpus).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = CPU_QUOTA.read_text().split()  # in microseconds, or "max" for none
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores // (1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def reading_workers(device: torch.device, workers: int | None = None) -> int:
    """Number of threads (evaluation) or processes (training) that read images, `workers` if given; 0: the main thread.

    On a CPU the model needs the cores: ViT-S/14 at 322 x 322 on two is 7% faster without a reading process than with 2.
    """
    if workers is not None:
        return workers
    return usable_cores() // 4 if device.type == "cpu" else min(16, usable_cores())


def to_device(batches: Iterable[Sequence[Any]], device: torch.device) -> Iterator[list[Any]]:
    """Moves the tensors of each batch to the device; other items stay as they are.

    The copy to a CUDA GPU, from pinned memory, overlaps with the computation on the previous batch.
    """
    if device.type != "cuda":
        for batch in batches:
            yield [part.to(device) if isinstance(part, Tensor) else part for part in batch]
        return
    copies = _copy_stream(device)
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = [part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in batch]
        current = torch.cuda.current_stream(device)
        current.wait_stream(copies)
        for part in moved:
            if isinstance(part, Tensor):
                part.record_stream(current)  # so that the next copy does not reuse memory this stream still reads
        yield moved


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all: freed memory stays with the stream that used it


def to_cpu(results: Iterable[Tensor]) -> Iterator[Tensor]:
    """Moves tensors to the CPU; from a CUDA GPU each is yielded once the next has started, so that the GPU is busy."""
    under_way: tuple[Tensor, torch.cuda.Event] | None = None
    for result in results:
        if not result.is_cuda:
            yield result.cpu()
            continue
        begun = result.to("cpu", non_blocking=True), torch.cuda.Event()
        begun[1].record()
        if under_way is not None:
            under_way[1].synchronize()
            yield under_way[0]
        under_way = begun
    if under_way is not None:
        under_way[1].synchronize()
        yield under_way[0]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a forward pass in `fp32`, `tf32`, `bf16` or `fp16`."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def cast_weights(module: nn.Module, precision: str) -> None:
    """Casts the weights of linear layers and convolutions once, as `autocast` does for every batch; for inference."""
    if precision in AUTOCAST:
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                part.to(AUTOCAST[precision])


def allow_tf32(allowed: bool) -> None:
    """Sets whether CUDA may round factors of fp32 matrix products and convolutions to 10 bits, which is much faster."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed  # PyTorch's default is True, and the patch embedding is a convolution


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within the block, CUDA computes fp32 matrix products in full fp32, even if TF32 is allowed outside it."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def require_determinism(required: bool) -> None:
    """Sets whether a GPU computes the same bits every time, which is slower; a CPU does so anyway."""
    if required:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, when it is first used
    torch.use_deterministic_algorithms(required)
    torch.backends.cudnn.benchmark = False


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GB, on the CUDA device or in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
