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
class FirstMatches:
    """The first match of each query that counts.

    Attributes:
        distances: as written, M; infinite if an index found nothing, which is never accepted.
        correct: whether it is correct, M.
        findable: whether the query has a positive, M.
        ratios: ratios of its distance to that of the first match from another place, M; None if unknown.
        no_ratio: why they are unknown.
        bounded: queries with no match from another place; the last match is used instead, so the true ratio is at most
            theirs.
        left_out: queries that do not count, since it is unknown whether their first match is correct.
    """

    distances: NDArray[np.float64]
    correct: NDArray[np.bool_]
    findable: NDArray[np.bool_]
    ratios: NDArray[np.float64] | None = None
    no_ratio: str = ""
    bounded: int = 0
    left_out: int = 0


def first_matches(
    distances: NDArray[np.float32],
    predictions: NDArray[np.int64],
    *,
    correct: NDArray[np.bool_],
    findable: NDArray[np.bool_],
    judged: NDArray[np.bool_],
    elsewhere: NDArray[np.bool_] | None,
    no_ratio: str = "",
) -> FirstMatches:
    """Takes from a search the facts by which first matches are accepted.

    Args:
        distances: squared descriptor distances, Q x k, best first.
        predictions: database indices, Q x k; -1 is none.
        correct: whether the first match is correct, Q.
        findable: which queries have a positive, Q.
        judged: for which queries it is known whether the first match is correct, Q; the others do not count.
        elsewhere: which matches are from another place than the first, Q x k; None if unknown.
        no_ratio: why it is unknown.
    """
    counts = judged.astype(bool)
    distances, predictions = distances[counts], predictions[counts]
    found = predictions[:, 0] >= 0
    first = np.where(found, as_written(distances[:, 0]), np.inf)
    ratios, bounded = None, 0
    if elsewhere is not None:
        other = elsewhere[counts] & (predictions >= 0)
        has_other = other.any(axis=1)
        last = np.maximum((predictions >= 0).sum(axis=1) - 1, 0)
        rival = np.where(has_other, other.argmax(axis=1), last)
        beside = as_written(np.take_along_axis(distances, rival[:, None], 1)[:, 0])
        bounded = int((found & ~has_other).sum())
        if (found & has_other).any():
            ratios = np.ones(len(first))  # if two places equal the query, neither is reliable
            np.divide(first, beside, out=ratios, where=beside > 0)
            ratios = np.where(found, as_written(ratios), np.inf)
        else:
            no_ratio = f"no match among {predictions.shape[1]} is from another place than the first"
    return FirstMatches(
        distances=first,
        correct=correct[counts] & found,
        findable=findable[counts],
        ratios=ratios,
        no_ratio=no_ratio if ratios is None else "",
        bounded=bounded if ratios is not None else 0,
        left_out=int((~counts).sum()),
    )


