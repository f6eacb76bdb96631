"""What a family of models is: its named models, its `config.json` and its weight names, as data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from litgpt.settings import Settings

# What a Hugging Face name, or a group of names, of the block depends on: a string, or a function of the `Config`.
Names = str | Callable[[Any], str]
Row = tuple[str, int, int, int, int | None, int | None] | tuple[str, int, int, int, int | None, int | None, dict]


@dataclass(frozen=True)
class Family:
    """What is known about one `model_type` of Hugging Face's `config.json`.

    Attributes:
        model_type: `model_type` in `config.json`.
        architecture: The class that `transformers` loads it with.
        structure: `Config` fields that all members share, the named models too.
        keys: `Config` field -> the `config.json` key that holds it, or several of which the first is written and any
            is read.
        values: `config.json` key -> {its value: the `Config` field's}, where they differ; the first of several is
            written.
        defaults: What a `config.json` means that leaves the key out. `None`: the field is derived from others.
        expects: `config.json` key -> the only values that this family can compute with; the first is written, and
            is what a missing key means unless `defaults` says otherwise.
        windows: Which layers a sliding window covers, as a cycle of flags over the layers, where `config.json` has no
            `layer_types`; empty: this family has no sliding windows. `"layers"`: from `max_window_layers` on.
        rope_keys: How the family spells `rope_theta` and `partial_rotary_factor`.
        outer: Our module name -> theirs, outside the blocks.
        blocks: Their name of the list of blocks.
        block: Our module name -> theirs, inside a block. Several, separated by spaces, share one matrix on the other
            side, stacked in this order; `{}` stands for an expert's index.
        stacked: Our modules, one or several for each expert -> their one tensor (experts, in, out) of all of them, inside a
            block. The columns of its matrices alternate between ours; its biases have `_bias` after the name.
        interleaved_qkv: Their query, key and value rows alternate by head group: q q k v, q q k v, ...
        prefixes: What the names may begin with in some files, and what to read instead.
        ignored: Pieces of names of tensors that carry no weights of the text model.
        extra_blocks: Files may hold blocks after the last, for multi-token prediction, which are left out.
        tied: Whether input and output embedding are one matrix when `config.json` does not say.
        tied_models: Patterns of the names of models of which it is, in a family where it is not otherwise.
        name_mark: What LitGPT 0.5.13 looks for in a model's name to know the family's norm.
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
    leaves a size to be derived. `repositories` are space-separated, `org/a{b,c}d` stands for `org/abd org/acd`, and
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
    """Braces of a pattern, all varying together: `"a{,-x}=b{,-x}"` gives `["a=b", "a-x=b-x"]`."""
    pieces = [piece.split("}") for piece in pattern.split("{")]
    count = len(pieces[1][0].split(",")) if len(pieces) > 1 else 1
    return [pieces[0][0] + "".join(options.split(",")[i] + rest for options, rest in pieces[1:]) for i in range(count)]
