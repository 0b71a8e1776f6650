"""Peak memory and time of one training step: plain, with activation checkpointing, in chunks.

    python -m benchmarks.memory --backbone dino_small --images 96 --chunk 24 --freeze_te 8

Each way runs in a process of its own, twice; the second step is the one measured. On a CPU the memory is what the
process's resident set grew by, on a GPU what PyTorch allocated on top of weights and images.
"""

import argparse
import multiprocessing
import resource
import time

import torch

from benchmarks.measuring import record
from model import build_model
from model.loss import MinedMultiSimilarity
from parser import BACKBONES, freeze_te
from utils.system.device import autocast, pick_device

WAYS = ("plain", "activation checkpointing", "chunks", "chunks and checkpointing")


def measure(way: str, settings: argparse.Namespace) -> tuple[float, float]:
    """Gigabytes and seconds of a step, forward and backward."""
    device = pick_device(settings.device)
    model = build_model(backbone=settings.backbone, crossimage_encoder=True).to(device).train()
    model.backbone.freeze(settings.freeze_te)
    model.backbone.activation_checkpointing = "checkpointing" in way
    model.grad_cache_chunk = settings.chunk if "chunks" in way else 0
    images = torch.randn(settings.images, 3, *settings.size, device=device)
    labels = torch.arange(settings.images // 4, device=device).repeat_interleave(4)
    criterion = MinedMultiSimilarity()

    def step(rows: slice) -> float:
        started = time.perf_counter()
        with autocast(device, settings.precision):
            loss = criterion(model(images[rows]), labels[rows])
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    step(slice(0, 8))  # gradients and libraries are in place from here on
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = step(slice(None))
        return (torch.cuda.max_memory_allocated() - before) / 1e9, seconds
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = step(slice(None))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default="dino_small")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224))
    parser.add_argument("--chunk", type=int, default=24)
    parser.add_argument("--freeze_te", type=freeze_te, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no_record", action="store_true", help="leave no results.json")
    settings = parser.parse_args()
    size = " x ".join(map(str, settings.size))
    print(f"{settings.images} images, {size}, {settings.backbone}, {settings.precision}, chunks of {settings.chunk}")
    print(f"{'way':28} {'peak memory':>12} {'ratio':>6} {'time ratio':>11}")
    plain: tuple[float, float] | None = None
    figures = {}
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory, seconds = pool.apply(measure, (way, settings))
        plain = plain or (memory, seconds)
        figures[way] = {"GB": memory, "time": seconds / plain[1]}
        print(f"{way:28} {memory:9.2f} GB {memory / plain[0]:6.2f} {seconds / plain[1]:11.2f}", flush=True)
    if not settings.no_record:
        facts = {name: value for name, value in vars(settings).items() if name != "no_record"}
        record("memory", {"settings": facts, **figures}, pick_device(settings.device))


if __name__ == "__main__":
    main()
