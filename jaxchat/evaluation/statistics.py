"""How sure a share is, and a difference of shares on the same questions."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import stdtrit  # type: ignore[import-untyped]

Z95 = 1.959963984540054  # The normal distribution's 97.5 percent quantile.


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 percent interval of a share, which stays within 0 and 1 (Wilson 1927, eq. 1)."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = right / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # At the ends the formula gives 0 and 1 but for rounding.
    return (0.0 if right == 0 else middle - half), (1.0 if right == count else middle + half)


class Paired(NamedTuple):
    """Two models on the same questions: how many either alone got right, the difference of their shares (the second's
    less the first's) with its 95 percent interval, and the probability of so uneven a split if they were equally good.
    """

    questions: int
    only_first: int
    only_second: int
    difference: float
    low: float
    high: float
    p: float


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """The exact two-sided McNemar test (1947) and the interval of the paired difference by its standard error.

    Raises:
        ValueError: the two are not of the same questions, or there are none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} answers are not those of the same questions")
    n = len(first)
    a = sum(x and not y for x, y in zip(first, second))
    b = sum(y and not x for x, y in zip(first, second))
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1))
    p = min(1.0, 2 * tail / 2 ** (a + b))
    difference = (b - a) / n
    error = math.sqrt(max((a + b) / n - difference**2, 0.0) / n)
    return Paired(n, a, b, difference, difference - Z95 * error, difference + Z95 * error, p)


class MeanDifference(NamedTuple):
    """Mean of paired differences (the second's less the first's), with its 95 percent interval.

    The interval is None with fewer than two pairs.
    """

    difference: float
    interval: tuple[float, float] | None


def paired_means(first: Sequence[float], second: Sequence[float]) -> MeanDifference:
    """Student's t interval of the mean of paired differences (Student 1908); at least one pair."""
    differences = [y - x for x, y in zip(first, second, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return MeanDifference(mean, None)
    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(n)
    return MeanDifference(mean, (mean - half, mean + half))
