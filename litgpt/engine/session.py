"""A sequence that is continued again and again, with caches of its own."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from litgpt.engine.caches import CacheLease, prepare_caches
from litgpt.engine.drafting import Drafter
from litgpt.engine.engine import Engine, check_vocabulary
from litgpt.engine.loading import choose_kv_caches
from litgpt.engine.prefill import prefill, uninterrupted_size
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence as GeneratedSequence
from litgpt.engine.session_file import SessionFile, read_session, write_session
from litgpt.fingerprint import fingerprint
from litgpt.kvcache import CacheSpec, KVCache
from litgpt.kvcache.layers import LayerCaches
from litgpt.model import GPT


class Session:
    """One sequence with caches of its own: cached tokens are not computed again.

    The caches are in the model only while the session runs it, so any number of sessions and other users can share a model
    and alternate, even token by token.

    Args:
        model: in evaluation mode.
        kv_cache: a `CacheSpec` or a cache's name, such as "dense" (every token) or "lastrec" (the last `cache_length` ones).
        cache_length: capacity in tokens (None: as many as needed, or the default of a cache that evicts).
        prompt_chunksize: most tokens of a prefill call (None: as many as the caches take).
        kv_cache_args: further arguments of the caches, such as `n_sink`.

    Attributes:
        tokens: the sequence, given and drawn tokens, stop sequences included.
        reused: number of tokens of the last `generate`'s prompt that were cached.
        notes: any JSON value; saved with the session.

    Raises:
        ValueError: if there are no such caches.
    """

    def __init__(
        self,
        model: GPT,
        kv_cache: CacheSpec | str = "dense",
        cache_length: int | None = None,
        prompt_chunksize: int | None = None,
        **kv_cache_args: Any,
    ) -> None:
        self.model = model
        self.prompt_chunksize = prompt_chunksize
        self.tokens: list[int] = []
        self.reused = 0
        self.notes: dict[str, Any] = {}
        self._version = 0  # an iterator of an earlier version must not continue
        self._lease = CacheLease(model, LayerCaches())
        spec = CacheSpec.parse(kv_cache, cache_length, **kv_cache_args)
        self._lease.run(choose_kv_caches, model, spec)
        self._grows = not self.kv_caches  # default caches, made and enlarged as needed
        self._kind = spec.describe()
        if not self._grows and spec.cache_length is None:
            self._kind["cache_length"] = spec.policy_class.default_cache_length(model.config)

    # -- contents

    @property
    def kv_caches(self) -> list[KVCache]:
        """The session's caches, one a layer; empty if not made yet."""
        return self._lease.caches.caches

    @property
    def cached(self) -> int:
        """Number of first tokens of the sequence that the caches hold or have evicted."""
        return self._lease.caches.next_token_pos

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches have allocated."""
        return self._lease.caches.size_in_bytes()

    @property
    def limit(self) -> int | None:
        """Most tokens of the sequence (None: any number)."""
        caches, context = self._lease.caches, self.model.max_seq_length
        if self._grows:
            return context
        return None if caches.unbounded else min(context, caches.max_length or context)

    # -- appending and removing tokens

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens and run them through the model; the last one is run with the tokens that follow.

        Raises:
            ValueError: if there are none, or more than the model or the caches take, before any work.
        """
        self._append(tokens)
        if rest := self.tokens[self.cached : -1]:
            self._lease.run(prefill, self.model, [self._tensor(rest)], self.prompt_chunksize, self.cached)

    def predict(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append tokens, and return the logits (n, V) with which the model predicts each of them from all before it.

        They are run in as few calls as the caches take, as for `extend`.

        Raises:
            ValueError: if there are none, the session is empty, or they are more than the model or the caches take, before any
                work.
        """
        if not self.tokens:
            raise ValueError("an empty session predicts nothing: extend it by a token first")
        first = len(self.tokens) - 1
        self._append(tokens)
        if rest := self.tokens[self.cached : first]:
            self._lease.run(prefill, self.model, [self._tensor(rest)], self.prompt_chunksize, self.cached)
        return self._lease.run(self._logits, self._tensor(self.tokens[first:-1]))

    @torch.inference_mode()
    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run all of `tokens` (n,) after what is cached; logits (n, V)."""
        found: list[torch.Tensor] = []
        while (done := sum(map(len, found))) < len(tokens):
            start = self.model.next_token_pos
            size = uninterrupted_size(self.model, len(tokens) - done, self.prompt_chunksize, start)
            found.append(self.model(tokens[None, done : done + size], start)[0])
        return torch.cat(found)

    def _append(self, tokens: Sequence[int]) -> None:
        """Append tokens without running them."""
        tokens = [int(token) for token in tokens]
        if not tokens:
            raise ValueError("there are no tokens to extend the session by")
        check_vocabulary(tokens, self.model.config.padded_vocab_size)
        self._make_room(len(self.tokens) + len(tokens))
        self._version += 1
        self.tokens = self.tokens + tokens

    def generate(
        self,
        prompt: Sequence[int] | None = None,
        max_new_tokens: int = 50,
        *,
        stop_tokens: Sequence[Sequence[int]] = (),
        drafter: Drafter | None = None,
        **sampling: Any,
    ) -> Iterator[int]:
        """Generate the next tokens.

        Args:
            prompt: the whole sequence to continue (None: the session's). The prefix that it shares with the session is not
                computed again; the rest of the session is forgotten.
            max_new_tokens: most tokens to draw.
            stop_tokens: sequences of tokens, each of which ends the output.
            drafter: drafts the next tokens (None: no drafts).
            sampling: fields of `Sampling`, such as `temperature=0`.

        Yields:
            Tokens, without the stop sequence. The iterator may be left at any time.

        Raises:
            ValueError: if there is no prompt, or more tokens than the model or the caches take, before any work; and if
                the session is changed before the iterator has ended.
        """
        tokens = [int(token) for token in (self.tokens if prompt is None else prompt)]
        if not tokens:
            raise ValueError("the prompt is empty: it needs at least one token")
        sequence = GeneratedSequence(self._tensor(tokens), max_new_tokens, Sampling(**sampling), stop_tokens)
        check_vocabulary(tokens, self.model.config.padded_vocab_size)
        engine = Engine(self.model, self.prompt_chunksize, drafter, lease=self._lease)
        self._make_room(sequence.max_length)
        self._version += 1
        version, self.reused = self._version, self._rewind(tokens)
        self.tokens = sequence.tokens  # the engine appends to it
        engine.add([sequence], self.reused)
        while True:
            if version != self._version:
                raise ValueError("the session was changed before this generation had ended")
            released = engine.step()
            if not released:
                return
            for _, output in released:
                yield from output

    def crop(self, n: int) -> None:
        """Forget all but the first `n` tokens. If the caches cannot be cropped to `n`, the tokens are computed again later.

        Raises:
            ValueError: if there are fewer.
        """
        if not 0 <= n <= len(self.tokens):
            raise ValueError(f"cannot crop to {n}: must be in 0..{len(self.tokens)}, the tokens so far")
        self._version += 1
        self._rewind(self.tokens[:n])
        self.tokens = self.tokens[:n]

    def reset(self) -> None:
        """Forget all tokens."""
        self.crop(0)

    def fork(self) -> "Session":
        """An independent copy of the session; the slots in use are copied."""
        twin = copy.copy(self)
        twin.tokens, twin.notes = list(self.tokens), copy.deepcopy(self.notes)
        caches = replace(self._lease.caches, caches=[cache.fork() for cache in self.kv_caches])
        twin._lease = CacheLease(self.model, caches)
        return twin

    # -- files

    def save(self, path: Path | str) -> None:
        """Write the session to a file. If interrupted at any point, the previous file stays intact.

        Raises:
            OSError: if it cannot be written.
        """
        states = [cache.state(copy=False) for cache in self.kv_caches]
        tensors = {"tokens": torch.tensor(self.tokens, dtype=torch.int64)}
        for layer, state in enumerate(states):
            tensors |= {f"layers.{layer}.{name}": x for name, x in state.items() if isinstance(x, torch.Tensor)}
        about = {
            "model": self.model.config.name,
            "fingerprint": fingerprint(self.model),
            "dtype": self._dtype(),
            "kind": self._kind,
            "long_rope": self._lease.caches.long_rope,
            "caches": [{k: v for k, v in state.items() if not isinstance(v, torch.Tensor)} for state in states],
            "notes": self.notes,
        }
        write_session(Path(path), about, tensors)

    def load(self, path: Path | str) -> None:
        """Restore a saved session, which then continues exactly as the saved one.

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: if it is damaged, or of another model, dtype or kind of caches; the session is then unchanged.
        """
        self.restore(read_session(Path(path)))

    def restore(self, file: SessionFile) -> None:
        """`load`, from a file that was read before."""
        about, tokens = file.about, file.tensors["tokens"].tolist()
        self._check_fits(file)
        fresh = copy.copy(self)
        caches = LayerCaches([cache.empty_copy() for cache in self.kv_caches if not self._grows])
        fresh._lease = CacheLease(self.model, caches)
        if self._grows and about["caches"]:
            fresh._make_room(len(tokens))
        try:
            for layer, (cache, state) in enumerate(zip(fresh.kv_caches, about["caches"], strict=False)):
                prefix = f"layers.{layer}."
                tensors = {k.removeprefix(prefix): x for k, x in file.tensors.items() if k.startswith(prefix)}
                cache.load_state(state | tensors)
        except ValueError as error:
            raise ValueError(f"{file.path} does not fit the caches: {error}; begin a new session") from None
        fresh._lease.caches.long_rope = about["long_rope"]
        self._version += 1
        self.tokens, self.notes, self._lease, self.reused = tokens, about["notes"], fresh._lease, 0

    def _check_fits(self, file: SessionFile) -> None:
        about, config = file.about, self.model.config
        if about["dtype"] != self._dtype():
            raise ValueError(
                f"{file.path} holds {about['dtype']}, the model computes in {self._dtype()}: "
                "load the model in the precision that the session was saved in, or begin a new session"
            )
        if about["fingerprint"] != fingerprint(self.model):
            raise ValueError(
                f"{file.path} was saved with another model, {about['model']!r}, or with other weights of it: "
                f"use those instead of this {config.name!r}, or begin a new session"
            )
        # dense caches of any length have equal contents, but default ones are smaller in layers with a sliding window
        both_dense = about["kind"]["kv_cache"] == self._kind["kv_cache"] == "dense"
        if about["kind"] != self._kind and not (both_dense and config.sliding_window_size is None):
            raise ValueError(
                f"{file.path} was saved with {_describe(about['kind'])}, this session has {_describe(self._kind)}: "
                "use the same, or begin a new session"
            )

    def _dtype(self) -> str:
        return str(self.model.transformer.wte.weight.dtype).removeprefix("torch.")

    # -- the caches

    def _make_room(self, length: int) -> None:
        """Ensure that the caches take `length` tokens; enlarged ones keep their contents."""
        self._lease.run(self._enlarge_caches, length)

    def _enlarge_caches(self, length: int) -> None:
        model = self.model
        model.expect_length(length)  # may clear the caches
        old = model.kv_caches()
        small = any(not cache.evicts and cache.cache_length < length for cache in old)
        if self._grows and small and length <= model.max_seq_length:
            model.exchange_kv_caches(replace(model.caches, caches=[], default=False))
        prepare_caches(model, 1, length, roomy=True)
        for cache, previous in zip(model.kv_caches(), old, strict=False):
            if cache is not previous:
                cache.load_state(previous.state(copy=False))

    def _rewind(self, tokens: list[int]) -> int:
        """Rewind the caches to the common prefix with `tokens`, short of the last one, which is to be run. Returns the number
        of tokens that are then cached."""
        limit = max(0, min(self.cached, len(tokens) - 1))
        common = limit
        if self.tokens[:limit] != tokens[:limit]:
            common = next(i for i in range(limit) if self.tokens[i] != tokens[i])
        if common < self.cached:
            self._lease.run(lambda: self.model.caches.crop(common))
        return self.cached

    def _tensor(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor(tokens, device=self.model.device)


def _describe(kind: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in kind.items())
