"""The comparison: every system measured in turn, again and again."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from environments import Launcher
from first_token import seconds_to_answer
from results import ABOVE_IMPORTS, ANSWER, DECODE, MEMORY, PREFILL, Samples, at, common_beginning
from systems import OURS, System


@dataclass(frozen=True)
class Sizes:
    """Tokens of context at which speeds are measured, and tokens decoded after it.

    From `long` tokens of context on, few systems are measured (`System.long`), over few tokens.
    """

    contexts: tuple[int, ...]
    new_tokens: int
    long: int
    long_new_tokens: int


FULL = Sizes((128, 2048, 8000), 64, 4096, 16)
QUICK = Sizes((16, 48, 80), 4, 64, 2)


@dataclass(frozen=True)
class Places:
    """Where on this machine things are.

    Attributes:
        pythons: interpreters, by group of systems.
        weights: files and folders, by what systems call them.
        tokens: JSON list of the text's tokens.
    """

    pythons: Mapping[str, Path]
    weights: Mapping[str, Path]
    tokens: Path


def measure(
    launcher: Launcher,
    systems: Sequence[System],
    places: Places,
    repeats: int,
    sizes: Sizes,
    keep: Callable[[Samples, list[str]], None] = lambda samples, notes: None,
) -> tuple[Samples, list[str]]:
    """Every figure of every system, once a round; and what is to be said about them. `keep` gets both after every run.

    Systems take turns, so that all of them see the same state of the machine; every other round goes backwards. A system that
    fails is told among the notes and measured no more; what it and the others gave stays.
    """
    samples: Samples = {}
    ways: dict[str, list[str]] = {}  # what is said of how it ran, and the systems that say it
    common: list[str] = []
    failures: dict[str, str] = {}
    no_answers: dict[str, str] = {}  # of the command

    def add(figure: str, system: System, value: float) -> None:
        samples.setdefault(figure, {}).setdefault(system.name, []).append(value)

    def notes() -> list[str]:
        told = [f"{'; '.join(names)}: {note}" for note, names in ways.items()]
        return [*told, *common, *(f"{name} failed in {what}" for name, what in (failures | no_answers).items())]

    for round_idx in range(repeats):
        in_turn = [system for system in systems if system.name not in failures]
        if round_idx % 2:
            in_turn.reverse()
        for context in sizes.contexts:
            long, answers = context >= sizes.long, {}
            for system in in_turn:
                if (long and not system.long) or system.name in failures:
                    continue
                print(f"round {round_idx + 1}/{repeats}, {context} tokens: {system.name}", file=sys.stderr)
                job = {
                    "checkpoint": str(places.weights[system.weights]),
                    "tokens": str(places.tokens),
                    "context": context,
                    "new_tokens": sizes.long_new_tokens if long else sizes.new_tokens,
                    "threads": launcher.threads,
                }
                try:
                    found = launcher.work(places.pythons[system.group], system.worker, job | system.options)
                    if found["threads"] != launcher.threads:
                        raise RuntimeError(f"{system.name} ran on {found['threads']} threads, not {launcher.threads}")
                    if launcher.restrict == "avx2" and "AVX512" in found.get("note", ""):
                        raise RuntimeError(f"it does not run restricted to avx2: {found['note']}")
                except (RuntimeError, OSError) as error:
                    failures[system.name] = failed(f"round {round_idx + 1}, {context} tokens", error)
                    continue
                add(at(DECODE, context), system, found["decode"])
                add(at(PREFILL, context), system, found["prefill"])
                add(at(MEMORY, context), system, found["peak_bytes"] / 1e6)
                add(at(ABOVE_IMPORTS, context), system, found["peak_above_import"] / 1e6)
                answers[system.name] = found["answer"]
                if "note" in found and system.name not in ways.setdefault(found["note"], []):
                    ways[found["note"]].append(system.name)
                keep(samples, notes())
            if round_idx == 0 and OURS in answers:
                ours = answers.pop(OURS)
                shared = [f"{name} {common_beginning(ours, answer)}" for name, answer in answers.items()]
                if shared:
                    tokens = f"greedy tokens in common with {OURS}, of {len(ours)} at {context:,}"
                    common.append(f"{tokens}: {'; '.join(shared)}")
        for system in in_turn:
            if system.command and system.name not in failures | no_answers:
                print(f"round {round_idx + 1}/{repeats}, command: {system.name}", file=sys.stderr)
                python, checkpoint = places.pythons[system.group], places.weights[system.weights]
                try:
                    if round_idx == 0:
                        seconds_to_answer(launcher, python, checkpoint)  # files cached, bytecode written
                    add(ANSWER, system, seconds_to_answer(launcher, python, checkpoint))
                except (RuntimeError, OSError) as error:
                    no_answers[system.name] = failed(f"round {round_idx + 1}, command", error)
                keep(samples, notes())
    return samples, notes()


def failed(where: str, error: Exception) -> str:
    """A note of an error, which is told on stderr too."""
    print(f"{where}: {error}", file=sys.stderr)
    return f"{where}: {' '.join(str(error).split())[:300]}"
