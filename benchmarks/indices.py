"""Approximate search in a made database: memory, time, and what it finds of what exact search finds.

    python -m benchmarks.indices --database 1000000 --queries 1000 --dim 3072 --folder /tmp

Descriptors are made up: 64 random numbers an image, mixed into all numbers of the descriptor, and noise; so near images
are a matter of degree, as real ones are, and not one image against noise. Each query is a database image with more
noise.
All searches read the same file (float16) in this process, one after the other: exact, `--index binary`, and FAISS's
indices. Memory is what an index holds. Times are processor time, which other work on the machine changes little,
without reading, which all of them do, and are given as ratios to the exact search.
"""

import argparse
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import torch

from utils.retrieval import faiss_index, search
from utils.retrieval.binary_codes import codes_of, exact_distances
from utils.retrieval.descriptor_store import DescriptorStore
from utils.retrieval.extraction import EncoderContext, descriptors

from .measuring import record
from .search_memory import Plain, blocks

FACTORS = 64


def made(rng: np.random.Generator, count: int, mixing: np.ndarray, noise: float) -> np.ndarray:
    """n x D normalised descriptors; the noise is relative to what the factors make."""
    rows = rng.standard_normal((count, FACTORS), dtype=np.float32) @ mixing
    rows += noise * rng.standard_normal(rows.shape, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=3072)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--indices", nargs="*", default=["IVF4096,PQ64", "IVF4096,PQ384"])
    parser.add_argument("--parameters", default="nprobe=32", help="of the search in FAISS's indices")
    parser.add_argument("--no_record", action="store_true", help="leave no results.json")
    settings = parser.parse_args()
    folder = settings.folder / "indices"
    count, dim = settings.database, settings.dim
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((FACTORS, dim), dtype=np.float32) / FACTORS**0.5
    store = DescriptorStore(folder, "database", (count, 1, 4, dim // 4), dtype="float16")
    near = np.sort(rng.integers(count, size=settings.queries))
    queries = np.empty((settings.queries, dim), dtype=np.float32)
    for indices in blocks(count):
        rows = made(rng, len(indices), mixing, noise=0.5)
        here = slice(*np.searchsorted(near, (indices[0], indices[-1] + 1)))
        queries[here] = rows[near[here] - indices[0]]
        store.write(indices, rows.reshape(-1, 1, 4, dim // 4))
    queries += 1.5 * rng.standard_normal(queries.shape, dtype=np.float32) / dim**0.5
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    k = 20

    def chunks() -> Iterator[search.Chunk]:
        yield from descriptors(Plain(), store, EncoderContext(16), device=torch.device("cpu"))

    def timed(call):
        started = time.process_time()
        found = call()
        return time.process_time() - started, found

    reading, _ = timed(lambda: sum(len(indices) for indices, _ in chunks()))
    exact_seconds, (_, exact) = timed(lambda: search.nearest(queries, chunks(), k))
    print(f"{count} descriptors of {dim} numbers, {settings.queries} queries; reading {reading:.0f} s", flush=True)
    print("index | bytes an image | build | search | nearest | first 20", flush=True)
    whole = exact_seconds - reading
    figures: dict[str, object] = {
        "database": count,
        "queries": settings.queries,
        "dim": dim,
        "exact": {"seconds": whole, "reading, seconds": reading},
    }
    print(
        f"exact, from disk | 0 | | 1.00 ({whole:.0f} s) | 100 | 100; right {(exact[:, 0] == near).mean():.3f}",
        flush=True,
    )

    def line(name, size, build, seconds, predictions):
        first_k = np.mean([np.isin(right, given).mean() for right, given in zip(exact, predictions, strict=True)])
        nearest = (predictions == exact[:, :1]).any(axis=1).mean()
        shares = f"{100 * nearest:.1f} | {100 * first_k:.1f}"
        print(f"{name} | {size:.0f} | {build / whole:.2f} | {seconds / whole:.2f} | {shares}", flush=True)
        figures[name] = {
            "bytes": size,
            "building": build / whole,
            "searching": seconds / whole,
            "nearest": 100 * float(nearest),
            "first 20": 100 * float(first_k),
        }

    binary = faiss.IndexBinaryFlat(dim)
    build, _ = timed(lambda: [binary.add(codes_of(rows)) for _, rows in chunks()])
    seconds, (_, rows) = timed(lambda: binary.search(codes_of(queries), 1000))
    line("binary, 20 by the signs alone", dim / 8, build - reading, seconds, rows[:, :k])
    for rerank in (100, 1000):
        some = rows[:, :rerank]
        ranking, distances = timed(partial(exact_distances, queries, some, chunks))
        _, predictions = search.first(distances, some, k)
        line(f"binary, --rerank {rerank}", dim / 8, build - reading, seconds + ranking - reading, predictions)
    for factory in settings.indices:
        index = faiss_index.new_index(dim, factory, settings.parameters)

        def fill(index=index, factory=factory):
            step = faiss_index.training_step(count, dim)
            faiss_index.train_index(index, np.concatenate([rows[::step] for _, rows in chunks()]), factory)
            for _, rows in chunks():
                faiss_index.add_to_index(index, rows, factory)

        build, _ = timed(fill)
        seconds, (_, predictions) = timed(partial(index.search, queries, k))
        path = folder / "index"
        faiss.write_index(index, str(path))
        line(
            f"{factory}, {settings.parameters}", path.stat().st_size / count, build - 2 * reading, seconds, predictions
        )
        path.unlink()
        del index
    shutil.rmtree(folder)
    if not settings.no_record:
        record("indices", figures, torch.device("cpu"))


if __name__ == "__main__":
    main()
