"""The axes of plots."""

import math
from typing import NamedTuple


class Scale(NamedTuple):
    """Where values are on an axis of a plot, perhaps by their logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, max(self.low, value)))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(powers) <= 4 else (1,)
            found = [m * 10.0**p for p in powers for m in steps]
        else:
            size = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
            step = next(m * size for m in (1, 2, 5, 10) if (self.high - self.low) / (m * size) <= 6)
            found = [
                i * step for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
            ]
        return [x for x in found if self.low <= x * (1 + 1e-9) and x <= self.high * (1 + 1e-9)]
