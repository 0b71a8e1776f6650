"""Ours against the released way, stage by stage: ratios from one run, the two taking turns. And DINOv3 beside DINOv2.

python -m benchmarks.compare [--only input forward layer table start backbones] [--photos FOLDER]
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import baselines, measuring
from benchmarks.measuring import PeakMemory, in_own_process, made_photos, medians, one_thread
from datasets.evaluation.tree import DatabaseQueries
from datasets.photos.listing import list_images
from datasets.photos.positions import utm_positions
from datasets.photos.transforms import evaluation_transform, open_image, read_pixels
from datasets.training.gsv_cities import CITIES, COLUMNS, GSVCities
from datasets.training.randaugment import TrainingTransform
from model import BACKBONES, build_model
from model.dinov2 import DINOv2
from model.supervlad import SuperVLAD


def compare_input(photos: Sequence[str], training_photos: Sequence[str]) -> dict[str, float]:
    """One core's time a photo: evaluation with and without the resize, and training."""
    transform, augment = evaluation_transform((322, 322)), TrainingTransform((224, 224), 3)
    resize_only = TrainingTransform((224, 224), 0)
    ways = {
        "released": lambda: [baselines.evaluation_input(path) for path in photos],
        "on the device": lambda: [read_pixels(path) for path in photos],
        "on the CPU": lambda: [transform(read_pixels(path)[None]) for path in photos],
        "training": lambda: [baselines.training_input(path) for path in training_photos],
        "ours": lambda: [augment(open_image(path)) for path in training_photos],
        "without RandAugment": lambda: [resize_only(open_image(path)) for path in training_photos],
    }
    with one_thread():
        seconds = medians(ways)
        differences = [(transform(read_pixels(path)[None])[0] - baselines.evaluation_input(path)) for path in photos]
    return {
        "released evaluation input, ms": 1e3 * seconds["released"] / len(photos),
        "evaluation input, device resizes, ratio": seconds["released"] / seconds["on the device"],
        "evaluation input, all on the CPU, ratio": seconds["released"] / seconds["on the CPU"],
        "evaluation input, largest difference": max(difference.abs().max().item() for difference in differences),
        "released training input, ms": 1e3 * seconds["training"] / len(training_photos),
        "training input, ratio": seconds["training"] / seconds["ours"],
        "training input, ratio without RandAugment (floor)": seconds["training"] / seconds["without RandAugment"],
    }


