"""The device to compute on, its cores, precision and memory, and copies to it and back."""

import logging
import math
import os
import resource
import sys
import time
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
    asked = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA GPU; use --device cpu or auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: PyTorch sees no MPS device; use --device cpu or auto")
    if name == "cuda":
        gpu = distributed.local_rank()
        if gpu >= torch.cuda.device_count():
            raise ValueError(
                f"process {gpu + 1} of this machine has no GPU: PyTorch sees {torch.cuda.device_count()}; "
                "start torchrun with --nproc_per_node at most that"
            )
        torch.cuda.set_device(gpu)
    if name == "cpu" and asked == "auto" and Path("/dev/nvidiactl").exists():
        logger.warning(
            "this machine has an NVIDIA GPU, but PyTorch (%s) cannot use it, so the run uses the CPU; the driver may "
            "be too old, or the container was started without --gpus all",
            torch.__version__,
        )
    return torch.device(name)


def extraction_batch_size(device: torch.device) -> int:
    """Default batch size of the backbone in evaluation.

    On two CPU cores, ViT-B/14 at 322 x 322 was measured to be 7% faster with 4, and with 1, than with 16.
    """
    return 4 if device.type == "cpu" else 16


def usable_cores(*, alone: bool = False) -> int:
    """Cores for this process: its share of the usable ones, among the processes that torchrun started here.

    A container may see more cores than its quota lets it use (docker run --cpus).

    Args:
        alone: the other processes wait, so this one uses all the cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = CPU_QUOTA.read_text().split()  # in microseconds, or "max" for none
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores // (1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def reading_workers(device: torch.device, asked: int | None = None) -> int:
    """Number of threads (evaluation) or processes (training) that read images; 0 reads in the main thread.

    It is `asked`, or if that is None a default for the device.

    With a GPU, every core can read. On a CPU the model needs the cores: on two, ViT-S/14 at 322 x 322 was measured to
    be 7% faster without a reading process than with two.
    """
    if asked is not None:
        return asked
    return usable_cores() // 4 if device.type == "cpu" else min(16, usable_cores())


def to_device(batches: Iterable[Sequence[Any]], device: torch.device) -> Iterator[list[Any]]:
    """Moves the tensors of each batch to the device; other items stay as they are.

    On a CUDA GPU, the copy has its own stream, so it overlaps with the computation on the previous batch. This requires
    tensors in pinned memory.
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
    """Moves tensors to the CPU, in order.

    From a CUDA GPU, each is yielded once the next has started, so that the GPU is busy while the caller handles it.
    """
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


def estimated_hours(backbone: nn.Module, *, size: Sequence[int], images: int) -> float:
    """Hours to train a backbone on `images` images of `size` (height, width), estimated from one timed forward pass.

    The backward pass counts as twice the forward pass of the trained parameters.
    """
    parameters = [(p.numel(), p.requires_grad) for p in backbone.parameters()]
    trained = sum(n for n, trainable in parameters if trainable) / sum(n for n, _ in parameters)
    image = torch.zeros(1, 3, *size, device=next(backbone.parameters()).device)
    with torch.inference_mode():
        backbone(image)  # the first call also allocates memory
        started = time.perf_counter()
        backbone(image)
    return (time.perf_counter() - started) * (1 + 2 * trained) * images / 3600


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a forward pass in `fp32`, `tf32`, `bf16` or `fp16`."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def cast_products(module: nn.Module, precision: str) -> None:
    """Casts the weights of linear layers and convolutions once, as `autocast` does for every batch: the same results.

    For inference only: training needs them in fp32.
    """
    if precision in AUTOCAST:
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                part.to(AUTOCAST[precision])


def allow_tf32(allowed: bool) -> None:
    """Sets whether CUDA may round factors of fp32 matrix products and convolutions to 10 bits, which is much faster.

    By default PyTorch allows it for convolutions, and the patch embedding is one.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


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
    """Sets whether a GPU computes the same bits every time, which is slower; a CPU does so anyway.

    Call it before anything runs on the GPU: cuBLAS reads its setting once.
    """
    if required:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(required)
    torch.backends.cudnn.benchmark = False


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB: of the CUDA device since `reset_peak_memory`, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reset_peak_memory(device: torch.device) -> None:
    """Resets the peak memory of a CUDA device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
