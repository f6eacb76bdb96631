"""Converts Hugging Face's `config.json` to fields of `Config`, and back."""

from collections.abc import Callable
from typing import Any

from litgpt.families.base import Family, layer_flags
from litgpt.settings import Settings

_SLIDING, _FULL = "sliding_attention", "full_attention"
_ORIGINAL = "original_max_position_embeddings"
# Kind of RoPE scaling -> its required keys
_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor", "factor"),
}
# Optional keys of YaRN and LongRoPE, and their defaults
_OPTIONAL = {
    "yarn": {"mscale": None, "mscale_all_dim": None, "truncate": True, "attention_factor": None},
    "longrope": {"attention_factor": None},
}
_YARN_BETAS = {"beta_fast": 32, "beta_slow": 1}
_ROPE_KEYS = {
    *("type", "rope_type", "rope_theta", "partial_rotary_factor", _ORIGINAL, "finetuned"),
    *(key for keys in (*_SCALINGS.values(), *_OPTIONAL.values(), _YARN_BETAS) for key in keys),
}
# For all families: keys whose other values would be another model
_EXPECTED = {"is_encoder_decoder": (False,), "add_cross_attention": (False,), "is_causal": (True,)}
# Fields that are derived where `config.json` has null
_DERIVED = ("n_query_groups", "head_size", "intermediate_size", "n_shared_expert")
_NULLABLE = (*_DERIVED, "attention_logit_softcapping", "final_logit_softcapping")


def read_config(family: Family, hf: Settings, unmet: Callable[[str, Any], str | None]) -> dict[str, Any]:
    """`Config` fields from a `config.json` of this family; `ValueError` for values that the family cannot compute with.

    `unmet` is `config.unmet`.
    """
    for key, supported in (_EXPECTED | family.expects).items():
        hf.only(key, supported, family.defaults.get(key, supported[0]), family.model_type)
    fields = dict(family.structure)
    for name, keys in family.keys.items():
        value, key = _lookup(family, hf, (keys,) if isinstance(keys, str) else keys)
        derived = value is None and name in _NULLABLE
        if key not in family.values and not derived and (expected := unmet(name, value)) is not None:
            raise hf.error(key, f"must be {expected}")
        if value is not None:
            fields[name] = value
    fields["vocab_size"] = fields["padded_vocab_size"]
    return fields | _read_rope(family, hf) | _read_windows(family, hf, fields["n_layer"]) | family.read(hf)


def write_config(family: Family, config: Any) -> dict[str, Any]:
    """The `config.json` of a `Config`, with sizes and structure only: no token ids, no data type."""
    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    hf |= {key: supported[0] for key, supported in family.expects.items()}
    for name, keys in family.keys.items():
        key = keys if isinstance(keys, str) else keys[0]
        value = getattr(config, name)
        table = family.values.get(key, {})
        hf[key] = next((theirs for theirs, ours in table.items() if ours == value), value)
    return hf | _write_rope(family, config) | _write_windows(family, config) | family.write(config)


def keys_of_fields(family: Family, hf: Settings) -> dict[str, str]:
    """`Config` field -> the key of this `config.json` that decides it."""
    theta_key, partial_key = family.rope_keys
    keys = {"n_query_groups": "num_kv_heads", "rope_base": theta_key, "rotary_percentage": partial_key}
    keys |= {"rope_adjustments": "rope_scaling", "rope_condense_ratio": "rope_scaling.factor"}
    keys |= {"original_max_seq_len": _ORIGINAL, "sliding_window_size": "sliding_window"}
    for name, theirs in family.keys.items():
        theirs = (theirs,) if isinstance(theirs, str) else theirs
        keys[name] = next((key for key in theirs if key in hf), theirs[0])
    return keys


def _lookup(family: Family, hf: Settings, keys: tuple[str, ...]) -> tuple[Any, str]:
    """The value of a field, and its key."""
    key = next((key for key in keys if key in hf), keys[0])
    default = (family.defaults[key],) if key in family.defaults else ()
    if (table := family.values.get(key)) is None:
        return hf.value(key, object, *default), key
    value = hf.text(key, *default)
    if value not in table:
        raise hf.error(key, f"is not supported, only {', '.join(map(repr, table))}")
    return table[value], key


