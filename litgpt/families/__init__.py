"""One module per family of models, with all facts about it; none of them imports torch."""

import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from litgpt.settings import Settings

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.families.base import Family

# module -> its `model_type`s
_MODULES = {
    "llama": ("llama", "smollm3"),
    "neox": ("gpt_neox",),
    "falcon": ("falcon",),
    "stablelm": ("stablelm",),
    "mistral": ("mistral", "mixtral"),
    "olmo": ("olmo", "olmo2"),
    "gemma": ("gemma", "gemma2", "gemma3_text"),
    "phi": ("phi", "phi3"),
    "deepseek": ("deepseek_v3",),
    "granite": ("granite",),
    "gpt_oss": ("gpt_oss",),
    "qwen": ("qwen2", "qwen3", "qwen3_moe"),
}
# `model_type`s that are read as others: multimodal models as their text part, and former names
_ALIASES = {"gemma3": "gemma3_text", "RefinedWeb": "falcon", "RefinedWebModel": "falcon"}


def families() -> "Iterator[Family]":
    """Every family; a module is imported when it is reached."""
    for module in _MODULES:
        yield from import_module(f"litgpt.families.{module}").FAMILIES


@cache
def named_models() -> dict[str, dict[str, Any]]:
    """Every named model as keyword arguments of `Config`, keyed by name."""
    return {name: family.structure | model for family in families() for name, model in family.models.items()}


def is_tied(name: str) -> bool:
    """Whether input and output embedding of a named model are one matrix."""
    family = next((family for family in families() if name in family.models), None)
    return family is not None and (family.tied or any(fnmatchcase(name, p) for p in family.tied_models.split()))


def family_of_type(model_type: str) -> "Family":
    """The family of a `model_type`; `ValueError` naming the nearest supported ones if there is none."""
    model_type = _ALIASES.get(model_type, model_type)
    for module, types in _MODULES.items():
        if model_type in types:
            return import_module(f"litgpt.families.{module}").FAMILIES[types.index(model_type)]
    from difflib import get_close_matches

    known = sorted(t for types in _MODULES.values() for t in types)
    close = get_close_matches(model_type.lower(), known, n=3, cutoff=0.5)
    nearest = f"the nearest supported: {', '.join(close)}; " if close else ""
    raise ValueError(f"Architecture {model_type!r} is not supported ({nearest}all supported: {', '.join(known)})")


def family_of_hf(hf: Settings) -> "tuple[Family, Settings]":
    """The family of a `config.json` and the part of it that describes the text model."""
    model_type = hf.text("model_type", None, null=True)
    if not model_type:
        architecture = next(iter(hf.value("architectures", list[str] | None, None) or ()), "")
        by_class = {family.architecture: family.model_type for family in families()}
        model_type = by_class.get(architecture, architecture)
        if not model_type:
            raise ValueError(f"{hf.where} names neither a 'model_type' nor 'architectures'")
    try:
        family = family_of_type(model_type)
    except ValueError as error:
        raise ValueError(f"{hf.where}: {error}") from None
    if hf.is_set("text_config"):
        of_all = {key: hf.value(key, object) for key in ("tie_word_embeddings", "eos_token_id") if key in hf}
        hf = Settings(of_all, hf.where).merged(hf.section("text_config"))
    return family, hf


def fields_from_hf(hf: Settings, unmet: "Callable[[str, Any], str | None]", name: str = "") -> dict[str, Any]:
    """Keyword arguments of `Config` from a `config.json`.

    `name` is the model's, by default from the file; the name of a named model gives the model that one's `name` and
    `hf_config`. `unmet` is `config.unmet`. Raises `ValueError` for an architecture or a setting that is not supported.
    """
    from litgpt.families.hf_config import read_config

    family, text = family_of_hf(hf)
    fields = read_config(family, text, unmet)
    repository = name or hf.text("_name_or_path", None, null=True) or ""
    name = repository.rstrip("/").rpartition("/")[2]
    for model in family.models.values():
        if name in (model["name"], model["hf_config"]["name"]):
            return fields | {"name": model["name"], "hf_config": dict(model["hf_config"])}
    if family.name_mark not in name:
        name = f"{family.name_mark}-{name}"
    return fields | {"name": name, "hf_config": {"name": name, "model_type": family.model_type}}


def in_hf_words(message: str, hf: Settings) -> str:
    """An error message of `Config` with the keys of a `config.json` in place of its fields."""
    from litgpt.families.hf_config import keys_of_fields

    return renamed(message, keys_of_fields(*family_of_hf(hf)))


def renamed(message: str, names: dict[str, str]) -> str:
    """A message with other names, which are whole words, for those in it."""
    return re.sub(r"\b\w+\b", lambda word: names.get(word[0], word[0]), message)


def hf_from_config(config: "Config") -> "tuple[Family, dict[str, Any]]":
    """The family of a config and its `config.json`, without token ids and data type.

    Raises `ValueError` if no supported architecture of `transformers` computes the same.
    """
    from litgpt.families.hf_config import write_config

    for family in _candidates(config):
        hf = write_config(family, config)
        try:
            derived = type(config).from_hf(hf, name=config.name)
        except ValueError:
            continue
        if same_architecture(derived, config):
            return family, hf
    raise ValueError(f"No architecture of transformers expresses the model config {config.name!r}")


def same_architecture(a: "Config", b: "Config") -> bool:
    """Whether two configs compute the same, whatever their names."""
    return _architecture(a) == _architecture(b)


def family_of(config: "Config") -> "Family":
    """The family whose weight names a model of this config has on Hugging Face."""
    return hf_from_config(config)[0]


def _candidates(config: "Config") -> "Iterator[Family]":
    """All families, those that the config's name or origin is of first."""

    def unlikely(family: "Family") -> bool:
        same_type = config.hf_config.get("model_type") == family.model_type
        origins = [model["hf_config"] for model in family.models.values()]
        return not (same_type or config.name in family.models or config.hf_config in origins)

    yield from sorted(families(), key=unlikely)


def _architecture(config: "Config") -> dict[str, Any]:
    """The fields that change what a model computes, normalised so that equal models have equal fields."""
    fields = config.to_dict() | {"norm_unit_offset": config.norm_unit_offset, "norm_affine": config.norm_affine}
    for key in ("name", "hf_config", "vocab_size", "padding_multiple"):
        del fields[key]
    if config.n_expert_groups is None:  # only the router with groups has a choice
        del fields["norm_topk_prob"]
    if config.latent_attention is None:
        fields["attention_scores_scalar"] = config.attention_scores_scalar or config.head_size
    else:  # latent attention has sizes of its own
        for key in ("head_size", "rotary_percentage", "n_query_groups"):
            del fields[key]
    if config.mlp_class_name == "LLaMAMoE" and config.moe_intermediate_size is None:
        fields["moe_intermediate_size"] = config.intermediate_size
    if config.sliding_window_size is None or not any(config.sliding_window_indices):
        fields["sliding_window_size"] = fields["sliding_window_indices"] = None
    if config.rope_local_base_freq is None:
        fields["rope_indices"] = None
    if "beta_fast" in (yarn := config.rope_adjustments or {}):  # `config.json` gives such a model its whole context
        fields["block_size"] = max(config.block_size, int(yarn["original_max_seq_len"] * yarn["factor"]))
    if not any(config.nope_indices or ()):
        fields.pop("nope_indices", None)
    return fields
