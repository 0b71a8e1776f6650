"""Evaluation and a training step as a whole: ours in --precision against the released way in fp32.

    python -m benchmarks.end_to_end [--device cuda --backbone dino --precision bf16 --places 120]

The released way: its input pipeline, explicit attention, the loop over clusters, fp32 (what PyTorch rounds to TF32 by
default included), a batch size of 16.
"""

import argparse
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import baselines
from benchmarks.measuring import medians, record
from benchmarks.photos import made_photos
from datasets.evaluation.database_queries import list_images
from datasets.photos.batches import image_batches
from datasets.photos.transforms import evaluation_transform
from model import SuperVLADNet, build_model
from model.loss import MinedMultiSimilarity
from parser import BACKBONES
from utils.run.optimization import Optimization
from utils.system.device import autocast, peak_memory, pick_device, reading_workers, to_cpu, usable_cores

PHOTOS = Path("data/benchmark")


class ReleasedImages(Dataset[Tensor]):
    """Photos through the released evaluation pipeline."""

    def __init__(self, paths: Sequence[str], size: tuple[int, int]):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return baselines.evaluation_input(self.paths[index], self.size)


def as_released(model: SuperVLADNet) -> SuperVLADNet:
    """The model with explicit attention and the loop over clusters."""
    for block in model.backbone.blocks:
        block.attn.forward = types.MethodType(baselines.explicit_attention, block.attn)
    layer = model.aggregation

    def aggregate(self: nn.Module, features: Tensor) -> Tensor:
        return baselines.cluster_loop(features, layer.conv.weight, layer.clusters).view(-1, layer.clusters, layer.dim)

    layer.forward = types.MethodType(aggregate, layer)  # type: ignore[method-assign]
    return model


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default="dino_small")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--size", type=int, nargs=2, help="by default the backbone's own")
    parser.add_argument("--train_size", type=int, nargs=2, default=(224, 224))
    parser.add_argument("--batch", type=int, help="images at a time, ours (GPU: 64, CPU: 4)")
    parser.add_argument("--places", type=int, help="places of a training step (GPU: 120, CPU: 4)")
    parser.add_argument("--count", type=int, help="photos to evaluate (GPU: 2048, CPU: 32)")
    parser.add_argument("--num_workers", type=int, help="threads that read images (ours: train.py's default)")
    parser.add_argument("--compile", action="store_true", help="compile our backbone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--photos", type=Path, help="JPEGs to read instead of made ones, searched below")
    parser.add_argument("--no_record", action="store_true", help="leave no results.json")
    settings = parser.parse_args(argv)
    settings.size = settings.size or [BACKBONES[settings.backbone].side] * 2
    device = pick_device(settings.device)
    on_gpu = device.type == "cuda"
    batch, places = settings.batch or (64 if on_gpu else 4), settings.places or (120 if on_gpu else 4)
    count, size = settings.count or (2048 if on_gpu else 32), tuple(settings.size)
    num_workers = reading_workers(device, settings.num_workers)
    photos = list_images(settings.photos) if settings.photos else made_photos(PHOTOS, count=48)
    photos = (photos * (count // len(photos) + 1))[:count]

    torch.manual_seed(0)
    ours = build_model(backbone=settings.backbone).to(device)
    released = as_released(build_model(backbone=settings.backbone).to(device))
    released.load_state_dict(ours.state_dict())
    if settings.compile:
        ours.backbone.compile_blocks()

    @torch.inference_mode()
    def evaluate_released() -> Tensor:
        loader = DataLoader(ReleasedImages(photos, size), batch_size=16, num_workers=usable_cores(), pin_memory=on_gpu)
        return torch.cat([released.eval()(images.to(device)).cpu() for images in loader])

    @torch.inference_mode()
    def evaluate_ours() -> Tensor:
        read = image_batches(
            photos,
            transform=evaluation_transform(size),
            batch_size=batch,
            num_workers=num_workers,
            device=device,
            progress="ours",
        )

        def vectors() -> Iterator[Tensor]:
            for images in read:
                with autocast(device, settings.precision):
                    yield ours.eval().cluster_vectors(images).float().flatten(1)

        return torch.cat(list(to_cpu(vectors())))

    similarity = (evaluate_released() * evaluate_ours()).sum(dim=1).min().item()
    seconds = medians({"released": evaluate_released, "ours": evaluate_ours}, device=device)

    images = torch.randn(places * 4, 3, *settings.train_size, device=device)
    labels = torch.arange(places, device=device).repeat_interleave(4)
    steps: dict[str, Callable[[], None]] = {}
    for name, model, precision in (("released", released, "fp32"), ("ours", ours, settings.precision)):
        model.train().backbone.freeze(min(8, len(model.backbone.blocks)))
        optimization = Optimization(
            model, lr=5e-5, lr_encoder=1e-4, steps_per_epoch=1000, scale_gradients=precision == "fp16"
        )
        steps[name] = partial(step, model, optimization, images, labels, precision)
    training = medians(steps, device=device)
    figures = {
        "settings": {k: v for k, v in vars(settings).items() if k not in ("photos", "no_record", "device")},
        "evaluation, released, images/s": count / seconds["released"],
        "evaluation, ours, images/s": count / seconds["ours"],
        "evaluation, ratio": seconds["released"] / seconds["ours"],
        "evaluation, least cosine similarity": similarity,
        "training, released, images/s": places * 4 / training["released"],
        "training, ours, images/s": places * 4 / training["ours"],
        "training, ratio": training["released"] / training["ours"],
        "peak GB": peak_memory(device),
    }
    for name, value in figures.items():
        print(f"{name:40} {value:12.4g}" if isinstance(value, float) else f"{name}: {value}")
    if not settings.no_record:
        record("end_to_end", figures, device)


def step(model: SuperVLADNet, optimization: Optimization, images: Tensor, labels: Tensor, precision: str) -> None:
    """A training step."""
    with autocast(images.device, precision):
        loss = MinedMultiSimilarity()(model(images), labels)
    optimization.backward(loss)
    optimization.step()


if __name__ == "__main__":
    main()
