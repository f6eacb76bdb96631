"""The tasks of RULER (arXiv:2404.06654) that need no downloads, in words of our own.

Every function makes a sample of n units of filling, the same for the same random generator.
"""

from collections.abc import Sequence
from random import Random
from uuid import UUID

from litgpt.tasks.sample import Question, Sample, insert
from litgpt.tasks.words import draw_words, number

_NOISE = (
    "The kettle hums on the stove.\n",
    "Rain taps at the window.\n",
    "The cat sleeps by the door.\n",
    "A clock ticks in the hall.\n",
    "Then the day goes on as before.\n",
)
_NUMBERS_INTRO = "Somewhere in the text below, words are given secret numbers. Remember them; they will be asked for."
_LINK_HOPS = 4
_COMMON, _COMMON_TIMES, _RARE_TIMES = 10, 30, 3


def noise(n: int) -> list[str]:
    return [_NOISE[i % len(_NOISE)] for i in range(n)]


def number_line(key: str, value: str) -> str:
    return f"The secret number of {key} is {value}.\n"


def ask_number(key: str, value: str, place: int) -> Question:
    return Question(
        f"What is the secret number of {key} in the text?", f"The secret number of {key} is", (value,), (place,)
    )


def niah_single_1(random: Random, n: int) -> Sample:
    """One number among sentences that repeat."""
    (key,), value = draw_words(random, 1), number(random)
    lines, (place,) = insert(noise(n), [number_line(key, value)], [random.randint(0, n)])
    return Sample(_NUMBERS_INTRO, tuple(lines), (ask_number(key, value, place),))


def niah_multikey_2(random: Random, n: int) -> Sample:
    """One number among numbers of other words."""
    keys = draw_words(random, n + 1)
    return _among_pairs(random, keys, [number(random) for _ in keys])


def niah_multikey_3(random: Random, n: int) -> Sample:
    """One identifier among others, with identifiers for keys."""
    return _among_pairs(random, *([_identifier(random) for _ in range(n + 1)] for _ in range(2)))


def _identifier(random: Random) -> str:
    return str(UUID(int=random.getrandbits(128), version=4))


def _among_pairs(random: Random, keys: Sequence[str], values: Sequence[str]) -> Sample:
    asked = random.sample(range(len(keys)), 2)
    lines = tuple(map(number_line, keys, values))
    return Sample(_NUMBERS_INTRO, lines, tuple(ask_number(keys[i], values[i], i) for i in asked))


def vt(random: Random, n: int) -> Sample:
    """Variable tracking: a chain of assignments among sentences that repeat."""
    names = []
    while len(names) <= _LINK_HOPS:
        name = "".join(random.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))
        names += [] if name in names else [name]
    value = str(random.randrange(10**4, 10**5))
    chain = [
        f"VAR {name} = {before}\n" for name, before in zip(names, (value, *(f"VAR {x}" for x in names)), strict=False)
    ]
    lines, places = insert(noise(n), chain, sorted(random.randint(0, n) for _ in chain))
    question = Question(
        f"Which variables have the value {value}, directly or by way of others? There are {len(names)}.",
        f"The variables with the value {value} are:",
        tuple(names),
        tuple(places),
    )
    intro = "Variables are set in the text below, some to numbers and some to other variables. Keep track of them."
    return Sample(intro, tuple(lines), (question,))


def cwe(random: Random, n: int) -> Sample:
    """Common words: ten that come thirty times, in a list of others that come three times (fewer in short lists)."""
    scale = min(_COMMON_TIMES, max(2, n // (2 * _COMMON)))
    rare_times = max(1, scale * _RARE_TIMES // _COMMON_TIMES)
    words = draw_words(random, _COMMON + max(1, n // rare_times))
    common, rare = words[:_COMMON], words[_COMMON:]
    items = common * scale + rare * rare_times
    random.shuffle(items)
    question = Question(
        f"What are the {_COMMON} most common words of the list?", "The most common words are:", tuple(common)
    )
    lines = tuple(f"{i}. {word}\n" for i, word in enumerate(items, 1))
    return Sample("Below is a numbered list of words, of which some come again and again.", lines, (question,))


def fwe(random: Random, n: int) -> Sample:
    """Frequent words: the three most frequent of made-up words whose frequencies fall as 1 / rank**2."""
    words: list[str] = []
    while len(words) < 12:
        word = "".join(random.choice("bcdfglmnprstvz") + random.choice("aeiou") for _ in range(3))
        words += [] if word in words else [word]
    counts = [max(1, round(n / rank**2)) for rank in range(2, len(words) + 2)]
    for i in (2, 1, 0):  # different ones for those that are asked for
        counts[i] = max(counts[i], counts[i + 1] + 1)
    items = ["..."] * n + [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    random.shuffle(items)
    question = Question(
        "Dots left aside, what are the three most frequent words of the text?",
        "The three most frequent words are:",
        tuple(words[:3]),
    )
    lines = tuple(" ".join(items[i : i + 8]) + "\n" for i in range(0, len(items), 8))
    return Sample("Below is a text in a secret language. Count its words; dots do not count.", lines, (question,))


RULER = {task.__name__: task for task in (niah_single_1, niah_multikey_2, niah_multikey_3, vt, cwe, fwe)}
