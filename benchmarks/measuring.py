"""Timing that can be compared: alternatives take turns in one run, and medians are taken."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from utils.run.log import environment
from utils.system.files import whole

RESULTS = Path("logs/benchmarks")  # not in the tree itself: the next benchmark would find its revision dirty


def synchronize(device: torch.device) -> None:
    """Waits for a GPU to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    device = device or torch.device("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            synchronize(device)
            started = clock()
            way()
            synchronize(device)
            seconds[name].append(clock() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


class PeakGrowth:
    """By how many MB this process's resident memory grows at most in the `with` block (Linux)."""

    growth = 0.0

    @staticmethod
    def _status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1e3

    def __enter__(self) -> "PeakGrowth":
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        self._before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.growth = self._status("VmHWM") - self._before


def record(benchmark: str, figures: Mapping[str, Any], device: torch.device) -> None:
    """Writes `logs/benchmarks/<benchmark>/<time>/results.json`: the figures, the device and versions they hold for."""
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "benchmark": benchmark,
        **figures,
        "environment": {**environment(device), "processor": processor(), "threads": torch.get_num_threads()},
    }
    path = RESULTS / benchmark / time.strftime("%Y-%m-%d_%H-%M-%S") / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(f"in {path}; python -m benchmarks.tables --add {path} --name {benchmark} makes it a record")


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
