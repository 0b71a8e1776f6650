"""What a map adds to the model's time when it is asked with one photo.

    python -m benchmarks.place_map --photos 10000 --dim 3072

Descriptors are made up: unit vectors, of queries near a photo of the map and of queries near none, which is the harder
case. The time is that of `PlaceMap.locate` with a model that takes none, beside FAISS's exact search; the two take
turns, and medians are taken.
"""

import argparse
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from benchmarks.measuring import processor, record
from benchmarks.search_memory import PeakMemory
from utils.retrieval.place_map import PlaceMap, write_map

MODEL = {"backbone": "dino", "clusters": 4, "ghost_clusters": 1, "crossimage_encoder": False}


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def seconds(ways: dict, queries: np.ndarray) -> dict[str, float]:
    """Median seconds a query of each way, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for query in queries:
        for name, way in ways.items():
            started = time.perf_counter()
            way(query)
            times[name].append(time.perf_counter() - started)
    return {name: float(np.median(of)) for name, of in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=3072)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--no_record", action="store_true", help="leave no results.json")
    settings = parser.parse_args()
    faiss.omp_set_num_threads(1)  # a map is searched on one core
    rng = np.random.default_rng(0)
    photo = np.zeros((480, 640, 3), dtype=np.uint8)

    def chunks():
        made = np.random.default_rng(1)
        for start in range(0, settings.photos, 1000):
            indices = np.arange(start, min(start + 1000, settings.photos))
            yield indices, unit(made.standard_normal((len(indices), settings.dim), dtype=np.float32))

    far = unit(rng.standard_normal((settings.queries, settings.dim), dtype=np.float32))
    _, rows = next(chunks())
    near = unit(rows[: settings.queries] + 0.5 * far[: len(rows)])
    print(f"{processor()}, {settings.photos} photos of {settings.dim} numbers")
    figures: dict[str, object] = {"photos": settings.photos, "dim": settings.dim, "queries": settings.queries}
    for dtype in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "map.npz"
            with PeakMemory() as writing:
                write_map(
                    path,
                    chunks(),
                    paths=[f"/photos/{number:07d}.jpg" for number in range(settings.photos)],
                    positions=None,
                    dtype=dtype,
                    model=MODEL,
                    checkpoint="",
                    weights="",
                    resize=(322, 322),
                    antialias=True,
                    upright=True,
                    precision="fp32",
                    geographic=False,
                    accept=None,
                )
            with PeakMemory() as loading:
                asked = PlaceMap(path)
                asked.load()
            size = path.stat().st_size / 1e9
        print(f"{dtype}: {size:.3f} GB; anonymous memory {writing.peak:.2f} GB written, {loading.peak:.2f} GB loaded")
        floats = np.concatenate([rows.astype(dtype).astype(np.float32) for _, rows in chunks()])

        def locate(query, asked=asked):
            asked.describe = lambda _: query
            return asked.locate(photo)

        for name, queries in (("near a photo", near), ("near none", far)):
            taken = seconds({"map": locate, "exact": lambda query, f=floats: faiss.knn(query[None], f, 1)}, queries)
            _, found = faiss.knn(queries, floats, 1)
            same = np.mean([asked.nearest(query)[0] == row for query, row in zip(queries, found[:, 0], strict=True)])
            figures[f"{dtype}, {name}"] = {
                "ms a photo": 1e3 * taken["map"],
                "times as fast as exact search": taken["exact"] / taken["map"],
                "same photo": 100 * float(same),
            }
            print(
                f"  {name}: {1e3 * taken['map']:.2f} ms a photo, {taken['exact'] / taken['map']:.1f} times as fast as "
                f"FAISS's exact search; the same photo for {100 * same:.1f}% of {len(queries)} queries"
            )
    if not settings.no_record:
        record("place_map", figures, torch.device("cpu"))


if __name__ == "__main__":
    main()
