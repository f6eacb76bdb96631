"""A family of models as data: its named models, its `config.json` and its weight names."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from litgpt.settings import Settings

# One or several module names of Hugging Face in a block, or a function of the `Config` that gives them
Names = str | Callable[[Any], str]
Row = tuple[str, int, int, int, int | None, int | None] | tuple[str, int, int, int, int | None, int | None, dict]


@dataclass(frozen=True)
class Family:
    """The facts about one `model_type` of Hugging Face's `config.json`.

    Attributes:
        architecture: The class that `transformers` loads it with.
        structure: `Config` fields that all members share, the named models too.
        keys: `Config` field -> the `config.json` key that holds it, or several of which the first is written and any
            is read.
        values: `config.json` key -> {its value: the `Config` field's}, where they differ; the first of several is
            written.
        defaults: Values of keys that a `config.json` may lack. `None`: the field is derived from others.
        expects: `config.json` key -> the only values that this family can compute with; the first is written, and is the
            default of a missing key unless `defaults` has another.
        windows: Which layers a sliding window covers, as a cycle of flags over the layers, where `config.json` has no
            `layer_types`; empty: this family has no sliding windows. `"layers"`: from `max_window_layers` on.
        rope_keys: The family's keys for `rope_theta` and `partial_rotary_factor`.
        outer: Our module name -> theirs, outside the blocks.
        blocks: Their name of the list of blocks.
        block: Our module name -> theirs, inside a block. Several, separated by spaces, share one matrix on the other
            side, stacked in this order; `{}` is an expert's index.
        stacked: Our modules, one or several for each expert -> their one tensor (experts, in, out) for all of them, inside a
            block. The columns of its matrices alternate between ours; its biases have `_bias` after the name.
        interleaved_qkv: Their query, key and value rows alternate by head group: q q k v, q q k v, ...
        prefixes: Prefixes of names in some files -> their replacements.
        ignored: Substrings of the names of tensors that are no weights of the text model.
        extra_blocks: Files may hold blocks after the last, for multi-token prediction, which are left out.
        tied: Whether input and output embedding are one matrix if `config.json` does not say.
        tied_models: Patterns of the names of models with tied embeddings, in a family where `tied` is false.
        name_mark: The part of a model's name by which LitGPT 0.5.13 knows the family's norm.
        read: More `Config` fields from `config.json`.
        write: The inverse of `read`.
        models: The named models: their name -> the other keyword arguments of `Config`.
    """

    model_type: str
    architecture: str
    keys: dict[str, str | tuple[str, ...]]
    outer: dict[str, str]
    blocks: str
    block: dict[str, Names]
    structure: dict[str, Any] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    expects: dict[str, tuple] = field(default_factory=dict)
    windows: str = ""
    rope_keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    stacked: dict[str, str] = field(default_factory=dict)
    interleaved_qkv: bool = False
    prefixes: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    extra_blocks: bool = False
    tied: bool = False
    tied_models: str = ""
    name_mark: str = ""
    read: Callable[[Settings], dict] = lambda hf: {}
    write: Callable[[Any], dict] = lambda config: {}
    models: dict[str, dict[str, Any]] = field(default_factory=dict)


def named(shared: dict[str, Any], *rows: Row) -> dict[str, dict[str, Any]]:
    """Named models as keyword arguments of `Config`, keyed by name.

    A row reads `(repositories, n_layer, n_embd, n_head, n_query_groups, intermediate_size[, differences])`; `None`
    leaves a size to be derived. `repositories` are space-separated, `org/a{b,c}d` is short for `org/abd org/acd`, and
    `org/repo=name` gives a model another name than its repository. In `shared` and `differences`, per-layer flags are
    a cycle, say `"110"`, that repeats over the layers.
    """
    models = {}
    for repositories, n_layer, n_embd, n_head, n_query_groups, intermediate_size, *differences in rows:
        sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head}
        optional = {"n_query_groups": n_query_groups, "intermediate_size": intermediate_size}
        sizes |= {k: v for k, v in optional.items() if v is not None}
        values = shared | sizes | (differences[0] if differences else {})
        values |= {k: layer_flags(v, n_layer) for k, v in values.items() if k.endswith("_indices")}
        for entry in (e for pattern in repositories.split() for e in _expand(pattern)):
            repository, _, name = entry.partition("=")
            org, _, repo = repository.partition("/")
            name = name or repo
            models[name] = {"name": name, "hf_config": {"org": org, "name": repo}, **values}
    return models


def layer_flags(cycle: str, n_layer: int) -> list[int]:
    """Repeats a cycle such as `"110"` over the layers."""
    return [int(cycle[i % len(cycle)]) for i in range(n_layer)]


def _expand(pattern: str) -> list[str]:
    """Expands braces, all in step: `"a{,-x}=b{,-x}"` gives `["a=b", "a-x=b-x"]`."""
    start, *groups = pattern.split("{")
    braces = [(options.split(","), rest) for options, rest in (group.split("}") for group in groups)]
    count = len(braces[0][0]) if braces else 1
    return [start + "".join(options[i] + rest for options, rest in braces) for i in range(count)]
