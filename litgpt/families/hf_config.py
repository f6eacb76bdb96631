"""Between `config.json` of Hugging Face and the fields of `Config`, both ways."""

from typing import Any

from litgpt.families.base import Family, layer_flags

_SLIDING, _FULL = "sliding_attention", "full_attention"
# Kind of RoPE scaling -> what it needs, and what it may have with what that is otherwise
_YARN = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None, "truncate": True}
_SCALINGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), {}),
    "yarn": (("factor",), _YARN | {"attention_factor": None}),
    "longrope": (("factor", "short_factor", "long_factor"), {"attention_factor": None}),
}


def read_config(family: Family, hf: dict[str, Any]) -> dict[str, Any]:
    """`Config` fields from a `config.json` of this family; `ValueError` for what the family cannot compute."""
    for key, supported in family.expects.items():
        value = hf.get(key, family.defaults.get(key, supported[0]))
        if value not in supported:
            choices = " or ".join(map(repr, supported))
            raise ValueError(f"config.json: {key} = {value!r} is not supported for {family.model_type}, only {choices}")
    fields = dict(family.structure)
    for name, keys in family.keys.items():
        value = _lookup(family, hf, (keys,) if isinstance(keys, str) else keys)
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


def _lookup(family: Family, hf: dict[str, Any], keys: tuple[str, ...]) -> Any:
    for key in keys:
        if key in hf:
            value = hf[key]
            break
    else:
        key = keys[0]
        if key not in family.defaults:
            raise ValueError(f"config.json lacks {key!r}")
        value = family.defaults[key]
    table = family.values.get(key)
    if table is None:
        return value
    if value not in table:
        raise ValueError(f"config.json: {key} = {value!r} is not supported, only {', '.join(map(repr, table))}")
    return table[value]


def _read_rope(family: Family, hf: dict[str, Any]) -> dict[str, Any]:
    """Rotary embedding from `rope_parameters`, or from the older `rope_theta`, `rope_scaling` and family spellings."""
    params = dict(hf.get("rope_parameters") or {})
    local = params.get(_SLIDING)
    params = dict(params.get(_FULL) or params) if local else params
    params = (hf.get("rope_scaling") or {}) | params
    theta_key, partial_key = family.rope_keys

    def setting(name: str, spelling: str, default: Any) -> Any:
        return next((d[k] for d in (params, hf) for k in (name, spelling) if d.get(k) is not None), default)

    theta = setting("rope_theta", theta_key, family.defaults.get("rope_theta", 10000))
    partial = setting("partial_rotary_factor", partial_key, family.defaults.get("partial_rotary_factor", 1.0))
    if partial != 1.0 and "partial_rotary_factor" not in family.defaults:
        raise ValueError(f"config.json: {partial_key} = {partial} is not supported for {family.model_type}, only 1.0")
    fields: dict[str, Any] = {"rope_base": _whole(theta), "rotary_percentage": partial}
    if "rope_local_base_freq" in family.defaults:
        default = family.defaults["rope_local_base_freq"]
        base = local["rope_theta"] if local else hf.get("rope_local_base_freq", default)
        fields["rope_local_base_freq"] = _whole(base)
    kind = params.get("rope_type") or params.get("type") or "default"
    if kind == "linear":
        factor = _whole(params["factor"])
        if isinstance(factor, int) and "rope_local_base_freq" not in fields:
            fields["rope_condense_ratio"] = factor
        else:
            fields["rope_adjustments"] = {"factor": float(factor)}
    elif kind != "default":
        fields["rope_adjustments"] = _read_adjustments(family, kind, params, hf)
    return fields


def _read_adjustments(family: Family, kind: str, params: dict[str, Any], hf: dict[str, Any]) -> dict[str, Any]:
    """RoPE scaling, other than linear, as `Config.rope_adjustments`."""
    if kind in ("su", "yarn") and "short_factor" in params:
        kind = "longrope"  # former names of it in Phi-3
    needed, optional = _SCALINGS.get(kind, ((), {}))
    if not needed:
        known = ", ".join(map(repr, ("linear", *_SCALINGS)))
        raise ValueError(f"config.json: RoPE scaling of type {kind!r} is not supported, only {known}")
    length = hf.get("max_position_embeddings", family.defaults.get("max_position_embeddings"))
    key = "original_max_position_embeddings"
    original = hf.get(key) or family.defaults.get(key) or params.get(key) or length
    adjustments: dict[str, Any] = {"original_max_seq_len": original}
    if kind != "llama3":
        params = params | {"factor": params.get("factor") or length / original}
    for name in needed:
        if name not in params:
            raise ValueError(f"config.json: RoPE scaling of type {kind!r} lacks {name!r}")
        adjustments[name] = params[name]
    for name, default in optional.items():
        if name in ("beta_fast", "beta_slow"):
            adjustments[name] = params.get(name) or default
        elif params.get(name, default) not in (default, None):
            adjustments[name] = params[name]
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


def _read_windows(family: Family, hf: dict[str, Any], n_layer: int) -> dict[str, Any]:
    """Sliding windows from `sliding_window` and either `layer_types` or the family's pattern."""
    size = hf.get("sliding_window", family.defaults.get("sliding_window"))
    enabled = hf.get("use_sliding_window", family.defaults.get("use_sliding_window", True))
    if not family.windows or size is None or not enabled:
        flags = [0] * n_layer
    elif hf.get("layer_types"):
        if unknown := set(hf["layer_types"]) - {_SLIDING, _FULL}:
            raise ValueError(f"config.json: layer_types of kind {', '.join(sorted(unknown))} are not supported")
        flags = [int(kind == _SLIDING) for kind in hf["layer_types"]]
    elif family.windows == "layers":
        first = hf.get("max_window_layers", family.defaults["max_window_layers"])
        flags = [int(i >= first) for i in range(n_layer)]
    else:
        period = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern")
        flags = layer_flags("1" * (period - 1) + "0" if period else family.windows, n_layer)
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
    """An `int` where the number is whole, as the fields of the named models are."""
    return int(number) if float(number).is_integer() else number
