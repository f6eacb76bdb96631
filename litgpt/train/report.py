"""How far a run is, and what it says of that: progress lines, logged numbers, and in the end a table and a curve."""

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
from lightning.fabric import Fabric

from litgpt.args import TrainArgs
from litgpt.scale import Scale


def peak_memory(device: torch.device) -> float:
    """Most memory that this process has used, in GB: on the GPU where it works on one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@dataclass
class Position:
    """How far a run is."""

    epoch: int = 0
    batches: int = 0  # micro-batches of the epoch, over all processes
    iter_num: int = 0  # iterations of a process
    step_count: int = 0  # optimizer steps
    tokens: int = 0  # over all processes
    samples: int = 0  # over all processes
    counted: int = 0  # tokens that the loss has counted
    seconds: float = 0.0  # of training
    losses: list[tuple[int, float]] = field(default_factory=list)  # of steps
    val_losses: list[tuple[int, float]] = field(default_factory=list)  # after steps

    @property
    def worse(self) -> int:
        """Validations since the one with the lowest loss."""
        losses = [math.inf if math.isnan(loss) else loss for _, loss in self.val_losses]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class Reporter:
    """Prints and logs how a run goes, on the first process only."""

    def __init__(self, fabric: Fabric, train: TrainArgs, max_steps: int) -> None:
        self.fabric, self.train, self.max_steps = fabric, train, max_steps

    def begin(self, position: Position) -> None:
        """Before the first iteration: speed and time left count from here, also of a run that resumes."""
        self._began, self._start = time.perf_counter(), replace(position)

    def iteration(
        self, position: Position, loss: float, counted: int, seconds: float, part: float, learning_rate: float
    ) -> None:
        """After an iteration: `loss` is summed over the `counted` tokens of the window so far, of this process, which has gone
        through this `part` of the window."""
        is_step, mean = part == 1, loss / counted if counted else 0.0
        if is_step:
            position.losses.append((position.step_count, mean))
        if position.iter_num % self.train.log_interval:
            return
        start, elapsed = self._start, time.perf_counter() - self._began
        steps = position.step_count + (0 if is_step else part)
        left = (self.max_steps - steps) * elapsed / (steps - start.step_count)
        if self.train.max_time is not None:
            left = min(left, max(0.0, self.train.max_time - start.seconds - elapsed))
        self.fabric.print(
            f"Epoch {position.epoch + 1} | iter {position.iter_num} step {position.step_count} | loss train: {mean:.3f},"
            f" val: {f'{position.val_losses[-1][1]:.3f}' if position.val_losses else 'n/a'} | iter time: {seconds * 1000:.2f} ms"
            f"{' (step)' if is_step else ''} | {(position.tokens - start.tokens) / elapsed:.0f} tok/s,"
            f" {peak_memory(self.fabric.device):.2f} GB remaining time: {timedelta(seconds=int(left))}"
        )
        numbers = {"iter": position.iter_num, "step": position.step_count, "epoch": position.epoch, "time": elapsed}
        numbers |= {"loss": mean, "learning_rate": learning_rate, "iter_time": seconds}
        numbers |= {"batches": position.iter_num, "samples": position.samples}
        numbers |= dict.fromkeys(("tokens", "total_tokens", "lengths"), position.tokens)
        done = {"batches": position.iter_num - start.iter_num}  # the other two are over all processes
        done["samples"] = (position.samples - start.samples) / self.fabric.world_size
        done["items"] = (position.tokens - start.tokens) / self.fabric.world_size
        numbers |= {f"device/{name}_per_sec": number / elapsed for name, number in done.items()}
        self.fabric.log_dict(numbers, step=position.iter_num)

    def validation(self, position: Position, loss: float, seconds: float | None) -> None:
        """After a validation that took `seconds` (None: that of the end)."""
        perplexity = math.exp(min(loss, 700.0))
        position.val_losses.append((position.step_count, loss))
        if seconds is None:
            self.fabric.print(f"Final evaluation | val loss: {loss:.3f} | val ppl: {perplexity:.3f}")
        else:
            self.fabric.print(f"iter {position.iter_num}: val loss {loss:.4f}, val time: {seconds * 1000:.2f} ms")
        self.fabric.log_dict({"val_loss": loss, "val_ppl": perplexity}, step=position.iter_num)

    def summary(self, position: Position) -> dict[str, float]:
        """Print the counts and speed of a run. Returns its metrics."""
        metrics = {
            "steps": position.step_count,
            "tokens": position.tokens,
            "counted_tokens": position.counted,
            "seconds": position.seconds,
            "tokens_per_second": position.tokens / max(position.seconds, 1e-9),
        }
        counts = (position.counted, position.tokens, position.tokens)  # padding is left out
        memory = peak_memory(self.fabric.device)
        self.fabric.print(f"\n{performance_table(counts, position.seconds, memory)}\n")
        last = {"train_loss": position.losses[-1:], "val_loss": position.val_losses[-1:]}
        return metrics | {name: loss for name, points in last.items() for _, loss in points}


def performance_table(counts: Sequence[int], seconds: float, memory: float | None) -> str:
    """Tokens, without and with prompts and with padding, the speed of a run, and the most memory in GB, as LitGPT shows them."""
    names = ("Input Tokens", "Tokens w/ Prompt", "Total Tokens (w/ Padding)")
    rows = {"Token Counts": {name: f"{count:>8,}" for name, count in zip(names, counts, strict=True)}}
    speed = counts[-1] / max(seconds, 1e-9)
    rows["Performance"] = {"Training Time": f"{seconds:.2f} s", "Tok/sec": f"{speed:.2f} tok/s"}
    rows |= {} if memory is None else {"Memory Usage": {"Memory Used": f"{memory:.2f} GB"}}
    text = line = "| " + "-" * 53
    for title, values in rows.items():
        lines = [f"| {title}", *(f"| - {name:<25} : {value:>12}" for name, value in values.items()), line]
        text += "".join(f"\n{one}" for one in lines)
    return text


def curve_svg(curves: dict[str, list[tuple[int, float]]], width: int = 720, height: int = 400) -> str:
    """A picture of curves, each a list of points (step, loss)."""
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[1])] or [(0, 0.0)]
    (low_x, high_x), (low_y, high_y) = ((min(values), max(values)) for values in zip(*points, strict=True))
    left, top, right, bottom = 60, 20, width - 20, height - 45
    across = Scale(low_x, max(high_x, low_x + 1), left, right)
    up = Scale(low_y, max(high_y, low_y + 1e-3), bottom, top)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for y in up.ticks():
        lines.append(f'<line x1="{left}" x2="{right}" y1="{up(y):.1f}" y2="{up(y):.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="{left - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in across.ticks():
        if x == round(x):  # a step
            lines.append(f'<text x="{across(x):.1f}" y="{bottom + 18}" text-anchor="middle">{x:.0f}</text>')
    lines.append(f'<text x="{(left + right) / 2}" y="{height - 8}" text-anchor="middle">optimizer step</text>')
    for i, ((name, curve), color) in enumerate(zip(curves.items(), ("#1f77b4", "#d62728"), strict=False)):
        places = [(across(x), up(y)) for x, y in curve if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        if len(curve) < 60:
            lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in places]
        lines.append(f'<text x="{right - 90}" y="{top + 16 * (i + 1)}" fill="{color}">{name} loss</text>')
    return "\n".join([*lines, "</svg>", ""])
