"""The Python interface: `LLM.load("...").generate("...")`."""

from collections import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from litgpt.benchmark import benchmark_dict_to_markdown_table as benchmark_dict_to_markdown_table
from litgpt.benchmark import measure
from litgpt.checkpoint.load import load_model, save_litgpt, save_quantized
from litgpt.checkpoint.trainer import trainer_weights
from litgpt.config import Config
from litgpt.engine.answer import Answer
from litgpt.engine.caches import CacheLease
from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.drafting import PromptLookup
from litgpt.engine.engine import Engine
from litgpt.engine.loading import (
    default_device,
    lease_caches,
    make_ready,
    parse_precision,
    slow_down_decode,
    speed_up_decode,
    trained_spec,
)
from litgpt.engine.sampling import LogitsProcessor, Sampling, whole_number
from litgpt.engine.sequence import Sequence
from litgpt.engine.session import Session
from litgpt.kvcache import CacheSpec
from litgpt.model import GPT
from litgpt.parallel.pipeline import choose_devices, spread_layers
from litgpt.parallel.processes import join_group, launched_outside, number_of_processes, own_device
from litgpt.parallel.tensor import ShardedGPT, shard_model
from litgpt.preprocessor import Preprocessor as Preprocessor
from litgpt.prompt_frame import PromptFrame
from litgpt.prompts import (
    ChatTemplate,
    Message,
    PromptStyle,
    all_stop_tokens,
    encode_prompt,
    parse_prompts,
    save_prompt_style,
)
from litgpt.runners.quantized_weights import BNB_MODES, quantize_model
from litgpt.tokenizer import Tokenizer

Result = str | torch.Tensor | Answer


