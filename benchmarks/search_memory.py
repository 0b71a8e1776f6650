"""Search in a made database on disk: memory and time of the exact one, and what approximate ones find of it.

    python -m benchmarks.search_memory --database 1000000 --queries 1000 --dim 3072 --folder /tmp
    python -m benchmarks.search_memory --dim 512 --indices binary IVF4096,PQ64 IVF4096,PQ384

Descriptors are made up: 64 random numbers an image, mixed into all numbers of the descriptor, and noise; so near images
are a matter of degree, as real ones are, and not one image against noise. Each query is a database image with more
noise. All searches read the same file (float16), the exact one as eval.py does. It is compared with brute force on some
queries, and its time with FAISS's own flat search of a tenth of the database in memory.

Of an approximate search, memory is what the index holds. Times are processor time, which other work on the machine
changes little, without reading, which all of them do, and are given as ratios to the exact search.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks.measuring import PeakMemory, parser_of, record, settings_of, unit
from utils.retrieval import search
from utils.retrieval.descriptor_store import DescriptorStore
from utils.retrieval.extraction import EncoderContext, descriptors
from utils.retrieval.indices import codes_of, exact_distances

FACTORS, K = 64, 20


class Plain(torch.nn.Module):
    """A model without an encoder: descriptors are the normalised vectors."""

    def describe(self, vectors: torch.Tensor, group: int | None = None) -> torch.Tensor:
        return torch.nn.functional.normalize(vectors.flatten(1), dim=1)


def made(store: DescriptorStore, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Writes a database; returns queries and the images that they are made from."""
    count, dim = len(store), store.shape[2] * store.shape[3]
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((FACTORS, dim), dtype=np.float32) / FACTORS**0.5
    near = np.sort(rng.integers(count, size=queries))
    chosen = np.empty((queries, dim), dtype=np.float32)
    for start in range(0, count, 8192):
        indices = np.arange(start, min(count, start + 8192))
        rows = rng.standard_normal((len(indices), FACTORS), dtype=np.float32) @ mixing
        rows = unit(rows + 0.5 * rng.standard_normal(rows.shape, dtype=np.float32))
        here = slice(*np.searchsorted(near, (start, start + len(indices))))
        chosen[here] = rows[near[here] - start]
        store.write(indices, rows.reshape(-1, *store.shape[1:]))
    return unit(chosen + 1.5 * rng.standard_normal(chosen.shape, dtype=np.float32) / dim**0.5), near


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, seconds of processor time, and the result."""
    started = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - started[0], time.process_time() - started[1], result


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "database", "queries", "dim", "folder")
    parser.add_argument("--indices", nargs="*", default=[], help="binary, or FAISS's names")
    parser.add_argument("--parameters", default="nprobe=32", help="of the search in FAISS's indices")
    settings = settings_of(parser, argv)
    folder, count, dim = settings.folder / "search_memory", settings.database, settings.dim
    store = DescriptorStore(folder, "database", (count, 1, 4, dim // 4), dtype="float16")
    queries, near = made(store, settings.queries)
    size = store.path.stat().st_size / 1e9
    print(f"written: {size:.2f} GB", flush=True)

    def chunks() -> Iterator[search.Chunk]:
        yield from descriptors(Plain(), store, EncoderContext(16), device=torch.device("cpu"))

    with PeakMemory() as memory:
        seconds, exact_time, (_, exact) = timed(lambda: search.nearest(queries, chunks(), K))
    print(f"peak RssAnon {memory.anonymous:.2f} GB, VmRSS {memory.resident:.2f} GB, {seconds:.0f} s", flush=True)
    print(f"nearest is the image the query was made from: {100 * (exact[:, 0] == near).mean():.1f}%")
    sample = np.arange(0, settings.queries, max(1, settings.queries // 20))
    scores = np.concatenate([queries[sample] @ rows.T for _, rows in chunks()], axis=1)
    same = (np.argsort(-scores, axis=1, kind="stable")[:, :K] == exact[sample]).mean()
    print(f"equal to brute force on {len(sample)} queries: {100 * same:.2f}% of their first {K}", flush=True)
    flat = faiss.IndexFlatL2(dim)
    flat.add(store.read(np.arange(count // 10)).reshape(-1, dim))
    in_memory, _, _ = timed(partial(flat.search, queries, K))
    print(f"in memory, a tenth of it: {in_memory:.1f} s; ratio {seconds / in_memory:.1f}")
    figures: dict[str, object] = {
        "on disk, GB": size,
        "anonymous memory, GB": memory.anonymous,
        "resident memory, GB": memory.resident,
        "seconds": seconds,
        "ratio to FAISS's flat search of a tenth": seconds / in_memory,
    }

    def line(name: str, size: float, build: float, search_time: float, predictions: np.ndarray) -> None:
        first_k = np.mean([np.isin(right, row).mean() for right, row in zip(exact, predictions, strict=True)])
        nearest = (predictions == exact[:, :1]).any(axis=1).mean()
        figures[name] = {
            "bytes": size,
            "building": build / (exact_time - reading),
            "searching": search_time / (exact_time - reading),
            "nearest": 100 * float(nearest),
            "first 20": 100 * float(first_k),
        }
        print(f"{name} | {' | '.join(f'{value:.4g}' for value in figures[name].values())}", flush=True)

    if settings.indices:
        _, reading, _ = timed(lambda: [len(rows) for _, rows in chunks()])
        print("index | bytes an image | build | search | % nearest | % of the first 20", flush=True)
    for name in settings.indices:
        if name == "binary":
            index = faiss.IndexBinaryFlat(dim)
            _, filling, _ = timed(lambda index=index: [index.add(codes_of(rows)) for _, rows in chunks()])
            _, search_time, (_, rows) = timed(lambda index=index: index.search(codes_of(queries), 1000))
            line("binary, 20 by the signs alone", dim / 8, filling - reading, search_time, rows[:, :K])
            for rerank in (100, 1000):
                _, ranking, distances = timed(partial(exact_distances, queries, rows[:, :rerank], chunks))
                _, predictions = search.first(distances, rows[:, :rerank], K)
                search_and_rank = search_time + ranking - reading
                line(f"binary, --rerank {rerank}", dim / 8, filling - reading, search_and_rank, predictions)
            continue
        index = faiss.index_factory(dim, name)
        faiss.ParameterSpace().set_index_parameters(index, settings.parameters)
        some = store.read(np.arange(0, count, -(-count // 2**18))).reshape(-1, dim)
        _, training, _ = timed(partial(index.train, some))
        _, filling, _ = timed(lambda index=index: [index.add(rows) for _, rows in chunks()])
        _, search_time, (_, predictions) = timed(partial(index.search, queries, K))
        held = len(faiss.serialize_index(index)) / count
        line(f"{name}, {settings.parameters}", held, training + filling - reading, search_time, predictions)
    shutil.rmtree(folder)
    record("search_memory", figures, settings)


if __name__ == "__main__":
    main()
