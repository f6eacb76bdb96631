"""Which caches are compared, at which budgets and lengths, in which tasks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from litgpt.kvcache import CacheSpec
from litgpt.model import GPT
from litgpt.tasks.ruler import RULER

TASKS = ("speed", "perplexity", "retrieval", *RULER)


@dataclass(frozen=True)
class Cell:
    """A cache at a budget and a length.

    Attributes:
        name: of the cache, as typed.
        spec: the cache, with its number of slots.
        budget: its slots as a share of `length`.
        length: tokens of a sample.
    """

    name: str
    spec: CacheSpec
    budget: float
    length: int


def make_grid(model: GPT, caches: str, budgets: Sequence[float], lengths: Sequence[int]) -> list[Cell]:
    """All cells, by length. Caches that evict nothing have the budget 1 only.

    Args:
        caches: names with commas between them, each perhaps with arguments: `lastrec(n_sink=4),h2o-int8`.
        budgets: slots as shares of the length.
        lengths: tokens.

    Raises:
        ValueError: if a cache does not exist or cannot have that many slots, or a number is out of range.
    """
    named = {name: _parse(name) for name in _split(caches)}
    if not named:
        raise ValueError("there are no caches to compare: name some, as in --caches dense,lastrec")
    for budget in budgets:
        if not 0 < budget <= 1:
            raise ValueError(f"a budget is a share of the length, above 0 and at most 1, got {budget}")
    cells = []
    for length in lengths:
        if not 2 <= length <= model.max_seq_length:
            raise ValueError(f"the length must be in 2..{model.max_seq_length:,}, the model's context, got {length:,}")
        for name, (text, args) in named.items():
            spec = CacheSpec.parse(text, **args)
            if not budgets and spec.evicts:
                raise ValueError(f"{name} evicts tokens: it needs budgets, as in --budgets 0.5,0.25")
            for budget in budgets if spec.evicts else (1.0,):
                cell = Cell(name, CacheSpec.parse(spec, max(1, round(budget * length))), budget, length)
                _check(cell, model)
                cells.append(cell)
    return cells


def parse_tasks(text: str) -> list[str]:
    """The tasks of a text with commas between them; "all" are all, "ruler" are those of RULER.

    Raises:
        ValueError: for names of no tasks.
    """
    tasks: dict[str, None] = {}
    for name in _split(text):
        several = {"all": TASKS, "ruler": tuple(RULER)}.get(name, (name,))
        if several[0] not in TASKS:
            raise ValueError(
                f"no task is called {name!r}; there are {', '.join(TASKS)}, ruler for the last {len(RULER)}, and all"
            )
        tasks |= dict.fromkeys(several)
    if not tasks:
        raise ValueError(f"there are no tasks: name some of {', '.join(TASKS)}")
    return list(tasks)


def parse_numbers(option: str, value: Any, kind: type) -> list[Any]:
    """The numbers of an option: one, or several with commas between them.

    Raises:
        ValueError: if it has something else.
    """
    texts = _split(value) if isinstance(value, str) else [value]
    try:
        return list(dict.fromkeys(kind(text) for text in texts))
    except (TypeError, ValueError):
        raise ValueError(f"--{option} takes numbers with commas between them, got {value!r}") from None


def _split(text: str) -> list[str]:
    """The parts of a text between commas, but not between those in brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _parse(name: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of `name(argument=value, ...)`."""
    match = re.fullmatch(r"([^()]+)(?:\((.*)\))?", name)
    pairs = [pair.partition("=") for pair in _split(match[2] or "")] if match else []
    if match is None or not all(key.strip().isidentifier() and equals for key, equals, _ in pairs):
        raise ValueError(f"a cache is a name, perhaps with arguments, as in lastrec(n_sink=4), got {name!r}")
    if clash := {"text", "policy", "storage", "cache_length"} & {key.strip() for key, _, _ in pairs}:
        raise ValueError(f"{name} has {clash.pop()!r}: the name says policy and storage, --budgets the slots")
    return match[1].strip(), {key.strip(): yaml.safe_load(value) for key, _, value in pairs}


def _check(cell: Cell, model: GPT) -> None:
    try:
        cell.spec.size(model, 1)
    except ValueError as error:
        raise ValueError(
            f"{cell.name} cannot have a budget of {cell.budget:g} of {cell.length:,} tokens: {error}"
        ) from None
