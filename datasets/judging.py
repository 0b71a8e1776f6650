"""What matches are worth by the labels of a dataset: recall@N, and which first matches may be believed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils import acceptance, search
from utils.retrieval import Search

from .database_queries import DatabaseQueries
from .tasks import Task

logger = logging.getLogger(__name__)


def format_recalls(recalls: dict[int, float]) -> str:
    """`R@1: 27.0, R@5: 42.3, ...`"""
    return ", ".join(f"R@{n}: {recall:.1f}" for n, recall in recalls.items())


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What the search found for one set of queries.

    Attributes:
        search: which it was.
        context: of it.
        distances: squared, of the descriptors, Q x k.
        predictions: database indices, Q x k, best first; -1 is none.
        correct: which of them are right, Q x k; None without labels.
    """

    search: Search
    context: str
    distances: NDArray[np.float32]
    predictions: NDArray[np.int64]
    correct: NDArray[np.bool_] | None


@dataclass(kw_only=True)
class Evaluation:
    """What comes out for one set of queries, one encoder context after the other.

    Attributes:
        task: what was evaluated.
        recall_values: the N.
        accept: the value of --accept; None where a map says it, or nobody.
        results: of all contexts, as in `results.json`.
        recalls: recall@N in percent by context, of several orders the mean.
        curves: likewise, for N from 1 to the depth of the search.
        first_matches: what first matches are accepted by, by context.
        first: what was found in the first search of the first context.
    """

    task: Task
    recall_values: tuple[int, ...]
    accept: str | None
    results: dict[str, Any]
    recalls: dict[str, dict[int, float]] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    first_matches: dict[str, acceptance.FirstMatches] = field(default_factory=dict)
    first: Matches | None = None

    def note(self, context: str, searched: Sequence[Matches]) -> list[str]:
        """Takes what the searches of a context found, one for each order.

        Returns:
            The lines that tell of it.
        """
        task, dataset = self.task, self.task.dataset
        starts = self.first is None
        if self.first is None:
            self.first = searched[0]
        masks = [of_order.correct for of_order in searched if of_order.correct is not None]
        lines = []
        if not masks:
            lines.append(f"Searched {dataset}, without labels: predictions.csv in {task.folder}")
        else:
            k = masks[0].shape[1]
            found = [search.recall_of(correct[dataset.judged_queries], range(1, k + 1)) for correct in masks]
            mean = {n: float(np.mean([recall[n] for recall in found])) for n in found[0]}
            self.curves[context] = list(mean.values())
            recalls = self.recalls[context] = {n: mean[min(n, k)] for n in self.recall_values}
            self.results["recalls"] = self.recalls[self.first.context]
            of_context = self.results.setdefault("contexts", {})[context] = {"recalls": recalls, "orders": len(found)}
            believed = acceptance.pooled([first_matches(task, of_order) for of_order in searched])
            self.first_matches[context] = believed
            summary = of_context["first_match"] = acceptance.summary(believed)
            if starts:
                in_words = acceptance.in_words(summary, k, task.positive_distance)
                lines.append(f"first match of {dataset.name}: {in_words}")
            line = f"Recalls on {dataset}"
            if not starts or context != "file_order":
                line += f", {context}" + (f" ({len(found)} orders)" if len(found) > 1 else "")
            line += f": {format_recalls(recalls)}"
            if len(found) > 1:
                deviation = {n: float(np.std([recall[n] for recall in found])) for n in found[0]}
                spread = of_context["deviations"] = {n: deviation[min(n, k)] for n in self.recall_values}
                line += f"; deviations {format_recalls(spread)}"
            lines.append(line)
        if starts and task.accepted_distance is not None:
            self.results["accepted"], line = what_is_accepted(task, self.first, self.accept)
            lines.insert(-1, line)
        return lines


def first_matches(task: Task, found: Matches) -> acceptance.FirstMatches:
    """What the first matches of a search in a dataset with labels are judged by."""
    assert found.correct is not None and task.findable is not None
    dataset, predictions = task.dataset, found.predictions
    nothing = predictions[:, 0] < 0
    apart = None
    if task.test_method == "maj_voting":
        no_ratio = "votes lower the distances"
    else:
        no_ratio = f"{'--positives_file' if task.positives_file else 'the dataset'} gives no metres"
        apart = dataset.metres_from_first(predictions)
    return acceptance.first_matches(
        found.distances,
        predictions,
        correct=found.correct[:, 0],
        findable=task.findable,
        judged=dataset.judged(predictions[:, :1])[:, 0] | (dataset.judged_queries & nothing),
        elsewhere=None if apart is None else apart > task.positive_distance,
        no_ratio=no_ratio,
    )


def what_is_accepted(task: Task, matches: Matches, accept: str | None) -> tuple[dict[str, Any], str]:
    """What `--accept` comes to on a task: for `results.json`, and in a line."""
    assert task.accepted_distance is not None
    first, distances = matches.predictions[:, 0] >= 0, matches.distances[:, 0]
    count = int((first & acceptance.accepted(distances, task.accepted_distance)).sum())
    asked = f"--accept {accept}"
    if accept is None:
        asked = f"the map's accepted distance, {acceptance.written(task.accepted_distance)}"
    elif task.found_on_val is not None:
        asked += f" ({acceptance.written(task.accepted_distance)})"
    results: dict[str, Any] = {
        "accept": accept,
        "distance": task.accepted_distance,
        "accepted": count,
        "queries": len(first),
    }
    if task.found_on_val is not None:
        results["found_on"] = task.found_on_val
    line = f"{asked}: {count} of {len(first)} first matches are accepted"
    if matches.correct is not None:
        curve = acceptance.distance_curve(first_matches(task, matches))
        point = curve.point(curve.at(task.accepted_distance))
        results |= {"judged": point["accepted"], "precision": point["precision"], "recall": point["recall"]}
        if point["accepted"] < count:
            line += f", {point['accepted']} of them judged, since positions are missing"
        for name in ("precision", "recall"):
            line += f", {name} {'unknown' if point[name] is None else format(point[name], '.1f')}"
    return results, line


def distance_on_val(
    found: acceptance.FirstMatches,
    val: DatabaseQueries,
    context: str,
    *,
    accept: str | None,
    precision: float | None,
    query_keys: Path | None,
) -> dict[str, Any]:
    """The largest distance of the precision that `--accept auto@P` asks for, with what it gives there, as in the log.

    Args:
        found: the first matches on the val split.
        val: the split.
        context: of the encoder.
        accept: the value of --accept.
        precision: that it asks for, in percent.
        query_keys: the file of keys, which are of the test split; None without.

    Raises:
        ValueError: there is none.
    """
    assert precision is not None
    curve = acceptance.distance_curve(found)
    best = curve.at_precision(precision)
    if best is None:
        most = f"but {curve.precision.max():.1f}% at most" if len(curve.precision) else "as no match can be judged"
        raise ValueError(
            f"--accept {accept}: on {val.name} no distance gives {precision:g}% precision, "
            f"{most}; ask for less, or give a distance"
        )
    point = curve.point(best)
    logger.info(
        "--accept %s is %s, the largest squared distance of that precision on %s, %s%s: %d of %d first matches are "
        "accepted, precision %.1f, recall %.1f",
        accept,
        acceptance.written(point["threshold"]),
        val,
        context,
        ", all its queries, since --query_keys are of the test split" if query_keys else "",
        point["accepted"],
        len(found.distances),
        point["precision"],
        point["recall"],
    )
    return {**val.sizes, "context": context, "first_matches": len(found.distances), **point}
