"""How far a mean of few values may be from what more of them would give."""

from collections.abc import Sequence
from math import sqrt
from statistics import stdev

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # standard errors of 95 %, by degrees of freedom


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of two values or more."""
    free = len(values) - 1
    width = STUDENT[free - 1] if free <= len(STUDENT) else 1.96 + 2.4 / free
    return width * stdev(values) / sqrt(free + 1)
