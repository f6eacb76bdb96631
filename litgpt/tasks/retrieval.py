"""Key retrieval by depth: a number in prose, from its beginning to its end."""

from collections.abc import Sequence
from random import Random

from litgpt.tasks.ruler import ask_number, number_line
from litgpt.tasks.sample import Sample, insert
from litgpt.tasks.words import draw_words, number

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def retrieval(random: Random, n: int, prose: Sequence[str], depth: float, numbers: int = 2) -> Sample:
    """A number at `depth` of n lines of prose, and others, for later questions, anywhere."""
    start = random.randrange(len(prose))
    lines = [prose[(start + i) % len(prose)] for i in range(n)]
    keys, values = draw_words(random, numbers), [number(random) for _ in range(numbers)]
    places = [round(depth * n), *[random.randint(0, n) for _ in range(numbers - 1)]]
    lines, where = insert(lines, list(map(number_line, keys, values)), places)
    return Sample(
        "The text below gives some words secret numbers. Remember them; they will be asked for.",
        tuple(lines),
        tuple(map(ask_number, keys, values, where)),
        depth,
    )
