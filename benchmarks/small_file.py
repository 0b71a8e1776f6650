"""An ONNX file of float weights beside one of 8-bit weights (`model.export --int8`): size, time, recall.

    python -m benchmarks.small_file                            # random weights of ViT-B/14: size, time, cosine
    python -m benchmarks.small_file --resume=best_model.pth --datasets data/demo/toy_city /path/to/corridor

ONNX Runtime is asked with one photo at a time, prepared as for plain folders; for the time, the two files take turns.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from benchmarks.measuring import medians, parser_of, processor, record, settings_of
from datasets.evaluation.tree import DatabaseQueries
from datasets.photos.transforms import evaluation_transform, prepare
from model import build_model, export
from utils.retrieval.search import CPU, correct_among, nearest, recall_of


def described(session: onnxruntime.InferenceSession, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Descriptors of images N x 3 x H x W, each by itself: N x D."""
    return np.concatenate([session.run(None, {"images": image[None]})[0] for image in images])


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--resume", type=Path, help="checkpoint; by default random weights of ViT-B/14")
    parser.add_argument("--datasets", type=Path, nargs="*", default=[], help="folders of datasets, for the recalls")
    settings = settings_of(parser, argv)
    sessions, figures = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = settings.resume or Path(folder) / "random.pth"
        if settings.resume is None:
            torch.save(build_model(backbone="dino", clusters=4, ghost_clusters=1).state_dict(), checkpoint)
        for name, flags in (("float", []), ("int8", ["--int8"])):
            file = Path(folder) / f"{name}.onnx"
            export.main([f"--resume={checkpoint}", f"--output={file}", *flags])
            sessions[name], figures[name] = onnxruntime.InferenceSession(file), {"MB": file.stat().st_size / 1e6}
    size = sessions["float"].get_inputs()[0].shape[2:]
    image = np.random.default_rng(0).standard_normal((1, 3, *size), dtype=np.float32)
    seconds = medians({name: partial(described, session, image) for name, session in sessions.items()}, rounds=7)
    a, b = (described(session, image)[0] for session in sessions.values())
    ratio = seconds["float"] / seconds["int8"]
    figures |= {"size": size, "cosine": float(a @ b), "seconds": seconds, "times as fast": ratio}
    transform = evaluation_transform(size, antialias=True)
    for place in settings.datasets:
        dataset = DatabaseQueries.from_folder(place.parent, place.name, "test")
        sides = dataset.database_paths, dataset.queries_paths
        photos = [np.stack([prepare(path, transform).numpy() for path in paths]) for paths in sides]
        for name, session in sessions.items():
            database, queries = (described(session, images) for images in photos)
            _, predictions = nearest(queries, [(np.arange(len(database)), database)], 20, CPU)
            recalls = recall_of(correct_among(predictions, dataset.positives(25.0)), (1, 5, 10, 20))
            figures[name][place.name] = recalls
    print(processor(), figures)
    record("small_file", figures, settings)


if __name__ == "__main__":
    main()
