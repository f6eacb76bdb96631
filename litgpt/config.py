"""The architecture of a model: sizes and flags as one dataclass, independent of torch."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial, wraps
from numbers import Real
from pathlib import Path
from typing import Any

from litgpt.settings import LARGEST, Settings, described, fits, read_json, read_yaml, shown

# Called as `hook(x, block_idx, input_pos)`: a layer's input (B, T, E), its number, the position of the first token
StartOfLayerHook = Callable[[Any, int, int | None], None]

_CHOICES = {
    "norm_class_name": ("LayerNorm", "RMSNorm"),
    "norm_qk_type": ("default", "olmo2"),
    "mlp_class_name": ("GptNeoxMLP", "LLaMAMLP", "GemmaMLP", "LLaMAMoE"),
    "gelu_approximate": ("none", "tanh"),
}
# More are a mistake in a file that would take minutes to build, or make a matrix larger than torch can count
_MOST = {"n_layer": 2000, "n_expert": 2000, "n_embd": 2**20}
# Fields that may be 0 or negative; all other numbers are positive, where they are not None
_MAY_BE_ZERO = ("norm_eps", "rotary_percentage", "first_k_dense_replace")
_MAY_BE_ZERO += ("n_expert", "n_expert_per_token", "n_shared_expert")
_MAY_BE_NEGATIVE = ("embedding_multiplier", "residual_multiplier", "routed_scaling_factor")
# Numbers, and lists of numbers, of `rope_adjustments`
_ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
_ROPE_NUMBERS += ("mscale", "mscale_all_dim", "attention_factor")
_ROPE_LISTS = ("short_factor", "long_factor")
# Written to `model_config.yaml` only where the model's name, or the default, does not imply them: LitGPT 0.5.13 refuses
# fields it does not know.
_IMPLIED_BY_NAME = ("norm_unit_offset", "norm_affine")
_NOT_IN_LITGPT = (*_IMPLIED_BY_NAME, "nope_indices", "attention_sinks", "swiglu_limit", "router_bias")
_NOT_IN_LITGPT += ("embedding_multiplier", "residual_multiplier", "logits_divisor")

ADAPTER_FIELDS = ("adapter_prompt_length", "adapter_start_layer")  # of the configs in `litgpt.adapter`


@dataclass
class Config:
    """Sizes and flags of one model.

    Fields left at `None` are derived from the others: `head_size = n_embd / n_head`, `n_query_groups = n_head`,
    `intermediate_size = 4 * n_embd`, and `padded_vocab_size`, the rows of the embedding, is `vocab_size` rounded up
    to a multiple of `padding_multiple`. Raises `ValueError` naming an unknown field or a field with an invalid value.
    """

    name: str = ""
    hf_config: dict = field(default_factory=dict)
    # sizes
    block_size: int = 4096
    n_layer: int = 16
    n_embd: int = 4096
    vocab_size: int = 50254
    padding_multiple: int = 512
    padded_vocab_size: int | None = None
    # norms and residual stream
    norm_class_name: str = "LayerNorm"
    norm_eps: float = 1e-5
    norm_qk: bool = False
    norm_qk_type: str = "default"
    post_attention_norm: bool = False
    post_mlp_norm: bool = False
    parallel_residual: bool = True
    shared_attention_norm: bool = False
    # attention: `n_query_groups` key/value heads serve `n_head` query heads
    n_head: int = 32
    head_size: int | None = None
    n_query_groups: int | None = None
    attn_bias: bool = False
    attention_scores_scalar: float | None = None
    sliding_window_size: int | None = None
    sliding_window_indices: list[int] | None = None
    attention_logit_softcapping: float | None = None
    # rotary position embedding
    rope_base: float = 10000
    rotary_percentage: float = 0.25
    rope_condense_ratio: float = 1
    rope_adjustments: dict | None = None
    rope_interleave: bool = False
    # feed-forward
    intermediate_size: int | None = None
    moe_intermediate_size: int | None = None
    bias: bool = True
    mlp_class_name: str = "GptNeoxMLP"
    gelu_approximate: str = "none"
    n_expert: int = 0
    n_shared_expert: int | None = None
    n_expert_groups: int | None = None
    n_topk_groups: int | None = None
    n_topk_scores_per_group: int | None = None
    n_expert_per_token: int = 0
    first_k_dense_replace: int | None = None
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False
    # before and after the blocks
    scale_embeddings: bool = False
    lm_head_bias: bool = False
    final_logit_softcapping: float | None = None
    norm_1: bool = True
    norm_2: bool = True
    latent_attention: dict | None = None
    rope_local_base_freq: float | None = None
    rope_indices: list[int] | None = None
    # fields that LitGPT derives from the model's name, and we too where they are None
    norm_unit_offset: bool | None = None
    norm_affine: bool | None = None
    # fields of later families: layers without rotary embedding (flags), learnt attention sinks (one a head),
    # the clamp of the experts' gate and up projections, the router's bias, factors on the residual stream and logits
    nope_indices: list[int] | None = None
    attention_sinks: bool = False
    swiglu_limit: float | None = None
    router_bias: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    # `hook(x, block_idx, input_pos)`, the default of `GPT.set_start_of_layer_hook`; never written to a file
    start_of_layer_hook: StartOfLayerHook | None = field(default=None, repr=False, compare=False)

    def __new__(cls, *args: Any, **kwargs: Any) -> "Config":
        unknown = [key for key in kwargs if key not in cls.__dataclass_fields__]
        if unknown:
            hints = [f"{key!r}{_did_you_mean(key, cls.__dataclass_fields__)}" for key in unknown]
            raise ValueError(f"Unknown model config field: {', '.join(hints)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.hf_config = {} if self.hf_config is None else self.hf_config
        if not self.name and isinstance(self.hf_config, dict):
            self.name = self.hf_config.get("name", "")
        self.name = str(self.name)
        for f in fields(Config):
            if f.name != "start_of_layer_hook" and (expected := unmet(f.name, getattr(self, f.name))) is not None:
                self._require(f.name, False, expected)
        self.hf_config = dict(self.hf_config)
        self._derive()
        self._validate()

    def _derive(self) -> None:
        if self.head_size is None:
            self._require("n_embd", self.n_embd % self.n_head == 0, f"a multiple of n_head = {self.n_head}")
            self.head_size = self.n_embd // self.n_head
        if self.n_query_groups is None or self.latent_attention is not None:  # all latent heads share one latent vector
            self.n_query_groups = self.n_head
        if self.padded_vocab_size is None:
            self.padded_vocab_size = find_multiple(self.vocab_size, self.padding_multiple)
        self.vocab_size = min(self.vocab_size, self.padded_vocab_size)
        if self.intermediate_size is None:
            self._require("intermediate_size", self.mlp_class_name != "LLaMAMLP", "given for LLaMAMLP")
            self.intermediate_size = 4 * self.n_embd
        self.rope_n_elem = int(self.rotary_percentage * self.head_size)
        needed_with = {"sliding_window_indices": "sliding_window_size", "rope_indices": "rope_local_base_freq"}
        for key in ("sliding_window_indices", "rope_indices", "nope_indices"):
            if getattr(self, needed_with.get(key, key)) is not None:
                setattr(self, key, check_indicator_and_length(getattr(self, key), key, self.n_layer))
        for key in _IMPLIED_BY_NAME:
            if getattr(self, key) is None:
                setattr(self, key, self._implied(key))
        if self.latent_attention is not None:
            sizes = self._section("latent_attention")
            self.q_lora_rank: int | None = sizes.whole("q_lora_rank", None, null=True)  # None: queries not compressed
            for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
                setattr(self, key, sizes.whole(key))
            self.qk_head_dim = self.qk_rope_head_dim + self.qk_nope_head_dim
            self.rope_n_elem = self.qk_rope_head_dim

    def _validate(self) -> None:
        for key, choices in _CHOICES.items():
            self._require(key, getattr(self, key) in choices, f"one of {', '.join(choices)}")
        self._require("n_query_groups", self.n_head % self.n_query_groups == 0, f"a divisor of n_head = {self.n_head}")
        self._require("rotary_percentage", self.rotary_percentage <= 1, "between 0 and 1")
        if self.rope_adjustments is not None:
            self._check_rope()
        if self.latent_attention is not None:
            capped = self.attention_logit_softcapping is not None
            self._require("bias", not (self.bias and capped), "false with latent attention and soft-capping")
        shared = self.shared_attention_norm and not self.parallel_residual
        self._require("shared_attention_norm", not shared, "false without parallel_residual")
        post_norms = self.post_attention_norm or self.post_mlp_norm
        self._require("residual_multiplier", self.residual_multiplier == 1 or not post_norms, "1 with post norms")
        if self.mlp_class_name == "LLaMAMoE":
            if self.n_expert or self.first_k_dense_replace is None:  # else building the first mixture raises
                self._require("n_expert", self.n_expert > 0, "positive with LLaMAMoE")
                self._require("n_expert_per_token", 0 < self.n_expert_per_token <= self.n_expert, "1 to n_expert")
        else:
            self._require("first_k_dense_replace", self.first_k_dense_replace is None, "left out without LLaMAMoE")
        if self.n_expert_groups is not None:
            groups = self.n_expert_groups
            self._require("n_expert_groups", groups > 0 and self.n_expert % groups == 0, "a divisor of n_expert")
            self._require("n_topk_groups", self.n_topk_groups is not None, "given with n_expert_groups")
            scores = self.n_topk_scores_per_group
            self._require(
                "n_topk_scores_per_group", scores is not None and scores <= self.n_expert // groups, "a group's size"
            )

    def _check_rope(self) -> None:
        """Checks that `rope_adjustments` have all keys of one kind of scaling, and no unknown ones."""
        given = self._section("rope_adjustments")
        if unknown := sorted(set(map(str, given)) - {"original_max_seq_len", "truncate", *_ROPE_NUMBERS, *_ROPE_LISTS}):
            raise ValueError(f"{given.where}: {', '.join(unknown)} of rope_adjustments is not known")
        given.number("factor", positive=True)
        for key in _ROPE_NUMBERS:
            given.number(key, None, positive=not key.startswith("mscale"), least=0, null=True)
        given.flag("truncate", True)
        for key in _ROPE_LISTS:
            factors = given.value(key, list[float], None)
            if factors is not None and (len(factors) != self.rope_n_elem // 2 or min(factors, default=1) <= 0):
                raise given.error(key, f"must be {self.rope_n_elem // 2} positive numbers")
        for group in (_ROPE_LISTS, ("beta_fast", "beta_slow"), ("low_freq_factor", "high_freq_factor")):
            if any(given.is_set(key) for key in group):
                for key in (*group, "original_max_seq_len"):
                    given.value(key, object)
        given.whole("original_max_seq_len", None, least=2, null=True)
        if given.is_set("low_freq_factor") and not given.number("low_freq_factor") < given.number("high_freq_factor"):
            raise given.error("high_freq_factor", "must be larger than low_freq_factor")
        if given.is_set("beta_fast"):
            self._require("rope_base", self.rope_base > 1, "above 1 with YaRN")

    def _section(self, key: str) -> Settings:
        return Settings({key: getattr(self, key)}, f"Model config {shown(self.name)}").section(key)

    def _require(self, key: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"Model config {shown(self.name)}: {key} = {shown(getattr(self, key))} must be {expected}")

    def _implied(self, key: str) -> Any:
        if key == "norm_unit_offset":
            return self.norm_class_name == "RMSNorm" and "Gemma" in self.name
        if key == "norm_affine":
            return not (self.norm_class_name == "LayerNorm" and "OLMo" in self.name)
        return self.__dataclass_fields__[key].default

    @property
    def cache_groups(self) -> int:
        """Key/value heads in a cache: `n_query_groups`, or 1 with latent attention, whose heads share one."""
        return self.n_query_groups if self.latent_attention is None else 1

    @property
    def cache_head_size(self) -> int:
        """Size of a key in a cache."""
        return self.head_size if self.latent_attention is None else self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def cache_value_size(self) -> int | None:
        """With latent attention, the number of a key's first elements that are the value; else `None`."""
        return None if self.latent_attention is None else self.kv_lora_rank

    def window(self, block_idx: int) -> int | None:
        """The sliding-window size of a layer in tokens, `None` for full attention."""
        if self.sliding_window_size is None or not self.sliding_window_indices[block_idx]:
            return None
        return self.sliding_window_size

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for `model_config.yaml`."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "start_of_layer_hook"}
        return {k: v for k, v in values.items() if k not in _NOT_IN_LITGPT or v != self._implied(k)}

    @classmethod
    def from_name(cls, name: str, **kwargs: Any) -> "Config":
        """The named model `name` or `org/name` with the fields in `kwargs` replaced.

        Raises `ValueError` with the nearest names for an unknown name.
        """
        from litgpt.families import named_models

        models = named_models()
        by_other_names: dict[str, dict[str, Any]] = {}
        for model in models.values():
            org, repo = model["hf_config"]["org"], model["hf_config"]["name"]
            for other in (repo, f"{org}/{repo}", f"{org}/{model['name']}"):
                by_other_names.setdefault(other, model)
        match = models.get(name) or by_other_names.get(name)
        if match is None:
            raise ValueError(f"{name!r} is not a supported config name{_did_you_mean(name, models | by_other_names)}")
        return cls(**{**_plain(match), **kwargs})

    @classmethod
    def extending(cls, config: "Config", **kwargs: Any) -> "Config":
        """`config` as one of this class, with the fields in `kwargs` replaced or, in a subclass, added."""
        return cls(**{**{f.name: getattr(config, f.name) for f in fields(config)}, **kwargs})

    @classmethod
    def from_hf(cls, hf: dict[str, Any] | Settings | Path, **kwargs: Any) -> "Config":
        """The config that a Hugging Face `config.json` describes: its values, or its path.

        Raises `ValueError` for an architecture or a setting that is not supported, and a value of the wrong type.
        """
        from litgpt.families import fields_from_hf, in_hf_words

        settings = Settings(read_json(hf), str(hf)) if isinstance(hf, Path) else hf
        settings = settings if isinstance(settings, Settings) else Settings(settings)
        fields = fields_from_hf(settings, partial(unmet, null=False), kwargs.pop("name", ""))
        try:
            return cls(**{**fields, **kwargs})
        except ValueError as error:
            raise ValueError(f"{settings.where}: {in_hf_words(str(error), settings)}") from None

    @classmethod
    def from_file(cls, path: str | Path, **kwargs: Any) -> "Config":
        """Reads a `model_config.yaml`; the fields of adapters, which LitGPT reads there, are those of their own class."""
        values = read_yaml(path, "the fields of a model config")
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in values.items() if name in known or name not in ADAPTER_FIELDS}
        try:
            return cls(**{**values, **kwargs})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_checkpoint(cls, path: str | Path, **kwargs: Any) -> "Config":
        """The config of a checkpoint folder: its `model_config.yaml`, else its `config.json`, else its name's."""
        path = Path(path)
        if (config_path := path / "model_config.yaml").is_file():
            return cls.from_file(config_path, **kwargs)
        if (config_path := path / "config.json").is_file():
            return cls.from_hf(config_path, **{"name": path.resolve().name, **kwargs})
        try:
            return cls.from_name(path.resolve().name, **kwargs)
        except ValueError:
            raise FileNotFoundError(
                f"{str(path)!r} holds no model: neither 'model_config.yaml' nor matching config exists, nor config.json"
            ) from None