class LLM(nn.Module):
    """A language model with its tokenizer and prompt style. Make one with `LLM.load`.

    It may be used by several threads, and answers may be streamed side by side: each call has its own caches.

    For inference, weights are packed for the CPU's kernels (`litgpt.runners.packed_weights`); access to the parameters, or
    training, restores the plain ones.

    Attributes:
        model: the `GPT`.
        preprocessor: encodes and decodes text (None: there is no tokenizer).
        prompt_style: formats prompts for the model.
        config: the model's configuration.
        checkpoint_dir: the checkpoint.
        devices, fabric, generate_strategy, kv_cache_initialized, fixed_kv_cache_size: stored only, for scripts written for
            LitGPT; `distribute` places the model, and caches are made as needed.
    """

    def __init__(
        self,
        model: GPT,
        preprocessor: Preprocessor | None = None,
        prompt_style: PromptStyle | None = None,
        devices: int | list[int] | None = None,
        config: Config | None = None,
        checkpoint_dir: Path | None = None,
        fabric: Any = None,
        generate_strategy: Literal["sequential", "tensor_parallel"] | None = None,
        kv_cache_initialized: bool = False,
        fixed_kv_cache_size: int | Literal["max_model_supported"] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"LLM() takes a GPT, got {model!r}: LLM.load() takes a folder, a file or a name")
        self.model = model
        self.preprocessor = preprocessor
        self.prompt_style = PromptStyle.from_config(model.config) if prompt_style is None else prompt_style
        self.config = model.config if config is None else config
        self.checkpoint_dir = checkpoint_dir
        self.devices, self.fabric, self.generate_strategy = devices, fabric, generate_strategy
        self.kv_cache_initialized, self.fixed_kv_cache_size = kv_cache_initialized, fixed_kv_cache_size
        self._engine: Engine | None = None  # of the last `generate`
        self.compile_decode = False  # compile the decode step

    # -- from and to disk

    @classmethod
    def load(
        cls,
        model: str | Path,
        init: Literal["pretrained", "random"] | None = "pretrained",
        tokenizer_dir: Path | None = None,
        access_token: str | None = None,
        distribute: Literal["auto"] | None = "auto",
        precision: str | None = None,
        compile: bool = False,
        quantize: str | None = None,
        tie_embeddings: bool = True,
    ) -> "LLM":
        """Load a model.

        Args:
            model: a folder (Hugging Face or LitGPT), a `.gguf` file, or a model's name, which is downloaded if necessary.
            init: "random" makes a model of the named configuration with random weights.
            tokenizer_dir: folder of the tokenizer (default: of the checkpoint).
            access_token: for the Hugging Face hub.
            distribute: "auto" puts the model on the GPU, or the CPU without one; None leaves it on the CPU, in float32, for
                a later `distribute`.
            precision: bf16-true, 16-true or 32-true (default: the fastest on the device).
            compile: compile the decode step on first use.
            quantize: quantise the weights: int8, int4, or on a GPU a mode of bitsandbytes.
            tie_embeddings: False gives the output embedding its own weight, to be trained separately as in LitGPT, where the
                checkpoint has one weight for both embeddings.

        Raises:
            FileNotFoundError, ValueError: if the model does not exist or cannot be used.
        """
        if init not in ("pretrained", "random"):
            raise ValueError(f"init must be 'pretrained' or 'random', got {init!r}")
        if distribute not in ("auto", None):
            raise ValueError(f"distribute must be 'auto' or None, got {distribute!r}")
        tokenizer = None if tokenizer_dir is None else Tokenizer(tokenizer_dir)
        if init == "random":
            config = Config.from_name(str(model))
            dtype = parse_precision(precision or "32-true", torch.device("cpu"))
            gpt = GPT(config).to(dtype)
            gpt.apply(gpt._init_weights)
            if quantize is not None:
                quantize_model(gpt, quantize)
            llm = cls(gpt.eval(), None if tokenizer is None else Preprocessor(tokenizer), config=config)
        else:
            device = default_device() if distribute else torch.device("cpu")
            precision = precision if distribute else precision or "32-true"
            load = partial(load_model, tie_embeddings=tie_embeddings)
            ready = make_ready(
                model, precision, quantize, device=device, access_token=access_token, pack=False, load=load
            )
            gpt = ready.model
            llm = cls(
                gpt.requires_grad_(gpt.quantization is None),
                Preprocessor(ready.tokenizer if tokenizer is None else tokenizer, device),
                ready.prompt_style,
                checkpoint_dir=ready.checkpoint_dir,
            )
        llm.compile_decode = compile
        if distribute:
            llm.distribute(precision=precision if init == "pretrained" else precision or "32-true")
        return llm

    def save(self, out_dir: Path | str | None = None, prompt_style: PromptStyle | str | None = None) -> None:
        """Write a LitGPT folder atomically: weights (quantised ones as they are), configuration, tokenizer and prompt style.

        Args:
            out_dir: created if it does not exist.
            prompt_style: to be saved (default: the current one).
        """
        if out_dir is None:
            raise ValueError("name the folder to save to: save(out_dir)")
        out_dir = Path(out_dir)
        if isinstance(self.model, ShardedGPT):
            raise ValueError("this process holds a part of the model only: save it before it is distributed")
        self._for_training()
        if type(self.model.config) is not Config:
            raise ValueError(
                "the model has additional weights from fine-tuning, which are saved separately: "
                "`litgpt.train.finetune(..., out_dir=...)` writes them"
            )
        write = save_litgpt if self.model.quantization is None else save_quantized
        write(self.model, out_dir)
        if self.preprocessor is not None:
            self.preprocessor.tokenizer.save(out_dir)
        style = self.prompt_style if prompt_style is None else prompt_style
        if not isinstance(style, ChatTemplate):  # that is saved with the tokenizer
            save_prompt_style(style, out_dir)

    def distribute(
        self,
        accelerator: Literal["cpu", "cuda", "auto"] = "auto",
        devices: int | Literal["auto"] = "auto",
        precision: str | None = None,
        quantize: str | None = None,
        generate_strategy: Literal["sequential", "tensor_parallel"] | None = None,
        fixed_kv_cache_size: int | Literal["max_model_supported"] | None = None,
    ) -> None:
        """Put the model on one or several devices, in a precision. Its key-value caches are dropped.

        Args:
            accelerator: cpu, cuda, or auto: a GPU if there is one.
            devices: number of devices; auto: 1, or with a `generate_strategy` all.
            precision, quantize: as for `load`.
            generate_strategy: sequential: each device has some of the layers. tensor_parallel: each has a part of every
                layer; the script runs once for every device (`torchrun`), and all processes have to make the same calls.
            fixed_kv_cache_size: make the key-value caches now, for that many tokens, instead of as needed.

        Raises:
            ValueError: for unavailable devices, precisions or modes.
        """
        if generate_strategy not in (None, "sequential", "tensor_parallel"):
            raise ValueError(f"generate_strategy must be 'sequential' or 'tensor_parallel', got {generate_strategy!r}")
        if generate_strategy is None and devices not in ("auto", 1):
            raise ValueError(f"devices={devices!r} needs a generate_strategy: 'sequential' or 'tensor_parallel'")
        if self._on_several_devices:
            raise ValueError("the model is on several devices already: load it anew to distribute it otherwise")
        if accelerator == "cuda" and not torch.cuda.is_available():
            raise ValueError("accelerator='cuda', but there is no GPU that this build of torch can use")
        try:
            device = default_device() if accelerator == "auto" else torch.device(accelerator)
        except RuntimeError:
            raise ValueError(f"Invalid accelerator {accelerator!r}: it is cpu, cuda or auto") from None
        number = None if devices == "auto" else devices
        several = choose_devices(number, device.type) if generate_strategy == "sequential" else [device]
        if generate_strategy is not None and quantize in BNB_MODES:
            raise ValueError(f"quantize={quantize!r} is for one device: use int8 or int4")
        if len(several) > 1 and self.compile_decode:
            raise ValueError(f"a compiled model works on one device, not on {len(several)}: load it without compile")
        self._for_training()
        self.model.clear_kv_caches(assigned=True)
        dtype = parse_precision(precision, device)
        if generate_strategy == "tensor_parallel":
            device = self._divide(number, dtype, device)
        if quantize in BNB_MODES:
            self.model.to(dtype=dtype)  # which the layers then compute in
        if quantize is not None:
            quantize_model(self.model, quantize)
            self.model.requires_grad_(False)
        if len(several) > 1:
            spread_layers(self.model.to(dtype=dtype), several)
        else:
            self.model.to(device=device, dtype=dtype)
        if self.preprocessor is not None:
            self.preprocessor.device = device
        if fixed_kv_cache_size is not None:
            length = self.config.block_size if fixed_kv_cache_size == "max_model_supported" else fixed_kv_cache_size
            self.model.set_kv_caches(1, max_seq_length=length)

    def _divide(self, number: int | None, dtype: torch.dtype, device: torch.device) -> torch.device:
        """Replace the model by this process's shard, and return its device."""
        if (process := launched_outside()) is None:
            raise ValueError(
                "tensor_parallel divides the model among processes that all run this script: start it with "
                "`torchrun --nproc-per-node N SCRIPT`, or use the command `litgpt generate_tp`"
            )
        rank, world_size = process[0], number_of_processes(number)
        device = own_device(rank) if device.type == "cuda" else device
        part = shard_model(self.model, dtype, device, rank, world_size)
        join_group()
        self.model = part
        return device

    @property
    def _on_several_devices(self) -> bool:
        return isinstance(self.model, ShardedGPT) or self.model.layer_devices is not None

    # -- generating

    @property
    def tokenizer(self) -> Tokenizer:
        return self._preprocessor().tokenizer

    def generate(
        self,
        prompt: str | abc.Sequence[str] | abc.Sequence[Message] | abc.Sequence[abc.Sequence[Message]],
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        kv_cache: CacheSpec | str | None = None,
        cache_length: int | None = None,
        prompt_chunksize: int | None = None,
        *,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        logits_processors: abc.Sequence[LogitsProcessor] = (),
        logprobs: int | None = None,
        batch_size: int | None = None,
        prompt_lookup: int | None = None,
        **kv_cache_args: Any,
    ) -> Result | list[Result] | Iterator[str] | Iterator[torch.Tensor]:
        """Answer a prompt, or several at once.

        Args:
            prompt: a text, or a conversation: a list of messages `{"role": ..., "content": ...}`; or a list of such prompts,
                which are answered together (equal ones share their prefill).
            sys_prompt: system prompt, if the prompt style has one.
            max_new_tokens: most tokens of an answer.
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias: as for
                `litgpt.engine.sampling.Sampling`.
            return_as_token_ids: return tokens (n,) instead of text.
            stream: return an iterator over parts of the answer to one prompt.
            kv_cache: a `CacheSpec` or a cache's name, such as "dense" (every token) or "lastrec" (the last `cache_length`
                ones), for caches of this call. Default: the caches assigned to the model (`GPT.assign_kv_caches`), those
                that it was trained with, or "dense". A call with assigned caches ends the streams of earlier ones.
            cache_length: capacity of the cache in tokens (default: as many as needed, or 1024 for lastrec).
            prompt_chunksize: most tokens of a prefill call (default: the whole prompt).
            seed: of the first answer's own generator; further answers count up from it (default: torch's generator).
            logits_processors: as `Sampling.processors`; every answer gets copies.
            logprobs: return `Answer`s with the log-probabilities of every token and of this many likeliest ones.
            batch_size: most prompts at a time; a finished answer makes room for the next prompt (default: all).
            prompt_lookup: draft up to this many next tokens at a time from the text so far, and verify them in one call: the
                same answer, faster where it repeats text (default: no drafts).
            kv_cache_args: further arguments of the caches, such as `n_sink`: first tokens that lastrec keeps.

        Returns:
            The answer without the prompt: a text, tokens, or an `Answer`; a list of them for a list of prompts. A stream
            may be left at any time; it keeps its caches until it is closed or deleted.

        Raises:
            ValueError: for an empty prompt, settings out of range, or more tokens than the model or its cache take.
        """
        prompts, several = parse_prompts(prompt)
        if not isinstance(stream, bool):
            raise ValueError(f"stream is True or False, got {stream!r:.80}")
        if stream and several:
            raise ValueError("stream=True is for a single prompt")
        if logprobs is not None and (stream or return_as_token_ids):
            raise ValueError("logprobs come with whole answers: leave out stream and return_as_token_ids")
        if sys_prompt is not None and not isinstance(sys_prompt, str):
            raise ValueError(f"sys_prompt must be a text, got {sys_prompt!r}")
        if prompt_chunksize is not None:
            prompt_chunksize = whole_number("prompt_chunksize", prompt_chunksize, 1)
        if cache_length is not None:
            cache_length = whole_number("cache_length", cache_length, 1)
        rows = len(prompts)
        if batch_size is not None:
            rows = min(rows, whole_number("batch_size", batch_size, 1))
        penalties = repetition_penalty, presence_penalty, frequency_penalty
        sampling = Sampling(temperature, top_k, top_p, min_p, *penalties, logit_bias, seed, logits_processors)
        drafter = None if prompt_lookup is None else PromptLookup(whole_number("prompt_lookup", prompt_lookup))
        device = self.model.device
        encoded: dict[str, torch.Tensor] = {}
        for one in prompts:
            if repr(one) not in encoded:  # with quotes, since a text may look like a list of messages
                encoded[repr(one)] = self._text_to_token_ids(one, sys_prompt).to(device)
        stops = all_stop_tokens(self.tokenizer, self.prompt_style)
        sequences = [
            Sequence(
                encoded[repr(one)],
                max_new_tokens,
                sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + i),
                stops,
                logprobs=logprobs,
            )
            for i, one in enumerate(prompts)
        ]
        self._for_inference()
        assigned = kv_cache is None and self.model.caches.caches and not self.model.caches.default
        spec = self._spec("dense" if assigned else kv_cache, cache_length, kv_cache_args)
        lease = lease_caches(self.model, spec, rows, chosen=kv_cache is not None)
        longest = max(sequence.max_length for sequence in sequences)
        batch = ContinuousBatch(self.model, rows, longest, prompt_chunksize, drafter, lease)
        self._engine = batch.engine
        try:
            for sequence in sequences:
                batch.submit(sequence)
            if not stream:
                batch.run()
        except BaseException:
            batch.close()
            raise
        if stream:
            pieces = batch.stream(device)
            return pieces if return_as_token_ids else self.tokenizer.decode_stream(pieces)
        batch.close()
        if logprobs is not None:
            answers = [Answer.of(sequence, self.tokenizer) for sequence in sequences]
        elif return_as_token_ids:
            answers = [sequence.prompt.new_tensor(sequence.output) for sequence in sequences]
        else:
            answers = [self.tokenizer.decode(sequence.output) for sequence in sequences]
        return answers if several else answers[0]

    @property
    def acceptance_rate(self) -> float:
        """Fraction of the draft tokens of the last `generate(prompt_lookup=...)` that was accepted (0 if there were none)."""
        return 0.0 if self._engine is None else self._engine.acceptance_rate

    def session(
        self,
        kv_cache: CacheSpec | str | None = None,
        cache_length: int | None = None,
        prompt_chunksize: int | None = None,
        **kv_cache_args: Any,
    ) -> Session:
        """A sequence with caches of its own, to be continued, cropped, copied and saved. Arguments as for `generate`."""
        self._for_inference()
        return Session(self.model, self._spec(kv_cache, cache_length, kv_cache_args), prompt_chunksize=prompt_chunksize)

    def compress(
        self,
        context: str | Session,
        kv_cache: CacheSpec | str,
        cache_length: int | None = None,
        prompt_chunksize: int | None = None,
        sys_prompt: str | None = None,
        **kv_cache_args: Any,
    ) -> Session:
        """Read a long text once, and keep a small cache of it that any number of questions use: see `ask`.

        Args:
            context: the text, as the beginning of a user's message; or a session, whose tokens are read anew.
            kv_cache: which cache, such as "snapkv" or a `CacheSpec`.
            cache_length, prompt_chunksize, sys_prompt, kv_cache_args: as for `generate`.

        Returns:
            A session that ends with the text. `save` writes it to a file as small as its caches.

        Raises:
            ValueError: if there is nothing to read, or more than the caches take.
        """
        if isinstance(context, Session):
            tokens = context.tokens
        elif isinstance(context, str):
            tokens = self._frame(sys_prompt).begin(context) if context else ()
        else:
            raise ValueError(f"compress takes a text or a session, got {context!r:.80}")
        if not tokens:
            raise ValueError("there is nothing to compress: give some text, or a session that has some")
        session = self.session(kv_cache, cache_length, prompt_chunksize, **kv_cache_args)
        session.extend(tokens)
        return session

    def ask(
        self,
        context: Session,
        question: str,
        max_new_tokens: int = 50,
        *,
        temperature: float = 1.0,
        stream: bool = False,
        **sampling: Any,
    ) -> str | Iterator[str]:
        """The answer to a question about what `compress` has read, or about any session that ends within a user's message.

        The session stays as it is, so further questions may follow, also in other threads.

        Args:
            context: the session.
            question: follows its text.
            max_new_tokens: most tokens of the answer.
            temperature, sampling: as for `Session.generate`.
            stream: return an iterator over the parts of the answer's text.

        Raises:
            ValueError: if the question is empty, or the model or the caches do not take as many tokens.
        """
        if not isinstance(question, str) or not question:
            raise ValueError("the question is empty: give some text")
        twin, stops = context.fork(), all_stop_tokens(self.tokenizer, self.prompt_style)
        tokens = [*twin.tokens, *self._frame().ask(question)]
        drawn = twin.generate(tokens, max_new_tokens, stop_tokens=stops, temperature=temperature, **sampling)
        return self.tokenizer.decode_stream(drawn) if stream else self.tokenizer.decode(list(drawn))

    def _frame(self, sys_prompt: str | None = None) -> PromptFrame:
        return PromptFrame(self.tokenizer, self.prompt_style, sys_prompt)

    def _spec(
        self, kv_cache: CacheSpec | str | None, cache_length: int | None, kv_cache_args: abc.Mapping[str, Any]
    ) -> CacheSpec:
        """The chosen cache, or the one that the model was trained with."""
        if kv_cache is None and cache_length is None and not kv_cache_args and self.checkpoint_dir is not None:
            kv_cache = trained_spec(Path(self.checkpoint_dir))
        for name in kv_cache_args:  # where a misspelt argument of `generate` ends up
            if near := get_close_matches(name, signature(self.generate).parameters, n=1, cutoff=0.85):
                raise ValueError(f"there is no argument {name!r}: did you mean {near[0]}?")
        return CacheSpec.parse("dense" if kv_cache is None else kv_cache, cache_length, **kv_cache_args)

    def _text_to_token_ids(self, prompt: str | abc.Sequence[Message], sys_prompt: str | None = None) -> torch.Tensor:
        """The formatted prompt as tokens (T,)."""
        preprocessor = self._preprocessor()
        tokens = encode_prompt(preprocessor.tokenizer, self.prompt_style, prompt, sys_prompt=sys_prompt)
        return tokens.to(preprocessor.device)

    def _preprocessor(self) -> Preprocessor:
        if self.preprocessor is None:
            raise ValueError("the model has no tokenizer: load it with tokenizer_dir=...")
        return self.preprocessor

    def benchmark(self, num_iterations: int = 1, **kwargs: Any) -> tuple[str, dict[str, list[float]]]:
        """Run and measure `generate(**kwargs)` `num_iterations` times.

        Returns:
            The last answer; and the figures of all runs, by name: see `litgpt.benchmark.measure`.
        """
        kwargs = {**kwargs, "stream": True, "return_as_token_ids": True}
        tokens, results = measure(lambda: self.generate(**kwargs), whole_number("num_iterations", num_iterations, 1))
        return self.tokenizer.decode(tokens), results

    # -- training

    def forward(
        self,
        input_ids: torch.Tensor,
        target_ids: torch.Tensor | None = None,
        loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, T, V) of tokens (B, T); with targets (B, T), also the loss: position t predicts the target at t + 1.

        `loss_fn(logits, targets)` defaults to cross-entropy; targets of -100 are ignored.
        """
        self._for_training()
        logits = self.model(input_ids)
        if target_ids is None:
            return logits
        if loss_fn is None:
            return logits, nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), target_ids[:, 1:].flatten().long(), ignore_index=-100
            )
        return logits, loss_fn(logits[:, :-1], target_ids[:, 1:])

    def prepare_for_training(self) -> GPT:
        """The model with plain layers and without caches, for a training loop such as `litgpt.train.finetune`.

        The next `generate` packs its weights again.

        Raises:
            ValueError: if the model is on several devices.
        """
        if self._on_several_devices:
            raise ValueError("the model is on several devices: load it anew to train it")
        self._for_training()
        self.model.clear_kv_caches(assigned=True)
        return self.model

    def trainer_setup(self, trainer_ckpt: Path | None = None) -> None:
        """Prepare for a Lightning Trainer, with the weights of its checkpoint `trainer_ckpt` if given."""
        if self.model.quantization is not None:
            raise ValueError("quantised weights cannot be trained: load the model without quantize")
        self.prepare_for_training()
        if trainer_ckpt is not None:
            self.model.load_state_dict(trainer_weights(trainer_ckpt))

    def train(self, mode: bool = True) -> "LLM":
        self._for_training()
        return super().train(mode)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._for_training()
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The model's weights, by its own names."""
        self._for_training()
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], strict: bool = True) -> Any:
        self._for_training()
        return self.model.load_state_dict(state_dict, strict=strict)

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles: with plain weights, and without the last call's engine, which has a lock."""
        self._for_training()
        return {**self.__dict__, "_engine": None}

    def _apply(self, *args: Any, **kwargs: Any) -> "LLM":
        """Called by `to`, `cuda`, `float` and so on."""
        self._for_training()
        return super()._apply(*args, **kwargs)

    def _for_inference(self) -> None:
        CacheLease(self.model).run(self._speed_up)

    def _speed_up(self) -> None:
        self.model.eval()
        if self.model.layer_runner is None:
            speed_up_decode(self.model, self.compile_decode)

    def _for_training(self) -> None:
        slow_down_decode(self.model)


def calculate_number_of_devices(devices: int | list[int] | None) -> int:
    """Number of devices (0: neither a number nor a list)."""
    if isinstance(devices, int):
        return devices
    return len(devices) if isinstance(devices, list) else 0
