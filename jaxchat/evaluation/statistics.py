"""Confidence intervals of shares and of paired differences."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import stdtrit  # type: ignore[import-untyped]

Z95 = 1.959963984540054  # The normal distribution's 97.5 percent quantile.


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 percent score interval of the share right / count, within [0, 1] (Wilson 1927, eq. 1)."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = right / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # At shares of 0 and 1 the formula gives exactly 0 and 1, apart from rounding.
    return (0.0 if right == 0 else middle - half), (1.0 if right == count else middle + half)


class Paired(NamedTuple):
    """Comparison of two models on the same questions.

    Attributes:
        only_first, only_second: number of questions that only one of the models answered right.
        difference, low, high: accuracy of the second minus that of the first, and its 95 percent interval.
        p: p-value of the exact McNemar test.
    """

    questions: int
    only_first: int
    only_second: int
    difference: float
    low: float
    high: float
    p: float


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Exact two-sided McNemar test (McNemar 1947), with the interval of the paired difference from its standard error.

    Raises:
        ValueError: the numbers of answers differ or are zero.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"cannot pair {len(first)} answers with {len(second)}: both must answer the same questions")
    n = len(first)
    a = sum(x and not y for x, y in zip(first, second))
    b = sum(y and not x for x, y in zip(first, second))
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1))
    p = min(1.0, 2 * tail / 2 ** (a + b))
    difference = (b - a) / n
    error = math.sqrt(max((a + b) / n - difference**2, 0.0) / n)
    return Paired(n, a, b, difference, difference - Z95 * error, difference + Z95 * error, p)


class MeanDifference(NamedTuple):
    """Mean of paired differences (second minus first) and its 95 percent interval, None with fewer than two pairs."""

    difference: float
    interval: tuple[float, float] | None


def paired_means(first: Sequence[float], second: Sequence[float]) -> MeanDifference:
    """Mean of paired differences with Student's t interval (Student 1908); needs at least one pair."""
    differences = [y - x for x, y in zip(first, second, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return MeanDifference(mean, None)
    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(n)
    return MeanDifference(mean, (mean - half, mean + half))
