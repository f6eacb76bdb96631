"""The comparison: every system measured in turn, again and again."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from environments import Launcher
from first_token import seconds_to_answer
from layouts import Layouts
from results import COMPILED, LITGPT, OURS, TRANSFORMERS, Samples, common_beginning


@dataclass(frozen=True)
class Sizes:
    """Tokens of context at which speeds are measured, and tokens decoded after it."""

    contexts: tuple[int, ...]
    new_tokens: int


FULL = Sizes((128, 2048), 64)
QUICK = Sizes((16, 48), 4)


@dataclass(frozen=True)
class System:
    """Something to measure: a worker in an interpreter, and the weights it reads."""

    name: str
    python: Path
    worker: str
    checkpoint: Path
    compile: bool = False
    command: bool = False  # whether it has a `generate` command to measure


def systems(pythons: Mapping[str, Path], layouts: Layouts) -> list[System]:
    """All that are compared; `pythons` are the peers' interpreters."""
    own = Path(sys.executable)
    return [
        System(OURS, own, "ours.py", layouts.litgpt, command=True),
        System(LITGPT, pythons["litgpt"], "litgpt_peer.py", layouts.litgpt, command=True),
        System(COMPILED, own, "ours.py", layouts.litgpt, compile=True),
        System(TRANSFORMERS, pythons["transformers"], "transformers_peer.py", layouts.huggingface),
    ]


def measure(
    launcher: Launcher, systems: Sequence[System], layouts: Layouts, repeats: int, sizes: Sizes
) -> tuple[Samples, list[str]]:
    """Every figure of every system, once a round; and what is to be said about them.

    Systems take turns, so that all of them see the same state of the machine; every other round goes backwards.
    """
    samples: Samples = {}
    notes: list[str] = []

    def add(figure: str, system: System, value: float) -> None:
        samples.setdefault(figure, {}).setdefault(system.name, []).append(value)

    for round_idx in range(repeats):
        in_turn = list(systems) if round_idx % 2 == 0 else list(reversed(systems))
        for context in sizes.contexts:
            answers = {}
            for system in in_turn:
                print(f"round {round_idx + 1}/{repeats}, {context} tokens: {system.name}", file=sys.stderr)
                job = {
                    "checkpoint": str(system.checkpoint),
                    "tokens": str(layouts.tokens),
                    "context": context,
                    "new_tokens": sizes.new_tokens,
                    "compile": system.compile,
                }
                found = launcher.work(system.python, system.worker, job)
                if found["threads"] != launcher.threads:
                    raise RuntimeError(f"{system.name} ran on {found['threads']} threads, not {launcher.threads}")
                add(f"prefill at {context:,}, tokens/s", system, found["prefill"])
                add(f"decode at {context:,}, tokens/s", system, found["decode"])
                add(f"peak memory at {context:,}, MB", system, found["peak_bytes"] / 1e6)
                add(f"peak memory above imports at {context:,}, MB", system, found["peak_above_import"] / 1e6)
                answers[system.name] = found["answer"]
                if round_idx == 0 and "graphs" in found:
                    notes.append(f"{system.name} at {context:,}: {found['graphs']} compiled graph(s) for all positions")
            if round_idx == 0:
                notes += [
                    f"{name} at {context:,}: the first {common_beginning(answers[OURS], answer)} of {len(answer)} greedy "
                    "tokens are ours"
                    for name, answer in answers.items()
                    if name != OURS
                ]
        for system in in_turn:
            if system.command:
                print(f"round {round_idx + 1}/{repeats}, command: {system.name}", file=sys.stderr)
                if round_idx == 0:
                    seconds_to_answer(launcher, system.python, system.checkpoint)  # files cached, bytecode written
                seconds = seconds_to_answer(launcher, system.python, system.checkpoint)
                add("`litgpt generate` to the first of the answer, s", system, seconds)
    return samples, notes
