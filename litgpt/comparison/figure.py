"""A measured number with its 95 % interval."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.959964  # standard errors on either side of the mean that 95 % lie within


class Figure(NamedTuple):
    """A number, and the 95 % interval that its samples leave."""

    value: float
    low: float
    high: float

    @classmethod
    def mean(cls, values: Sequence[float]) -> "Figure":
        """The mean of independent values, by its standard error."""
        mean, error = math.fsum(values) / len(values), standard_error(values)
        return cls(mean, mean - Z * error, mean + Z * error)

    @classmethod
    def share(cls, values: Sequence[float]) -> "Figure":
        """The mean of scores in 0..1, by Wilson's interval, which stays sound for few samples and for all right or all wrong."""
        n, mean = len(values), math.fsum(values) / len(values)
        centre = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
        return cls(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))

    @classmethod
    def exact(cls, value: float) -> "Figure":
        """A number without an uncertainty that is known."""
        return cls(value, value, value)

    def exp(self) -> "Figure":
        """The exponential, as of a mean log-probability for a perplexity."""
        return Figure(*map(_exp, self))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 for one alone."""
    n = len(values)
    if n < 2:
        return 0.0
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
