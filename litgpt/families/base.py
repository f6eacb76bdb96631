"""What a family of models is: its named models, its `config.json` and its weight names, as data."""

from typing import Any

Row = tuple[str, int, int, int, int | None, int | None] | tuple[str, int, int, int, int | None, int | None, dict]


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
