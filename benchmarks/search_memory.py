"""Memory and time of the exact search in a database on disk.

    python -m benchmarks.search_memory --database 1000000 --queries 1000 --dim 3072 --folder /tmp

Descriptors are made up (random, float16 on disk), searched as eval.py searches them, and compared with brute force on
some queries. The most anonymous memory of the process is sampled from /proc (Linux). The time is given as a ratio to
FAISS's own flat search of a tenth of the database in memory.
"""

import argparse
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import torch

from benchmarks.measuring import record
from utils.retrieval import search
from utils.retrieval.descriptor_store import DescriptorStore
from utils.retrieval.extraction import EncoderContext, descriptors


class Plain(torch.nn.Module):
    """A model without an encoder: descriptors are the normalised vectors."""

    def describe(self, vectors: torch.Tensor, group: int | None = None) -> torch.Tensor:
        return torch.nn.functional.normalize(vectors.flatten(1), dim=1)


class PeakMemory:
    """The most of a field of /proc/self/status while in the `with` block, in GB."""

    def __init__(self, field: str = "RssAnon"):
        self.field = field
        self.peak = 0.0
        self._stop = threading.Event()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith(self.field + ":"))
            self.peak = max(self.peak, int(line.split()[1]) / 1e6)

    def __enter__(self) -> "PeakMemory":
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def made(indices: np.ndarray, dim: int) -> np.ndarray:
    """Descriptors that depend on their index alone, so that they need not be kept to be compared with."""
    return np.stack([np.random.default_rng(int(i)).standard_normal(dim, dtype=np.float32) for i in indices]) / dim**0.5


def blocks(count: int, size: int = 8192) -> Iterator[np.ndarray]:
    for start in range(0, count, size):
        yield np.arange(start, min(count, start + size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=3072)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--no_record", action="store_true", help="leave no results.json")
    settings = parser.parse_args()
    folder = settings.folder / "search_memory"
    count, dim = settings.database, settings.dim
    store = DescriptorStore(folder, "database", (count, 1, 4, dim // 4), dtype="float16")
    for indices in blocks(count):
        store.write(indices, made(indices, dim).reshape(-1, 1, 4, dim // 4))
    # Queries near known images, so that the answer is not noise.
    rng = np.random.default_rng(0)
    near = rng.integers(count, size=settings.queries)
    queries = made(near, dim) + 0.5 * made(near + count, dim)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    size = store.path.stat().st_size / 1e9
    print(f"written: {size:.2f} GB", flush=True)

    chunks = descriptors(Plain(), store, EncoderContext(16), device=torch.device("cpu"))
    with PeakMemory() as anonymous, PeakMemory("VmRSS") as resident:
        started = time.perf_counter()
        _, predictions = search.nearest(queries, chunks, 20)
        seconds = time.perf_counter() - started
    print(f"peak RssAnon {anonymous.peak:.2f} GB, VmRSS {resident.peak:.2f} GB, {seconds:.0f} s", flush=True)
    print(f"nearest is the image the query was made from: {100 * (predictions[:, 0] == near).mean():.1f}%")

    sample = np.arange(0, settings.queries, max(1, settings.queries // 20))
    scores = []
    for indices in blocks(count):
        rows = store.read(indices).reshape(len(indices), -1)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        scores.append(queries[sample] @ rows.T)
    brute = np.argsort(-np.concatenate(scores, axis=1), axis=1, kind="stable")[:, :20]
    same = (brute == predictions[sample]).mean()
    print(f"equal to brute force on {len(sample)} queries: {100 * same:.2f}% of their first 20", flush=True)
    del scores, brute

    tenth = count // 10
    index = faiss.IndexFlatL2(dim)
    for indices in blocks(tenth):
        index.add(store.read(indices).reshape(len(indices), -1))
    started = time.perf_counter()
    index.search(queries, 20)
    flat = time.perf_counter() - started
    print(f"in memory, a tenth of it: {flat:.1f} s; ratio {seconds / flat:.1f}")
    shutil.rmtree(folder)
    if not settings.no_record:
        figures = {
            "database": count,
            "queries": settings.queries,
            "dim": dim,
            "on disk, GB": size,
            "anonymous memory, GB": anonymous.peak,
            "resident memory, GB": resident.peak,
            "seconds": seconds,
            "ratio to FAISS's flat search of a tenth": seconds / flat,
        }
        record("search_memory", figures, torch.device("cpu"))


if __name__ == "__main__":
    main()
