"""Intervals of recalls."""

import math

import numpy as np
import pytest

from utils.retrieval.comparison import wilson_interval


def by_formula(successes, count, z=1.959963984540054):
    """The roots p of (share - p)^2 = z^2 p (1 - p) / count, which define the interval."""
    share = successes / count
    a, b, c = 1 + z * z / count, -(2 * share + z * z / count), share * share
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


@pytest.mark.parametrize(("successes", "count"), [(88, 220), (0, 10), (10, 10), (1, 1), (25_000, 27_592), (3.4, 15)])
def test_the_ends_solve_the_equation_that_defines_them(successes, count):
    assert wilson_interval(successes, count) == pytest.approx(by_formula(successes, count), abs=1e-12)


def test_by_hand():
    # 40 of 100: (0.4 + 0.0192073) / 1.0384146 -+ 1.959964 / 1.0384146 * sqrt(0.0024 + 0.0000960365)
    assert wilson_interval(40, 100) == pytest.approx([0.30940, 0.49800], abs=1e-5)
    assert wilson_interval(0, 10) == pytest.approx([0, 0.27754], abs=1e-5)  # z^2 / (10 + z^2)
    ends = wilson_interval([[0, 5, 10]] * 2, 10)
    assert ends.shape == (2, 2, 3)
    np.testing.assert_allclose(ends[0], 1 - ends[1, :, ::-1], atol=1e-12)
