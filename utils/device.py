"""The device to compute on, what to expect of it, and the way there and back."""

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
    """The device called `auto` (a CUDA GPU where there is one, else the CPU), `cuda`, `cpu` or `mps`.

    Raises:
        ValueError: it is not there.
    """
    asked = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but PyTorch sees no CUDA GPU; use --device cpu or auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps was asked for, but PyTorch sees none; use --device cpu or auto")
    if name == "cuda":
        gpu = distributed.local_rank()
        if gpu >= torch.cuda.device_count():
            raise ValueError(
                f"process {gpu + 1} of this machine has no GPU, PyTorch sees {torch.cuda.device_count()}; "
                "start torchrun with --nproc_per_node at most that"
            )
        torch.cuda.set_device(gpu)
    if name == "cpu" and asked == "auto" and Path("/dev/nvidiactl").exists():
        logger.warning(
            "this machine has an NVIDIA GPU, but PyTorch (%s) cannot use it, so the CPU computes; the driver may be "
            "too old for it, or the container started without --gpus all",
            torch.__version__,
        )
    return torch.device(name)


def extraction_batch_size(device: torch.device) -> int:
    """Images at a time in the backbone without a graph.

    On two CPU cores ViT-B/14 at 322 x 322 was measured to be 7% faster with 4, and with 1, than with 16.
    """
    return 4 if device.type == "cpu" else 16


def usable_cores(*, alone: bool = False) -> int:
    """Cores for this process: of those that it may run on, its share among the processes that torchrun started here.

    A container may have a quota of time on more cores than it can use up (docker run --cpus).

    Args:
        alone: the other processes wait, so that all of them are this one's.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = CPU_QUOTA.read_text().split()  # in microseconds, or "max" for none
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores // (1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def reading_workers(device: torch.device) -> int:
    """Threads that read images for evaluation, and processes for training, by default; 0 leaves it to the main thread.

    Beside a GPU every core can read. On a CPU the model needs the cores: on two of them, ViT-S/14 at 322 x 322 was
    measured to be 7% faster without a reading process than with two.
    """
    return usable_cores() // 4 if device.type == "cpu" else min(16, usable_cores())


def to_device(batches: Iterable[Sequence[Any]], device: torch.device) -> Iterator[list[Any]]:
    """Moves the tensors of each batch to the device; what else is in it stays as it is.

    On a CUDA GPU the copy has a stream of its own, and so runs beside what the GPU still computes for the batch before.
    That takes tensors in pinned memory.
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
                part.record_stream(current)  # its memory is not for the next copy while this stream reads it
        yield moved


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all: freed memory is kept for the stream it was used by


def to_cpu(results: Iterable[Tensor]) -> Iterator[Tensor]:
    """Moves tensors to the CPU, in order.

    From a CUDA GPU each is handed out once the next one is under way, so that the GPU has work while this one is dealt
    with.
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
    """Hours of training a backbone on `images` images of `size` (height, width), from one timed forward pass.

    The backward pass is counted as twice the forward pass of the parameters that are trained.
    """
    parameters = [(p.numel(), p.requires_grad) for p in backbone.parameters()]
    trained = sum(n for n, trainable in parameters if trainable) / sum(n for n, _ in parameters)
    image = torch.zeros(1, 3, *size, device=next(backbone.parameters()).device)
    with torch.inference_mode():
        backbone(image)  # the first call also sets up memory
        started = time.perf_counter()
        backbone(image)
    return (time.perf_counter() - started) * (1 + 2 * trained) * images / 3600


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a step's forward pass in `fp32`, `tf32`, `bf16` or `fp16`."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def cast_products(module: nn.Module, precision: str) -> None:
    """Casts the weights of linear layers and convolutions once, as `autocast` would for every batch: the same results.

    For inference only: training needs them in fp32.
    """
    if precision in AUTOCAST:
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                part.to(AUTOCAST[precision])


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA may round the factors of fp32 matrix products and convolutions to 10 bits, which is much faster.

    PyTorch allows it for convolutions unless told otherwise, and the patch embedding is one.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within the block, CUDA computes matrix products of fp32 in full, whatever is allowed around it."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def require_determinism(required: bool) -> None:
    """Whether a GPU is to compute the same bits every time, which is slower; a CPU does so anyway.

    To be called before anything runs on the GPU: cuBLAS reads its setting once.
    """
    if required:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(required)
    torch.backends.cudnn.benchmark = False


def peak_memory(device: torch.device) -> float:
    """The most memory in use so far, in GB: of the CUDA device since `reset_peak_memory`, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def reset_peak_memory(device: torch.device) -> None:
    """Begins to count anew, on a CUDA device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
