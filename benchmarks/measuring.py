"""What the benchmarks share: options, timing in turns, memory at its peak, made photos, a training step, records."""

import argparse
import json
import multiprocessing
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.photos.batches import image_batches
from datasets.photos.transforms import evaluation_transform
from datasets.toy_city import write_toy_city
from model import SuperVLADNet
from model.loss import MinedMultiSimilarity
from model.sizes import BACKBONES
from parser import Recipe
from utils.run.log import environment
from utils.run.optimization import Optimization
from utils.system.device import autocast, pick_device, reading_workers, to_cpu

RESULTS = Path("logs/benchmarks")  # not in the tree itself: the next benchmark would find its revision dirty
PHOTOS = Path("data/benchmark")
OPTIONS: dict[str, dict[str, Any]] = {
    "backbone": {"choices": BACKBONES, "default": "dino_small"},
    "size": {"type": int, "nargs": 2, "help": "of evaluated images; by default the backbone's own"},
    "train_size": {"type": int, "nargs": 2, "default": (224, 224)},
    "batch": {"type": int, "help": "images at a time in evaluation (GPU: 64, CPU: 4)"},
    "places": {"type": int, "help": "places of a training step, of four photos each (GPU: 120, CPU: 4)"},
    "count": {"type": int, "help": "photos to evaluate (GPU: 2048, CPU: 32)"},
    "precision": {"choices": ("fp32", "tf32", "bf16", "fp16"), "default": "fp32"},
    "device": {"default": "auto"},
    "num_workers": {"type": int, "help": "that read images; by default as in train.py and eval.py"},
    "compile": {"action": "store_true", "help": "compile the backbone"},
    "photos": {"type": Path, "help": "JPEGs to read instead of made ones, searched below"},
    "database": {"type": int, "default": 1_000_000},
    "queries": {"type": int, "default": 1000},
    "dim": {"type": int, "default": 3072},
    "folder": {"type": Path, "default": Path("/tmp"), "help": "for descriptors, which are removed at the end"},
}


def parser_of(description: str | None, *names: str) -> argparse.ArgumentParser:
    """A benchmark's command line with these of OPTIONS."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        parser.add_argument(f"--{name}", **OPTIONS[name])
    parser.add_argument("--no_record", action="store_true", help="leave no results.json")
    return parser


def settings_of(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line, with what depends on the device and the backbone decided."""
    settings = parser.parse_args(argv)
    settings.device = pick_device(getattr(settings, "device", "cpu"))
    if "size" in settings and settings.size is None:
        settings.size = [BACKBONES[settings.backbone].side] * 2
    for name, on_gpu, on_cpu in (("batch", 64, 4), ("places", 120, 4), ("count", 2048, 32)):
        if name in settings and getattr(settings, name) is None:
            setattr(settings, name, on_gpu if settings.device.type == "cuda" else on_cpu)
    if "num_workers" in settings:
        settings.num_workers = reading_workers(settings.device, settings.num_workers)
    return settings


def medians(
    ways: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each way, after a call that does not count; the ways take turns.

    Args:
        ways: what to time, by name.
        rounds: calls of each.
        device: what they compute on.
        clock: gives seconds; `time.process_time` leaves out what other programs took of a CPU.
    """

    def now() -> float:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + rounds):
        for name, way in ways.items():
            started = now()
            way()
            seconds[name].append(now() - started)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one core, as in a DataLoader's worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


class PeakMemory:
    """The most memory of this process in the `with` block, in GB (Linux).

    Attributes:
        growth: of the resident memory, beyond what was resident before.
        resident: of the resident memory.
        anonymous: of the memory that no file stands behind, looked at every 20 ms.
    """

    growth = resident = anonymous = 0.0

    @staticmethod
    def _status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1e6

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.anonymous = max(self.anonymous, self._status("RssAnon"))

    def __enter__(self) -> "PeakMemory":
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        self._before = self._status("VmRSS")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.resident = self._status("VmHWM")
        self.growth = self.resident - self._before


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of norm 1, float32."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def made_photos(*, count: int, size: tuple[int, int] = (640, 480)) -> list[str]:
    """Photos of the toy city (width, height) with a camera's noise, as heavy as street photos; made once."""
    paths = [PHOTOS / f"{index:04d}_{size[0]}x{size[1]}.jpg" for index in range(count)]
    if not all(path.exists() for path in paths):
        city = {"train_streets": 1, "places": 1, "visits": 4, "val_streets": 1, "cluster_streets": 1, "test_streets": 2}
        write_toy_city(PHOTOS / "city", **city, spots=8, size=size, overwrite=True)
        views = sorted((PHOTOS / "city").rglob("*.jpg"))
        rng = np.random.default_rng(0)
        for index, path in enumerate(paths):
            pixels = np.asarray(Image.open(views[index % len(views)]).resize(size), dtype=np.float32)
            noisy = pixels + rng.normal(0, 8, pixels.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=88)
    return [str(path) for path in paths]


def batches_of(photos: Sequence[str], settings: argparse.Namespace) -> Iterator[Tensor]:
    """Batches of images, read and transformed as eval.py does."""
    return image_batches(
        photos,
        transform=evaluation_transform(tuple(settings.size)),
        batch_size=settings.batch,
        num_workers=settings.num_workers,
        device=settings.device,
        progress="ours",
    )


def vectors_of(model: SuperVLADNet, batches: Iterable[Tensor], settings: argparse.Namespace) -> Iterator[Tensor]:
    """The cluster vectors of batches of images, n x K x D float32, on the CPU."""

    def vectors() -> Iterator[Tensor]:
        for images in batches:
            with autocast(settings.device, settings.precision):
                yield model.cluster_vectors(images).float()

    return to_cpu(vectors())


class Training:
    """The recipe's training step on random images: blocks from 8 on, both optimisers."""

    def __init__(self, model: SuperVLADNet, settings: argparse.Namespace, *, precision: str):
        model.train().backbone.freeze(min(8, len(model.backbone.blocks)))
        self.model, self.precision, self.criterion = model, precision, MinedMultiSimilarity()
        self.images = torch.randn(settings.places * 4, 3, *settings.train_size, device=settings.device)
        self.labels = torch.arange(settings.places, device=settings.device).repeat_interleave(4)
        self.optimization = Optimization(model, Recipe(), steps_per_epoch=1000, scale_gradients=precision == "fp16")

    def forward(self, images: int | None = None) -> Tensor:
        with autocast(self.images.device, self.precision):
            return self.model(self.images[:images])

    def loss(self, images: int | None = None) -> Tensor:
        with autocast(self.images.device, self.precision):
            return self.criterion(self.forward(images), self.labels[:images])

    def step(self) -> None:
        self.optimization.backward(self.loss())
        self.optimization.step()


def record(benchmark: str, figures: Mapping[str, Any], settings: argparse.Namespace) -> None:
    """Writes `logs/benchmarks/<benchmark>/<time>/results.json`: figures, options, and what they hold for."""
    if settings.no_record:
        return
    options = {name: value for name, value in vars(settings).items() if name not in ("device", "no_record")}
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "benchmark": benchmark,
        "settings": options,
        **figures,
        "environment": {**environment(settings.device), "processor": processor(), "threads": torch.get_num_threads()},
    }
    path = RESULTS / benchmark / time.strftime("%Y-%m-%d_%H-%M-%S") / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(f"in {path}; python -m benchmarks.tables --add {benchmark} {path} makes it a record")


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