Config.__new__ = wraps(Config.__init__)(Config.__new__)  # the command line reads the fields from its signature


def unmet(field: str, value: Any, null: bool = True) -> str | None:
    """What a value for a field of `Config` must be, if it is not of its type or in its range; `None` if it is.

    Without `null`, `None` is not valid for optional fields either.
    """
    kind = Config.__dataclass_fields__[field].type
    if field.endswith("_indices"):
        kind = list | None  # the entries are checked by `check_indicator_and_length`
    if not fits(value, kind) or (value is None and not null):
        return described(kind).removesuffix("" if null else " or null")
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if field in _MAY_BE_ZERO:
        if value < 0:
            return "at least 0"
    elif field not in _MAY_BE_NEGATIVE and value <= 0:
        return "positive"
    most = _MOST.get(field, LARGEST)
    return f"at most {most}" if value > most else None


def find_multiple(n: int, k: int) -> int:
    """The smallest multiple of `k` that is at least `n`."""
    if k <= 0:
        raise ValueError(f"k must be positive, got {k}")
    return -(-n // k) * k


def check_indicator_and_length(
    params: list[int] | None, name: str, required_length: int, use_initial_part: bool = True, def_val: int = 1
) -> list[int]:
    """Per-layer flags as a list of `required_length` zeros and ones; `None` means `def_val` for all layers.

    A longer list is cut with `use_initial_part`. Raises `ValueError` for a wrong length or other values.
    """
    if params is None:
        return [def_val] * required_length
    params = list(params)
    if use_initial_part:
        params = params[:required_length]
    if len(params) != required_length:
        raise ValueError(f"{name} = {shown(params)} must have {required_length} entries, one a layer")
    if not all(flag in (0, 1) for flag in params):
        raise ValueError(f"{name} = {shown(params)} must hold only 0 and 1")
    return params


def _plain(value: Any) -> Any:
    """A deep copy of nested dicts and lists, tuples turned into lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _did_you_mean(name: str, known: Any) -> str:
    from difflib import get_close_matches

    by_lower = {k.lower(): k for k in known}
    close = get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f". Did you mean {' or '.join(repr(by_lower[c]) for c in close)}?" if close else ""


def __getattr__(name: str) -> Any:
    """`name_to_config` and `configs`: the named models as keyword arguments of `Config`, loaded on first use."""
    if name not in ("configs", "name_to_config"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from litgpt.families import named_models

    return named_models() if name == "name_to_config" else list(named_models().values())
