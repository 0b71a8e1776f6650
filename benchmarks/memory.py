"""Peak memory and time of one training step: plain, with activation checkpointing, in chunks.

    python -m benchmarks.memory --backbone dino_small --places 24 --chunk 24 --freeze_te 8

Each way runs in a process of its own, twice; the second step is the one measured. On a CPU the memory is what the
process's resident set grew by, on a GPU what PyTorch allocated on top of weights and images.
"""

import argparse
import time
from collections.abc import Sequence

import torch

from benchmarks.measuring import PeakMemory, Training, in_own_process, parser_of, record, settings_of
from model import build_model

WAYS = ("plain", "activation checkpointing", "chunks", "chunks and checkpointing")


def measure(way: str, settings: argparse.Namespace) -> tuple[float, float]:
    """Gigabytes and seconds of a step, forward and backward."""
    model = build_model(backbone=settings.backbone, crossimage_encoder=True).to(settings.device)
    model.backbone.activation_checkpointing = "checkpointing" in way
    model.grad_cache_chunk = settings.chunk if "chunks" in way else 0
    training = Training(model, settings, precision=settings.precision)
    model.backbone.freeze(settings.freeze_te)
    training.loss(8).backward()  # gradients and libraries are in place from here on
    on_gpu = settings.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    with PeakMemory() as peak:
        training.loss().backward()
        if on_gpu:
            torch.cuda.synchronize()
    memory = (torch.cuda.max_memory_allocated() - before) / 1e9 if on_gpu else peak.growth
    return memory, time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "backbone", "train_size", "places", "precision", "device")
    parser.set_defaults(places=24)
    parser.add_argument("--chunk", type=int, default=24)
    parser.add_argument("--freeze_te", type=int, default=8, help="the first block to train; 0 trains all of them")
    settings = settings_of(parser, argv)
    print(f"{4 * settings.places} images, {settings.backbone}, {settings.precision}, chunks of {settings.chunk}")
    print(f"{'way':28} {'peak memory':>12} {'ratio':>6} {'time ratio':>11}")
    figures: dict[str, object] = {}
    plain: tuple[float, float] | None = None
    for way in WAYS:
        memory, seconds = in_own_process(measure, way, settings)
        plain = plain or (memory, seconds)
        print(f"{way:28} {memory:9.2f} GB {memory / plain[0]:6.2f} {seconds / plain[1]:11.2f}", flush=True)
        figures[way] = {"GB": memory, "time": seconds / plain[1]}
    record("memory", figures, settings)


if __name__ == "__main__":
    main()
