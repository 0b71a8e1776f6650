"""What a map adds to the model's time when it is asked with one photo.

    python -m benchmarks.place_map --photos 10000 --dim 3072

Descriptors are made up. Time is that of `PlaceMap.locate` with a model that takes none, beside FAISS's exact search,
the median of both in turns.
"""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import faiss
import numpy as np

from benchmarks.measuring import medians, parser_of, record, settings_of, unit
from utils.retrieval.place_map import PlaceMap, write_map
from utils.retrieval.search import Chunk

MODEL = {"backbone": "dino", "clusters": 4, "ghost_clusters": 1, "crossimage_encoder": False}
PREPARED = {"resize": (322, 322), "antialias": True, "upright": True, "precision": "fp32"}
FACTS = {"model": MODEL, "checkpoint": "", "weights": "", **PREPARED, "geographic": False, "accept": None}


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "dim")
    parser.add_argument("--photos", type=int, default=10_000, help="of the map")
    parser.add_argument("--queries", type=int, default=200)
    settings = settings_of(parser, argv)
    faiss.omp_set_num_threads(1)  # a map is searched on one core
    photo = np.zeros((480, 640, 3), dtype=np.uint8)
    paths = [f"/photos/{index}.jpg" for index in range(settings.photos)]

    def chunks() -> Iterator[Chunk]:
        made = np.random.default_rng(1)
        for indices in np.array_split(np.arange(settings.photos), -(-settings.photos // 1000)):
            yield indices, unit(made.standard_normal((len(indices), settings.dim), dtype=np.float32))

    queries = unit(np.random.default_rng(0).standard_normal((settings.queries, settings.dim), dtype=np.float32))
    figures: dict[str, object] = {}
    for dtype in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "map.npz"
            write_map(path, chunks(), paths=paths, positions=None, dtype=dtype, **FACTS)
            city = PlaceMap(path)
            city.load()
        floats = np.concatenate([rows.astype(dtype).astype(np.float32) for _, rows in chunks()])
        _, nearest = faiss.knn(queries, floats, 1)
        city.describe = partial(lambda asked, _: next(asked), cycle(queries))
        same = 100 * np.mean([city.locate(photo).path == city.paths[row] for row in nearest[:, 0]])
        exact = partial(faiss.knn, queries[:1], floats, 1)
        seconds = medians({"map": partial(city.locate, photo), "exact": exact}, rounds=len(queries))
        ratio = seconds["exact"] / seconds["map"]
        figures[dtype] = {"ms a photo": 1e3 * seconds["map"], "times as fast as exact search": ratio}
        figures[dtype] |= {"same photo": float(same)}
        print(f"{dtype}: {figures[dtype]}")
    record("place_map", figures, settings)


if __name__ == "__main__":
    main()
