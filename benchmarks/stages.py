"""What each stage costs on this machine, and the whole, as a share of what the device can do.

    python -m benchmarks.stages [--backbone dino_small] [--size 322 322] [--precision bf16] [--device cuda]

The ceiling is the rate of matrix products that the device reaches in the same run and precision; a stage's share of it
counts its own products only, and none with --compile, which hides them. Training is the recipe's step: --places places
of four photos, blocks from 8 on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import Training, batches_of, made_photos, medians, parser_of, record, settings_of, vectors_of
from datasets.photos.transforms import evaluation_transform, read_pixels, transform_sizes
from model import build_model
from utils.retrieval import search
from utils.system.device import allow_tf32, autocast, peak_memory


def matrix_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second that the device reaches in a large matrix product."""
    side = 8192 if device.type == "cuda" else 1536
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / medians({"product": lambda: a @ b}, device=device)["product"]


def main(argv: Sequence[str] | None = None) -> None:
    names = ("backbone", "size", "train_size", "batch", "places", "precision", "device", "num_workers", "compile")
    settings = settings_of(parser_of(__doc__, *names), argv)
    device, batch, places = settings.device, settings.batch, settings.places
    on_gpu = device.type == "cuda"
    allow_tf32(settings.precision == "tf32")
    photos = made_photos(count=max(48, batch))
    transform = evaluation_transform(tuple(settings.size))
    torch.manual_seed(0)
    model = build_model(backbone=settings.backbone, crossimage_encoder=True).to(device).eval()
    if settings.compile:
        model.backbone.compile_blocks()
        torch._functorch.config.donated_buffer = False  # the backward pass is timed again and again on one graph
    rate = matrix_rate(device, settings.precision)
    figures: dict[str, object] = {"matrix products, TFLOP/s": rate / 1e12}

    def measure(stage: str, images: int, step: Callable[[], object], *, products: bool = False) -> None:
        flops = 0
        if products and not settings.compile:  # a compiled program hides them
            with FlopCounterMode(display=False) as counter:
                step()
            flops = counter.get_total_flops()
        seconds = medians({stage: step}, device=device)[stage]
        figures[stage] = {"images/s": images / seconds, "share of the ceiling": flops / seconds / rate}
        print(f"{stage:34} {images / seconds:12.1f} images/s" + (f" {flops / seconds / rate:8.1%}" if flops else ""))

    print(f"{settings.backbone}, {settings.precision}, {device}; matrix products: {rate / 1e12:.3g} TFLOP/s")
    print(f"{'stage':34} {'':12} {'':8} of the ceiling")
    pixels = [read_pixels(path) for path in photos[:batch]]
    measure("decode (one core)", len(photos), lambda: [read_pixels(path) for path in photos])
    if on_gpu:
        pinned = [image.pin_memory() for image in pixels]
        measure("host to device", batch, lambda: [image.to(device, non_blocking=True) for image in pinned])
    on_device = [image.to(device) for image in pixels]
    measure("resize and normalise", batch, lambda: transform_sizes(transform, on_device))
    images = transform_sizes(transform, on_device)
    with torch.inference_mode(), autocast(device, settings.precision):
        features = model.backbone(images)
        vectors = model.aggregation(features)
        for stage, step in (
            ("backbone", lambda network: network.backbone(images)),
            ("layer", lambda network: network.aggregation(features)),
            ("encoder", lambda network: network.describe(vectors)),
        ):
            measure(stage, batch, partial(step, model), products=True)

    @torch.inference_mode()
    def evaluate(paths: Sequence[str]) -> float:
        """Backbone and layer over photos; the share of the time spent waiting for them, once all workers have begun."""
        waits: list[tuple[float, float]] = []

        def batches() -> Iterator[Tensor]:
            started = time.perf_counter()
            for images in batches_of(paths, settings):
                waits.append((started, time.perf_counter()))
                yield images
                started = time.perf_counter()

        for _ in vectors_of(model, batches(), settings):
            pass
        return sum(end - start for start, end in waits[2:]) / (time.perf_counter() - waits[1][1])

    many = (photos * (24 * batch // len(photos) + 1))[: max(len(photos), 24 * batch)]
    measure("evaluation, whole", len(many), lambda: evaluate(many))
    figures["waiting for data"] = waited = evaluate(many)
    figures["peak GB of evaluation"] = peak = peak_memory(device)
    print(f"{'  waiting for data':34} {waited:12.1%}\n{'  peak memory':34} {peak:12.2f} GB")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    training = Training(model, settings, precision=settings.precision)
    descriptors = training.forward().detach().float().requires_grad_()
    measure("training: forward", places * 4, training.forward, products=True)
    measure(
        "training: loss and mining", places * 4, lambda: training.criterion(descriptors, training.labels).backward()
    )
    loss = training.loss()
    backward = partial(loss.backward, retain_graph=True)
    measure("training: backward", places * 4, backward, products=True)
    del loss, backward
    trained = [(p, p.grad) for p in model.parameters() if p.grad is not None]

    def optimize() -> None:
        for parameter, gradient in trained:
            parameter.grad = gradient  # a step drops it
        training.optimization.optimizer.step()

    measure("training: optimiser", places * 4, optimize)
    trained.clear()
    measure("training: whole step", places * 4, training.step, products=True)
    figures["peak GB"] = peak_memory(device)
    print(f"{'  peak memory':34} {figures['peak GB']:12.2f} GB")

    database = np.random.default_rng(0).standard_normal((10_000, 3072)).astype(np.float32)
    queries = database[::10] + 1
    chunks = [(np.arange(10_000), database)]
    measure("search, queries in 10,000 x 3072", len(queries), lambda: search.nearest(queries, chunks, 20, device))
    record("stages", figures, settings)


if __name__ == "__main__":
    main()
