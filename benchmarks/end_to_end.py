"""Evaluation and a training step as a whole: ours in --precision against the released way in fp32.

    python -m benchmarks.end_to_end [--device cuda --backbone dino --precision bf16 --places 120]

The released way: its input pipeline, explicit attention, the loop over clusters, fp32 (what PyTorch rounds to TF32 by
default included), a batch size of 16.
"""

import types
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import baselines
from benchmarks.measuring import Training, batches_of, made_photos, medians, parser_of, record, settings_of, vectors_of
from datasets.photos.listing import list_images
from model import SuperVLADNet, build_model
from utils.system.device import peak_memory, usable_cores


def as_released(model: SuperVLADNet) -> SuperVLADNet:
    """The model with explicit attention and the loop over clusters."""
    baselines.attend_explicitly(model.backbone)
    layer = model.aggregation

    def aggregate(self: nn.Module, features: Tensor) -> Tensor:
        return baselines.cluster_loop(features, layer.conv.weight, layer.clusters).view(-1, layer.clusters, layer.dim)

    layer.forward = types.MethodType(aggregate, layer)  # type: ignore[method-assign]
    return model


def main(argv: Sequence[str] | None = None) -> None:
    names = ("backbone", "precision", "size", "train_size", "batch", "places", "count", "num_workers", "compile")
    settings = settings_of(parser_of(__doc__, *names, "device", "photos"), argv)
    device, count = settings.device, settings.count
    photos = list_images(settings.photos) if settings.photos else made_photos(count=48)
    photos = (photos * (count // len(photos) + 1))[:count]
    torch.manual_seed(0)
    ours = build_model(backbone=settings.backbone).to(device).eval()
    released = as_released(build_model(backbone=settings.backbone).to(device)).eval()
    released.load_state_dict(ours.state_dict())
    if settings.compile:
        ours.backbone.compile_blocks()

    @torch.inference_mode()
    def evaluate_released() -> Tensor:
        pipeline = partial(baselines.evaluation_batch, size=settings.size)
        workers = {"num_workers": usable_cores(), "pin_memory": device.type == "cuda"}
        loader = DataLoader(photos, batch_size=16, collate_fn=pipeline, **workers)
        return torch.cat([released(images.to(device)).cpu() for images in loader])

    @torch.inference_mode()
    def evaluate_ours() -> Tensor:
        return torch.cat([vectors.flatten(1) for vectors in vectors_of(ours, batches_of(photos, settings), settings)])

    similarity = (evaluate_released() * evaluate_ours()).sum(dim=1).min().item()
    seconds = medians({"released": evaluate_released, "ours": evaluate_ours}, device=device)
    steps = {
        "released": Training(released, settings, precision="fp32").step,
        "ours": Training(ours, settings, precision=settings.precision).step,
    }
    training = medians(steps, device=device)
    images = settings.places * 4
    figures = {
        "evaluation, released, images/s": count / seconds["released"],
        "evaluation, ours, images/s": count / seconds["ours"],
        "evaluation, ratio": seconds["released"] / seconds["ours"],
        "evaluation, least cosine similarity": similarity,
        "training, released, images/s": images / training["released"],
        "training, ours, images/s": images / training["ours"],
        "training, ratio": training["released"] / training["ours"],
        "peak GB": peak_memory(device),
    }
    for name, value in figures.items():
        print(f"{name:40} {value:12.4g}")
    record("end_to_end", figures, settings)


if __name__ == "__main__":
    main()
