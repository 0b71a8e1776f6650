"""The one evaluation: extract -> search -> judge -> record. train.py validates with it, eval.py evaluates with it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datasets.evaluation.query_sets import QuerySet
from datasets.evaluation.tree import DatabaseQueries
from datasets.photos.batches import image_batches
from datasets.photos.corruptions import corrupt
from datasets.photos.transforms import CROPS, evaluation_transform
from utils.outputs.tables import format_recalls
from utils.retrieval import first_matches
from utils.retrieval.comparison import wilson_interval
from utils.retrieval.contexts import DRAWN_CONTEXTS, ORDERS, Search, Stores
from utils.retrieval.descriptor_store import DescriptorStore
from utils.retrieval.extraction import extract
from utils.retrieval.first_matches import FirstMatches
from utils.retrieval.search import correct_among, recall_of
from utils.system import distributed
from utils.system.device import extraction_batch_size as usual_batch_size
from utils.system.device import reading_workers

logger = logging.getLogger(__name__)

Images = Mapping[str, tuple[Sequence[str], str, str]]  # paths, test method and corruption ("" is none), by name


def evaluate_split(
    model: Any,
    split: DatabaseQueries,
    *,
    protocol: Any,
    positive_distance: float,
    recall_values: Sequence[int],
    device: torch.device,
    folder: Path,
    machine: Any,
    precision: str = "fp32",
    stop: Callable[[], None] = lambda: None,
) -> dict[int, float]:
    """Recall@N of a model in training, with `hard_resize` and in file order: `{N: percent of the queries}`.

    With several processes, each extracts its share, and all get the result. The descriptors are temporary: training
    resumed from its checkpoint extracts them again.

    Args:
        model: a `model.SuperVLADNet`, on its device.
        protocol, machine: the groups of options; of the first, `resize`, `antialias` and `infer_batch_size`.
        positive_distance: a database image within this many metres of a query is correct.
        folder: temporary folder for descriptors.
        precision: precision of the backbone instead of the machine's.
        stop: called regularly; it may raise to stop the evaluation.
    """
    sides = {"database": split.database_paths, "queries": split.queries_paths}
    stores: dict[str, DescriptorStore] = {}
    recalls: dict[int, float] = {}
    try:
        extract_images(
            model,
            {side: (paths, "hard_resize", "") for side, paths in sides.items()},
            stores,
            folder,
            preparation={"resize": protocol.resize, "antialias": protocol.antialias, "upright": False},
            machine=replace(machine, precision=precision),
            device=device,
            stop=stop,
        )
        if distributed.is_main():
            search = Search(model, stores, infer_batch_size=protocol.infer_batch_size, device=device)
            ((_, predictions),) = search.run(max(recall_values))
            recalls = recall_of(correct_among(predictions, split.positives(positive_distance)), recall_values)
    finally:
        if distributed.is_main():
            for store in stores.values():
                store.remove()
    return distributed.broadcast(recalls)


def extract_images(
    model: Any,
    images: Images,
    stores: dict[str, DescriptorStore],
    folder: Path,
    *,
    preparation: Mapping[str, Any],
    machine: Any,
    device: torch.device,
    stop: Callable[[], None],
    dtype: str = "float32",
    weights: str | None = None,
    kept: bool = False,
    title: str = "",
) -> None:
    """Runs the backbone and the layer on images, except on those whose descriptors are there already.

    Args:
        stores: receives a store for each name, at once, so that the caller can remove it after an error too.
        preparation: `resize`, `antialias` and `upright`: how photos become the model's input.
        weights: digest of the model's weights, from which a later run knows what it can reuse; None if none will.
        kept: whether the folder is to be used for long, so that copies of the photos must be known.
        title: name of the dataset, for the progress bar.
        others: as in `evaluate_split`.
    """
    batch_size = machine.extraction_batch_size or usual_batch_size(device)
    for name, (paths, test_method, corruption) in images.items():
        fingerprint = None
        if weights is not None:
            fingerprint = {"weights": weights, "test_method": test_method, "precision": machine.precision}
            fingerprint |= {**preparation, "resize": list(preparation["resize"])}
            fingerprint |= {"corruption": corruption, "seed": machine.seed} if corruption else {}
        crops = CROPS[test_method]
        stores[name] = DescriptorStore(
            folder,
            name,
            (len(paths), crops, *model.vectors_shape),
            dtype=dtype,
            fingerprint=fingerprint,
            photos=paths if fingerprint else (),
            kept=kept,
        )
        transform = evaluation_transform(
            preparation["resize"], preparation["antialias"], test_method, patch_size=model.backbone.size.patch_size
        )
        read_images = partial(
            image_batches,
            transform=transform,
            # single_query keeps each photo's shape; each crop counts as an image.
            batch_size=1 if test_method == "single_query" else max(1, batch_size // crops),
            num_workers=reading_workers(device, machine.num_workers),
            device=device,
            progress=f"{title} {name}".lstrip(),
            upright=preparation["upright"],
            change=partial(corrupt, corruption=corruption, seed=machine.seed) if corruption else None,
            stop=stop,
        )
        extract(model, paths, stores[name], read_images, machine.precision)


@dataclass(kw_only=True)
class Evaluation:
    """The results of one query set, collected one encoder context after another.

    What was found is that of the first search, in the first context.
    """

    query_set: QuerySet
    folder: Path  # where its results go
    results: dict[str, Any]  # what `results.json` says
    recalls: dict[str, dict[int, float]] = field(default_factory=dict)  # percent by context; the mean of its orders
    curves: dict[str, list[float]] = field(default_factory=dict)  # the same, for N from 1 to the depth of the search
    first_matches: dict[str, FirstMatches] = field(default_factory=dict)  # by context
    first_order: FirstMatches | None = None  # those of the first search; None without labels
    search: Search
    distances: NDArray[np.float32]  # of descriptors, squared, Q x k
    predictions: NDArray[np.int64]  # database indices, Q x k, best first; -1 is none
    correct: NDArray[np.bool_] | None  # which of them are correct; None without labels


def evaluate(
    model: Any,
    query_sets: Sequence[QuerySet],
    stores: Stores,
    *,
    contexts: Sequence[str],
    protocol: Any,
    search: Any,
    depth: int,
    seed: int,
    device: torch.device,
    folder: Path,
    facts: Mapping[str, Any],
    record: Callable[[Path, dict[str, Any]], None],
) -> list[Evaluation]:
    """Searches the query sets of a dataset in each encoder context, and judges and records what is found.

    Each set's recall is logged, and its results are recorded, before the next context is searched.

    Args:
        protocol, search: the groups of options.
        depth: database images to find for each query.
        seed: of the random orders, of a PCA and of corruptions.
        folder: the run's folder; results of several sets go below it.
        facts: what the results say of the model and the run.
        record: writes results into a folder.
    """
    evaluations: list[Evaluation] = []
    for context in contexts:
        drawn = context in DRAWN_CONTEXTS and query_sets[0].dataset.labelled
        searches = [
            Search(
                model,
                stores,
                test_method=query_sets[0].test_method,
                context=context,
                infer_batch_size=protocol.infer_batch_size,
                seed=(seed, order),
                pca_dim=protocol.pca_dim,
                pca_whiten=protocol.pca_whiten,
                device=device,
            )
            for order in range(ORDERS if drawn else 1)
        ]
        matches_by_order = [each.run(depth, search, majority_weight=protocol.majority_weight) for each in searches]
        for number, query_set in enumerate(query_sets):
            matches = [matches_of_sets[number] for matches_of_sets in matches_by_order]
            correct = [
                None if query_set.positives is None else correct_among(predictions, query_set.positives)
                for _, predictions in matches
            ]
            if context == contexts[0]:
                evaluations.append(
                    Evaluation(
                        query_set=query_set,
                        folder=folder / query_set.subfolder,
                        results={**_facts_of(query_set, seed, encoder=model.encoder is not None), **facts},
                        search=searches[0],
                        distances=matches[0][0],
                        predictions=matches[0][1],
                        correct=correct[0],
                    )
                )
            evaluation = evaluations[number]
            lines = [_judge(evaluation, context, matches, correct, protocol.recall_values)]
            if search.index is not None:
                agreements = [each.agreements[number] for each in searches]
                evaluation.results.setdefault("index_agreement", agreements[0])
                if context in evaluation.curves:
                    evaluation.results["contexts"][context]["index_agreements"] = agreements
            if context == contexts[0]:
                lines = [*_lines_on_first_matches(evaluation, search.accept), *lines]
                logger.info("log and results.json in %s", evaluation.folder)
            for line in lines:
                logger.info("%s", line)
            record(evaluation.folder, evaluation.results)
    return evaluations


def _facts_of(query_set: QuerySet, seed: int, *, encoder: bool) -> dict[str, Any]:
    """What `results.json` says about a query set besides what was found."""
    results: dict[str, Any] = {}
    if query_set.has_positive is not None:
        results = {"recalls": {}, "positive_distance": query_set.positive_distance}
        results["queries_without_positives"] = int((~query_set.has_positive).sum())
        if encoder:
            results["alignment"] = query_set.alignment
    if query_set.corruption:
        results["corruption"] = {"name": query_set.corruption, "seed": seed}
    return {**results, "dataset": query_set.facts, "test_method": query_set.test_method}


def _judge(
    evaluation: Evaluation,
    context: str,
    matches: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]],
    correct: Sequence[NDArray[np.bool_] | None],
    recall_values: Sequence[int],
) -> str:
    """Adds recall and first matches of a context, of one or several orders, to the evaluation; the line for the log."""
    query_set, dataset = evaluation.query_set, evaluation.query_set.dataset
    if query_set.has_positive is None:
        return f"Searched {dataset}, without labels: predictions.csv in {evaluation.folder}"
    first, curves = [], []
    for (distances, predictions), mask in zip(matches, correct, strict=True):
        assert mask is not None
        curves.append(list(recall_of(mask[dataset.judged_queries], range(1, mask.shape[1] + 1)).values()))
        nothing = predictions[:, 0] < 0
        first.append(
            first_matches.first_matches(
                distances[:, 0],
                predictions[:, 0],
                correct=mask[:, 0],
                has_positive=query_set.has_positive,
                judged=dataset.judged(predictions[:, :1])[:, 0] | (dataset.judged_queries & nothing),
            )
        )
    curve = evaluation.curves[context] = [float(np.mean(column)) for column in zip(*curves, strict=True)]
    recalls = evaluation.recalls[context] = {n: curve[min(n, len(curve)) - 1] for n in recall_values}
    pooled = evaluation.first_matches[context] = first_matches.pooled(first)
    evaluation.first_order = evaluation.first_order or first[0]
    counted = int(dataset.judged_queries.sum())
    intervals = {n: (100 * wilson_interval(r * counted / 100, counted)).tolist() for n, r in recalls.items()}
    results: dict[str, Any] = {"recalls": recalls, "intervals": intervals, "orders": len(curves)}
    results["first_match"] = pooled.summary()
    evaluation.results.setdefault("contexts", {})[context] = results
    line = f"Recalls on {dataset}"
    if context != "file_order" or len(evaluation.curves) > 1:
        line += f", {context}" + f" ({len(curves)} orders)" * (len(curves) > 1)
    line += f": {format_recalls(recalls)}"
    if len(curves) > 1:
        deviations = [float(np.std(column)) for column in zip(*curves, strict=True)]
        results["deviations"] = {n: deviations[min(n, len(curve)) - 1] for n in recall_values}
        line += f"; deviations {format_recalls(results['deviations'])}"
    evaluation.results["recalls"] = next(iter(evaluation.recalls.values()))
    return line


def _lines_on_first_matches(evaluation: Evaluation, accept: float | None) -> list[str]:
    """The log's lines on which first matches to believe, and what `accept` accepts, which is added to the results."""
    query_set, lines = evaluation.query_set, []
    if evaluation.first_order is not None:
        summary = evaluation.results["contexts"][evaluation.search.context]["first_match"]
        line = f"first match of {query_set.dataset.name}: {first_matches.in_words(summary)}"
        lines.append(line + "; optimistic, since its queries are also the test split's" * query_set.tested)
    if accept is None:
        return lines
    distances, there = evaluation.distances[:, 0], evaluation.predictions[:, 0] >= 0
    count = int((there & first_matches.accepted(distances, accept)).sum())
    results = evaluation.results["accepted"] = {"distance": accept, "accepted": count, "queries": len(there)}
    line = f"accepted up to a squared distance of {first_matches.written(accept)}"
    line += f": {count} of {len(there)} first matches"
    if evaluation.first_order is not None:
        curve = evaluation.first_order.curve
        point = curve.point(curve.at(accept))
        results |= {"judged": point["accepted"], "precision": point["precision"], "recall": point["recall"]}
        if point["accepted"] < count:
            line += f", {point['accepted']} of them judged, since positions are missing"
        for name in ("precision", "recall"):
            line += f", {name} {'unknown' if point[name] is None else format(point[name], '.1f')}"
    return [*lines, line]
