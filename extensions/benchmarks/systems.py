"""What is compared, as data: names, interpreters, weights and options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from environments import PEERS

OURS = "this"
INT8, INT4, COMPILED = (f"{OURS}, `{option}`" for option in ("--quantize int8", "--quantize int4", "--compile"))
LITGPT, TRANSFORMERS = f"LitGPT {PEERS['litgpt'].version}", f"transformers {PEERS['transformers'].version}"
LLAMA_BF16, LLAMA_Q8_0, LLAMA_Q4_1 = (f"llama.cpp {weights}" for weights in ("BF16", "Q8_0", "Q4_1"))


@dataclass(frozen=True)
class System:
    """Something to measure.

    Attributes:
        key: what `--systems` calls it; the part before "-" is whose interpreter it runs in.
        name: what the tables call it.
        worker: the script that measures it.
        weights: which of the files it reads (`layouts`).
        options: what the worker is told besides.
        long: whether it is also measured at long contexts.
        command: whether it has a `generate` command to measure.
    """

    key: str
    name: str
    worker: str
    weights: str
    options: Mapping[str, object] = field(default_factory=dict)
    long: bool = False
    command: bool = False

    @property
    def group(self) -> str:
        return self.key.partition("-")[0]


SYSTEMS = (
    System("ours-bf16", OURS, "ours.py", "litgpt", long=True, command=True),
    System("litgpt", LITGPT, "litgpt_peer.py", "litgpt", command=True),
    System("llama-bf16", LLAMA_BF16, "llama_peer.py", "bf16", long=True),
    System("ours-int8", INT8, "ours.py", "litgpt", {"quantize": "int8"}),
    System("llama-q8_0", LLAMA_Q8_0, "llama_peer.py", "q8_0"),
    System("ours-int4", INT4, "ours.py", "litgpt", {"quantize": "int4"}),
    System("llama-q4_1", LLAMA_Q4_1, "llama_peer.py", "shipped"),
    System("ours-compile", COMPILED, "ours.py", "litgpt", {"compile": True}),
    System("transformers", TRANSFORMERS, "transformers_peer.py", "huggingface"),
)


def choose(keys: Sequence[str]) -> tuple[System, ...]:
    """The systems of these keys or groups, in the order of `SYSTEMS`; `ValueError` if one of the words names none."""
    for key in keys:
        if not any(key in (system.key, system.group) for system in SYSTEMS):
            names = ", ".join(dict.fromkeys(name for system in SYSTEMS for name in (system.group, system.key)))
            raise ValueError(f"there is no system {key!r}, only {names}")
    return tuple(system for system in SYSTEMS if system.key in keys or system.group in keys)