def _rope_sections(family: Family, hf: Settings) -> tuple[Settings, Settings | None]:
    """The RoPE settings of a `config.json`: of full layers, and of layers with a sliding window if they have their own.

    As in transformers 5: `rope_scaling`, the older key, replaces `rope_parameters`; for Gemma 3 it completes those of the
    full layers.
    """
    scaling, params = hf.section("rope_scaling"), hf.section("rope_parameters")
    if "rope_local_base_freq" in family.defaults:
        full = params.section(_FULL) if _FULL in params or _SLIDING in params else params
        return full.merged(scaling), params.section(_SLIDING)
    chosen = scaling if len(scaling) else params
    if _FULL not in chosen and _SLIDING not in chosen:
        return chosen, None
    given = [chosen.section(key) for key in (_FULL, _SLIDING) if chosen.is_set(key)]
    if len(given) == 2 and not given[0].equals(given[1]):
        raise chosen.error(_SLIDING, f"is not supported for {family.model_type}: it has to equal {_FULL}")
    return (given[0] if given else Settings({})), None


def _read_rope(family: Family, hf: Settings) -> dict[str, Any]:
    """Rotary embedding from `rope_parameters`, or from the older `rope_theta`, `rope_scaling` and the family's own keys."""
    params, local = _rope_sections(family, hf)
    theta_key, partial_key = family.rope_keys

    def setting(name: str, spelling: str, default: float) -> float:
        places = ((params, name), (params, spelling), (hf, spelling), (hf, name))
        return next((place.number(key, least=0) for place, key in places if place.is_set(key)), default)

    theta = setting("rope_theta", theta_key, family.defaults.get("rope_theta", 10000))
    partial = setting("partial_rotary_factor", partial_key, family.defaults.get("partial_rotary_factor", 1.0))
    if partial != 1.0 and "partial_rotary_factor" not in family.defaults:
        raise ValueError(f"{hf.where}: {partial_key} = {partial} is not supported for {family.model_type}, only 1.0")
    fields: dict[str, Any] = {"rope_base": _whole(theta), "rotary_percentage": partial}
    if local is not None:
        base = hf.number("rope_local_base_freq", family.defaults["rope_local_base_freq"], positive=True)
        fields["rope_local_base_freq"] = _whole(local.number("rope_theta", base, positive=True))
        if _rope_kind(local) != "default":
            raise local.error("rope_type", f"is not supported for layers of {family.model_type} with a sliding window")
    kind = _rope_kind(params)
    if kind in ("su", "yarn") and "short_factor" in params:
        kind = "longrope"  # Phi-3's former names for it
    if kind == "default":
        return fields
    if kind not in _SCALINGS:
        known = ", ".join(map(repr, _SCALINGS))
        raise ValueError(f"{hf.where}: RoPE scaling of type {kind!r} is not supported, only {known}")
    adjustments = _read_adjustments(family, kind, params, hf)
    if kind == "yarn":  # the file may have the context of the training before YaRN
        stretched = int(adjustments["original_max_seq_len"] * adjustments["factor"])
        fields["block_size"] = max(_context(family, hf), stretched)
    elif kind == "linear" and isinstance(adjustments["factor"], int) and local is None:
        return fields | {"rope_condense_ratio": adjustments["factor"]}
    return fields | {"rope_adjustments": adjustments}


def _rope_kind(params: Settings) -> str:
    for key in params:
        if key not in _ROPE_KEYS and params.is_set(key):
            raise params.error(key, "is not understood")
    return params.text("rope_type" if params.is_set("rope_type") else "type", None, null=True) or "default"


def _context(family: Family, hf: Settings) -> int:
    return hf.whole("max_position_embeddings", family.defaults.get("max_position_embeddings"))


