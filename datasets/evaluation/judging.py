"""How good matches are by the labels of a dataset: recall@N, and which first matches to accept."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.retrieval import acceptance, search
from utils.retrieval.contexts import Search

from .database_queries import DatabaseQueries
from .tasks import Task

logger = logging.getLogger(__name__)


def format_recalls(recalls: dict[int, float]) -> str:
    """`R@1: 27.0, R@5: 42.3, ...`"""
    return ", ".join(f"R@{n}: {recall:.1f}" for n, recall in recalls.items())


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What a search found for one query set.

    Attributes:
        search: the search.
        context: its encoder context.
        distances: squared descriptor distances, Q x k.
        predictions: database indices, Q x k, best first; -1 is none.
        correct: which of them are correct, Q x k; None without labels.
    """

    search: Search
    context: str
    distances: NDArray[np.float32]
    predictions: NDArray[np.int64]
    correct: NDArray[np.bool_] | None


@dataclass(kw_only=True)
class Evaluation:
    """The results of one query set, collected one encoder context after another.

    Attributes:
        task: what was evaluated.
        recall_values: values of N.
        accept: the value of --accept; None if it is not given.
        results: results of all contexts, as in `results.json`.
        recalls: recall@N in percent by context; the mean over several orders.
        curves: the same, for N from 1 to the depth of the search.
        first_matches: the facts by which first matches are accepted, by context.
        first: matches of the first search in the first context.
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
        """Adds what the searches of a context found, one search per order.

        Returns:
            The lines for the log.
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
    """The facts by which first matches are accepted and judged; the dataset has labels."""
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
    """What `--accept` gives on a task: for `results.json`, and as a line for the log."""
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
    """The largest distance with the precision of `--accept auto@P`, and what it gives on the val split; logs them.

    Args:
        found: the first matches on the val split.
        val: the split.
        context: the encoder context.
        accept: the value of --accept.
        precision: the precision P in percent.
        query_keys: the file of the test split's query keys, if any.

    Raises:
        ValueError: no distance has that precision.
    """
    assert precision is not None
    curve = acceptance.distance_curve(found)
    best = curve.at_precision(precision)
    if best is None:
        most = f"only up to {curve.precision.max():.1f}%" if len(curve.precision) else "as no match can be judged"
        raise ValueError(
            f"--accept {accept}: on {val.name} no distance gives {precision:g}% precision, "
            f"{most}; use a lower P, or give a distance"
        )
    point = curve.point(best)
    logger.info(
        "--accept %s is %s, the largest squared distance with that precision on %s, %s%s: %d of %d first matches are "
        "accepted, precision %.1f, recall %.1f",
        accept,
        acceptance.written(point["threshold"]),
        val,
        context,
        ", all its queries, since --query_keys applies to the test split" if query_keys else "",
        point["accepted"],
        len(found.distances),
        point["precision"],
        point["recall"],
    )
    return {**val.sizes, "context": context, "first_matches": len(found.distances), **point}