def pooled(orders: Sequence[FirstMatches]) -> FirstMatches:
    """The first matches of several orders of a context together: one threshold must serve any order."""
    ratios = [order.ratios for order in orders if order.ratios is not None]
    return FirstMatches(
        distances=np.concatenate([order.distances for order in orders]),
        correct=np.concatenate([order.correct for order in orders]),
        findable=np.concatenate([order.findable for order in orders]),
        ratios=np.concatenate(ratios) if len(ratios) == len(orders) else None,
        no_ratio=next((order.no_ratio for order in orders if order.no_ratio), ""),
        bounded=sum(order.bounded for order in orders),
        left_out=sum(order.left_out for order in orders),
    )


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How many first matches are accepted, and how many of them are correct, as the threshold grows.

    Attributes:
        thresholds: the T values that occur, ascending; a match is accepted up to and including its threshold.
        accepted: accepted first matches, T.
        right: correct ones among them, T.
        positives: number of queries with a positive.
    """

    thresholds: NDArray[np.float64]
    accepted: NDArray[np.int64]
    right: NDArray[np.int64]
    positives: int

    @property
    def precision(self) -> NDArray[np.float64]:
        """Precision in percent, T."""
        return np.asarray(100.0 * self.right / self.accepted)

    @property
    def recall(self) -> NDArray[np.float64]:
        """Recall in percent of the queries with a positive, T; NaN if there are none."""
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
            recall = 0.0 if self.positives else None
            return {"threshold": None, "accepted": 0, "precision": None, "recall": recall}
        return {
            "threshold": float(self.thresholds[row]),
            "accepted": int(self.accepted[row]),
            "precision": float(self.precision[row]),
            "recall": float(self.recall[row]) if self.positives else None,
        }


def curve_of(values: NDArray[np.float64], correct: NDArray[np.bool_], positives: int) -> Curve:
    """The curve of first matches accepted by a value; smaller is better.

    Args:
        values: M distances or ratios; infinite ones are never accepted.
        correct: whether each match is correct, M.
        positives: number of queries with a positive.
    """
    finite = np.isfinite(values)
    order = np.argsort(values[finite], kind="stable")
    thresholds, right = values[finite][order], np.cumsum(correct[finite][order], dtype=np.int64)
    last = np.flatnonzero(np.append(thresholds[1:] != thresholds[:-1], [True] * bool(len(thresholds))))
    return Curve(thresholds=thresholds[last], accepted=last + 1, right=right[last], positives=positives)


def average_precision(values: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """scikit-learn's average precision in percent: how well values rank correct first matches before wrong ones.

    Args:
        values: M, smaller is better; infinite ones are never accepted and do not count.
        correct: M.
    """
    finite = np.isfinite(values)
    if not correct[finite].any():
        return 0.0
    from sklearn.metrics import average_precision_score  # takes nearly a second to import

    return 100.0 * float(average_precision_score(correct[finite], -values[finite]))


def distance_curve(matches: FirstMatches) -> Curve:
    """The curve of first matches accepted by distance."""
    return curve_of(matches.distances, matches.correct, int(matches.findable.sum()))


def ratio_curve(matches: FirstMatches) -> Curve | None:
    """The curve of first matches accepted by ratio; None without ratios."""
    if matches.ratios is None:
        return None
    return curve_of(matches.ratios, matches.correct, int(matches.findable.sum()))


def summary(matches: FirstMatches) -> dict[str, Any]:
    """The entry in `results.json`: percentages, and thresholds as squared distances and ratios of these."""

    def of(curve: Curve, values: NDArray[np.float64]) -> dict[str, Any]:
        rows = np.unique(np.linspace(0, len(curve.thresholds) - 1, CURVE_POINTS).round().astype(int))
        points = [curve.point(int(row)) for row in rows if len(curve.thresholds)]
        return {
            "recall_at_precision": {f"{p:g}": curve.point(curve.at_precision(p)) for p in PRECISIONS},
            "average_precision": average_precision(values, matches.correct),
            "curve": {key: [point[key] for point in points] for key in curve.point(None)},
        }

    found: dict[str, Any] = {
        "queries": len(matches.distances),
        "queries_with_positives": int(matches.findable.sum()),
        "queries_left_out": matches.left_out,
        "distance": of(distance_curve(matches), matches.distances),
    }
    by_ratio = ratio_curve(matches)
    if by_ratio is None or matches.ratios is None:
        return found | {"ratio": None, "no_ratio": matches.no_ratio}
    return found | {"ratio": {"queries_bounded": matches.bounded, **of(by_ratio, matches.ratios)}}


def in_words(found: dict[str, Any], k: int, distance: float) -> str:
    """The result of `summary` in words, for the log.

    Args:
        found: result of `summary`.
        k: matches per query.
        distance: metres from which on a match is from another place.
    """
    if not found["queries_with_positives"]:
        return "no query that counts has a correct database photo, so there is no recall"

    def of(criterion: dict[str, Any]) -> str:
        points = criterion["recall_at_precision"].items()
        limits = [
            "never" if point["threshold"] is None else f"up to {written(point['threshold'])}" for _, point in points
        ]
        parts = [f"{point['recall']:.1f} at {p}% ({limit})" for (p, point), limit in zip(points, limits, strict=True)]
        return f"recall {', '.join(parts)} precision, average precision {criterion['average_precision']:.1f}"

    text = f"by its squared distance {of(found['distance'])}"
    if found["ratio"] is None:
        text += f"; no ratio to another place, since {found['no_ratio']}"
    else:
        text += f"; by its ratio to the first match more than {distance:g} m from it {of(found['ratio'])}"
        if bounded := found["ratio"]["queries_bounded"]:
            text += (
                f"; for {bounded} of {found['queries']} queries none of {k} matches is that far away: the last one is "
                "used, and the true ratio is at most that"
            )
    if found["queries_left_out"]:
        text += f"; {found['queries_left_out']} queries left out, whose first match may be correct or wrong"
    return text