def _read_adjustments(family: Family, kind: str, params: Settings, hf: Settings) -> dict[str, Any]:
    """RoPE scaling as `Config.rope_adjustments`."""
    adjustments: dict[str, Any] = {}
    length = _context(family, hf)
    if kind != "linear":
        original = hf.whole(_ORIGINAL, None, null=True) or family.defaults.get(_ORIGINAL)
        original = original or params.whole(_ORIGINAL, None, null=True) or length
        adjustments["original_max_seq_len"] = original
    for name in _SCALINGS[kind]:
        if params.is_set(name):
            value = params.number(name, positive=True) if name.endswith("_freq_factor") or name == "factor" else None
            adjustments[name] = params.value(name, list[float]) if value is None else value
        elif name == "factor" and (kind == "longrope" or (kind == "yarn" and length > original)):
            adjustments[name] = length / original
        else:
            raise ValueError(f"{hf.where}: RoPE scaling of type {kind!r} lacks {name!r}")
    if kind == "linear":
        factor = _whole(adjustments["factor"])
        adjustments["factor"] = factor if "rope_local_base_freq" not in family.defaults else float(factor)
    if kind == "yarn":
        adjustments |= {
            name: params.number(name, None, least=0, null=True) or default for name, default in _YARN_BETAS.items()
        }
    for name, default in _OPTIONAL.get(kind, {}).items():
        value = params.flag(name, default) if default is True else params.number(name, None, least=0, null=True)
        if value not in (default, None):
            adjustments[name] = value
    return adjustments


def _write_rope(family: Family, config: Any) -> dict[str, Any]:
    theta_key, partial_key = family.rope_keys
    hf: dict[str, Any] = {theta_key: float(config.rope_base), "rope_scaling": None}
    if config.rotary_percentage != 1.0 or "partial_rotary_factor" in family.defaults:
        hf[partial_key] = config.rotary_percentage
    if config.rope_local_base_freq is not None:
        hf["rope_local_base_freq"] = float(config.rope_local_base_freq)
    adjustments = dict(config.rope_adjustments or {})
    if config.rope_condense_ratio != 1:
        adjustments["factor"] = float(config.rope_condense_ratio)
    if adjustments:
        kinds = {"long_factor": "longrope", "beta_fast": "yarn", "low_freq_factor": "llama3"}
        kind = next((kind for key, kind in kinds.items() if key in adjustments), "linear")
        original = adjustments.pop("original_max_seq_len", None)
        hf["rope_scaling"] = {"rope_type": kind, **adjustments}
        if original is not None:
            hf["rope_scaling"]["original_max_position_embeddings"] = original
        if kind == "longrope":
            hf["original_max_position_embeddings"] = original  # where Phi-3 keeps it
            if adjustments["factor"] == config.block_size / original:
                del hf["rope_scaling"]["factor"]  # Phi-3 has no such key
    return hf


def _read_windows(family: Family, hf: Settings, n_layer: int) -> dict[str, Any]:
    """Sliding windows from `sliding_window` and either `layer_types` or the family's pattern."""
    size = hf.whole("sliding_window", family.defaults.get("sliding_window"), null=True)
    enabled = hf.flag("use_sliding_window", family.defaults.get("use_sliding_window", True))
    kinds = hf.value("layer_types", list[str] | None, None)
    if not family.windows or size is None or not enabled:
        flags = [0] * n_layer
    elif kinds:
        if unknown := set(kinds) - {_SLIDING, _FULL}:
            raise ValueError(f"{hf.where}: layer_types of kind {', '.join(sorted(unknown))} are not supported")
        if len(kinds) != n_layer:
            raise hf.error("layer_types", f"must have {n_layer} entries, one a layer")
        flags = [int(kind == _SLIDING) for kind in kinds]
    elif family.windows == "layers":
        first = hf.whole("max_window_layers", family.defaults["max_window_layers"], least=0)
        flags = [int(i >= first) for i in range(n_layer)]
    else:
        names = ("sliding_window_pattern", "_sliding_window_pattern")
        period = next((hf.whole(name) for name in names if hf.is_set(name)), None)
        cycle = layer_flags(family.windows, n_layer)
        flags = cycle if period is None else [int((i + 1) % period != 0) for i in range(n_layer)]
    fields: dict[str, Any] = {"sliding_window_size": size, "sliding_window_indices": flags} if any(flags) else {}
    if "rope_local_base_freq" in family.defaults:
        fields["rope_indices"] = flags
    return fields


def _write_windows(family: Family, config: Any) -> dict[str, Any]:
    if not family.windows:
        return {}
    if config.sliding_window_size is None:
        return {"sliding_window": None}
    hf: dict[str, Any] = {"sliding_window": config.sliding_window_size}
    if family.windows != "1":
        hf["layer_types"] = [_SLIDING if flag else _FULL for flag in config.sliding_window_indices]
    if "use_sliding_window" in family.defaults:
        hf["use_sliding_window"] = True
    return hf


def _whole(number: float) -> float | int:
    """An `int` if the number is whole, as in the named models."""
    return int(number) if float(number).is_integer() else number