def products_alone(backbone: DINOv2, images: torch.Tensor) -> None:
    """The matrix products and the attention of a forward pass, and nothing else: the ceiling of its speed."""
    B, _, H, W = images.shape
    x = backbone.patch_embed(images)
    x = torch.cat((x, x[:, :1]), dim=1)  # (B, 1 + h*w, C)
    for block in backbone.blocks:
        attention = block.attn
        heads, channels = attention.heads, x.shape[2]
        q, k, v = attention.qkv(x).view(B, x.shape[1], 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = block.mlp.fc2(block.mlp.fc1(attention.proj(y)))


@torch.inference_mode()
def compare_forward(images_count: int = 2) -> dict[str, float]:
    """ViT-B/14 at 322 x 322 in fp32 with the layer, against explicit attention; and the ceiling."""
    torch.manual_seed(0)
    ours = build_model(backbone="dino").eval()
    released = build_model(backbone="dino").eval()
    released.load_state_dict(ours.state_dict())
    baselines.attend_explicitly(released.backbone)
    images = torch.randn(images_count, 3, 322, 322)
    difference = (ours(images) - released(images)).abs().max().item()
    ways = {
        "released": lambda: released(images),
        "ours": lambda: ours(images),
        "ceiling": lambda: products_alone(ours.backbone, images),
    }
    seconds = medians(ways, rounds=15)  # the ratio is near 1, and machines are noisy
    return {
        "released forward, ms an image": 1e3 * seconds["released"] / images_count,
        "forward, ratio": seconds["released"] / seconds["ours"],
        "forward, ratio of the ceiling": seconds["released"] / seconds["ceiling"],
        "forward, largest difference": difference,
    }


def forward_pass(backbone: str, images: int) -> Callable[[], torch.Tensor]:
    """The forward pass of a network with random weights on images of its backbone's own size."""
    torch.manual_seed(0)
    model = build_model(backbone=backbone).eval()
    inputs = torch.randn(images, 3, BACKBONES[backbone].side, BACKBONES[backbone].side)
    return torch.inference_mode()(lambda: model(inputs))


def forward_memory(backbone: str, images: int) -> float:
    """MB that weights, images and a forward pass add to the process at their peak; to be called in one of its own."""
    with PeakMemory() as peak:
        forward_pass(backbone, images)()
    return 1e3 * peak.growth


def compare_backbones(images: int = 4) -> dict[str, float]:
    """Forward passes in fp32 of DINOv2 at 322 x 322 and DINOv3 at 320 x 320, the two taking turns; and their memory.

    Images a second of processor time, on one core, so that other programs take no part.
    """
    figures = {}
    for pair in (("dino_small", "dinov3_small"), ("dino", "dinov3")):
        with one_thread():
            seconds = medians({name: forward_pass(name, images) for name in pair}, clock=time.process_time)
        for name in pair:
            figures[f"{name}, images/s of a core"] = images / seconds[name]
            figures[f"{name}, peak MB"] = in_own_process(forward_memory, name, images)
        figures[f"{pair[1]} in place of {pair[0]}, ratio"] = seconds[pair[0]] / seconds[pair[1]]
    return figures


def layer_step(way: str, clusters: int, images: int = 32) -> Callable[[], torch.Tensor]:
    """A step of the layer, forward and backward, on 16 x 16 features as the backbone lays them out."""
    torch.manual_seed(0)
    layer = SuperVLAD(768, clusters, 1)
    features = torch.randn(images, 768, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    target = torch.randn(images, clusters * 768)

    def step() -> torch.Tensor:
        features.grad = layer.conv.weight.grad = None
        released = way == "released"
        output = baselines.cluster_loop(features, layer.conv.weight, clusters) if released else layer(features)
        (output.flatten(1) * target).sum().backward()
        return output.detach().flatten(1)

    return step


def layer_memory(way: str, clusters: int) -> float:
    """MB that a step adds to the process at its peak; to be called in a process of its own."""
    layer_step(way, clusters, images=2)()
    step = layer_step(way, clusters)
    with PeakMemory() as peak:
        step()
    return 1e3 * peak.growth


def compare_layer(clusters: int) -> dict[str, float]:
    """The layer's forward and backward pass on 32 images, and the memory that it adds."""
    steps = {way: layer_step(way, clusters) for way in ("released", "ours")}
    seconds = medians(steps)
    memory = {way: in_own_process(layer_memory, way, clusters) for way in steps}
    return {
        f"released layer K={clusters}, ms": 1e3 * seconds["released"],
        f"layer K={clusters}, ratio": seconds["released"] / seconds["ours"],
        f"released layer K={clusters}, peak MB": memory["released"],
        f"layer K={clusters}, share of the peak memory": memory["ours"] / memory["released"],
        f"layer K={clusters}, largest difference": (steps["ours"]() - steps["released"]()).abs().max().item(),
    }


def write_table(folder: Path, rows: int) -> None:
    """A GSV-Cities of made rows, spread over all cities, four to thirteen a place."""
    rng = np.random.default_rng(0)
    (folder / "Dataframes").mkdir(parents=True)
    for city in CITIES:
        sizes = rng.integers(4, 14, size=rows // len(CITIES) // 8)
        lines = [",".join(COLUMNS)]
        for place in np.repeat(np.arange(len(sizes)), sizes)[: rows // len(CITIES) + 1]:
            year, month, north = rng.integers((2007, 1, 0), (2021, 13, 360))
            lat, lon = rng.uniform((-60, -180), (60, 180)).round(7)
            lines.append(f"{place},{year},{month},{north},{city},{lat},{lon},{rng.bytes(11).hex()}")
        (folder / "Dataframes" / f"{city}.csv").write_text("\n".join(lines) + "\n")


def compare_table(rows: int = 530_000) -> dict[str, float]:
    """Loading GSV-Cities' tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table(folder, rows)
        with PeakMemory() as memory:
            places = GSVCities(folder, transform=open_image)
        loading = medians({"ours": lambda: GSVCities(folder, transform=open_image)})["ours"]
    return {"GSV-Cities rows": len(places.names), "table loaded, s": loading, "table loaded, MB": 1e3 * memory.growth}


def compare_start(images: int = 300_000, queries: int = 10_000) -> dict[str, float]:
    """Listing a large tree, parsing its names and finding positives."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for part, count in (("database", images), ("queries", queries)):
            photos = Path(folder) / "big/images/test" / part
            photos.mkdir(parents=True)
            for index, (east, north) in enumerate(rng.uniform(0, 20_000, (count, 2))):
                (photos / f"@{east:.2f}@{north:.2f}@{index}@.jpg").touch()
        dataset = DatabaseQueries.from_folder(Path(folder), "big", "test")
        ways = {
            "listing": lambda: list_images(Path(folder) / "big/images/test/database"),
            "parsing": lambda: utm_positions(dataset.database_paths),
            "positives": lambda: list(dataset.positives(25.0)),
        }
        return {f"{name} {images} images, s": value for name, value in medians(ways).items()}


STAGES = {
    "forward": compare_forward,
    "layer": lambda: compare_layer(4) | compare_layer(64),
    "table": compare_table,
    "start": compare_start,
    "backbones": compare_backbones,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = measuring.parser_of(__doc__, "photos")
    parser.add_argument("--only", nargs="+", choices=("input", *STAGES), default=("input", *STAGES))
    settings = measuring.settings_of(parser, argv)
    figures: dict[str, float] = {}
    if "input" in settings.only:
        photos = list_images(settings.photos)[:48] if settings.photos else made_photos(count=48)
        smaller = photos if settings.photos else made_photos(count=48, size=(400, 300))  # as GSV-Cities' are
        figures |= compare_input(photos, smaller)
    for stage, compare in STAGES.items():
        if stage in settings.only:
            figures |= compare()
    for name, value in figures.items():
        print(f"{name:55} {value:12.4g}")
    measuring.record("compare", figures, settings)


if __name__ == "__main__":
    main()
