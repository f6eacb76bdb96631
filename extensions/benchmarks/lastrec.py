"""A cache that evicts, over a text many times its length: is decoding as fast at the end as at the beginning?"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from environments import Launcher
from layouts import Layouts
from results import number, row


@dataclass(frozen=True)
class Sizes:
    """Tokens of the text, the position from which on speeds are measured, windows of positions, slots of the cache."""

    text: int
    start: int
    windows: int
    slots: int


FULL = Sizes(text=4000, start=300, windows=10, slots=256)
QUICK = Sizes(text=120, start=40, windows=4, slots=32)


def measure(launcher: Launcher, layouts: Layouts, repeats: int, sizes: Sizes) -> dict:
    """Speeds by window, one list for every round, and the cache's bytes as allocated and as estimated."""
    job = vars(sizes) | {"checkpoint": str(layouts.litgpt), "tokens": str(layouts.tokens)}
    found = []
    for round_idx in range(repeats):
        print(f"round {round_idx + 1}/{repeats}: {sizes.text} tokens through {sizes.slots} slots", file=sys.stderr)
        found.append(launcher.work(Path(sys.executable), "long_text.py", job))
    allocated = sorted({size for result in found for size in result["allocated"]})
    estimated = sorted({size for result in found for size in (*result["estimated"], result["apriori"])})
    if allocated != estimated or len(allocated) != 1:
        raise RuntimeError(f"cache bytes should be one constant: allocated {allocated}, size_estimate() {estimated}")
    return {
        "slots": sizes.slots,
        "edges": found[0]["edges"],
        "speeds": [result["speeds"] for result in found],
        "cache_bytes": allocated[0],
    }


def markdown(result: dict) -> str:
    """A row for every window of positions, and what else was found."""
    speeds = [median(window) for window in zip(*result["speeds"], strict=True)]
    windows = zip(result["edges"], result["edges"][1:], speeds, strict=False)
    lines = [row(["positions", "decode, tokens/s"]), row(["---", "---:"])]
    lines += [row([f"{first:,} to {stop:,}", number(speed)]) for first, stop, speed in windows]
    lines.append(
        f"\nlastrec, {result['slots']} slots: last window at {speeds[-1] / speeds[0]:.2f}x the first one's speed, "
        f"slowest at {min(speeds) / max(speeds):.2f}x the fastest one's; the caches have {result['cache_bytes']:,} bytes "
        "throughout, equal to size_estimate() and to the estimate made without a cache"
    )
    return "\n".join(lines)
