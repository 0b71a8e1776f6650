"""When to accept a match: precision and recall of the FIRST match over the accepted distance.

A query's first match is accepted if its distance is at most a threshold. As usual for single-best-match (Schubert et
al., Visual Place Recognition: A Tutorial, 2023):

- precision: the share of accepted first matches that are correct. An accepted query without a correct database image (a
  positive) is a false alarm.
- recall: correct accepted first matches, over the queries that HAVE a positive. It ends at their R@1.

Equal distances are all accepted, or none. Distances count to the six digits in `predictions.csv`: further digits are
fp32 rounding, and a threshold copied from there means the same here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRECISIONS = (100.0, 99.0)  # in percent, at which recall is reported
CURVE_POINTS = 21  # points of a curve in results.json, at most


def written(distance: float) -> str:
    """A distance as in `predictions.csv`."""
    return f"{distance:.6g}"


def as_written(distances: NDArray[Any]) -> NDArray[np.float64]:
    """Distances rounded to the digits of `written`, in the same shape."""
    return np.array([float(written(value)) for value in distances.ravel()], dtype=np.float64).reshape(distances.shape)


def accepted(distances: NDArray[Any], threshold: float) -> NDArray[np.bool_]:
    """Which distances are accepted, in the same shape."""
    return np.asarray(as_written(distances) <= threshold)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How many first matches are accepted, and how many of them are correct, as the threshold grows."""

    thresholds: NDArray[np.float64]  # the T distances that occur, ascending; each accepts its own matches too
    accepted: NDArray[np.int64]  # first matches, T
    right: NDArray[np.int64]  # correct ones among them, T
    positives: int  # queries with a positive

    @property
    def precision(self) -> NDArray[np.float64]:
        """In percent, T."""
        return np.asarray(100.0 * self.right / self.accepted)

    @property
    def recall(self) -> NDArray[np.float64]:
        """In percent of the queries with a positive, T; NaN if there are none."""
        return np.asarray(100.0 * self.right / (self.positives or np.nan))

    def at_precision(self, percent: float) -> int | None:
        """Row of the largest threshold with this precision, so with the best recall; None if there is none."""
        enough = np.flatnonzero(self.precision >= percent - 1e-9)
        return int(enough[-1]) if len(enough) else None

    def at(self, threshold: float) -> int | None:
        """Row at which everything up to a threshold is accepted; None if that is nothing."""
        below = int(np.searchsorted(self.thresholds, threshold, side="right"))
        return below - 1 if below else None

    def point(self, row: int | None) -> dict[str, Any]:
        """One threshold with its precision and recall; None means that nothing is accepted."""
        if row is None:
            return {"threshold": None, "accepted": 0, "precision": None, "recall": 0.0 if self.positives else None}
        return {
            "threshold": float(self.thresholds[row]),
            "accepted": int(self.accepted[row]),
            "precision": float(self.precision[row]),
            "recall": float(self.recall[row]) if self.positives else None,
        }


@dataclass(frozen=True, kw_only=True)
class FirstMatches:
    """The first match of each of the M queries that count."""

    distances: NDArray[np.float64]  # as written; infinite if an index found nothing, which is never accepted
    correct: NDArray[np.bool_]
    has_positive: NDArray[np.bool_]
    left_out: int = 0  # queries that do not count, since it is unknown whether their first match is correct

    @cached_property
    def curve(self) -> Curve:
        """Precision and recall over the accepted distance."""
        finite = np.isfinite(self.distances)
        order = np.argsort(self.distances[finite], kind="stable")
        thresholds, right = self.distances[finite][order], np.cumsum(self.correct[finite][order], dtype=np.int64)
        last = np.flatnonzero(np.append(thresholds[1:] != thresholds[:-1], [True] * bool(len(thresholds))))
        positives = int(self.has_positive.sum())
        return Curve(thresholds=thresholds[last], accepted=last + 1, right=right[last], positives=positives)

    @property
    def average_precision(self) -> float:
        """scikit-learn's average precision in percent: how well distances rank correct matches before wrong ones."""
        finite = np.isfinite(self.distances)
        if not self.correct[finite].any():
            return 0.0
        from sklearn.metrics import average_precision_score  # takes nearly a second to import

        return 100.0 * float(average_precision_score(self.correct[finite], -self.distances[finite]))

    def summary(self) -> dict[str, Any]:
        """The entry in `results.json`: percentages, and thresholds as squared distances."""
        curve = self.curve
        rows = np.linspace(0, len(curve.thresholds) - 1, CURVE_POINTS).round().astype(int)
        points = [curve.point(row) for row in sorted({*rows.tolist()}) if len(curve.thresholds)]
        return {
            "queries": len(self.distances),
            "queries_with_positives": curve.positives,
            "queries_left_out": self.left_out,
            "distance": {
                "recall_at_precision": {f"{p:g}": curve.point(curve.at_precision(p)) for p in PRECISIONS},
                "average_precision": self.average_precision,
                "curve": {key: [point[key] for point in points] for key in curve.point(None)},
            },
        }


def first_matches(
    distances: NDArray[np.float32],
    predictions: NDArray[np.int64],
    *,
    correct: NDArray[np.bool_],
    has_positive: NDArray[np.bool_],
    judged: NDArray[np.bool_],
) -> FirstMatches:
    """Takes from a search the facts by which first matches are accepted, from arrays of Q.

    Only `judged` queries count, of which it is known whether the first match is correct; -1 predicts nothing.
    """
    there = predictions >= 0
    return FirstMatches(
        distances=np.where(there, as_written(distances), np.inf)[judged],
        correct=(correct & there)[judged],
        has_positive=has_positive[judged],
        left_out=int((~judged).sum()),
    )


def pooled(orders: Sequence[FirstMatches]) -> FirstMatches:
    """The first matches of several orders of a context together: one threshold must serve any order."""
    columns = ("distances", "correct", "has_positive")
    joined = {name: np.concatenate([getattr(order, name) for order in orders]) for name in columns}
    return FirstMatches(**joined, left_out=sum(order.left_out for order in orders))


def in_words(summary: dict[str, Any]) -> str:
    """The result of `FirstMatches.summary` in words, for the log."""
    if not summary["queries_with_positives"]:
        return "no query that counts has a correct database photo"
    by_distance = summary["distance"]
    parts = [
        f"recall {point['recall']:.1f} at {percent}% precision "
        + ("(never)" if point["threshold"] is None else f"(squared distance up to {written(point['threshold'])})")
        for percent, point in by_distance["recall_at_precision"].items()
    ]
    left_out = f"; {summary['queries_left_out']} queries left out, not judged" * bool(summary["queries_left_out"])
    return f"{', '.join(parts)}, average precision {by_distance['average_precision']:.1f}{left_out}"
