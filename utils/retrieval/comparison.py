"""Two runs compared query by query, and runs of several seeds: is a difference more than chance?

Recall of one test set is a mean over its queries, so another draw of queries would give another figure. The difference
of two runs on the SAME queries varies far less than either, which is why they are compared query by query.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z95 = 1.959963984540054  # the normal distribution has 95% of its mass within this many deviations
DRAWS = 10_000  # of the bootstrap
DRAWN_TOGETHER = 2**22  # numbers in memory at a time


def wilson_interval(successes: ArrayLike, count: int) -> NDArray[np.float64]:
    """The 95% score interval of a share of `count` queries, from 0 to 1; 2 x the shape of `successes` (Wilson 1927).

    It also holds for few queries and near 0 and 1, but counts queries as independent. A mean over several orders may
    be broken.
    """
    share = np.asarray(successes, dtype=np.float64) / count
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * np.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return np.clip(np.stack([centre - half, centre + half]), 0.0, 1.0)


def bootstrap_interval(differences: NDArray[np.int64], *, block: int = 1, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean difference over redrawn queries.

    Args:
        differences: of each query, in their order: 1 if only B finds it, -1 if only A does, else 0; Q.
        block: number of consecutive queries that are drawn together, at most Q (moving-block bootstrap, Kuensch 1989):
            for sequences, whose neighbours resemble each other.
        seed: seed of the draws.

    Returns:
        Low and high, in percentage points.
    """
    rng, count = np.random.default_rng(seed), len(differences)
    if block == 1:  # only how often each of the three values is drawn matters
        kinds = np.array([(differences == value).mean() for value in (-1, 0, 1)])
        means = rng.multinomial(count, kinds, size=DRAWS) @ np.array([-1, 0, 1]) / count
    else:
        sums = np.concatenate([[0], np.cumsum(differences)])
        lengths = np.full(-(-count // block), block)
        lengths[-1] = count - block * (len(lengths) - 1)  # as many queries as there are
        means = np.concatenate(
            [
                (sums[starts + lengths] - sums[starts]).sum(axis=1) / count
                for draws in np.array_split(np.empty(DRAWS), -(-DRAWS * len(lengths) // DRAWN_TOGETHER))
                for starts in [rng.integers(0, count - block + 1, (len(draws), len(lengths)))]
            ]
        )
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: how likely so uneven a split of the queries is that only one run finds."""
    from scipy.stats import binomtest  # takes a second to import

    return float(binomtest(only_a, max(1, only_a + only_b)).pvalue)  # 1 if there are none


def compare_hits(a: NDArray[np.bool_], b: NDArray[np.bool_], *, block: int = 1) -> dict[str, Any]:
    """Compares whether two runs find each query, Q each.

    Returns:
        Both recalls in percent with their 95% Wilson intervals, their difference in points with its 95% interval, the
        numbers of queries that only one finds, and McNemar's p.
    """
    differences = b.astype(np.int64) - a.astype(np.int64)
    only_a, only_b = int((differences < 0).sum()), int((differences > 0).sum())
    return {
        "a": 100 * float(a.mean()),
        "b": 100 * float(b.mean()),
        "a_interval": (100 * wilson_interval(int(a.sum()), len(a))).tolist(),
        "b_interval": (100 * wilson_interval(int(b.sum()), len(b))).tolist(),
        "difference": 100 * float(differences.mean()),
        "interval": list(bootstrap_interval(differences, block=block)),
        "only_a": only_a,
        "only_b": only_b,
        "p": mcnemar(only_a, only_b),
    }


def in_words(n: int, compared: dict[str, Any], queries: int) -> str:
    """What `compare_hits` says of recall@n over a number of queries, in one sentence."""
    difference, (low, high) = compared["difference"], compared["interval"]
    if not compared["only_a"] + compared["only_b"]:
        return f"both find the same queries at R@{n}"
    more = "more" if difference >= 0 else "less"
    sentence = f"B finds {abs(difference):.1f} points {more} at R@{n}, 95% interval {low:.1f} to {high:.1f}"
    if low > 0 or high < 0:
        return f"{sentence}: more than chance"
    if not difference:
        return f"{sentence}: the difference can be chance"
    share, mean = (compared["only_a"] + compared["only_b"]) / queries, difference / 100
    needed = math.ceil(Z95**2 * (share - mean**2) / mean**2)
    return f"{sentence}: the difference can be chance; at least about {needed:,} queries would be needed"
