"""The options of the commands that generate, each declared once with its type, default, limits and help."""

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

import torch

from litgpt.checkpoint.base import Checkpoint
from litgpt.checkpoint.finetuned import trained_cache
from litgpt.engine.drafting import Drafter, PromptLookup
from litgpt.engine.loading import Quantization, choose_kv_caches, default_threads
from litgpt.engine.sampling import Sampling
from litgpt.engine.session import Session
from litgpt.kernels.library import compile_ahead
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.policies import POLICIES
from litgpt.kvcache.storages import STORAGES
from litgpt.model import GPT
from litgpt.settings import described, fits, shown
from litgpt.standard_streams import check_text

THREADS_HELP = "Threads that compute on the CPU. Default: $OMP_NUM_THREADS, or one for every core."
MOST_THREADS = 1024
DEFAULT_PROMPT = "What food do llamas eat?"

Kind = TypeVar("Kind", bound="Options")


def option(default: Any, help: str, least: int | None = None, most: int | None = None) -> Any:
    """A field of an `Options` class: an option with its default (`MISSING`: it is required), its help, and the least and the
    largest value of a whole number."""
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Values of options, checked.

    Raises:
        ValueError: naming a value of the wrong type or out of range.
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, checked(item, getattr(self, item.name)))

    def compile_ahead(self) -> None:
        """Compile kernels that only these options need, while the model is loaded."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """How a model is loaded."""

    quantize: Quantization | None = option(
        None, "Quantise the weights: int8, int4, or a mode of bitsandbytes (bnb.*, needs a GPU)."
    )
    precision: str | None = option(None, "bf16-true, 16-true or 32-true. Default: the fastest on the device.")
    compile: bool = option(False, "Compile the decode step, which takes a while at first.")
    access_token: str | None = option(None, "Token for the Hugging Face hub, for models that need one.")
    threads: int | None = option(None, THREADS_HELP, least=1, most=MOST_THREADS)

    def loading(self) -> dict[str, Any]:
        """These options, as arguments of `make_ready`."""
        own = {item.name: getattr(self, item.name) for item in fields(ModelOptions)}
        return own | {"threads": self.threads or default_threads()}


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(ModelOptions):
    """Which model is loaded, and how."""

    checkpoint_dir: Path | None = option(
        None,
        "Folder of a checkpoint (Hugging Face or LitGPT), a .gguf file, or a model's name. Default: a small model that is "
        "fetched once.",
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """How many tokens are drawn, and how."""

    max_new_tokens: int = option(50, "Most tokens of an answer.", least=1)
    top_k: int | None = option(50, "Draw each token from the k likeliest ones only.")
    top_p: float = option(1.0, "Draw each token from the likeliest ones whose probabilities add up to this.")
    min_p: float = option(0.0, "Draw each token from tokens at least this times as likely as the likeliest one.")
    temperature: float = option(0.8, "Logits are divided by it: below 1 favours likely tokens; 0 is greedy sampling.")
    repetition_penalty: float = option(1.0, "Above 1 makes tokens of the prompt and the answer less likely.")
    presence_penalty: float = option(0.0, "Subtracted from the logits of tokens in the answer.")
    frequency_penalty: float = option(0.0, "The same, for every occurrence.")
    logit_bias: dict[int, float] | None = option(
        None, 'Added to the logits of tokens, such as {"11": -100, "42": 1.5}: token ids and numbers.'
    )
    seed: int = option(
        1234,
        "Seed of the first answer's random draws; those of further answers count up from it.",
        least=-(2**63),
        most=2**63 - 1,
    )

    def sampling(self) -> Sampling:
        """The settings of the first answer; `ValueError` if they are out of range."""
        return Sampling(**{name: getattr(self, name) for name in SAMPLING_NAMES})


SAMPLING_NAMES = tuple(item.name for item in fields(SamplingOptions) if item.name != "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class PromptLookupOptions(Options):
    """Draft tokens without a draft model."""

    prompt_lookup: int | None = option(
        None,
        "Draft up to this many next tokens at a time from the text so far, and verify them in one call. The answer stays "
        "the same; one that repeats much of the text comes faster. 15 is a good value. Default: none.",
        least=1,
    )

    def drafter(self) -> Drafter | None:
        """The drafter, if any."""
        return None if self.prompt_lookup is None else PromptLookup(self.prompt_lookup)


@dataclass(frozen=True, kw_only=True)
class CacheOptions(Options):
    """The key-value cache, and the prefill."""

    kv_cache: str | None = option(
        None,
        "Which tokens the key-value cache keeps, as POLICY or POLICY-STORAGE. Policies: "
        f"{', '.join(POLICIES)}, or module:Class for a class of yours. Storages: {', '.join(STORAGES)}. dense keeps every "
        "token, lastrec the last cache_length ones. Default: dense, or what the model was trained with.",
    )
    cache_length: int | None = option(
        None, "Tokens that the key-value cache holds. Default: as many as are needed (dense), 1024 (lastrec).", least=1
    )
    kv_cache_args: dict[str, Any] | None = option(
        None,
        "Further arguments of the key-value cache, such as --kv_cache_args.n_sink 4, or as a mapping {n_sink: 4}: the first "
        "4 tokens are never dropped. With kvzip, --kv_cache_args.budget scores gives each head slots by its tokens' scores.",
    )
    prompt_chunksize: int | None = option(None, "Most tokens of a prefill call. Default: the whole prompt.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cache_spec()  # raises at once

    def compile_ahead(self) -> None:
        if self.cache_spec().storage_class.has_kernel_codes:
            compile_ahead("ENCODED")

    def cache_spec(self) -> CacheSpec:
        """The chosen cache; `ValueError` if it does not exist."""
        args = self.kv_cache_args or {}
        if clash := {"text", "policy", "storage", "cache_length"} & args.keys():
            raise ValueError(f"kv_cache_args has {clash.pop()!r}: use --kv_cache and --cache_length for that")
        return CacheSpec.parse("dense" if self.kv_cache is None else self.kv_cache, self.cache_length, **args)

    def as_trained(self: Kind, trained: Mapping[str, Any], tell: bool = True) -> Kind:
        """These options with the `trained` ones of the cache that a model was trained through, unless they ask for another."""
        if not trained or self.kv_cache is not None or self.cache_length is not None or self.kv_cache_args:
            return self
        if self.prompt_chunksize is not None:
            trained = {**trained, "prompt_chunksize": self.prompt_chunksize}
        options = replace(self, **trained)
        length = "" if options.cache_length is None else f" of {options.cache_length} tokens"
        if tell:
            print(
                f"Using the key-value cache that the model was trained with: {options.kv_cache}{length}",
                file=sys.stderr,
            )
        return options

    def assign_caches(self, model: GPT, batch_size: int = 1) -> None:
        """Give the model the chosen caches for `batch_size` rows."""
        choose_kv_caches(model, self.cache_spec(), batch_size)

    def check_caches(self, checkpoint: Checkpoint, batch_size: int = 1) -> None:
        """Raise `ValueError` if the model of a checkpoint cannot have the chosen caches; its weights are not read."""
        chosen = self.as_trained(trained_cache(checkpoint.path), tell=False)
        chosen.cache_spec().create(checkpoint.config, batch_size, torch.device("meta"))

    def session_of(self, model: GPT) -> Session:
        """A session with the chosen caches."""
        return Session(model, self.cache_spec(), prompt_chunksize=self.prompt_chunksize)


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(SamplingOptions, CacheOptions):
    """The options of all commands `generate*`: prompts, number of answers, and output."""

    prompt: str = option(DEFAULT_PROMPT, "The text to answer.")
    prompts: Path | None = option(
        None,
        'File of prompts to answer instead: one a line, or, if it is called .jsonl, JSON objects with a "prompt" and, if '
        'need be, a "sys_prompt", "max_new_tokens", "id", and settings such as "temperature" or "seed". Answers are JSON '
        "objects, one a line, in the same order.",
    )
    out: str | Path | None = option(None, "File for answers as JSON lines. Default: stdout.")
    batch_size: int = option(8, "Most answers to a file of prompts that are generated together.", least=1)
    sys_prompt: str | None = option(None, "System prompt, where the model's chat template has one.")
    num_samples: int = option(
        1, "Number of answers to a prompt, generated together as one batch.", least=1, most=1_000_000
    )
    logprobs: int | None = option(
        None, "Write answers as JSON with the log-probabilities of each token and of this many likeliest ones.", least=0
    )

    def __post_init__(self) -> None:
        if isinstance(self.out, str) and self.out.endswith(os.sep):  # a `Path` does not show it
            raise ValueError(f"--out {self.out!r} is a folder: give the name of a file in it")
        super().__post_init__()
        if not self.prompt:
            raise ValueError("the prompt is empty: give some text with --prompt")
        if self.prompts is not None and self.prompt != DEFAULT_PROMPT:
            raise ValueError("there are a --prompt and a file of --prompts: give one of them")
        if self.out is not None:
            _check_file(self.out, self.prompts)

    @property
    def as_json(self) -> bool:
        """Whether answers are JSON lines; else they are plain text."""
        return self.prompts is not None or self.out is not None or self.logprobs is not None

    def rows(self, n_prompts: int) -> int:
        """Most answers that are generated together."""
        return min(self.batch_size, n_prompts * self.num_samples) if self.as_json else self.num_samples


def _check_file(out: Path, prompts: Path | None) -> None:
    """Raise `ValueError` if answers cannot go to the file `out`."""
    target = Path(os.path.realpath(out))
    if target.is_symlink():
        raise ValueError(f"--out {str(out)!r} is a link that leads to itself")
    if target.is_dir():
        raise ValueError(f"--out {str(out)!r} is a folder: give the name of a file in it")
    if not target.parent.is_dir():
        raise ValueError(f"--out {str(out)!r}: there is no folder {str(target.parent)!r}")
    if prompts is not None and target.is_file() and prompts.is_file() and target.samefile(prompts):
        raise ValueError(f"--out {str(out)!r} is the file of --prompts: give another one")


def checked(item: Any, value: Any, name: str | None = None) -> Any:
    """The value of an option (a field made by `option`), converted to its type; errors call it `name`.

    Raises:
        ValueError: if the value has another type or is out of range.
    """
    name = name or item.name
    kinds = get_args(item.type) if isinstance(item.type, UnionType) or NoneType in get_args(item.type) else [item.type]
    if value is None and NoneType in kinds:
        return None
    value = converted(name, value, Path if Path in kinds else kinds[0])
    least, most = item.metadata["least"], item.metadata["most"]
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {shown(value)}")
    return value


def converted(name: str, value: Any, kind: Any) -> Any:
    """`value` as a `kind`: int, float, bool, str, Path, a Literal or a dict of them; otherwise `ValueError` with its name."""
    origin = get_origin(kind)
    if origin is dict and isinstance(value, Mapping):
        of_keys, of_values = get_args(kind)
        return {_key(name, key, of_keys): converted(f"{name}[{shown(key)}]", x, of_values) for key, x in value.items()}
    if kind is Any or (origin is Literal and value in get_args(kind)):
        return value
    if kind is Path and isinstance(value, str | os.PathLike):
        return Path(value)
    if kind in (int, float, bool, str) and fits(value, kind):
        if kind is str:
            check_text(name, value)
        return kind(value)
    if origin is Literal:
        expected = f"one of {', '.join(map(repr, get_args(kind)))}"
    else:
        expected = "a path" if kind is Path else described(kind)
    raise ValueError(f"{name} is not {expected}: {shown(value)}")


def _key(name: str, key: Any, kind: Any) -> Any:
    """A key of a mapping; in JSON, whole numbers are text."""
    if kind is int and isinstance(key, str) and re.fullmatch(r"0|[1-9][0-9]{0,18}", key):
        return int(key)
    return converted(f"a key of {name}", key, kind)


def command(kind: type[Kind], *positional: str) -> Callable[[Callable[[Kind], None]], Callable[..., None]]:
    """Decorator: turn a function of options into a command, with every option as a parameter in signature and docstring.

    Args:
        kind: the class of the options.
        positional: options that may be given by position, in this order; the others are given by name.
    """
    options = {item.name: item for item in fields(kind)}
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD if name in positional else inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if options[name].default is MISSING else options[name].default,
            annotation=options[name].type,
        )
        for name in (*positional, *(name for name in options if name not in positional))
    ]
    signature = inspect.Signature(parameters, return_annotation=None)
    explained = "\n".join(f"    {p.name}: {options[p.name].metadata['help']}" for p in parameters)

    def decorate(run: Callable[[Kind], None]) -> Callable[..., None]:
        def main(*args: Any, **kwargs: Any) -> None:
            options = kind(**signature.bind(*args, **kwargs).arguments)
            options.compile_ahead()
            run(options)

        main.__signature__ = signature
        main.__doc__ = f"{inspect.getdoc(run)}\n\nArgs:\n{explained}\n"
        main.__name__, main.__qualname__, main.__module__ = run.__name__, run.__qualname__, run.__module__
        return main

    return decorate
