"""What each stage costs on this machine, and the whole, as a share of what the device can do.

    python -m benchmarks.stages [--backbone dino_small] [--size 322 322] [--precision bf16] [--device cuda]

The ceiling is the rate of matrix products that the device reaches in the same run and precision; a stage's share of it
counts its own products only. Training is the recipe's step: --places places of four photos, blocks from 8 on.
"""

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import medians, record
from benchmarks.photos import made_photos
from datasets.photos.batches import image_batches
from datasets.photos.transforms import evaluation_transform, read_pixels, transform_sizes
from model import SuperVLADNet, build_model
from model.loss import MinedMultiSimilarity
from parser import BACKBONES
from utils.retrieval import search
from utils.run.optimization import Optimization
from utils.system.device import allow_tf32, autocast, peak_memory, pick_device, reading_workers, to_cpu

PHOTOS = Path("data/benchmark")


def matrix_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second that the device reaches in a large matrix product."""
    side = 8192 if device.type == "cuda" else 1536
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / medians({"product": lambda: a @ b}, device=device)["product"]


def operations(step) -> float:
    """Floating-point operations of the matrix products of a call; what is compiled would hide them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default="dino_small")
    parser.add_argument("--size", type=int, nargs=2, help="by default the backbone's own")
    parser.add_argument("--train_size", type=int, nargs=2, default=(224, 224))
    parser.add_argument("--batch", type=int, help="images at a time in evaluation (GPU: 64, CPU: 4)")
    parser.add_argument("--places", type=int, help="places of a training step (GPU: 120, CPU: 4)")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num_workers", type=int, help="threads that read images (train.py's and eval.py's default)")
    parser.add_argument("--compile", action="store_true", help="compile the backbone")
    parser.add_argument("--no_record", action="store_true", help="leave no results.json")
    settings = parser.parse_args(argv)
    settings.size = settings.size or [BACKBONES[settings.backbone].side] * 2
    device = pick_device(settings.device)
    on_gpu = device.type == "cuda"
    allow_tf32(settings.precision == "tf32")
    batch, places = settings.batch or (64 if on_gpu else 4), settings.places or (120 if on_gpu else 4)
    num_workers = reading_workers(device, settings.num_workers)
    photos = made_photos(PHOTOS, count=max(48, batch))
    transform = evaluation_transform(tuple(settings.size))
    torch.manual_seed(0)
    model = build_model(backbone=settings.backbone, crossimage_encoder=True).to(device).eval()
    twin = model  # whose products are counted
    if settings.compile:
        twin = copy.deepcopy(model)
        model.backbone.compile_blocks()
        torch._functorch.config.donated_buffer = False  # the backward pass is timed again and again on one graph
    rate = matrix_rate(device, settings.precision)
    rows: list[tuple[str, float, float]] = []  # stage, images a second, share of the ceiling (0: no products)

    def measure(stage: str, images: int, step, flops: float = 0.0) -> None:
        seconds = medians({stage: step}, device=device)[stage]
        rows.append((stage, images / seconds, flops / seconds / rate))
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
    context = autocast(device, settings.precision)
    with torch.inference_mode(), context:
        features = model.backbone(images)
        vectors = model.aggregation(features)
        for stage, step in (
            ("backbone", lambda of: of.backbone(images)),
            ("layer", lambda of: of.aggregation(features)),
            ("encoder", lambda of: of.describe(vectors)),
        ):
            measure(stage, batch, partial(step, model), operations(partial(step, twin)))

    def evaluate(paths: Sequence[str]) -> float:
        """Backbone and layer over photos; the share of the time spent waiting for them, once all workers have begun."""
        waited = began = 0.0
        read = image_batches(
            paths, transform=transform, batch_size=batch, num_workers=num_workers, device=device, progress="whole"
        )

        def vectors() -> Iterator[Tensor]:
            nonlocal waited, began
            for index in range(-(-len(paths) // batch)):
                started = time.perf_counter()
                images = next(read)
                waited += time.perf_counter() - started
                if index == 1:
                    waited, began = 0.0, time.perf_counter()
                with context:
                    yield model.cluster_vectors(images).float()

        with torch.inference_mode():
            for _ in to_cpu(vectors()):
                pass
        return waited / (time.perf_counter() - began)

    many = (photos * (24 * batch // len(photos) + 1))[: max(len(photos), 24 * batch)]
    measure("evaluation, whole", len(many), lambda: evaluate(many))
    waited = evaluate(many)
    peak_of_evaluation = peak_memory(device)
    print(f"{'  waiting for data':34} {waited:12.1%}")
    print(f"{'  peak memory':34} {peak_of_evaluation:12.2f} GB")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    # The training step.
    for of in {model, twin}:
        of.train().backbone.freeze(min(8, len(of.backbone.blocks)))
    optimization = Optimization(
        model, lr=5e-5, lr_encoder=1e-4, steps_per_epoch=1000, scale_gradients=settings.precision == "fp16"
    )
    images = torch.randn(places * 4, 3, *settings.train_size, device=device)
    labels = torch.arange(places, device=device).repeat_interleave(4)
    criterion = MinedMultiSimilarity()

    def forward(of: SuperVLADNet) -> torch.Tensor:
        with context:
            return of(images)

    def loss_of(of: SuperVLADNet) -> torch.Tensor:
        return criterion(forward(of), labels)

    descriptors = forward(model).detach().float().requires_grad_()
    measure("training: forward", places * 4, lambda: forward(model), operations(lambda: forward(twin)))
    measure("training: loss and mining", places * 4, lambda: criterion(descriptors, labels).backward())

    def step() -> None:
        optimization.backward(loss_of(model))
        optimization.step()

    loss = loss_of(model)
    measure(
        "training: backward", places * 4, partial(loss.backward, retain_graph=True), operations(loss_of(twin).backward)
    )
    del loss
    if twin is not model:
        twin.zero_grad()
    trained = [(p, p.grad) for p in model.parameters() if p.grad is not None]

    def optimize() -> None:
        for parameter, gradient in trained:
            parameter.grad = gradient  # a step drops it
        optimization.optimizer.step()

    measure("training: optimiser", places * 4, optimize)
    trained.clear()
    measure("training: whole step", places * 4, step, operations(lambda: loss_of(twin).backward()))
    print(f"{'  peak memory':34} {peak_memory(device):12.2f} GB")

    database = np.random.default_rng(0).standard_normal((10_000, 3072)).astype(np.float32)
    queries = database[::10] + 1
    chunk = [(np.arange(len(database)), database)]
    measure("search, queries in 10,000 x 3072", len(queries), lambda: search.nearest(queries, chunk, 20, device))
    if not settings.no_record:
        figures = {stage: {"images/s": speed, "share of the ceiling": share} for stage, speed, share in rows}
        facts = {name: value for name, value in vars(settings).items() if name not in ("no_record", "device")}
        summary = {
            "matrix products, TFLOP/s": rate / 1e12,
            "waiting for data": waited,
            "peak GB of evaluation": peak_of_evaluation,
            "peak GB": peak_memory(device),
        }
        record(
            "stages",
            {"settings": {**facts, "batch": batch, "places": places, "num_workers": num_workers}, **summary, **figures},
            device,
        )


if __name__ == "__main__":
    main()
